"""What was built in the bundled garden: table, vase, crockery, paving, wall, bench, pots, watering can.

Each function returns meshes by material; `make_garden.py` says what a material looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from prismfield.datasets.garden_geometry import (
    Array,
    Color,
    Mesh,
    block,
    box,
    curve,
    lathe,
    merge,
    tinted,
    to_linear,
    tube,
    turn_z,
)

TABLE_TOP = 0.74
"""Height of the table's surface, metres."""
TABLE_RADIUS = 0.75
VASE_HEIGHT = 0.31
PATIO_RADIUS = 3.2
GRAVEL_RADIUS = 3.85
WALL_X = -6.4
TABLE_BOARDS = 13
BENCH_BOARDS = 8

Parts = dict[str, list[Mesh]]


def _lengthwise(mesh: Mesh, board: int, boards: int) -> Mesh:
    """A tube's texture turned so that the grain runs along it, taken from one board."""
    assert mesh.uvs is not None
    uvs = np.stack([mesh.uvs[:, 1], (board + 0.5 + 0.4 * np.sin(2 * np.pi * mesh.uvs[:, 0])) / boards], -1)
    return Mesh(mesh.vertices, mesh.faces, uvs, None, mesh.normals)


def table() -> Parts:
    """A round table of straight boards on four turned legs."""
    width = 2 * TABLE_RADIUS / TABLE_BOARDS
    boards = []
    for k in range(TABLE_BOARDS):
        low, high = -TABLE_RADIUS + k * width + 0.003, -TABLE_RADIUS + (k + 1) * width - 0.003
        y = np.linspace(low, high, 7)
        x = np.sqrt(np.maximum(TABLE_RADIUS**2 - y**2, 0.0004))
        outline = np.concatenate([np.stack([x, y], -1), np.stack([-x, y], -1)[::-1]])
        uvs = np.stack(
            [outline[:, 0] / 1.6 + 0.5, (k + 0.03 + 0.94 * (outline[:, 1] - low) / (high - low)) / TABLE_BOARDS], -1
        )
        boards.append(block(outline, TABLE_TOP - 0.032, TABLE_TOP, 0.004, uvs))
    apron = lathe([(0.60, 0.69), (0.60, 0.708), (0.62, 0.709), (0.64, 0.708), (0.64, 0.63), (0.62, 0.63)], 96, 3.0)
    boards.append(Mesh(apron.vertices, apron.faces, apron.uvs))
    shape = curve(
        [(0.0, 0.022), (0.04, 0.03), (0.10, 0.02), (0.32, 0.036), (0.55, 0.026), (0.62, 0.034), (0.70, 0.034)], 40
    )
    for k in range(4):
        angle = np.pi / 4 + k * np.pi / 2
        out = 0.63 - 0.08 * shape[:, 0] / 0.7 - 0.05 * np.sin(np.pi * shape[:, 0] / 0.7)
        path = np.stack([out * np.cos(angle), out * np.sin(angle), shape[:, 0]], -1)
        boards.append(_flat(_lengthwise(tube(path, shape[:, 1], 14), 3 * k, TABLE_BOARDS)))
    for angle in (np.pi / 4, 3 * np.pi / 4):
        cell = (0.0, 5 / TABLE_BOARDS, 1.0, 6 / TABLE_BOARDS)
        boards.append(box((1.16, 0.05, 0.03), cell, 0.004).moved(turn_z(angle), (0, 0, 0.17 + 0.03 * (angle > 2))))
    return {"table_wood": boards}


def _flat(mesh: Mesh) -> Mesh:
    """The mesh without vertex normals, so that it merges with flat ones; fine tessellation hides the facets."""
    return Mesh(mesh.vertices, mesh.faces, mesh.uvs, mesh.colors)


def vase() -> Parts:
    """A glazed vase in the middle of the table, with an inner wall."""
    outer = [(0.0, 0.0), (0.058, 0.0), (0.066, 0.012), (0.088, 0.06), (0.104, 0.12), (0.094, 0.19), (0.060, 0.245)]
    profile = curve([*outer, (0.056, 0.275), (0.078, VASE_HEIGHT)], 60)
    rim = [(0.078, VASE_HEIGHT), (0.076, VASE_HEIGHT + 0.003), (0.072, VASE_HEIGHT), (0.050, 0.275), (0.052, 0.23)]
    return {
        "glaze": [lathe(profile, 96).moved(offset=(0, 0, TABLE_TOP))],
        "glossy": [_flat(lathe(rim, 64)).painted((0.90, 0.88, 0.83)).moved(offset=(0, 0, TABLE_TOP))],
    }


