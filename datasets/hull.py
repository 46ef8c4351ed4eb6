"""The visual hull of an object before a transparent background: where every camera sees something opaque."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.views import Views

Array = NDArray[np.float32]

_COARSEST = 32  # cells a side of the bounds at the first level
_VIEWS = 48  # silhouettes used, evenly spread over the capture
_FINE = 4.0  # pixels across a cell that is small enough if there are cells enough
_FINEST = 1.5  # pixels across a cell that is not divided any more
_SHADE_BIN = 3  # pixels a side of the depth buffer that decides which views see a cell


@dataclass(frozen=True)
class _Silhouette:
    """One view: signed distance to the outline in pixels, positive inside, and colours."""

    distance: NDArray[np.float32]
    rgb: NDArray[np.uint8]
    focal: float
    projection: NDArray[np.float32]
    """[3, 4] scene to homogeneous pixels."""

    def project(self, xyz: Array) -> tuple[Array, NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
        """Camera z, column and row of each position (clipped to the image) and whether it lies inside."""
        u, v, z = self.projection[:, :3] @ xyz.T + self.projection[:, 3:]
        height, width = self.distance.shape
        inside = (z > 1e-6) & (u >= 0) & (u < width * z) & (v >= 0) & (v < height * z)
        reciprocal = np.where(inside, 1 / np.maximum(z, 1e-6), 0)
        column = np.minimum((u * reciprocal).astype(np.int32), width - 1)
        row = np.minimum((v * reciprocal).astype(np.int32), height - 1)
        return np.maximum(z, 1e-6), column, row, inside


def hull_points(views: Views, aabb: NDArray, count: int, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """Random points on the surface of the visual hull, with colours of the views that see them.

    Args:
        views: with alpha, in the scene frame.
        aabb: [2, 3] bounds of the object.
        count: how many points.
        seed: of their places.

    Returns:
        Positions [P, 3] and colours [P, 3]; none at all where the silhouettes do not agree on anything.
    """
    random = np.random.default_rng(seed)
    chosen = np.unique(np.linspace(0, len(views) - 1, min(_VIEWS, len(views))).round().astype(int))
    silhouettes = [s for s in (_silhouette(views, int(i)) for i in chosen) if s is not None]
    low = aabb[0].astype(np.float32)
    size = (aabb[1] - aabb[0]).astype(np.float32) / _COARSEST
    grid = np.stack(np.meshgrid(*[np.arange(_COARSEST)] * 3, indexing="ij"), -1).reshape(-1, 3)
    cells = low + (grid + np.float32(0.5)) * size
    surface = cells[:0]
    while silhouettes:
        depth_inside = _depth_inside(cells, silhouettes, float(np.linalg.norm(size)) / 2)
        surface = cells[np.abs(depth_inside) <= 1]
        if len(surface) == 0:
            break
        width = _pixels(surface, silhouettes[0], size)
        if (width < _FINE and len(surface) >= count / 2) or width < _FINEST:
            break
        corners = np.stack(np.meshgrid(*[(-0.25, 0.25)] * 3, indexing="ij"), -1).reshape(1, 8, 3).astype(np.float32)
        cells = (surface[:, None] + corners * size).reshape(-1, 3)
        size = size / 2
    if len(surface) == 0:
        return surface, np.empty((0, 3), np.uint8)
    picked = random.choice(len(surface), count, replace=len(surface) < count)
    xyz = surface[picked] + (random.random((count, 3), np.float32) - 0.5) * size
    return xyz, _shade(xyz, silhouettes, 2 * float(np.linalg.norm(size)))


def _silhouette(views: Views, index: int) -> _Silhouette | None:
    view = views[index]
    if view.alpha is None:
        return None
    opaque = (view.alpha.numpy() > (127 if view.alpha.numpy().dtype == np.uint8 else 0.5)).astype(np.uint8)
    inner, outer = (cv2.distanceTransform(x, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for x in (opaque, 1 - opaque))
    if not opaque.any():
        outer = np.full(opaque.shape, 1e6, np.float32)
    rgb = view.rgb.numpy()
    if rgb.dtype != np.uint8:
        rgb = (rgb * 255 + 0.5).astype(np.uint8)
    projection = (view.camera.Ks[0] @ view.camera.viewmats[0, :3]).numpy()
    return _Silhouette(
        np.where(opaque, inner, -outer).astype(np.float32), rgb, float(view.camera.Ks[0, 0, 0]), projection
    )


def _depth_inside(cells: Array, silhouettes: list[_Silhouette], radius: float) -> Array:
    """Depth of each cell's centre inside the hull, in radii of the cell as each view sees it: above 1 wholly inside."""
    depth = np.full(len(cells), np.inf, np.float32)
    for silhouette in silhouettes:
        open_cells = np.flatnonzero(depth >= -1)  # the others are outside whatever the next views say
        z, column, row, seen = silhouette.project(cells[open_cells])
        pixels = radius * silhouette.focal / z
        here = np.where(seen, silhouette.distance[row, column] / np.maximum(pixels, 1), np.float32(np.inf))
        depth[open_cells] = np.minimum(depth[open_cells], here)
    return np.where(np.isfinite(depth), depth, -np.inf)  # seen by no view


def _pixels(cells: Array, silhouette: _Silhouette, size: Array) -> float:
    """Width of a cell in pixels."""
    z, *_ = silhouette.project(cells[:1000])
    return float(np.max(size)) * silhouette.focal / float(np.median(z))


def _shade(xyz: Array, silhouettes: list[_Silhouette], slack: float) -> NDArray[np.uint8]:
    """Mean colour over the views in which a point is not hidden behind another by more than `slack`."""
    total, seen_by = np.zeros((len(xyz), 3)), np.zeros(len(xyz))
    for silhouette in silhouettes:
        z, column, row, seen = silhouette.project(xyz)
        seen &= silhouette.distance[row, column] > 0
        bins = (row // _SHADE_BIN) * (silhouette.distance.shape[1] // _SHADE_BIN + 1) + column // _SHADE_BIN
        front = np.full(int(bins.max()) + 1, np.inf)
        np.minimum.at(front, bins[seen], z[seen])
        seen &= z <= front[bins] + slack
        total[seen] += silhouette.rgb[row[seen], column[seen]]
        seen_by += seen
    grey = np.full((len(xyz), 3), 128.0)
    mean = np.divide(total, seen_by[:, None], out=grey, where=seen_by[:, None] > 0)
    return (mean + 0.5).astype(np.uint8)
