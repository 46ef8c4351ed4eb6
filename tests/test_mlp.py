"""Fused perceptrons: the kernels against the reference in double precision, the reference against differences and torch's layers."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prismfield.encodings.mlp import Mlp, mlp, mlp_reference

from .raster_fixtures import assert_rows_close, cotangents, usable_levels, use_kernels

HEADS = ["none", "relu", "sigmoid", "softplus"]
SHAPES = [[1, 1], [3, 2], [32, 64, 16], [32, 64, 64, 3], [31, 64, 64, 64, 17], [19, 128, 5], [5, 7, 9, 130]]


def make_inputs(count: int, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Inputs, and weights of a size at which values neither grow nor shrink from layer to layer."""
    generator = torch.Generator().manual_seed(count + sum(dims))
    layers = [torch.randn(b * a, generator=generator) * (2 / a) ** 0.5 for a, b in itertools.pairwise(dims)]
    return torch.randn(count, dims[0], generator=generator), torch.cat(layers)


def run(function: Any, x: Tensor, weights: Tensor, dims: list[int], head: str) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = function(x, weights, dims, head)
    out.backward(*cotangents(out))
    return [out.detach(), x.grad, weights.grad]  # type: ignore[list-item]


def is_certain(x: Tensor, weights: Tensor, dims: list[int], head: str) -> Tensor:
    """[S]: no value is so near the kink of a ReLU that rounding decides on which side it lies."""
    values, certain = x.double(), torch.ones(len(x), dtype=torch.bool)
    layers = weights.double().split([a * b for a, b in itertools.pairwise(dims)])
    for number, (layer, (a, b)) in enumerate(zip(layers, itertools.pairwise(dims), strict=True)):
        values = values @ layer.view(b, a).mT
        if number + 2 < len(dims) or head == "relu":
            certain &= (values.abs() > 1e-5).all(-1)
            values = values.relu()
    return certain


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dims", SHAPES, ids=lambda dims: "-".join(map(str, dims)))
@pytest.mark.parametrize("count", [0, 1, 7, 49, 4500])
def test_kernel_against_reference(
    module: Any, count: int, dims: list[int], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows fewer than a block, none whole, and more than those whose gradients are summed together."""
    use_kernels(monkeypatch, module)
    x, weights = make_inputs(count, dims)
    certain = is_certain(x, weights, dims, head)
    assert certain.sum() >= 0.9 * count - 1
    x = x[certain]
    got, wanted = run(mlp, x, weights, dims, head), run(mlp_reference, x.double(), weights.double(), dims, head)
    for name, tolerance, a, b in zip(("out", "v_x", "v_weights"), (1e-5, 1e-4, 1e-4), got, wanted, strict=True):
        assert a.dtype == torch.float32
        # The polynomials of exp and log are good to 3e-7 of 1
        assert_rows_close(a, b, tolerance, name, floor=1e-5)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("head", HEADS)
def test_large_and_impossible_values(module: Any, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads far out, with their slopes in closed form; and NaN in a row stays there and is not hidden by a ReLU."""
    use_kernels(monkeypatch, module)
    x = torch.tensor([-1e4, -90.0, -30.0, -1.0, 0.0, 1.0, 30.0, 90.0, 1e4])[:, None]
    out, v_x, v_weight = run(mlp, x, torch.ones(1), [1, 1], head)
    x = x.double()
    e = torch.exp(-x.abs())
    slopes = {
        "none": torch.ones_like(x),
        "relu": (x > 0).double(),
        "sigmoid": e / (1 + e) ** 2,  # autograd's y (1 - y) is 1e-3 off at 30, where y is nearly 1
        "softplus": torch.where(x < 0, e, 1.0) / (1 + e),
    }
    wanted = cotangents(out)[0].double() * slopes[head]
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-30)
    close(out.double(), mlp_reference(x, torch.ones(1).double(), [1, 1], head))
    close(v_x.double(), wanted)
    close(v_weight.double(), (wanted * x).sum()[None])
    x, weights = make_inputs(60, [5, 8, 3])
    x[17, 2] = float("nan")
    out = mlp(x, weights, [5, 8, 3], head)  # type: ignore[arg-type]
    assert out[17].isnan().all() and out[torch.arange(60) != 17].isfinite().all()


