"""Writer of .pfz; the reader and docs/format-pfz.md say what is in it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.pfz import (
    ANTIALIASED,
    CHUNK,
    COLOR,
    ENERGY_CLASSES,
    FIXED,
    MAGIC,
    MAX_CHUNK,
    MAX_DEPTH,
    NUMBERS,
    PLANES,
    POPULATION,
    UP_KNOWN,
    VERSION,
    Tables,
    decode_pfz,
    energy_class,
    read_pfz,
)
from prismfield.export.compression.pfz_coder import Encoder, plane_of
from prismfield.export.compression.pfz_models import Plane
from prismfield.export.verify import write_verified
from prismfield.render.curves import interleave

Ints = NDArray[np.int64]
_CLASSES = {"scale": 12, "flat": 6, "thin": 6, "opacity": 6, "c0": 16, "c1": 10, "c2": 10}
_LANES, _SYMBOLS_A_LANE = 256, 64


@dataclass(frozen=True)
class PfzSteps:
    """How coarsely each attribute is rounded. Twice the steps: about a bit less of each number."""

    position: float = 0.35
    """Side of the cell that a Gaussian is put into, in standard deviations (geometric mean of the two larger ones), at most."""
    scale: float = 0.22
    """Of the logarithm of a standard deviation."""
    flattest: float = 150.0
    """The largest standard deviation by the smallest is at most that."""
    opacity: float = 0.04
    turn: float = 0.4
    """Of a quaternion's component, of a Gaussian twice as long as wide; finer in proportion for longer ones."""
    color: float = 0.12
    """Of a harmonic of degree 0; 0.28 times that in a channel's value."""
    sh: float = 0.07
    """Of a coefficient of the higher ones."""
    dead: float = 0.05
    """What a coefficient of the higher harmonics is short of the middle between two steps and still goes down."""
    chunk_factor: float = 1.5
    """Steps of colour of each further class of importance, by those of the class before."""

    def times(self, factor: float) -> PfzSteps:
        """All of them coarser, or finer."""
        names = ("position", "scale", "opacity", "turn", "color", "sh")
        values = {name: getattr(self, name) * factor for name in names}
        return PfzSteps(**(vars(self) | values))


def encode_pfz(asset: SplatAsset, steps: PfzSteps, importance: NDArray | None = None) -> bytes:
    """The bytes of a .pfz.

    Args:
        asset: must not be empty.
        steps: how coarsely.
        importance: [N] which Gaussians come first, and count most where harmonics are approximated; None: by opacity and area.
    """
    if importance is None:
        importance = importance_of(asset)
    chosen = chunks_of(asset, importance)
    raw, tables = _round(asset, steps, importance)
    coded = [_prepare(raw, rows, tables, steps, rank) for rank, rows in chosen]
    planes = {
        name: _plane(name, [chunk.planes.get(name, ()) for chunk in coded])
        for name in (*PLANES, *raw.coefficient_names)
    }
    tables = _Tables(**(vars(tables) | {"planes": planes, "chunks": len(coded)}))
    return _header(tables) + b"".join(_encode_chunk(chunk, tables) for chunk in coded)


