"""Multiresolution grids of trainable features, in hash tables where they are fine: cubes or simplices."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel

Cells = Literal["cubes", "simplices"]
PRIMES = (1, 2654435761, 805459861, 3674653429)
"""Instant NGP (arXiv:2201.05989), eq. 4."""


class Grid(nn.Module):
    """Positions to features interpolated from several lattices of trainable vectors.

    Instant NGP (arXiv:2201.05989), section 3. A level whose lattice has at most 2^`log2_rows` points stores each; a finer one
    maps its points to as many rows by a hash. With `cells` "simplices" the lattice is one of simplices (arXiv:2311.15439), and
    D + 1 points are read instead of 2^D.
    """

    out_dim: int
    """`levels * features`."""
    scales: Tensor
    """[L] cells along the unit interval."""
    starts: Tensor
    """[L + 1] int64: level l has the rows starts[l] up to starts[l + 1]."""
    sides: Tensor
    """[L] int32: points along an axis of a stored lattice, 0 where points are hashed."""

    def __init__(
        self,
        in_dim: int,
        *,
        cells: Cells = "cubes",
        levels: int = 16,
        features: int = 2,
        log2_rows: int = 19,
        coarsest: int = 16,
        finest: int = 2048,
        smooth: bool = False,
        half: bool = False,
    ) -> None:
        """Features uniform in +-1e-4, from torch's generator.

        Args:
            in_dim: D, 2 to 4.
            cells: what a lattice is made of.
            levels: L.
            features: numbers a level, 1, 2, 4 or 8.
            log2_rows: of the largest table of a level.
            coarsest: cells along the unit interval of the first level.
            finest: of the last; those between grow by a constant factor.
            smooth: smoothstep instead of linear weights, for cubes alone.
            half: features are read from a copy of the table in half precision; the table, what is summed and the gradients
                stay in single precision. With 2 features or more a level.

        Raises:
            ValueError: a number is out of its range, or two do not go together.
        """
        super().__init__()
        if in_dim not in (2, 3, 4) or features not in (1, 2, 4, 8):
            raise ValueError(f"in_dim, features: expected 2 to 4 and 1, 2, 4 or 8, got {in_dim} and {features}")
        if levels < 1 or not 1 <= coarsest <= finest <= 2**19 or not 1 <= log2_rows <= 26:
            raise ValueError(
                "levels, coarsest, finest, log2_rows: expected 1 or more, 1 <= coarsest <= finest <= 2^19 and 1 to 26, "
                f"got {levels}, {coarsest}, {finest}, {log2_rows}"
            )
        if smooth and cells != "cubes":
            raise ValueError("smooth: expected False with simplices")
        if half and features == 1:
            raise ValueError("half: expected 2 or more features, got 1")
        self.in_dim, self.cells, self.smooth, self.half_table, self.out_dim = (
            in_dim,
            cells,
            smooth,
            half,
            levels * features,
        )
        growth = (finest / coarsest) ** (1 / max(levels - 1, 1))
        scales = [coarsest * growth**level for level in range(levels)]
        stretch = (
            math.sqrt(in_dim + 1) if cells == "simplices" else 1.0
        )  # the skewed unit cube is longer along each axis
        sides = [math.floor(stretch * scale * (1 + 1e-6) + 0.5) + 2 for scale in scales]  # for float32 rounding
        is_dense = [side**in_dim <= 2**log2_rows for side in sides]
        rows = [side**in_dim if dense else 2**log2_rows for side, dense in zip(sides, is_dense, strict=True)]
        self.register_buffer("scales", torch.tensor(scales), persistent=False)
        self.register_buffer("starts", torch.tensor([0, *itertools.accumulate(rows)]), persistent=False)
        stored = [side if dense else 0 for side, dense in zip(sides, is_dense, strict=True)]
        self.register_buffer("sides", torch.tensor(stored, dtype=torch.int32), persistent=False)
        self._rounded: tuple[tuple[int, int], Tensor] | None = None
        self.table = nn.Parameter(1e-4 * (2 * torch.rand(sum(rows), features) - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: [..., D] in the unit cube; outside, the nearest point of it, without a gradient to `x`. NaN counts as 0, and
                raises under `torch.autograd.set_detect_anomaly`.

        Returns:
            [..., out_dim]. Differentiable twice.

        Raises:
            ValueError: the last axis is not `in_dim`.
        """
        if x.shape[-1:] != (self.in_dim,):
            raise ValueError(f"x: expected [..., {self.in_dim}], got {list(x.shape)}")
        flat = x.reshape(-1, self.in_dim)
        lattices = (self.scales, self.starts, self.sides)
        found = grid(flat, self.table, *lattices, self.cells, self.smooth, self.rounded() if self.half_table else None)
        return found.view(*x.shape[:-1], self.out_dim)

    def rounded(self) -> Tensor:
        """[rows, F] the table in half precision; made anew only where it was changed."""
        version = (self.table.data_ptr(), self.table._version)
        if self._rounded is None or self._rounded[0] != version:
            self._rounded = version, self.table.detach().half()
        return self._rounded[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rounded": None}


class DenseGrid(Grid):
    """One lattice of cubes with all its points stored: linear interpolation of a regular grid of trainable features."""

    def __init__(self, in_dim: int, *, resolution: int = 128, features: int = 4, half: bool = False) -> None:
        """Features uniform in +-1e-4, from torch's generator.

        Args:
            in_dim: D, 2 to 4.
            resolution: points along an axis, 3 or more. Those inside lie (i - 1/2) / (resolution - 2) along the unit interval, and one
                lies half a cell beyond each end.
            features: numbers a point, 1, 2, 4 or 8.
            half: as for `Grid`.

        Raises:
            ValueError: a number is out of its range.
        """
        if resolution < 3 or resolution**in_dim > 2**26:
            raise ValueError(
                f"resolution: expected 3 or more and at most 2^26 points, got {resolution} in {in_dim} axes"
            )
        side = resolution - 2
        super().__init__(in_dim, levels=1, features=features, log2_rows=26, coarsest=side, finest=side, half=half)


def grid(
    x: Tensor,
    table: Tensor,
    scales: Tensor,
    starts: Tensor,
    sides: Tensor,
    cells: Cells = "cubes",
    smooth: bool = False,
    rounded: Tensor | None = None,
) -> Tensor:
    """Interpolated features of each level at `x`.

    Differentiable twice to `x` and `table`; what the kernel has no second derivative of, the reference's formula gives.

    Args:
        x: [S, D] in the unit cube; outside, the nearest point of it. NaN counts as 0, and raises under
            `torch.autograd.set_detect_anomaly`.
        table: [rows, F].
        scales: [L] cells along the unit interval.
        starts: [L + 1] int64, first row of each level.
        sides: [L] int32, points along an axis of a stored lattice, 0 for a level that is hashed to a power of two of rows.
        cells: "cubes" or "simplices".
        smooth: smoothstep instead of linear weights.
        rounded: [rows, F] the table in half precision, which is then read instead; gradients still go to `table`.

    Returns:
        [S, L F].

    Raises:
        ValueError: a shape, dtype or device does not fit, or on the CPU, rows of a level do not lie in the table.
    """
    bound = check_shapes(x=(x, "S D"), table=(table, "R F"), scales=(scales, "L"), sides=(sides, "L"))
    check_alike(x=x, table=table)
    if starts.shape != (bound["L"] + 1,) or bound["D"] not in (2, 3, 4):
        raise ValueError(
            f"x, starts: expected 2 to 4 axes and [{bound['L'] + 1}], got {bound['D']}, {list(starts.shape)}"
        )
    if cells not in ("cubes", "simplices"):
        raise ValueError(f"cells: expected cubes or simplices, got {cells!r}")
    if rounded is not None and (rounded.shape != table.shape or rounded.dtype != torch.float16):
        expected = f"float16 {list(table.shape)} like table"
        raise ValueError(f"rounded: expected {expected}, got {rounded.dtype} {list(rounded.shape)}")
    if torch.is_anomaly_enabled() and bool(x.isnan().any()):
        raise ValueError(f"x: expected numbers, got NaN in row {int(x.isnan().any(1).nonzero()[0, 0])}")
    if use_kernel(x) and bound["F"] in (1, 2, 4, 8) and (rounded is None or bound["F"] > 1):
        return _grid(x, table, scales, starts, sides, cells, smooth, rounded)
    return grid_reference(x, table, scales, starts, sides, cells, smooth, rounded)


def grid_reference(
    x: Tensor,
    table: Tensor,
    scales: Tensor,
    starts: Tensor,
    sides: Tensor,
    cells: str,
    smooth: bool,
    rounded: Tensor | None = None,
) -> Tensor:
    """`grid` in plain PyTorch: the specification."""
    if rounded is not None:
        table = table + (rounded.to(table.dtype) - table).detach()
    x = torch.nan_to_num(x).clamp(0, 1)
    corners_of = _cube_corners if cells == "cubes" else _simplex_corners
    found = []
    for level, scale in enumerate(scales.to(x.dtype)):
        weights, points = corners_of(x, scale, smooth)
        start, side = int(starts[level]), int(sides[level])
        rows = _rows(points, side, int(starts[level + 1]) - start)
        found.append((weights[..., None] * table[start + rows]).sum(1))
    return torch.cat(found, -1)


def _rows(points: Tensor, side: int, rows: int) -> Tensor:
    """Rows within a level of lattice points [..., D]."""
    axes = points.unbind(-1)
    if side:
        return sum((axis * side**d for d, axis in enumerate(axes)), torch.zeros_like(axes[0]))
    found = torch.zeros_like(axes[0])
    for axis, prime in zip(axes, PRIMES, strict=False):
        found = found ^ (axis * prime & 0xFFFFFFFF)
    return found & (rows - 1)


def _cube_corners(x: Tensor, scale: Tensor, smooth: bool) -> tuple[Tensor, Tensor]:
    """Weights [S, 2^D] and lattice points [S, 2^D, D] around each of `x` [S, D]."""
    position = x * scale + 0.5
    cell = position.detach().floor()
    far = position - cell
    far = far * far * (3 - 2 * far) if smooth else far
    offsets = torch.tensor(list(itertools.product((0, 1), repeat=x.shape[1])), device=x.device)
    weights = torch.where(offsets == 1, far[:, None], 1 - far[:, None]).prod(-1)
    return weights, cell.long()[:, None] + offsets


def _simplex_corners(x: Tensor, scale: Tensor, _smooth: bool) -> tuple[Tensor, Tensor]:
    """Weights [S, D + 1] and lattice points [S, D + 1, D] of the simplex around each of `x` [S, D].

    arXiv:2311.15439, section 3: skewed by F = (sqrt(D + 1) - 1) / D; the corners are reached from the cell's by unit steps along the axes in
    descending order of the fractional parts, whose differences are the barycentric weights.
    """
    dims = x.shape[1]
    skew = (math.sqrt(dims + 1) - 1) / dims
    position = (x + x.sum(-1, keepdim=True) * skew) * scale + 0.5
    cell = position.detach().floor()
    parts, axes = (position - cell).sort(dim=-1, descending=True, stable=True)
    ends = torch.ones_like(parts[:, :1])
    weights = torch.cat([ends, parts], -1) - torch.cat([parts, 0 * ends], -1)
    steps = nn.functional.one_hot(axes, dims).cumsum(1)
    points = cell.long()[:, None] + torch.cat([torch.zeros_like(steps[:, :1]), steps], 1)
    return weights, points


@torch.library.custom_op("prismfield::grid", mutates_args=())
def _grid(
    x: Tensor,
    table: Tensor,
    scales: Tensor,
    starts: Tensor,
    sides: Tensor,
    cells: str,
    smooth: bool,
    rounded: Tensor | None,
) -> Tensor:
    return grid_reference(x, table, scales, starts, sides, cells, smooth, rounded)


@_grid.register_fake
def _(x, table, scales, starts, sides, cells, smooth, rounded):
    return x.new_empty(x.shape[0], scales.shape[0] * table.shape[1])


def _read(table: Tensor, rounded: Tensor | None) -> Tensor:
    """The numbers that a kernel reads: single precision, or the bits of halves."""
    return table.contiguous() if rounded is None else rounded.contiguous().view(torch.int16)


@_grid.register_kernel(DEVICES)
def _(x, table, scales, starts, sides, cells, smooth, rounded):
    out = x.new_empty(x.shape[0], scales.shape[0] * table.shape[1])
    inputs = (x.contiguous(), _read(table, rounded), scales, starts, sides, smooth)
    kernels_of(x).grid_forward(cells, *inputs, out)
    return out


@torch.library.custom_op("prismfield::grid_backward", mutates_args=(), device_types=DEVICES)
def _grid_backward(
    x: Tensor,
    table: Tensor,
    scales: Tensor,
    starts: Tensor,
    sides: Tensor,
    cells: str,
    smooth: bool,
    rounded: Tensor | None,
    v_out: Tensor,
    table_gradient: bool,
    point_gradient: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x.contiguous(), _read(table, rounded), scales, starts, sides, smooth, v_out.contiguous())
    v_table = torch.empty_like(table, memory_format=torch.contiguous_format) if table_gradient else table.new_empty(0)
    v_x = torch.empty_like(inputs[0]) if point_gradient else x.new_empty(0)
    kernels_of(x).grid_backward(cells, *inputs, v_table, v_x)
    return v_table, v_x


@_grid_backward.register_fake
def _(x, table, scales, starts, sides, cells, smooth, rounded, v_out, table_gradient, point_gradient):
    v_table = torch.empty_like(table) if table_gradient else table.new_empty(0)
    return v_table, torch.empty_like(x) if point_gradient else x.new_empty(0)


def _save(ctx, inputs, output):
    *tensors, cells, smooth, rounded = inputs
    ctx.save_for_backward(*tensors, rounded)
    ctx.options = cells, smooth


def _backward(ctx, v_out):
    to_x, to_table, *_ = ctx.needs_input_grad
    *tensors, rounded = ctx.saved_tensors
    if torch.is_grad_enabled():  # with create_graph: the gradient's own gradient comes from the reference
        inputs = (*tensors, *ctx.options, rounded)
        found = grid_reference(*inputs)
        leaves = [leaf for leaf, wanted in zip(tensors, (to_x, to_table), strict=False) if wanted]
        gradients = iter(torch.autograd.grad(found, leaves, v_out, create_graph=True, materialize_grads=True))
        return next(gradients) if to_x else None, next(gradients) if to_table else None, *[None] * 6
    v_table, v_x = _grid_backward(*tensors, *ctx.options, rounded, v_out, to_table, to_x)
    return v_x if to_x else None, v_table if to_table else None, *[None] * 6


_grid.register_autograd(_backward, setup_context=_save)
