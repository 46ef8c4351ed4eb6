"""A scalar on a sparse regular grid, and the surface where it changes its sign: marching cubes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIDE = 8
"""Samples along an edge of a brick."""
MOST = 1 << 20
"""Samples along an axis of the whole grid, so that an edge has a number of 62 bits."""

_AT_ONCE = 2048  # bricks
_LEAST_SHARE = 1e-3  # of an edge: nearer to its ends, faces would have no area
_CORNERS = np.array([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(8)])
_EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> axis & 1]


@dataclass(frozen=True)
class Bricks:
    """B cubes of 8 x 8 x 8 samples of a regular grid."""

    origin: NDArray[np.float64]
    """[3] where sample (0, 0, 0) of the grid is."""
    voxel: float
    """Distance of the samples."""
    places: NDArray[np.int64]
    """[B, 3] not negative, each once: the first sample of brick b is number 8 `places[b]` along each axis."""
    values: NDArray[np.float32]
    """[B, 8, 8, 8] along x, y, z: negative inside, NaN where nothing is known."""

    def __post_init__(self) -> None:
        count = len(self.places)
        if self.places.shape != (count, 3) or self.values.shape != (count, SIDE, SIDE, SIDE):
            expected = f"expected [B, 3] and [B, {SIDE}, {SIDE}, {SIDE}]"
            raise ValueError(f"places, values: {expected}, got {self.places.shape} and {self.values.shape}")
        if count and (self.places.min() < 0 or self.places.max() >= MOST // SIDE):
            raise ValueError(f"places: expected 0 to {MOST // SIDE - 1}, got {self.places.min()}..{self.places.max()}")


def sample_places(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B, 8, 8, 8, 3] numbers of the samples of bricks at `places` [B, 3]."""
    axis = np.arange(SIDE)
    within = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return places[:, None, None, None] * SIDE + within


