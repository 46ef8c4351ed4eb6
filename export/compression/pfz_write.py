"""Writer of .pfz; the reader and docs/format-pfz.md say what is in it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.pfz import (
    ANTIALIASED,
    CHUNK,
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
    decode_pfz,
    energy_class,
    read_pfz,
)
from prismfield.export.compression.pfz_coder import Encoder, plane_of
from prismfield.export.compression.pfz_grid import Grid, PfzSteps, Rounding, Values, grid_of, importance_of
from prismfield.export.compression.pfz_models import Plane
from prismfield.export.verify import write_verified
from prismfield.render.curves import interleave, morton_codes

Ints = NDArray[np.int64]
_CLASSES = {"scale": 12, "flat": 6, "thin": 6, "opacity": 6, "c0": 16, "c1": 10, "c2": 10}
_LANES, _SYMBOLS_A_LANE = 256, 64


def encode_pfz(asset: SplatAsset, steps: PfzSteps, importance: NDArray | None = None) -> bytes:
    """The bytes of a .pfz.

    Args:
        asset: must not be empty.
        steps: how coarsely.
        importance: [N] which Gaussians come first, and count most where harmonics are approximated; None: by opacity and area.
    """
    if importance is None:
        importance = importance_of(asset)
    values, grid = grid_of(asset, steps, importance)
    ranks = ranks_of(importance)
    symbols = Rounding(grid, torch.float64).symbols(values, torch.from_numpy(2.0 ** (grid.finer(ranks) / 4)))
    return encode_symbols(symbols, ranks, grid, asset)


def encode_symbols(symbols: Values, ranks: Ints, grid: Grid, like: SplatAsset) -> bytes:
    """The bytes of a .pfz.

    Args:
        symbols: of N Gaussians, N >= 1, as `Rounding.symbols` gives them.
        ranks: [N] their classes of importance.
        grid: what they were rounded to, in the user's frame.
        like: has the same degree of harmonics, direction up and way of drawing.
    """
    found = _Symbols.of(symbols)
    scale_end, turn_end = 2 * int(found.scale.max()) + 1, int((found.flat + found.thin).max()) + 1
    grid = replace(grid, depths=grid.depths[:scale_end], turns=grid.turns[:turn_end])
    coded = [_prepare(found, rows, int(grid.finer(np.array(rank)))) for rank, rows in chunks_of(found.place, ranks)]
    names = (*PLANES, *(f"h{i}" for i in range(len(grid.codes))))
    planes = {name: _plane(name, [chunk.planes.get(name, ()) for chunk in coded]) for name in names}
    body = b"".join(_encode_chunk(chunk, planes) for chunk in coded)
    return _header(grid, planes, len(found.scale), len(coded), like) + body


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


def ranks_of(importance: NDArray) -> Ints:
    """[N] classes of importance, the most important 0; each is as large as all before it."""
    count = len(importance)
    ranks = np.zeros(count, np.int64)
    order = np.argsort(-importance, kind="stable")
    start = rank = 0
    size = max(count // 16, min(count, 2048))
    while start < count:
        stop = min(count, max(start + size, 2 * start))
        if count - stop < size:
            stop = count
        ranks[order[start:stop]] = rank
        start, rank = stop, rank + 1
    return ranks


def chunks_of(means: NDArray, ranks: Ints) -> list[tuple[int, Ints]]:
    """(class of importance, its rows), the most important first; large classes are cut in space."""
    found = []
    for rank in range(int(ranks.max(initial=0)) + 1):
        rows = np.flatnonzero(ranks == rank)
        along = np.argsort(morton_codes(means[rows]), kind="stable")
        found += [(rank, np.sort(part)) for part in np.array_split(rows[along], -(-len(rows) // MAX_CHUNK))]
    return [(rank, rows) for rank, rows in found if len(rows)]


def levels_of(symbols: Values, ranks: Ints) -> NDArray[np.int64]:
    """[N] octree level of the cells of each Gaussian's chunk."""
    found = _Symbols.of(symbols)
    levels = np.zeros(len(ranks), np.int64)
    for _, rows in chunks_of(found.place, ranks):
        levels[rows] = _level(np.sort(found.cells[rows]), found.depth[rows])
    return levels


