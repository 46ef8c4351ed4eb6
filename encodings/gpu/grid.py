"""Multiresolution grids of trainable features on a GPU, forward and backward.

A program takes a level of a block of points; those of a level run one after the other, so that its table stays in the second
cache. Bound by gathers: D + 1 or 2^D rows a point and level, each in a sector of its own where a level is hashed.

The gradient of a table is summed by atomics on integers, whose order does not matter: weights times gradients are rounded to
multiples of a 2^-40th or less of the largest gradient, and 64 bits hold the sum of all points. That takes 8 bytes a number of the
table beside the gradient itself. The gradient of the points needs none: a program there goes through all levels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismfield.encodings.grid import PRIMES
from prismfield.render.gpu.launch import cdiv, launch

BLOCK = 128
_PRIMES = tl.constexpr(PRIMES)
_LEAST = 1e-18
"""The largest gradient counts as at least this: a 2^62th of it is still a normal float32."""


@triton.jit
def _skew(D: tl.constexpr):
    """(sqrt(D + 1) - 1) / D."""
    return 0.36602540378443865 if D == 2 else 0.3333333333333333 if D == 3 else 0.30901699437494745


@triton.jit
def _load_points(x, at, mask, D: tl.constexpr):
    """Coordinates as they come, and within the unit cube: tuples. NaN becomes 0."""
    raw = ()
    inside = ()
    for d in tl.static_range(D):
        value = tl.load(x + D * at + d, mask=mask, other=0.0)
        raw += (value,)
        inside += (tl.minimum(tl.where(value > 0, value, 0.0), 1.0),)
    return raw, inside


@triton.jit
def _load_features(table, row, feature, mask, F: tl.constexpr):
    """Of rows of the table; int16 are the bits of halves."""
    found = tl.load(table + F * row + feature, mask=mask, other=0)
    if table.dtype.element_ty == tl.int16:
        found = found.to(tl.float16, bitcast=True)
    return found.to(tl.float32)


@triton.jit
def _load_level(scales, starts, sides, level):
    """Cells along the unit interval, first row, number of rows, and points along an axis, 0 where they are hashed."""
    start = tl.load(starts + level)
    rows = tl.load(starts + level + 1) - start
    return tl.load(scales + level), start, rows.to(tl.uint32), tl.load(sides + level).to(tl.uint32)


@triton.jit
def _cells(x, scale, SIMPLICES: tl.constexpr, D: tl.constexpr):
    """Lower corner of the cell around each point, tuples: uint32; and where in the cell the point is."""
    offset = x[0] * 0.0
    if SIMPLICES:
        for d in tl.static_range(D):
            offset += x[d] * _skew(D)
    cell = ()
    parts = ()
    for d in tl.static_range(D):
        position = (x[d] + offset) * scale + 0.5
        whole = tl.floor(position)
        cell += (whole.to(tl.int32).to(tl.uint32),)
        parts += (position - whole,)
    return cell, parts


@triton.jit
def _ranks(parts, D: tl.constexpr):
    """Each axis's place in the descending order of the fractional parts, ties in the order of axes; and the parts in that order."""
    ranks = ()
    for d in tl.static_range(D):
        rank = tl.zeros_like(parts[0]).to(tl.int32)
        for e in tl.static_range(D):
            if e < d:
                rank += tl.where(parts[e] >= parts[d], 1, 0)
            elif e > d:
                rank += tl.where(parts[e] > parts[d], 1, 0)
        ranks += (rank,)
    ordered = ()
    for k in tl.static_range(D):
        part = tl.zeros_like(parts[0])
        for d in tl.static_range(D):
            part = tl.where(ranks[d] == k, parts[d], part)
        ordered += (part,)
    return ranks, ordered


@triton.jit
def _fades(parts, SMOOTH: tl.constexpr, D: tl.constexpr):
    """Weights of the upper corners of a cube along each axis, and their derivatives."""
    far = ()
    slope = ()
    for d in tl.static_range(D):
        f = parts[d]
        if SMOOTH:
            far += (f * f * (3.0 - 2.0 * f),)
            slope += (6.0 * f * (1.0 - f),)
        else:
            far += (f,)
            slope += (f * 0.0 + 1.0,)
    return far, slope


