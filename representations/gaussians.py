"""3D Gaussians with harmonic colour."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_gaussians
from prismfield.representations.config import GaussiansConfig
from prismfield.representations.splats import Splats


class Gaussians(Splats):
    """N Gaussians, drawn by the rasterizer (3D Gaussian Splatting, arXiv:2308.04079)."""

    shape_patterns: ClassVar = {"means": "N 3", "quats": "N 4", "log_scales": "N 3"}

    means: nn.Parameter
    """[N, 3] scene units."""
    quats: nn.Parameter
    """[N, 4] wxyz, of any length but zero."""
    log_scales: nn.Parameter
    """[N, 3] logarithm of the standard deviations, scene units."""
    config: GaussiansConfig

    @classmethod
    def shapes_at(cls, xyz: Tensor, widths: Tensor, config: GaussiansConfig) -> dict[str, Tensor]:
        """Round Gaussians whose standard deviation is `widths`."""
        count = len(xyz)
        return {
            "means": xyz,
            "quats": xyz.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4),
            "log_scales": widths.log()[:, None].expand(count, 3),
        }

    @property
    def scales(self) -> Tensor:
        """[N, 3] standard deviations, scene units."""
        return self.log_scales.exp()

    @property
    def harmonics(self) -> tuple[Tensor, Tensor]:
        """[N, 1, 3] of degree 0, and [N, T-1, 3] above."""
        return self.sh0, self.shN

    def draw(self, cameras: Cameras, background: Tensor | None, extras: Collection[str]) -> RenderOutput:
        """The whole images."""
        return rasterize_gaussians(
            self.means,
            self.quats,
            self.scales,
            self.opacities,
            self.harmonics,
            cameras,
            background,
            sh_degree=self.active_sh_degree,
            antialiased=self.config.antialiased,
            extras=extras,
        )
