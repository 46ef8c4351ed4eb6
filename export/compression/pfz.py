"""Reader of .pfz, our smallest file of Gaussians; docs/format-pfz.md says byte by byte what is in it.

A header, then chunks, the most important Gaussians first; each can be read without the others. Positions are the cells of an
octree; everything else is whole numbers, modelled plane by plane (`pfz_models.py`) and multiplied by steps.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.pfz_models import Decoder, Plane
from prismfield.render.curves import deinterleave

MAGIC, VERSION = b"PFZ1", 1
FIELD_MAGIC = b"PFZF"
"""Of a .pfz that holds a radiance field: `field_pfz.py` reads it."""
FIXED = struct.Struct("<4sHHIIBBHII")
"""magic, version, flags, Gaussians, chunks, harmonic degree, coefficients, 0, bytes of tables packed and unpacked."""
NUMBERS = struct.Struct("<13f")
"""Of the tables: corner x y z and extent of the octree's cube; the least ln scale, the steps of ln scale, opacity, colour and
coefficients; up x y z; 0."""
CHUNK = struct.Struct("<IIIHBb")
"""bytes that follow, their CRC-32, Gaussians, lanes, octree level, quarters of a power of two on the steps of colour."""
ANTIALIASED, UP_KNOWN = 1, 2
MAX_CHUNK, MAX_DEPTH, MAX_TABLES, MAX_LANES = 1 << 16, 21, 1 << 18, 1 << 12
_TURN, _HUES = ("qx", "qy", "qz"), ("c0", "c1", "c2")
PLANES = ("occupancy", "count", "count_high", "refine", "scale", "flat", "thin", "opacity", *_TURN, *_HUES)
"""In this order in the header; planes of coefficients follow."""
COLOR = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3.0], [2.0], [6.0]])
"""Rows: what c0, c1, c2 are of red, green and blue; orthonormal."""
POPULATION = np.array([bin(i).count("1") for i in range(256)])


@dataclass(frozen=True)
class Tables:
    """What the header says about all chunks."""

    count: int
    chunks: int
    sh_degree: int
    flags: int
    low: NDArray[np.float64]
    """[3] corner of the octree's cube, user units."""
    extent: float
    scale_low: float
    scale_step: float
    opacity_step: float
    color_step: float
    sh_step: float
    up: tuple[float, float, float] | None
    depths: NDArray[np.uint8]
    """Octree level of a Gaussian by 2 `scale` - `flat`, the last for all beyond."""
    turns: NDArray[np.uint8]
    """Bits of a quaternion's components by `flat` + `thin`, the last for all beyond."""
    basis: NDArray[np.float64]
    """[coefficients, 3 ((degree + 1)^2 - 1)], what a coefficient of 1 adds to the harmonics."""
    planes: dict[str, Plane]


