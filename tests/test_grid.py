"""Multiresolution grids: the kernels against the reference in double precision, the reference against differences and closed forms."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.encodings import grid as module_under_test
from prismfield.encodings.grid import DenseGrid, Grid, grid, grid_reference

from .raster_fixtures import assert_rows_close, cotangents, usable_levels, use_kernels

KINDS = [("cubes", False), ("cubes", True), ("simplices", False)]


def make_grid(in_dim: int, cells: Any = "cubes", smooth: bool = False, **options: Any) -> Grid:
    """Five levels, the first stored and the last hashed, with features of size 1. The scales are powers of two."""
    torch.manual_seed(in_dim)
    sizes = {"levels": 5, "features": 2, "log2_rows": {2: 8, 3: 10, 4: 14}[in_dim], "coarsest": 4, "finest": 64}
    made = Grid(in_dim, cells=cells, smooth=smooth, **sizes | options)
    with torch.no_grad():
        made.table.normal_()
    return made


def lattices(encoding: Grid) -> tuple[Any, ...]:
    return encoding.scales, encoding.starts, encoding.sides, encoding.cells, encoding.smooth


def make_points(count: int, in_dim: int) -> Tensor:
    """Most in the unit cube; some on the borders of cells, on its faces and corners, and outside."""
    points = torch.rand(count, in_dim, generator=torch.Generator().manual_seed(count))
    hard = [0.0, 1.0, 0.5, 1 / 64, 0.25 + 1 / 128, 1 - 2**-24, -0.3, 1.4, math.inf, -math.inf]
    for row, value in enumerate(hard[: count // 3]):
        points[row] = value
        points[row + len(hard) if row + len(hard) < count else row, 0] = value
    return points


def has_certain_slope(encoding: Grid, x: Tensor) -> Tensor:
    """[S]: not on the border of a cell, where rounding decides which cell's slope it is."""
    x = x.double().clamp(0, 1)
    if encoding.cells == "simplices":
        x = x + x.sum(-1, keepdim=True) * (math.sqrt(x.shape[1] + 1) - 1) / x.shape[1]
    positions = x[:, None] * encoding.scales.double()[:, None] + 0.5
    parts = positions - positions.floor()
    gaps = torch.minimum(parts, 1 - parts)
    if encoding.cells == "simplices":
        gaps = torch.cat([gaps, parts.sort().values.diff()], -1)
    return (gaps > 2e-5).flatten(1).all(1)


def run(encoding: Grid, x: Tensor, table: Tensor, function: Any = grid, **options: Any) -> list[Tensor]:
    """Features and the gradients to `x` and the table."""
    x, table = x.detach().clone().requires_grad_(), table.detach().clone().requires_grad_()
    out = function(x, table, *lattices(encoding), **options)
    out.backward(*cotangents(out))
    return [out.detach(), x.grad, table.grad]