def write_pfz(path: Path, asset: SplatAsset, steps: PfzSteps | None = None, importance: NDArray | None = None) -> None:
    """Write a .pfz, read it back and compare before it takes the name `path`; lossy, `steps` says how much.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    if len(asset) == 0:
        raise ValueError(f"{path}: there is nothing to write, the scene has no {asset.noun}")
    write_encoded(path, encode_pfz(asset, steps or PfzSteps(), importance))


def write_encoded(path: Path, data: bytes) -> None:
    """Write what `encode_pfz` gave; the file takes its name after the same Gaussians were read from it.

    Raises:
        OSError: the file could not be written, or came back different.
    """
    fields = ("means", "quats", "scales", "opacities", "sh", "up", "antialiased")
    write_verified(path, decode_pfz(data), lambda to, _: _write_bytes(to, data), read_pfz, dict.fromkeys(fields, 0.0))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def importance_of(asset: SplatAsset) -> NDArray[np.float64]:
    """[N] opacity times the area of the ellipse of the two larger standard deviations."""
    scales = np.sort(asset.scales.astype(np.float64), 1)
    return asset.opacities * scales[:, 1] * scales[:, 2]


def chunks_of(asset: SplatAsset, importance: NDArray) -> list[tuple[int, NDArray[np.int64]]]:
    """(class of importance, its Gaussians), the most important first: classes double in size, large ones are cut in space."""
    count = len(asset)
    order = np.argsort(-importance, kind="stable")
    start = 0
    size = max(count // 16, min(count, 2048))
    found = []
    rank = 0
    while start < count:
        stop = min(count, max(start + size, 2 * start))
        if count - stop < size:
            stop = count
        rows = order[start:stop]
        means = asset.means[rows].astype(np.float64)
        span = max(float(np.ptp(means, 0).max()), 1e-30)
        along = np.argsort(
            interleave(((means - means.min(0)) / span * ((1 << MAX_DEPTH) - 1)).astype(np.uint64)), kind="stable"
        )
        found += [(rank, np.sort(part)) for part in np.array_split(rows[along], -(-len(rows) // MAX_CHUNK))]
        start, rank = stop, rank + 1
    return found


class _Raw(NamedTuple):
    """Of all Gaussians: what is rounded, before it is."""

    cells: NDArray[np.uint64]
    """[N] Morton codes of the deepest level."""
    scale: Ints
    flat: Ints
    thin: Ints
    depth: Ints
    bits: Ints
    opacity: Ints
    turned: NDArray
    """[N, 3] quaternion components."""
    colors: NDArray
    """[N, 3]"""
    coefficients: NDArray
    """[N, rank]"""
    coefficient_names: list[str]


def _round(asset: SplatAsset, steps: PfzSteps, importance: NDArray) -> tuple[_Raw, _Tables]:
    means = asset.means.astype(np.float64)
    low = means.min(0).astype(np.float32).astype(np.float64)
    extent = float(np.float32(max(float((means - low).max()) * 1.0001, 1e-12)))
    quats, scales = canonical(asset.quats.astype(np.float64), asset.scales.astype(np.float64))
    largest = np.maximum(scales[:, 0], extent * 1e-6)
    ln_scales = np.log(np.maximum(np.maximum(scales, largest[:, None] / steps.flattest), 1e-30))
    scale_step = max(steps.scale, float(np.ptp(ln_scales[:, 0])) / 250)
    scale_low = float(ln_scales[:, 0].min())
    rounded = np.round((ln_scales - scale_low) / scale_step).astype(np.int64)
    scale, flat, thin = rounded[:, 0], rounded[:, 0] - rounded[:, 1], rounded[:, 1] - rounded[:, 2]
    sizes = np.arange(2 * scale.max() + 1) / 2 * scale_step + scale_low  # ln of what `position` refers to
    depths = np.clip(np.ceil(np.log2(extent / steps.position) - sizes / np.log(2)), 1, MAX_DEPTH).astype(np.uint8)
    ratios = np.exp(np.arange((flat + thin).max() + 1) * scale_step)
    # Nothing is seen of how a sphere is turned; of a needle, its width is a share of its length.
    turns = np.clip(np.ceil(np.log2(np.maximum((ratios - 1 / ratios) / 1.5 / steps.turn, 1))) + 1, 1, 8).astype(
        np.uint8
    )
    cells = interleave(np.clip((means - low) / extent * (1 << MAX_DEPTH), 0, (1 << MAX_DEPTH) - 1).astype(np.uint64))
    bits = turns[flat + thin].astype(np.int64)
    opacity_step = max(steps.opacity, 1 / 255)
    opacity = np.round(asset.opacities.astype(np.float64) / opacity_step).astype(np.int64)
    opacity = np.maximum(opacity, 1)
    rest = asset.sh[:, 1:].reshape(len(asset), -1).astype(np.float64)
    basis, norms = _basis(rest, importance, steps.sh)
    coefficients = (
        rest @ np.linalg.pinv(basis * (norms / 127)[:, None].astype(np.float64))
        if len(basis)
        else np.zeros((len(asset), 0))
    )
    colors = asset.sh[:, 0].astype(np.float64) @ COLOR.T
    color_step = max(steps.color, _range(colors) / 250)
    sh_step = max(steps.sh, _range(coefficients) / 250)
    names = [f"h{i}" for i in range(len(basis))]
    raw = _Raw(
        cells,
        scale,
        flat,
        thin,
        depths[np.maximum(2 * scale - flat, 0)].astype(np.int64),
        bits,
        opacity,
        quats[:, 1:],
        colors,
        coefficients,
        names,
    )
    numbers = {"scale_low": scale_low, "scale_step": scale_step, "opacity_step": opacity_step}
    numbers |= {"color_step": color_step, "sh_step": sh_step}
    tables = _Tables(
        count=len(asset),
        chunks=0,
        sh_degree=asset.sh_degree,
        flags=ANTIALIASED * asset.antialiased + UP_KNOWN * (asset.up is not None),
        low=low,
        extent=extent,
        up=asset.up,
        depths=depths,
        turns=turns,
        basis=basis.astype(np.float64) * (norms / 127)[:, None],
        planes={},
        codes=basis,
        norms=norms,
        **{name: float(np.float32(value)) for name, value in numbers.items()},
    )
    return raw, tables


def _range(values: NDArray) -> float:
    """Of all but the farthest 1 in 10,000 of each column, the widest."""
    if values.size == 0:
        return 0.0
    low, high = np.quantile(values, [1e-4, 1 - 1e-4], axis=0)
    return float((high - low).max())


def canonical(quats: NDArray, scales: NDArray) -> tuple[NDArray, NDArray]:
    """The same ellipsoids with scales that fall and w the largest component of the quaternion: of 24 ways to write one, this."""
    order = np.argsort(-scales, 1, kind="stable")
    matrix = np.take_along_axis(_matrices(quats), order[:, None], 2)
    matrix[:, :, 2] *= np.sign(np.linalg.det(matrix))[:, None]
    found = _quaternions(matrix)
    w, x, y, z = found.T
    turned = np.stack([found, np.stack([x, -w, -z, y], 1), np.stack([y, z, -w, -x], 1), np.stack([z, -y, x, -w], 1)], 1)
    best = np.abs(found).argmax(1)
    found = turned[np.arange(len(found)), best]
    return found * np.where(found[:, :1] < 0, -1, 1), np.take_along_axis(scales, order, 1)


def _matrices(quats: NDArray) -> NDArray:
    w, x, y, z = quats.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _quaternions(m: NDArray) -> NDArray:
    """[N, 4] of rotation matrices: the row of q q^T with the largest diagonal, for accuracy."""
    trace = m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]
    diagonal = np.stack([1 + trace, *(1 - trace + 2 * m[:, i, i] for i in range(3))], 1)
    a, b, c = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    d, e, f = m[:, 0, 1] + m[:, 1, 0], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 2] + m[:, 2, 1]
    g = diagonal.T
    rows = np.stack(
        [np.stack(row, 1) for row in ((g[0], a, b, c), (a, g[1], d, e), (b, d, g[2], f), (c, e, f, g[3]))], 1
    )
    found = rows[np.arange(len(m)), diagonal.argmax(1)]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _basis(rest: NDArray, importance: NDArray, step: float) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The directions along which harmonics vary most, and that a step resolves: ([rank, terms] of -127..127, [rank] of 127)."""
    if rest.shape[1] == 0 or not rest.any():
        return np.zeros((0, rest.shape[1]), np.int8), np.zeros(0, np.float32)
    weights = np.sqrt(importance.astype(np.float64) + 1e-12 * importance.max(initial=0) + 1e-300)
    covariance = (rest * (weights / weights.sum())[:, None]).T @ rest
    variances, directions = np.linalg.eigh(covariance)
    kept = np.flatnonzero(variances > (0.2 * step) ** 2)[::-1]
    directions = directions[:, kept].T
    norms = np.abs(directions).max(1, initial=1e-12).astype(np.float32)
    return np.round(directions / norms[:, None] * 127).astype(np.int8), norms


