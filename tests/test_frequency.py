"""The frequency encoding against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from prismfield.encodings.frequency import Frequency


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 5)])
@pytest.mark.parametrize(("in_dim", "octaves"), [(1, 1), (3, 4)])
def test_it_is_the_formula(shape: tuple[int, ...], in_dim: int, octaves: int) -> None:
    encoding = Frequency(in_dim, octaves)
    x = 3 * torch.rand(*shape, in_dim) - 1
    angles = [2**k * math.pi * x[..., d] for d in range(in_dim) for k in range(octaves)]
    wanted = torch.stack([f(angle) for f in (torch.sin, torch.cos) for angle in angles], -1)
    assert encoding.out_dim == wanted.shape[-1]
    torch.testing.assert_close(encoding(x), wanted, rtol=0, atol=1e-5)


def test_it_can_be_differentiated_twice() -> None:
    x = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    encoding = Frequency(2, 3).double()
    assert torch.autograd.gradcheck(encoding, x)
    assert torch.autograd.gradgradcheck(encoding, x)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[..., 3\], got \[4, 2\]"):
        Frequency(3, 4)(torch.rand(4, 2))
    with pytest.raises(ValueError, match="octaves: expected 1 or more, got 3 and 0"):
        Frequency(3, 0)
