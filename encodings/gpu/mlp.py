"""Small multilayer perceptrons on a GPU: a block of rows goes through all layers on the chip, forward and backward.

Activations and weights are divided into blocks of 32 columns, so that what one product needs fits into registers. Products are made
of float32 split into three parts of bfloat16 each (`bf16x6`), which keeps float32's precision on NVIDIA's and AMD's matrix units alike.

The backward pass repeats the forward one and writes what is behind each layer, and its gradient; from these, products over all
rows make the gradients of the weights. Each of their programs adds up every PROGRAMS-th block, and `torch.sum` what all have: no
atomics, the same in each run. Sums kept in the registers of the first kernel instead were tried: they do not fit beside the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch

BLOCK = 64
"""Rows that pass the layers together."""
ROWS = 2**17
"""That the backward pass takes at once: bounds the memory for what is behind each layer."""
PROGRAMS = 256
"""That share the rows where gradients of weights are summed."""
TILE, TILE_ROWS = 64, 32
"""Inputs and outputs of a layer whose weights a program takes then, and rows that it takes at once."""
MOST_PAIRS = 4
"""Of a layer's blocks of inputs and of outputs, as 64 times 64 or 32 times 128 has: more do not fit into the registers of sm_80
and sm_90. Such layers are a matter of plain matrix products, which PyTorch has."""
CHUNK = 32
"""Columns of the blocks that activations and weights are divided into: what one product needs fits into registers."""
_CHUNK = tl.constexpr(CHUNK)
# The interpreter, which computes in float32, knows no bf16x6.
_PRECISION = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")


@triton.constexpr_function
def _blocks(width):
    """How many blocks the columns of a layer `width` wide are divided into."""
    return -(-width // CHUNK)


@triton.constexpr_function
def _columns(width, k):
    """Of the k-th of them."""
    return 16 if width - CHUNK * k <= 16 else CHUNK


@triton.jit
def _load_block(first, at, count, k: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `at` of the k-th columns of a matrix, zeros behind its last column and its last row."""
    COLUMNS: tl.constexpr = _columns(WIDTH, k)
    column = tl.arange(0, COLUMNS)[None, :] + _CHUNK * k
    mask = (at[:, None] < count) & (column < WIDTH)
    return tl.load(first + at.to(tl.int64)[:, None] * WIDTH + column, mask=mask, other=0.0)


@triton.jit
def _store_block(first, block, at, count, k: tl.constexpr, WIDTH: tl.constexpr):
    COLUMNS: tl.constexpr = _columns(WIDTH, k)
    column = tl.arange(0, COLUMNS)[None, :] + _CHUNK * k
    mask = (at[:, None] < count) & (column < WIDTH)
    tl.store(first + at.to(tl.int64)[:, None] * WIDTH + column, block, mask=mask)


@triton.jit
def _load_rows(first, at, count, WIDTH: tl.constexpr):
    """Rows `at` of a matrix, a tuple of its columns' blocks."""
    blocks = ()
    for k in tl.static_range(_blocks(WIDTH)):
        blocks += (_load_block(first, at, count, k, WIDTH),)
    return blocks


