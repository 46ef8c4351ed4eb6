"""Samples along rays on a GPU: found in an occupancy grid, and blended front to back; their gradients.

Marching: a lane takes a ray and walks through the grid; the 32 of a warp go on until the last has arrived, and need no barrier.
The words of the grid (256 KB a level of 128^3 cells) stay in the L2 cache, so that each look costs the latency of a few loads
there; many warps hide it. Counting and filling are one and the same compiled kernel: two could round a step differently, and
then one would find more samples than the other has room for.

Blending: a program of one warp takes a ray, 32 samples at a time, one a lane: loads lie side by side, and sums over those in front
are scans within the warp. Bound by memory: a sample of RGB takes 28 bytes forward, and 60 backward.
No two programs write to the same place.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.ops.constants import TRANS_MIN
from prismfield.render.ops.march import BLOCK, MOST_STEPS, TAU_MAX

LANES = 32
GROUP = 16
"""Channels that the forward pass blends at once."""
_BLOCK, _MOST_STEPS = tl.constexpr(BLOCK), tl.constexpr(float(MOST_STEPS))
_TRANS_MIN, _TAU_MAX = tl.constexpr(TRANS_MIN), tl.constexpr(TAU_MAX)


@triton.jit
def _steps_until(t, step, cone, CONE: tl.constexpr):
    """Steps from 0 to the distance t: of the length `step`, or of `cone` times the distance where that is more."""
    steps = t * (1.0 / step)
    if CONE:
        turn = step / cone
        steps = tl.where(t > turn, (tl.log(tl.maximum(t, turn) * (1.0 / turn)) + 1.0) * (1.0 / cone), steps)
    return steps


@triton.jit
def _distance_after(steps, step, cone, CONE: tl.constexpr):
    """The inverse of `_steps_until`."""
    distance = steps * step
    if CONE:
        grown = steps * cone
        distance = tl.where(grown > 1.0, tl.exp(tl.maximum(grown, 1.0) - 1.0) * (step / cone), distance)
    return distance


@triton.jit
def _load_axis(origins, dirs, aabb, ray, exists, axis: tl.constexpr):
    """Origin, direction and its inverse, in units in which level 0 is the cube from -1 to 1; and whether they are numbers."""
    low, high = tl.load(aabb + axis), tl.load(aabb + 3 + axis)
    half = (high - low) * 0.5
    origin = tl.load(origins + 3 * ray + axis, mask=exists, other=0.0)
    along = tl.load(dirs + 3 * ray + axis, mask=exists, other=1.0)
    finite = tl.abs(origin + along) < float("inf")
    along = tl.where(tl.abs(along) < 1e-12, tl.where(along < 0, -1e-12, 1e-12), along)
    return (origin - (low + high) * 0.5) / half, along / half, half / along, finite


@triton.jit
def _look(bits, origin, along, inverse, t, far, going, side, LEVELS: tl.constexpr):
    """Whether the cell at distance t is occupied, and where the ray leaves it, or the block around it if all of that is empty."""
    unit = ()
    reach = tl.zeros_like(t)
    for d in tl.static_range(3):
        unit += (origin[d] + t * along[d],)
        reach = tl.maximum(reach, tl.abs(unit[d]))
    res, cells, level = side * _BLOCK, (), tl.zeros_like(going.to(tl.int32))
    middle = res * 0.5
    width = tl.zeros_like(t) + 1.0 / middle  # of a cell
    per_unit = tl.zeros_like(t) + middle
    for k in tl.static_range(LEVELS - 1):
        beyond = reach > 2.0**k
        level += beyond.to(tl.int32)
        width = tl.where(beyond, width * 2.0, width)
        per_unit = tl.where(beyond, per_unit * 0.5, per_unit)
    index, bit = level, tl.zeros_like(level)
    for d in tl.static_range(3):
        place = unit[d] * per_unit + middle
        # Within the grid before it becomes an integer: rounding may carry the end of the ray across the border
        cells += (tl.minimum(tl.maximum(place, 0.0), res - 1.0).to(tl.int32),)
        index = index * side + cells[d] // _BLOCK
        bit = bit * _BLOCK + cells[d] % _BLOCK
    word = tl.load(bits + index, mask=going, other=0)
    leaves = far
    for d in tl.static_range(3):
        first = tl.where(word == 0, cells[d] // _BLOCK * _BLOCK, cells[d])
        size = tl.where(word == 0, _BLOCK, 1)
        border = first + tl.where(along[d] > 0, size, 0)
        leaves = tl.minimum(leaves, ((border - middle) * width - origin[d]) * inverse[d])
    return ((word >> bit.to(tl.int64)) & 1) != 0, leaves


@triton.jit(do_not_specialize=["fill"])
def _march_kernel(
    origins,
    dirs,
    ranges,
    jitter,
    bits,
    aabb,
    packed_info,
    t_starts,
    t_ends,
    ray_indices,
    rays,
    side,
    step,
    cone,
    most,
    fill,
    LEVELS: tl.constexpr,
    CONE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Counts the samples of each ray where `fill` is 0; otherwise writes as many as have been counted."""
    ray = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    exists = ray < rays
    fills = tl.where(exists, fill, 0) != 0
    near = tl.load(ranges + 2 * ray, mask=exists, other=0.0)
    far = tl.load(ranges + 2 * ray + 1, mask=exists, other=0.0)
    usable = exists & (near < far)
    outer = 2.0 ** (LEVELS - 1)
    origin, along, inverse = (), (), ()
    for d in tl.static_range(3):
        from_here, along_axis, inverse_axis, finite = _load_axis(origins, dirs, aabb, ray, exists, d)
        a, b = (-outer - from_here) * inverse_axis, (outer - from_here) * inverse_axis
        near, far = tl.maximum(near, tl.minimum(a, b)), tl.minimum(far, tl.maximum(a, b))
        usable &= finite
        origin += (from_here,)
        along += (along_axis,)
        inverse += (inverse_axis,)
    usable &= near < far
    shift = tl.load(jitter + ray, mask=exists, other=0.0)
    edge = _steps_until(near, step, cone, CONE) - shift
    steps = tl.ceil(_steps_until(far, step, cone, CONE) - edge)
    count = tl.where(usable & (steps > 0), tl.minimum(steps, _MOST_STEPS), 0.0)  # 0, too, where it is not a number
    place = tl.load(packed_info + 2 * ray, mask=fills, other=0)
    limit = tl.load(packed_info + 2 * ray + 1, mask=fills, other=0)
    limit = tl.where(fills, limit, most)
    found, k = tl.zeros_like(limit), tl.zeros_like(edge)
    going = (k < count) & (found < limit)
    while tl.max(going.to(tl.int32)) > 0:
        start = tl.maximum(_distance_after(edge + k, step, cone, CONE), near)
        end = tl.minimum(_distance_after(edge + (k + 1.0), step, cone, CONE), far)
        hit, leaves = _look(bits, origin, along, inverse, (start + end) * 0.5, far, going, side, LEVELS)
        hit &= going
        tl.store(t_starts + place + found, start, mask=hit & fills)
        tl.store(t_ends + place + found, end, mask=hit & fills)
        tl.store(ray_indices + place + found, ray, mask=hit & fills)
        found += hit.to(tl.int64)
        # A step too early costs a look, one too late would be missed
        onward = tl.ceil(_steps_until(leaves, step, cone, CONE) - edge - (cone + 0.51))
        k = tl.minimum(tl.where(hit, k + 1.0, tl.maximum(onward, k + 1.0)), count)
        going = (k < count) & (found < limit)
    tl.store(packed_info + 2 * ray + 1, found, mask=tl.where(exists, fill, 1) == 0)


