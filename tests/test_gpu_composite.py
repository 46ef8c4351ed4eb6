"""The Triton compositing against the reference in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from prismfield.render.ops.bin import bin_primitives
from prismfield.render.ops.composite import MAX_CHANNELS, composite
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN

from .test_composite import Size, check_kernel, draw, splat

# The interpreter's: lanes that hold nothing compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# count, image, cameras, channels: nothing, one, a pixel, less than a tile, several tiles and cameras, long lists, many channels
CASES = [
    (0, (17, 9), 1, 3),
    (1, (17, 9), 2, 3),
    (7, (1, 1), 3, 1),
    (40, (37, 21), 2, 3),
    (300, (17, 9), 1, 8),
    (18, (17, 9), 1, MAX_CHANNELS),
]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(case: tuple[int, Size, int, int], extras: bool, triton_device: torch.device) -> None:
    check_kernel(case, extras, triton_device)


def test_cutoffs(triton_device: torch.device) -> None:
    """Alpha below 1/255 does not show, above 0.99 is held there, and nothing shows behind what stops all but 1e-4."""
    if triton_device.type == "cuda":
        pytest.skip("draws on the CPU")
    for alpha, shown in ((0.999 * ALPHA_MIN, 0.0), (1.001 * ALPHA_MIN, 1.001 * ALPHA_MIN), (1.0, ALPHA_MAX)):
        weights = draw(True, [splat(1.5, 1.5, alpha)], torch.ones(1, 1), [1.0])[0]
        assert weights.item() == pytest.approx(shown, rel=1e-5)
    weights, alpha_, _, median = draw(True, [splat(1.5, 1.5, 0.98)] * 4, torch.eye(4), [1.0, 2.0, 3.0, 4.0])
    assert weights.tolist() == pytest.approx([0.98, 0.98 * 0.02, 0, 0], rel=1e-5)
    assert alpha_.item() == pytest.approx(1 - 4e-4) and median == 1


def test_held_alpha_carries_no_gradient(triton_device: torch.device) -> None:
    params = torch.tensor([[splat(1.2, 0.9, 0.999, 30.0)]], device=triton_device).requires_grad_()
    features = torch.ones(1, 1, 1, device=triton_device).requires_grad_()
    z, radii = torch.ones(1, 1, device=triton_device), torch.full((1, 1, 2), 99.0, device=triton_device)
    isects = bin_primitives("gaussian", params, z, radii, (3, 2))
    composite("gaussian", params, features, z, isects, (3, 2)).features.sum().backward()
    assert params.grad is not None and features.grad is not None
    assert (params.grad == 0).all()
    assert features.grad.item() == pytest.approx(6 * ALPHA_MAX)


def test_what_is_not_a_number_does_not_show(triton_device: torch.device) -> None:
    bad = splat(1.5, 1.5, 0.5)
    bad[2] = math.nan
    params = torch.tensor([[bad, splat(1.5, 1.5, 0.5)]], device=triton_device)
    z, radii = torch.ones(1, 2, device=triton_device), torch.full((1, 2, 2), 99.0, device=triton_device)
    isects = bin_primitives("gaussian", params, z, radii, (3, 2))
    out = composite("gaussian", params, torch.ones(1, 2, 1, device=triton_device), z, isects, (3, 2))
    assert out.features.cpu().flatten().tolist() == pytest.approx([0.5] * 6, rel=1e-4)
