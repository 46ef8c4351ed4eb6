"""Front-to-back blending of sorted primitives over tiles of 16x16 pixels on a GPU, and its gradient.

A program takes a tile and goes through its list one primitive at a time; each lane has several pixels, so that what is done
once a lane and primitive (loads, addresses) and once a warp (sums over pixels) is shared by them. Per primitive and tile of RGB:

    forward    256 x 18 operations of pixels, 10 loads of one address; 2 warps
    backward   256 x 45 operations of pixels, 10 loads, 9 sums of 5 shuffles; 1 warp: sums need neither shared memory nor barriers

Bound by arithmetic. The other form, blocks of 16 primitives x 256 pixels with sums as matrix products, does the same work on
pixels, needs four warps to hold its blocks, and carries each product's 16 KB through shared memory: 128 to 256 wavefronts where
16 primitives have 720 shuffles of one wavefront each, but |dL/dx| is no product, tensor cores take three passes for float32, and
the gain would be smaller than what the pixels cost. The address of a primitive two ahead and the parameters of the next one
are loaded before one is blended, which hides the latency of memory.

Backward, each primitive and tile gives one record of sums, in the row that `bin` has assigned: a primitive's rows stand side by
side, and a second kernel adds them up in order. No two programs write to the same place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.bin import TILE_SIZE
from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.gpu.primitives import PRIMITIVES, Primitive, load_params
from prismfield.render.ops.constants import ALPHA_MAX, TRANS_MIN

GROUP = 16
"""Channels that the forward pass blends at once."""
CHECK = 16
"""Primitives between two looks at whether any pixel still takes light."""
tile_size = TILE_SIZE
_ALPHA_MAX, _TRANS_MIN = tl.constexpr(ALPHA_MAX), tl.constexpr(TRANS_MIN)
_TILE_SIZE, _PIXELS, _CHECK = tl.constexpr(TILE_SIZE), tl.constexpr(TILE_SIZE * TILE_SIZE), tl.constexpr(CHECK)


@triton.jit
def _load_row(first, LENGTH: tl.constexpr):
    """LENGTH numbers side by side, a tuple."""
    row = ()
    for k in tl.static_range(LENGTH):
        row += (tl.load(first + k),)
    return row


@triton.jit
def _load_channels(features, depths, member, stride, DIMS: tl.constexpr, DEPTH: tl.constexpr):
    """What a primitive has to blend, a tuple: DIMS of its `stride` features, and depth behind them."""
    channels = _load_row(features + member * stride, DIMS)
    if DEPTH:
        channels += (tl.load(depths + member),)
    return channels


@triton.jit
def _with_products(sums, blocks, factors):
    """sums + blocks * factors, term by term; either may be one block for all."""
    total = ()
    for k in tl.static_range(len(sums)):
        total += (sums[k] + blocks * factors[k],)
    return total


@triton.jit
def _sum_of_products(a, b):
    total = a[0] * b[0]
    for k in tl.static_range(1, len(a)):
        total += a[k] * b[k]
    return total


@triton.jit
def _tile_pixels(tile, width, height, columns, tiles):
    """Camera, columns and rows of the tile's pixels in its image, and which of them are inside."""
    camera, in_image, pixel = tile // tiles, (tile % tiles).to(tl.int32), tl.arange(0, _PIXELS)
    x = in_image % columns * _TILE_SIZE + pixel % _TILE_SIZE
    y = in_image // columns * _TILE_SIZE + pixel // _TILE_SIZE
    return camera, x, y, (x < width) & (y < height)


