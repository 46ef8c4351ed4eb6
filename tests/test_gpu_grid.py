"""The Triton grids against their specification in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prismfield.encodings.grid import Cells, Grid, grid, grid_reference
from prismfield.render.kernels import kernels_of

from .raster_fixtures import cotangents

FORMS: list[tuple[int, Cells, int, bool]] = [
    (2, "cubes", 4, False),
    (2, "simplices", 1, False),
    (3, "cubes", 2, False),
    (3, "cubes", 8, True),
    (3, "simplices", 2, False),
    (4, "cubes", 1, True),
    (4, "simplices", 8, False),
]


def make_grid(dims: int, cells: Cells, features: int, smooth: bool, levels: int = 3) -> Grid:
    """Two levels that are stored and one that is hashed; features of the size of 1."""
    module = Grid(
        dims, cells=cells, levels=levels, features=features, log2_rows=8, coarsest=1, finest=20, smooth=smooth
    )
    generator = torch.Generator().manual_seed(dims)
    module.table.data = torch.randn(module.table.shape, generator=generator)
    return module


def make_points(count: int, module: Grid) -> Tensor:
    """[count, D] beyond the unit cube, too, and nowhere so near a cell's border that rounding decides on which side."""
    generator = torch.Generator().manual_seed(count)
    dims = module.in_dim
    x = 1.3 * torch.rand(2 * count + 8, dims, generator=generator) - 0.15
    inside = x.double().clamp(0, 1)
    shift = ((dims + 1) ** 0.5 - 1) / dims if module.cells == "simplices" else 0.0
    position = (inside + shift * inside.sum(-1, keepdim=True))[:, None] * module.scales[:, None] + 0.5
    parts = position - position.floor()
    borders = [parts, 1 - parts]
    if module.cells == "simplices":  # which go where two fractional parts are the same, also
        pairs = torch.combinations(torch.arange(dims))
        borders += [(parts[..., pairs[:, 0]] - parts[..., pairs[:, 1]]).abs()]
    x = x[torch.cat(borders, -1).flatten(1).amin(-1) > 1e-5][:count]
    assert len(x) == count
    return x


def arguments(module: Grid, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Cells, bool]:
    return (*(t.to(device) for t in (module.scales, module.starts, module.sides)), module.cells, module.smooth)


def assert_near(got: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert got.shape == wanted.shape, what
    error = (got.cpu().double() - wanted).norm().item()
    assert error <= tolerance * wanted.norm().item(), f"{what}: off by {error:.3g} of {wanted.norm().item():.3g}"


@pytest.mark.parametrize(("dims", "cells", "features", "smooth"), FORMS)
@pytest.mark.parametrize("count", [0, 1, 131])
def test_against_the_reference(
    count: int, dims: int, cells: Cells, features: int, smooth: bool, triton_device: torch.device
) -> None:
    module = make_grid(dims, cells, features, smooth)
    assert module.sides[0] > 0 == module.sides[2]
    x = make_points(count, module)
    wanted_leaves = [t.detach().double().requires_grad_() for t in (x, module.table)]
    wanted = grid_reference(*wanted_leaves, *arguments(module, torch.device("cpu")))
    upstream = cotangents(wanted.float())[0]
    wanted.backward(upstream.double())
    leaves = [t.detach().to(triton_device).requires_grad_() for t in (x, module.table)]
    got = grid(*leaves, *arguments(module, triton_device))
    got.backward(upstream.to(triton_device))
    assert_near(got.detach(), wanted.detach(), "features")
    for ours, theirs, name in zip(leaves, wanted_leaves, ("v_x", "v_table"), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_near(ours.grad, theirs.grad, name)
        assert ((ours.grad.cpu() != 0) <= (theirs.grad != 0)).all(), name


@pytest.mark.parametrize("features", [2, 8])
@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_tables_in_half_precision(cells: Cells, features: int, triton_device: torch.device) -> None:
    """Features and the points' gradient are those of the rounded table; the table's gradient has not gone through halves."""
    module = make_grid(3, cells, features, False)
    x, rounded = make_points(131, module), module.table.detach().half()
    wanted_leaves = [t.detach().double().requires_grad_() for t in (x, rounded)]
    wanted = grid_reference(*wanted_leaves, *arguments(module, torch.device("cpu")))
    upstream = cotangents(wanted.float())[0]
    wanted.backward(upstream.double())
    leaves = [t.detach().to(triton_device).requires_grad_() for t in (x, module.table)]
    got = grid(*leaves, *arguments(module, triton_device), rounded.to(triton_device))
    got.backward(upstream.to(triton_device))
    assert_near(got.detach(), wanted.detach(), "features")
    for ours, theirs, name in zip(leaves, wanted_leaves, ("v_x", "v_table"), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == torch.float32
        assert_near(ours.grad, theirs.grad, name)


@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_points_on_borders_beyond_and_nowhere(cells: Cells, triton_device: torch.device) -> None:
    """Features are continuous; 0 and 1 belong to the cube, and NaN is 0."""
    module = make_grid(3, cells, 2, False)
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.25, 0.25, 0.25], [nan, 0.3, nan], [inf, -inf, 0.2]])
    leaf = x.to(triton_device).requires_grad_()
    got = grid(leaf, module.table.detach().to(triton_device), *arguments(module, triton_device))
    wanted = grid_reference(x.double(), module.table.detach().double(), *arguments(module, torch.device("cpu")))
    assert_near(got.detach(), wanted, "features")
    got.sum().backward()
    assert leaf.grad is not None
    moves = torch.isfinite(x)
    assert (leaf.grad.cpu()[~moves] == 0).all()
    assert (leaf.grad.cpu()[moves] != 0).all()


