"""Blend sorted primitives into pixels, front to back. Knows no primitive: see `primitives.py` for what one supplies."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel
from prismfield.render.ops.bin import Isects, num_params
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN, TRANS_MIN
from prismfield.render.ops.primitives import PRIMITIVES

MAX_CHANNELS = 62
"""What one pass of a compiled kernel blends beside depth; more take several passes."""


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
        ValueError: a shape, dtype or device does not fit, the primitive is unknown, `isects` are not of these primitives, or
            there are more than MAX_CHANNELS with `absgrad`, whose absolute values cannot be added up in parts.
    """
    bound = check_shapes(
        params=(params, f"C N {num_params(primitive)}"), features=(features, "C N D"), depths=(depths, "C N")
    )
    if background is None:
        background = features.new_zeros(bound["C"], bound["D"])
    check_shapes(features=(features, "C N D"), background=(background, "C D"))
    check_alike(params=params, features=features, depths=depths, background=background)
    if absgrad is not None:
        check_shapes(params=(params, "C N P"), absgrad=(absgrad, "C N 2"))
    _check_isects(isects, bound["C"], bound["N"], size)
    if use_kernel(params):
        if isects.tile_size != kernels_of(params).tile_size:
            raise ValueError(f"isects: expected tiles of {kernels_of(params).tile_size} pixels, got {isects.tile_size}")
        if bound["D"] > MAX_CHANNELS:
            if absgrad is not None:
                raise ValueError(
                    f"absgrad: expected None with more than {MAX_CHANNELS} channels, of which there are {bound['D']}"
                )
            parts = zip(features.split(MAX_CHANNELS, -1), background.split(MAX_CHANNELS, -1), strict=True)
            first, *others = (
                composite(primitive, params, f, depths, isects, size, b, depth=depth, median_depth=median_depth)
                for f, b in parts
            )
            return replace(first, features=torch.cat([first.features, *(part.features for part in others)], -1))
        lists = (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts)
        options = (size[0], size[1], isects.tile_size, depth, median_depth)
        absgrad = params.new_zeros(0) if absgrad is None else absgrad
        out = _composite(primitive, params, features, depths, background, absgrad, *lists, *options)[:4]
    else:
        out = composite_reference(primitive, params, features, depths, background, isects, size, absgrad)
    return Composite(out[0], out[1], out[2] if depth else None, out[3] if median_depth else None)


