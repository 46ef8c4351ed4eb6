"""Triangle meshes for the bundled garden: lathe, tube, bevelled block, leaves. NumPy only, metres, +z up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Color = tuple[float, float, float]
"""sRGB, 0..1."""


@dataclass(frozen=True)
class Mesh:
    """Triangles with texture coordinates or with a colour per vertex."""

    vertices: Array
    """[V, 3] metres."""
    faces: NDArray[np.int64]
    """[F, 3] counter-clockwise seen from outside."""
    uvs: Array | None = None
    """[V, 2], 0..1 over a bitmap whose first row is v = 1."""
    colors: Array | None = None
    """[V, 3] linear RGB albedo."""
    normals: Array | None = None
    """[V, 3] unit, for smooth shading; None: flat."""

    def moved(self, rotation: Array | None = None, offset: ArrayLike = (0.0, 0.0, 0.0)) -> Mesh:
        """The mesh rotated about the origin and then translated."""
        turn = np.eye(3) if rotation is None else rotation
        normals = None if self.normals is None else self.normals @ turn.T
        return replace(self, vertices=self.vertices @ turn.T + np.asarray(offset), normals=normals)

    def painted(self, color: Color) -> Mesh:
        """The mesh in one colour, without texture coordinates."""
        return replace(self, uvs=None, colors=np.tile(to_linear(color), (len(self.vertices), 1)))


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh from several with the same attributes."""
    first = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])

    def joined(name: str) -> Array | None:
        parts = [getattr(mesh, name) for mesh in meshes]
        missing = sum(part is None for part in parts)
        if 0 < missing < len(parts):
            raise ValueError(f"merge: {missing} of {len(parts)} meshes lack {name}")
        return None if missing else np.concatenate(parts)

    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, first, strict=True)]),
        joined("uvs"),
        joined("colors"),
        joined("normals"),
    )


def to_linear(color: ArrayLike) -> Array:
    """Linear RGB of sRGB values in 0..1."""
    c = np.clip(np.asarray(color, dtype=float), 0.0, 1.0)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def unit(v: Array) -> Array:
    """Vectors of length one along the last axis."""
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


