"""Lists of the primitives that reach each tile, in order of depth, on a GPU.

Primitives are sorted by depth once (N keys of 32 bits), their intersections are emitted in that order and sorted stably by tile
alone: two radix passes over keys of 16 bits, where keys of tile and depth take six or more. The passes over the intersections
are bound by memory: some 80 bytes each in all, most of them in `torch.sort`, whose permutation is of 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.gpu.primitives import PRIMITIVES, load_params

TILE_SIZE = 16
COUNT_BLOCK, EMIT_BLOCK, LIST_BLOCK = 128, 32, 1024
COLUMNS = 4
"""Tiles of a row that are written at once."""
_TILE_SIZE, _COLUMNS = tl.constexpr(TILE_SIZE), tl.constexpr(COLUMNS)


@triton.jit
def _tile_rows(params, radii, at, exists, height, PARAMS: tl.constexpr):
    """Screen parameters, the first row of tiles that the footprint may touch, and how many rows: 0 where nothing is drawn."""
    drawn = exists & (tl.load(radii + 2 * at, mask=exists, other=0.0) > 0)
    p = load_params(params, at, drawn, PARAMS)
    radius = tl.load(radii + 2 * at + 1, mask=drawn, other=0.0) + 0.51  # of pixel centres, and some rounding
    top, bottom = p[1] - radius, p[1] + radius
    drawn &= (bottom >= 0) & (top <= height)  # not NaN, either
    first = tl.where(drawn, tl.maximum(top, 0.0), 0.0).to(tl.int32) // _TILE_SIZE
    last = tl.where(drawn, tl.minimum(bottom, height - 1.0), 0.0).to(tl.int32) // _TILE_SIZE
    return p, first, tl.where(drawn, last - first + 1, 0)


@triton.jit
def _tile_columns(p, row, wanted, width, height, ROW_SPAN: tl.constexpr):
    """First tile of row `row` with a pixel centre inside, and how many: 0 where not `wanted`."""
    y0 = (row * _TILE_SIZE).to(tl.float32) + 0.5
    y1 = tl.minimum((row + 1) * _TILE_SIZE, height).to(tl.float32) - 0.5
    left, right = ROW_SPAN(p, y0, y1)
    first, last = tl.ceil(left - 0.5), tl.floor(right - 0.5)
    touched = wanted & (last >= first) & (right >= 0.5) & (left <= width)
    # Within the image before they become integers
    first = tl.where(touched, tl.maximum(first, 0.0), 0.0).to(tl.int32) // _TILE_SIZE
    last = tl.where(touched, tl.minimum(last, width - 1.0), 0.0).to(tl.int32) // _TILE_SIZE
    return first, tl.where(touched, tl.maximum(last - first + 1, 0), 0)


@triton.jit
def _count_kernel(
    params, radii, counts, total, width, height, ROW_SPAN: tl.constexpr, PARAMS: tl.constexpr, BLOCK: tl.constexpr
):
    """How many tiles each primitive reaches."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < total
    p, first, rows = _tile_rows(params, radii, at, exists, height, PARAMS)
    count = tl.zeros([BLOCK], tl.int32)
    for k in range(tl.max(rows)):
        _, here = _tile_columns(p, first + k, k < rows, width, height, ROW_SPAN)
        count += here
    tl.store(counts + at, count, mask=exists)