@triton.jit
def _composite_forward_kernel(
    params,
    features,
    depths,
    background,
    ids,
    tile_ranges,
    out_features,
    out_alpha,
    out_depth,
    out_median,
    out_trans,
    out_stops,
    width,
    height,
    columns,
    tiles,
    stride,
    start,
    ALPHA: tl.constexpr,
    PARAMS: tl.constexpr,
    DIMS: tl.constexpr,
    DEPTH: tl.constexpr,
    MEDIAN: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Blends DIMS of the `stride` features, from `start` on; the FIRST of them also gives what does not depend on features."""
    features, background, out_features = features + start, background + start, out_features + start
    tile = tl.program_id(0).to(tl.int64)
    camera, column, row, inside = _tile_pixels(tile, width, height, columns, tiles)
    begin = tl.load(tile_ranges + tile)
    length = tl.load(tile_ranges + tile + 1) - begin
    members = ids + begin
    trans, median = tl.full([_PIXELS], 1.0, tl.float32), tl.zeros([_PIXELS], tl.float32)
    sums = ()
    for _ in tl.static_range(DIMS + DEPTH):
        sums += (tl.zeros([_PIXELS], tl.float32),)
    stop = tl.where(inside, length, 0)  # the primitive at which a pixel is finished
    reach = length  # the last of these
    member = tl.load(members, mask=length > 0, other=0).to(tl.int64)
    following = tl.load(members + 1, mask=length > 1, other=0).to(tl.int64)
    p = load_params(params, member, length > 0, PARAMS)
    i = 0
    while i < reach:
        for k in range(i, tl.minimum(i + _CHECK, reach)):
            channels = _load_channels(features, depths, member, stride, DIMS, DEPTH)
            z = tl.load(depths + member) if MEDIAN else 0.0
            after_following = tl.load(members + tl.minimum(k + 2, reach - 1)).to(tl.int64)
            next_p = _load_row(params + following * PARAMS, PARAMS)
            raw, reached, _taken = ALPHA(p, column + (0.5 - p[0]), row + (0.5 - p[1]))
            alpha = tl.where(reached & (k < stop), tl.minimum(raw, _ALPHA_MAX), 0.0)
            weight = alpha * trans
            finished = trans - weight <= _TRANS_MIN  # never again afterwards: alpha is 0 then
            weight = tl.where(finished, 0.0, weight)
            stop = tl.where(finished, k, stop)
            if MEDIAN:
                median = tl.where((trans > 0.5) & (trans - weight <= 0.5), z, median)
            trans -= weight
            sums = _with_products(sums, weight, channels)
            member, following, p = following, after_following, next_p
        i += _CHECK
        reach = tl.max(stop)
    pixel = (camera * height + row) * width + column
    for k in tl.static_range(DIMS):
        color = sums[k] + trans * tl.load(background + camera * stride + k)
        tl.store(out_features + pixel * stride + k, color, mask=inside)
    if FIRST:
        local = tile * _PIXELS + tl.arange(0, _PIXELS)
        tl.store(out_trans + local, trans)
        tl.store(out_stops + local, stop)
        tl.store(out_alpha + pixel, 1.0 - trans, mask=inside)
    if DEPTH:
        tl.store(out_depth + pixel, sums[DIMS], mask=inside)
    if MEDIAN:
        tl.store(out_median + pixel, median, mask=inside)


@triton.jit
def _load_upstream(
    v_features, v_alpha, v_depth, background, camera, pixel, inside, DIMS: tl.constexpr, DEPTH: tl.constexpr
):
    """Gradients of the channels of a tile's pixels, a tuple, and of their transmittance."""
    v_out, v_trans = (), -tl.load(v_alpha + pixel, mask=inside, other=0.0)
    for k in tl.static_range(DIMS):
        v_out += (tl.load(v_features + pixel * DIMS + k, mask=inside, other=0.0),)
        v_trans += v_out[k] * tl.load(background + camera * DIMS + k)
    if DEPTH:
        v_out += (tl.load(v_depth + pixel, mask=inside, other=0.0),)
    return v_out, v_trans


@triton.jit
def _sums(blocks):
    """Over the pixels of each block of a tuple."""
    sums = ()
    for k in tl.static_range(len(blocks)):
        sums += (tl.sum(blocks[k]),)
    return sums


@triton.jit
def _store_record(record, sums, RECORD: tl.constexpr):
    """Numbers side by side, 16 at once: a lane each."""
    lane = tl.arange(0, 16)
    for first in tl.static_range(0, RECORD, 16):
        values = tl.zeros([16], tl.float32)
        for k in tl.static_range(16):
            if first + k < len(sums):
                values = tl.where(lane == k, sums[first + k], values)
        tl.store(record + first + lane, values, mask=first + lane < RECORD)


@triton.jit
def _store_zeros(records, rows, begin, end, RECORD: tl.constexpr):
    """The records of rows[begin:end]."""
    lane = tl.arange(0, 16)[None, :]
    for first in range(begin, end, 16):
        at = first + tl.arange(0, 16)[:, None]
        record = records + tl.load(rows + at, mask=at < end, other=0).to(tl.int64) * RECORD
        for k in tl.static_range(0, RECORD, 16):
            tl.store(record + k + lane, tl.zeros([16, 16], tl.float32), mask=(at < end) & (k + lane < RECORD))


@triton.jit
def _composite_backward_kernel(
    params,
    features,
    depths,
    background,
    ids,
    rows,
    tile_ranges,
    trans_in,
    stops,
    v_features,
    v_alpha,
    v_depth,
    records,
    v_backgrounds,
    width,
    height,
    columns,
    tiles,
    ALPHA: tl.constexpr,
    TERMS: tl.constexpr,
    ABSOLUTE_TERMS: tl.constexpr,
    PARAMS: tl.constexpr,
    DIMS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    RECORD: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    camera, column, row, inside = _tile_pixels(tile, width, height, columns, tiles)
    begin = tl.load(tile_ranges + tile)
    length = tl.load(tile_ranges + tile + 1) - begin
    members, rows = ids + begin, rows + begin
    local = tile * _PIXELS + tl.arange(0, _PIXELS)
    trans, stop = tl.load(trans_in + local), tl.load(stops + local)
    pixel = (camera * height + row) * width + column
    v_out, v_trans = _load_upstream(v_features, v_alpha, v_depth, background, camera, pixel, inside, DIMS, DEPTH)
    for k in tl.static_range(DIMS):
        tl.store(v_backgrounds + tile * DIMS + k, tl.sum(trans * v_out[k]))
    behind = trans * v_trans  # what the light that passes is worth: sum of weight * value behind here
    reach = tl.max(stop)
    _store_zeros(records, rows, reach, length, RECORD)
    member = tl.load(members + reach - 1, mask=reach > 0, other=0).to(tl.int64)
    following = tl.load(members + reach - 2, mask=reach > 1, other=0).to(tl.int64)
    p = load_params(params, member, reach > 0, PARAMS)
    for back in range(reach):
        i = reach - 1 - back
        record = records + tl.load(rows + i).to(tl.int64) * RECORD
        channels = _load_channels(features, depths, member, DIMS, DIMS, DEPTH)
        after_following = tl.load(members + tl.maximum(i - 2, 0)).to(tl.int64)
        next_p = _load_row(params + following * PARAMS, PARAMS)
        dx, dy = column + (0.5 - p[0]), row + (0.5 - p[1])
        raw, reached, taken = ALPHA(p, dx, dy)
        hit = reached & (i < stop)
        alpha = tl.where(hit, tl.minimum(raw, _ALPHA_MAX), 0.0)
        inverse = 1.0 / (1.0 - alpha)
        trans *= inverse
        weight, value = alpha * trans, _sum_of_products(v_out, channels)
        v_alpha_here = tl.where(hit & (raw <= _ALPHA_MAX), trans * value - inverse * behind, 0.0)
        behind += weight * value
        sums = _sums(TERMS(p, dx, dy, alpha, v_alpha_here, taken))
        if ABSOLUTE:
            sums += _sums(ABSOLUTE_TERMS(p, dx, dy, alpha, v_alpha_here, taken))
        for k in tl.static_range(DIMS + DEPTH):
            sums += (tl.sum(weight * v_out[k]),)
        _store_record(record, sums, RECORD)
        member, following, p = following, after_following, next_p


@triton.jit
def _sum_records_kernel(
    params,
    row_starts,
    records,
    v_params,
    v_features,
    v_depths,
    v_absgrad,
    count,
    FINISH: tl.constexpr,
    PARAMS: tl.constexpr,
    SUMS: tl.constexpr,
    DIMS: tl.constexpr,
    DEPTH: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    RECORD: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up each primitive's records, 8 at a time, and turns the sums into gradients. Bound by reading the records."""
    SHAPE: tl.constexpr = SUMS + 2 * ABSOLUTE
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < count
    first = tl.load(row_starts + at, mask=exists, other=0)
    last = tl.load(row_starts + at + 1, mask=exists, other=0)
    column = tl.arange(0, ROOM)[None, :]
    total = tl.zeros([BLOCK, ROOM], tl.float32)
    for step in range(0, tl.max(last - first), 8):
        row = first[:, None, None] + step + tl.arange(0, 8)[None, :, None]
        record = records + row.to(tl.int64) * RECORD + column[:, None, :]
        wanted = (row < last[:, None, None]) & (column[:, None, :] < RECORD)
        total += tl.sum(tl.load(record, mask=wanted, other=0.0), axis=1)
    sums = ()
    for k in tl.static_range(SUMS):
        sums += (tl.sum(tl.where(column == k, total, 0.0), axis=1),)
    listed = exists & (last > first)
    v_p = FINISH(load_params(params, at, listed, PARAMS), sums)
    for k in tl.static_range(PARAMS):
        tl.store(v_params + at * PARAMS + k, tl.where(listed, v_p[k], 0.0), mask=exists)
    at, exists = at[:, None], exists[:, None]
    channel = column - SHAPE
    tl.store(v_features + at * DIMS + channel, total, mask=exists & (channel >= 0) & (channel < DIMS))
    if DEPTH:
        tl.store(v_depths + at + 0 * column, total, mask=exists & (channel == DIMS))
    if ABSOLUTE:
        tl.store(v_absgrad + 2 * at + column - SUMS, total, mask=exists & (column >= SUMS) & (column < SHAPE))


def _sizes(width: int, height: int) -> tuple[int, int, int, int]:
    """Width, height, columns of tiles and tiles of an image."""
    columns = cdiv(width, TILE_SIZE)
    return width, height, columns, columns * cdiv(height, TILE_SIZE)


def composite_forward(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    ids: Tensor,
    tile_ranges: Tensor,
    width: int,
    height: int,
    *outputs: Tensor,
) -> None:
    """As `composite_forward` of the compiled kernels, but that it leaves the last output, the masks, as it is.

    Args:
        outputs: features, alpha, depth, median depth, final transmittance, stops, masks; an empty depth or median is not wanted.
    """
    _, _, depth, median, *_ = outputs
    chosen, dims = PRIMITIVES[primitive], features.shape[-1]
    tensors = (params, features, depths, background, ids, tile_ranges)
    for start in range(0, max(dims, 1), GROUP):
        first = start == 0
        options: dict[str, Any] = {"ALPHA": chosen.alpha, "PARAMS": chosen.num_params, "DIMS": min(GROUP, dims - start)}
        options |= {"FIRST": first, "DEPTH": first and depth.numel() > 0, "MEDIAN": first and median.numel() > 0}
        warps = 2 if options["DIMS"] + options["DEPTH"] <= 4 else 4  # as many as registers allow
        options["num_warps"] = max(warps, chosen.warps)
        sizes = (*_sizes(width, height), dims, start)
        launch(_composite_forward_kernel, (len(tile_ranges) - 1,), *tensors, *outputs[:6], *sizes, **options)


def composite_backward(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    ids: Tensor,
    rows: Tensor,
    tile_ranges: Tensor,
    row_starts: Tensor,
    width: int,
    *saved_and_gradients: Any,
) -> None:
    """As `composite_backward` of the compiled kernels.

    Args:
        saved_and_gradients: height; transmittance, stops and masks of the forward pass; the gradients of features, alpha and
            depth (empty if there is none); and, written, those of params, features, depths, background and absgrad (empty if
            it is not wanted).
    """
    height, trans, stops, _, v_features, v_alpha, v_depth, *gradients = saved_and_gradients
    out_params, out_features, out_depths, out_background, out_absgrad = gradients
    chosen, dims, tiles = PRIMITIVES[primitive], features.shape[-1], len(tile_ranges) - 1
    has_depth, absolute = v_depth.numel() > 0, out_absgrad.numel() > 0
    record = 4 * cdiv(chosen.num_sums + 2 * absolute + dims + has_depth, 4)
    sizes: dict[str, Any] = {"PARAMS": chosen.num_params, "DIMS": dims, "DEPTH": has_depth, "ABSOLUTE": absolute}
    sizes["RECORD"] = record
    records, v_backgrounds = params.new_empty(len(ids), record), params.new_empty(tiles, dims)
    lists, upstream = (ids, rows, tile_ranges, trans, stops), (v_features, v_alpha, v_depth)
    tensors = (params, features, depths, background, *lists, *upstream, records, v_backgrounds)
    functions = {"ALPHA": chosen.alpha, "TERMS": chosen.terms, "ABSOLUTE_TERMS": chosen.absolute_terms}
    warps = next(warps for warps in (1, 2, 4, 8) if dims + has_depth <= 4 * warps or warps == 8)
    image = _sizes(width, height)
    warps = max(warps, chosen.warps)
    launch(_composite_backward_kernel, (tiles,), *tensors, *image, **functions, **sizes, num_warps=warps)
    torch.sum(v_backgrounds.view(len(background), -1, dims), 1, out=out_background)
    _sum_records(chosen, params, row_starts, records, out_params, out_features, out_depths, out_absgrad, sizes)


def _sum_records(
    chosen: Primitive,
    params: Tensor,
    row_starts: Tensor,
    records: Tensor,
    out_params: Tensor,
    out_features: Tensor,
    out_depths: Tensor,
    out_absgrad: Tensor,
    sizes: dict[str, Any],
) -> None:
    if not sizes["DEPTH"]:
        out_depths.zero_()
    count, room = out_depths.numel(), max(16, triton.next_power_of_2(sizes["RECORD"]))
    warps = 2 if chosen.num_sums <= 8 else 1  # each lane holds all sums of its primitives
    block = max(1, 64 * warps // room)
    tensors = (params, row_starts, records, out_params, out_features, out_depths, out_absgrad)
    options = {"FINISH": chosen.finish, "SUMS": chosen.num_sums, "ROOM": room, "BLOCK": block, "num_warps": warps}
    launch(_sum_records_kernel, (cdiv(count, block),), *tensors, count, **sizes, **options)
