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

_LOG2E = tl.constexpr(1.0 / math.log(2.0))
_LOG_ALPHA_MIN, _LOG2_ALPHA_MIN = tl.constexpr(math.log(ALPHA_MIN)), tl.constexpr(math.log2(ALPHA_MIN))


@dataclass(frozen=True)
class Primitive:
    """Sizes, and `triton.jit` functions."""

    num_params: int
    """Length of `p`."""
    num_sums: int
    """How many sums over pixels the gradients of the parameters follow from."""
    alpha: Any
    """(p, dx, dy) -> alpha, not clamped, and where it reaches ALPHA_MIN; NaN does not. Alpha is garbage elsewhere."""
    terms: Any
    """(p, dx, dy, alpha, v_alpha) -> what a pixel adds to each of the sums; 0 where `v_alpha` and `alpha` are."""
    absolute_terms: Any
    """The same -> |dL/dx| and |dL/dy|."""
    finish: Any
    """(p, sums) -> gradients of the parameters."""
    row_span: Any
    """(p, y0, y1) -> leftmost and rightmost x that reach ALPHA_MIN between two heights; left > right if none, or NaN."""


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
    return tl.exp2(exponent), exponent >= _LOG2_ALPHA_MIN


@triton.jit
def _gaussian_terms(p, dx, dy, alpha, v_alpha):
    v = alpha * v_alpha
    vx, vy = v * dx, v * dy
    return v, vx, vy, vx * dx, vx * dy, vy * dy


@triton.jit
def _gaussian_absolute_terms(p, dx, dy, alpha, v_alpha):
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


PRIMITIVES: dict[str, Primitive] = {
    "gaussian": Primitive(
        num_params=6,  # x, y, a, b, c, log_opacity
        num_sums=6,
        alpha=_gaussian_alpha,
        terms=_gaussian_terms,
        absolute_terms=_gaussian_absolute_terms,
        finish=_gaussian_finish,
        row_span=_gaussian_row_span,
    )
}
"""A new primitive on a GPU is its functions and one entry here."""
