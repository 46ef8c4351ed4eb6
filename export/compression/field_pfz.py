"""Reader of a .pfz that holds a radiance field; docs/format-pfz.md says byte by byte what is in it.

A header in JSON, then tables of whole numbers, modelled plane by plane (`pfz_models.py`) and multiplied by steps: those of the field's grids,
level by level, and of the proposals'. Networks are halves; which cells are empty is an octree.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.base import SceneFrame
from prismfield.export.compression.pfz import FIELD_MAGIC, POPULATION
from prismfield.export.compression.pfz_models import Decoder, Plane
from prismfield.export.reading import json_object, numbers
from prismfield.render.cameras import Cameras
from prismfield.render.curves import deinterleave
from prismfield.render.samplers import OccupancyGrid
from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.config import FieldConfig, HollowConfig
from prismfield.representations.fields import Field
from prismfield.train.config import from_json

VERSION = 1
FIXED = struct.Struct("<4sHHIIIIII")
"""magic, version, 0, bytes of the header packed and unpacked, of the tables packed and unpacked, of the stream, CRC-32 of all these."""
PLANE = struct.Struct("<hBB")
"""Of each plane, before its prior: value of symbol 0, alphabet size less 1, classes."""
MAX_HEADER, MAX_TABLES, MAX_LANES, MAX_LEVELS, MAX_CAMERAS, CAMERA = 1 << 18, 1 << 22, 1 << 12, 256, 256, 18
_ALWAYS_ALLOWED, _MOST_A_BYTE = (
    1 << 24,
    256,
)  # values that a file may claim: any so many, and so many for each of its bytes
_LIMITS: dict[str, tuple[float, float]] = {
    "levels": (1, 64),
    "log2_rows": (1, 26),
    "coarsest": (1, 1 << 19),
    "finest": (1, 1 << 19),
    "width": (1, 1024),
    "occupancy": (16, 1024),
    "nests": (1, 16),
    "steps": (1, 1 << 20),
    "saliency": (1, 1024),
}
"""Of the options of a field."""


@dataclass(frozen=True)
class FieldAsset:
    """A radiance field as it is read from a file: all that drawing needs."""

    noun: ClassVar[str] = "values"

    representation: str
    """A name in `REPRESENTATIONS`."""
    config: FieldConfig
    frame: SceneFrame
    """How to get from the field's units to the user's."""
    background: float
    """Value behind the scene, of all three channels."""
    aabb: NDArray[np.float32]
    """[2, 3] scene units."""
    unbounded: bool
    active: int
    """Grids in use, of a field of voxels; else 0."""
    occupied: NDArray[np.bool_]
    """[nests, res, res, res] along x, y, z."""
    cameras: NDArray[np.float32]
    """[n, 18] some of those that it was photographed by: [3, 4] world to camera, fx, fy, cx, cy, width, height; scene frame, pixels."""
    inwards: bool
    """Whether they look at a common point."""
    tensors: dict[str, NDArray[np.float32]]
    """Tables [rows, F] and the networks' weights [P], by name."""

    def __len__(self) -> int:
        return sum(values.size for values in self.tensors.values())

    def differences(self, other: Self) -> dict[str, float]:
        """Largest difference of the numbers, and of all else: 0 or 1."""
        others = other.tensors
        if {k: v.shape for k, v in self.tensors.items()} != {k: v.shape for k, v in others.items()}:
            return {"tensors": math.inf, "rest": math.inf}
        most = max(float(np.abs(values - others[name]).max(initial=0)) for name, values in self.tensors.items())
        same = all(np.array_equal(getattr(self, n), getattr(other, n)) for n in ("occupied", "aabb", "cameras"))
        names = ("representation", "config", "frame", "background", "unbounded", "active", "inwards")
        same = same and all(getattr(self, name) == getattr(other, name) for name in names)
        return {"tensors": most, "rest": float(not same)}

    def user_cameras(self) -> list[Cameras]:
        """The cameras one by one, in the user's frame."""
        found = []
        for row in self.cameras:
            viewmat, K = torch.eye(4), torch.eye(3)
            viewmat[:3] = torch.from_numpy(row[:12].reshape(3, 4))
            K[0, 0], K[1, 1], K[0, 2], K[1, 2] = (float(x) for x in row[12:16])
            camera = Cameras(viewmat[None], K[None], int(row[16]), int(row[17]))
            found.append(self.frame.cameras_to_user(camera))
        return found

    def field(self) -> Field:
        """What draws it. What only a training would use is as at its start.

        Raises:
            ValueError: the tensors are not those of such a field.
        """
        found = {name: torch.from_numpy(values) for name, values in self.tensors.items()}
        aabb = torch.from_numpy(self.aabb)
        grid = OccupancyGrid(aabb, self.occupied.shape[1], len(self.occupied))
        grid.set_occupied(torch.from_numpy(self.occupied))
        found |= {"grid.aabb": aabb, "grid.bits": grid.bits, "grid.density": grid.density}
        found |= {"unbounded": torch.tensor(self.unbounded), "proposals.progress": torch.ones(())}
        if self.representation == "voxel":
            shares = torch.ones(len(found.get("encoding.grids.0.table", aabb)))  # the table holds them already
            found |= {"encoding.active": torch.tensor(self.active), "encoding.shares": shares}
        if self.representation == "hollow":
            mask = found.get("encoding.mask.table", aabb)[:, 0]
            found |= {"encoding.split": mask.clone(), "encoding.dual": torch.zeros_like(mask)}
            found |= {"encoding.kept": torch.ones_like(mask, dtype=torch.bool)}
            found |= {"encoding.steps": torch.tensor(0), "encoding.cut": torch.tensor(True)}
        made: Any = REPRESENTATIONS[self.representation].from_tensors(found, self.config)
        return made