@triton.jit
def _before(x, lane):
    """Sums of what stands in the lanes in front: not by differences, which would leave the rounding of what is large."""
    return tl.cumsum(tl.where(lane > 0, tl.gather(x, tl.maximum(lane - 1, 0), 0), 0.0), 0)


@triton.jit
def _load_piece(sigmas, starts, ends, at, exists):
    """Start, length and optical depth of samples; the latter is as it comes, and 0 where there is no sample."""
    start = tl.load(starts + at, mask=exists, other=0.0)
    length = tl.load(ends + at, mask=exists, other=0.0) - start
    return start, length, tl.load(sigmas + at, mask=exists, other=0.0) * length


@triton.jit
def _clamped(depth):
    return tl.where(depth > 0, tl.minimum(depth, _TAU_MAX), 0.0)  # NaN becomes 0


@triton.jit
def _absorbed(tau):
    """1 - exp(-tau). The difference has no correct digits where little is absorbed."""
    series = 1.0 / 24 - tau * (1.0 / 120 - tau * (1.0 / 720))
    series = tau * (1.0 - tau * (0.5 - tau * (1.0 / 6 - tau * series)))
    return tl.where(tau < 0.25, series, 1.0 - tl.exp(-tau))


@triton.jit
def _composite_samples_forward_kernel(
    sigmas,
    features,
    t_starts,
    t_ends,
    packed_info,
    light,
    out_features,
    out_alpha,
    out_moment,
    out_median,
    out_weights,
    stride,
    first_channel,
    DIMS: tl.constexpr,
    FIRST: tl.constexpr,
    LANES: tl.constexpr,
):
    """Blends DIMS of the `stride` features; the FIRST of them also gives what does not depend on features."""
    features, out_features = features + first_channel, out_features + first_channel
    ray, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    begin = tl.load(packed_info + 2 * ray)
    count = tl.load(packed_info + 2 * ray + 1).to(tl.int32)
    entering = tl.load(light + ray)
    nothing = tl.zeros([LANES], tl.float32)
    alpha, moment, median, bright = nothing, nothing, nothing, tl.full([LANES], -1, tl.int32)
    sums = ()
    for _ in tl.static_range(DIMS):
        sums += (nothing,)
    depth = 0.0  # of all before these samples
    for first in range(0, count, LANES):
        place = first + lane
        at, exists = begin + place, place < count
        start, length, raw = _load_piece(sigmas, t_starts, t_ends, at, exists)
        tau = _clamped(raw)
        trans = tl.exp(-(_before(tau, lane) + depth)) * entering
        depth += tl.sum(tau)
        live = exists & (trans > _TRANS_MIN)
        weight = tl.where(live, trans * _absorbed(tau), 0.0)
        added = ()
        for k in tl.static_range(DIMS):
            added += (sums[k] + weight * tl.load(features + at * stride + k, mask=live, other=0.0),)
        sums = added
        if FIRST:
            tl.store(out_weights + at, weight, mask=exists)
            alpha += weight
            moment += weight * (start + length * 0.5)
            # Half of the light is lost in the last sample that more than half enters, if it is lost at all
            enters = exists & (trans > 0.5)
            share = tl.log(tl.where(enters, trans * 2.0, 1.0)) / tl.maximum(tau, 1e-30)
            median = tl.where(enters, start + length * tl.minimum(share, 1.0), median)
            bright = tl.where(enters, place, bright)
    for k in tl.static_range(DIMS):
        tl.store(out_features + ray * stride + k, tl.sum(sums[k]))
    if FIRST:
        tl.store(out_alpha + ray, tl.sum(alpha))
        tl.store(out_moment + ray, tl.sum(moment))
        last = tl.max(bright)
        lost = (last >= 0) & (tl.exp(-depth) * entering <= 0.5)
        tl.store(out_median + ray, tl.where(lost, tl.sum(tl.where(bright == last, median, 0.0)), 0.0))


