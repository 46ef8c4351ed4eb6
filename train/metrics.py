"""How close a render comes to a photograph: PSNR, SSIM and FLIP. LPIPS, which needs weights, is in `lpips.py`.

Images are [C, H, W, 3], display-referred (sRGB), in 0..1; higher-is-better or lower-is-better is said at each metric.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from prismfield.render.checks import check_shapes
from prismfield.render.ops.ssim import ssim as ssim_op

PIXELS_PER_DEGREE = 0.7 * (3840 / 0.7) * math.pi / 180
"""FLIP's default viewer: 0.7 m in front of a display 0.7 m and 3840 pixels wide; 67.02."""

# ITU-R BT.709 primaries and D65: linear RGB to XYZ.
_RGB_TO_XYZ = (
    (0.41239080, 0.35758434, 0.18048079),
    (0.21263901, 0.71516868, 0.07219232),
    (0.01933082, 0.11919478, 0.95053215),
)
# FLIP, table 1: (a1, b1, a2, b2) of each channel's contrast sensitivity.
_SENSITIVITY = ((1.0, 0.0047, 0.0, 1e-5), (1.0, 0.0053, 0.0, 1e-5), (34.1, 0.04, 13.5, 0.025))
_COLOR_EXPONENT, _COLOR_KNEE, _COLOR_SHARE = 0.7, 0.4, 0.95  # q_c, p_c, p_t
_FEATURE_EXPONENT, _FEATURE_DEGREES = 0.5, 0.082  # q_f, w


