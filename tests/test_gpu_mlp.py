"""The Triton perceptrons against their specification in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.encodings.mlp import mlp, mlp_reference

from .raster_fixtures import assert_rows_close, cotangents
from .test_mlp import HEADS, is_certain, make_inputs

WIDTHS = [
    *([1, 1], [3, 2], [32, 64, 16], [31, 64, 64, 3], [19, 128, 5], [16, 16, 16, 16], [5, 7, 9, 33]),
    *([5, 7, 9, 130], [9, 128, 128, 5]),  # left to PyTorch
]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def run(function: Any, x: Tensor, weights: Tensor, dims: list[int], head: str) -> list[Tensor]:
    """Outputs and both gradients, on the CPU; cotangents are the same on every device."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(x, weights, dims, head)
    out.backward(cotangents(out.detach().cpu().float())[0].to(out))
    return [t.cpu() for t in (out.detach(), x.grad, weights.grad)]  # type: ignore[union-attr]


def compare(x: Tensor, weights: Tensor, dims: list[int], head: str, device: torch.device) -> None:
    wanted = run(mlp_reference, x.double(), weights.double(), dims, head)
    got = run(mlp, x.to(device), weights.to(device), dims, head)
    for name, tolerance, a, b in zip(("out", "v_x", "v_weights"), (1e-5, 1e-4, 1e-4), got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert_rows_close(a, b, tolerance, name)


@pytest.mark.parametrize("dims", WIDTHS, ids=lambda dims: "-".join(map(str, dims)))
@pytest.mark.parametrize("head", HEADS)
def test_against_the_reference(head: str, dims: list[int], triton_device: torch.device) -> None:
    """A block and a part of one."""
    x, weights = make_inputs(71, dims)
    certain = is_certain(x, weights, dims, head)
    assert certain.sum() >= 64
    compare(x[certain], weights, dims, head, triton_device)


@pytest.mark.parametrize("count", [0, 1, 64])
@pytest.mark.parametrize("dims", [[6, 20, 5], [6, 140, 5]], ids=["fused", "wide"])
def test_numbers_of_rows(dims: list[int], count: int, triton_device: torch.device) -> None:
    x, weights = make_inputs(count, dims)
    assert is_certain(x, weights, dims, "none").all()
    compare(x, weights, dims, "none", triton_device)


def test_rows_in_parts(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the backward pass takes at once, whose weights' gradients more blocks share than there are programs."""
    from prismfield.encodings.gpu import mlp as gpu

    monkeypatch.setattr(gpu, "ROWS", 128)
    monkeypatch.setattr(gpu, "PROGRAMS", 3)
    dims = [5, 18, 9, 3]
    x, weights = make_inputs(300, dims)
    x = x[is_certain(x, weights, dims, "sigmoid")]
    assert len(x) > 256
    compare(x, weights, dims, "sigmoid", triton_device)


@pytest.mark.parametrize("width", [16, 140], ids=["fused", "wide"])
@pytest.mark.parametrize("head", HEADS)
def test_large_and_impossible_values(head: str, width: int, triton_device: torch.device) -> None:
    """Heads far out; and NaN in a row stays there and is not hidden by a ReLU."""
    x = torch.tensor([-1e4, -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 90.0, 1e4])[:, None].repeat(1, width)
    weights = torch.zeros(width)
    weights[0] = 1.0
    got = run(mlp, x.to(triton_device), weights.to(triton_device), [width, 1], head)
    wanted = run(mlp_reference, x.double(), weights.double(), [width, 1], head)
    if head == "sigmoid":  # of which the reference takes y (1 - y), and even in double precision 1 - y is rough far out
        y, v = wanted[0], cotangents(torch.empty(len(x), 1))[0].double()
        v = v * y * (-x[:, :1].double()).sigmoid()
        wanted[1:] = [v * weights.double(), (v * x.double()).sum(0)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-30)
    x, weights = make_inputs(30, [width, 8, 3])
    x[17, 2] = float("nan")
    out = mlp(x.to(triton_device), weights.to(triton_device), [width, 8, 3], head)  # type: ignore[arg-type]
    assert out[17].isnan().all() and out[torch.arange(30) != 17].isfinite().all()


@pytest.mark.parametrize("width", [8, 140], ids=["fused", "wide"])
def test_gradients_that_are_not_wanted(width: int, triton_device: torch.device) -> None:
    dims, found = [4, width, 3], []
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [
            t.to(triton_device).requires_grad_(want) for t, want in zip(make_inputs(9, dims), wanted, strict=True)
        ]
        out = mlp(*leaves, dims)
        out.backward(torch.ones_like(out))
        found.append([t.grad for t in leaves])
    assert found[1][1] is None and found[2][0] is None
    assert torch.equal(found[0][0], found[1][0])  # type: ignore[arg-type]
    assert torch.equal(found[0][1], found[2][1])  # type: ignore[arg-type]


def test_what_is_fused(triton_device: torch.device) -> None:
    from prismfield.encodings.gpu.mlp import is_fused

    assert [is_fused(dims) for dims in WIDTHS] == [True] * 7 + [False] * 2
    assert not is_fused([64, 65]) and not is_fused([128, 33])


def test_an_unknown_head(triton_device: torch.device) -> None:
    from prismfield.encodings.gpu.mlp import mlp_forward

    x, weights = (t.to(triton_device) for t in make_inputs(2, [4, 3]))
    with pytest.raises(ValueError, match=r"^output: expected none, relu, sigmoid or softplus, got 'tanh'"):
        mlp_forward(x, weights, [4, 3], "tanh", x.new_empty(2, 3))
