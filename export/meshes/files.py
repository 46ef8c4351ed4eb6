"""Triangle meshes in files that other programs open: .glb, .ply, .obj, .stl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import EXPECTED_UP, Up
from prismfield.export.meshes.glb import glb_bytes, to_display
from prismfield.export.verify import write_verified

if TYPE_CHECKING:
    import trimesh

_LEAST_EXTENT = 1e-30  # of meshes, in user units
_SINGLE = 2e-6  # of the mesh's width that may be lost to single precision


@dataclass(frozen=True)
class MeshAsset:
    """Triangles, counter-clockwise seen from outside, with a colour at each corner or a texture."""

    noun: ClassVar = "surface"

    vertices: NDArray[np.float64]
    """[V, 3] user units."""
    faces: NDArray[np.int64]
    """[F, 3] rows of `vertices`."""
    colors: NDArray[np.float64]
    """[V, 4] red, green, blue (display-referred) and opacity, 0..1; white where a texture has the colours."""
    normals: NDArray[np.float64] | None = None
    """[V, 3] unit length; None: those of the faces around."""
    uvs: NDArray[np.float64] | None = None
    """[V, 2] places in the texture, 0..1, the origin at its lower left; None without one."""
    texture: NDArray[np.uint8] | None = None
    """[H, W, 3] display-referred, the first row on top."""
    up: Up | None = None
    """Unit vector against gravity, None where nobody knows."""

    def __len__(self) -> int:
        return len(self.faces)

    def differences(self, other: Self) -> dict[str, float]:
        """By how many `faces` they differ; how far their corners are apart, in widths of the mesh; and their `colors`, 0..1."""
        if len(self) != len(other):
            return {"faces": abs(len(self) - len(other)), "vertices": np.inf, "colors": np.inf}
        ours, theirs = (mesh.vertices[mesh.faces] for mesh in (self, other))
        width = np.ptp(self.vertices, 0).max(initial=_LEAST_EXTENT)
        pairs = [(self.colors[self.faces], other.colors[other.faces])]
        if self.uvs is not None:
            pairs += [] if other.uvs is None else [(self.uvs[self.faces], other.uvs[other.faces])]
        colors = max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs)
        if (self.uvs is None) != (other.uvs is None):
            colors = np.inf
        return {"faces": 0.0, "vertices": float(np.abs(ours - theirs).max(initial=0.0) / width), "colors": colors}


def write_mesh(path: Path, mesh: MeshAsset, *, unlit: bool = True) -> None:
    """Write a mesh; the suffix says how. Trimesh reads it back, and faces, corners and colours are compared, before it
    takes the name `path`.

    Args:
        path: ends in .glb (y is up there), .ply, .obj or .stl (in the user's frame).
        mesh: with a texture only for .glb.
        unlit: ask viewers of the .glb to show colours as they are.

    Raises:
        ValueError: there is nothing to write, or the suffix is not known or cannot hold it.
        OSError: the file could not be written, or came back different.
    """
    suffix = check_suffix(path, textured=mesh.texture is not None)
    if suffix == ".glb":
        turn = y_up(mesh.up).T
        normals = None if mesh.normals is None else mesh.normals @ turn
        mesh = replace(mesh, vertices=mesh.vertices @ turn, normals=normals, up=(0.0, 1.0, 0.0))
    write = _WRITERS[suffix]
    if suffix == ".glb" and not unlit:
        write = partial(_write_glb, unlit=False)
    if suffix in (".ply", ".stl"):
        _check_precision(path, mesh)
    # .stl has no colours. Elsewhere they are rounded to 8 bits at most.
    tolerances = {"faces": 0.0, "vertices": _SINGLE} | ({} if suffix == ".stl" else {"colors": 0.51 / 255})
    write_verified(path, mesh, write, lambda part: _read(part, suffix), tolerances)


def check_suffix(path: Path, *, textured: bool = False) -> str:
    """The suffix, in lower case.

    Raises:
        ValueError: no mesh can be written under that name, or none with a texture.
    """
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for a mesh; expected one of {', '.join(_WRITERS)}")
    if textured and suffix != ".glb":
        raise ValueError(f"{path}: a texture needs a .glb, got {path.suffix!r}")
    return suffix


def y_up(up: Up | None) -> NDArray[np.float64]:
    """[3, 3] the shortest rotation that takes `up` to +y; about x where `up` is -y, as between OpenCV's and OpenGL's axes."""
    source = np.array(up or EXPECTED_UP) / np.linalg.norm(up or EXPECTED_UP)
    axis, cos = np.cross(source, [0.0, 1.0, 0.0]), source[1]
    if cos < -1 + 1e-12:
        return np.diag([1.0, -1.0, -1.0])
    # Rodrigues' formula; (1 - cos) / sin^2 = 1 / (1 + cos)
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cos)


def _check_precision(path: Path, mesh: MeshAsset) -> None:
    width = np.ptp(mesh.vertices, 0).max(initial=0.0)
    if len(mesh) and np.abs(mesh.vertices).max() * 2.0**-24 > _SINGLE * width:
        raise ValueError(
            f"{path}: too far from the origin for the single precision of {path.suffix}; .glb and .obj have more"
        )


def _shape(mesh: MeshAsset, *, colored: bool = True) -> Any:
    import trimesh

    colors = np.rint(255 * mesh.colors).astype(np.uint8) if colored else None
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.normals, vertex_colors=colors, process=False)


def _write_glb(path: Path, mesh: MeshAsset, *, unlit: bool = True) -> None:
    path.write_bytes(
        glb_bytes(
            mesh.vertices,
            mesh.faces,
            mesh.colors if mesh.texture is None else None,
            normals=mesh.normals,
            uvs=mesh.uvs,
            texture=mesh.texture,
            unlit=unlit,
        )
    )


def _write_ply(path: Path, mesh: MeshAsset) -> None:
    path.write_bytes(_shape(mesh).export(file_type="ply", vertex_normal=mesh.normals is not None))


def _write_obj(path: Path, mesh: MeshAsset) -> None:
    width = max(float(np.ptp(mesh.vertices, 0).max()), _LEAST_EXTENT)
    digits = max(0, 9 - int(np.floor(np.log10(width))))
    path.write_text(_shape(mesh).export(file_type="obj", digits=digits, include_normals=mesh.normals is not None))


def _write_stl(path: Path, mesh: MeshAsset) -> None:
    path.write_bytes(_shape(mesh, colored=False).export(file_type="stl"))


_WRITERS: dict[str, Callable[[Path, MeshAsset], None]] = {
    ".glb": _write_glb,
    ".ply": _write_ply,
    ".obj": _write_obj,
    ".stl": _write_stl,
}


def _read(path: Path, suffix: str) -> MeshAsset:
    """What trimesh finds in a file, for comparison."""
    import trimesh

    with path.open("rb") as file:
        loaded: Any = trimesh.load(file, file_type=suffix[1:], process=False)
    if not isinstance(loaded, trimesh.Scene):
        return MeshAsset(_doubles(loaded.vertices), np.asarray(loaded.faces, np.int64), _colors(loaded))
    (node,) = loaded.graph.nodes_geometry
    place, name = loaded.graph[node]
    shape = loaded.geometry[name]
    vertices = _doubles(shape.vertices) @ place[:3, :3].T + place[:3, 3]
    uvs = getattr(shape.visual, "uv", None)
    colors = _colors(shape)
    colors[:, :3] = to_display(colors[:, :3])
    return MeshAsset(vertices, np.asarray(shape.faces, np.int64), colors, uvs=None if uvs is None else _doubles(uvs))


def _colors(shape: trimesh.Trimesh) -> NDArray[np.float64]:
    """[V, 4] 0..1, white where there are none."""
    attributes = getattr(shape.visual, "vertex_attributes", {})
    found = attributes["color"] if "color" in attributes else getattr(shape.visual, "vertex_colors", None)
    if found is None or len(found) != len(shape.vertices):
        return np.ones((len(shape.vertices), 4))
    found = np.asarray(found)
    whole = np.iinfo(found.dtype).max if found.dtype.kind in "ui" else 1
    rgba = np.ones((len(found), 4))
    rgba[:, : found.shape[1]] = found / whole
    return rgba


def _doubles(values: NDArray) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)
