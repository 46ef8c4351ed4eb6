"""A radiance field stored in voxels, from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import DenseGrid, grid
from prismfield.render.cameras import Cameras
from prismfield.render.checks import check_shapes
from prismfield.render.contraction import uncontract
from prismfield.render.march import Marched
from prismfield.render.ops.march import BLOCK
from prismfield.render.samplers import Samples
from prismfield.representations.config import FieldConfig, VoxelConfig
from prismfield.representations.fields import Field

_LEAST_ALPHA = 1e-6  # nearer to 0 or 1 than this, an opacity has no entropy


class VoxelField(Field):
    """Densities and features of voxels (Direct Voxel Grid Optimization, arXiv:2111.11215, "the paper" here).

    Densities are activated after the interpolation (eq. 7c), so that a surface may cut through a voxel; they start low
    (eq. 9); those of the coarsest grid learn the faster, the more cameras see them (section 4.1.3); what no camera sees is
    empty; the entropy of the pixels' opacities is kept low (section 4.3).

    Departs from the paper in that a grid is not resampled to a finer one: the finer one is added to it, which holds the
    same values, keeps the optimizer's moments, and lets what only few rays see still learn from its neighbours; coarse
    and fine stages are one, with one colour network; and there is no loss of single samples' colours.
    """

    config: VoxelConfig

    def make_encoding(self, config: FieldConfig) -> VoxelPyramid:
        """See `Field`."""
        if (points := (config.finest + 2) ** 3) > 2**config.log2_rows:
            raise ValueError(f"log2_rows: expected room for {points} voxels, got {2**config.log2_rows}")
        if not 0 < self.config.init_alpha < 1:
            raise ValueError(f"init_alpha: expected a number between 0 and 1, got {self.config.init_alpha}")
        growth = (config.finest / config.coarsest) ** (1 / max(config.levels - 1, 1))
        sides = [round(config.coarsest * growth**level) for level in range(config.levels)]
        return VoxelPyramid(sides, config.features, self.config.levels_at(0.0), half=config.half)

    def make_density_mlp(self, config: FieldConfig) -> tuple[None, int]:
        """None: the density is stored."""
        return None, self.encoding.out_dim - 1

    @property
    def voxel(self) -> float:
        """Side of the finest voxels, scene units; within half the longest side of the center where space is contracted."""
        return (4 if self.is_unbounded else 2) * self.radius / self.config.finest

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter."""
        groups, config = super().param_groups(), self.config
        for group in groups:
            if not group["name"].startswith("encoding."):
                group |= {"lr": config.network_lr, "lr_final": config.network_lr * config.lr_final / config.lr}
        return groups

    def advance(self, progress: float) -> None:
        """See `Field`; grids come in from coarse to fine."""
        super().advance(progress)
        self.encoding.active.fill_(self.config.levels_at(progress))

    def penalties(self, marched: Marched, samples: Samples) -> dict[str, Tensor]:
        """See `Field`; a pixel shows either something or the background (the paper's background entropy loss)."""
        found = super().penalties(marched, samples)
        if self.config.entropy:
            found["entropy"] = self.config.entropy * entropy(marched.alpha).mean()
        return found

    @torch.no_grad()
    def observe(self, cameras: Sequence[Cameras]) -> None:
        """Learn where the training cameras look, before the first step.

        Voxels of the coarsest grid learn at a rate in proportion to the number of cameras that see them (section 4.1.3);
        what none sees is empty.
        """
        unit = self.encoding.points() - 0.5
        side = self.voxel * self.config.finest / self.encoding.resolutions[0]
        if self.is_unbounded:
            offsets = uncontract(4 * unit)
            sizes = side * offsets.norm(dim=-1).clamp(min=1)  # across the line to the center; along it they are longer
        else:
            offsets = 2 * unit
            sizes = offsets.new_full((len(offsets),), side)
        counts = count_views(self.grid.aabb.mean(0) + self.radius * offsets, sizes, cameras)
        self.encoding.shares.copy_(counts / counts.max().clamp(min=1))
        levels, blocks = self.grid.bits.shape[:2]
        centers = self.grid.centers().view(levels, blocks, BLOCK, blocks, BLOCK, blocks, BLOCK, 3).mean((2, 4, 6))
        reach = 0.5 * float((self.grid.aabb[1] - self.grid.aabb[0]).norm()) / blocks
        scales = 2.0 ** torch.arange(levels, device=centers.device)
        sizes = (reach * scales)[:, None, None, None].expand(centers.shape[:-1])
        unseen = (count_views(centers.view(-1, 3), sizes.reshape(-1), cameras) == 0).view(sizes.shape)
        for axis in (1, 2, 3):
            unseen = unseen.repeat_interleave(BLOCK, axis)
        self.grid.rule_out(unseen)

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        # Eq. 9, with the finest voxel as the unit of length
        shift = math.log(math.expm1(-math.log1p(-self.config.init_alpha)))
        return nn.functional.softplus(encoded[:, 0] + shift) * (self.radius / self.voxel), encoded[:, 1:]


