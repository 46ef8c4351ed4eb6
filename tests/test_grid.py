"""Multiresolution grids: kernels against the specification, the specification against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.encodings.grid import Cells, Grid, grid, grid_reference
from prismfield.render import kernels as kernels_module

from .raster_fixtures import cotangents, usable_levels, use_kernels

FORMS: list[tuple[Cells, bool]] = [("cubes", False), ("cubes", True), ("simplices", False)]


def make_grid(dims: int, cells: Cells, smooth: bool = False, features: int = 2) -> Grid:
    """Two levels that are stored and some that are hashed, with features that matter."""
    torch.manual_seed(dims)
    encoding = Grid(
        dims,
        cells=cells,
        levels=5,
        features=features,
        log2_rows=11 if dims == 4 else 10,
        coarsest=2,
        finest=40,
        smooth=smooth,
    )
    assert (encoding.sides > 0).any() and (encoding.sides == 0).any()
    with torch.no_grad():
        encoding.table.normal_()
    return encoding


def make_points(count: int, dims: int) -> Tensor:
    """Inside, on the borders of cells, at the corners of the cube, and outside."""
    x = torch.rand(count, dims, generator=torch.Generator().manual_seed(count)) * 1.3 - 0.15
    special = [torch.zeros(dims), torch.ones(dims), torch.full((dims,), 0.25), torch.full((dims,), -0.5)]
    for row, point in enumerate(special[:count]):
        x[row] = point
    return x


def with_gradients(function: Any, encoding: Grid, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, encoding.table)]
    out = function(*leaves, encoding.scales, encoding.starts, encoding.sides, encoding.cells, encoding.smooth)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangents(out))]


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize(("cells", "smooth"), FORMS)
@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 15, 1000])
def test_kernel_against_reference(
    module: Any, count: int, dims: int, cells: Cells, smooth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(dims, cells, smooth), make_points(count, dims)
    # A point on a border belongs to either cell, whose gradients differ: of these the values alone are compared
    inside = torch.ones(count, dtype=torch.bool)
    inside[:3] = False
    got = with_gradients(grid, encoding, x, torch.float32)
    wanted = with_gradients(grid_reference, encoding, x, torch.float64)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    for index, rows in ((0, slice(None)), (1, inside), (2, slice(None))):
        ours, theirs = got[index][rows].double(), wanted[index][rows]
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm() + 1e-12, index


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("features", [1, 4, 8])
def test_other_numbers_of_features(module: Any, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, "cubes", features=features), torch.rand(37, 3)
    got = with_gradients(grid, encoding, x, torch.float32)
    wanted = with_gradients(grid_reference, encoding, x, torch.float64)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours.double() - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize(("cells", "smooth"), FORMS)
def test_not_a_number_and_infinity_do_no_harm(
    module: Any, cells: Cells, smooth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN counts as 0, the infinities as the cube's sides; neither gets a gradient."""
    use_kernels(monkeypatch, module)
    encoding = make_grid(3, cells, smooth)
    x = torch.tensor([[math.nan, 0.3, 0.6], [math.inf, 0.3, 0.6], [-math.inf, 0.3, 0.6]]).requires_grad_()
    same = torch.tensor([[0.0, 0.3, 0.6], [1.0, 0.3, 0.6], [0.0, 0.3, 0.6]])
    out = encoding(x)
    torch.testing.assert_close(out, encoding(same))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(gradient).all() and (gradient[:, 0] == 0).all()


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_threads_change_nothing(module: Any, cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, cells), torch.rand(5000, 3)
    results, before = [], module.num_threads()
    try:
        for threads in (1, 2, 3):
            module.set_num_threads(threads)
            results.append(with_gradients(grid, encoding, x, torch.float32))
    finally:
        module.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize(("cells", "smooth"), FORMS)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_gradients_of_the_reference(dims: int, cells: Cells, smooth: bool) -> None:
    encoding = make_grid(dims, cells, smooth)
    x = (0.1 + 0.8 * torch.rand(3, dims, dtype=torch.float64)).requires_grad_()
    options = (encoding.scales, encoding.starts, encoding.sides, cells, smooth)
    table = encoding.table.detach().double()
    assert torch.autograd.gradcheck(lambda p: grid_reference(p, table, *options), x)
    if smooth:
        assert torch.autograd.gradgradcheck(lambda p: grid_reference(p, table, *options).sum(), x)


@pytest.mark.parametrize(("cells", "smooth"), FORMS)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_weights_sum_to_one(dims: int, cells: Cells, smooth: bool) -> None:
    encoding = make_grid(dims, cells, smooth)
    with torch.no_grad():
        encoding.table.fill_(0.7)
    torch.testing.assert_close(encoding(torch.rand(50, dims)), torch.full((50, encoding.out_dim), 0.7))


@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_what_is_linear_is_reproduced(cells: Cells) -> None:
    """A stored level whose features are a linear function of the lattice interpolates that function exactly."""
    encoding = Grid(3, cells=cells, levels=1, features=1, log2_rows=19, coarsest=5, finest=5)
    side = int(encoding.sides[0])
    lattice = torch.stack(torch.meshgrid(*[torch.arange(side, dtype=torch.float32)] * 3, indexing="ij"), -1)
    values = (lattice * torch.tensor([1.0, -2.0, 0.5])).sum(-1)
    with torch.no_grad():
        encoding.table.copy_(values.permute(2, 1, 0).reshape(-1, 1))  # the first axis runs fastest
    x = torch.rand(60, 3)
    skewed = x if cells == "cubes" else x + x.sum(-1, keepdim=True) * ((math.sqrt(4) - 1) / 3)
    expected = ((skewed * 5 + 0.5) * torch.tensor([1.0, -2.0, 0.5])).sum(-1, keepdim=True)
    torch.testing.assert_close(encoding(x), expected, rtol=1e-5, atol=1e-5)


def test_it_is_continuous_across_cells() -> None:
    for cells, smooth in FORMS:
        encoding = make_grid(3, cells, smooth)
        start, end = torch.rand(20, 1, 3), torch.rand(20, 1, 3)
        t = torch.linspace(0, 1, 4001)[None, :, None]
        values = encoding(start + t * (end - start))
        # Forty cells along an axis, features of about one: a step of 1/4000 cannot do more
        assert values.diff(dim=1).abs().max() < 0.25


@pytest.mark.skipif(kernels_module.kernels is None, reason="no compiled kernels")
def test_opcheck() -> None:
    encoding = make_grid(2, "simplices")
    x = torch.rand(5, 2).requires_grad_()
    arguments = (x, encoding.table, encoding.scales, encoding.starts, encoding.sides, "simplices", False)
    torch.library.opcheck(torch.ops.prismfield.grid, arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_dim": 5}, "in_dim, features: expected 2 to 4"),
        ({"in_dim": 3, "features": 3}, "in_dim, features"),
        ({"in_dim": 3, "coarsest": 9, "finest": 8}, "1 <= coarsest <= finest"),
        ({"in_dim": 3, "log2_rows": 29}, "1 to 28"),
        ({"in_dim": 3, "cells": "simplices", "smooth": True}, "smooth: expected False with simplices"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**options)
