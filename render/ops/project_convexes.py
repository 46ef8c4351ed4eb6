"""Project smooth convexes to screen parameters and footprints: the hull of their points, as each camera sees them."""

import torch
from torch import Tensor

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel
from prismfield.render.ops.constants import ALPHA_MIN, NEAR
from prismfield.render.ops.primitives import CONVEX_ROOMS, PRIMITIVES
from prismfield.render.ops.project import Projection

MAX_EXTENT = 1e6
"""Convexes that reach further from the image's corner than this, in pixels, are not drawn."""
MIN_THICKNESS = 1e-6
"""Nor are hulls whose area is less than this share of their squared perimeter: rounding decides which way they face."""
MIN_POINTS, MAX_POINTS = 3, max(CONVEX_ROOMS)


def convex_primitive(points: int) -> str:
    """The primitive that draws convexes of so many points.

    Raises:
        ValueError: there is none for as few or as many.
    """
    if not MIN_POINTS <= points <= MAX_POINTS:
        raise ValueError(f"points: expected {MIN_POINTS} to {MAX_POINTS} a convex, got {points}")
    return f"convex{min(room for room in CONVEX_ROOMS if room >= points)}"


def project_convexes(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    size: tuple[int, int],
) -> Projection:
    """Screen-space hulls of convexes seen by each camera.

    3D Convex Splatting (arXiv:2411.14974), section 3.2. Departs from it in that distance scales `deltas` alone: L is in pixels,
    so delta L z / f stays what it is in the world, and a convex looks the same from everywhere; with sigma scaled as well, its
    border would sharpen with distance. Differentiable once in the kernel, twice in the reference, to `points`, `deltas`,
    `sigmas`, `opacities` and `viewmats`; not to `Ks`.

    Args:
        points: [N, K, 3] world units, K from 3 to 12, in any order; those inside the others' hull have no effect.
        deltas: [N] smoothness, per world unit, positive: how little the corners are rounded.
        sigmas: [N] sharpness, positive; at a straight border alpha falls over 1 / (sigma delta) world units.
        opacities: [N] in [0, 1].
        viewmats: [C, 4, 4] world to camera.
        Ks: [C, 3, 3] pixels; skew is ignored.
        size: (width, height) in pixels.

    Returns:
        `params` [C, N, 2 R + 5] for the primitive that `convex_primitive` names: the mean of the projected points, the hull's
        corners relative to it, delta per pixel, sigma and opacity; `depths` [C, N] mean camera z of the points; and `radii`
        [C, N, 2], half-width and half-height in pixels of a box outside which alpha < 1/255. A convex is drawn if all its points
        are in front of the camera, and is neither outside the image, too faint, flat as a line, nor not finite; if not, it has
        zeros everywhere and receives no gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shapes(
        points=(points, "N K 3"),
        deltas=(deltas, "N"),
        sigmas=(sigmas, "N"),
        opacities=(opacities, "N"),
        viewmats=(viewmats, "C 4 4"),
        Ks=(Ks, "C 3 3"),
    )
    convex_primitive(points.shape[1])
    check_alike(points=points, deltas=deltas, sigmas=sigmas, opacities=opacities, viewmats=viewmats, Ks=Ks)
    function = _project_convexes if use_kernel(points) else project_convexes_reference
    return function(points, deltas, sigmas, opacities, viewmats, Ks, size[0], size[1])


def hull_order(points: Tensor) -> tuple[Tensor, Tensor]:
    """Which of some points in the plane are corners of their convex hull, in order.

    Sorted along x, a point is a corner of the lower chain if it lies below every line between one on its left and one on its
    right; of the upper, if above. Exact but for the rounding of these products, and always a closed chain.

    Args:
        points: [..., K, 2].

    Returns:
        [..., K] indices: the lower chain from left to right, then the upper from right to left (counter-clockwise where y points
        up), then the first again; and [...] how many corners there are. Points that coincide or lie on a side are left out.
    """
    count = points.shape[-2]
    order = torch.argsort(points[..., 1], dim=-1, stable=True)
    order = order.gather(-1, torch.argsort(points[..., 0].gather(-1, order), dim=-1, stable=True))
    x, y = (points[..., axis].gather(-1, order) for axis in (0, 1))
    lower = torch.ones_like(order, dtype=torch.bool)
    upper = torch.ones_like(lower)
    for middle in range(1, count - 1):
        for left in range(middle):
            for right in range(middle + 1, count):
                turn = (x[..., right] - x[..., left]) * (y[..., middle] - y[..., left])
                turn = turn - (y[..., right] - y[..., left]) * (x[..., middle] - x[..., left])
                # Of points that coincide the first counts, but of those at the right end the last
                same = (x[..., middle] == x[..., right]) & (y[..., middle] == y[..., right]) & (right < count - 1)
                lower[..., middle] &= (turn < 0) | same
                upper[..., middle] &= (turn > 0) | same
    upper[..., 0] = upper[..., -1] = False  # ends belong to both chains and are counted once
    at = torch.arange(count, device=points.device)
    place = torch.where(lower, at, torch.where(upper, 2 * count - at, 3 * count))
    corners = (lower | upper).sum(-1)
    order = order.gather(-1, torch.argsort(place, -1))
    return torch.where(at < corners[..., None], order, order[..., :1]), corners


def project_convexes_reference(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
) -> Projection:
    """`project_convexes` in plain PyTorch: the specification."""
    name = convex_primitive(points.shape[1])
    primitive = PRIMITIVES[name]
    with torch.no_grad():
        screen, z = _to_screen(points, viewmats, Ks)
        params, corners = _params(screen, z, deltas, sigmas, opacities, Ks, primitive.num_params)
        outline = primitive.outline(params)  # type: ignore[attr-defined]
        radii = outline.abs().amax(-2)
        low = params[..., :2] + outline.amax(-2) > 0
        high = params[..., :2] + outline.amin(-2) < params.new_tensor([width, height])
        drawn = (z > NEAR).all(-1) & (corners >= 3) & (opacities > ALPHA_MIN) & (low & high).all(-1)
        # Phrased so that NaN fails
        drawn &= ((params[..., :2].abs() + radii) < MAX_EXTENT).all(-1) & torch.isfinite(params).all(-1)
        sides = params[..., 2:-3].unflatten(-1, (-1, 2))
        following = sides.roll(-1, -2)
        area = (sides[..., 0] * following[..., 1] - sides[..., 1] * following[..., 0]).sum(-1) / 2
        perimeter = (following - sides).norm(dim=-1).sum(-1)
        drawn &= area > MIN_THICKNESS * perimeter.square()
    # Once more, with harmless numbers where nothing is drawn: the zero gradient that these get would become NaN * 0.
    harmless = torch.arange(screen.shape[-2] * 2, dtype=points.dtype, device=points.device).view(-1, 2).square()
    screen, z = _to_screen(points, viewmats, Ks)
    screen = torch.where(drawn[..., None, None], screen, harmless)
    params, _ = _params(screen, z, deltas, sigmas, opacities, Ks, primitive.num_params)
    zero = torch.zeros_like(drawn, dtype=points.dtype)
    params = torch.where(drawn[..., None], params, zero[..., None])
    return params, torch.where(drawn, z.mean(-1), zero), torch.where(drawn[..., None], radii, zero[..., None])


def _to_screen(points: Tensor, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [C, N, K, 2] and camera z [C, N, K] of `points` [N, K, 3]."""
    placed = torch.einsum("cij,nkj->cnki", viewmats[:, :3, :3], points) + viewmats[:, None, None, :3, 3]
    z = placed[..., 2]
    safe_z = torch.where(z > NEAR, z, torch.ones_like(z))
    focal = torch.stack([Ks[:, 0, 0], Ks[:, 1, 1]], -1)[:, None, None]
    return focal * placed[..., :2] / safe_z[..., None] + Ks[:, None, None, :2, 2], z