def turn_z(angle: float) -> Array:
    """[3, 3] rotation about +z by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def tip_frame(direction: Array) -> tuple[Array, Array]:
    """Two unit vectors across each of [N, 3] directions."""
    side = unit(np.cross(direction, np.where(np.abs(direction[..., 2:]) < 0.9, [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])))
    return side, np.cross(direction, side)


def random_directions(rng: np.random.Generator, count: int) -> Array:
    """[count, 3] uniform on the sphere."""
    return unit(rng.normal(size=(count, 3)))


def tinted(rng: np.random.Generator, palette: Sequence[Color], count: int, spread: float = 0.12) -> Array:
    """[count, 3] linear colours: one of the palette each, its brightness varied by `spread` (standard deviation)."""
    chosen = to_linear(np.asarray(palette))[rng.integers(len(palette), size=count)]
    return np.clip(chosen * np.exp(rng.normal(0.0, spread, (count, 1)) + rng.normal(0.0, spread / 3, (count, 3))), 0, 1)


def _grid_faces(rows: int, columns: int, wrap: bool) -> NDArray[np.int64]:
    """Triangles of a rows x columns vertex grid; `wrap` joins the last column to the first."""
    across = columns if wrap else columns - 1
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(across), indexing="ij")
    k = (j + 1) % columns
    a, b, c, d = i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j
    return np.stack([np.stack([a, b, c], -1), np.stack([a, c, d], -1)], 2).reshape(-1, 3)


def curve(points: ArrayLike, count: int) -> Array:
    """[count, D] samples of the Catmull-Rom spline through [P, D] points, ends included."""
    p = np.asarray(points, dtype=float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    at = np.linspace(0, len(p) - 3, count)
    k = np.minimum(at.astype(int), len(p) - 4)
    t = (at - k)[:, None]
    a, b, c, d = p[k], p[k + 1], p[k + 2], p[k + 3]
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


def lathe(profile: ArrayLike, segments: int = 48, uv_turns: float = 1.0) -> Mesh:
    """A surface of revolution about +z with smooth normals.

    Args:
        profile: [P, 2] radius and height, upwards for an outer wall.
        segments: vertices around.
        uv_turns: how often the texture repeats around.
    """
    points = np.asarray(profile, dtype=float)
    slope = np.gradient(points, axis=0)
    phi = np.linspace(0.0, 2 * np.pi, segments + 1)
    ring = np.stack([np.cos(phi), np.sin(phi)], -1)
    vertices = np.empty((len(points), segments + 1, 3))
    vertices[..., :2] = points[:, None, :1] * ring
    vertices[..., 2] = points[:, None, 1]
    normals = np.empty_like(vertices)
    normals[..., :2] = slope[:, None, 1:] * ring
    normals[..., 2] = -slope[:, None, 0]
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    u, v = np.meshgrid(phi / (2 * np.pi) * uv_turns, along / along[-1])
    faces = _grid_faces(len(points), segments + 1, wrap=False)
    at_pole = (points[faces // (segments + 1), 0] < 1e-9).sum(1) > 1  # two corners on the axis: no area
    uvs = np.stack([u, v], -1).reshape(-1, 2)
    return Mesh(vertices.reshape(-1, 3), faces[~at_pole], uvs, None, unit(normals.reshape(-1, 3)))


def tube(path: ArrayLike, radius: ArrayLike, segments: int = 8) -> Mesh:
    """A tube around a polyline, open at its ends, smooth across and along.

    Args:
        path: [P, 3] centre line.
        radius: one value, or [P].
        segments: vertices around.
    """
    line = np.asarray(path, dtype=float)
    radii = np.broadcast_to(np.asarray(radius, dtype=float), (len(line),))
    forward = unit(np.gradient(line, axis=0))
    helper = np.eye(3)[int(np.argmin(np.abs(forward).max(0)))]
    side = unit(np.cross(forward, helper))
    up = np.cross(side, forward)
    phi = np.linspace(0.0, 2 * np.pi, segments, endpoint=False)
    normals = -np.cos(phi)[None, :, None] * side[:, None] + np.sin(phi)[None, :, None] * up[:, None]
    vertices = line[:, None] + radii[:, None, None] * normals
    v, u = np.meshgrid(np.linspace(0, 1, len(line)), phi / (2 * np.pi), indexing="ij")
    faces = _grid_faces(len(line), segments, wrap=True)
    return Mesh(vertices.reshape(-1, 3), faces, np.stack([u, v], -1).reshape(-1, 2), None, normals.reshape(-1, 3))


def block(outline: ArrayLike, bottom: float, top: float, bevel: float, uvs: ArrayLike) -> Mesh:
    """A prism over a convex counter-clockwise outline, its upper edge bevelled; no floor.

    Args:
        outline: [P, 2] x and y.
        bottom: height of the lower edge.
        top: height of the upper face.
        bevel: how far the upper face is drawn in, and down.
        uvs: [P, 2] texture coordinates of the outline; walls repeat those of the rim.
    """
    xy, uv = np.asarray(outline, dtype=float), np.asarray(uvs, dtype=float)
    count, centre = len(xy), np.asarray(outline, dtype=float).mean(0)
    reach = np.linalg.norm(xy - centre, axis=1, keepdims=True)
    inner = xy + (centre - xy) * np.minimum(bevel / np.maximum(reach, 1e-9), 0.5)
    heights = (bottom, top - bevel, top)
    rings = [np.column_stack([p, np.full(count, z)]) for p, z in zip((xy, xy, inner), heights, strict=True)]
    walls = _grid_faces(3, count, wrap=True)
    lid = np.stack([np.full(count - 2, 0), np.arange(1, count - 1), np.arange(2, count)], -1) + 3 * count
    vertices = np.concatenate([*rings, rings[2]])
    return Mesh(vertices, np.concatenate([walls, lid]), np.tile(uv, (4, 1)))


def box(size: ArrayLike, uv_cell: ArrayLike = (0.0, 0.0, 1.0, 1.0), bevel: float = 0.0) -> Mesh:
    """A box centred at the origin; each face shows the texture cell (u0, v0, u1, v1), its long side along u.

    A small `bevel` pulls the corners of every face in, which catches the light like a worn edge.
    """
    half = np.asarray(size, dtype=float) / 2
    u0, v0, u1, v1 = np.asarray(uv_cell, dtype=float)
    parts = []
    for axis in range(3):
        others = sorted((k for k in range(3) if k != axis), key=lambda k: -half[k])
        for sign in (-1.0, 1.0):
            a, b = others
            corners = np.zeros((8, 3))
            for k, (s, t) in enumerate([(-1, -1), (1, -1), (1, 1), (-1, 1)]):
                corners[k, a], corners[k, b], corners[k, axis] = (
                    s * (half[a] - bevel),
                    t * (half[b] - bevel),
                    sign * half[axis],
                )
                corners[k + 4, a], corners[k + 4, b] = s * half[a], t * half[b]
                corners[k + 4, axis] = sign * (half[axis] - bevel)
            # A bevelled corner is shared by three faces only approximately: the faces meet in the middle of the slope.
            corners[4:, [a, b]] = (corners[:4, [a, b]] + corners[4:, [a, b]]) / 2
            corners[4:, axis] = sign * (half[axis] - bevel / 2)
            uv = np.tile(np.array([[u0, v0], [u1, v0], [u1, v1], [u0, v1]]), (2, 1))
            faces = [(0, 1, 2), (0, 2, 3)]
            if bevel > 0:
                for k in range(4):
                    n = (k + 1) % 4
                    faces += [(k + 4, n + 4, n), (k + 4, n, k)]
            order = np.asarray(faces)
            if np.linalg.det(np.stack([np.eye(3)[a], np.eye(3)[b], sign * np.eye(3)[axis]])) < 0:
                order = order[:, ::-1]
            parts.append(Mesh(corners, order, uv))
    return merge(parts)


def leaves(
    base: Array,
    along: Array,
    facing: Array,
    length: ArrayLike,
    width: ArrayLike,
    bend: ArrayLike,
    colors: Array,
    segments: int = 3,
) -> Mesh:
    """Pointed leaves that curl away from the side they face; `2 * segments - 2` triangles each.

    Args:
        base: [N, 3] where each is attached.
        along: [N, 3] from the base to the tip.
        facing: [N, 3] roughly the normal of the upper side.
        length: [N] or one value.
        width: [N] or one value, at the widest point.
        bend: [N] or one value: how far the tip sinks, in lengths.
        colors: [N, 3] linear; the tip is drawn a little lighter than the base.
        segments: pieces along the length.
    """
    count = len(base)
    grow = unit(along)
    side = unit(np.cross(facing, grow))
    normal = np.cross(grow, side)
    size = np.broadcast_to(np.asarray(length, dtype=float), (count,))[:, None]
    half = np.broadcast_to(np.asarray(width, dtype=float), (count,))[:, None] / 2
    sink = np.broadcast_to(np.asarray(bend, dtype=float), (count,))[:, None]

    def at(t: float, across: float) -> Array:
        reach = t * (1 - 0.35 * np.minimum(sink, 1) ** 2 * t)
        return base + size * (grow * reach - normal * sink * t * t) + side * half * across

    steps = np.linspace(0, 1, segments + 1)
    corners, shade = [at(0.0, 0.0)], [0.72]
    for t in steps[1:-1]:
        wide = float(np.sin(np.pi * t**0.8) ** 0.8)
        corners += [at(float(t), -wide), at(float(t), wide)]
        shade += [0.8 + 0.3 * t] * 2
    corners.append(at(1.0, 0.0))
    shade.append(1.12)
    pattern = [(0, 2, 1)]
    for k in range(1, segments - 1):
        left = 2 * k - 1
        pattern += [(left, left + 1, left + 3), (left, left + 3, left + 2)]
    last = 2 * segments - 1
    pattern.append((last - 2, last - 1, last))
    tones = np.clip(colors[:, None] * np.asarray(shade)[:, None], 0, 1)
    return _stamp(np.stack(corners, 1), np.asarray(pattern), tones)


def kites(base: Array, along: Array, facing: Array, length: ArrayLike, width: ArrayLike, colors: Array) -> Mesh:
    """Leaves of two triangles, folded along the midrib: foliage that is seen from far. Arguments as for `leaves`."""
    count = len(base)
    grow = unit(along)
    side = unit(np.cross(facing, grow))
    normal = np.cross(grow, side)
    size = np.broadcast_to(np.asarray(length, dtype=float), (count,))[:, None]
    half = np.broadcast_to(np.asarray(width, dtype=float), (count,))[:, None] / 2
    middle = base + grow * size * 0.45 + normal * half * 0.35
    corners = np.stack([base, middle + side * half, base + grow * size, middle - side * half], 1)
    return _stamp(corners, np.array([[0, 1, 2], [0, 2, 3]]), np.repeat(colors[:, None], 4, 1))


def _stamp(corners: Array, pattern: NDArray[np.int64], colors: Array) -> Mesh:
    """One mesh from [N, K, 3] corners that all share a face pattern."""
    count, each = corners.shape[:2]
    faces = (pattern[None] + each * np.arange(count)[:, None, None]).reshape(-1, 3)
    return Mesh(corners.reshape(-1, 3), faces, None, colors.reshape(-1, 3))