@dataclass(frozen=True)
class Level:
    """A lattice of a table."""

    rows: int
    side: int
    """Points along an axis, 0 where they are hashed."""
    dims: int
    steps: tuple[float, ...]
    """[F] what a symbol of 1 stands for."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its tables."""

    asset: FieldAsset
    """Without what the tables hold."""
    nests: int
    cells: int
    """Along an axis of a nest."""
    tables: dict[str, list[Level]]
    weights: dict[str, int]
    """How many numbers of each network."""
    cameras: int
    lanes: int

    @property
    def values(self) -> int:
        """How many numbers there are in all."""
        rows = sum(level.rows * len(level.steps) for levels in self.tables.values() for level in levels)
        return rows + sum(self.weights.values()) + self.nests * self.cells**3


def is_field_file(path: Path) -> bool:
    """Whether a .pfz holds a field. Raises FileNotFoundError if there is none."""
    if path.suffix.lower() != ".pfz":
        return False
    with path.open("rb") as file:
        return file.read(4) == FIELD_MAGIC


def decode_field(data: bytes) -> FieldAsset:
    """The field in the bytes of a .pfz.

    Raises:
        ValueError: one line saying what is wrong with it.
    """
    if data[:4] != FIELD_MAGIC:
        raise ValueError("not a .pfz file of a field: it does not begin with PFZF")
    if len(data) < FIXED.size:
        raise ValueError("the file is cut short in its header")
    _, version, _, head, head_size, packed, table_size, stream, crc = FIXED.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"expected version {VERSION} of a field's .pfz, got {version}")
    if len(data) != FIXED.size + head + packed + stream:
        raise ValueError(
            f"it claims {FIXED.size + head + packed + stream:,} bytes and has {len(data):,}; is it cut short?"
        )
    if zlib.crc32(data[FIXED.size :]) != crc:
        raise ValueError("the file is damaged: its checksum differs")
    if head_size > MAX_HEADER or table_size > MAX_TABLES:
        raise ValueError("the header cannot be that of a field")
    at = FIXED.size
    header = _parse(_unpack(data[at : at + head], head_size), len(data))
    planes = _unpack(data[at + head : at + head + packed], table_size)
    return _decode(header, planes, data[at + head + packed :])