@triton.jit
def _outputs(j: tl.constexpr, OUT: tl.constexpr):
    """Numbers of a layer's j-th outputs."""
    COLUMNS: tl.constexpr = _columns(OUT, j)
    return tl.arange(0, COLUMNS) + _CHUNK * j


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _layer(rows, weights, IN: tl.constexpr, OUT: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """Rows through a layer, both tuples of blocks of columns.

    Each block of inputs goes into all outputs at once: the other way round, all blocks' three parts would be kept in registers.
    """
    sums = ()
    for j in tl.static_range(_blocks(OUT)):
        sums += (_zeros(BLOCK, _columns(OUT, j)),)
    for k in tl.static_range(_blocks(IN)):
        more = ()
        for j in tl.static_range(_blocks(OUT)):
            matrix = _load_block(weights, _outputs(j, OUT), OUT, k, IN)
            more += (tl.dot(rows[k], tl.trans(matrix), sums[j], input_precision=_PRECISION),)
        sums = more
    results = ()
    for j in tl.static_range(_blocks(OUT)):
        results += (tl.where(sums[j] <= 0, 0.0, sums[j]) if RELU else sums[j],)  # NaN stays
    return results


@triton.jit
def _layer_vjp(v, weights, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of a layer's inputs from that of what it gives."""
    results = ()
    for k in tl.static_range(_blocks(IN)):
        results += (_zeros(BLOCK, _columns(IN, k)),)
    for j in tl.static_range(_blocks(OUT)):
        more = ()
        for k in tl.static_range(_blocks(IN)):
            matrix = _load_block(weights, _outputs(j, OUT), OUT, k, IN)
            more += (tl.dot(v[j], matrix, results[k], input_precision=_PRECISION),)
        results = more
    return results


@triton.jit
def _keep_positive(v, rows):
    kept = ()
    for k in tl.static_range(len(rows)):
        kept += (tl.where(rows[k] <= 0, 0.0, v[k]),)
    return kept


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); the latter, of 0 .. 1, as 2 atanh(e / (2 + e)), which stays exact near 0."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = ((((z * (2 / 11) + 2 / 9) * z + 2 / 7) * z + 2 / 5) * z + 2 / 3) * z + 2.0
    return tl.where(x < 0, 0.0, x) + s * series  # NaN stays


@triton.jit
def _activate(x, HEAD: tl.constexpr):
    if HEAD == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif HEAD == "sigmoid":
        x = _sigmoid(x)
    elif HEAD == "softplus":
        x = _softplus(x)
    return x


@triton.jit
def _activate_vjp(x, v, HEAD: tl.constexpr):
    """dL/dx from x and dL/d activate(x)."""
    if HEAD == "relu":
        v = tl.where(x <= 0, 0.0, v)
    elif HEAD == "sigmoid":
        v = v * _sigmoid(x) * _sigmoid(-x)
    elif HEAD == "softplus":
        v = v * _sigmoid(x)
    return v


@triton.jit
def _store_rows(first, rows, at, count, WIDTH: tl.constexpr):
    for k in tl.static_range(_blocks(WIDTH)):
        _store_block(first, rows[k], at, count, k, WIDTH)


@triton.jit
def _mlp_forward_kernel(
    x,
    weights,
    out,
    count,
    DIMS: tl.constexpr,
    STARTS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LAST: tl.constexpr = len(DIMS) - 1
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = _load_rows(x, at, count, DIMS[0])
    for layer in tl.static_range(LAST):
        rows = _layer(rows, weights + STARTS[layer], DIMS[layer], DIMS[layer + 1], layer < LAST - 1, BLOCK)
    for k in tl.static_range(_blocks(DIMS[LAST])):
        _store_block(out, _activate(rows[k], HEAD), at, count, k, DIMS[LAST])


@triton.jit
def _mlp_backward_kernel(
    x,
    weights,
    v_out,
    v_x,
    values,
    gradients,
    count,
    size,
    DIMS: tl.constexpr,
    STARTS: tl.constexpr,
    BEFORE: tl.constexpr,
    HEAD: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Behind each layer, `gradients` of the products and, but for the last one, `values`; and the gradient of the inputs.

    Those of layer l are [size, DIMS[l + 1]] from size * BEFORE[l] on.
    """
    LAST: tl.constexpr = len(DIMS) - 1
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = _load_rows(x, at, count, DIMS[0])
    for layer in tl.static_range(LAST):
        rows = _layer(rows, weights + STARTS[layer], DIMS[layer], DIMS[layer + 1], layer < LAST - 1, BLOCK)
        if layer < LAST - 1:
            _store_rows(values + size * BEFORE[layer], rows, at, count, DIMS[layer + 1])
    v = ()
    for k in tl.static_range(_blocks(DIMS[LAST])):
        v += (_activate_vjp(rows[k], _load_block(v_out, at, count, k, DIMS[LAST]), HEAD),)
    _store_rows(gradients + size * BEFORE[LAST - 1], v, at, count, DIMS[LAST])
    tl.debug_barrier()  # what the others of this program have written is read, not kept: registers are scarce
    for k in tl.static_range(1, LAST):  # through the layer LAST - k
        v = _layer_vjp(v, weights + STARTS[LAST - k], DIMS[LAST - k], DIMS[LAST - k + 1], BLOCK)
        v = _keep_positive(v, _load_rows(values + size * BEFORE[LAST - k - 1], at, count, DIMS[LAST - k]))
        _store_rows(gradients + size * BEFORE[LAST - k - 1], v, at, count, DIMS[LAST - k])
    if INPUT_GRADIENT:
        _store_rows(v_x, _layer_vjp(v, weights, DIMS[0], DIMS[1], BLOCK), at, count, DIMS[0])


@triton.jit
def _mlp_weights_kernel(rows, v, partial, count, inputs, outputs, total, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of v^T rows over every PROGRAMS-th block, of a tile of a layer's weights."""
    column, output = tl.program_id(2) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros([TILE, TILE], tl.float32)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = (first + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        a = tl.load(v + at * outputs + output[None, :], mask=(at < count) & (output[None, :] < outputs), other=0.0)
        b = tl.load(rows + at * inputs + column[None, :], mask=(at < count) & (column[None, :] < inputs), other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=_PRECISION)
    to = partial + tl.program_id(0).to(tl.int64) * total + output[:, None] * inputs + column[None, :]
    tl.store(to, sums, mask=(output[:, None] < outputs) & (column[None, :] < inputs))


def _options(dims: Sequence[int], head: str) -> dict[str, Any]:
    if head not in ("none", "relu", "sigmoid", "softplus"):
        raise ValueError(f"output: expected none, relu, sigmoid or softplus, got {head!r}")
    options = {"DIMS": tuple(dims), "STARTS": _starts(dims)[:-1], "HEAD": head, "BLOCK": BLOCK}
    return options | {
        "num_warps": 4 if max(dims) <= 64 else 8
    }  # rows of more columns do not fit into four warps' registers


_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
}
_HEAD_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "relu": lambda z: (z > 0).to(z.dtype),
    "sigmoid": lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    "softplus": torch.sigmoid,
}


def _matrices(weights: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """[out, in] of each layer, views."""
    sizes = [a * b for a, b in itertools.pairwise(dims)]
    return [w.view(b, a) for w, (a, b) in zip(weights.split(sizes), itertools.pairwise(dims), strict=True)]


def _wide_layers(x: Tensor, weights: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Values before each layer and behind the last one, before its head."""
    values = [x]
    *hidden, last = _matrices(weights, dims)
    for matrix in hidden:
        values.append(torch.relu(values[-1] @ matrix.mT))
    return [*values, values[-1] @ last.mT]


def _wide_backward(
    x: Tensor, weights: Tensor, dims: Sequence[int], head: str, v_out: Tensor, v_x: Tensor, v_weights: Tensor
) -> None:
    values = _wide_layers(x, weights, dims)
    layers = list(zip(values, _matrices(weights, dims), _matrices(v_weights, dims), strict=False))
    v = v_out * _HEAD_SLOPES[head](values[-1])
    for rows, matrix, v_matrix in reversed(layers):
        v_matrix.copy_(v.mT @ rows)
        if rows is not x:
            v = (v @ matrix) * (rows > 0)
        elif v_x.numel() > 0:
            v_x.copy_(v @ matrix)


def _starts(dims: Sequence[int]) -> tuple[int, ...]:
    """Of each layer's [out, in] in the flat weights, and their number."""
    return (0, *itertools.accumulate(a * b for a, b in itertools.pairwise(dims)))


def is_fused(dims: Sequence[int]) -> bool:
    """Whether our kernel takes layers of these widths."""
    return all(cdiv(a, CHUNK) * cdiv(b, CHUNK) <= MOST_PAIRS for a, b in itertools.pairwise(dims))


def mlp_forward(x: Tensor, weights: Tensor, dims: Sequence[int], head: str, out: Tensor) -> None:
    """As `mlp_forward` of the compiled kernels: `out` [S, dims[-1]] from what `mlp` takes."""
    if not is_fused(dims):
        out.copy_(_HEADS[head](_wide_layers(x, weights, dims)[-1]))
        return
    launch(_mlp_forward_kernel, (cdiv(len(x), BLOCK),), x, weights, out, len(x), **_options(dims, head))


def mlp_backward(
    x: Tensor, weights: Tensor, dims: Sequence[int], head: str, v_out: Tensor, v_x: Tensor, v_weights: Tensor
) -> None:
    """As `mlp_backward` of the compiled kernels: fills `v_weights`, and `v_x` if it is not empty. The same in each run."""
    if not is_fused(dims):
        _wide_backward(x, weights, dims, head, v_out, v_x, v_weights)
        return
    parts = cdiv(len(x), ROWS)
    before = (0, *itertools.accumulate(dims[1:]))
    size = min(len(x), ROWS)
    values, gradients = x.new_empty(size * before[-2]), x.new_empty(size * before[-1])
    programs = min(cdiv(size, TILE_ROWS), PROGRAMS)
    partial = x.new_zeros(parts * programs, len(weights))
    for part in range(parts):
        inputs = x[part * ROWS : (part + 1) * ROWS]
        count, sums = len(inputs), partial[part * programs : (part + 1) * programs]
        upstream, to_x = v_out[part * ROWS : (part + 1) * ROWS], v_x[part * ROWS : (part + 1) * ROWS]
        tensors = (inputs, weights, upstream, to_x, values, gradients)
        options = _options(dims, head) | {"BEFORE": before[:-1], "INPUT_GRADIENT": v_x.numel() > 0}
        launch(_mlp_backward_kernel, (cdiv(count, BLOCK),), *tensors, count, size, **options)
        for layer, (width, outputs) in enumerate(itertools.pairwise(dims)):
            rows = inputs if layer == 0 else values[size * before[layer - 1] :]
            tile = min(max(triton.next_power_of_2(max(width, outputs)), 16), TILE)
            grid = (programs, cdiv(outputs, tile), cdiv(width, tile))
            tensors = (rows, gradients[size * before[layer] :], sums[:, _starts(dims)[layer] :])
            sizes = (count, width, outputs, len(weights))
            launch(_mlp_weights_kernel, grid, *tensors, *sizes, TILE=tile, BLOCK=TILE_ROWS)
    torch.sum(partial, 0, out=v_weights)