def _mottled(mesh: Mesh, rng: np.random.Generator, color: Color, strength: float) -> Mesh:
    """The mesh painted with smooth random variation over its surface."""
    waves = rng.normal(size=(3, 6)) * 60
    value = np.sin(mesh.vertices @ waves + rng.uniform(0, 6.3, 6)).mean(1)
    return Mesh(
        mesh.vertices, mesh.faces, None, np.clip(to_linear(color) * (1 + strength * value[:, None]), 0, 1), mesh.normals
    )


def tableware(rng: np.random.Generator) -> Parts:
    """A bowl of fruit, two cups on saucers, two books."""
    top = np.array([0.0, 0.0, TABLE_TOP])
    glossy: list[Mesh] = []
    bowl_at = top + np.array([0.34, 0.26, 0.0])
    wall = curve([(0.0, 0.004), (0.055, 0.004), (0.07, 0.012), (0.12, 0.05), (0.145, 0.085)], 24)
    inside = [(0.145, 0.085), (0.140, 0.086), (0.115, 0.053), (0.065, 0.018), (0.0, 0.012)]
    bowl = _flat(lathe(np.concatenate([wall, inside]), 64)).painted((0.16, 0.42, 0.45))
    glossy.append(bowl.moved(offset=bowl_at))
    ball = np.stack([np.sin(np.linspace(0, np.pi, 18)), -np.cos(np.linspace(0, np.pi, 18))], -1)
    kinds: list[tuple[Color, ArrayLike]] = [
        ((0.96, 0.56, 0.10), (1, 1, 0.95)),
        ((0.95, 0.82, 0.16), (0.86, 0.86, 1.22)),
        ((0.80, 0.12, 0.10), (1, 1, 0.9)),
        ((0.55, 0.70, 0.18), (1, 1, 0.92)),
    ]
    lower, upper = np.arange(3) / 3 * 2 * np.pi, (np.arange(3) + 0.5) / 3 * 2 * np.pi
    places = [*_ring(lower, 0.045, 0.052), *_ring(upper, 0.089, 0.086), np.array([0.0, 0.0, 0.113])]
    for k, place in enumerate(places):
        color, stretch = kinds[k % 4]
        fruit = _flat(lathe(ball * 0.038, 28))
        fruit = Mesh(fruit.vertices * np.asarray(stretch), fruit.faces, fruit.uvs)
        tilt = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        tilt[:, 0] *= np.sign(np.linalg.det(tilt))
        glossy.append(_mottled(fruit.moved(tilt, bowl_at + place), rng, color, 0.25))
    for at, color in (((-0.42, -0.22, 0.0), (0.93, 0.92, 0.88)), ((-0.05, -0.50, 0.0), (0.85, 0.55, 0.40))):
        glossy.extend(_cup(color, top + at))
    books = [
        ((0.24, 0.17, 0.028), (0.62, 0.13, 0.12), 0.4, 0.0),
        ((0.20, 0.14, 0.022), (0.15, 0.33, 0.46), 0.75, 0.028),
    ]
    for size, color, angle, lift in books:
        glossy.extend(_book(size, color, turn_z(angle + 2.2), top + np.array([-0.36, 0.30, lift])))
    return {"glossy": [_flat(Mesh(m.vertices, m.faces, None, m.colors)) for m in glossy]}


def _ring(angles: Array, radius: float, height: float) -> Array:
    """[P, 3] places on a circle around the z axis."""
    return np.stack([radius * np.cos(angles), radius * np.sin(angles), np.full(len(angles), height)], -1)


