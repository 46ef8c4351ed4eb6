"""Project 3D Gaussians to screen parameters and footprints (EWA splatting)."""

import math

import torch
from torch import Tensor

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel
from prismfield.render.ops.constants import ALPHA_MIN, BLUR, NEAR, VIEW_MARGIN

Projection = tuple[Tensor, Tensor, Tensor]
MAX_EXTENT = 1e18
"""Gaussians whose variance in square pixels or whose distance from the image in pixels reaches this are not drawn."""


def project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    size: tuple[int, int],
    *,
    antialiased: bool = False,
) -> Projection:
    """Screen-space Gaussians seen by each camera.

    EWA splatting (Zwicker et al. 2001, eq. 31) as in 3D Gaussian Splatting (arXiv:2308.04079), eq. 5, with the footprint cut
    where alpha falls below 1/255 instead of at three sigma. Differentiable once in the kernel, twice in the reference, to
    `means`, `quats`, `scales`, `opacities` and `viewmats`; not to `Ks`.

    Args:
        means: [N, 3] world units.
        quats: [N, 4] wxyz, normalised here.
        scales: [N, 3] standard deviations, world units.
        opacities: [N] in [0, 1].
        viewmats: [C, 4, 4] world to camera.
        Ks: [C, 3, 3] pixels; skew is ignored.
        size: (width, height) in pixels.
        antialiased: scale opacity by sqrt(det / det_blurred), so that the blur adds no mass (Mip-Splatting,
            arXiv:2311.16493, eq. 9, with BLUR as the filter).

    Returns:
        `params` [C, N, 6] = (x, y, a, b, c, log_opacity) for the "gaussian" primitive, `depths` [C, N] camera z, and `radii`
        [C, N, 2], half-width and half-height in pixels of the box outside which alpha < 1/255. A Gaussian that is behind the
        camera, outside the image, too faint or not finite has zeros everywhere and receives no gradient.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shapes(
        means=(means, "N 3"),
        quats=(quats, "N 4"),
        scales=(scales, "N 3"),
        opacities=(opacities, "N"),
        viewmats=(viewmats, "C 4 4"),
        Ks=(Ks, "C 3 3"),
    )
    check_alike(means=means, quats=quats, scales=scales, opacities=opacities, viewmats=viewmats, Ks=Ks)
    if use_kernel(means):
        return _project(means, quats, scales, opacities, viewmats, Ks, size[0], size[1], antialiased)
    return project_reference(means, quats, scales, opacities, viewmats, Ks, size[0], size[1], antialiased)


def rotation_matrices(quats: Tensor) -> Tensor:
    """[..., 3, 3] rotations of `quats` [..., 4] (wxyz, any length but zero)."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def project_reference(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    antialiased: bool,
) -> Projection:
    """`project` in plain PyTorch: the specification."""
    camera = (viewmats, Ks, width, height, antialiased)
    per_camera = [t.expand(len(viewmats), *t.shape) for t in (means, quats, scales, opacities)]
    with torch.no_grad():
        params, z, variances = _screen(per_camera, *camera)
        level = 2.0 * (params[..., 5] - math.log(ALPHA_MIN))
        radii = (level.clamp(min=0)[..., None] * variances).sqrt()
        low, high = params[..., :2] + radii > 0, params[..., :2] - radii < params.new_tensor([width, height])
        drawn = (z > NEAR) & (level > 0) & (low & high).all(-1)
        # Phrased so that NaN fails; beyond these, squares overflow in single precision
        drawn &= (variances.sum(-1) < MAX_EXTENT) & (params[..., :2].abs().sum(-1) < MAX_EXTENT)
        drawn &= torch.isfinite(params).all(-1)
    # Once more, with harmless numbers where nothing is drawn: the zero gradient that these get would become NaN * 0.
    harmless = [torch.where(drawn.view(*drawn.shape, *[1] * (t.dim() - 2)), t, torch.ones_like(t)) for t in per_camera]
    params, z, _ = _screen(harmless, *camera)
    zero = torch.zeros_like(z)
    params = torch.where(drawn[..., None], params, zero[..., None])
    return params, torch.where(drawn, z, zero), torch.where(drawn[..., None], radii, zero[..., None])


