"""What the tile rasterizer asks of a primitive on a GPU; `ops/primitives.py` says the same in PyTorch, `csrc/primitives.h` in C++.

A kernel takes the functions that it needs as `tl.constexpr` arguments and knows nothing else of what it draws. `p` is a row of
screen parameters, a tuple whose first two are the centre; `dx`, `dy` are pixel minus centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from prismfield.render.ops.constants import ALPHA_MIN
from prismfield.render.ops.primitives import CONVEX_ROOMS

_LOG2E = tl.constexpr(1.0 / math.log(2.0))
_ALPHA_MIN, _NO_EDGE = tl.constexpr(ALPHA_MIN), tl.constexpr(-1e30)  # an exponent of 2 that adds nothing
_LOG_ALPHA_MIN, _LOG2_ALPHA_MIN = tl.constexpr(math.log(ALPHA_MIN)), tl.constexpr(math.log2(ALPHA_MIN))


@dataclass(frozen=True)
class Primitive:
    """Sizes, and `triton.jit` functions."""

    num_params: int
    """Length of `p`."""
    num_sums: int
    """How many sums over pixels the gradients of the parameters follow from."""
    alpha: Any
    """(p, dx, dy) -> alpha, not clamped, where it reaches ALPHA_MIN (NaN does not; alpha is garbage elsewhere), and a tuple of what
    the next two take over."""
    terms: Any
    """(p, dx, dy, alpha, v_alpha, taken) -> what a pixel adds to each of the sums; 0 where `v_alpha` and `alpha` are."""
    absolute_terms: Any
    """The same -> |dL/dx| and |dL/dy|."""
    finish: Any
    """(p, sums) -> gradients of the parameters."""
    row_span: Any
    """(p, y0, y1) -> leftmost and rightmost x that reach ALPHA_MIN between two heights; left > right if none, or NaN."""
    warps: int = 1
    """How many a tile it takes at least for compositing not to spill registers."""


@triton.jit
def load_params(params, at, mask, PARAMS: tl.constexpr):
    """Rows `at` of a matrix with PARAMS columns, a tuple of its columns."""
    p = ()
    for k in tl.static_range(PARAMS):
        p += (tl.load(params + PARAMS * at + k, mask=mask, other=0.0),)
    return p


@triton.jit
def _gaussian_alpha(p, dx, dy):
    """exp(log_opacity - (a dx^2 + c dy^2) / 2 - b dx dy) as a power of two."""
    xx, xy, yy, peak = (-0.5 * _LOG2E) * p[2], -_LOG2E * p[3], (-0.5 * _LOG2E) * p[4], _LOG2E * p[5]
    exponent = dx * (xx * dx + xy * dy) + (yy * dy * dy + peak)
    return tl.exp2(exponent), exponent >= _LOG2_ALPHA_MIN, ()


@triton.jit
def _gaussian_terms(p, dx, dy, alpha, v_alpha, taken):
    v = alpha * v_alpha
    vx, vy = v * dx, v * dy
    return v, vx, vy, vx * dx, vx * dy, vy * dy


@triton.jit
def _gaussian_absolute_terms(p, dx, dy, alpha, v_alpha, taken):
    v = alpha * v_alpha
    return tl.abs(v * (p[2] * dx + p[3] * dy)), tl.abs(v * (p[3] * dx + p[4] * dy))


@triton.jit
def _gaussian_finish(p, sums):
    v_x, v_y = p[2] * sums[1] + p[3] * sums[2], p[3] * sums[1] + p[4] * sums[2]
    return v_x, v_y, -0.5 * sums[3], -sums[4], -0.5 * sums[5], sums[0]


@triton.jit
def _gaussian_row_span(p, y0, y1):
    """Slightly enlarged against rounding. Each product with a sum after it is an `fma`, so that no compiler has a choice:
    the kernels that count intersections and that list them must round alike."""
    a, b, c = p[2], p[3], p[4]
    level = tl.fma(tl.maximum(2.0 * (p[5] - _LOG_ALPHA_MIN), 0.0), 1.0001, 1e-4)
    det, inv_a = tl.fma(a, c, -(b * b)), 1.0 / a
    half_height = tl.sqrt(level * a / det)
    peak = -b / c * tl.sqrt(level * c / det)  # the height at which the ellipse is widest to the right
    d0, d1 = tl.maximum(y0 - p[1], -half_height), tl.minimum(y1 - p[1], half_height)
    reached, slope, level_a = d0 <= d1, b * inv_a, level * a
    right_d, left_d = tl.minimum(tl.maximum(peak, d0), d1), tl.minimum(tl.maximum(-peak, d0), d1)
    right_root = tl.sqrt(tl.maximum(tl.fma(-det * right_d, right_d, level_a), 0.0))
    left_root = tl.sqrt(tl.maximum(tl.fma(-det * left_d, left_d, level_a), 0.0))
    right = tl.fma(inv_a, right_root, tl.fma(-slope, right_d, p[0]))
    left = tl.fma(-inv_a, left_root, tl.fma(-slope, left_d, p[0]))
    return tl.where(reached, left, float("inf")), tl.where(reached, right, float("-inf"))


@triton.jit
def _convex_corner(p, i: tl.constexpr):
    """Corner i, or i - R."""
    return p[2 + 2 * (i % ((len(p) - 5) // 2))], p[3 + 2 * (i % ((len(p) - 5) // 2))]


@triton.jit
def _convex_edges(p):
    """Of each edge its outward normal, 1 / length, and whether there is such an edge at all; zeros if not.

    Sums of products are `fma`s because row spans depend on them, see `_gaussian_row_span`.
    """
    edges = ()
    for i in tl.static_range((len(p) - 5) // 2):
        from_x, from_y = _convex_corner(p, i)
        to_x, to_y = _convex_corner(p, i + 1)
        x, y = to_x - from_x, to_y - from_y
        squared = tl.fma(x, x, y * y)
        exists = squared != 0  # or is NaN
        inverse = tl.where(exists, tl.rsqrt(squared), 0.0)
        edges += ((y * inverse, -x * inverse, inverse, exists),)
    return edges


@triton.jit
def _convex_alpha(p, dx, dy):
    """opacity / (1 + exp(sigma phi)), phi = log sum_j exp(delta L_j) with L_j the distance to edge j. All exponents are of 2.

    Takes over the edges, each one's exponential, 1 / their sum, phi, the mean of the exponents that they weight, and
    alpha / opacity.
    """
    edges, scale = _convex_edges(p), p[len(p) - 3] * _LOG2E
    exponents = ()
    for i in tl.static_range(len(edges)):
        x, y = _convex_corner(p, i)
        out_x, out_y = edges[i][0] * scale, edges[i][1] * scale
        out = tl.where(edges[i][3], -(out_x * x + out_y * y), _NO_EDGE)
        exponents += (out_x * dx + (out_y * dy + out),)
    highest = exponents[0]
    for i in tl.static_range(1, len(edges)):
        highest = tl.maximum(highest, exponents[i])
    weights, total, weighted = (), tl.zeros_like(dx), tl.zeros_like(dx)
    for i in tl.static_range(len(edges)):
        exponent = exponents[i] - highest
        weights += (tl.exp2(exponent),)
        total += weights[i]
        weighted += weights[i] * exponent
    phi, inverse = highest + tl.log2(total), 1.0 / total
    share = 1.0 / (1.0 + tl.exp2(tl.minimum(p[len(p) - 2] * phi, 126.0)))
    alpha = p[len(p) - 1] * share
    return alpha, alpha >= _ALPHA_MIN, (edges, weights, inverse, phi, highest + weighted * inverse, share)


@triton.jit
def _convex_terms(p, dx, dy, alpha, v_alpha, taken):
    """Of the opacity, sigma and delta, and of each edge: its share, and that by the position along it, 0 at its start and 1 at its
    end."""
    edges, weights, inverse, phi, mean, share = taken
    v_opacity = alpha * v_alpha
    v_phi = v_opacity * (1.0 - share)
    terms = (v_opacity, v_phi * phi, v_phi * mean)
    v_phi *= inverse
    for i in tl.static_range(len(edges)):
        from_x, from_y = _convex_corner(p, i)
        along_x, along_y = -edges[i][1] * edges[i][2], edges[i][0] * edges[i][2]
        v_edge = v_phi * weights[i]
        terms += (v_edge, v_edge * (along_x * dx + (along_y * dy - (along_x * from_x + along_y * from_y))))
    return terms


@triton.jit
def _convex_absolute_terms(p, dx, dy, alpha, v_alpha, taken):
    edges, weights, inverse, _, _, share = taken
    v_x, v_y = tl.zeros_like(dx), tl.zeros_like(dx)
    for i in tl.static_range(len(edges)):
        v_x += weights[i] * edges[i][0]
        v_y += weights[i] * edges[i][1]
    v_phi = alpha * v_alpha * (1.0 - share) * inverse * (p[len(p) - 2] * p[len(p) - 3])
    return tl.abs(v_phi * v_x), tl.abs(v_phi * v_y)


@triton.jit
def _convex_finish(p, sums):
    """An edge moves with its ends: L changes by minus its normal, times 1 - s for the first and s for the second where s is the
    position along the edge."""
    edges, delta, sigma = _convex_edges(p), p[len(p) - 3], p[len(p) - 2]
    scale, v_x, v_y, v_corners = sigma * delta, tl.zeros_like(delta), tl.zeros_like(delta), ()
    for i in tl.static_range(len(edges)):
        before = edges[(i + len(edges) - 1) % len(edges)]
        v_first = (sums[3 + 2 * i] - sums[4 + 2 * i]) * scale
        v_second = sums[4 + 2 * ((i + len(edges) - 1) % len(edges))] * scale
        v_corners += (edges[i][0] * v_first + before[0] * v_second, edges[i][1] * v_first + before[1] * v_second)
        v_x += v_corners[2 * i]
        v_y += v_corners[2 * i + 1]
    v_delta, v_sigma = sums[2] * (-sigma / (delta * _LOG2E)), sums[1] * (-1.0 / _LOG2E)
    return (v_x, v_y) + v_corners + (v_delta, v_sigma, sums[0] / p[len(p) - 1])


@triton.jit
def _convex_outline(p, edges):
    """Corners, relative to the centre, of the polygon with its edges moved outwards to where phi, if one edge alone gave it, takes
    alpha to ALPHA_MIN; slightly enlarged against rounding. And a number that is not finite if one of them is not."""
    level = tl.log(tl.maximum(tl.fma(p[len(p) - 1], 1.0 / _ALPHA_MIN, -1.0), 1.0))
    margin = tl.fma(level / (p[len(p) - 2] * p[len(p) - 3]), 1.0001, 1e-3)
    before_x, before_y = edges[0][0], edges[0][1]
    for i in tl.static_range(1, len(edges)):  # the last that there is
        before_x, before_y = tl.where(edges[i][3], edges[i][0], before_x), tl.where(edges[i][3], edges[i][1], before_y)
    corners, finite = (), margin * 0.0
    for i in tl.static_range(len(edges)):
        from_x, from_y = _convex_corner(p, i)
        normal_x, normal_y = edges[i][0], edges[i][1]
        shift = margin / tl.maximum(tl.fma(normal_x, before_x, tl.fma(normal_y, before_y, 1.0)), 1e-12)
        x, y = tl.fma(shift, normal_x + before_x, from_x), tl.fma(shift, normal_y + before_y, from_y)
        finite += tl.where(edges[i][3], (x + y) * 0.0, 0.0)
        if i > 0:
            x, y = tl.where(edges[i][3], x, corners[0]), tl.where(edges[i][3], y, corners[1])
        corners += (x, y)
        before_x, before_y = normal_x, normal_y
    return corners, finite


@triton.jit
def _convex_row_span(p, y0, y1):
    edges = _convex_edges(p)
    outline = _convex_outline(p, edges)
    corners = outline[0]
    wanted = (p[len(p) - 1] > _ALPHA_MIN) & (outline[1] == 0)
    top, bottom = y0 - p[1], y1 - p[1]
    left, right = tl.full(top.shape, float("inf"), tl.float32), tl.full(top.shape, float("-inf"), tl.float32)
    for i in tl.static_range(len(edges)):
        from_x, from_y = corners[2 * i], corners[2 * i + 1]
        to_x, to_y = corners[2 * ((i + 1) % len(edges))], corners[2 * ((i + 1) % len(edges)) + 1]
        low, high, low_x = tl.minimum(from_y, to_y), tl.maximum(from_y, to_y), tl.where(from_y <= to_y, from_x, to_x)
        slope = tl.where(high > low, (to_x - from_x) / (to_y - from_y), 0.0)
        first, last = tl.maximum(top, low), tl.minimum(bottom, high)
        a, b = tl.fma(slope, first - low, low_x), tl.fma(slope, last - low, low_x)
        crossed = wanted & edges[i][3] & (first <= last)
        left = tl.where(crossed, tl.minimum(left, tl.minimum(a, b)), left)
        right = tl.where(crossed, tl.maximum(right, tl.maximum(a, b)), right)
    return p[0] + left, p[0] + right


_GAUSSIAN = Primitive(
    num_params=6,  # x, y, a, b, c, log_opacity
    num_sums=6,
    alpha=_gaussian_alpha,
    terms=_gaussian_terms,
    absolute_terms=_gaussian_absolute_terms,
    finish=_gaussian_finish,
    row_span=_gaussian_row_span,
)


def _convex(room: int) -> Primitive:
    """A convex of up to `room` corners; its functions learn how many from the length of `p`."""
    return Primitive(
        num_params=2 * room + 5,  # x, y, corners, delta, sigma, opacity
        num_sums=2 * room + 3,
        alpha=_convex_alpha,
        terms=_convex_terms,
        absolute_terms=_convex_absolute_terms,
        finish=_convex_finish,
        row_span=_convex_row_span,
        warps=4,
    )


PRIMITIVES: dict[str, Primitive] = {"gaussian": _GAUSSIAN} | {f"convex{room}": _convex(room) for room in CONVEX_ROOMS}
"""A new primitive on a GPU is its functions and one entry here."""
