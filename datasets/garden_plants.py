"""What grows in the bundled garden: bouquet, pot plants, lawn, hedge, border, ivy, trees. Meshes with a colour per vertex."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from prismfield.datasets.garden_geometry import (
    Array,
    Color,
    Mesh,
    box,
    curve,
    kites,
    leaves,
    merge,
    random_directions,
    tinted,
    tip_frame,
    unit,
)
from prismfield.datasets.garden_objects import (
    GRAVEL_RADIUS,
    PATIO_RADIUS,
    TABLE_TOP,
    VASE_HEIGHT,
    WALL_X,
    Parts,
    trunk,
)

HEDGE_HALF = 6.6
"""Half the side of the hedge's square, metres."""
UP = np.array([0.0, 0.0, 1.0])
GREENS: list[Color] = [(0.44, 0.60, 0.29), (0.38, 0.55, 0.27), (0.52, 0.66, 0.34), (0.35, 0.51, 0.29)]
DEEP_GREENS: list[Color] = [(0.34, 0.52, 0.27), (0.40, 0.57, 0.28), (0.30, 0.48, 0.27), (0.46, 0.62, 0.32)]
LIME: list[Color] = [(0.64, 0.73, 0.36), (0.57, 0.70, 0.33), (0.69, 0.76, 0.42)]
SILVER: list[Color] = [(0.50, 0.58, 0.48), (0.56, 0.64, 0.55), (0.44, 0.53, 0.45)]
GRASS: list[Color] = [(0.38, 0.53, 0.20), (0.46, 0.59, 0.24), (0.33, 0.48, 0.19), (0.54, 0.61, 0.30)]


def whorl(
    rng: np.random.Generator,
    centres: Array,
    axes: Array,
    petals: int,
    tilt: float,
    length: Array,
    width: float,
    palette: Sequence[Color],
) -> Mesh:
    """A ring of petals around each of [N, 3] centres.

    Args:
        rng: its state is advanced.
        centres: [N, 3].
        axes: [N, 3] where the flowers look.
        petals: in one ring.
        tilt: radians from the axis: 0 closed, pi / 2 flat.
        length: [N] of a petal.
        width: of a petal, in lengths.
        palette: one colour is drawn for each flower.
    """
    count = len(centres)
    side, other = tip_frame(axes)
    angle = (
        rng.uniform(0, 2 * np.pi, (count, 1))
        + np.arange(petals) / petals * 2 * np.pi
        + rng.normal(0, 0.07, (count, petals))
    )
    away = np.cos(angle)[..., None] * side[:, None] + np.sin(angle)[..., None] * other[:, None]
    lean = tilt + rng.normal(0, 0.07, (count, petals, 1))
    along = np.cos(lean) * axes[:, None] + np.sin(lean) * away
    facing = np.sin(lean) * axes[:, None] - np.cos(lean) * away
    colors = np.repeat(tinted(rng, palette, count, 0.06)[:, None], petals, 1) * np.exp(
        rng.normal(0, 0.05, (count, petals, 1))
    )
    size = np.repeat(length[:, None], petals, 1) * rng.uniform(0.9, 1.08, (count, petals))
    base = np.repeat(centres[:, None], petals, 1)
    bend = rng.uniform(-0.15, 0.2, count * petals)
    return leaves(
        base.reshape(-1, 3),
        along.reshape(-1, 3),
        facing.reshape(-1, 3),
        size.ravel(),
        size.ravel() * width,
        bend,
        colors.reshape(-1, 3),
        4,
    )


def tufts(
    rng: np.random.Generator, centres: Array, radius: float, each: int, palette: Sequence[Color], size: float
) -> Mesh:
    """Balls of small petals around [N, 3] centres: hydrangea heads, flower hearts, geraniums."""
    away = random_directions(rng, len(centres) * each)
    base = np.repeat(centres, each, 0) + away * radius * rng.uniform(0.6, 1.0, (len(away), 1))
    across = unit(np.cross(away, random_directions(rng, len(away))))
    colors = np.repeat(tinted(rng, palette, len(centres), 0.06), each, 0) * np.exp(rng.normal(0, 0.10, (len(away), 1)))
    return kites(base - across * size / 2, across, away, size, size, np.clip(colors, 0, 1))


