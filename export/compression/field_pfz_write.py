"""Writer of a .pfz of a radiance field; the reader and docs/format-pfz.md say what is in it."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.export.compression.field_pfz import (
    FIXED,
    PLANE,
    VERSION,
    FieldAsset,
    Level,
    context,
    decode_field,
    depth_of,
    parts_of,
)
from prismfield.export.compression.pfz import FIELD_MAGIC, POPULATION
from prismfield.export.compression.pfz_coder import Encoder, plane_of
from prismfield.export.compression.pfz_models import Plane
from prismfield.export.verify import write_verified
from prismfield.render.curves import interleave

Tables = dict[str, list[tuple[Level, NDArray[np.int16]]]]
"""By name, for each level its lattice and its symbols [rows, F]."""
_LANES, _SYMBOLS_A_LANE = 512, 256
_CLASSES = 4  # of the neighbour before it in the lane, where rows lie in order


def encode_field(asset: FieldAsset, tables: Tables) -> bytes:
    """The bytes of a .pfz.

    Args:
        asset: all but what the tables hold; its other tensors are the networks' weights, which are rounded to halves.
        tables: the grids, in the order in which they are coded.
    """
    symbols = sum(values.size for levels in tables.values() for _, values in levels)
    lanes = max(1, min(_LANES, symbols // _SYMBOLS_A_LANE))
    encoder = Encoder(lanes)
    octrees = [_octree(nest) for nest in asset.occupied]
    planes = [plane_of(np.concatenate([children for octree in octrees for children, _ in octree]))]
    for octree in octrees:
        for children, parents in octree:
            encoder.plane(planes[0], children, parents, 9)
    before: tuple[Level, NDArray[np.int64]] | None = None
    for levels in tables.values():
        for level, values in levels:
            planes += _encode_level(encoder, level, values, before)
            before = (level, np.abs(values).sum(1, dtype=np.int64))
    weights = {name: values for name, values in asset.tensors.items() if name not in tables}
    halves = b"".join(values.astype("<f2").tobytes() for values in weights.values())
    text = b"".join(PLANE.pack(p.low, len(p.prior) - 1, p.classes) + p.prior.tobytes() for p in planes)
    text += asset.cameras.astype("<f4").tobytes() + halves
    head = json.dumps(_header(asset, tables, weights, lanes), separators=(",", ":")).encode()
    parts = zlib.compress(head, 9), zlib.compress(text, 9), encoder.finish()
    body = b"".join(parts)
    sizes = (len(parts[0]), len(head), len(parts[1]), len(text), len(parts[2]))
    return FIXED.pack(FIELD_MAGIC, VERSION, 0, *sizes, zlib.crc32(body)) + body


def write_field(path: Path, data: bytes) -> None:
    """Write what `encode_field` gave; the file takes its name after the same field was read from it.

    Raises:
        OSError: the file could not be written, or came back different.
    """

    def read(written: Path) -> FieldAsset:
        return decode_field(written.read_bytes())

    def write(to: Path, _: FieldAsset) -> None:
        to.write_bytes(data)

    write_verified(path, decode_field(data), write, read, {"tensors": 0.0, "rest": 0.0})


def _header(asset: FieldAsset, tables: Tables, weights: dict[str, NDArray], lanes: int) -> dict[str, object]:
    levels = {
        name: [[level.rows, level.side, level.dims, *level.steps] for level, _ in table]
        for name, table in tables.items()
    }
    return {
        "representation": asset.representation,
        "config": dataclasses.asdict(asset.config),
        **asset.frame.to_dict(),
        "background": asset.background,
        "aabb": asset.aabb.ravel().tolist(),
        "unbounded": asset.unbounded,
        "active": asset.active,
        "inwards": asset.inwards,
        "cameras": len(asset.cameras),
        "nests": len(asset.occupied),
        "cells": asset.occupied.shape[1],
        "tables": levels,
        "weights": {name: len(values) for name, values in weights.items()},
        "lanes": lanes,
    }


def _octree(occupied: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Level by level, which of each cell's 8 children there are, and how many its parent has."""
    codes = np.sort(interleave(np.argwhere(occupied).astype(np.uint64)))
    depth, found = depth_of(len(occupied)), []
    nodes, parents = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for level in range(1, depth + 1):
        below = np.unique(codes >> np.uint64(3 * (depth - level)))
        of = np.searchsorted(nodes, below >> np.uint64(3))
        children = np.zeros(len(nodes), np.int64)
        np.bitwise_or.at(children, of, 1 << (below & np.uint64(7)).astype(np.int64))
        found.append((children, parents))
        nodes, parents = below, POPULATION[children][of]
    return found


def _encode_level(
    encoder: Encoder,
    level: Level,
    symbols: NDArray[np.int16],
    before: tuple[Level, NDArray[np.int64]] | None,
) -> list[Plane]:
    """Hand a level's symbols to the encoder; the planes that it took."""
    classes = _CLASSES if level.side else 1
    wide = symbols.astype(np.int64)
    planes = [plane_of(wide[:, feature], classes) for feature in range(wide.shape[1])]
    for part in parts_of(level, before):
        known, energy = part.known(symbols), np.zeros(part.count, np.int64)
        for feature, plane in enumerate(planes):
            found = wide[part.rows, feature]
            encoder.plane(plane, found, *context(energy, known))
            energy += np.abs(found)
    return planes
