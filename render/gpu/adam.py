"""Adam on a GPU: one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch

BLOCK = 1024


@triton.jit
def _adam_kernel(
    param,
    grad,
    mean,
    square,
    rows,
    count,
    width,
    beta1,
    beta2,
    rest1,
    rest2,
    rate,
    root_scale,
    eps,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    changes = at < count
    if HAS_ROWS:
        changes &= tl.load(rows + at // width, mask=changes, other=0) != 0
    g = tl.load(grad + at, mask=changes, other=0.0)
    m = beta1 * tl.load(mean + at, mask=changes, other=0.0) + rest1 * g
    s = beta2 * tl.load(square + at, mask=changes, other=0.0) + rest2 * g * g
    p = tl.load(param + at, mask=changes, other=0.0)
    tl.store(param + at, p - rate * m / (tl.sqrt(s) * root_scale + eps), mask=changes)
    tl.store(mean + at, m, mask=changes)
    tl.store(square + at, s, mask=changes)


def adam_step(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    rows: Tensor,
    width: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """As `adam_step` of the compiled kernels: rows x width floats; where `rows` is not empty, only those that it marks."""
    rate, root_scale = lr / (1.0 - beta1**step), (1.0 - beta2**step) ** -0.5
    decay = (beta1, beta2, 1.0 - beta1, 1.0 - beta2)
    tensors = (param, grad, mean, square, rows)
    options = {"HAS_ROWS": rows.numel() > 0, "BLOCK": BLOCK}
    grid = (cdiv(param.numel(), BLOCK),)
    launch(_adam_kernel, grid, *tensors, param.numel(), width, *decay, rate, root_scale, eps, **options)