def _params(
    screen: Tensor, z: Tensor, deltas: Tensor, sigmas: Tensor, opacities: Tensor, Ks: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Screen parameters [C, N, length] of projected points [C, N, K, 2], drawn or not, and how many corners they have, [C, N]."""
    center = screen.mean(-2)
    relative = screen - center[..., None, :]
    order, corners = hull_order(relative.detach())
    room = (length - 5) // 2
    order = torch.cat([order, order[..., :1].expand(*order.shape[:-1], room - order.shape[-1])], -1)
    hull = relative.gather(-2, order[..., None].expand(*order.shape, 2))
    focal = (Ks[:, 0, 0] * Ks[:, 1, 1]).sqrt()[:, None]
    per_pixel = deltas * z.mean(-1) / focal
    rest = torch.stack([per_pixel, *(t.expand_as(per_pixel) for t in (sigmas, opacities))], -1)
    return torch.cat([center, hull.flatten(-2), rest], -1), corners


@torch.library.custom_op("prismfield::project_convexes", mutates_args=())
def _project_convexes(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return project_convexes_reference(points, deltas, sigmas, opacities, viewmats, Ks, width, height)


def _outputs(points: Tensor, viewmats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (viewmats.shape[0], points.shape[0])
    length = PRIMITIVES[convex_primitive(points.shape[1])].num_params
    return points.new_empty(*shape, length), points.new_empty(shape), points.new_empty(*shape, 2)


@_project_convexes.register_fake
def _(points, deltas, sigmas, opacities, viewmats, Ks, width, height):
    return _outputs(points, viewmats)


@_project_convexes.register_kernel(DEVICES)
def _(points, deltas, sigmas, opacities, viewmats, Ks, width, height):
    outputs = _outputs(points, viewmats)
    inputs = [t.contiguous() for t in (points, deltas, sigmas, opacities, viewmats, Ks)]
    kernels_of(points).project_convexes_forward(*inputs, width, height, *outputs)
    return outputs


@torch.library.custom_op("prismfield::project_convexes_backward", mutates_args=(), device_types=DEVICES)
def _project_convexes_backward(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    radii: Tensor,
    v_params: Tensor,
    v_depths: Tensor,
    camera_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [t.contiguous() for t in (points, deltas, sigmas, opacities, viewmats, Ks)]
    grads = [torch.empty_like(t) for t in inputs[:4]] + [torch.zeros_like(viewmats)]
    upstream = (radii, v_params.contiguous(), v_depths.contiguous())
    kernels_of(points).project_convexes_backward(*inputs, width, height, *upstream, camera_gradient, *grads)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@_project_convexes_backward.register_fake
def _(points, deltas, sigmas, opacities, viewmats, *_):
    return tuple(torch.empty_like(t) for t in (points, deltas, sigmas, opacities, viewmats))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.size = inputs[6:]
    ctx.params_shape = output[0].shape
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, v_params, v_depths, _v_radii):
    *inputs, radii = ctx.saved_tensors
    v_params = radii.new_zeros(ctx.params_shape) if v_params is None else v_params
    v_depths = radii.new_zeros(radii.shape[:2]) if v_depths is None else v_depths
    grads = _project_convexes_backward(*inputs, *ctx.size, radii, v_params, v_depths, ctx.needs_input_grad[4])
    return *grads[:4], grads[4] if ctx.needs_input_grad[4] else None, None, None, None


_project_convexes.register_autograd(_backward, setup_context=_save)