@dataclass(frozen=True)
class _Tables(Tables):
    codes: NDArray[np.int8]
    """[rank, terms] the basis as it is stored, -127..127."""
    norms: NDArray[np.float32]
    """[rank] what 127 stands for."""


@dataclass(frozen=True)
class _Chunk:
    level: int
    count: int
    finer: int
    planes: dict[str, list[tuple[Ints, Ints | None, int]]]
    """Values, contexts and how many contexts, in order."""


def _prepare(raw: _Raw, rows: NDArray[np.int64], tables: Tables, steps: PfzSteps, rank: int) -> _Chunk:
    rows = rows[np.argsort(raw.cells[rows], kind="stable")]
    depth = raw.depth[rows]
    level = _level(raw.cells[rows], depth)
    depth = np.maximum(depth, level)
    finer = round(4 * rank * float(np.log2(steps.chunk_factor)))
    coarser = 2.0 ** (finer / 4)
    planes: dict[str, list[tuple[Ints, Ints | None, int]]] = {}
    _plan_cells(planes, raw.cells[rows], level)
    for name in ("scale", "flat", "thin"):
        planes[name] = [(getattr(raw, name)[rows], None, 1)]
    planes["refine"] = []
    for step in range(int((depth - level).max(initial=0))):
        some = depth - level > step
        shift = 3 * (MAX_DEPTH - level - step - 1)
        planes["refine"].append(((raw.cells[rows][some] >> np.uint64(shift) & np.uint64(7)).astype(np.int64), None, 1))
    planes["opacity"] = [(raw.opacity[rows], None, 1)]
    bits = raw.bits[rows]
    turned = np.round(raw.turned[rows] * (np.sqrt(2) * (2 ** (bits - 1) - 1))[:, None]).astype(np.int64)
    for i, name in enumerate(("qx", "qy", "qz")):
        planes[name] = [(turned[:, i], bits, 9)]
    colors = np.clip(np.round(raw.colors[rows] / (tables.color_step * coarser)), -127, 127).astype(np.int64)
    for i in range(3):
        planes[f"c{i}"] = [(colors[:, i], None, 1)]
    energy = np.zeros(len(rows), np.int64)
    for i, name in enumerate(raw.coefficient_names):
        scaled = raw.coefficients[rows, i] / (tables.sh_step * coarser)
        found = (np.sign(scaled) * np.floor(np.minimum(np.abs(scaled) + 0.5 - steps.dead, 127))).astype(np.int64)
        planes[name] = [(found, energy_class(energy), ENERGY_CLASSES)]
        energy = energy + np.abs(found)
    return _Chunk(level, len(rows), finer, planes)