def _unpack(data: bytes, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"the tables are damaged ({error})") from error
    if len(text) != size or not unpacker.eof:
        raise ValueError("the tables are damaged: they have another length")
    return text


def _parse(text: bytes, size: int) -> Header:
    content = json_object(text, "the header")
    try:
        name, options = content["representation"], content["config"]
        if not isinstance(name, str) or not issubclass(REPRESENTATIONS.get(name, object), Field):
            raise ValueError(f"there is no field {name!r}")
        config = getattr(from_json(json.dumps({"representation": name, name: options}), "the header"), name)
        center, up = numbers(content["center"], 3, "center"), numbers(content["up"], 3, "up")
        scale, background = numbers([content["scale"], content["background"]], 2, "scale and background")
        aabb = np.array(numbers(content["aabb"], 6, "aabb"), np.float32).reshape(2, 3)
        keys = ("active", "nests", "cells", "lanes", "cameras")
        active, nests, cells, lanes, cameras = (_whole(content[key]) for key in keys)
        tables = {_name(key): [_level(level) for level in levels] for key, levels in content["tables"].items()}
        weights = {_name(key): _whole(count) for key, count in content["weights"].items()}
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the header cannot be that of a field ({type(error).__name__}: {error})") from error
    frame = SceneFrame((center[0], center[1], center[2]), scale, (up[0], up[1], up[2]))
    unbounded, inwards = (content.get(key) is True for key in ("unbounded", "inwards"))
    levels = sum(map(len, tables.values()))
    if not scale > 0 or not 0 < lanes <= MAX_LANES or levels > MAX_LEVELS or cameras > MAX_CAMERAS:
        raise ValueError("the header cannot be that of a field")
    nothing = np.zeros((0, 0, 0, 0), np.bool_), np.zeros((0, CAMERA), np.float32)
    asset = FieldAsset(name, config, frame, background, aabb, unbounded, active, *nothing, inwards, {})
    header = Header(asset, nests, cells, tables, weights, cameras, lanes)
    _check_sizes(header, size)
    return header


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"the header is damaged: expected a whole number, got {str(value)[:40]}")
    return value


def _name(value: str) -> str:
    if not 0 < len(value) <= 100:
        raise ValueError("the header is damaged: a name in it cannot be")
    return value


def _level(values: Any) -> Level:
    rows, side, dims, *steps = values
    rows, side, dims = _whole(rows), _whole(side), _whole(dims)
    steps = np.array(numbers(steps, len(steps), "steps"), np.float32).tolist()
    if not 1 <= len(steps) <= 8 or min(steps) <= 0 or dims not in (2, 3) or (side and side**dims != rows):
        raise ValueError("the header is damaged: a level in it cannot be")
    return Level(rows, side, dims, tuple(steps))


def _check_sizes(header: Header, size: int) -> None:
    """Raise a ValueError if the file claims more than its `size` can hold, or asks for a larger field than it claims."""
    config = header.asset.config
    if header.values > max(_ALWAYS_ALLOWED, _MOST_A_BYTE * size):
        raise ValueError(f"it claims to hold {header.values:,} values in {size:,} bytes")
    for name, (low, high) in _LIMITS.items():
        if not low <= getattr(config, name, low) <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {getattr(config, name)}")
    if len(config.proposals) != 3 or not all(1 <= count <= 4096 for count in config.proposals):
        raise ValueError(f"proposals: expected three of 1 to 4096, got {config.proposals}")
    dims, planes = (2, 3) if header.asset.representation == "triplane" else (3, 1)
    rows = planes * config.levels * min(2**config.log2_rows, (2 * config.finest + 3) ** dims)
    rows += (config.saliency + 3) ** 3 if isinstance(config, HollowConfig) else 0
    most = rows * max(config.features, 1) + config.nests * config.occupancy**3
    if most > 8 * header.values + _ALWAYS_ALLOWED:
        raise ValueError(f"its options ask for {most:,} values, and it holds {header.values:,}")