def read_pfz(path: Path, *, partial: bool = False) -> SplatAsset:
    """Read a .pfz.

    Args:
        path: the file.
        partial: take the chunks that are whole of a file that is cut short: a coarser scene.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    with path.open("rb") as file:
        try:
            return decode_pfz(file.read(), partial=partial)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def decode_pfz(data: bytes, *, partial: bool = False) -> SplatAsset:
    """The Gaussians in the bytes of a .pfz; see `read_pfz`."""
    tables, at = read_tables(data)
    parts: list[dict[str, NDArray]] = []
    while len(parts) < tables.chunks:
        if at + CHUNK.size > len(data) or at + CHUNK.size + CHUNK.unpack_from(data, at)[0] > len(data):
            if partial and parts:
                break
            raise ValueError(f"the file is cut short: {len(parts)} of {tables.chunks} chunks are whole")
        size, crc, count, lanes, level, finer = CHUNK.unpack_from(data, at)
        body = data[at + CHUNK.size : at + CHUNK.size + size]
        if zlib.crc32(body) != crc:
            raise ValueError(f"chunk {len(parts)} is damaged: its checksum differs")
        if not (0 < count <= MAX_CHUNK and 0 < lanes <= MAX_LANES and level <= MAX_DEPTH):
            raise ValueError(f"chunk {len(parts)} has a header that cannot be")
        parts.append(_decode_chunk(tables, Decoder(body, lanes), count, level, 2.0 ** (finer / 4)))
        at += CHUNK.size + size
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not partial and len(found["means"]) != tables.count:
        raise ValueError(f"the header promises {tables.count} Gaussians, the chunks have {len(found['means'])}")
    single: dict[str, Any] = {name: values.astype(np.float32) for name, values in found.items()}
    return SplatAsset(**single, up=tables.up, antialiased=bool(tables.flags & ANTIALIASED))


def read_tables(data: bytes) -> tuple[Tables, int]:
    """The header, and where the first chunk begins.

    Raises:
        ValueError: one line saying what is wrong with it.
    """
    if data[:4] == FIELD_MAGIC:
        raise ValueError("it holds a radiance field, which is not made of Gaussians; expected splats")
    if data[:4] != MAGIC:
        raise ValueError("not a .pfz file: it does not begin with PFZ1")
    if len(data) < FIXED.size:
        raise ValueError("the file is cut short in its header")
    _, version, flags, count, chunks, degree, rank, _, packed, unpacked = FIXED.unpack_from(data)
    terms = 3 * ((degree + 1) ** 2 - 1)
    if version != VERSION:
        raise ValueError(f"expected version {VERSION} of .pfz, got {version}")
    if degree > 3 or rank > terms or unpacked > MAX_TABLES or not 0 < chunks <= count:
        raise ValueError("the header cannot be that of a .pfz")
    if count > chunks * MAX_CHUNK or chunks * CHUNK.size > max(len(data), 1 << 20):
        raise ValueError(f"the header promises {count} Gaussians in {chunks} chunks, more than there can be")
    if FIXED.size + packed > len(data):
        raise ValueError("the file is cut short in its tables")
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data[FIXED.size : FIXED.size + packed], unpacked + 1)
    except zlib.error as error:
        raise ValueError(f"the tables are damaged ({error})") from error
    if len(text) != unpacked or not unpacker.eof:
        raise ValueError("the tables are damaged: they have another length")
    return _parse_tables(text, count, chunks, degree, rank, flags), FIXED.size + packed


def _parse_tables(text: bytes, count: int, chunks: int, degree: int, rank: int, flags: int) -> Tables:
    at, terms = NUMBERS.size, 3 * ((degree + 1) ** 2 - 1)

    def take(size: int) -> bytes:
        nonlocal at
        if at + size > len(text):
            raise ValueError("the tables are damaged: they end too early")
        at += size
        return text[at - size : at]

    if len(text) < NUMBERS.size:
        raise ValueError("the tables are damaged: they end too early")
    numbers = NUMBERS.unpack_from(text)
    if not np.isfinite(numbers).all() or min(numbers[3], *numbers[5:9]) <= 0:
        raise ValueError("the tables are damaged: a number in them cannot be")
    depths, turns = (np.frombuffer(take(struct.unpack("<H", take(2))[0]), np.uint8) for _ in range(2))
    if len(depths) == 0 or len(turns) == 0 or depths.max() > MAX_DEPTH or turns.max() > 8 or turns.min() < 1:
        raise ValueError("the tables are damaged: an octree level or a quaternion's bits cannot be")
    scales = np.frombuffer(take(4 * rank), "<f4").astype(np.float64)
    basis = np.frombuffer(take(rank * terms), np.int8).reshape(rank, terms) * (scales / 127)[:, None]
    planes = {}
    for name in (*PLANES, *(f"h{i}" for i in range(rank))):
        low, size, classes = struct.unpack("<hBB", take(4))
        prior = np.frombuffer(take(size + 1), np.uint8)
        if not 0 < classes <= 32 or prior.max() == 0:
            raise ValueError(f"the tables are damaged: plane {name} cannot be")
        planes[name] = Plane(low, prior, classes)
    if planes["occupancy"].low < 1 or planes["occupancy"].low + len(planes["occupancy"].prior) > 256:
        raise ValueError("the tables are damaged: plane occupancy cannot be")
    up = numbers[9:12] if flags & UP_KNOWN else None
    extent, *steps = numbers[3:9]
    tables: tuple[Any, ...] = (up, depths, turns, basis, planes)
    return Tables(count, chunks, degree, flags, np.array(numbers[:3]), extent, *steps, *tables)


def _decode_chunk(tables: Tables, decoder: Decoder, count: int, level: int, coarser: float) -> dict[str, NDArray]:
    """The fields of `SplatAsset`, float64, of one chunk; `coarser` multiplies the steps of colour."""
    planes = tables.planes

    def plane(name: str, given: NDArray[np.int64] | None = None, givens: int = 1) -> NDArray[np.int64]:
        return decoder.plane(planes[name], count, given, givens) + planes[name].low

    cells = _decode_cells(planes, decoder, count, level)
    scale, flat, thin = plane("scale"), plane("flat"), plane("thin")
    depth = np.maximum(tables.depths[np.clip(2 * scale - flat, 0, len(tables.depths) - 1)].astype(np.int64), level)
    cells = _refine(planes["refine"], decoder, cells, depth - level)
    size = tables.extent / 2.0**depth
    means = tables.low + (deinterleave(cells).astype(np.float64) + 0.5) * size[:, None]
    opacities = np.clip(plane("opacity") * tables.opacity_step, 0, 1)
    bits = tables.turns[np.clip(flat + thin, 0, len(tables.turns) - 1)].astype(np.int64)
    turned = np.stack([plane(name, bits, 9) for name in _TURN], 1)
    xyz = turned / np.maximum(2 ** (bits - 1) - 1, 1)[:, None] / np.sqrt(2)
    w = np.sqrt(np.maximum(1 - np.square(xyz).sum(1), 0))
    quats = np.concatenate([w[:, None], xyz], 1)
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    colors = np.stack([plane(name) for name in _HUES], 1) * (tables.color_step * coarser)
    sh = np.zeros((count, (tables.sh_degree + 1) ** 2, 3))
    sh[:, 0] = colors @ COLOR
    energy, coefficients = np.zeros(count, np.int64), np.zeros((count, len(tables.basis)))
    for i in range(len(tables.basis)):
        found = plane(f"h{i}", energy_class(energy), ENERGY_CLASSES)
        coefficients[:, i] = found
        energy += np.abs(found)
    sh[:, 1:] = (coefficients @ (tables.basis * (tables.sh_step * coarser))).reshape(count, -1, 3)
    decoder.finish()
    ln_scales = tables.scale_low + tables.scale_step * np.stack([scale, scale - flat, scale - flat - thin], 1)
    if not -700 < ln_scales.min(initial=0) <= ln_scales.max(initial=0) < 80:
        raise ValueError("a scale is out of range")
    return {"means": means, "quats": quats, "scales": np.exp(ln_scales), "opacities": opacities, "sh": sh}


ENERGY_CLASSES = 6


def energy_class(energy: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] context of a coefficient from the sum of the magnitudes before it: 0, 1, 2, 3-4, 5-8, more."""
    return np.searchsorted(np.array([0, 1, 2, 4, 8]), energy)