@triton.jit
def _composite_samples_backward_kernel(
    sigmas,
    features,
    t_starts,
    t_ends,
    packed_info,
    light,
    v_blended,
    v_alpha,
    v_moment,
    v_weights,
    v_sigmas,
    v_features,
    DIMS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Front to back for the optical depth before each sample, kept where its gradient will be; then back to front."""
    ray, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    begin = tl.load(packed_info + 2 * ray)
    count = tl.load(packed_info + 2 * ray + 1).to(tl.int32)
    depth = 0.0
    for first in range(0, count, LANES):
        at, exists = begin + first + lane, first + lane < count
        start, length, raw = _load_piece(sigmas, t_starts, t_ends, at, exists)
        tau = _clamped(raw)
        tl.store(v_sigmas + at, _before(tau, lane) + depth, mask=exists)
        depth += tl.sum(tau)
    tl.debug_barrier()  # other lanes read these
    entering, of_alpha, of_moment = tl.load(light + ray), tl.load(v_alpha + ray), tl.load(v_moment + ray)
    last = begin + count - 1
    behind = 0.0  # sum of weight * worth of the samples behind these
    for first in range(0, count, LANES):
        at, exists = last - first - lane, first + lane < count
        start, length, raw = _load_piece(sigmas, t_starts, t_ends, at, exists)
        tau = _clamped(raw)
        trans = tl.exp(-tl.load(v_sigmas + at, mask=exists, other=0.0)) * entering
        live = exists & (trans > _TRANS_MIN)
        weight = tl.where(live, trans * _absorbed(tau), 0.0)
        worth = of_alpha + of_moment * (start + length * 0.5) + tl.load(v_weights + at, mask=live, other=0.0)
        for k in range(DIMS):
            of_channel = tl.load(v_blended + ray * DIMS + k)
            worth += of_channel * tl.load(features + at * DIMS + k, mask=live, other=0.0)
            tl.store(v_features + at * DIMS + k, tl.where(live, weight * of_channel, 0.0), mask=exists)
        share = tl.where(live, weight * worth, 0.0)
        v_sigma = length * (trans * tl.exp(-tau) * worth - (_before(share, lane) + behind))
        behind += tl.sum(share)
        tl.store(v_sigmas + at, tl.where(live & (raw >= 0) & (raw <= _TAU_MAX), v_sigma, 0.0), mask=exists)


@triton.jit
def _spread(weights, t_starts, t_ends, from_here, toward, place, count, lane, passed, away):
    """For the samples at `place`, counted from `from_here`: weight, length, distance to them of all weight passed before.

    The distance is carried along the ray: from one midpoint to the next it grows by that weight times the way. Also what `passed`
    and `away`, scalars, are behind these samples.
    """
    at, exists = from_here + toward * place, place < count
    weight = tl.load(weights + at, mask=exists, other=0.0)
    start, end = tl.load(t_starts + at, mask=exists, other=0.0), tl.load(t_ends + at, mask=exists, other=0.0)
    has_previous = exists & (place > 0)
    previous = tl.load(t_starts + at - toward, mask=has_previous, other=0.0)
    previous += tl.load(t_ends + at - toward, mask=has_previous, other=0.0)
    way = tl.where(has_previous, tl.abs((start + end) - previous) * 0.5, 0.0)
    grown = way * (_before(weight, lane) + passed)
    return weight, end - start, tl.cumsum(grown, 0) + away, passed + tl.sum(weight), away + tl.sum(grown)


@triton.jit
def _distortion_forward_kernel(weights, t_starts, t_ends, packed_info, loss, LANES: tl.constexpr):
    ray, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    begin = tl.load(packed_info + 2 * ray)
    count = tl.load(packed_info + 2 * ray + 1).to(tl.int32)
    total, passed, away = tl.zeros([LANES], tl.float32), 0.0, 0.0
    for first in range(0, count, LANES):
        weight, length, distance, passed, away = _spread(
            weights, t_starts, t_ends, begin, 1, first + lane, count, lane, passed, away
        )
        total += weight * (distance * 2.0 + weight * length * (1.0 / 3))
    tl.store(loss + ray, tl.sum(total))


@triton.jit
def _distortion_backward_kernel(weights, t_starts, t_ends, packed_info, v_loss, v_weights, LANES: tl.constexpr):
    ray, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    begin = tl.load(packed_info + 2 * ray)
    count = tl.load(packed_info + 2 * ray + 1).to(tl.int32)
    upstream = tl.load(v_loss + ray)
    passed, away = 0.0, 0.0
    for first in range(0, count, LANES):
        place = first + lane
        weight, length, distance, passed, away = _spread(
            weights, t_starts, t_ends, begin, 1, place, count, lane, passed, away
        )
        here = (distance + weight * length * (1.0 / 3)) * 2.0
        tl.store(v_weights + begin + place, here * upstream, mask=place < count)
    tl.debug_barrier()  # other lanes read these
    last = begin + count - 1
    passed, away = 0.0, 0.0
    for first in range(0, count, LANES):
        place = first + lane
        weight, length, distance, passed, away = _spread(
            weights, t_starts, t_ends, last, -1, place, count, lane, passed, away
        )
        here = tl.load(v_weights + last - place, mask=place < count, other=0.0)
        tl.store(v_weights + last - place, here + distance * 2.0 * upstream, mask=place < count)


class Rays(NamedTuple):
    """What was counted, to be filled in."""

    inputs: tuple[Tensor, ...]
    """Origins, directions, ranges, jitter, bits and box."""
    options: tuple[float, float, int]
    """Step, cone and the most samples of a ray."""


def march_count(
    origins: Tensor,
    dirs: Tensor,
    t_range: Tensor,
    jitter: Tensor,
    bits: Tensor,
    aabb: Tensor,
    step: float,
    cone: float,
    most: int,
    packed_info: Tensor,
) -> tuple[int, Rays]:
    """As `march_count` of the compiled kernels. Waits for the GPU: how many samples there are is how much room they take."""
    found = Rays((origins, dirs, t_range, jitter, bits, aabb), (step, cone, most))
    # Empty ones in place of the results: addresses are aligned alike, and so the kernel is the one that fills
    _march(found, packed_info, origins.new_empty(0), origins.new_empty(0), packed_info.new_empty(0), fill=0)
    counts = packed_info[:, 1]
    ends = counts.cumsum(0)
    packed_info[:, 0] = ends - counts
    return int(ends[-1]) if len(ends) else 0, found


def march_fill(found: Rays, packed_info: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor) -> None:
    """As `march_fill` of the compiled kernels, but the rays go through the grid once more: keeping what they find takes more room."""
    _march(found, packed_info, t_starts, t_ends, ray_indices, fill=1)


def _march(
    found: Rays, packed_info: Tensor, t_starts: Tensor, t_ends: Tensor, ray_indices: Tensor, *, fill: int
) -> None:
    rays, bits, cone = len(found.inputs[0]), found.inputs[4], found.options[1]
    tensors = (*found.inputs, packed_info, t_starts, t_ends, ray_indices)
    numbers = (rays, bits.shape[1], *found.options, fill)
    sizes = {"LEVELS": len(bits), "CONE": cone > 0, "LANES": LANES}
    launch(_march_kernel, (cdiv(rays, LANES),), *tensors, *numbers, **sizes, num_warps=1)


def composite_samples_forward(
    sigmas: Tensor,
    features: Tensor,
    t_starts: Tensor,
    t_ends: Tensor,
    packed_info: Tensor,
    light: Tensor,
    blended: Tensor,
    alpha: Tensor,
    moment: Tensor,
    median: Tensor,
    weights: Tensor,
) -> None:
    """As `composite_samples_forward` of the compiled kernels."""
    tensors = (sigmas, features, t_starts, t_ends, packed_info, light, blended, alpha, moment, median, weights)
    grid, dims = (len(packed_info),), features.shape[1]
    for start in range(0, max(dims, 1), GROUP):
        sizes = {"DIMS": min(dims - start, GROUP), "FIRST": start == 0, "LANES": LANES}
        launch(_composite_samples_forward_kernel, grid, *tensors, dims, start, **sizes, num_warps=1)


def composite_samples_backward(sigmas: Tensor, features: Tensor, *others: Tensor) -> None:
    """As `composite_samples_backward` of the compiled kernels.

    Args:
        others: t_starts, t_ends, packed_info, light; the gradients of blended features, alpha, moment and weights; and,
            written, those of sigmas and features.
    """
    sizes = {"DIMS": features.shape[1], "LANES": LANES}
    launch(_composite_samples_backward_kernel, (len(others[2]),), sigmas, features, *others, **sizes, num_warps=1)


def distortion_forward(weights: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor, loss: Tensor) -> None:
    """As `distortion_forward` of the compiled kernels."""
    tensors = (weights, t_starts, t_ends, packed_info, loss)
    launch(_distortion_forward_kernel, (len(packed_info),), *tensors, LANES=LANES, num_warps=1)


def distortion_backward(
    weights: Tensor, t_starts: Tensor, t_ends: Tensor, packed_info: Tensor, v_loss: Tensor, v_weights: Tensor
) -> None:
    """As `distortion_backward` of the compiled kernels."""
    tensors = (weights, t_starts, t_ends, packed_info, v_loss, v_weights)
    launch(_distortion_backward_kernel, (len(packed_info),), *tensors, LANES=LANES, num_warps=1)
