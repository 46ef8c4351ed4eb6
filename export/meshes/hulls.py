"""Convexes as a mesh (.glb, .obj): the hull of each one's points, for programs that know triangles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError

from prismfield.export.assets import ConvexAsset
from prismfield.export.meshes.files import MeshAsset, write_mesh
from prismfield.render.ops.sh import C0


class HullMesh(MeshAsset):
    """Of the hulls of convexes."""

    noun: ClassVar = "hulls"


def hull_mesh(asset: ConvexAsset) -> tuple[HullMesh, int]:
    """The hull of each convex, in its colour seen from everywhere alike (harmonics of degree 0).

    A convex of three points is a triangle with two sides.

    Returns:
        The mesh, in the user's frame, and how many convexes were left out because they are flat.
    """
    count, points = asset.points.shape[:2]
    corners = asset.points.astype(np.float64)
    faces, left_out = [], 0
    for index in range(count):
        try:
            own = _triangle(corners[index]) if points == 3 else _hull(corners[index])
        except QhullError:
            left_out += 1
            continue
        faces.append(own + index * points)
    used, rows = np.unique(np.concatenate(faces) if faces else np.zeros((0, 3), int), return_inverse=True)
    rgb = (0.5 + C0 * asset.sh[:, 0].astype(np.float64)).clip(0, 1)
    colors = np.concatenate([rgb, asset.opacities[:, None]], 1)
    mesh = HullMesh(corners.reshape(-1, 3)[used], rows.reshape(-1, 3), colors[used // points], up=asset.up)
    return mesh, left_out


def write_glb(path: Path, asset: ConvexAsset) -> str:
    """Write binary glTF: y is up, vertex colours are linear RGBA and blended.

    It is read back, and faces, corners and colours compared, before it takes the name `path`.

    Returns:
        What it holds, in words.

    Raises:
        ValueError: there is no hull to write.
        OSError: the file could not be written, or came back different.
    """
    return _write(path, *hull_mesh(asset))


def write_obj(path: Path, asset: ConvexAsset) -> str:
    """Write .obj in the user's frame, with display-referred RGB at each vertex; the format has no opacity there.

    Read back and compared, and returns and raises, as `write_glb`.
    """
    mesh, left_out = hull_mesh(asset)
    opaque = np.concatenate([mesh.colors[:, :3], np.ones((len(mesh.colors), 1))], 1)
    return _write(path, replace(mesh, colors=opaque), left_out)


def _write(path: Path, mesh: HullMesh, left_out: int) -> str:
    write_mesh(path, mesh, unlit=False)
    flat = f"; {left_out:,} convexes are flat and left out" if left_out else ""
    return f"{len(mesh):,} faces, {len(mesh.vertices):,} vertices{flat}"


def _triangle(corners: NDArray) -> NDArray:
    if not np.cross(corners[1] - corners[0], corners[2] - corners[0]).any():
        raise QhullError("three points in a row")
    return np.array([[0, 1, 2], [0, 2, 1]])


def _hull(corners: NDArray) -> NDArray:
    """[F, 3] triangles, counter-clockwise from outside, of points [K, 3]."""
    hull = ConvexHull(corners - corners[0])
    a, b, c = (corners[hull.simplices[:, i]] for i in range(3))
    inwards = (np.cross(b - a, c - a) * hull.equations[:, :3]).sum(1) < 0
    return np.where(inwards[:, None], hull.simplices[:, ::-1], hull.simplices)