def file_order(symbols: Values, ranks: Ints) -> Ints:
    """[N] the rows in the order in which a reader gets them."""
    found = _Symbols.of(symbols)
    return np.concatenate([_sorted(found, rows) for _, rows in chunks_of(found.place, ranks)])


class _Symbols(NamedTuple):
    """Whole numbers of all Gaussians; see `Rounding.symbols`."""

    place: NDArray
    cells: NDArray[np.uint64]
    """[N] Morton codes of the deepest level."""
    scale: Ints
    flat: Ints
    thin: Ints
    depth: Ints
    bits: Ints
    opacity: Ints
    turned: Ints
    colors: Ints
    coefficients: Ints

    @classmethod
    def of(cls, symbols: Values) -> _Symbols:
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in symbols.items()}
        place = arrays.pop("place")
        cells = interleave((place * place.dtype.type(1 << MAX_DEPTH)).astype(np.uint64))
        return cls(place, cells, **{name: array.astype(np.int64) for name, array in arrays.items()})


@dataclass(frozen=True)
class _Chunk:
    level: int
    count: int
    finer: int
    planes: dict[str, list[tuple[Ints, Ints | None, int]]]
    """Values, contexts and how many contexts, in order."""


def _prepare(symbols: _Symbols, rows: Ints, finer: int) -> _Chunk:
    rows = _sorted(symbols, rows)
    cells, depth, bits = symbols.cells[rows], symbols.depth[rows], symbols.bits[rows]
    level = _level(cells, depth)
    depth = np.maximum(depth, level)
    planes: dict[str, list[tuple[Ints, Ints | None, int]]] = {}
    _plan_cells(planes, cells, level)
    for name in ("scale", "flat", "thin", "opacity"):
        planes[name] = [(getattr(symbols, name)[rows], None, 1)]
    planes["refine"] = []
    for step in range(int((depth - level).max(initial=0))):
        shift = 3 * (MAX_DEPTH - level - step - 1)
        some = cells[depth - level > step] >> np.uint64(shift) & np.uint64(7)
        planes["refine"].append((some.astype(np.int64), None, 1))
    for i in range(3):
        planes["q" + "xyz"[i]] = [(symbols.turned[rows, i], bits, 9)]
        planes[f"c{i}"] = [(symbols.colors[rows, i], None, 1)]
    energy = np.zeros(len(rows), np.int64)
    for i in range(symbols.coefficients.shape[1]):
        found = symbols.coefficients[rows, i]
        planes[f"h{i}"] = [(found, energy_class(energy), ENERGY_CLASSES)]
        energy = energy + np.abs(found)
    return _Chunk(level, len(rows), finer, planes)


def _sorted(symbols: _Symbols, rows: Ints) -> Ints:
    return rows[np.argsort(symbols.cells[rows], kind="stable")]


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


def _encode_chunk(chunk: _Chunk, planes: dict[str, Plane]) -> bytes:
    lanes = max(1, min(_LANES, chunk.count // _SYMBOLS_A_LANE))
    encoder = Encoder(lanes)
    for name in (*_ORDER, *(name for name in planes if name not in _ORDER)):
        for values, given, givens in chunk.planes[name]:
            encoder.plane(planes[name], values, given, givens)
    body = encoder.finish()
    return CHUNK.pack(len(body), zlib.crc32(body), chunk.count, lanes, chunk.level, chunk.finer) + body


def _header(grid: Grid, planes: dict[str, Plane], count: int, chunks: int, like: SplatAsset) -> bytes:
    steps = (grid.scale_low, grid.scale_step, grid.opacity_step, grid.color_step, grid.sh_step)
    text = NUMBERS.pack(*grid.low, grid.extent, *steps, *(like.up or (0.0, 0.0, 0.0)), 0.0)
    for table in (grid.depths, grid.turns):
        text += struct.pack("<H", len(table)) + table.tobytes()
    text += grid.norms.astype("<f4").tobytes() + grid.codes.tobytes()
    for plane in planes.values():
        text += struct.pack("<hBB", plane.low, len(plane.prior) - 1, plane.classes) + plane.prior.tobytes()
    packed = zlib.compress(text, 9)
    flags = ANTIALIASED * like.antialiased + UP_KNOWN * (like.up is not None)
    fixed = (count, chunks, like.sh_degree, len(grid.codes), 0, len(packed), len(text))
    return FIXED.pack(MAGIC, VERSION, flags, *fixed) + packed