def _check_isects(isects: Isects, cameras: int, count: int, size: tuple[int, int]) -> None:
    """Raise a ValueError where `isects` belong to another scene, image size or rasterizer: a kernel would read beyond its lists."""
    columns, rows = (-(-length // isects.tile_size) for length in size)
    expected = (cameras * rows * columns + 1, cameras * count + 1)
    got = (len(isects.tile_ranges), len(isects.row_starts))
    if got != expected:
        raise ValueError(
            f"isects: expected those of {cameras} cameras, {count} primitives and {size[0]}x{size[1]} pixels "
            f"({expected[0] - 1} tiles, {expected[1] - 1} rows), got {got[0] - 1} tiles, {got[1] - 1} rows"
        )


def composite_reference(
    primitive: str,
    params: Tensor,
    features: Tensor,
    depths: Tensor,
    background: Tensor,
    isects: Isects,
    size: tuple[int, int],
    absgrad: Tensor | None = None,
    smooth: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`composite` in plain PyTorch, tile by tile: the specification. Returns features, alpha, depth and median depth.

    `smooth` replaces the cutoffs by smooth ones, so that central differences converge; it exists for tests.
    """
    (cameras, dims), (width, height), tile_size = background.shape, size, isects.tile_size
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    offsets = torch.arange(tile_size * tile_size, device=params.device)
    absgrad = torch.zeros_like(params[..., :2]) if absgrad is None else absgrad
    flat = [t.flatten(0, 1) for t in (params, features, depths, absgrad)]
    bounds = isects.tile_ranges.tolist()
    tiles = []
    for tile in range(cameras * rows * columns):
        camera, row, column = tile // (rows * columns), tile // columns % rows, tile % columns
        px = (column * tile_size + offsets % tile_size).to(params.dtype) + 0.5
        py = (row * tile_size + offsets // tile_size).to(params.dtype) + 0.5
        members = isects.ids[bounds[tile] : bounds[tile + 1]].long()
        tile_params, tile_features, tile_depths, tile_absgrad = (t[members] for t in flat)
        centers = _PerPixel.apply(tile_params[:, :2], tile_absgrad, len(offsets))  # type: ignore[no-untyped-call]
        shapes = tile_params[:, None, 2:].expand(-1, len(offsets), -1)
        alphas = PRIMITIVES[primitive].alpha(torch.cat([centers, shapes], -1), px, py)
        weights, trans, reached = _blend(alphas, smooth)
        blended = weights.mT @ tile_features + trans[:, None] * background[camera]
        expected = (weights * tile_depths[:, None]).sum(0)
        median = (reached * tile_depths[:, None].detach()).sum(0)
        tiles.append(torch.cat([blended, (1 - trans)[:, None], expected[:, None], median[:, None]], -1))
    stacked = torch.stack(tiles).view(cameras, rows, columns, tile_size, tile_size, dims + 3)
    image = stacked.transpose(2, 3).reshape(cameras, rows * tile_size, columns * tile_size, dims + 3)
    features, alpha, depth, median = image[:, :height, :width].split([dims, 1, 1, 1], -1)
    return features, alpha.squeeze(-1), depth.squeeze(-1), median.squeeze(-1).detach()


class _PerPixel(torch.autograd.Function):
    """Centres [M, 2] repeated for each pixel; the second argument's gradient is the sum of the absolute ones."""

    @staticmethod
    def forward(ctx, centers: Tensor, absgrad: Tensor, pixels: int) -> Tensor:
        return centers[:, None].expand(-1, pixels, -1).clone()

    @staticmethod
    def backward(ctx, v_centers: Tensor) -> tuple[Tensor, Tensor, None]:
        return v_centers.sum(1), v_centers.abs().sum(1), None


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


@torch.library.custom_op("prismfield::composite", mutates_args=(), device_types=DEVICES)
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
    kernels_of(params).composite_forward(primitive, *inputs, ids, tile_ranges, width, height, *outputs)
    return outputs


def _outputs(
    params: Tensor,
    background: Tensor,
    ids: Tensor,
    tile_ranges: Tensor,
    width: int,
    height: int,
    tile_size: int,
    depth: bool,
    median_depth: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
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


@torch.library.custom_op("prismfield::composite_backward", mutates_args=(), device_types=DEVICES)
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
    grads = [torch.empty_like(t) for t in (*inputs, absgrad)]
    lists = (ids, rows, tile_ranges, row_starts)
    kernels_of(params).composite_backward(
        primitive, *inputs, *lists, width, height, trans, stops, masks, *upstream, *grads
    )
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@_composite_backward.register_fake
def _(primitive, params, features, depths, background, absgrad, *_):
    return tuple(torch.empty_like(t) for t in (params, features, depths, background, absgrad))


def _save(ctx, inputs, output):
    ctx.primitive, tensors, ctx.options = inputs[0], inputs[1:10], inputs[10:13]
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.mark_non_differentiable(*output[3:])
    ctx.depth_shape = output[2].shape
    ctx.set_materialize_grads(False)  # else zeros are made for all outputs, the lists of intersections too


def _backward(ctx, v_features, v_alpha, v_depth, *_):
    *tensors, trans, stops, masks = ctx.saved_tensors
    params, background, shape = tensors[0], tensors[3], (len(tensors[3]), ctx.options[1], ctx.options[0])
    v_features = params.new_zeros(*shape, background.shape[1]) if v_features is None else v_features
    v_alpha = params.new_zeros(shape) if v_alpha is None else v_alpha
    v_depth = params.new_zeros(ctx.depth_shape) if v_depth is None else v_depth
    saved = (*tensors, *ctx.options, trans, stops, masks)
    grads = _composite_backward(ctx.primitive, *saved, v_features, v_alpha, v_depth)
    return None, *grads, *(None,) * 9


_composite.register_autograd(_backward, setup_context=_save)
