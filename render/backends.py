"""Who rasterizes Gaussians: our own ops, or an installed gsplat on request."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any, Literal

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
        ValueError: gsplat is asked for without a CUDA device, is not installed, or has no kernels.
    """
    global _current
    if backend == "gsplat":
        if device.type != "cuda":
            raise ValueError(f"--backend gsplat: needs a CUDA device, and this training runs on {device}")
        try:
            importlib.import_module("gsplat")
        except ImportError as error:
            raise ValueError(f"--backend gsplat: gsplat cannot be imported ({error}); pip install gsplat") from None
        # Without them it imports all the same, and fails at the first picture.
        if getattr(sys.modules.get("gsplat.cuda._backend"), "_C", "kernels") is None:
            raise ValueError("--backend gsplat: gsplat has no compiled kernels and finds no CUDA toolkit to build them")
    kernels.enabled = backend != "reference"
    _current = backend


def gpu_kernels(device: torch.device) -> tuple[Any, str]:
    """The Triton kernels (or None) and one line that says which they are and why, once one of them has run on `device`.

    What loads may still fail at the first start: Triton builds its launcher with the machine's C compiler.
    """
    found, line = kernels.gpu_kernels()
    if found is None or device.type != "cuda":
        return found, line
    values = [torch.zeros(1, device=device) for _ in range(4)]
    try:
        found.adam_step(*values, torch.empty(0, dtype=torch.bool, device=device), 1, 0.0, 0.9, 0.999, 1e-15, 1)
        torch.cuda.synchronize(device)
    except Exception as error:  # of the compiler, the driver, or Triton itself
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        kernels.gpu_kernels.loaded = None, f"slow reference instead of the Triton kernels: they do not run ({reason})"
    return kernels.gpu_kernels()


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
    """`rasterize_gaussians` by gsplat (read against 1.5.3; 1.4 gives one radius); `params` holds the projected centres alone.

    Its "ED" is, as `RenderOutput.depth`, the blended camera z over the alpha, 0 where alpha is 0; a background adds nothing.

    Raises:
        ValueError: the median depth is asked for, which it does not compute.
    """
    from gsplat import rasterization

    if "median_depth" in extras:
        raise ValueError("extras: expected no median_depth with --backend gsplat, which does not compute it")

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
