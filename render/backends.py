"""Who rasterizes Gaussians and finds samples along rays: our own ops, or an installed gsplat and nerfacc on request."""

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
        need_cuda("--backend gsplat", device)
        load("gsplat", "--backend gsplat", "gsplat")
        # Without them it imports all the same, and fails at the first picture.
        if getattr(sys.modules.get("gsplat.cuda._backend"), "_C", "kernels") is None:
            raise ValueError("--backend gsplat: gsplat has no compiled kernels and finds no CUDA toolkit to build them")
    kernels.enabled = backend != "reference"
    _current = backend


def need_cuda(option: str, device: torch.device) -> None:
    """Refuse `option` on another device.

    Raises:
        ValueError: `device` is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"{option}: needs a CUDA device, and this training runs on {device}")


def load(package: str, option: str, source: str) -> Any:
    """The module of that name, which `option` asks for; `source` is what pip installs it from.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except (
        ImportError,
        OSError,
        NameError,
    ) as error:  # the latter two from tinycudann, where it was built for another GPU
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{option}: {package} cannot be imported ({reason}); pip install {source}") from None


@torch.no_grad()
def sample_with_nerfacc(
    rays: tuple[Tensor, Tensor],
    t_range: Tensor,
    occupied: Tensor,
    aabb: Tensor,
    *,
    step: float,
    cone: float,
    max_samples: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`march_occupancy` by nerfacc (read against 0.5.3), whose steps may begin elsewhere in a cell that is occupied.

    Args:
        rays: origins and unit directions [R, 3], world units.
        t_range: [R, 2] near and far, world units.
        occupied: [levels, res, res, res] bool.
        aabb: [2, 3] of level 0; each next one is twice as large about the same centre.
        step: world units.
        cone: steps grow to this times the distance.
        max_samples: of one ray, the nearest.

    Returns:
        What `Samples` holds.

    Raises:
        ValueError: nerfacc cannot be imported, or the rays are on no CUDA device.
    """
    need_cuda("sampler nerfacc", rays[0].device)
    grid = load("nerfacc.grid", "sampler nerfacc", "nerfacc")
    middle, half = aabb.mean(0), 0.5 * (aabb[1] - aabb[0])
    boxes = [torch.cat([middle - half * 2**level, middle + half * 2**level]) for level in range(len(occupied))]
    near, far = t_range.unbind(-1)
    options = {"near_planes": near.contiguous(), "far_planes": far.contiguous(), "step_size": step, "cone_angle": cone}
    intervals, pieces, _ = grid.traverse_grids(*rays, occupied, torch.stack(boxes), **options)
    owners = pieces.ray_indices.long()
    counts = torch.bincount(owners, minlength=len(near))
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    kept = place < max_samples
    counts = counts.clamp(max=max_samples)
    packed_info = torch.stack([counts.cumsum(0) - counts, counts], -1)
    return intervals.vals[intervals.is_left][kept], intervals.vals[intervals.is_right][kept], owners[kept], packed_info


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