def _decode(header: Header, text: bytes, stream: bytes) -> FieldAsset:
    planes, at = parse_planes(text, 1 + sum(len(level.steps) for levels in header.tables.values() for level in levels))
    if len(text) - at != 4 * CAMERA * header.cameras + 2 * sum(header.weights.values()):
        raise ValueError("the tables are damaged: the networks have another length")
    cameras = np.frombuffer(text, "<f4", CAMERA * header.cameras, at).astype(np.float32).reshape(-1, CAMERA)
    sizes = cameras[:, 16:]
    if not np.isfinite(cameras).all() or (cameras[:, 12:14] <= 0).any() or ((sizes < 1) | (sizes > 1 << 15)).any():
        raise ValueError("the tables are damaged: a camera cannot be")
    at += 4 * cameras.size
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, count in header.weights.items():
        tensors[name] = np.frombuffer(text, "<f2", count, at).astype(np.float32)
        at += 2 * count
    decoder = Decoder(stream, header.lanes)
    occupied = _decode_cells(next(planes), decoder, header.nests, header.cells)
    before: tuple[Level, NDArray[np.int64]] | None = None
    for name, levels in header.tables.items():
        parts = []
        for level in levels:
            symbols = _decode_level(level, [next(planes) for _ in level.steps], decoder, before)
            before = (level, np.abs(symbols).sum(1, dtype=np.int64))
            parts.append(symbols * np.array(level.steps, np.float32))
        tensors[name] = np.concatenate(parts)
    decoder.finish()
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise ValueError("the tables are damaged: a number in them is not finite")
    asset = header.asset
    return FieldAsset(**(vars(asset) | {"occupied": occupied, "cameras": cameras, "tensors": tensors}))


def parse_planes(text: bytes, count: int) -> tuple[Iterator[Plane], int]:
    """The first `count` planes, and where they end."""
    found, at = [], 0
    for _ in range(count):
        if at + PLANE.size > len(text):
            raise ValueError("the tables are damaged: they end too early")
        low, size, classes = PLANE.unpack_from(text, at)
        prior = np.frombuffer(text[at + PLANE.size : at + PLANE.size + size + 1], np.uint8)
        if len(prior) != size + 1 or not 0 < classes <= 32 or prior.max() == 0:
            raise ValueError("the tables are damaged: a plane cannot be")
        found.append(Plane(low, prior, classes))
        at += PLANE.size + size + 1
    return iter(found), at


def _decode_cells(plane: Plane, decoder: Decoder, nests: int, cells: int) -> NDArray[np.bool_]:
    """[nests, cells, cells, cells], an octree for each nest."""
    if plane.low < 0 or plane.low + len(plane.prior) > 256:
        raise ValueError("the tables are damaged: the plane of the cells cannot be")
    occupied = np.zeros((nests, cells, cells, cells), np.bool_)
    for nest in range(nests):
        nodes, parents = np.zeros(1, np.uint64), np.zeros(1, np.int64)
        for _ in range(depth_of(cells)):
            children = decoder.plane(plane, len(nodes), parents, 9) + plane.low
            node, child = np.nonzero(children[:, None] >> np.arange(8) & 1)
            nodes = nodes[node] << np.uint64(3) | child.astype(np.uint64)
            parents = POPULATION[children][node]
        places = deinterleave(nodes).astype(np.int64)
        if places.max(initial=0) >= cells:
            raise ValueError("a cell lies outside of its grid")
        occupied[nest, places[:, 0], places[:, 1], places[:, 2]] = True
    return occupied


def depth_of(cells: int) -> int:
    """Levels of an octree with room for so many cells along an axis."""
    return max(1, (cells - 1).bit_length())