def compare(got: list[Tensor], wanted: list[Tensor]) -> None:
    for name, tolerance, a, b in zip(("out", "v_x", "v_table"), (1e-5, 1e-4, 1e-4), got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert_rows_close(a, b, tolerance, name, floor=1e-5)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize(("cells", "smooth"), KINDS)
@pytest.mark.parametrize("in_dim", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 33, 2500])
def test_kernel_against_reference(
    module: Any, count: int, in_dim: int, cells: str, smooth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(in_dim, cells, smooth), make_points(count, in_dim)
    assert encoding.sides[0] > 0 and (encoding.sides[-2:] == 0).all()
    wanted = run(encoding, x.double(), encoding.table.double(), grid_reference)
    got = run(encoding, x, encoding.table)
    certain = has_certain_slope(encoding, x) if cells == "simplices" else torch.ones(count, dtype=torch.bool)
    assert certain.sum() >= 0.9 * count - 20
    got[1], wanted[1] = got[1][certain], wanted[1][certain]
    compare(got, wanted)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("levels", [1, 3, 17])
def test_features_and_levels(module: Any, levels: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    encoding = make_grid(3, levels=levels, features=features)
    x = torch.rand(301, 3)
    got, wanted = run(encoding, x, encoding.table), run(encoding, x.double(), encoding.table.double(), grid_reference)
    assert encoding(x).shape == (301, levels * features) == (301, encoding.out_dim)
    certain = has_certain_slope(encoding, x)
    assert certain.sum() > 250
    got[1], wanted[1] = got[1][certain], wanted[1][certain]
    compare(got, wanted)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("features", [2, 4, 8])
@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_half_precision_tables(module: Any, cells: str, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features are those of the rounded table, and the gradient has not gone through half precision."""
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, cells, features=features, half=True), make_points(1000, 3)[20:]
    with torch.no_grad():
        encoding.table[::5] *= 1e-6  # subnormal
        encoding.table[::7] = 0
        encoding.table[::11] *= -1e4
    x = x[has_certain_slope(encoding, x)]
    rounded = encoding.table.detach().half()
    got = run(encoding, x, encoding.table, rounded=rounded)
    compare(got, run(encoding, x.double(), rounded.double(), grid_reference))
    assert torch.equal(encoding(x), got[0])
    assert not torch.equal(got[2], got[2].half().float())
    reference = run(encoding, x, encoding.table, grid_reference, rounded=rounded)
    compare(got, [t.double() for t in reference])


def test_half_precision_follows_the_table() -> None:
    encoding = make_grid(2, half=True)
    x, optimizer = torch.rand(50, 2), torch.optim.Adam(encoding.parameters(), lr=0.1)
    assert encoding.rounded() is encoding.rounded()
    before = encoding(x)
    before.square().sum().backward()
    optimizer.step()
    after = encoding(x)
    assert (after - before).abs().max() > 0.05
    assert torch.equal(copy.deepcopy(encoding)(x), after)
    assert set(encoding.state_dict()) == {"table"} and encoding.table.dtype == torch.float32


@pytest.mark.parametrize("module", [pytest.param(None, id="reference"), *usable_levels()])
@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_nan_counts_as_zero(module: Any, cells: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    monkeypatch.setattr(module_under_test, "use_kernel", lambda x: module is not None)
    encoding = make_grid(3, cells)
    x = torch.tensor([[math.nan, 0.3, 0.7], [0.0, 0.3, 0.7]], requires_grad=True)
    out = encoding(x)
    assert torch.equal(out[0], out[1])
    out.sum().backward()
    assert x.grad is not None and x.grad[0, 0] == 0 and x.grad[0, 1:].abs().min() > 0
    assert encoding.table.grad is not None and encoding.table.grad.isfinite().all()
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(ValueError, match=r"^x: expected numbers, got NaN in row 0"),
    ):
        encoding(x)


@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_thread_count_changes_no_bit(cells: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = usable_levels()[0].values[0]
    if module is None:
        pytest.skip("no compiled kernels")
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, cells), torch.rand(9000, 3)
    before, results = module.num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            module.set_num_threads(threads)
            results.append(run(encoding, x, encoding.table))
    finally:
        module.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", [grid, grid_reference])
@pytest.mark.parametrize(("cells", "smooth"), KINDS)
@pytest.mark.parametrize("in_dim", [2, 3, 4])
def test_gradients(in_dim: int, cells: str, smooth: bool, function: Any) -> None:
    """First and second, in double precision."""
    encoding = make_grid(in_dim, cells, smooth, levels=3, log2_rows=6)
    x = (0.05 + 0.9 * torch.rand(3, in_dim, dtype=torch.float64)).requires_grad_()
    table = encoding.table.detach().double().requires_grad_()
    arguments = lattices(encoding)
    assert torch.autograd.gradcheck(lambda *leaves: function(*leaves, *arguments), (x, table), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *leaves: function(*leaves, *arguments), (x, table), fast_mode=True)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize(("cells", "smooth"), KINDS)
def test_second_derivatives_behind_the_kernel(
    module: Any, cells: str, smooth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the length of the gradient, as the normals of a distance field need them, to both inputs; and to `x` alone."""
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, cells, smooth), torch.rand(40, 3)

    def slope_gradients(function: Any, x: Tensor, table: Tensor, with_table: bool) -> list[Tensor]:
        x, table = x.clone().requires_grad_(), table.detach().clone().requires_grad_(with_table)
        (slope,) = torch.autograd.grad(function(x, table, *lattices(encoding)).square().sum(), x, create_graph=True)
        loss = (slope.norm(dim=-1) - 1).square().mean()
        return list(torch.autograd.grad(loss, [x, table] if with_table else [x]))

    for with_table in (True, False):
        wanted = slope_gradients(grid_reference, x.double(), encoding.table.double(), with_table)
        for a, b in zip(slope_gradients(grid, x, encoding.table, with_table), wanted, strict=True):
            assert_rows_close(a, b, 1e-4, "second", floor=1e-5)


@pytest.mark.parametrize("module", [pytest.param(None, id="reference"), *usable_levels()])
@pytest.mark.parametrize("in_dim", [2, 3, 4])
@pytest.mark.parametrize("cells", ["cubes", "simplices"])
def test_a_linear_function_is_interpolated_exactly(
    module: Any, cells: str, in_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between points of the lattice, which for simplices are unskewed."""
    use_kernels(monkeypatch, module)
    monkeypatch.setattr(module_under_test, "use_kernel", lambda x: module is not None)
    encoding = make_grid(in_dim, cells, levels=1, features=1, log2_rows=17, coarsest=7, finest=7)
    side = int(encoding.sides[0])
    points = torch.tensor(list(itertools.product(range(side), repeat=in_dim)), dtype=torch.float64)
    at = (points - 0.5) / 7
    if cells == "simplices":
        skew = (math.sqrt(in_dim + 1) - 1) / in_dim
        at = at - at.sum(-1, keepdim=True) * skew / (1 + in_dim * skew)
    slope = torch.linspace(-1, 2, in_dim, dtype=torch.float64)
    rows = (points.long() * side ** torch.arange(in_dim)).sum(-1)
    with torch.no_grad():
        encoding.table[rows] = (at @ slope + 0.3).float()[:, None]
    x = torch.rand(200, in_dim)
    torch.testing.assert_close(encoding(x)[:, 0], (x.double() @ slope + 0.3).float(), rtol=1e-5, atol=1e-5)


def test_points_read() -> None:
    """2^D rows of a level for cubes, D + 1 for simplices, with weights that sum to 1; hashed to rows all over the table."""
    for in_dim, (cells, read) in itertools.product(
        (2, 3, 4), (("cubes", lambda d: 2**d), ("simplices", lambda d: d + 1))
    ):
        encoding = make_grid(in_dim, cells, levels=1, features=1, log2_rows=12, coarsest=500, finest=500)
        assert encoding.sides.tolist() == [0] and len(encoding.table) == 4096
        encoding(torch.rand(1, in_dim)).backward(torch.ones(1, 1))
        assert encoding.table.grad is not None
        assert int((encoding.table.grad != 0).sum()) == read(in_dim)
        assert float(encoding.table.grad.sum()) == pytest.approx(1, abs=1e-5)
        encoding.table.grad = None
        encoding(torch.rand(20_000, in_dim)).sum().backward()
        assert (encoding.table.grad != 0).float().mean() > 0.97


def test_smooth_weights_have_no_kinks() -> None:
    """The slope at a point of the lattice is 0 along each axis."""
    encoding = make_grid(3, smooth=True, levels=1)
    x = ((torch.tensor([[1.0, 2.0, 1.0]]) - 0.5) / 4).requires_grad_()
    encoding(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(1, 3))


def test_sizes_of_instant_ngp() -> None:
    """The numbers of its table 1: levels of 2^19 rows at most, growing from 16 to 2048 cells."""
    encoding = Grid(3)
    assert encoding.out_dim == 32 and encoding.scales[[0, -1]].tolist() == pytest.approx([16, 2048])
    ratios = encoding.scales[1:] / encoding.scales[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(15))
    assert int(encoding.starts.diff().max()) == 2**19 and float(encoding.table.detach().abs().max()) <= 1e-4


def test_dense_grid_is_torch_s_interpolation() -> None:
    encoding = DenseGrid(3, resolution=9, features=2)
    assert encoding.table.shape == (729, 2)
    torch.nn.init.normal_(encoding.table)
    x = torch.rand(100, 3)
    volume = (
        encoding.table.detach().view(9, 9, 9, 2).permute(3, 0, 1, 2)[None]
    )  # z, y, x: the first axis is the nearest
    inner = volume[:, :, 1:-1, 1:-1, 1:-1]
    wanted = torch.nn.functional.grid_sample(inner, 2 * x.view(1, 1, 1, -1, 3) - 1, align_corners=False)[0, :, 0, 0].mT
    inside = ((x > 0.5 / 7) & (x < 1 - 0.5 / 7)).all(-1)
    assert inside.sum() > 20
    torch.testing.assert_close(encoding(x)[inside], wanted[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", usable_levels())
def test_opcheck(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3, levels=2, coarsest=2, finest=8, log2_rows=6), torch.rand(9, 3)
    table = encoding.table.detach()
    for rounded in (None, table.half()):
        arguments = (*lattices(encoding), rounded)
        # Inputs of the second derivative are the reference's: no custom op to check
        leaves = (x.clone().requires_grad_(), table.clone().requires_grad_())
        torch.library.opcheck(torch.ops.prismfield.grid, (*leaves, *arguments))
        for wanted in (True, False):
            torch.library.opcheck(
                torch.ops.prismfield.grid_backward, (x, table, *arguments, torch.randn(9, 4), wanted, not wanted)
            )


@pytest.mark.parametrize("module", usable_levels())
def test_no_row_outside_the_table(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    encoding, x = make_grid(3), torch.rand(9, 3)
    scales, starts, sides, *kind = lattices(encoding)
    table = encoding.table.detach()
    assert grid(x, table, scales, starts, sides, *kind).shape == (9, 10)
    broken = [
        (table[:-1], scales, starts, sides),
        (table, 2 * scales, starts, sides),
        (table, scales, starts - 1, sides),
        (table, scales, starts, sides + 1),
        (table, scales, starts, (sides - 1).clamp(min=0)),
        (table, scales, starts.flip(0), sides),
        (table, scales * math.nan, starts, sides),
        (table, scales, starts, torch.zeros_like(sides)),  # 6^3 rows are no power of two
    ]
    for arguments in broken:
        with pytest.raises(ValueError, match=r"^scales, starts, sides: expected rows of the table"):
            grid(x, *arguments, *kind)


def test_bad_arguments_are_named() -> None:
    encoding, x = make_grid(3), torch.rand(9, 3)
    scales, starts, sides, *_ = lattices(encoding)
    table = encoding.table.detach()
    for name, arguments in {
        "x": (x[0], table, scales, starts, sides),
        "table": (x, table[:, 0], scales, starts, sides),
        "table: expected dtype": (x, table.double(), scales, starts, sides),
        "sides": (x, table, scales, starts, sides[1:]),
        "x, starts": (x, table, scales, starts[1:], sides),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}"):
            grid(*arguments)
    with pytest.raises(ValueError, match=r"^cells: expected cubes or simplices, got 'prisms'"):
        grid(x, table, scales, starts, sides, "prisms")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rounded: expected float16"):
        grid(x, table, scales, starts, sides, rounded=table)
    with pytest.raises(ValueError, match=r"^x: expected \[\.\.\., 3\], got \[9, 2\]"):
        encoding(x[:, :2])
    for options in ({"in_dim": 5}, {"features": 3}, {"levels": 0}, {"coarsest": 9, "finest": 8}, {"log2_rows": 27}):
        with pytest.raises(ValueError, match="expected"):
            Grid(**{"in_dim": 3} | options)
    with pytest.raises(ValueError, match=r"^smooth"):
        Grid(3, cells="simplices", smooth=True)
    with pytest.raises(ValueError, match=r"^half"):
        Grid(3, features=1, half=True)
    for resolution in (2, 407):
        with pytest.raises(ValueError, match=f"^resolution: .*got {resolution}"):
            DenseGrid(3, resolution=resolution)