def cloud(
    rng: np.random.Generator,
    centre: ArrayLike,
    radii: ArrayLike,
    count: int,
    palette: Sequence[Color],
    size: float,
    lumps: int = 9,
) -> Mesh:
    """A shrub or a crown: leaves in the outer shell of lumps that fill an ellipsoid, darker inside and below."""
    reach = np.asarray(radii, dtype=float)
    lump_at = random_directions(rng, lumps) * rng.uniform(0.35, 0.66, (lumps, 1))
    lump_radius = rng.uniform(0.38, 0.56, lumps)
    owner = rng.integers(lumps, size=count)
    away = random_directions(rng, count)
    depth = rng.beta(5, 1.3, (count, 1))
    place = lump_at[owner] + away * lump_radius[owner, None] * depth
    colors = tinted(rng, palette, count, 0.15)
    shade = 0.60 + 0.45 * np.clip(np.linalg.norm(place, axis=1, keepdims=True), 0, 1) * np.clip(
        0.75 + 0.3 * place[:, 2:], 0.3, 1
    )
    facing = unit(away + 0.6 * UP + 0.55 * rng.normal(size=(count, 3)))
    along = unit(np.cross(facing, random_directions(rng, count)))
    base = np.asarray(centre) + place * reach
    sizes = size * rng.uniform(0.7, 1.25, count)
    return kites(base, along, facing, sizes, sizes * 0.62, np.clip(colors * shade, 0, 1))


def fern(
    rng: np.random.Generator, at: ArrayLike, fronds: int, length: float, palette: Sequence[Color], pairs: int = 20
) -> Mesh:
    """Arching fronds with pairs of leaflets."""
    t = np.linspace(0.10, 1.0, pairs)
    parts = []
    for k in range(fronds):
        angle = 2 * np.pi * k / fronds * 2.618 + rng.normal(0, 0.2)
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        rise, reach = length * rng.uniform(0.5, 0.95), length * rng.uniform(0.55, 0.95)
        path = np.asarray(at) + out * (reach * t**1.25)[:, None] + UP * (rise * (1.75 * t - 1.2 * t**2.4))[:, None]
        heading = unit(np.gradient(path, axis=0))
        side = unit(np.cross(heading, UP))
        size = length * 0.24 * np.sin(np.pi * np.clip(t * 0.9 + 0.10, 0, 1)) + 0.012
        for sign in (-1.0, 1.0):
            along = unit(side * sign + 0.45 * heading - 0.15 * UP)
            parts.append(
                leaves(path, along, np.cross(side, heading), size, size * 0.30, 0.25, tinted(rng, palette, pairs, 0.08))
            )
        parts.append(trunk(path, np.linspace(0.0035, 0.0012, pairs), (0.36, 0.45, 0.20)))
    return merge(parts)


def strap_leaves(
    rng: np.random.Generator,
    at: ArrayLike,
    count: int,
    length: float,
    width: float,
    palette: Sequence[Color],
    droop: float,
) -> Mesh:
    """A rosette of long leaves, upright in the middle: grasses, agapanthus."""
    angle = rng.uniform(0, 2 * np.pi, count)
    lean = rng.beta(1.6, 1.8, count) * 1.15
    along = np.stack([np.cos(angle) * np.sin(lean), np.sin(angle) * np.sin(lean), np.cos(lean)], -1)
    facing = np.stack([-np.cos(angle) * np.cos(lean), -np.sin(angle) * np.cos(lean), np.sin(lean)], -1)
    base = np.asarray(at) + 0.1 * length * along * (1, 1, 0)
    sizes = length * rng.uniform(0.7, 1.1, count)
    return leaves(base, along, facing, sizes, width, droop * (0.25 + lean), tinted(rng, palette, count, 0.10), 8)


def spikes(
    rng: np.random.Generator, bases: Array, tips: Array, palette: Sequence[Color], florets: int, size: float
) -> Mesh:
    """Flower spikes such as lavender: a stem with florets over its upper part."""
    count = len(bases)
    line = tips - bases
    t = rng.uniform(0.52, 1.0, (count, florets, 1))
    away = unit(random_directions(rng, count * florets).reshape(count, florets, 3) + 0.5 * unit(line)[:, None])
    base = bases[:, None] + line[:, None] * t
    colors = tinted(rng, palette, count * florets, 0.12)
    flat = kites(
        base.reshape(-1, 3), away.reshape(-1, 3), random_directions(rng, count * florets), size, size * 0.7, colors
    )
    stalk = leaves(
        bases,
        line,
        random_directions(rng, count),
        np.linalg.norm(line, axis=1),
        0.005,
        0.0,
        tinted(rng, GREENS, count),
        3,
    )
    return merge([flat, stalk])


