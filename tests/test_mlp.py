"""The fused perceptrons against the specification."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.encodings.mlp import Head, Mlp, mlp, mlp_reference
from prismfield.render import kernels as kernels_module

from .raster_fixtures import cotangents, usable_levels, use_kernels

HEADS: tuple[Head, ...] = ("none", "relu", "sigmoid", "softplus")
DIMS = [[32, 64, 16], [31, 64, 64, 3], [5, 7], [33, 17, 9, 40], [1, 128, 1]]


def make_inputs(dims: list[int], count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + len(dims))
    layers = [torch.randn(b, a, generator=generator) / a**0.5 for a, b in itertools.pairwise(dims)]
    return 2 * torch.randn(count, dims[0], generator=generator), torch.cat([layer.flatten() for layer in layers])


def with_gradients(function: Any, x: Tensor, weights: Tensor, dims: list[int], head: Head) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    out = function(*leaves, dims, head)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangents(out))]


def assert_close(got: Tensor, wanted: Tensor, rtol: float) -> None:
    assert got.shape == wanted.shape and torch.isfinite(got).all()
    assert (got.double() - wanted).norm() <= rtol * wanted.norm() + 1e-12


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 47, 48, 49, 1000])
def test_kernel_against_reference(
    module: Any, count: int, dims: list[int], head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, module)
    x, weights = make_inputs(dims, count)
    got = with_gradients(mlp, x, weights, dims, head)
    wanted = with_gradients(mlp_reference, x.double(), weights.double(), dims, head)
    for ours, theirs, rtol in zip(got, wanted, (1e-5, 1e-4, 1e-4), strict=True):
        assert_close(ours, theirs, rtol)


@pytest.mark.parametrize("module", usable_levels())
def test_threads_change_nothing(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    dims, results, before = [32, 64, 16], [], module.num_threads()
    x, weights = make_inputs(dims, 9001)
    try:
        for threads in (1, 2, 3):
            module.set_num_threads(threads)
            results.append(with_gradients(mlp, x, weights, dims, "none"))
    finally:
        module.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("head", HEADS)
def test_heads_far_out(module: Any, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing overflows: values and gradients far from 0 are those of the reference."""
    use_kernels(monkeypatch, module)
    x = torch.tensor([-1e4, -90.0, -20.0, 0.5, 20.0, 90.0, 1e4])[:, None]
    got = with_gradients(mlp, x, torch.ones(1), [1, 1], head)
    wanted = with_gradients(mlp_reference, x.double(), torch.ones(1).double(), [1, 1], head)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_the_reference(head: Head) -> None:
    x, weights = (t.double().requires_grad_() for t in make_inputs([3, 5, 2], 4))
    assert torch.autograd.gradcheck(lambda a, b: mlp_reference(a, b, [3, 5, 2], head), (x, weights))


@pytest.mark.skipif(kernels_module.kernels is None, reason="no compiled kernels")
def test_opcheck() -> None:
    x, weights = (t.requires_grad_() for t in make_inputs([3, 5, 2], 4))
    torch.library.opcheck(torch.ops.prismfield.mlp, (x, weights, [3, 5, 2], "sigmoid"))


def test_module() -> None:
    torch.manual_seed(0)
    network = Mlp(5, 3, width=16, hidden=2, head="sigmoid")
    x = torch.randn(2, 4, 5)
    assert network(x).shape == (2, 4, 3) and network.out_dim == 3
    layers = network.weights.split([5 * 16, 16 * 16, 16 * 3])
    by_hand = x
    for layer, (a, b) in zip(layers, ((5, 16), (16, 16), (16, 3)), strict=True):
        by_hand = by_hand @ layer.view(b, a).mT
        by_hand = by_hand.relu() if b == 16 else by_hand.sigmoid()
    torch.testing.assert_close(network(x), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(12), [4, 3]), r"x: expected \[S, 4\]"),
        ((torch.zeros(2, 4), torch.zeros(11), [4, 3]), "weights"),
        ((torch.zeros(2, 4), torch.zeros(12), [4]), "dims: expected two or more"),
        ((torch.zeros(2, 4), torch.zeros(12), [4, 3], "tanh"), "head: expected one of none"),
    ],
)
def test_what_does_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp(*arguments)
