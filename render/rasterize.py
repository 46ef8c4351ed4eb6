"""The tile rasterizer: project, bin, composite."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from prismfield.render import backends
from prismfield.render.cameras import Cameras
from prismfield.render.checks import check_shapes
from prismfield.render.ops.bin import bin_primitives
from prismfield.render.ops.composite import composite
from prismfield.render.ops.project import project
from prismfield.render.ops.project_convexes import convex_primitive, project_convexes
from prismfield.render.ops.sh import sh_colors
from prismfield.render.output import RenderOutput

EXTRAS = ("depth", "median_depth", "absgrad")


def rasterize(
    primitive: str,
    screen: tuple[Tensor, Tensor, Tensor],
    features: Tensor,
    cameras: Cameras,
    background: Tensor | None = None,
    extras: Collection[str] = (),
) -> RenderOutput:
    """Draw projected primitives of any kind.

    Args:
        primitive: a name in `render.ops.primitives.PRIMITIVES`.
        screen: `params` [C, N, P], `depths` [C, N] and `radii` [C, N, 2], as the primitive's projection returns them.
        features: [C, N, D]; the first three channels are the colour.
        cameras: C pinhole cameras.
        background: [C, D], black if None.
        extras: any of "depth", "median_depth", "absgrad": what to compute beside colour and alpha.

    Returns:
        `rgb` holds all D channels.

    Raises:
        ValueError: a shape does not fit, the cameras have lens distortion, or an extra is unknown.
    """
    params, depths, radii = screen
    _check_request(cameras, extras)
    size = (cameras.width, cameras.height)
    if params.requires_grad:
        params.retain_grad()
    isects = bin_primitives(primitive, params, depths, radii, size)
    absgrad = torch.zeros_like(params[..., :2], requires_grad=True) if "absgrad" in extras else None
    out = composite(
        primitive,
        params,
        features,
        depths,
        isects,
        size,
        background,
        depth="depth" in extras,
        median_depth="median_depth" in extras,
        absgrad=absgrad,
    )
    depth = None if out.depth is None else out.depth / out.alpha.clamp(min=1e-10)
    return RenderOutput(out.features, out.alpha, depth, out.median_depth, params, radii, absgrad)


def _check_request(cameras: Cameras, extras: Collection[str]) -> None:
    if cameras.model != "pinhole":
        raise ValueError(f"cameras: expected pinhole, got {cameras.model!r}; undistort the images first")
    if unknown := set(extras) - set(EXTRAS):
        raise ValueError(f"extras: expected some of {', '.join(EXTRAS)}, got {', '.join(sorted(unknown))}")


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    sh: tuple[Tensor, Tensor],
    cameras: Cameras,
    background: Tensor | None = None,
    *,
    sh_degree: int,
    antialiased: bool = False,
    extras: Collection[str] = (),
) -> RenderOutput:
    """Draw 3D Gaussians (3D Gaussian Splatting, arXiv:2308.04079).

    Args:
        means: [N, 3] world units.
        quats: [N, 4] wxyz, any length but zero.
        scales: [N, 3] standard deviations, world units.
        opacities: [N] in [0, 1].
        sh: `sh0` [N, 1, 3] and `shN` [N, K-1, 3].
        cameras: C pinhole cameras.
        background: [C, 3], black if None.
        sh_degree: harmonics used, 0 to 3.
        antialiased: see `project`.
        extras: see `rasterize`.

    Raises:
        ValueError: a shape does not fit or the cameras have lens distortion.
    """
    _check_request(cameras, extras)
    check_shapes(means=(means, "N 3"), sh0=(sh[0], "N 1 3"), shN=(sh[1], "N K 3"))
    if backends.current() == "gsplat":
        gaussians = (means, quats, scales, opacities)
        return backends.rasterize_with_gsplat(gaussians, sh, cameras, background, sh_degree, antialiased, extras)
    size = (cameras.width, cameras.height)
    screen = project(means, quats, scales, opacities, cameras.viewmats, cameras.Ks, size, antialiased=antialiased)
    rgbs = sh_colors(*sh, means, cameras.viewmats, screen[2], sh_degree)
    return rasterize("gaussian", screen, rgbs, cameras, background, extras)


def rasterize_convexes(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    sh: tuple[Tensor, Tensor],
    cameras: Cameras,
    background: Tensor | None = None,
    *,
    sh_degree: int,
    extras: Collection[str] = (),
) -> RenderOutput:
    """Draw smooth convexes (3D Convex Splatting, arXiv:2411.14974). Each has one depth and one colour, those of its centre.

    Args:
        points: [N, K, 3] world units, 3 to 12 of each convex.
        deltas: [N] smoothness, per world unit, positive.
        sigmas: [N] sharpness, positive.
        opacities: [N] in [0, 1].
        sh: `sh0` [N, 1, 3] and `shN` [N, T-1, 3].
        cameras: C pinhole cameras.
        background: [C, 3], black if None.
        sh_degree: harmonics used, 0 to 3.
        extras: see `rasterize`.

    Raises:
        ValueError: a shape does not fit or the cameras have lens distortion.
    """
    _check_request(cameras, extras)
    check_shapes(points=(points, "N K 3"), sh0=(sh[0], "N 1 3"), shN=(sh[1], "N T 3"))
    size = (cameras.width, cameras.height)
    screen = project_convexes(points, deltas, sigmas, opacities, cameras.viewmats, cameras.Ks, size)
    rgbs = sh_colors(*sh, points.mean(1), cameras.viewmats, screen[2], sh_degree)
    return rasterize(convex_primitive(points.shape[1]), screen, rgbs, cameras, background, extras)