def _cup(color: Color, at: Array) -> list[Mesh]:
    saucer = lathe(
        [(0.0, 0.003), (0.04, 0.003), (0.06, 0.010), (0.078, 0.016), (0.078, 0.019), (0.05, 0.010), (0.0, 0.008)], 48
    )
    wall = curve([(0.024, 0.010), (0.032, 0.018), (0.042, 0.045), (0.044, 0.072)], 16)
    cup = lathe(np.concatenate([wall, [(0.0405, 0.072), (0.039, 0.045), (0.036, 0.040)]]), 40)
    tea = lathe([(0.0405, 0.060), (0.0, 0.060)], 40)
    arc = np.linspace(-1.3, 1.3, 14)
    handle = tube(np.stack([0.040 + 0.024 * np.cos(arc), np.zeros(14), 0.044 + 0.020 * np.sin(arc)], -1), 0.0045, 8)
    pieces = [saucer.painted(color), cup.painted(color), handle.painted(color), tea.painted((0.32, 0.16, 0.07))]
    return [piece.moved(turn_z(0.9), at) for piece in pieces]


def _book(size: ArrayLike, color: Color, turn: Array, at: Array) -> list[Mesh]:
    length, depth, height = np.asarray(size, dtype=float)
    pages = (
        box((length - 0.008, depth - 0.008, height - 0.004))
        .painted((0.90, 0.86, 0.76))
        .moved(offset=(0, 0.001, height / 2))
    )
    covers = [box((length, depth, 0.003)).painted(color).moved(offset=(0, 0, z)) for z in (0.0015, height - 0.0015)]
    spine = box((length, 0.003, height)).painted(color).moved(offset=(0, -depth / 2, height / 2))
    label = (
        box((length * 0.5, depth * 0.22, 0.0006))
        .painted((0.92, 0.85, 0.62))
        .moved(offset=(0, depth * 0.1, height + 0.0004))
    )
    return [piece.moved(turn, at) for piece in (pages, *covers, spine, label)]


def _atlas_cell(rng: np.random.Generator, local: Array) -> Array:
    """[P, 2] texture coordinates of `local` (0..1) in a random cell of a 4 x 4 atlas, randomly mirrored."""
    flip = rng.integers(2, size=2)
    p = np.where(flip, 1 - local, local)
    return (rng.integers(4, size=2) + 0.04 + 0.92 * p) / 4


def paving(rng: np.random.Generator) -> Parts:
    """Rings of stones with open joints around the table, a gravel ring, turf and soil beyond."""
    stones = []
    circle = np.stack([np.cos(np.linspace(0, 2 * np.pi, 17)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 17)[:-1])], -1)
    stones.append(block(circle * 0.23, -0.03, 0.0, 0.008, _atlas_cell(rng, circle / 2 + 0.5)))
    inner = 0.245
    while inner < PATIO_RADIUS - 0.1:
        outer = inner + rng.uniform(0.27, 0.34)
        count = max(7, round(2 * np.pi * (inner + outer) / 2 / 0.43))
        cuts = (np.arange(count) + rng.uniform(-0.16, 0.16, count)) / count * 2 * np.pi + rng.uniform(0, 2 * np.pi)
        for a, b in zip(cuts, np.append(cuts[1:], cuts[0] + 2 * np.pi), strict=True):
            gap = 0.008 / inner
            arc = np.linspace(a + gap, b - gap, 5)
            near = np.stack([np.cos([a + gap, b - gap]), np.sin([a + gap, b - gap])], -1) * inner
            far = np.stack([np.cos(arc), np.sin(arc)], -1) * (outer - 0.015)
            local = np.concatenate([np.linspace([0, 0], [1, 0], 5), [[1, 1], [0, 1]]])
            outline = np.concatenate([far, near[::-1]])
            stones.append(
                block(outline, -0.03, rng.normal(0, 0.0025), rng.uniform(0.006, 0.012), _atlas_cell(rng, local))
            )
        inner = outer
    sheets = {
        "soil": (0.0, inner, -0.014, 0.9),
        "gravel": (inner - 0.02, GRAVEL_RADIUS, -0.010, 0.6),
        "turf": (GRAVEL_RADIUS, 16.0, -0.02, 1.6),
    }
    parts: Parts = {"stone": stones}
    for name, (start, stop, height, tile) in sheets.items():
        ring = lathe([(stop, height), (start, height)], 96)
        parts[name] = [Mesh(ring.vertices, ring.faces, ring.vertices[:, :2] / tile)]
    edge = np.linspace(0, 2 * np.pi, 61)
    for a, b in pairwise(edge):
        sector = [
            (GRAVEL_RADIUS, a + 0.002),
            (GRAVEL_RADIUS + 0.09, a + 0.002),
            (GRAVEL_RADIUS + 0.09, b - 0.002),
            (GRAVEL_RADIUS, b - 0.002),
        ]
        outline = np.array([(r * np.cos(t), r * np.sin(t)) for r, t in sector])
        stones.append(
            block(
                outline,
                -0.03,
                0.03 + rng.normal(0, 0.004),
                0.012,
                _atlas_cell(rng, np.array([[0, 0], [0, 0.4], [1, 0.4], [1, 0]])),
            )
        )
    return parts


