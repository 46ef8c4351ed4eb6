"""Convexes as a mesh (.glb, .obj): the hull of each one's points, for programs that know triangles. Through trimesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError

from prismfield.export.assets import EXPECTED_UP, ConvexAsset, Up
from prismfield.export.verify import write_verified
from prismfield.render.ops.sh import C0

_LEAST_EXTENT = 1e-30  # of hulls, in user units
_TOLERANCES = {"faces": 0.0, "vertices": 1e-6}


@dataclass(frozen=True)
class MeshAsset:
    """Triangles, counter-clockwise seen from outside, with a colour at each corner."""

    noun: ClassVar = "hulls"

    vertices: NDArray[np.float64]
    """[V, 3]."""
    faces: NDArray[np.int64]
    """[F, 3] rows of `vertices`."""
    colors: NDArray[np.float64]
    """[V, 4] red, green, blue (display-referred) and opacity, 0..1."""

    def __len__(self) -> int:
        return len(self.faces)

    def differences(self, other: Self) -> dict[str, float]:
        """By how many `faces` they differ; and how far their corners are apart, in widths of the mesh."""
        if len(self) != len(other):
            return {"faces": abs(len(self) - len(other)), "vertices": np.inf}
        ours, theirs = (mesh.vertices[mesh.faces] for mesh in (self, other))
        width = np.ptp(self.vertices, 0).max()
        return {"faces": 0.0, "vertices": float(np.abs(ours - theirs).max() / max(width, _LEAST_EXTENT))}


def hull_mesh(asset: ConvexAsset) -> tuple[MeshAsset, int]:
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
    return MeshAsset(corners.reshape(-1, 3)[used], rows.reshape(-1, 3), colors[used // points]), left_out


def write_glb(path: Path, asset: ConvexAsset) -> str:
    """Write binary glTF: y is up, vertex colours are linear RGBA and blended.

    It is read back, and faces and corners compared, before it takes the name `path`.

    Returns:
        What it holds, in words.

    Raises:
        ValueError: there is no hull to write, or trimesh is not installed.
        OSError: the file could not be written, or came back different.
    """
    mesh, left_out = hull_mesh(asset)
    mesh = MeshAsset(mesh.vertices @ y_up(asset.up).T, mesh.faces, mesh.colors)
    write_verified(path, mesh, _write_glb, _reader("glb"), _TOLERANCES)
    return _in_words(mesh, left_out)


def write_obj(path: Path, asset: ConvexAsset) -> str:
    """Write .obj in the user's frame, with display-referred RGB at each vertex; the format has no opacity there.

    Read back and compared, and returns and raises, as `write_glb`.
    """
    mesh, left_out = hull_mesh(asset)
    write_verified(path, mesh, _write_obj, _reader("obj"), _TOLERANCES)
    return _in_words(mesh, left_out)


def y_up(up: Up | None) -> NDArray[np.float64]:
    """[3, 3] the shortest rotation that takes `up` to +y; about x where `up` is -y, as between OpenCV's and OpenGL's axes."""
    source = np.array(up or EXPECTED_UP) / np.linalg.norm(up or EXPECTED_UP)
    axis, cos = np.cross(source, [0.0, 1.0, 0.0]), source[1]
    if cos < -1 + 1e-12:
        return np.diag([1.0, -1.0, -1.0])
    # Rodrigues' formula; (1 - cos) / sin^2 = 1 / (1 + cos)
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cos)


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


def _in_words(mesh: MeshAsset, left_out: int) -> str:
    flat = f"; {left_out:,} convexes are flat and left out" if left_out else ""
    return f"{len(mesh):,} faces, {len(mesh.vertices):,} vertices{flat}"


def _trimesh() -> ModuleType:
    try:
        import trimesh
    except ImportError as error:
        raise ValueError("meshes need trimesh, which is not installed: pip install 'prismfield[meshes]'") from error
    return trimesh


def _write_glb(path: Path, mesh: MeshAsset) -> None:
    trimesh = _trimesh()
    material = trimesh.visual.material.PBRMaterial(alphaMode="BLEND", metallicFactor=0.0, roughnessFactor=1.0)
    visual = trimesh.visual.TextureVisuals(material=material)
    rgb, alpha = mesh.colors[:, :3], mesh.colors[:, 3:]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)  # sRGB, IEC 61966-2-1
    visual.vertex_attributes["color"] = np.rint(255 * np.concatenate([linear, alpha], 1)).astype(np.uint8)
    # Vertices are float32: where the origin is far away, a node has to hold the way there.
    place = np.eye(4)
    place[:3, 3] = np.median(mesh.vertices, 0)
    shape = trimesh.Trimesh(mesh.vertices - place[:3, 3], mesh.faces, visual=visual, process=False)
    scene = trimesh.Scene()
    scene.add_geometry(shape, node_name="convexes", geom_name="convexes", transform=place)
    path.write_bytes(scene.export(file_type="glb"))


def _write_obj(path: Path, mesh: MeshAsset) -> None:
    trimesh = _trimesh()
    colors = np.rint(255 * mesh.colors).astype(np.uint8)
    shape = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colors, process=False)
    width = max(float(np.ptp(mesh.vertices, 0).max()), _LEAST_EXTENT)
    digits = max(0, 9 - int(np.floor(np.log10(width))))
    path.write_text(shape.export(file_type="obj", digits=digits))


def _reader(file_type: str) -> Callable[[Path], MeshAsset]:
    """What reads such a file back, for comparison: without colours."""

    def read(path: Path) -> MeshAsset:
        trimesh = _trimesh()
        with path.open("rb") as file:
            loaded = trimesh.load(file, file_type=file_type, process=False)
        if isinstance(loaded, trimesh.Scene):
            (node,) = loaded.graph.nodes_geometry
            place, name = loaded.graph[node]
            shape = loaded.geometry[name]
            vertices = shape.vertices @ place[:3, :3].T + place[:3, 3]
        else:
            shape, vertices = loaded, loaded.vertices
        colors = np.ones((len(vertices), 4))
        return MeshAsset(np.asarray(vertices, np.float64), np.asarray(shape.faces, np.int64), colors)

    return read