def _decode_cells(planes: dict[str, Plane], decoder: Decoder, count: int, level: int) -> NDArray[np.uint64]:
    """[count] Morton codes at `level`, sorted: the octree level by level, then how many Gaussians are in each cell."""
    nodes, parents = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for _ in range(level):
        children = decoder.plane(planes["occupancy"], len(nodes), parents, 9) + planes["occupancy"].low
        node, child = np.nonzero(children[:, None] >> np.arange(8) & 1)
        if len(node) > count:
            raise ValueError("a chunk has more cells than Gaussians")
        nodes = nodes[node] << np.uint64(3) | child.astype(np.uint64)
        parents = POPULATION[children][node]
    more = decoder.plane(planes["count"], len(nodes), parents, 9) + planes["count"].low
    more = more + 256 * (decoder.plane(planes["count_high"], len(nodes)) + planes["count_high"].low)
    if more.min(initial=0) < 0 or len(nodes) + more.sum() != count:
        raise ValueError("a chunk's cells do not hold as many Gaussians as it promises")
    return np.repeat(nodes, 1 + more)


def _refine(plane: Plane, decoder: Decoder, cells: NDArray[np.uint64], deeper: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Codes of cells that are `deeper` levels down."""
    cells = cells.copy()
    for step in range(int(deeper.max(initial=0))):
        some = np.flatnonzero(deeper > step)
        children = decoder.plane(plane, len(some)) + plane.low
        cells[some] = cells[some] << np.uint64(3) | (children & 7).astype(np.uint64)
    return cells
