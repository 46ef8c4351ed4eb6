"""The photometric loss (1 - w) L1 + w (1 - SSIM) and its gradient image on a GPU; the formulas are those of `csrc/ssim.cpp`.

The window is separable, and a program goes down a strip of columns: it blurs one row after the other along x and adds the result
to the eleven rows that it reaches, ten of which wait in registers, so that a row of blurred numbers is complete when the last
row that it needs has been read. Two such passes: the first reads both images and writes three derivatives of SSIM, the second
blurs those and writes the gradient. Channels are interleaved, as they come: a pixel k away is k * CHANNELS numbers away.

Eleven floats a value are read or written, those that are blurred ROWS + 10 rows for each ROWS, if the neighbours along x come from
the cache; against some 450 instructions a value. On paper both take about as long. Each program writes its sums, and one program
adds them up, always in the same order.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.ops.ssim import _C1 as C1
from prismfield.render.ops.ssim import _C2 as C2
from prismfield.render.ops.ssim import _RADIUS as RADIUS
from prismfield.render.ops.ssim import _SIGMA as SIGMA

BLOCK, ROWS = 128, 32
"""What a program computes: numbers along x, and rows."""
SUM_BLOCK = 512
_GAUSSIAN = [math.exp(-((k - RADIUS) ** 2) / (2 * SIGMA**2)) for k in range(2 * RADIUS + 1)]
_WINDOW = tl.constexpr(tuple(weight / sum(_GAUSSIAN) for weight in _GAUSSIAN))
_RADIUS, _TAPS = tl.constexpr(RADIUS), tl.constexpr(2 * RADIUS + 1)
_C1, _C2 = tl.constexpr(C1), tl.constexpr(C2)


@triton.jit
def _read(rgb, target, mask, row, width, column, x, inside, CHANNELS: tl.constexpr, MASKED: tl.constexpr):
    """Both images at the numbers `x` of a row, which belong to the pixels `column`, and where these count; elsewhere both are 0.

    `row` is counted from the first one of the batch.
    """
    counted = inside
    if MASKED:
        counted &= tl.load(mask + row * width + column, mask=inside, other=0) != 0
    first = row * width * CHANNELS
    a = tl.load(rgb + first + x, mask=counted, other=0.0)
    b = tl.load(target + first + x, mask=counted, other=0).to(tl.float32)
    if target.dtype.element_ty == tl.uint8:
        b *= 1.0 / 255.0
    return a, b, counted


@triton.jit
def _zeros(count: tl.constexpr, BLOCK: tl.constexpr):
    rows = (tl.zeros([BLOCK], tl.float32),)
    for _ in tl.static_range(1, count):
        rows += (tl.zeros([BLOCK], tl.float32),)
    return rows


@triton.jit
def _push(waiting, row):
    """Weighs a row into those that wait for it. The first of them is then complete; also returns those that wait for the next."""
    done = waiting[0] + _WINDOW[_TAPS - 1] * row
    rest = (waiting[1] + _WINDOW[_TAPS - 2] * row,)
    for k in tl.static_range(2, _TAPS - 1):
        rest += (waiting[k] + _WINDOW[_TAPS - 1 - k] * row,)
    rest += (_WINDOW[0] * row,)
    return done, rest


@triton.jit
def _similarity(S, D, SS, DD):
    """SSIM from the blurred s = a + b - 1, d = a - b, s^2 and d^2, and what its derivative needs.

    With the variances P of s and Q of d, it is (1 - D^2 / B1) (1 - Q / B2) where B1 = ((S + 1)^2 + D^2) / 2 + C1 and
    B2 = (P + Q) / 2 + C2: nothing cancels where the images are alike.
    """
    M, P, Q = S + 1.0, tl.maximum(SS - S * S, 0.0), tl.maximum(DD - D * D, 0.0)
    B1, B2 = 0.5 * (M * M + D * D) + _C1, 0.5 * (P + Q) + _C2
    return (1.0 - D * D / B1) * (1.0 - Q / B2), (S, D, M, Q, 1.0 / B1, 1.0 / B2)


@triton.jit
def _similarity_vjp(kept):
    """Derivatives of SSIM to S and D together, which s and d change alike through a, to the blurred s^2, and to the blurred d^2."""
    S, D, M, Q, inverse1, inverse2 = kept
    luminance, structure = 1.0 - D * D * inverse1, 1.0 - Q * inverse2
    v_ss = 0.5 * luminance * Q * inverse2 * inverse2
    v_dd = v_ss - luminance * inverse2
    v_means = structure * D * inverse1 * (D * inverse1 * (M + D) - 2.0) - 2.0 * (S * v_ss + D * v_dd)
    return v_means, v_ss, v_dd


@triton.jit
def _similarity_kernel(
    rgb,
    target,
    mask,
    maps,
    sums,
    size,
    height,
    width,
    CHANNELS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, top = tl.program_id(2).to(tl.int64), tl.program_id(1) * ROWS
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, within = x // CHANNELS, x < width * CHANNELS
    of_s, of_d, of_ss, of_dd = (
        _zeros(_TAPS - 1, BLOCK),
        _zeros(_TAPS - 1, BLOCK),
        _zeros(_TAPS - 1, BLOCK),
        _zeros(_TAPS - 1, BLOCK),
    )
    l1, ssim, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for y in range(top - _RADIUS, tl.minimum(top + ROWS, height) + _RADIUS):
        row = image * height + y
        S, D, SS, DD = _zeros(4, BLOCK)
        for k in tl.static_range(_TAPS):
            at = column + (k - _RADIUS)
            inside = (y >= 0) & (y < height) & (at >= 0) & (at < width)
            shifted = x + (k - _RADIUS) * CHANNELS
            a, b, _ = _read(rgb, target, mask, row, width, at, shifted, inside, CHANNELS, MASKED)
            s, d = a + b - 1.0, a - b
            S += _WINDOW[k] * s
            D += _WINDOW[k] * d
            SS += _WINDOW[k] * s * s
            DD += _WINDOW[k] * d * d
        S, of_s = _push(of_s, S)
        D, of_d = _push(of_d, D)
        SS, of_ss = _push(of_ss, SS)
        DD, of_dd = _push(of_dd, DD)
        if y >= top + _RADIUS:
            done = row - _RADIUS
            a, b, counted = _read(rgb, target, mask, done, width, column, x, within, CHANNELS, MASKED)
            similarity, kept = _similarity(S, D, SS, DD)
            v_means, v_ss, v_dd = _similarity_vjp(kept)
            l1 += tl.abs(a - b)
            ssim += tl.where(counted, similarity, 0.0)
            count += tl.where(counted, 1.0, 0.0)
            to = maps + done * width * CHANNELS + x
            tl.store(to, tl.where(counted, v_means, 0.0), mask=within)
            tl.store(to + size, tl.where(counted, v_ss, 0.0), mask=within)
            tl.store(to + size + size, tl.where(counted, v_dd, 0.0), mask=within)
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program, tl.sum(l1))
    tl.store(sums + programs + program, tl.sum(ssim))
    tl.store(sums + 2 * programs + program, tl.sum(count))


@triton.jit
def _total_kernel(sums, values, scales, programs, ssim_weight, SUM_BLOCK: tl.constexpr):
    """The loss, L1 and SSIM from the sums of all programs; and what one value weighs in the loss, by either."""
    zero = tl.zeros([SUM_BLOCK], tl.float64)
    l1, ssim, count = zero, zero, zero
    for first in range(0, programs, SUM_BLOCK):
        at = first + tl.arange(0, SUM_BLOCK)
        l1 += tl.load(sums + at, mask=at < programs, other=0.0)
        ssim += tl.load(sums + programs + at, mask=at < programs, other=0.0)
        count += tl.load(sums + 2 * programs + at, mask=at < programs, other=0.0)
    total = tl.sum(count)
    scale = tl.where(total > 0, 1.0 / tl.maximum(total, 1.0), 0.0)
    mean_l1, mean_ssim = tl.sum(l1) * scale, tl.where(total > 0, tl.sum(ssim) * scale, 1.0)
    tl.store(values, (1.0 - ssim_weight) * mean_l1 + ssim_weight * (1.0 - mean_ssim))
    tl.store(values + 1, mean_l1)
    tl.store(values + 2, mean_ssim)
    tl.store(scales, (1.0 - ssim_weight) * scale)
    tl.store(scales + 1, ssim_weight * scale)


@triton.jit
def _gradient_kernel(
    rgb,
    target,
    mask,
    maps,
    scales,
    gradient,
    size,
    height,
    width,
    CHANNELS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, top = tl.program_id(2).to(tl.int64), tl.program_id(1) * ROWS
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column, within = x // CHANNELS, x < width * CHANNELS
    l1_scale, ssim_scale = tl.load(scales), tl.load(scales + 1)
    of_means, of_ss, of_dd = _zeros(_TAPS - 1, BLOCK), _zeros(_TAPS - 1, BLOCK), _zeros(_TAPS - 1, BLOCK)
    for y in range(top - _RADIUS, tl.minimum(top + ROWS, height) + _RADIUS):
        row = image * height + y
        v_means, v_ss, v_dd = _zeros(3, BLOCK)
        for k in tl.static_range(_TAPS):
            at = column + (k - _RADIUS)
            inside = (y >= 0) & (y < height) & (at >= 0) & (at < width)
            read = maps + row * width * CHANNELS + x + (k - _RADIUS) * CHANNELS
            v_means += _WINDOW[k] * tl.load(read, mask=inside, other=0.0)
            v_ss += _WINDOW[k] * tl.load(read + size, mask=inside, other=0.0)
            v_dd += _WINDOW[k] * tl.load(read + size + size, mask=inside, other=0.0)
        v_means, of_means = _push(of_means, v_means)
        v_ss, of_ss = _push(of_ss, v_ss)
        v_dd, of_dd = _push(of_dd, v_dd)
        if y >= top + _RADIUS:
            done = row - _RADIUS
            a, b, counted = _read(rgb, target, mask, done, width, column, x, within, CHANNELS, MASKED)
            s, d = a + b - 1.0, a - b
            sign = tl.where(d > 0, 1.0, 0.0) - tl.where(d < 0, 1.0, 0.0)
            v = l1_scale * sign - ssim_scale * (v_means + 2.0 * (s * v_ss + d * v_dd))
            tl.store(gradient + done * width * CHANNELS + x, tl.where(counted, v, 0.0), mask=within)


def photometric_loss(
    rgb: Tensor,
    target_floats: Tensor,
    target_bytes: Tensor,
    mask: Tensor,
    ssim_weight: float,
    values: Tensor,
    gradient: Tensor,
) -> None:
    """As `photometric_loss` of the compiled kernels: one of the two targets is empty, and so is a `mask` where all counts."""
    images, height, width, channels = rgb.shape
    grid = (cdiv(width * channels, BLOCK), cdiv(height, ROWS), images)
    programs = grid[0] * grid[1] * grid[2]
    maps, sums, scales = rgb.new_empty(3, rgb.numel()), rgb.new_empty(3, programs), rgb.new_empty(2)
    inputs = (rgb, target_bytes if target_bytes.numel() > 0 else target_floats, mask)
    sizes = (rgb.numel(), height, width)
    options = {"CHANNELS": channels, "MASKED": mask.numel() > 0, "BLOCK": BLOCK, "ROWS": ROWS}
    launch(_similarity_kernel, grid, *inputs, maps, sums, *sizes, **options)
    launch(_total_kernel, (1,), sums, values, scales, programs, ssim_weight, SUM_BLOCK=SUM_BLOCK)
    launch(_gradient_kernel, grid, *inputs, maps, scales, gradient, *sizes, **options)
