"""Bitmaps for the bundled garden: wood, stone, brick, soil, glaze, sky. NumPy only, sRGB uint8 except the sky (linear float)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.garden_geometry import Array, Color, to_linear, unit

Bitmap = NDArray[np.uint8]

SUN_DIRECTION = unit(np.array([0.55, -0.62, 0.78]))
"""From the garden to the sun: about 43 degrees high."""


def noise(
    rng: np.random.Generator, height: int, width: int, cells: tuple[int, int], octaves: int = 5, gain: float = 0.55
) -> Array:
    """[height, width] fractal value noise that tiles, mean 0 and standard deviation 1.

    Args:
        rng: its state is advanced.
        height: rows.
        width: columns.
        cells: lattice cells of the coarsest octave, down and across.
        octaves: each has twice the cells of the one before.
        gain: amplitude of an octave relative to the one before.
    """
    total = np.zeros((height, width))
    for octave in range(octaves):
        rows, columns = cells[0] << octave, cells[1] << octave
        if rows > height or columns > width:
            break
        lattice = rng.normal(size=(rows, columns))
        y, x = np.arange(height) * rows / height, np.arange(width) * columns / width
        total += gain**octave * _interpolate(_interpolate(lattice, y, 0), x, 1)
    return (total - total.mean()) / total.std()


def _interpolate(lattice: Array, at: Array, axis: int) -> Array:
    """Smoothstep interpolation of a periodic lattice along one axis."""
    low = np.floor(at).astype(int)
    t = at - low
    shape = [1, 1]
    shape[axis] = -1
    weight = (t * t * (3 - 2 * t)).reshape(shape)
    size = lattice.shape[axis]
    return np.take(lattice, low % size, axis) * (1 - weight) + np.take(lattice, (low + 1) % size, axis) * weight


def _bitmap(color: Array) -> Bitmap:
    return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8)


def wood(rng: np.random.Generator, boards: int, tone: Color, contrast: float = 1.0) -> Bitmap:
    """`boards` boards one above the other, each 128 x 1024 with its own tint, grain along the rows and a knot or two."""
    strips = []
    for _ in range(boards):
        height, width = 128, 1024
        x, y = np.meshgrid(np.linspace(0, 8, width), np.linspace(-0.5, 0.5, height))
        rings = y * rng.uniform(3, 6) + 0.28 * noise(rng, height, width, (1, 3), 3) + rng.uniform(0, 9)
        for _ in range(rng.integers(1, 4)):
            kx, ky = rng.uniform(0.5, 7.5), rng.uniform(-0.35, 0.35)
            far = ((x - kx) / 1.1) ** 2 + ((y - ky) / 0.16) ** 2
            rings += 1.4 * np.exp(-far)
        grain = 0.5 + 0.5 * np.sin(2 * np.pi * rings)
        fibre = noise(rng, height, width, (32, 6), 3, 0.8)
        blotch = noise(rng, height, width, (1, 4), 3)
        value = 1 + contrast * (0.17 * (grain**2 - 0.4) + 0.085 * fibre + 0.06 * blotch) + rng.normal(0, 0.085)
        tint = np.asarray(tone) * np.array([1.0, 1 + rng.normal(0, 0.02), 1 + rng.normal(0, 0.05)])
        strips.append(tint * value[..., None] + 0.03 * contrast * grain[..., None] * np.array([1.0, 0.35, 0.0]))
    return _bitmap(np.concatenate(strips))


def mineral_atlas(rng: np.random.Generator, palette: Sequence[Color], speckle: float, cell: int = 192) -> Bitmap:
    """Sixteen stones or bricks in a 4 x 4 atlas, each with its own tint, stains and grains."""
    rows = []
    for _ in range(4):
        row = []
        for _ in range(4):
            tone = np.asarray(palette[int(rng.integers(len(palette)))]) * np.exp(rng.normal(0, 0.07))
            stains = noise(rng, cell, cell, (2, 2), 5)
            grains = noise(rng, cell, cell, (24, 24), 3, 0.9)
            warm = noise(rng, cell, cell, (2, 2), 3)
            value = 1 + 0.09 * stains + speckle * grains
            row.append(tone * value[..., None] + 0.018 * warm[..., None] * np.array([1.0, 0.3, -0.7]))
        rows.append(np.concatenate(row, 1))
    return _bitmap(np.concatenate(rows))


def ground(
    rng: np.random.Generator, tone: Color, contrast: float, fleck: Color, share: float, size: int = 1024
) -> Bitmap:
    """A tiling surface: soil, gravel bed or turf, with flecks of a second colour over `share` of it."""
    broad = noise(rng, size, size, (6, 6), 4)
    fine = noise(rng, size, size, (96, 96), 3, 0.8)
    color = np.asarray(tone) * (1 + contrast * (0.5 * broad + 0.7 * fine))[..., None]
    patches = noise(rng, size, size, (64, 64), 3, 0.7)
    mask = np.clip((patches - np.quantile(patches, 1 - share)) * 3, 0, 1)[..., None]
    return _bitmap(color * (1 - 0.8 * mask) + np.asarray(fleck) * 0.8 * mask)


def terracotta(rng: np.random.Generator, tone: Color, size: int = 512) -> Bitmap:
    """A pot's wall: turning marks, lime bloom towards the foot, darker damp patches."""
    marks = noise(rng, size, size, (40, 2), 3)
    bloom = np.clip(noise(rng, size, size, (3, 5), 5) * 0.5 + np.linspace(-0.7, 0.5, size)[:, None], 0, 1)
    damp = np.clip(noise(rng, size, size, (3, 4), 4), 0, 2)
    color = np.asarray(tone) * (1 + 0.05 * marks - 0.06 * damp)[..., None]
    return _bitmap(color * (1 - 0.45 * bloom[..., None]) + np.array([0.86, 0.82, 0.76]) * 0.45 * bloom[..., None])