def unique_places(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each row of [P, 3] once, in order."""
    return _unpack(np.unique(_pack(places)))


def grown(places: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bricks at `places` [B, 3] and their 26 neighbours, as far as they lie between 0 and `most` [3]."""
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    keys = np.unique(np.concatenate([_pack(p[((p >= 0) & (p <= most)).all(1)]) for p in (places + s for s in steps)]))
    return _unpack(keys)


def marching_cubes(bricks: Bricks, *, beyond: float = np.nan) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The surface where the values are 0.

    Lorensen and Cline 1987 (doi:10.1145/37402.37422). The table of cases is made by following the surface round each
    cube: where the corners of a face alternate, the inner ones are kept apart, in both cubes that share it, so there are
    no holes; and no triangle but those at a loop's own edges touches a cube's face along a line, so that exactly two
    triangles meet at each edge inside.

    Args:
        bricks: values; a cube with a corner that is not known is left out.
        beyond: value of what no brick holds.

    Returns:
        Vertices [V, 3] and counter-clockwise faces [F, 3], seen from where values are positive.
    """
    order = np.argsort(_pack(bricks.places))
    places, values = bricks.places[order], bricks.values[order]
    keys: list[NDArray[np.int64]] = []
    points: list[NDArray[np.float64]] = []
    corners: list[NDArray[np.int64]] = []
    for start in range(0, len(places), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        key, point, corner = _march(_padded(places, values, part, beyond), places[part])
        keys.append(key)
        points.append(point)
        corners.append(corner)
    if not corners:
        return np.zeros((0, 3)), np.zeros((0, 3), np.int64)
    _, first, rows = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    starts = np.cumsum([0, *(len(part) for part in keys)])[:-1]
    faces = np.concatenate([rows[corner + start] for corner, start in zip(corners, starts, strict=True)])
    return bricks.origin + bricks.voxel * np.concatenate(points)[first], faces


def _pack(places: NDArray[np.int64]) -> NDArray[np.int64]:
    return (places[..., 0] << 40) + (places[..., 1] << 20) + places[..., 2]


def _unpack(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([keys >> 40, keys >> 20 & (MOST - 1), keys & (MOST - 1)], -1)


def _padded(places: NDArray, values: NDArray, part: slice, beyond: float) -> NDArray[np.float32]:
    """[n, 9, 9, 9] samples of some bricks, with the first ones of those that follow along x, y and z."""
    keys, own = _pack(places), values[part]
    out = np.full((len(own), SIDE + 1, SIDE + 1, SIDE + 1), beyond, np.float32)
    for step in _CORNERS:
        wanted = _pack(places[part] + step)
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        has = keys[at] == wanted
        to = tuple(slice(SIDE, SIDE + 1) if s else slice(0, SIDE) for s in step)
        of = tuple(slice(0, 1) if s else slice(0, SIDE) for s in step)
        out[(has, *to)] = values[(at[has], *of)]
    return out


def _march(values: NDArray[np.float32], places: NDArray[np.int64]) -> tuple[NDArray, NDArray, NDArray]:
    """The surface in bricks with values [n, 9, 9, 9].

    Returns:
        The number of the grid's edge that each vertex lies on [V], its place in samples [V, 3], and faces [F, 3].
    """
    triangles, counts = _cases()
    case = np.zeros((len(values), SIDE, SIDE, SIDE), np.uint8)
    known = np.ones(case.shape, bool)
    for bit, (x, y, z) in enumerate(_CORNERS):
        corner = values[:, x : x + SIDE, y : y + SIDE, z : z + SIDE]
        case |= (corner < 0).astype(np.uint8) << np.uint8(bit)
        known &= ~np.isnan(corner)
    cells = np.stack(np.nonzero(known & (case > 0) & (case < 255)), -1)
    kinds = case[tuple(cells.T)]
    rows = np.repeat(np.arange(len(cells)), counts[kinds])
    number = np.arange(len(rows)) - np.repeat(np.cumsum(counts[kinds]) - counts[kinds], counts[kinds])
    edges = triangles[kinds[rows], number]  # [F, 3]
    bases, axes = np.array(_EDGES).T
    starts = np.concatenate(
        [np.broadcast_to(cells[rows, None, :1], (*edges.shape, 1)), cells[rows, None, 1:] + _CORNERS[bases[edges]]], -1
    )
    local = ((starts[..., 0] * 9 + starts[..., 1]) * 9 + starts[..., 2]) * 9 + starts[..., 3]
    unique, faces = np.unique(local * 3 + axes[edges], return_inverse=True)
    brick, x, y, z = np.unravel_index(unique // 3, values.shape)
    at, axis = np.stack([x, y, z], -1), np.eye(3, dtype=np.int64)[unique % 3]
    a, b = values[brick, x, y, z], values[(brick, *(at + axis).T)]
    share = (a / (a - b)).astype(np.float64).clip(_LEAST_SHARE, 1 - _LEAST_SHARE)
    whole = places[brick] * SIDE + at
    return _pack(whole) * 4 + unique % 3, whole + share[:, None] * axis, faces.reshape(-1, 3)


@cache
def _cases() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Triangles [256, T, 3] as edges of the cube, by which corners are inside (bit c: corner c), and how many [256]."""
    triangles = [[t for loop in _loops(case) for t in _triangulated(loop)] for case in range(256)]
    table = np.zeros((256, max(map(len, triangles)), 3), np.int64)
    for case, found in enumerate(triangles):
        table[case, : len(found)] = np.array(found, np.int64).reshape(-1, 3)
    return table, np.array([len(found) for found in triangles])


def _faces() -> list[list[int]]:
    """Corners of each side of the cube, clockwise seen from outside."""
    found = []
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        found.append([0, u, u | v, v])
        found.append([corner | 1 << axis for corner in (0, v, u | v, u)])
    return found


def _edge(a: int, b: int) -> int:
    return _EDGES.index((min(a, b), (a ^ b).bit_length() - 1))


def _loops(case: int) -> list[list[int]]:
    """Where the surface meets the cube's edges, in order round each of its pieces."""
    follows = {}
    for face in _faces():
        inside = [bool(case >> corner & 1) for corner in face]
        for i in range(4):
            if inside[i - 1] or not inside[i]:
                continue
            end = i  # of the inner corners that begin here
            while inside[(end + 1) % 4]:
                end += 1
            follows[_edge(face[end % 4], face[(end + 1) % 4])] = _edge(face[i - 1], face[i])
    loops = []
    while follows:
        loop = [next(iter(follows))]
        while (after := follows.pop(loop[-1])) != loop[0]:
            loop.append(after)
        loops.append(loop)
    return loops


def _triangulated(loop: list[int]) -> list[tuple[int, int, int]]:
    """Triangles of a polygon, none of whose inner edges lies in a side of the cube."""
    if len(loop) == 3:
        return [(loop[0], loop[1], loop[2])]
    for i in range(len(loop)):
        before, after = loop[i - 1], loop[(i + 1) % len(loop)]
        if not _share_a_face(before, after):
            rest = _triangulated(loop[:i] + loop[i + 1 :])
            if rest:
                return [(before, loop[i], after), *rest]
    return []


def _share_a_face(a: int, b: int) -> bool:
    ends = [{corner, corner | 1 << axis} for corner, axis in (_EDGES[a], _EDGES[b])]
    return any(ends[0] | ends[1] <= set(face) for face in _faces())
