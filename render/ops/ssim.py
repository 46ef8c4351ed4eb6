"""Structural similarity, and the photometric loss that splat training uses."""

from typing import Literal

import torch
from torch import Tensor

from prismfield.render.checks import check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel

_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def photometric_loss(
    rgb: Tensor, target: Tensor, ssim_weight: float = 0.2, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - w) mean|rgb - target| + w (1 - SSIM), 3D Gaussian Splatting (arXiv:2308.04079), eq. 7.

    The kernel computes the gradient together with the value, so that the backward pass is one multiplication.
    Differentiable once in the kernel, twice in the reference, to `rgb` alone.

    Args:
        rgb: [C, H, W, D] in 0..1.
        target: the same shape, float in 0..1 or uint8 in 0..255.
        ssim_weight: w, in 0..1.
        mask: [C, H, W] bool, True where a pixel counts. Others are set to 0 in both images before SSIM's window passes over
            them, and are left out of both means. Where none counts, the loss is 0.

    Returns:
        The loss, and detached mean absolute error and SSIM.

    Raises:
        ValueError: a shape does not fit.
    """
    check_shapes(rgb=(rgb, "C H W D"), target=(target, "C H W D"))
    if mask is not None:
        check_shapes(rgb=(rgb, "C H W D"), mask=(mask, "C H W"))
    if use_kernel(rgb):
        loss, values, _ = _photometric_loss(rgb, target.detach(), ssim_weight, mask)
        return loss, values[1], values[2]
    return photometric_loss_reference(rgb, target.detach(), ssim_weight, mask)


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None, *, border: Literal["same", "valid"] = "same") -> Tensor:
    """Mean structural similarity of two images (Wang et al. 2004, "Image quality assessment"), eq. 13.

    An 11x11 Gaussian window of sigma 1.5, per channel, with biased variances.

    Args:
        a: [C, H, W, D] in 0..1; gradients go to it alone.
        b: the same shape, float in 0..1 or uint8.
        mask: [C, H, W] bool, as in `photometric_loss`.
        border: "same" takes zeros beyond the border and averages over all pixels, as 3D Gaussian Splatting does in training
            and evaluation. "valid" averages over the pixels whose window lies inside the image, as the paper does.

    Raises:
        ValueError: a shape does not fit, or the image is smaller than the window and `border` is "valid".
    """
    if border == "same":
        return 1 - photometric_loss(a, b, 1.0, mask)[0]
    check_shapes(a=(a, "C H W D"), b=(b, "C H W D"))
    if min(a.shape[1:3]) <= 2 * _RADIUS:
        raise ValueError(
            f"a: expected at least {2 * _RADIUS + 1} pixels a side for border='valid', got {list(a.shape)}"
        )
    a, b, counts = _counted(a, b.detach(), mask)
    inside = (slice(None), slice(_RADIUS, -_RADIUS), slice(_RADIUS, -_RADIUS))
    return _mean(ssim_map(a, b)[inside], counts[inside], 1.0)


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """[C, H, W, D] structural similarity around each pixel, in plain PyTorch, zeros beyond the border."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=a.dtype, device=a.device)
    window = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        channels = image.shape[-1]
        planes = image.permute(0, 3, 1, 2)
        rows = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
        planes = torch.nn.functional.conv2d(planes, rows, padding=(0, _RADIUS), groups=channels)
        planes = torch.nn.functional.conv2d(planes, rows.mT, padding=(_RADIUS, 0), groups=channels)
        return planes.permute(0, 2, 3, 1)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covar = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + _C1) * (2 * covar + _C2)
    return numerator / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))


def photometric_loss_reference(
    rgb: Tensor, target: Tensor, ssim_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`photometric_loss` in plain PyTorch: the specification."""
    rgb, target, counts = _counted(rgb, target, mask)
    l1 = _mean((rgb - target).abs(), counts, 0.0)
    similarity = _mean(ssim_map(rgb, target), counts, 1.0)
    return (1 - ssim_weight) * l1 + ssim_weight * (1 - similarity), l1.detach(), similarity.detach()


def _counted(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both images in one dtype, 0 where a pixel does not count, and a bool for each value that does."""
    b = b.to(a.dtype) / 255 if b.dtype == torch.uint8 else b.to(a.dtype)
    counts = torch.ones_like(a, dtype=torch.bool) if mask is None else mask[..., None].expand_as(a)
    return torch.where(counts, a, 0.0), torch.where(counts, b, 0.0), counts


def _mean(values: Tensor, counts: Tensor, otherwise: float) -> Tensor:
    """Mean of the values that count; `otherwise` if there are none."""
    total = counts.sum()
    mean = torch.where(counts, values, 0.0).sum() / total.clamp(min=1)
    return torch.where(total > 0, mean, otherwise)


@torch.library.custom_op("prismfield::photometric_loss", mutates_args=(), device_types=DEVICES)
def _photometric_loss(
    rgb: Tensor, target: Tensor, ssim_weight: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    values, gradient = rgb.new_empty(3), torch.empty_like(rgb, memory_format=torch.contiguous_format)
    nothing = (rgb.new_empty(0), rgb.new_empty(0, dtype=torch.uint8))
    as_bytes = target.dtype == torch.uint8
    target = target.contiguous() if as_bytes else target.to(rgb.dtype).contiguous()
    targets = (nothing[0], target) if as_bytes else (target, nothing[1])
    where = rgb.new_empty(0, dtype=torch.bool) if mask is None else mask.contiguous()
    kernels_of(rgb).photometric_loss(rgb.contiguous(), *targets, where, ssim_weight, values, gradient)
    return values[0].clone(), values, gradient


@_photometric_loss.register_fake
def _(rgb, target, ssim_weight, mask):
    return rgb.new_empty(()), rgb.new_empty(3), torch.empty_like(rgb, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, v_loss, *_):
    if v_loss is None:
        return None, None, None, None
    return ctx.saved_tensors[0] * v_loss, None, None, None


_photometric_loss.register_autograd(_backward, setup_context=_save)
