"""Who rasterizes Gaussians: our own ops, or an installed gsplat on request."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from prismfield.render import kernels
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput

Backend = Literal["auto", "reference", "gsplat"]

_current: Backend = "auto"


def current() -> Backend:
    """The backend in use."""
    return _current


def choose(backend: Backend, device: torch.device) -> None:
    """Rasterize with `backend` from now on.

    Raises:
        ValueError: gsplat is asked for without a CUDA device, or is not installed.
    """
    global _current
    if backend == "gsplat":
        if device.type != "cuda":
            raise ValueError(f"--backend gsplat: needs a CUDA device, and this training runs on {device}")
        try:
            importlib.import_module("gsplat")
        except ImportError as error:
            raise ValueError(f"--backend gsplat: gsplat cannot be imported ({error}); pip install gsplat") from None
    kernels.enabled = backend != "reference"
    _current = backend


class _LateGradient:
    """gsplat leaves the absolute gradient beside the tensor; strategies look for it in `.grad`."""

    def __init__(self, means2d: Tensor) -> None:
        self.means2d = means2d

    @property
    def grad(self) -> Tensor | None:
        return getattr(self.means2d, "absgrad", None)


def rasterize_with_gsplat(
    gaussians: tuple[Tensor, Tensor, Tensor, Tensor],
    sh: tuple[Tensor, Tensor],
    cameras: Cameras,
    background: Tensor | None,
    sh_degree: int,
    antialiased: bool,
    extras: Collection[str],
) -> RenderOutput:
    """`rasterize_gaussians` by gsplat (1.4 or later); `params` holds the projected centres alone."""
    from gsplat import rasterization

    means, quats, scales, opacities = gaussians
    images, alphas, meta = rasterization(
        means,
        quats,
        scales,
        opacities,
        torch.cat(sh, 1),
        cameras.viewmats,
        cameras.Ks,
        cameras.width,
        cameras.height,
        sh_degree=sh_degree,
        packed=False,
        backgrounds=background,
        render_mode="RGB+ED" if "depth" in extras else "RGB",
        rasterize_mode="antialiased" if antialiased else "classic",
        absgrad="absgrad" in extras,
    )
    means2d, radii = meta["means2d"], meta["radii"]
    if means2d.requires_grad:
        means2d.retain_grad()
    return RenderOutput(
        rgb=images[..., :3],
        alpha=alphas[..., 0],
        depth=images[..., 3] if "depth" in extras else None,
        params=means2d,
        radii=(radii if radii.dim() == 3 else radii[..., None].expand(*radii.shape, 2)).float(),
        absgrad=_LateGradient(means2d) if "absgrad" in extras else None,  # type: ignore[arg-type]
    )