def bouquet(rng: np.random.Generator) -> Mesh:
    """The flowers in the vase: daisies, peonies, poppies, larkspur, eucalyptus and fern."""
    mouth = np.array([0.0, 0.0, TABLE_TOP + VASE_HEIGHT])
    count = 46
    golden = np.arange(count) * 2.39996
    lean = np.sqrt((np.arange(count) + 0.5) / count) * 1.12
    direction = np.stack([np.cos(golden) * np.sin(lean), np.sin(golden) * np.sin(lean), np.cos(lean)], -1)
    length = 0.30 - 0.07 * lean + rng.uniform(-0.035, 0.05, count)
    tips = mouth + direction * length[:, None]
    parts = []
    for k in range(count):
        low = mouth + direction[k] * (0.02, 0.02, 0) - (0, 0, 0.06)
        path = curve(
            [
                low,
                mouth + direction[k] * (0.03, 0.03, 0),
                mouth + (direction[k] * 0.8 + 0.2 * UP) * length[k] * 0.5,
                tips[k],
            ],
            9,
        )
        parts.append(trunk(path, 0.0024, (0.35, 0.47, 0.22)))
        if k % 4 != 3:
            t = rng.uniform(0.35, 0.9, 5)
            at = path[(t * 8).astype(int)]
            out = unit(random_directions(rng, 5) + 0.8 * direction[k])
            parts.append(
                leaves(
                    at,
                    out,
                    UP + 0.4 * rng.normal(size=(5, 3)),
                    rng.uniform(0.06, 0.11, 5),
                    0.032,
                    0.3,
                    tinted(rng, GREENS, 5),
                )
            )
    look = unit(direction + 0.25 * UP + 0.15 * rng.normal(size=(count, 3)))
    kind = np.array([0, 1, 2, 0, 3, 1, 0, 4, 1, 2])[np.arange(count) % 10]
    parts += _daisies(rng, tips[kind == 0], look[kind == 0])
    parts += _peonies(rng, tips[kind == 1], look[kind == 1])
    poppies, axes = tips[kind == 2], look[kind == 2]
    for tilt, scale in ((0.95, 0.046), (0.65, 0.040)):
        parts.append(
            whorl(
                rng,
                poppies,
                axes,
                4,
                tilt,
                np.full(len(poppies), scale),
                1.25,
                [(0.90, 0.36, 0.14), (0.88, 0.27, 0.15)],
            )
        )
    parts.append(tufts(rng, poppies + axes * 0.008, 0.009, 16, [(0.20, 0.16, 0.12)], 0.008))
    spires = tips[kind == 3]
    parts.append(
        spikes(
            rng,
            spires - direction[kind == 3] * 0.12,
            spires + direction[kind == 3] * 0.10,
            [(0.42, 0.36, 0.78), (0.50, 0.44, 0.84)],
            70,
            0.020,
        )
    )
    for tip, way in zip(tips[kind == 4], direction[kind == 4], strict=True):
        t = np.linspace(-0.14, 0.06, 12)[:, None]
        side, other = tip_frame(way[None])
        angle = np.arange(12)[:, None] * 1.6
        out = np.cos(angle) * side + np.sin(angle) * other + 0.5 * way
        parts.append(leaves(tip + way * t, out, way + 0.2 * out, 0.05, 0.042, 0.1, tinted(rng, SILVER, 12)))
    parts.append(fern(rng, mouth - (0, 0, 0.03), 9, 0.30, LIME, 18))
    return merge(parts)


def _daisies(rng: np.random.Generator, at: Array, axes: Array) -> list[Mesh]:
    size = rng.uniform(0.034, 0.044, len(at))
    rays = [whorl(rng, at, axes, 15, tilt, size, 0.30, [(0.96, 0.95, 0.91)]) for tilt in (1.5, 1.3)]
    return [*rays, tufts(rng, at + axes * 0.002, 0.011, 26, [(0.93, 0.70, 0.12)], 0.009)]