def psnr(rgb: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in decibels, higher is better; 100 at most.

    Args:
        rgb: [..., 3].
        truth: the same shape.
        mask: [...] bool, True where a pixel counts.

    Returns:
        NaN if no pixel counts.
    """
    errors = (rgb.double() - truth.double()).square()
    if mask is not None:
        errors = errors[mask]
    return float(-10 * errors.mean().clamp(min=1e-10).log10())


def ssim(rgb: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Structural similarity, higher is better, by the convention of 3D Gaussian Splatting's evaluation.

    11x11 Gaussian window of sigma 1.5, zeros beyond the border, mean over all pixels and channels (`border="same"` of
    `render.ops.ssim.ssim`). scikit-image and torchmetrics treat the border otherwise and come out up to 0.01 apart. NaN if
    no pixel counts.
    """
    if mask is not None and not mask.any():
        return math.nan
    with torch.no_grad():
        return float(ssim_op(rgb, truth, mask))


@torch.no_grad()
def flip(
    rgb: Tensor, truth: Tensor, mask: Tensor | None = None, *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> float:
    """Mean of `flip_map` over the pixels that count, 0 (equal) to 1; NaN if none counts.

    Args:
        rgb: [C, H, W, 3] in 0..1.
        truth: the same shape.
        mask: [C, H, W] bool; where it is False the truth stands in for the render, so that nothing spreads from there.
        pixels_per_degree: of the viewer's visual field.
    """
    if mask is None:
        return float(flip_map(rgb, truth, pixels_per_degree).mean())
    check_shapes(rgb=(rgb, "C H W 3"), mask=(mask, "C H W"))
    errors = flip_map(torch.where(mask[..., None], rgb, truth), truth, pixels_per_degree)
    return float(errors[mask].mean())


def flip_map(rgb: Tensor, truth: Tensor, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Tensor:
    """[C, H, W] error that a viewer perceives when flipping between two images, 0 to 1.

    LDR-FLIP (Andersson et al. 2020, "FLIP: a difference evaluator for alternating images"), sections 4.1 to 4.3.

    Args:
        rgb: [C, H, W, 3]; clamped to 0..1.
        truth: the same shape.
        pixels_per_degree: of the viewer's visual field.
    """
    check_shapes(rgb=(rgb, "C H W 3"), truth=(truth, "C H W 3"))
    ours, theirs = (_xyz_to_opponent(_srgb_to_xyz(image.float().clamp(0, 1))) for image in (rgb, truth))
    color = _color_error(ours, theirs, pixels_per_degree)
    feature = _feature_error((ours[..., 0] + 16) / 116, (theirs[..., 0] + 16) / 116, pixels_per_degree)
    return color ** (1 - feature)


def _color_error(rgb: Tensor, truth: Tensor, pixels_per_degree: float) -> Tensor:
    """[C, H, W] of what is left of two YCxCz images after the eye's filters (section 4.1)."""
    ours, theirs = (_hunt(_xyz_to_lab(_seen(image, pixels_per_degree))) for image in (rgb, truth))
    errors = _hyab(ours, theirs) ** _COLOR_EXPONENT
    extremes = torch.eye(3, device=rgb.device)[1:, None, None]  # green and blue, the farthest apart
    green, blue = _hunt(_xyz_to_lab(_srgb_to_xyz(extremes)))
    largest = _hyab(green, blue) ** _COLOR_EXPONENT
    knee = _COLOR_KNEE * largest
    above = _COLOR_SHARE + (errors - knee) / (largest - knee) * (1 - _COLOR_SHARE)
    return torch.where(errors < knee, errors * (_COLOR_SHARE / knee), above).clamp(max=1)


def _seen(opponent: Tensor, pixels_per_degree: float) -> Tensor:
    """XYZ of a YCxCz image after each channel's contrast sensitivity filter, brought back into the display's gamut."""
    widest = max(max(b1, b2) for _, b1, _, b2 in _SENSITIVITY)
    radius = math.ceil(3 * math.sqrt(widest / (2 * math.pi**2)) * pixels_per_degree)
    degrees = torch.arange(-radius, radius + 1, device=opponent.device) / pixels_per_degree
    channels = []
    for channel, (a1, b1, a2, b2) in zip(opponent.unbind(-1), _SENSITIVITY, strict=True):
        filtered, total = torch.zeros_like(channel), 0.0
        for a, b in ((a1, b1), (a2, b2)):
            if a > 0:
                taps = torch.exp(-(math.pi**2) / b * degrees**2)
                weight = a * math.sqrt(math.pi / b)
                filtered = filtered + weight * _convolved(channel, taps, taps)
                total += weight * float(taps.sum()) ** 2
        channels.append(filtered / total)
    to_xyz = opponent.new_tensor(_RGB_TO_XYZ)
    rgb = _opponent_to_xyz(torch.stack(channels, -1)) @ torch.linalg.inv(to_xyz).T
    return rgb.clamp(0, 1) @ to_xyz.T


def _feature_error(rgb: Tensor, truth: Tensor, pixels_per_degree: float) -> Tensor:
    """[C, H, W] of how much edges and points of two brightness images [C, H, W] differ (section 4.2)."""
    sigma = 0.5 * _FEATURE_DEGREES * pixels_per_degree
    radius = math.ceil(3 * sigma)
    x = torch.arange(-radius, radius + 1, device=rgb.device, dtype=rgb.dtype)
    smooth = torch.exp(-(x**2) / (2 * sigma**2))
    errors = []
    for detector in (-x * smooth, (x**2 / sigma**2 - 1) * smooth):  # first derivative: edges; second: points
        # What is positive sums to 1 and what is negative to -1.
        taps = torch.where(
            detector > 0, detector / detector.clamp(min=0).sum(), -detector / detector.clamp(max=0).sum()
        )
        strengths = [
            torch.hypot(_convolved(image, taps, smooth / smooth.sum()), _convolved(image, smooth / smooth.sum(), taps))
            for image in (rgb, truth)
        ]
        errors.append((strengths[0] - strengths[1]).abs())
    return (torch.maximum(*errors) / math.sqrt(2)) ** _FEATURE_EXPONENT


def _convolved(image: Tensor, along: Tensor, down: Tensor) -> Tensor:
    """[C, H, W] correlated with a separable filter; the border pixels go on for ever."""
    radius = len(along) // 2
    rows = conv2d(pad(image[:, None], (radius, radius, 0, 0), mode="replicate"), along.view(1, 1, 1, -1))
    return conv2d(pad(rows, (0, 0, radius, radius), mode="replicate"), down.view(1, 1, -1, 1))[:, 0]


def _srgb_to_xyz(image: Tensor) -> Tensor:
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    return linear @ image.new_tensor(_RGB_TO_XYZ).T


def _white(like: Tensor) -> Tensor:
    """XYZ of the display's white."""
    return like.new_tensor(_RGB_TO_XYZ).sum(1)


def _xyz_to_opponent(xyz: Tensor) -> Tensor:
    """YCxCz: lightness, red to green, blue to yellow; linear in XYZ."""
    x, y, z = (xyz / _white(xyz)).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _opponent_to_xyz(opponent: Tensor) -> Tensor:
    lightness, red, blue = opponent.unbind(-1)
    y = (lightness + 16) / 116
    return torch.stack([y + red / 500, y, y - blue / 200], -1) * _white(opponent)


def _xyz_to_lab(xyz: Tensor) -> Tensor:
    """CIE 1976 L*a*b*."""
    relative, threshold = xyz / _white(xyz), 6 / 29
    compressed = torch.where(
        relative > threshold**3, relative.clamp(min=1e-12) ** (1 / 3), relative / (3 * threshold**2) + 4 / 29
    )
    x, y, z = compressed.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _hunt(lab: Tensor) -> Tensor:
    """Colours look less colourful the darker they are."""
    return torch.cat([lab[..., :1], 0.01 * lab[..., :1] * lab[..., 1:]], -1)


def _hyab(a: Tensor, b: Tensor) -> Tensor:
    """Distance between Lab colours: along lightness, plus Euclidean across (Abasi et al. 2020)."""
    difference = a - b
    return difference[..., 0].abs() + difference[..., 1:].norm(dim=-1)
