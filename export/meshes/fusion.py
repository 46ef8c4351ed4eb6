"""Depths of many views fused into one signed distance, as far as surfaces are near (Curless and Levoy 1996)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.export.meshes.bricks import MOST, SIDE, Bricks, grown, sample_places, unique_places
from prismfield.render.cameras import Cameras

_AT_ONCE = 1 << 20  # samples
_BYTES = 4 * 2 * SIDE**3  # of a brick: a distance and a weight for each sample


class View(NamedTuple):
    """What one camera sees."""

    camera: Cameras
    """One pinhole camera."""
    depth: Tensor
    """[H, W] camera z in world units, 0 where nothing is."""
    rgb: Tensor
    """[H, W, 3] uint8, display-referred."""


@dataclass
class Fusion:
    """Weighted mean of truncated signed distances, on bricks around all surfaces that were seen.

    Curless and Levoy (doi:10.1145/237170.237269), sections 3 and 4; a distance is that along the ray, and each view weighs the
    same. Space in front of a surface counts as empty also where another view saw something: that is how floaters go.
    """

    box: NDArray[np.float64]
    """[2, 3] world units."""
    voxel: float
    """Distance of the samples, world units."""
    truncation: float
    """World units, at least `voxel`."""
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """[B, 3] of the bricks; see `Bricks`."""

    def __post_init__(self) -> None:
        side = float((self.box[1] - self.box[0]).max())
        if not 0 < self.voxel <= side or side / self.voxel >= MOST - 4 * SIDE:
            raise ValueError(
                f"voxel: expected {side / (MOST - 4 * SIDE):.3g} to {side:.3g} in this box, got {self.voxel:.3g}"
            )
        if self.truncation < self.voxel:
            raise ValueError(f"truncation: expected at least a voxel, {self.voxel:.3g}, got {self.truncation:.3g}")

    def allocate(self, views: Iterable[View], most_bytes: int, *, unit: float = 1.0) -> None:
        """Make bricks wherever a view sees something in the box, and all round it.

        Args:
            views: what they see.
            most_bytes: for the samples.
            unit: of world units, what messages count in.

        Raises:
            ValueError: nothing is seen there, or it takes more than `most_bytes`.
        """
        most = (np.ceil((self.box[1] - self.box[0]) / self.voxel).astype(np.int64)) // SIDE
        low, high = torch.from_numpy(self.box)
        for view in views:
            xyz = points(view)
            xyz = xyz[((xyz >= low) & (xyz <= high)).all(-1)]
            seen = unique_places(((xyz - low) / (self.voxel * SIDE)).long().numpy())
            self.places = unique_places(np.concatenate([self.places, seen]))
            self._check_size(most_bytes, unit)
        for _ in range(int(np.ceil(self.truncation / (self.voxel * SIDE)))):
            self.places = grown(self.places, most)
        self._check_size(most_bytes, unit)
        if not len(self.places):
            raise ValueError("no view sees a surface in the box")

    def fuse(self, views: Iterable[View], *, least_views: int = 1) -> Bricks:
        """The mean over the views; what fewer than `least_views` have seen is not known."""
        values = torch.zeros(len(self.places), SIDE, SIDE, SIDE)
        weights = torch.zeros_like(values)
        centers = torch.from_numpy(self.box[0] + self.voxel * (SIDE * self.places + 0.5 * (SIDE - 1))).float()
        for view in views:
            for chosen in self._visible(view, centers):
                self._add(view, chosen, values, weights)
        mean = torch.where(weights >= least_views, values / weights.clamp(min=1), torch.nan)
        return Bricks(self.box[0], self.voxel, self.places, mean.numpy())

    def _check_size(self, most_bytes: int, unit: float) -> None:
        needed = len(self.places) * _BYTES
        if needed > most_bytes:
            enough = 1.1 * (needed / most_bytes) ** 0.5 * self.voxel  # bricks lie along surfaces
            got, limit = f"voxels of {self.voxel * unit:.3g}", f"{most_bytes >> 20} MiB"
            raise ValueError(f"{got} need more memory than {limit}; try {enough * unit:.2g} or more")

    def _visible(self, view: View, centers: Tensor) -> Iterator[Tensor]:
        """Bricks (by number) that a camera may see something in or in front of, some at a time."""
        camera, depth, _ = view
        reach = 0.5 * 3**0.5 * SIDE * self.voxel
        local = centers @ camera.viewmats[0, :3, :3].float().T + camera.viewmats[0, :3, 3].float()
        z = local[:, 2]
        focal = torch.stack([camera.Ks[0, 0, 0], camera.Ks[0, 1, 1]]).float()
        uv = local[:, :2] / z.clamp(min=reach)[:, None] * focal + camera.Ks[0, :2, 2].float()
        margin = 2 * reach / z.clamp(min=reach)[:, None] * focal
        size = torch.tensor([camera.width, camera.height])
        farthest = float(depth.max()) if depth.min() > 0 else torch.inf
        kept = (z > -reach) & ((uv > -margin) & (uv < size + margin)).all(-1) & (z < farthest + reach + self.truncation)
        yield from kept.nonzero()[:, 0].split(_AT_ONCE // SIDE**3)

    def _add(self, view: View, chosen: Tensor, values: Tensor, weights: Tensor) -> None:
        """Join what a view sees in some bricks to the sums over all views."""
        camera, depth, _ = view
        rotation, shift = camera.viewmats[0, :3, :3].double(), camera.viewmats[0, :3, 3].double()
        # A camera's position is affine in the sample's number: three small tables instead of a product of matrices
        first = torch.from_numpy(self.box[0] + self.voxel * SIDE * self.places[chosen.numpy()]) @ rotation.T + shift
        within = torch.from_numpy(sample_places(np.zeros((1, 3), np.int64))[0] * self.voxel) @ rotation.T
        x, y, z = (first[:, i, None].float() + within[..., i].reshape(-1).float() for i in range(3))
        inverse = 1 / z.clamp(min=1e-9)
        fx, fy, cx, cy = (float(camera.Ks[0][i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2)))
        x, y = x * inverse, y * inverse
        column, row = (x * fx + cx).floor(), (y * fy + cy).floor()
        inside = (z > 0) & (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        at = (row.clamp(0, camera.height - 1) * camera.width + column.clamp(0, camera.width - 1)).long()
        seen = depth.reshape(-1)[at]
        seen = torch.where(seen > 0, seen, torch.inf)  # where nothing is, all of the ray is empty
        distance = (seen - z) * (1 + x * x + y * y).sqrt()
        counted = inside & (distance > -self.truncation)
        added = (distance / self.truncation).clamp(max=1) * counted
        shape = (len(chosen), SIDE, SIDE, SIDE)
        values.index_add_(0, chosen, added.view(shape))
        weights.index_add_(0, chosen, counted.float().view(shape))


def points(view: View) -> Tensor:
    """[P, 3] float64, where a view sees something, world units."""
    camera, depth, _ = view
    row, column = (depth > 0).nonzero().unbind(-1)
    z = depth[row, column].double()
    K = camera.Ks[0].double()
    x, y = (column + 0.5 - K[0, 2]) / K[0, 0] * z, (row + 0.5 - K[1, 2]) / K[1, 1] * z
    viewmat = camera.viewmats[0].double()
    return (torch.stack([x, y, z], -1) - viewmat[:3, 3]) @ viewmat[:3, :3]