@triton.jit
def _order(parts, SIMPLICES: tl.constexpr, SMOOTH: tl.constexpr, D: tl.constexpr):
    """What a corner's weight is made of: `_ranks` of simplices, `_fades` of cubes."""
    if SIMPLICES:
        first, second = _ranks(parts, D)
    else:
        first, second = _fades(parts, SMOOTH, D)
    return first, second


@triton.jit
def _row(cell, ranks, corner: tl.constexpr, rows, side, SIMPLICES: tl.constexpr, D: tl.constexpr):
    """Row of a corner within its level."""
    point = ()
    for d in tl.static_range(D):
        if SIMPLICES:
            point += (cell[d] + tl.where(ranks[d] < corner, 1, 0).to(tl.uint32),)
        else:
            point += (cell[d] + (corner >> d & 1),)
    stored = point[0]
    hashed = point[0]
    stride = side
    for d in tl.static_range(1, D):
        stored += point[d] * stride
        hashed ^= point[d] * _PRIMES[d]
        stride *= side
    return tl.where(side > 0, stored, hashed & (rows - 1)).to(tl.int64)


@triton.jit
def _weight(first, second, corner: tl.constexpr, SIMPLICES: tl.constexpr, D: tl.constexpr):
    """Of a corner, from what `_order` gives."""
    if SIMPLICES:
        upper = second[corner - 1] if corner > 0 else second[0] * 0.0 + 1.0
        weight = upper - second[corner] if corner < D else upper
    else:
        weight = first[0] if corner & 1 else 1.0 - first[0]
        for d in tl.static_range(1, D):
            weight *= first[d] if corner >> d & 1 else 1.0 - first[d]
    return weight


@triton.jit
def _slopes(first, second, corner: tl.constexpr, SIMPLICES: tl.constexpr, D: tl.constexpr):
    """Derivatives of a corner's weight to the point, a tuple, where cells are 1 long."""
    slopes = ()
    for d in tl.static_range(D):
        if SIMPLICES:
            # + where the walk takes the axis to get here, - where it takes it next; the skew spreads their sum over all axes
            slope = tl.where(first[d] == corner - 1, 1.0, 0.0) - tl.where(first[d] == corner, 1.0, 0.0)
            if corner == 0:
                slope -= _skew(D)
            elif corner == D:
                slope += _skew(D)
        else:
            slope = second[d] if corner >> d & 1 else -second[d]
            for e in tl.static_range(D):
                if e != d:
                    slope *= first[e] if corner >> e & 1 else 1.0 - first[e]
        slopes += (slope,)
    return slopes