def _decode_level(
    level: Level, planes: list[Plane], decoder: Decoder, before: tuple[Level, NDArray[np.int64]] | None
) -> NDArray[np.int16]:
    """[rows, F] symbols."""
    symbols = np.zeros((level.rows, len(planes)), np.int16)
    for part in parts_of(level, before):
        known, energy = part.known(symbols), np.zeros(part.count, np.int64)
        for feature, plane in enumerate(planes):
            found = decoder.plane(plane, part.count, *context(energy, known)) + plane.low
            symbols[part.rows, feature] = found
            energy += np.abs(found)
    return symbols


@dataclass(frozen=True)
class Part:
    """Rows of a level that are coded together, and what is known of each before that."""

    rows: Any
    """[n] indices or a slice."""
    count: int
    neighbours: tuple[NDArray[np.int64], NDArray[np.int64]] | None
    """[n] rows that were coded before: the two beside it."""
    above: NDArray[np.int64] | None
    """[n] sums of the magnitudes at the nearest point of the level before."""

    def known(self, symbols: NDArray[np.int16]) -> NDArray[np.int64] | None:
        """[n] sum of magnitudes that stands for what lies around each row, given the level's symbols so far."""
        if self.neighbours is None:
            return self.above
        a, b = (np.abs(symbols[rows]).sum(1, dtype=np.int64) for rows in self.neighbours)
        return (a + b + 1) // 2


def parts_of(level: Level, before: tuple[Level, NDArray[np.int64]] | None) -> list[Part]:
    """The parts of a level in the order of coding.

    A hashed level is one part. A lattice is halved along its last axis into even and odd layers, of which the odd ones come last, between two
    that are known; the even ones are halved in the same way along the axis before.

    Args:
        level: the level.
        before: the level coded before it, and [rows] the sums of the magnitudes of its symbols.
    """
    if not level.side:
        return [Part(slice(None), level.rows, None, None)]
    rows = np.arange(level.rows).reshape((level.side,) * level.dims)  # the last index is x, which goes fastest
    above = _above(level, before)
    parts, place = [], rows
    for axis in range(level.dims - 1):
        odd = np.take(place, np.arange(1, level.side, 2), axis)
        around = [
            np.take(place, np.minimum(np.arange(1, level.side, 2) + side, last_even(level.side)), axis)
            for side in (-1, 1)
        ]
        parts.append(Part(odd.ravel(), odd.size, (around[0].ravel(), around[1].ravel()), None))
        place = np.take(place, np.arange(0, level.side, 2), axis)
    known = None if above is None else above[place.ravel()]
    return [Part(place.ravel(), place.size, None, known), *reversed(parts)]


def last_even(side: int) -> int:
    """The last even number below `side`."""
    return (side - 1) // 2 * 2


def _above(level: Level, before: tuple[Level, NDArray[np.int64]] | None) -> NDArray[np.int64] | None:
    """[rows] what `before` has at its point nearest to each of the level; None if it is no lattice of the same axes, or a finer one."""
    if before is None or before[0].dims != level.dims or not 0 < before[0].side <= level.side:
        return None
    side = before[0].side
    axis = (2 * np.arange(level.side, dtype=np.int64) + 1) * side // (2 * level.side)
    rows = np.zeros((1,) * level.dims, np.int64)
    for number in range(level.dims):
        shape = [1] * level.dims
        shape[level.dims - 1 - number] = level.side
        rows = rows + axis.reshape(shape) * side**number
    return before[1][rows.ravel()]


CLASSES = 8


def context(energy: NDArray[np.int64], known: NDArray[np.int64] | None) -> tuple[NDArray[np.int64], int]:
    """[n] contexts and how many there are: of what the row's features so far add up to, and of what lies around it."""
    bounds = np.array([0, 1, 2, 4, 8, 16, 32])
    found = np.searchsorted(bounds, energy)
    return (found, CLASSES) if known is None else (found + CLASSES * np.searchsorted(bounds, known), CLASSES**2)
