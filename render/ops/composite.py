"""Blend sorted primitives into pixels, front to back. Knows no primitive: see `primitives.py` for what one supplies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prismfield.render.checks import check_shapes
from prismfield.render.kernels import kernels, use_kernel
from prismfield.render.ops.bin import Isects, num_params
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN, TRANS_MIN
from prismfield.render.ops.primitives import PRIMITIVES


@dataclass
class Composite:
    """What `composite` blends, for C cameras of H x W pixels."""

    features: Tensor
    """[C, H, W, D], background included."""
    alpha: Tensor
    """[C, H, W], 1 - transmittance."""
    depth: Tensor | None
    """[C, H, W], sum of weight * camera z, not divided by alpha; None unless asked for."""
    median_depth: Tensor | None
    """[C, H, W], camera z where transmittance falls to one half or below, 0 where it does not; None unless asked for."""


def composite(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    isects: Isects,
    size: tuple[int, int],
    background: Tensor | None = None,
    *,
    depth: bool = False,
    median_depth: bool = False,
    absgrad: Tensor | None = None,
) -> Composite:
    """Alpha-blend primitives over the pixels of each tile.

    3D Gaussian Splatting (arXiv:2308.04079), eq. 3: weight_i = alpha_i prod_{j<i} (1 - alpha_j), with alpha clamped to ALPHA_MAX,
    dropped below ALPHA_MIN, and a pixel finished before transmittance would fall to TRANS_MIN. Differentiable once in the
    kernel, twice in the reference, to `params`, `features`, `depths` (through `depth` alone) and `background`.

    Args:
        primitive: a name in `PRIMITIVES`.
        params: [C, N, P] screen parameters.
        features: [C, N, D], any number of channels.
        depths: [C, N] camera z.
        isects: from `bin_primitives` of the same primitives.
        size: (width, height) in pixels.
        background: [C, D], black if None.
        depth: blend camera z too.
        median_depth: also return the depth at half transmittance, which carries no gradient.
        absgrad: [C, N, 2] zeros whose gradient becomes sum over pixels of |dL/d(x, y)| of each primitive (AbsGS, arXiv:2404.10484).

    Raises:
        ValueError: a shape does not fit or the primitive is unknown.
    """
    bound = check_shapes(
        params=(params, f"C N {num_params(primitive)}"), features=(features, "C N D"), depths=(depths, "C N")
    )
    if background is None:
        background = features.new_zeros(bound["C"], bound["D"])
    check_shapes(features=(features, "C N D"), background=(background, "C D"))
    lists = (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts)
    options = (size[0], size[1], isects.tile_size, depth, median_depth)
    if use_kernel(params):
        absgrad = params.new_zeros(0) if absgrad is None else absgrad
        out = _composite(primitive, params, features, depths, background, absgrad, *lists, *options)[:4]
    else:
        out = composite_reference(primitive, params, features, depths, background, lists[0], lists[2], *options)
    return Composite(out[0], out[1], out[2] if depth else None, out[3] if median_depth else None)


def composite_reference(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    ids: Tensor,
    tile_ranges: Tensor,
    width: int,
    height: int,
    tile_size: int,
    depth: bool,
    median_depth: bool,
    smooth: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`composite` in plain PyTorch, tile by tile: the specification.

    `smooth` replaces the cutoffs by smooth ones, so that central differences converge; it exists for tests.
    """
    cameras, dims = background.shape
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    offsets = torch.arange(tile_size * tile_size, device=params.device)
    flat = [params.flatten(0, 1), features.flatten(0, 1), depths.flatten(0, 1)]
    bounds = tile_ranges.tolist()
    tiles = []
    for tile in range(cameras * rows * columns):
        camera, row, column = tile // (rows * columns), tile // columns % rows, tile % columns
        px = (column * tile_size + offsets % tile_size).to(params.dtype) + 0.5
        py = (row * tile_size + offsets // tile_size).to(params.dtype) + 0.5
        members = ids[bounds[tile] : bounds[tile + 1]].long()
        tile_params, tile_features, tile_depths = (t[members] for t in flat)
        alphas = PRIMITIVES[primitive].alpha(tile_params[:, None], px, py)
        weights, trans, reached = _blend(alphas, smooth)
        blended = weights.mT @ tile_features + trans[:, None] * background[camera]
        expected = (weights * tile_depths[:, None]).sum(0)
        median = (reached * tile_depths[:, None].detach()).sum(0)
        tiles.append(torch.cat([blended, (1 - trans)[:, None], expected[:, None], median[:, None]], -1))
    stacked = torch.stack(tiles).view(cameras, rows, columns, tile_size, tile_size, dims + 3)
    image = stacked.transpose(2, 3).reshape(cameras, rows * tile_size, columns * tile_size, dims + 3)[
        :, :height, :width
    ]
    nothing = params.new_zeros(0)
    return (
        image[..., :dims],
        image[..., dims],
        image[..., dims + 1] if depth else nothing,
        image[..., dims + 2].detach() if median_depth else nothing,
    )


def _blend(alphas: Tensor, smooth: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [M, pixels], final transmittance [pixels] and which primitive takes it to one half [M, pixels]."""
    if smooth:
        ramp = ((alphas - 0.5 * ALPHA_MIN) / ALPHA_MIN).clamp(0, 1)
        alphas = ALPHA_MAX * torch.tanh(alphas / ALPHA_MAX) * ramp * ramp * (3 - 2 * ramp)
    else:
        alphas = torch.where(alphas >= ALPHA_MIN, alphas.clamp(max=ALPHA_MAX), torch.zeros_like(alphas))
        live = torch.cumprod(1 - alphas.detach(), 0) > TRANS_MIN
        alphas = torch.where(live, alphas, torch.zeros_like(alphas))
    after = torch.cumprod(1 - alphas, 0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])[: len(after)]
    trans = after[-1] if len(after) else torch.ones_like(alphas.sum(0))
    return alphas * before, trans, (before > 0.5) & (after <= 0.5)


@torch.library.custom_op("prismfield::composite", mutates_args=(), device_types="cpu")
def _composite(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    absgrad: Tensor,
    ids: Tensor,
    rows: Tensor,
    tile_ranges: Tensor,
    row_starts: Tensor,
    width: int,
    height: int,
    tile_size: int,
    depth: bool,
    median_depth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = _outputs(params, background, ids, tile_ranges, width, height, tile_size, depth, median_depth)
    inputs = [t.contiguous() for t in (params, features, depths, background)]
    kernels.composite_forward(primitive, *inputs, ids, tile_ranges, width, height, *outputs)
    return outputs


def _outputs(params, background, ids, tile_ranges, width, height, tile_size, depth, median_depth):
    """Empty features, alpha, depth, median depth; final transmittance and where each pixel stopped, by tile; which pixel
    blocks each intersection reached, as bit masks."""
    shape = (background.shape[0], height, width)
    per_tile = (tile_ranges.shape[0] - 1, tile_size * tile_size)
    return (
        params.new_empty(*shape, background.shape[1]),
        params.new_empty(shape),
        params.new_empty(shape if depth else 0),
        params.new_empty(shape if median_depth else 0),
        params.new_empty(per_tile),
        params.new_empty(per_tile, dtype=torch.int32),
        params.new_empty(ids.shape[0], dtype=torch.int64),
    )


@_composite.register_fake
def _(primitive, params, features, depths, background, absgrad, ids, rows, tile_ranges, row_starts, *options):
    return _outputs(params, background, ids, tile_ranges, *options)


@torch.library.custom_op("prismfield::composite_backward", mutates_args=(), device_types="cpu")
def _composite_backward(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    absgrad: Tensor,
    ids: Tensor,
    rows: Tensor,
    tile_ranges: Tensor,
    row_starts: Tensor,
    width: int,
    height: int,
    tile_size: int,
    trans: Tensor,
    stops: Tensor,
    masks: Tensor,
    v_features: Tensor,
    v_alpha: Tensor,
    v_depth: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [t.contiguous() for t in (params, features, depths, background)]
    upstream = [t.contiguous() for t in (v_features, v_alpha, v_depth)]
    grads = tuple(torch.empty_like(t) for t in (*inputs, absgrad))
    lists = (ids, rows, tile_ranges, row_starts)
    kernels.composite_backward(primitive, *inputs, *lists, width, height, trans, stops, masks, *upstream, *grads)
    return grads


@_composite_backward.register_fake
def _(primitive, params, features, depths, background, absgrad, *_):
    return tuple(torch.empty_like(t) for t in (params, features, depths, background, absgrad))


def _save(ctx, inputs, output):
    ctx.primitive, tensors, ctx.options = inputs[0], inputs[1:10], inputs[10:13]
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, v_features, v_alpha, v_depth, *_):
    *tensors, trans, stops, masks = ctx.saved_tensors
    saved = (*tensors, *ctx.options, trans, stops, masks)
    grads = _composite_backward(ctx.primitive, *saved, v_features, v_alpha, v_depth)
    return None, *grads, *(None,) * 9


_composite.register_autograd(_backward, setup_context=_save)