def _peonies(rng: np.random.Generator, at: Array, axes: Array) -> list[Mesh]:
    pinks: list[Color] = [(0.90, 0.52, 0.62), (0.94, 0.66, 0.72), (0.80, 0.32, 0.48)]
    order = rng.integers(len(pinks), size=len(at))
    parts = []
    for color in range(len(pinks)):
        chosen = order == color
        if not chosen.any():
            continue
        for tilt, scale, petals in (
            (1.35, 0.050, 8),
            (1.05, 0.047, 8),
            (0.75, 0.042, 7),
            (0.45, 0.036, 6),
            (0.2, 0.030, 4),
        ):
            tone = tuple(min(1.0, c * (1.12 - 0.16 * tilt)) for c in pinks[color])
            length = np.full(int(chosen.sum()), scale)
            parts.append(
                whorl(rng, at[chosen], axes[chosen], petals, tilt, length, 0.85, [(tone[0], tone[1], tone[2])])
            )
    return parts


def potted(rng: np.random.Generator, kind: str, at: ArrayLike, radius: float) -> Mesh:
    """One plant for a pot, by kind, rooted at `at` in a pot of `radius`."""
    root = np.asarray(at, dtype=float)
    if kind == "topiary":
        head = root + 0.52 * UP
        away = random_directions(rng, 5200)
        base = head + away * 0.27 * rng.beta(9, 1.2, (5200, 1))
        facing = unit(away + 0.5 * rng.normal(size=away.shape))
        along = unit(np.cross(facing, random_directions(rng, 5200)))
        crown = kites(base, along, facing, 0.034, 0.022, tinted(rng, DEEP_GREENS, 5200, 0.14))
        return merge([crown, trunk([root, root + np.array([0.01, 0.0, 0.2]), head], 0.018)])
    if kind == "fern":
        return merge([fern(rng, root, 26, 0.62, LIME, 24), fern(rng, root, 12, 0.40, GREENS, 20)])
    if kind == "grass":
        return strap_leaves(
            rng, root, 210, 0.85, 0.015, [(0.55, 0.62, 0.30), (0.62, 0.64, 0.36), (0.45, 0.55, 0.28)], 0.75
        )
    if kind == "agave":
        return strap_leaves(rng, root, 58, 0.52, 0.065, [(0.45, 0.58, 0.52), (0.52, 0.64, 0.55)], 0.12)
    if kind == "lavender":
        return _lavender(rng, root, 130, radius * 1.25, 0.52)
    heads: dict[str, list[Color]] = {
        "geranium": [(0.85, 0.14, 0.16), (0.90, 0.22, 0.20)],
        "hydrangea": [(0.46, 0.52, 0.86), (0.58, 0.56, 0.88)],
    }
    if kind not in heads:
        raise ValueError(f"potted: unknown kind of plant {kind!r}")
    large = kind == "hydrangea"
    reach = np.array([1.5, 1.5, 1.15]) * radius
    dome = root + 0.55 * radius * UP
    away = unit(random_directions(rng, 900) * (1, 1, 0.8) + 0.3 * UP)
    facing = unit(away + 0.35 * rng.normal(size=away.shape) + 0.3 * UP)
    along = unit(np.cross(facing, random_directions(rng, 900)))
    base = dome + away * reach * rng.beta(5, 1.5, (900, 1))
    size = 0.075 if large else 0.055
    green = leaves(base, along, facing, size, size * 0.75, 0.15, tinted(rng, GREENS, 900))
    count = 17 if large else 24
    golden = np.arange(count) * 2.39996
    z = 1 - (np.arange(count) + 0.5) / count * 0.95
    places = np.stack([np.sqrt(1 - z * z) * np.cos(golden), np.sqrt(1 - z * z) * np.sin(golden), z], -1)
    centres = dome + places * reach * 1.08 * rng.uniform(0.92, 1.06, (count, 1))
    flower = tufts(rng, centres, 0.07 if large else 0.042, 70 if large else 34, heads[kind], 0.030 if large else 0.026)
    return merge([green, flower])


def _lavender(rng: np.random.Generator, root: Array, count: int, radius: float, height: float) -> Mesh:
    angle, r = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 1, count))
    out = np.stack([np.cos(angle) * r, np.sin(angle) * r, np.zeros(count)], -1)
    tips = root + out * radius * 1.25 + UP * (height * rng.uniform(0.75, 1.05, count) * (1 - 0.25 * r))[:, None]
    purple: list[Color] = [(0.50, 0.40, 0.72), (0.58, 0.48, 0.80), (0.44, 0.36, 0.66)]
    return merge(
        [
            spikes(rng, root + out * radius * 0.3, tips, purple, 26, 0.020),
            strap_leaves(rng, root, 2 * count, height * 0.6, 0.008, SILVER, 0.2),
        ]
    )


