"""3D Gaussians with harmonic colour."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.render.checks import check_shapes
from prismfield.render.ops.sh import C0
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_gaussians
from prismfield.representations.config import GaussiansConfig

_NEIGHBOURS = 3


class Gaussians(nn.Module):
    """N Gaussians, drawn by the rasterizer (3D Gaussian Splatting, arXiv:2308.04079).

    Every parameter has one row a Gaussian; `train/strategies/rows.py` adds and drops rows.
    """

    batching: ClassVar[Literal["image", "pixels"]] = "image"

    means: nn.Parameter
    """[N, 3] scene units."""
    quats: nn.Parameter
    """[N, 4] wxyz, of any length but zero."""
    log_scales: nn.Parameter
    """[N, 3] logarithm of the standard deviations, scene units."""
    opacity_logits: nn.Parameter
    """[N]."""
    sh0: nn.Parameter
    """[N, 1, 3]."""
    shN: nn.Parameter
    """[N, K-1, 3]."""
    active_sh_degree: int
    """Harmonics in use; strategies raise it while training."""

    def __init__(self, tensors: dict[str, Tensor], config: GaussiansConfig) -> None:
        super().__init__()
        names = ("means", "quats", "log_scales", "opacity_logits", "sh0", "shN")
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"tensors: expected {', '.join(names)}; {', '.join(missing)} missing")
        patterns = dict(zip(names, ("N 3", "N 4", "N 3", "N", "N 1 3", "N K 3"), strict=True))
        terms = check_shapes(**{name: (tensors[name], patterns[name]) for name in names})["K"] + 1
        if terms not in (1, 4, 9, 16):
            raise ValueError(f"shN: expected 0, 3, 8 or 15 terms (degree 0 to 3), got {terms - 1}")
        for name in names:
            value = tensors[name].detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            setattr(self, name, nn.Parameter(value))
        self.config = config
        self.active_sh_degree = self.sh_degree

    @classmethod
    def from_points(cls, xyz: Tensor, rgb: Tensor, aabb: Tensor, config: GaussiansConfig) -> Self:
        """Round Gaussians at the points, as wide as the mean distance to the three nearest neighbours.

        Args:
            xyz: [P, 3] scene units, P >= 1.
            rgb: [P, 3] in 0..1.
            aabb: [2, 3] bounds of the content; sets the width of points that have no neighbour.
            config: `init_opacity`, `init_scale` and `sh_degree` are used here.

        Raises:
            ValueError: a shape does not fit, there is no point, or `init_opacity` is not inside (0, 1).
        """
        count = check_shapes(xyz=(xyz, "P 3"), rgb=(rgb, "P 3"), aabb=(aabb, "2 3"))["P"]
        if count == 0:
            raise ValueError("xyz: expected at least one point to start from, got none")
        if not 0 < config.init_opacity < 1:
            raise ValueError(f"init_opacity: expected a number between 0 and 1, got {config.init_opacity}")
        extent = float((aabb[1] - aabb[0]).norm())
        scales = config.init_scale * _neighbour_distances(xyz, extent)
        logit = math.log(config.init_opacity / (1 - config.init_opacity))
        tensors = {
            "means": xyz,
            "quats": xyz.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4),
            "log_scales": scales.log()[:, None].expand(count, 3),
            "opacity_logits": xyz.new_full((count,), logit),
            "sh0": ((rgb - 0.5) / C0)[:, None],
            "shN": xyz.new_zeros(count, (config.sh_degree + 1) ** 2 - 1, 3),
        }
        scene = cls(tensors, config)
        scene.active_sh_degree = config.sh_degree_at(0.0)
        return scene

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], config: GaussiansConfig) -> Self:
        """The Gaussians whose `tensors()` these are; `shN` may hold another degree than `config.sh_degree`."""
        return cls(tensors, config)

    @property
    def num_primitives(self) -> int:
        """N."""
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """Harmonics stored."""
        return math.isqrt(self.shN.shape[1] + 1) - 1

    @property
    def scales(self) -> Tensor:
        """[N, 3] standard deviations, scene units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Tensor:
        """[N] in (0, 1)."""
        return self.opacity_logits.sigmoid()

    def render(
        self,
        cameras: Cameras,
        pixels: Tensor | None = None,
        background: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> RenderOutput:
        """Draw the whole images; where `pixels` [R, 3] (camera, column, row) are given, return those alone.

        Args:
            cameras: C pinhole cameras.
            pixels: integers.
            background: [C, 3], black if None.
            extras: any of "depth", "median_depth", "absgrad" (see `RenderOutput`).
        """
        out = rasterize_gaussians(
            self.means,
            self.quats,
            self.scales,
            self.opacities,
            (self.sh0, self.shN),
            cameras,
            background,
            sh_degree=self.active_sh_degree,
            antialiased=self.config.antialiased,
            extras=extras,
        )
        if pixels is None:
            return out
        camera, column, row = pixels.long().unbind(-1)
        return replace(
            out,
            rgb=out.rgb[camera, row, column],
            alpha=out.alpha[camera, row, column],
            depth=None if out.depth is None else out.depth[camera, row, column],
            median_depth=None if out.median_depth is None else out.median_depth[camera, row, column],
        )

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter, with the rates of the config."""
        groups: list[dict[str, Any]] = [
            {"name": name, "params": [parameter], "lr": getattr(self.config, f"{name}_lr")}
            for name, parameter in self.named_parameters()
        ]
        for group in groups:
            if group["name"] == "means":
                group["lr_final"] = self.config.means_lr_final
            if group["name"] == "shN":
                group["every"] = self.config.shN_every
        return groups

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def _neighbour_distances(xyz: Tensor, extent: float) -> Tensor:
    """[P] mean distance of each point to its nearest neighbours, never zero.

    Points that coincide take a tenth of the median, a lone point a hundredth of `extent`.
    """
    points = xyz.detach().cpu().double().numpy()
    neighbours = min(_NEIGHBOURS, len(points) - 1)
    if neighbours == 0:
        return xyz.new_full((1,), max(0.01 * extent, 1e-6))
    distances, _ = cKDTree(points).query(points, k=neighbours + 1, workers=-1)
    means = torch.from_numpy(distances[:, 1:].mean(1)).to(xyz)
    return means.clamp(min=max(0.1 * float(means.median()), 1e-6 * extent, 1e-12))