class VoxelPyramid(nn.Module):
    """Sum of interpolated grids of voxels, of which the first few are in use."""

    out_dim: int
    active: Tensor
    """[] int64, grids in use, from the coarsest."""
    shares: Tensor
    """[rows of the coarsest grid] 0 to 1, of the learning rate. Its values are table * shares: Adam's steps of the table are all of one
    size, whatever the gradient's."""

    def __init__(self, resolutions: Sequence[int], features: int, active: int, *, half: bool = False) -> None:
        """Features uniform in +-1e-4, from torch's generator.

        Args:
            resolutions: voxels along the unit interval, of each grid.
            features: numbers of a voxel: 2, 4 or 8.
            active: grids in use at first.
            half: grids but the coarsest are read in half precision.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__()
        if features < 2:
            raise ValueError(f"features: expected 2, 4 or 8, got {features}")
        self.resolutions, self.out_dim = list(resolutions), features
        self.grids = nn.ModuleList(DenseGrid(3, resolution=n + 2, features=features, half=half) for n in resolutions)
        self.register_buffer("active", torch.tensor(active))
        self.register_buffer("shares", torch.ones((resolutions[0] + 2) ** 3))

    def forward(self, x: Tensor) -> Tensor:
        """[S, 3] in the unit cube to [S, features]; see `Grid`."""
        first, *finer = self.levels()[: int(self.active)]
        found = grid(x, first.table * self.shares[:, None], first.scales, first.starts, first.sides)
        for level in finer:
            found = found + level(x)
        return found

    def levels(self) -> list[DenseGrid]:
        """From the coarsest."""
        return [level for level in self.grids if isinstance(level, DenseGrid)]

    def points(self) -> Tensor:
        """[rows, 3] where the voxels of the coarsest grid have their values, in the unit cube or half a voxel outside."""
        axis = (torch.arange(self.resolutions[0] + 2, device=self.shares.device) - 0.5) / self.resolutions[0]
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")[::-1], -1).view(-1, 3)


def entropy(alpha: Tensor) -> Tensor:
    """Of opacities 0..1, in nats: 0 at 0 and 1, log 2 at 1/2. The gradient is finite, and 0 at both ends."""
    alpha = alpha.clamp(_LEAST_ALPHA, 1 - _LEAST_ALPHA)
    return -(alpha * alpha.log() + (1 - alpha) * torch.log1p(-alpha))


@torch.no_grad()
def count_views(xyz: Tensor, sizes: Tensor, cameras: Sequence[Cameras]) -> Tensor:
    """How many cameras see something of each ball, as far as nothing is in the way.

    Args:
        xyz: [P, 3] centres, world units.
        sizes: [P] radii, world units.
        cameras: pinhole, batches of any number.

    Returns:
        [P] int64. A ball near an edge between two sides of a camera's pyramid of view may count although it is just outside.
    """
    check_shapes(xyz=(xyz, "P 3"), sizes=(sizes, "P"))
    counts = torch.zeros(len(xyz), dtype=torch.int64, device=xyz.device)
    for batch in cameras:
        for viewmat, K in zip(batch.viewmats.to(xyz), batch.Ks.to(xyz), strict=True):
            fx, fy, cx, cy = (float(K[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
            sides = [[fx, 0, cx], [-fx, 0, batch.width - cx], [0, fy, cy], [0, -fy, batch.height - cy], [0, 0, 1]]
            inward = nn.functional.normalize(xyz.new_tensor(sides), dim=-1)
            distances = torch.addmm(inward @ viewmat[:3, 3], xyz, (inward @ viewmat[:3, :3]).mT)
            counts += (distances > -sizes[:, None]).all(-1)
    return counts