def _screen(
    gaussians: list[Tensor], viewmats: Tensor, Ks: Tensor, width: int, height: int, antialiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Screen parameters [C, N, 6], camera z [C, N] and variances [C, N, 2] of Gaussians [C, N, ...], drawn or not."""
    means, quats, scales, opacities = gaussians
    rotations, translations = viewmats[:, :3, :3], viewmats[:, :3, 3]
    x, y, z = (torch.einsum("cij,cnj->cni", rotations, means) + translations[:, None]).unbind(-1)
    fx, fy, cx, cy = (Ks[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    safe_z = torch.where(z > NEAR, z, torch.ones_like(z))

    # The Jacobian of the projection, taken at the nearest direction inside the widened image.
    margin_x, margin_y = VIEW_MARGIN * width / fx, VIEW_MARGIN * height / fy
    tan_x = (x / safe_z).clamp(min=-cx / fx - margin_x, max=(width - cx) / fx + margin_x)
    tan_y = (y / safe_z).clamp(min=-cy / fy - margin_y, max=(height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    row_x = torch.stack([(fx / safe_z), zero, -fx * tan_x / safe_z], -1)
    row_y = torch.stack([zero, (fy / safe_z), -fy * tan_y / safe_z], -1)
    jacobians = torch.stack([row_x, row_y], -2)

    axes = rotation_matrices(quats) * scales[..., None, :]  # columns are the principal axes
    u, v = (jacobians @ torch.einsum("cij,cnjk->cnik", rotations, axes)).unbind(-2)
    var_x, covar, var_y = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    # |u x v|^2 = var_x var_y - covar^2, but for needles that is a small difference of large products.
    sharp_det = torch.linalg.cross(u, v).square().sum(-1)
    det = sharp_det + BLUR * (var_x + var_y) + BLUR * BLUR
    var_x, var_y = var_x + BLUR, var_y + BLUR

    mass = opacities
    if antialiased:
        mass = mass * (sharp_det / det).clamp(min=1e-12).sqrt()
    log_mass = torch.where(mass > ALPHA_MIN, mass, torch.full_like(mass, 0.5 * ALPHA_MIN)).log()
    mean_x, mean_y = fx * x / safe_z + cx, fy * y / safe_z + cy
    params = torch.stack([mean_x, mean_y, var_y / det, -covar / det, var_x / det, log_mass], -1)
    return params, z, torch.stack([var_x, var_y], -1)


@torch.library.custom_op("prismfield::project", mutates_args=())
def _project(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    antialiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return project_reference(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased)


@_project.register_fake
def _(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased):
    shape = (viewmats.shape[0], means.shape[0])
    return means.new_empty(*shape, 6), means.new_empty(shape), means.new_empty(*shape, 2)


@_project.register_kernel(DEVICES)
def _(means, quats, scales, opacities, viewmats, Ks, width, height, antialiased):
    shape = (viewmats.shape[0], means.shape[0])
    params, depths, radii = means.new_empty(*shape, 6), means.new_empty(shape), means.new_empty(*shape, 2)
    inputs = [t.contiguous() for t in (means, quats, scales, opacities, viewmats, Ks)]
    kernels_of(means).project_forward(*inputs, width, height, antialiased, params, depths, radii)
    return params, depths, radii


@torch.library.custom_op("prismfield::project_backward", mutates_args=(), device_types=DEVICES)
def _project_backward(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    antialiased: bool,
    radii: Tensor,
    v_params: Tensor,
    v_depths: Tensor,
    camera_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [t.contiguous() for t in (means, quats, scales, opacities, viewmats, Ks)]
    grads = [torch.empty_like(t) for t in inputs[:4]] + [torch.zeros_like(viewmats)]
    upstream = (radii, v_params.contiguous(), v_depths.contiguous())
    kernels_of(means).project_backward(*inputs, width, height, antialiased, *upstream, camera_gradient, *grads)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@_project_backward.register_fake
def _(means, quats, scales, opacities, viewmats, *_):
    return tuple(torch.empty_like(t) for t in (means, quats, scales, opacities, viewmats))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, v_params, v_depths, _v_radii):
    *inputs, radii = ctx.saved_tensors
    v_params = radii.new_zeros(*radii.shape[:2], 6) if v_params is None else v_params
    v_depths = radii.new_zeros(radii.shape[:2]) if v_depths is None else v_depths
    grads = _project_backward(*inputs, *ctx.options, radii, v_params, v_depths, ctx.needs_input_grad[4])
    return *grads[:4], grads[4] if ctx.needs_input_grad[4] else None, None, None, None, None


_project.register_autograd(_backward, setup_context=_save)