@triton.jit
def _emit_kernel(
    params,
    radii,
    order,
    ends,
    row_starts,
    tiles,
    entries,
    total,
    count,
    width,
    height,
    rows_of_tiles,
    columns_of_tiles,
    ROW_SPAN: tl.constexpr,
    PARAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each intersection's tile, and its (id, row) beside one another: primitives in the order `order`, those of the k-th
    before `ends[k]`, each one's in order of tile."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    exists = at < total
    member = tl.load(order + at, mask=exists, other=0)
    row_start = tl.load(row_starts + member, mask=exists, other=0)
    length = tl.load(row_starts + member + 1, mask=exists, other=0) - row_start
    start = tl.load(ends + at, mask=exists, other=0) - length
    p, first, rows = _tile_rows(params, radii, member, exists & (length > 0), height, PARAMS)
    camera = (member // count).to(tl.int32)
    done = tl.zeros([BLOCK, 1], tl.int32)
    lane = tl.arange(0, _COLUMNS)[None, :]
    for k in range(tl.max(rows)):
        row = first + k
        column, here = _tile_columns(p, row, k < rows, width, height, ROW_SPAN)
        tile = (camera * rows_of_tiles + row) * columns_of_tiles + column
        here = tl.minimum(here, length - done)  # nothing is written beyond what was counted, whatever happens
        for step in range(0, tl.max(here), _COLUMNS):
            j = step + lane
            to = start + done + j
            tl.store(tiles + to, (tile + j).to(tiles.dtype.element_ty), mask=j < here)
            tl.store(entries + 2 * to, tl.where(j < here, member, 0).to(tl.int32), mask=j < here)
            tl.store(entries + 2 * to + 1, row_start + done + j, mask=j < here)
        done += here


@triton.jit
def _list_kernel(entries, order, ids, rows, length, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < length
    entry = entries + 2 * tl.load(order + at, mask=exists, other=0)
    tl.store(ids + at, tl.load(entry, mask=exists, other=0), mask=exists)
    tl.store(rows + at, tl.load(entry + 1, mask=exists, other=0), mask=exists)


def bin_count(
    primitive: str,
    params: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
    tile_size: int,
    tile_ranges: Tensor,
    row_starts: Tensor,
) -> int:
    """As `bin_count` of the compiled kernels, without `tile_ranges`: `row_starts`, and the number of intersections.

    That number is what the host waits for, the only time in a training step.

    Raises:
        ValueError: the tile size is not the kernels', or there are 2^31 intersections or more.
    """
    if tile_size != TILE_SIZE:
        raise ValueError("tile_size: the Triton kernels have their own, see gpu.bindings.tile_size")
    chosen, total = PRIMITIVES[primitive], depths.numel()
    counts = torch.empty_like(row_starts[1:])
    tensors, options = (params, radii, counts), {"ROW_SPAN": chosen.row_span, "PARAMS": chosen.num_params}
    launch(_count_kernel, (cdiv(total, COUNT_BLOCK),), *tensors, total, width, height, **options, BLOCK=COUNT_BLOCK)
    ends = counts.cumsum(0)
    row_starts[:1] = 0
    row_starts[1:] = ends
    length = int(ends[-1]) if total else 0
    if length >= 2**31:
        raise ValueError("bin: 2^31 tile intersections or more; use fewer primitives or a smaller image")
    return length


def bin_sort(
    primitive: str,
    params: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
    tile_size: int,
    tile_ranges: Tensor,
    row_starts: Tensor,
    ids: Tensor,
    rows: Tensor,
) -> None:
    """As `bin_sort` of the compiled kernels, and `tile_ranges`; `row_starts` are those of `bin_count`."""
    chosen, total, tiles = PRIMITIVES[primitive], depths.numel(), len(tile_ranges) - 1
    # The bits of positive numbers are in their order; what is not drawn has no intersections
    order = torch.sort(depths.flatten().view(torch.int32), stable=True)[1]
    ends = row_starts.diff()[order].cumsum(0)
    keys = torch.empty(len(ids), dtype=torch.int16 if tiles < 2**15 else torch.int32, device=params.device)
    entries = params.new_empty(len(ids), 2, dtype=torch.int32)
    tensors = (params, radii, order, ends, row_starts, keys, entries)
    sizes = (total, depths.shape[1], width, height, cdiv(height, tile_size), cdiv(width, tile_size))
    options = {"ROW_SPAN": chosen.row_span, "PARAMS": chosen.num_params, "BLOCK": EMIT_BLOCK}
    launch(_emit_kernel, (cdiv(total, EMIT_BLOCK),), *tensors, *sizes, **options, num_warps=1)
    keys, by_tile = torch.sort(keys, stable=True)
    bounds = torch.arange(tiles + 1, dtype=keys.dtype, device=keys.device)
    torch.searchsorted(keys, bounds, out_int32=True, out=tile_ranges)
    launch(_list_kernel, (cdiv(len(ids), LIST_BLOCK),), entries, by_tile, ids, rows, len(ids), BLOCK=LIST_BLOCK)