def glaze(rng: np.random.Generator, size: int = 1024) -> Bitmap:
    """The vase: white glaze with cobalt bands, a row of petals and a running vine."""
    v, u = np.meshgrid(np.linspace(1, 0, size), np.linspace(0, 1, size, endpoint=False), indexing="ij")
    blue = np.zeros((size, size))
    for centre, half in ((0.10, 0.012), (0.135, 0.005), (0.60, 0.006), (0.66, 0.006), (0.93, 0.02)):
        blue = np.maximum(blue, np.clip((half - np.abs(v - centre)) / 0.004 + 0.5, 0, 1))
    petal = np.abs(((u * 14) % 1) - 0.5) * 2
    height = (v - 0.15) / 0.13
    outline = np.sqrt(np.clip(1 - height**2, 0, 1))
    inside = np.where((height > 0) & (height < 1), np.clip((outline - petal) * 9, 0, 1), 0)
    core = np.where((height > 0) & (height < 1), np.clip((outline * 0.75 - petal) * 9, 0, 1), 0)
    blue = np.maximum(blue, inside - 0.75 * core)
    vine = 0.44 + 0.055 * np.sin(2 * np.pi * 5 * u)
    blue = np.maximum(blue, np.clip((0.007 - np.abs(v - vine)) / 0.004 + 0.5, 0, 1))
    for k in range(30):
        at = (k + 0.5) / 30
        mid = 0.44 + 0.055 * np.sin(2 * np.pi * 5 * at) + (0.05 if k % 2 else -0.05)
        du, dv = (u - at + 0.5) % 1 - 0.5, v - mid
        lean = 0.9 if k % 2 else -0.9
        p, q = du * 2.4 + lean * dv, dv - lean * du * 2.4
        blue = np.maximum(blue, np.clip(1.3 - (p / 0.020) ** 2 - (q / 0.042) ** 2, 0, 1))
        blue = np.maximum(blue, np.clip(1.4 - ((u - at - 0.016) * 2.4 / 0.011) ** 2 - ((v - 0.63) / 0.011) ** 2, 0, 1))
    blue *= np.clip(0.86 + 0.10 * noise(rng, size, size, (12, 12), 4), 0, 1)
    cream = np.array([0.93, 0.91, 0.86]) * (1 + 0.012 * noise(rng, size, size, (8, 8), 5))[..., None]
    return _bitmap(cream * (1 - blue[..., None]) + np.array([0.10, 0.20, 0.50]) * blue[..., None])


def sky(rng: np.random.Generator, height: int = 512, sun_degrees: float = 3.2) -> Array:
    """[height, 2 * height, 3] linear radiance: blue gradient, soft clouds, a broad sun; north up, +z up.

    Column c looks along azimuth -2 pi c / width (x = cos, y = sin), row r along inclination pi r / height from +z.

    Args:
        rng: its state is advanced.
        height: rows.
        sun_degrees: diameter of the sun's disc, wider than the true half degree so that shadows are soft.
    """
    width = 2 * height
    theta = (np.arange(height) + 0.5) / height * np.pi
    phi = -(np.arange(width) + 0.5) / width * 2 * np.pi
    z = np.cos(theta)[:, None] * np.ones(width)
    dirs = np.stack([np.sin(theta)[:, None] * np.cos(phi), np.sin(theta)[:, None] * np.sin(phi), z], -1)
    up = np.clip(z, 0, 1)[..., None]
    zenith, horizon = to_linear((0.36, 0.56, 0.88)), to_linear((0.80, 0.88, 0.97))
    color = horizon * (1 - up**0.45) + zenith * up**0.45
    stretch = noise(rng, height, width, (8, 8), 6, 0.5)
    cover = np.clip((stretch - 0.25) * 0.9, 0, 1)[..., None] * np.clip(up * 6, 0, 1) * np.clip((1 - up) * 6, 0, 1)
    color = color * (1 - 0.8 * cover) + np.array([1.15, 1.13, 1.10]) * 0.8 * cover
    below = to_linear((0.35, 0.36, 0.30))
    color = np.where(z[..., None] < 0, below, 1.5 * color)
    cosine = dirs @ SUN_DIRECTION
    color = color + 0.6 * np.exp((cosine[..., None] - 1) * 60) * np.array([1.0, 0.9, 0.7])
    radius = np.deg2rad(sun_degrees) / 2
    disc = np.clip((radius - np.arccos(np.clip(cosine, -1, 1))) / np.deg2rad(0.5) + 0.5, 0, 1)[..., None]
    # Irradiance of the disc, facing it: about four times what the rest of the sky gives.
    power = 7.5 / (np.pi * radius**2)
    return color + disc * power * np.array([1.0, 0.93, 0.80])