def lawn(rng: np.random.Generator, count: int = 120_000) -> Mesh:
    """Blades of grass, denser towards the middle where they are seen from near, and some clover flowers."""
    radius = GRAVEL_RADIUS + 0.08 + (HEDGE_HALF * 1.25 - GRAVEL_RADIUS) * rng.beta(1.0, 1.35, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    base = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(count, -0.02)], -1)
    base = base[(np.abs(base[:, :2]) < HEDGE_HALF).all(1) & (base[:, 0] > WALL_X)]
    count = len(base)
    lean = rng.normal(0, 0.45, (count, 2))
    along = np.column_stack([lean, np.ones(count)])
    facing = np.column_stack([-lean, 0.3 * np.ones(count)]) + 0.2 * rng.normal(size=(count, 3))
    broad = 0.5 + 0.5 * np.sin(base[:, :1] * 1.7 + 0.8 * np.sin(base[:, 1:2] * 1.3)) * np.cos(base[:, 1:2] * 1.1)
    colors = np.clip(tinted(rng, GRASS, count, 0.16) * (0.85 + 0.3 * broad), 0, 1)
    size = rng.uniform(0.04, 0.085, count)
    grass = leaves(base, along, facing, size, 0.011, rng.uniform(0, 0.6, count), colors, 2)
    pick = rng.choice(count, 420, replace=False)
    clover = tufts(rng, base[pick] + (0, 0, 0.07), 0.011, 12, [(0.95, 0.94, 0.90), (0.95, 0.85, 0.35)], 0.013)
    return merge([grass, clover])


def joint_moss(rng: np.random.Generator, count: int = 9000) -> Mesh:
    """Small cushions that grow in patches in the joints of the paving."""
    seeds = rng.uniform(-PATIO_RADIUS, PATIO_RADIUS, (60, 2))
    xy = seeds[rng.integers(60, size=count)] + rng.normal(0, 0.16, (count, 2))
    xy = xy[np.linalg.norm(xy, axis=1) < PATIO_RADIUS]
    base = np.column_stack([xy, np.full(len(xy), -0.014)])
    along = unit(rng.normal(size=base.shape) * (0.5, 0.5, 0.1) + UP)
    # Only just taller than the stones' bevel: it shows in the joints and stays under the stones elsewhere.
    return leaves(base, along, rng.normal(size=base.shape), 0.016, 0.010, 0.2, tinted(rng, GRASS, len(base)) * 0.8, 2)


def hedge(rng: np.random.Generator, per_side: int = 21_000, height: float = 2.15, depth: float = 0.7) -> Parts:
    """A clipped hedge on three sides and at both ends of the wall: leaves over dark boxes."""
    green, core = [], []
    half, wall_end = HEDGE_HALF, 4.6
    runs = [(-half, half, 0.0, 1.0), (-half, half, np.pi / 2, 1.0), (-half, half, -np.pi / 2, 1.0)]
    runs += [(wall_end, half, np.pi, 0.2), (-half, -wall_end, np.pi, 0.2)]
    for start, stop, angle, share in runs:
        count = int(per_side * share)
        along = rng.uniform(start, stop, count)
        on_top = rng.uniform(size=count) < 0.22
        swell = 0.05 * np.sin(along * 2.1 + angle) + 0.035 * np.sin(along * 5.3)
        z = np.where(on_top, height + swell, rng.uniform(0.0, height, count) + swell * 0.3)
        away = np.where(on_top, half + rng.uniform(0, depth, count), half + 0.04 * np.sin(z * 4 + along * 3) + swell)
        sunk = rng.exponential(0.05, count)
        c, s = np.cos(angle), np.sin(angle)
        normal = np.where(on_top[:, None], UP, (-c, -s, 0.0))
        base = np.stack([away * c - along * s, away * s + along * c, z], -1) - normal * (sunk - 0.05)[:, None]
        facing = unit(normal + 0.35 * UP + 0.6 * rng.normal(size=base.shape))
        grow = unit(np.cross(facing, random_directions(rng, count)) + 0.3 * UP)
        size = rng.uniform(0.055, 0.105, count)
        colors = tinted(rng, DEEP_GREENS, count, 0.17) * np.clip(1.2 - 3 * sunk, 0.5, 1.2)[:, None]
        flush = rng.uniform(size=count) < 0.08
        colors[flush] = tinted(rng, LIME, int(flush.sum()), 0.1)
        green.append(kites(base, grow, facing, size, size * 0.62, np.clip(colors, 0, 1)))
        # Longer than the run, so that the boxes of two sides overlap in the corner.
        length, mid, tall = stop - start + 0.2, (start + stop) / 2, height - 0.04
        centre = np.array([(half + 0.09 + depth / 2) * c - mid * s, (half + 0.09 + depth / 2) * s + mid * c, tall / 2])
        slab = box((length, depth, tall)) if abs(s) > 0.5 else box((depth, length, tall))
        core.append(slab.painted((0.22, 0.30, 0.15)).moved(offset=centre))
    return {"foliage": green, "matte": core}