def test_thread_count_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = usable_levels()[0].values[0]
    if module is None:
        pytest.skip("no compiled kernels")
    use_kernels(monkeypatch, module)
    dims = [32, 64, 64, 3]
    x, weights = make_inputs(20_000, dims)
    before, results = module.num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            module.set_num_threads(threads)
            results.append(run(mlp, x, weights, dims, "sigmoid"))
    finally:
        module.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dims", [[3, 2], [4, 5, 3], [4, 5, 6, 2]])
def test_gradients(dims: list[int], head: str) -> None:
    """First and second, in double precision."""
    x, weights = make_inputs(3, dims)
    leaves = (x.double().requires_grad_(), weights.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *leaves: mlp(*leaves, dims, head), leaves)  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(lambda *leaves: mlp(*leaves, dims, head), leaves)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("with_weights", [True, False])
def test_second_derivatives_behind_the_kernel(module: Any, with_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    dims = [5, 16, 16, 1]
    x, weights = make_inputs(40, dims)

    def slope_gradients(x: Tensor, weights: Tensor) -> list[Tensor]:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_(with_weights)
        (slope,) = torch.autograd.grad(mlp(x, weights, dims, "softplus").sum(), x, create_graph=True)
        loss = (slope.norm(dim=-1) - 1).square().mean()
        return list(torch.autograd.grad(loss, [x, weights] if with_weights else [x]))

    for a, b in zip(slope_gradients(x, weights), slope_gradients(x.double(), weights.double()), strict=True):
        assert_rows_close(a, b, 1e-4, "second", floor=1e-5)


def test_module_is_torch_s_layers() -> None:
    """Weights of its layers in order, [out, in] each; any axes before the last."""
    torch.manual_seed(0)
    network = Mlp(6, 3, width=10, hidden=2, head="softplus")
    linear = [nn.Linear(a, b, bias=False) for a, b in ((6, 10), (10, 10), (10, 3))]
    start = 0
    for layer in linear:
        layer.weight.data = network.weights.detach()[start : start + layer.weight.numel()].view_as(layer.weight)
        start += layer.weight.numel()
    assert start == len(network.weights)
    x = torch.randn(4, 5, 6)
    wanted = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2], nn.Softplus())(x)
    torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-6)
    assert network(x[:0]).shape == (0, 5, 3) and network(x[0, 0]).shape == (3,)
    for layer, fan_in in zip(linear, (6, 10, 10), strict=True):  # He et al. 2015: uniform to sqrt(6 / fan_in)
        assert 0.8 < float(layer.weight.detach().abs().max()) / (6 / fan_in) ** 0.5 <= 1


@pytest.mark.parametrize("module", usable_levels())
def test_no_gradient_where_none_is_asked_for(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    x, weights = make_inputs(9, [4, 5, 3])
    mlp(x, weights.requires_grad_(), [4, 5, 3]).sum().backward()
    assert weights.grad is not None and x.grad is None
    weights = weights.detach()
    mlp(x.requires_grad_(), weights, [4, 5, 3]).sum().backward()
    assert x.grad is not None and weights.grad is None


@pytest.mark.parametrize("module", usable_levels())
def test_opcheck(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    x, weights = make_inputs(9, [4, 5, 3])
    leaves = (x.clone().requires_grad_(), weights.clone().requires_grad_())
    torch.library.opcheck(torch.ops.prismfield.mlp, (*leaves, [4, 5, 3], "sigmoid"))
    for wanted in (True, False):
        arguments = (x, weights, [4, 5, 3], "sigmoid", torch.randn(9, 3), wanted)
        torch.library.opcheck(torch.ops.prismfield.mlp_backward, arguments)


def test_bad_arguments_are_named() -> None:
    x, weights = make_inputs(9, [4, 5, 3])
    for name, arguments in {
        "x": (x[:, 1:], weights, [4, 5, 3]),
        "weights": (x, weights[1:], [4, 5, 3]),
        "weights: expected dtype": (x, weights.double(), [4, 5, 3]),
        "dims": (x, weights, [4]),
        "dims: expected two or more widths of 1": (x, weights, [4, 0, 3]),
        "head": (x, weights, [4, 5, 3], "tanh"),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}"):
            mlp(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., 4\], got \[2, 8\]"):
        Mlp(4, 3)(torch.zeros(2, 8))
    for options in ({"width": 0}, {"hidden": -1}, {"out_dim": 0}):
        with pytest.raises(ValueError, match=r"^in_dim, out_dim, width, hidden: expected"):
            Mlp(**{"in_dim": 4, "out_dim": 3} | options)
