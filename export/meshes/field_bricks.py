"""Where a field is dense: samples for marching cubes on its density."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.export.meshes.bricks import SIDE, Bricks, grown, sample_places
from prismfield.representations.fields import Field

_AT_ONCE = 1 << 18  # samples
_MOST_LOG = 3.0  # of density over threshold: beyond, it says nothing about where in between the surface is


@torch.no_grad()
def density_bricks(field: Field, box: NDArray[np.float64], voxel: float, threshold: float, most_bytes: int) -> Bricks:
    """Logarithm of threshold over density, limited to +-3, on bricks at the surface; outside of the box it is 3.

    A logarithm, as fields compute the exponential of what they interpolate: between two samples it is nearly linear.

    Args:
        field: what is asked, where its occupancy grid does not say that it is empty.
        box: [2, 3] scene units.
        voxel: distance of the samples, scene units.
        threshold: per scene unit.
        most_bytes: for the samples.

    Raises:
        ValueError: it takes more than `most_bytes`.
    """
    counts = np.ceil(((box[1] - box[0]) / voxel + 1) / SIDE).astype(np.int64)
    origin = box[0] - SIDE * voxel  # a brick more on each side, which is empty: so surfaces are closed
    places, values = [], []
    asked = _Asked(field, box, origin, voxel, threshold)
    for x in range(1, counts[0] + 1):
        layer = np.stack(np.meshgrid([x], np.arange(1, counts[1] + 1), np.arange(1, counts[2] + 1), indexing="ij"), -1)
        candidates = asked.maybe(layer.reshape(-1, 3))
        for part in np.array_split(candidates, len(candidates) * SIDE**3 // _AT_ONCE + 1):
            found = asked.values(part)
            dense = (found < 0).any((1, 2, 3))
            places.append(part[dense])
            values.append(found[dense])
        needed = 4 * SIDE**3 * sum(map(len, places))
        if needed > most_bytes:
            raise ValueError(f"voxels this small need more memory than {most_bytes >> 20} MiB; try larger ones")
    inner = np.concatenate(places)
    around = grown(inner, counts + 1)
    around = around[~_contains(inner, around)]  # a cube of samples reaches into the next brick
    return Bricks(
        origin, voxel, np.concatenate([inner, around]), np.concatenate([*values, asked.values(around, checked=True)])
    )


class _Asked:
    """A field, asked for whole bricks."""

    def __init__(
        self, field: Field, box: NDArray[np.float64], origin: NDArray[np.float64], voxel: float, threshold: float
    ) -> None:
        self.field, self.origin, self.voxel, self.threshold = field, origin, voxel, threshold
        self.low, self.high = (torch.from_numpy(corner) for corner in box)
        self.device = field.grid.aabb.device
        self.aabb = field.grid.aabb.double().cpu().numpy()
        cells = field.grid.occupied[0].cpu()[None, None].float()
        self.cells = torch.nn.functional.max_pool3d(cells, 3, 1, 1)[0, 0].bool().numpy()  # a cell's neighbours count
        sums = np.pad(self.cells, ((1, 0),) * 3).astype(np.int64)
        self.sums = sums.cumsum(0).cumsum(1).cumsum(2)

    def maybe(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those bricks of [B, 3] that touch an occupied cell, or lie where no cell is of the inmost grid."""
        corner = self.origin + self.voxel * SIDE * places
        side, res = self.aabb[1] - self.aabb[0], len(self.cells)
        low = (corner - self.aabb[0]) / side * res
        high = (corner + self.voxel * SIDE - self.aabb[0]) / side * res
        outside = ((low < 0) | (high > res)).any(1)
        a, b = low.clip(0, res).astype(np.int64), np.ceil(high.clip(0, res)).astype(np.int64)
        total = np.zeros(len(places), np.int64)  # of a box, from the sums up to its corners
        for bits in range(8):
            at = [np.where(bits >> axis & 1, b[:, axis], a[:, axis]) for axis in range(3)]
            total += (-1) ** (3 - bits.bit_count()) * self.sums[at[0], at[1], at[2]]
        return places[(total > 0) | (outside & bool(self.field.unbounded))]

    def values(self, places: NDArray[np.int64], *, checked: bool = False) -> NDArray[np.float32]:
        """[B, 8, 8, 8]; `checked` leaves bricks out that the occupancy grid says are empty."""
        out = np.full((len(places), SIDE, SIDE, SIDE), _MOST_LOG, np.float32)
        rows = np.nonzero(_contains(self.maybe(places), places))[0] if checked else np.arange(len(places))
        for part in np.array_split(rows, len(rows) * SIDE**3 // _AT_ONCE + 1):
            xyz = torch.from_numpy(self.origin + self.voxel * sample_places(places[part]).reshape(-1, 3))
            inside = ((xyz >= self.low) & (xyz <= self.high)).all(-1).nonzero()[:, 0]
            found = torch.full((len(xyz),), _MOST_LOG)
            sigmas = self.field.density(xyz[inside].float().to(self.device)).cpu() if len(inside) else found[:0]
            found[inside] = (self.threshold / sigmas.clamp(min=1e-30)).log().clamp(-_MOST_LOG, _MOST_LOG)
            out[part] = found.view(-1, SIDE, SIDE, SIDE).numpy()
        return out


def _contains(some: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[B] whether each of `places` [B, 3] is one of `some`."""
    wanted, held = ((p[:, 0] << 40) + (p[:, 1] << 20) + p[:, 2] for p in (places, some))
    return np.isin(wanted, held)


@torch.no_grad()
def field_colors(field: Field, vertices: NDArray[np.float64], normals: NDArray[np.float64]) -> NDArray[np.float64]:
    """[V, 3] display-referred: what a ray sees that meets the surface at `vertices` [V, 3], scene units, along its inward normal."""
    device = field.grid.aabb.device
    xyz, dirs = (torch.from_numpy(values).float().to(device) for values in (vertices, -normals))
    dirs = torch.where(dirs.norm(dim=-1, keepdim=True) > 0, dirs, dirs.new_tensor([0.0, 0.0, 1.0]))
    found: NDArray[np.float64] = field.query(xyz, dirs)[1].clamp(0, 1).double().cpu().numpy()
    return found
