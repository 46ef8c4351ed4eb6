"""Smooth convexes with harmonic colour."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_convexes
from prismfield.representations.config import RATED_SIZE, ConvexesConfig
from prismfield.representations.splats import Splats


class Convexes(Splats):
    """N smooth convexes, each the hull of K points, drawn by the rasterizer (3D Convex Splatting, arXiv:2411.14974)."""

    shape_patterns: ClassVar = {"points": "N K 3", "log_deltas": "N", "log_sigmas": "N"}

    points: nn.Parameter
    """[N, K, 3] scene units, in any order."""
    log_deltas: nn.Parameter
    """[N] logarithm of the smoothness, per scene unit."""
    log_sigmas: nn.Parameter
    """[N] logarithm of the sharpness."""
    config: ConvexesConfig

    @classmethod
    def shapes_at(cls, xyz: Tensor, widths: Tensor, config: ConvexesConfig) -> dict[str, Tensor]:
        """Points on spheres whose radius is `widths`; delta and sigma are the config's, for such a radius."""
        count = len(xyz)
        return {
            "points": xyz[:, None] + widths[:, None, None] * fibonacci_sphere(config.points).to(xyz),
            "log_deltas": math.log(config.init_delta) - widths.log(),
            "log_sigmas": xyz.new_full((count,), math.log(config.init_sigma)),
        }

    @property
    def means(self) -> Tensor:
        """[N, 3] centres, scene units."""
        return self.points.mean(1)

    @property
    def sizes(self) -> Tensor:
        """[N] root mean square distance of the points from the centre, scene units."""
        return self.points.var(1, unbiased=False).sum(-1).clamp(min=1e-24).sqrt()

    @property
    def scales(self) -> Tensor:
        """[N, 3] standard deviations of the points along the axes of the scene, scene units."""
        return self.points.var(1, unbiased=False).clamp(min=1e-24).sqrt()

    @property
    def deltas(self) -> Tensor:
        """[N] smoothness, per scene unit."""
        return self.log_deltas.exp()

    @property
    def sigmas(self) -> Tensor:
        """[N] sharpness."""
        return self.log_sigmas.exp()

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter, with the rates of the config; points move in proportion to the size of their convex."""
        groups = super().param_groups()
        for group in groups:
            if group["name"] == "points":
                group["row_rates"] = lambda: self.sizes.detach() / RATED_SIZE
        return groups

    def draw(self, cameras: Cameras, background: Tensor | None, extras: Collection[str]) -> RenderOutput:
        """The whole images."""
        return rasterize_convexes(
            self.points,
            self.deltas,
            self.sigmas,
            self.opacities,
            (self.sh0, self.shN),
            cameras,
            background,
            sh_degree=self.active_sh_degree,
            extras=extras,
        )


def fibonacci_sphere(count: int) -> Tensor:
    """[count, 3] unit vectors, evenly spread: at equal steps of height, each turned by the golden angle against the last.

    González, "Measurement of areas on a sphere using Fibonacci and latitude-longitude lattices" (2010), eq. 1.
    """
    index = torch.arange(count, dtype=torch.float64)
    height = 1 - (2 * index + 1) / count
    angle = index * (math.pi * (3 - math.sqrt(5)))
    radius = (1 - height * height).sqrt()
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], -1)