def pebbles(rng: np.random.Generator, count: int = 9000) -> Parts:
    """Loose gravel: rounded octahedra in the ring around the paving, and a few strays on it."""
    angle = rng.uniform(0, 2 * np.pi, count)
    radius = rng.uniform(PATIO_RADIUS - 0.02, GRAVEL_RADIUS, count)
    radius[: count // 60] = rng.uniform(2.6, PATIO_RADIUS, count // 60)
    size = rng.uniform(0.008, 0.022, (count, 1)) * rng.uniform(0.7, 1.2, (count, 3)) * (1, 1, 0.7)
    centre = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(count, -0.002)], -1)
    corners = np.concatenate([np.eye(3), -np.eye(3)])
    turn = rng.uniform(0, 2 * np.pi, count)
    c, s, o = np.cos(turn), np.sin(turn), np.zeros(count)
    spin = np.stack([c, -s, o, s, c, o, o, o, o + 1], -1).reshape(-1, 3, 3)
    vertices = np.einsum("nij,kj,nj->nki", spin, corners, size) + centre[:, None]
    pattern = np.array([[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2]])
    faces = (pattern + 6 * np.arange(count)[:, None, None]).reshape(-1, 3)
    palette: list[Color] = [(0.66, 0.62, 0.55), (0.55, 0.52, 0.48), (0.74, 0.70, 0.64), (0.58, 0.48, 0.38)]
    colors = np.repeat(tinted(rng, palette, count, 0.16), 6, 0)
    return {"matte": [Mesh(vertices.reshape(-1, 3), faces, None, colors)]}


def wall(rng: np.random.Generator, half: float = 4.6, height: float = 2.0) -> Parts:
    """A brick wall that faces +x, in running bond, with coping stones."""
    tall, wide, gap = 0.094, 0.30, 0.012
    upright = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    bricks, coping = [], []
    for row in range(int(height / tall)):
        start = -half - (wide / 2 if row % 2 else 0.0)
        for low in np.arange(start, half, wide):
            y = np.clip([low + gap / 2, low + wide - gap / 2], -half, half)
            if y[1] - y[0] < 0.04:
                continue
            z = row * tall + np.array([gap / 2, tall - gap / 2])
            outline = np.array([[y[0], z[0]], [y[1], z[0]], [y[1], z[1]], [y[0], z[1]]])
            local = np.array([[0, 0], [1, 0], [1, 0.4], [0, 0.4]])
            brick = block(outline, -0.02, 0.012 + rng.normal(0, 0.002), 0.007, _atlas_cell(rng, local))
            bricks.append(brick.moved(upright, (WALL_X, 0, 0)))
    top = int(height / tall) * tall
    for low in np.arange(-half, half, 0.46):
        stone = box((0.45, 0.30, 0.07), (0.27, 0.02, 0.48, 0.23), 0.012)
        coping.append(stone.moved(turn_z(np.pi / 2), (WALL_X - 0.09, low + 0.23, top + 0.035 + rng.normal(0, 0.003))))
    mortar = box((0.2, 2 * half, top)).painted((0.60, 0.57, 0.52)).moved(offset=(WALL_X - 0.1, 0, top / 2))
    return {"brick": bricks, "stone": coping, "matte": [mortar]}


