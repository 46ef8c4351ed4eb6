"""A mesh cleaned and measured: small parts, decimation, holes, colours from views."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from prismfield.export.meshes.fusion import View

_AT_ONCE = 1 << 20  # positions

Vertices = NDArray[np.float64]
Faces = NDArray[np.int64]


def largest_parts(vertices: Vertices, faces: Faces, least: float) -> tuple[Vertices, Faces, int]:
    """Without the connected parts whose area is below the share `least` of the largest part's.

    Returns:
        Vertices [V, 3] and faces [F, 3] of what is left, and how many parts went.
    """
    pairs = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs), bool), tuple(pairs.T)), shape=(len(vertices), len(vertices)))
    _, labels = connected_components(graph, directed=False)
    of_face = labels[faces[:, 0]]
    sizes = np.bincount(of_face, areas(vertices, faces), minlength=labels.max(initial=-1) + 1)
    there = np.bincount(of_face, minlength=len(sizes)) > 0
    kept = there & (sizes >= least * sizes.max(initial=0.0))
    return *compact(vertices, faces[kept[of_face]]), int(there.sum() - kept.sum())


def decimated(vertices: Vertices, faces: Faces, count: int) -> tuple[Vertices, Faces]:
    """About `count` faces: edges collapse where that moves the surface least (Garland and Heckbert 1997), as
    fast-simplification does it."""
    if count >= len(faces):
        return vertices, faces
    from fast_simplification import simplify

    middle = vertices.mean(0)  # it works in single precision
    scale = np.ptp(vertices, 0).max()
    found, rows = simplify(((vertices - middle) / scale).astype(np.float32), faces.astype(np.int32), target_count=count)
    return compact(found.astype(np.float64) * scale + middle, rows.astype(np.int64))


def compact(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """Without vertices that no face has, and without faces that have a vertex twice."""
    whole = (faces != np.roll(faces, 1, 1)).all(1)
    used, rows = np.unique(faces[whole], return_inverse=True)
    return vertices[used], rows.reshape(-1, 3).astype(np.int64)


def open_edges(faces: Faces) -> int:
    """How many edges do not lie between exactly two faces that agree which side is out; 0 says that it is watertight."""
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    most = int(faces.max(initial=0)) + 1
    keys, back = edges[:, 0] * most + edges[:, 1], edges[:, 1] * most + edges[:, 0]
    unique, counts = np.unique(keys, return_counts=True)
    at = np.searchsorted(unique, back).clip(max=max(len(unique) - 1, 0))
    return int(((unique[at] != back) | (counts[at] != 1)).sum()) if len(keys) else 0


def areas(vertices: Vertices, faces: Faces) -> NDArray[np.float64]:
    """[F]."""
    return 0.5 * np.linalg.norm(_crosses(vertices, faces), axis=1)


def vertex_normals(vertices: Vertices, faces: Faces) -> NDArray[np.float64]:
    """[V, 3] unit length: the mean of the faces around, by their areas; zero where they cancel out."""
    crosses = _crosses(vertices, faces)
    sums = np.stack(
        [np.bincount(faces.reshape(-1), np.repeat(crosses[:, i], 3), minlength=len(vertices)) for i in range(3)], 1
    )
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(lengths > 0, lengths, 1)


def colors_from_views(
    positions: Vertices, normals: NDArray[np.float64], views: Iterable[View], tolerance: float
) -> NDArray[np.float64]:
    """Colour of each position, as the views that see it have it, those from the front the most.

    Args:
        positions: [P, 3] in the frame of the views.
        normals: [P, 3] unit length.
        views: pictures and depths.
        tolerance: by how much a position may be behind what a view sees there, world units.

    Returns:
        [P, 3] display-referred, 0..1; what no view sees takes the colour of the nearest position that one sees, and grey
        where there is none.
    """
    sums, weights = torch.zeros(len(positions), 3), torch.zeros(len(positions))
    xyz, out = torch.from_numpy(positions), torch.from_numpy(normals).float()
    for view in views:
        for part in torch.arange(len(positions)).split(_AT_ONCE):
            rows, weight, color = _seen(view, xyz[part], out[part], tolerance)
            sums.index_add_(0, part[rows], weight[:, None] * color)
            weights.index_add_(0, part[rows], weight)
    has = (weights > 0).numpy()
    colors = (sums / (255 * weights.clamp(min=1e-12))[:, None]).double().numpy()
    if not has.any():
        return np.full_like(colors, 0.5)
    if not has.all():
        colors[~has] = colors[has][cKDTree(positions[has]).query(positions[~has])[1]]
    return colors


def _seen(view: View, xyz: Tensor, normals: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `xyz` [P, 3] that lie in a view, their weights and their colours there, 0..255."""
    camera, depth, rgb = view
    viewmat, K = camera.viewmats[0].double(), camera.Ks[0].double()
    local = xyz @ viewmat[:3, :3].T + viewmat[:3, 3]
    z = local[:, 2].clamp(min=1e-9)
    u, v = local[:, 0] / z * K[0, 0] + K[0, 2], local[:, 1] / z * K[1, 1] + K[1, 2]
    inside = (local[:, 2] > 0) & (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    rows = inside.nonzero()[:, 0]
    column, row = u[rows].long(), v[rows].long()
    seen = depth[row, column]
    towards = torch.nn.functional.normalize(camera.centers[0].double() - xyz[rows], dim=-1).float()
    weight = (towards * normals[rows]).sum(-1).clamp(min=0).square()
    weight = torch.where((seen > 0) & (local[rows, 2] <= seen + tolerance), weight, 0.0)
    return rows, weight, rgb[row, column].float()


def _crosses(vertices: Vertices, faces: Faces) -> NDArray[np.float64]:
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.cross(b - a, c - a)