@triton.jit
def _grid_forward_kernel(
    x,
    table,
    scales,
    starts,
    sides,
    out,
    count,
    levels,
    SIMPLICES: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, feature = tl.program_id(1), tl.arange(0, F)[None, :]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = at < count
    scale, start, rows, side = _load_level(scales, starts, sides, level)
    _, inside = _load_points(x, at, mask, D)
    cell, parts = _cells(inside, scale, SIMPLICES, D)
    first, second = _order(parts, SIMPLICES, SMOOTH, D)
    sums = tl.zeros([BLOCK, F], tl.float32)
    for corner in tl.static_range(D + 1 if SIMPLICES else 2**D):
        row = start + _row(cell, first, corner, rows, side, SIMPLICES, D)
        weight = _weight(first, second, corner, SIMPLICES, D)
        sums += weight * _load_features(table, row, feature, mask, F)
    tl.store(out + (at * levels + level) * F + feature, sums, mask=mask)


@triton.jit
def _table_gradient_kernel(
    x,
    scales,
    starts,
    sides,
    v_out,
    unit,
    sums,
    count,
    levels,
    SIMPLICES: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, feature = tl.program_id(1), tl.arange(0, F)[None, :]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = at < count
    scale, start, rows, side = _load_level(scales, starts, sides, level)
    _, inside = _load_points(x, at, mask, D)
    cell, parts = _cells(inside, scale, SIMPLICES, D)
    first, second = _order(parts, SIMPLICES, SMOOTH, D)
    v = tl.load(v_out + (at * levels + level) * F + feature, mask=mask, other=0.0) / tl.load(unit)
    for corner in tl.static_range(D + 1 if SIMPLICES else 2**D):
        row = start + _row(cell, first, corner, rows, side, SIMPLICES, D)
        share = (v * _weight(first, second, corner, SIMPLICES, D)).to(tl.int64)
        tl.atomic_add(sums + F * row + feature, share, mask=mask & (share != 0), sem="relaxed")


@triton.jit
def _point_gradient_kernel(
    x,
    table,
    scales,
    starts,
    sides,
    v_out,
    v_x,
    count,
    levels,
    SIMPLICES: tl.constexpr,
    SMOOTH: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    feature = tl.arange(0, F)[None, :]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mask = at < count
    raw, inside = _load_points(x, at, mask, D)
    v_point = (tl.zeros([BLOCK, 1], tl.float32),)
    for _ in tl.static_range(1, D):
        v_point += (tl.zeros([BLOCK, 1], tl.float32),)
    for level in range(levels):
        scale, start, rows, side = _load_level(scales, starts, sides, level)
        cell, parts = _cells(inside, scale, SIMPLICES, D)
        first, second = _order(parts, SIMPLICES, SMOOTH, D)
        v = tl.load(v_out + (at * levels + level) * F + feature, mask=mask, other=0.0) * scale
        for corner in tl.static_range(D + 1 if SIMPLICES else 2**D):
            row = start + _row(cell, first, corner, rows, side, SIMPLICES, D)
            read = _load_features(table, row, feature, mask, F)
            value = tl.sum(v * read, axis=1, keep_dims=True)
            slopes = _slopes(first, second, corner, SIMPLICES, D)
            total = (v_point[0] + slopes[0] * value,)
            for d in tl.static_range(1, D):
                total += (v_point[d] + slopes[d] * value,)
            v_point = total
    for d in tl.static_range(D):
        kept = (raw[d] >= 0) & (raw[d] <= 1)
        tl.store(v_x + D * at + d, tl.where(kept, v_point[d], 0.0), mask=mask)


def _options(cells: str, x: Tensor, table: Tensor, smooth: bool) -> dict[str, int]:
    if cells not in ("cubes", "simplices"):
        raise ValueError(f"cells: expected cubes or simplices, got {cells!r}")
    sizes = {"D": x.shape[1], "F": table.shape[1], "BLOCK": BLOCK}
    return {"SIMPLICES": cells == "simplices", "SMOOTH": smooth and cells == "cubes"} | sizes


def grid_forward(
    cells: str, x: Tensor, table: Tensor, scales: Tensor, starts: Tensor, sides: Tensor, smooth: bool, out: Tensor
) -> None:
    """As `grid_forward` of the compiled kernels: `out` [S, L F] from what `grid` takes; `table` may be the bits of halves."""
    options = _options(cells, x, table, smooth)
    tensors = (x, table, scales, starts, sides, out)
    launch(_grid_forward_kernel, (cdiv(len(x), BLOCK), len(scales)), *tensors, len(x), len(scales), **options)


def grid_backward(
    cells: str,
    x: Tensor,
    table: Tensor,
    scales: Tensor,
    starts: Tensor,
    sides: Tensor,
    smooth: bool,
    v_out: Tensor,
    v_table: Tensor,
    v_x: Tensor,
) -> None:
    """As `grid_backward` of the compiled kernels: fills those of `v_table` and `v_x` that are not empty.

    The same in each run. A gradient of `v_out` that is not finite makes all of `v_table` NaN.
    """
    options = _options(cells, x, table, smooth)
    sizes, blocks = (len(x), len(scales)), cdiv(len(x), BLOCK)
    if v_table.numel() > 0:
        sums = torch.zeros_like(v_table, dtype=torch.int64)
        largest = v_out.abs().max() if v_out.numel() > 0 else v_out.new_zeros(())
        # No row gets more than each point's gradient once
        unit = largest.clamp(min=_LEAST) * 2.0 ** (math.ceil(math.log2(max(len(x), 1))) - 62)
        tensors = (x, scales, starts, sides, v_out, unit, sums)
        launch(_table_gradient_kernel, (blocks, len(scales)), *tensors, *sizes, **options)
        torch.mul(sums, unit, out=v_table)
    if v_x.numel() > 0:
        tensors = (x, table, scales, starts, sides, v_out, v_x)
        launch(_point_gradient_kernel, (blocks,), *tensors, *sizes, **options)