def bench(rng: np.random.Generator, angle: float = 1.75, distance: float = 4.55) -> Parts:
    """A slatted bench that faces the table."""
    pieces = []

    def slat(size: ArrayLike, at: ArrayLike, tilt: float = 0.0) -> None:
        row = int(rng.integers(BENCH_BOARDS))
        cell = (0.0, (row + 0.05) / BENCH_BOARDS, 1.0, (row + 0.95) / BENCH_BOARDS)
        c, s = np.cos(tilt), np.sin(tilt)
        lean = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        pieces.append(box(size, cell, 0.004).moved(lean, at))

    for k in range(5):
        slat((1.6, 0.085, 0.025), (0, -0.20 + 0.1 * k, 0.44))
    for k in range(4):
        slat((1.6, 0.022, 0.085), (0, 0.27 + 0.028 * k, 0.56 + 0.115 * k), -0.24)
    for x in (-0.72, 0.72):
        slat((0.06, 0.06, 0.43), (x, -0.20, 0.215))
        slat((0.06, 0.06, 0.98), (x, 0.32, 0.49), -0.14)
        slat((0.06, 0.56, 0.05), (x, 0.02, 0.405))
        slat((0.07, 0.52, 0.035), (x, -0.02, 0.64))
        slat((0.05, 0.05, 0.20), (x, -0.22, 0.53))
    away = np.array([np.cos(angle), np.sin(angle), 0.0]) * distance
    return {"bench_wood": [piece.moved(turn_z(angle - np.pi / 2), away) for piece in pieces]}


def pot(radius: float, height: float, at: ArrayLike, glazed: Color | None = None) -> Parts:
    """A flower pot filled with soil; terracotta unless a glaze colour is given."""
    r, h = radius, height
    shape = [
        (0.0, 0.0),
        (0.66 * r, 0.0),
        (0.70 * r, 0.02 * h),
        (0.92 * r, 0.80 * h),
        (1.02 * r, 0.81 * h),
        (1.05 * r, 0.83 * h),
    ]
    shape += [(1.07 * r, 0.98 * h), (1.04 * r, h), (0.94 * r, h), (0.92 * r, 0.88 * h)]
    wall_mesh = _flat(lathe(shape, 56)).moved(offset=at)
    earth = lathe([(0.93 * r, 0.9 * h), (0.5 * r, 0.93 * h), (0.0, 0.94 * h)], 32)
    soil = Mesh(earth.vertices + np.asarray(at), earth.faces, earth.vertices[:, :2] / 0.5)
    if glazed is None:
        return {"terracotta": [wall_mesh], "soil": [soil]}
    return {"glossy": [Mesh(wall_mesh.vertices, wall_mesh.faces).painted(glazed)], "soil": [soil]}


def watering_can(at: ArrayLike, angle: float) -> Parts:
    """A zinc watering can."""
    body = lathe(
        [
            (0.0, 0.0),
            (0.105, 0.0),
            (0.108, 0.008),
            (0.105, 0.016),
            (0.098, 0.21),
            (0.101, 0.215),
            (0.101, 0.228),
            (0.085, 0.23),
            (0.02, 0.245),
            (0.0, 0.246),
        ],
        56,
    )
    spout = tube(
        curve([(0.09, 0, 0.05), (0.17, 0, 0.10), (0.25, 0, 0.22), (0.30, 0, 0.30)], 20),
        np.linspace(0.020, 0.012, 20),
        14,
    )
    rose = tube(
        [(0.292, 0, 0.287), (0.31, 0, 0.314), (0.325, 0, 0.338), (0.327, 0, 0.341)], [0.012, 0.026, 0.040, 0.001], 20
    )
    arc = np.linspace(-0.5, np.pi * 0.95, 24)
    grip = tube(np.stack([-0.07 - 0.11 * np.sin(arc) * 0.9, np.zeros(24), 0.17 + 0.11 * np.cos(arc)], -1), 0.007, 10)
    bail = tube(curve([(0.07, 0, 0.235), (0.05, 0, 0.31), (-0.02, 0, 0.335), (-0.075, 0, 0.285)], 18), 0.007, 10)
    brace = tube([(0.10, 0, 0.20), (0.15, 0, 0.195), (0.215, 0, 0.175)], 0.004, 8)
    pieces = (body, spout, rose, grip, bail, brace)
    return {"zinc": [_flat(piece).moved(turn_z(angle), at) for piece in pieces]}


def trunk(path: ArrayLike, radius: ArrayLike, color: Color = (0.34, 0.27, 0.21)) -> Mesh:
    """A stem or trunk in one colour."""
    piece = tube(path, radius, 9)
    return Mesh(piece.vertices, piece.faces).painted(color)


def joined(parts: Sequence[Parts]) -> dict[str, Mesh]:
    """One mesh for each material."""
    names = sorted({name for part in parts for name in part})
    return {name: merge([mesh for part in parts for mesh in part.get(name, [])]) for name in names}