def _level(cells: NDArray[np.uint64], depth: Ints) -> int:
    """The octree's level from which on Gaussians go down alone: where most cells hold one, and few want less."""
    least = int(np.quantile(depth, 0.02))
    for level in range(1, MAX_DEPTH):
        parents = len(np.unique(cells >> np.uint64(3 * (MAX_DEPTH - level))))
        if level >= least or parents > 0.8 * len(cells):
            return level
    return MAX_DEPTH


def _plan_cells(planes: dict[str, list[tuple[Ints, Ints | None, int]]], cells: NDArray[np.uint64], level: int) -> None:
    planes["occupancy"] = []
    parents = np.zeros(1, np.int64)
    for above in range(level):
        children = np.unique(cells >> np.uint64(3 * (MAX_DEPTH - above - 1)))
        nodes, of = np.unique(children >> np.uint64(3), return_inverse=True)
        occupied = np.zeros(len(nodes), np.int64)
        np.bitwise_or.at(occupied, of, 1 << (children & np.uint64(7)).astype(np.int64))
        planes["occupancy"].append((occupied, parents, 9))
        parents = POPULATION[occupied][of]
    more = np.unique(cells >> np.uint64(3 * (MAX_DEPTH - level)), return_counts=True)[1].astype(np.int64) - 1
    planes["count"] = [(more % 256, parents, 9)]
    planes["count_high"] = [(more // 256, None, 1)]


def _plane(name: str, parts: list) -> Plane:
    """The model of all values that the chunks have for a name."""
    values = [values for part in parts for values, _, _ in part]
    return plane_of(np.concatenate([np.zeros(0, np.int64), *values]), _CLASSES.get(name, 1))


_ORDER = (
    "occupancy",
    "count",
    "count_high",
    "scale",
    "flat",
    "thin",
    "refine",
    "opacity",
    "qx",
    "qy",
    "qz",
    "c0",
    "c1",
    "c2",
)


def _encode_chunk(chunk: _Chunk, tables: Tables) -> bytes:
    lanes = max(1, min(_LANES, chunk.count // _SYMBOLS_A_LANE))
    encoder = Encoder(lanes)
    for name in (*_ORDER, *(name for name in chunk.planes if name not in _ORDER)):
        for values, given, givens in chunk.planes[name]:
            encoder.plane(tables.planes[name], values, given, givens)
    body = encoder.finish()
    return CHUNK.pack(len(body), zlib.crc32(body), chunk.count, lanes, chunk.level, chunk.finer) + body


def _header(tables: _Tables) -> bytes:
    up = tables.up or (0.0, 0.0, 0.0)
    steps = (tables.scale_low, tables.scale_step, tables.opacity_step, tables.color_step, tables.sh_step)
    text = NUMBERS.pack(*tables.low, tables.extent, *steps, *up, 0.0)
    for table in (tables.depths, tables.turns):
        text += struct.pack("<H", len(table)) + table.tobytes()
    text += tables.norms.astype("<f4").tobytes() + tables.codes.tobytes()
    for plane in tables.planes.values():
        text += struct.pack("<hBB", plane.low, len(plane.prior) - 1, plane.classes) + plane.prior.tobytes()
    packed = zlib.compress(text, 9)
    fixed = (tables.count, tables.chunks, tables.sh_degree, len(tables.codes), 0, len(packed), len(text))
    return FIXED.pack(MAGIC, VERSION, tables.flags, *fixed) + packed