def ivy(rng: np.random.Generator, count: int = 6500) -> Mesh:
    """Ivy that climbs the brick wall in tongues and hangs over its top."""
    y = rng.uniform(-4.6, 4.6, 4 * count)
    z = rng.uniform(0, 2.1, 4 * count)
    limit = 1.0 + 0.75 * np.sin(y * 1.25 + 0.6) + 0.35 * np.sin(y * 3.7) + 0.15 * np.sin(y * 11)
    keep = np.flatnonzero(z < limit)[:count]
    base = np.stack([WALL_X + 0.03 + rng.exponential(0.035, len(keep)), y[keep], z[keep]], -1)
    facing = unit(np.array([1.0, 0, 0.35]) + 0.4 * rng.normal(size=base.shape))
    along = unit(np.array([0.2, 0, -1.0]) + 0.5 * rng.normal(size=base.shape))
    size = rng.uniform(0.06, 0.11, len(keep))
    return kites(base, along, facing, size, size * 0.85, tinted(rng, DEEP_GREENS + LIME[:1], len(keep), 0.15))


def border(rng: np.random.Generator) -> Mesh:
    """Shrubs, roses, hydrangeas, lavender and ferns along the foot of the hedge and of the wall."""
    parts = []
    flowers: list[list[Color]] = [
        [(0.93, 0.80, 0.84), (0.86, 0.46, 0.58)],
        [(0.95, 0.93, 0.88)],
        [(0.93, 0.78, 0.30)],
        [(0.60, 0.52, 0.86)],
    ]
    for side in range(4):
        c, s = np.cos(side * np.pi / 2), np.sin(side * np.pi / 2)
        along = -5.9
        while along < 5.9:
            width = rng.uniform(0.32, 0.62)
            away = HEDGE_HALF - rng.uniform(0.45, 0.7) - (0.3 if side == 2 else 0.0)
            tall = width * rng.uniform(0.7, 1.2)
            at = np.array([away * c - (along + width) * s, away * s + (along + width) * c, 0.0])
            style = rng.integers(5)
            if style == 0:
                parts.append(_lavender(rng, at, 90, width * 0.8, 0.55))
            elif style == 1:
                parts.append(fern(rng, at, 18, width * 1.3, LIME, 16))
            else:
                shade = (GREENS, DEEP_GREENS, LIME, SILVER)[rng.integers(4)]
                parts.append(cloud(rng, at + UP * tall * 0.8, (width, width, tall), 1500, shade, 0.075))
                if style > 2:
                    around = random_directions(rng, 26)
                    around = around[around[:, 2] > -0.2]
                    heads = at + UP * tall * 0.8 + around * (width, width, tall) * 0.95
                    parts.append(tufts(rng, heads, 0.055, 26, flowers[rng.integers(4)], 0.04))
            along += width * 1.75
    return merge(parts)


def trees(rng: np.random.Generator) -> Mesh:
    """Trees behind the hedge and the wall."""
    parts = []
    for angle, distance, height, reach in (
        (0.35, 10.6, 3.6, 1.9), (1.05, 11.8, 4.6, 2.5), (1.9, 10.2, 3.4, 1.8), (2.75, 11.2, 4.2, 2.3),
        (3.5, 9.9, 3.5, 1.9), (4.3, 12.2, 4.8, 2.6), (5.1, 10.6, 3.5, 1.9), (5.75, 11.8, 4.5, 2.4),
    ):  # fmt: skip
        foot = np.array([np.cos(angle) * distance, np.sin(angle) * distance, 0.0])
        palette = (GREENS, DEEP_GREENS, LIME + GREENS, GREENS + SILVER)[rng.integers(4)]
        crown = foot + UP * height
        parts.append(cloud(rng, crown, (reach, reach, reach * 0.95), 7500, palette, 0.24, 22))
        parts.append(trunk([foot, foot + UP * height * 0.6, crown], (0.16, 0.12, 0.05)))
    return merge(parts)
