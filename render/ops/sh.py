"""View-dependent colour from spherical harmonics."""

import torch
from torch import Tensor

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel

C0 = 0.28209479177387814
C1 = 0.4886025119029199
C2 = (1.0925484305920792, -1.0925484305920792, 0.31539156525252005, -1.0925484305920792, 0.5462742152960396)
C3 = (
    -0.5900435899266435,
    2.890611442640554,
    -0.4570457994644658,
    0.3731763325901154,
    -0.4570457994644658,
    1.445305721320277,
    -0.5900435899266435,
)


def sh_colors(sh0: Tensor, shN: Tensor, means: Tensor, viewmats: Tensor, radii: Tensor, degree: int) -> Tensor:
    """Colour of each primitive as each camera sees it: max(0, 1/2 + sum_k sh_k Y_k(direction)).

    The real harmonics in the order and with the signs of 3D Gaussian Splatting (arXiv:2308.04079). Differentiable once in the
    kernel to `sh0`, `shN`, `means` and `viewmats`.

    Args:
        sh0: [N, 1, 3] constant term.
        shN: [N, K-1, 3] higher terms, K = 1, 4, 9 or 16; those above `degree` are not read and receive zero gradient.
        means: [N, 3] world units.
        viewmats: [C, 4, 4] world to camera.
        radii: [C, N, 2] from `project`; a primitive with radius 0 is skipped and gets colour 0.
        degree: 0 to 3.

    Returns:
        [C, N, 3], not clamped above.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `shN` holds too few terms for `degree`.
    """
    bound = check_shapes(
        sh0=(sh0, "N 1 3"),
        shN=(shN, "N K 3"),
        means=(means, "N 3"),
        viewmats=(viewmats, "C 4 4"),
        radii=(radii, "C N 2"),
    )
    check_alike(sh0=sh0, shN=shN, means=means, viewmats=viewmats, radii=radii)
    if not 0 <= degree <= 3 or bound["K"] < (degree + 1) ** 2 - 1:
        raise ValueError(f"degree: expected 0..3 and at most what shN holds ({bound['K']} terms), got {degree}")
    if use_kernel(means):
        return _sh_colors(sh0, shN, means, viewmats, radii, degree)
    return sh_colors_reference(sh0, shN, means, viewmats, radii, degree)


def sh_basis(dirs: Tensor, degree: int) -> Tensor:
    """[..., (degree+1)^2] real harmonics of unit `dirs` [..., 3]."""
    x, y, z = dirs.unbind(-1)
    terms = [torch.full_like(x, C0)]
    if degree >= 1:
        terms += [-C1 * y, C1 * z, -C1 * x]
    if degree >= 2:
        xx, yy, zz = x * x, y * y, z * z
        terms += [C2[0] * x * y, C2[1] * y * z, C2[2] * (2 * zz - xx - yy), C2[3] * x * z, C2[4] * (xx - yy)]
    if degree >= 3:
        terms += [
            C3[0] * y * (3 * xx - yy),
            C3[1] * x * y * z,
            C3[2] * y * (4 * zz - xx - yy),
            C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            C3[4] * x * (4 * zz - xx - yy),
            C3[5] * z * (xx - yy),
            C3[6] * x * (xx - 3 * yy),
        ]
    return torch.stack(terms, -1)


def sh_colors_reference(
    sh0: Tensor, shN: Tensor, means: Tensor, viewmats: Tensor, radii: Tensor, degree: int
) -> Tensor:
    """`sh_colors` in plain PyTorch: the specification."""
    centers = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:]).squeeze(-1)
    dirs = torch.nn.functional.normalize(means[None] - centers[:, None], dim=-1)
    coefficients = torch.cat([sh0, shN[:, : (degree + 1) ** 2 - 1]], 1)
    rgbs = torch.einsum("cnk,nkd->cnd", sh_basis(dirs, degree), coefficients) + 0.5
    return torch.where(radii[..., :1] > 0, rgbs.clamp(min=0), 0.0)


@torch.library.custom_op("prismfield::sh_colors", mutates_args=())
def _sh_colors(sh0: Tensor, shN: Tensor, means: Tensor, viewmats: Tensor, radii: Tensor, degree: int) -> Tensor:
    return sh_colors_reference(sh0, shN, means, viewmats, radii, degree)


@_sh_colors.register_fake
def _(sh0, shN, means, viewmats, radii, degree):
    return means.new_empty(viewmats.shape[0], means.shape[0], 3)


@_sh_colors.register_kernel(DEVICES)
def _(sh0, shN, means, viewmats, radii, degree):
    rgbs = means.new_empty(viewmats.shape[0], means.shape[0], 3)
    inputs = [t.contiguous() for t in (sh0, shN, means, viewmats, radii)]
    kernels_of(means).sh_forward(*inputs, degree, rgbs)
    return rgbs


@torch.library.custom_op("prismfield::sh_colors_backward", mutates_args=(), device_types=DEVICES)
def _sh_colors_backward(
    sh0: Tensor,
    shN: Tensor,
    means: Tensor,
    viewmats: Tensor,
    radii: Tensor,
    degree: int,
    rgbs: Tensor,
    v_rgbs: Tensor,
    rest_gradient: bool,
    camera_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [t.contiguous() for t in (sh0, shN, means, viewmats, radii)]
    v_shN = torch.empty_like(shN) if rest_gradient else shN.new_empty(0)
    grads = [torch.empty_like(sh0), v_shN, torch.empty_like(means), torch.zeros_like(viewmats)]
    kernels_of(means).sh_backward(*inputs, degree, rgbs, v_rgbs.contiguous(), camera_gradient, *grads)
    return grads[0], grads[1], grads[2], grads[3]


@_sh_colors_backward.register_fake
def _(sh0, shN, means, viewmats, radii, degree, rgbs, v_rgbs, rest_gradient, camera_gradient):
    v_shN = torch.empty_like(shN) if rest_gradient else shN.new_empty(0)
    return torch.empty_like(sh0), v_shN, torch.empty_like(means), torch.empty_like(viewmats)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output)
    ctx.degree = inputs[5]


def _backward(ctx, v_rgbs):
    *inputs, rgbs = ctx.saved_tensors
    _, rest, _, camera, *_ = ctx.needs_input_grad
    v_sh0, v_shN, v_means, v_viewmats = _sh_colors_backward(*inputs, ctx.degree, rgbs, v_rgbs, rest, camera)
    return v_sh0, v_shN if rest else None, v_means, v_viewmats if camera else None, None, None


_sh_colors.register_autograd(_backward, setup_context=_save)