@pytest.mark.parametrize("size", [0.0, 2.0**-100, 2.0**-40, 2.0**80])
def test_gradients_of_any_size(size: float, triton_device: torch.device) -> None:
    """Sums are integers underneath, whose unit follows the largest gradient."""
    module = make_grid(2, "cubes", 2, False)
    x = make_points(70, module).to(triton_device)
    table, options = module.table.detach().to(triton_device), arguments(module, triton_device)
    kernels, v_out = kernels_of(x), cotangents(torch.empty(70, 6))[0].to(triton_device)
    found = []
    for factor in (1.0, size):
        v_table = torch.full_like(table, 7.0)
        kernels.grid_backward("cubes", x, table, *options[:3], False, factor * v_out, v_table, x.new_empty(0))
        found.append(v_table)
    torch.testing.assert_close(found[1], size * found[0], rtol=1e-6, atol=1e-33)


def test_table_gradient_does_not_depend_on_the_order_of_points(triton_device: torch.device) -> None:
    """Bit by bit: programs add in any order. All points are in one cell, and one gradient is far larger than the rest."""
    module = make_grid(3, "simplices", 2, False, levels=1)
    generator = torch.Generator().manual_seed(0)
    x = 0.4 * torch.rand(300, 3, generator=generator)
    v_out = torch.randn(300, 2, generator=generator)
    v_out[0] = 1e6
    found = []
    for order in (torch.arange(300), torch.randperm(300, generator=generator)):
        table = module.table.detach().to(triton_device).requires_grad_()
        out = grid(x[order].to(triton_device), table, *arguments(module, triton_device))
        out.backward(v_out[order].to(triton_device))
        assert table.grad is not None
        found.append(table.grad)
    assert torch.equal(*found)
    assert (found[0] != 0).sum() > 8


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_a_gradient_that_is_not_finite_shows(triton_device: torch.device) -> None:
    module = make_grid(2, "cubes", 2, False)
    x = make_points(7, module).to(triton_device)
    for value in (float("nan"), float("inf")):
        table = module.table.detach().to(triton_device).requires_grad_()
        out = grid(x, table, *arguments(module, triton_device))
        out.backward(torch.full_like(out, value))
        assert table.grad is not None
        assert torch.isnan(table.grad).any()


def test_gradients_that_are_not_wanted(triton_device: torch.device) -> None:
    module = make_grid(3, "cubes", 2, False)
    found = []
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [make_points(33, module), module.table.detach()]
        leaves = [t.to(triton_device).requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
        out = grid(*leaves, *arguments(module, triton_device))
        out.backward(cotangents(out)[0])
        found.append([t.grad for t in leaves])
    assert found[1][1] is None and found[2][0] is None
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[2][1])
