"""The .compressed.ply of PlayCanvas: 16 bytes for each Gaussian, packed in ranges that each 256 share; harmonics in bytes after them.

Rotations, harmonics and the order of bits are as SuperSplat 2.7.1 writes them. Axes are those of the .ply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prismfield.export import smallest_three
from prismfield.export.assets import SplatAsset
from prismfield.export.ply_file import (
    Element,
    Header,
    columns,
    harmonic_columns,
    harmonic_names,
    parse_up,
    read_header,
    read_rows,
    up_note,
    write_header,
)
from prismfield.export.reading import naming
from prismfield.export.rows import morton_order, pieces
from prismfield.export.verify import write_verified
from prismfield.render.ops.sh import C0

MARK = "packed_position"
"""A property of the element `vertex` that tells this layout from INRIA's."""
_CHUNK = 256
_RANGES = [f"{end}_{what}{axis}" for what in ("", "scale_") for end in ("min", "max") for axis in "xyz"]
_COLOR_RANGES = ["min_r", "min_g", "min_b", "max_r", "max_g", "max_b"]
_PACKED = [MARK, "packed_rotation", "packed_scale", "packed_color"]
_LOG_SCALE = 20.0  # ranges of the logarithms stay within plus and minus this
_SH_WIDTH = 8.0  # bytes 0 to 255 stand for -4 to 4


@dataclass(frozen=True)
class _Ranges:
    """Of each chunk, [chunks, 3]: least and greatest value of what shares it."""

    low: NDArray
    high: NDArray

    @classmethod
    def of(cls, values: NDArray) -> _Ranges:
        starts = np.arange(0, len(values), _CHUNK)
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        return cls(low.astype(np.float32), high.astype(np.float32))

    def widest(self) -> float:
        return float((self.high - self.low).max(initial=0))

    def pack(self, values: NDArray, bits: tuple[int, int, int]) -> NDArray[np.uint32]:
        """[N] words with the values in their chunk's range, the first in the highest bits; `values` start at a chunk's first."""
        chunk = np.arange(len(values)) // _CHUNK
        low, width = self.low[chunk].astype(np.float64), (self.high - self.low)[chunk].astype(np.float64)
        share = np.where(width > 0, (values - low) / np.where(width > 0, width, 1), 0).clip(0, 1)
        words: NDArray[np.uint32] = np.rint(share * (2.0 ** np.array(bits) - 1)).astype(np.uint32)
        first, second = words[:, 0] << np.uint32(bits[1] + bits[2]), words[:, 1] << np.uint32(bits[2])
        return first | second | words[:, 2]

    def unpack(self, words: NDArray, bits: tuple[int, int, int]) -> NDArray[np.float64]:
        """[N, 3] the values again."""
        chunk = np.arange(len(words)) // _CHUNK
        parts = np.stack([words >> (bits[1] + bits[2]), words >> bits[2], words], 1)
        share = (parts & (2 ** np.array(bits) - 1).astype(np.uint32)) / (2.0 ** np.array(bits) - 1)
        low, high = self.low[chunk].astype(np.float64), self.high[chunk].astype(np.float64)
        return low + share * (high - low)

    def rows(self, chunks: slice) -> _Ranges:
        return _Ranges(self.low[chunks], self.high[chunks])


_POSITION_BITS = _SCALE_BITS = (11, 10, 11)
_COLOR_BITS = (8, 8, 8)


def write_compressed_ply(path: Path, asset: SplatAsset) -> None:
    """Write along a Z-order curve, read back and compare before it takes the name `path`.

    Harmonics above degree 0 stay within -4 and 4, scales within exp(-20) and exp(20); what lies beyond is clipped.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    if len(asset):
        asset = asset.take(morton_order(asset.means))
    half = _SH_WIDTH / 2
    bound = np.float32(np.exp(_LOG_SCALE))
    held = replace(asset, scales=asset.scales.clip(1 / bound, bound), extra={})
    held.sh[:, 1:].clip(-half, half, out=held.sh[:, 1:])  # in place: `take` has copied them
    positions, scales, colors = _ranges(held) if len(held) else (_Ranges(np.zeros((0, 3)), np.zeros((0, 3))),) * 3
    reach = float(np.abs(held.means).max(initial=0))
    tolerances = {
        "means": 0.51 / 1023 * positions.widest() + 1e-6 * reach,
        "quats": smallest_three.rounding(np.sqrt(2) / 1023),
        "scales": 0.51 / 1023 * scales.widest() + 1e-5,
        "opacities": 0.51 / 255,
        "sh": max(0.51 / 255 * colors.widest() / C0 + 1e-5, (0.51 if held.sh_degree else 0) * _SH_WIDTH / 256),
        "up": 1e-6,
        "antialiased": 0.0,
    }
    write_verified(path, held, _write, read_compressed_ply, tolerances)


def read_compressed_ply(path: Path) -> SplatAsset:
    """Read a .compressed.ply, of degree 0 to 3; also an older one, whose colours have no ranges.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file, naming(path):
        header = read_header(file)
        terms = _check_layout(header, size)
        return _to_asset(file, header, terms)


def _ranges(asset: SplatAsset) -> tuple[_Ranges, _Ranges, _Ranges]:
    """Of positions, logarithms of scales, and colours."""
    log_scales = asset.log_scales.clip(-_LOG_SCALE, _LOG_SCALE)
    return _Ranges.of(asset.means), _Ranges.of(log_scales), _Ranges.of(0.5 + C0 * asset.sh[:, 0].astype(np.float64))


def _write(path: Path, asset: SplatAsset) -> None:
    positions, scales, colors = _ranges(asset)
    names = harmonic_names(asset.sh.shape[1])[3:]
    elements: dict[str, tuple[int, dict[str, str]]] = {
        "chunk": (len(positions.low), dict.fromkeys([*_RANGES, *_COLOR_RANGES], "float")),
        "vertex": (len(asset), dict.fromkeys(_PACKED, "uint")),
    }
    if names:
        elements["sh"] = (len(asset), dict.fromkeys(names, "uchar"))
    notes = {"antialiased": str(int(asset.antialiased))}
    with path.open("wb") as file:
        file.write(write_header(elements, up_note(asset.up) | notes))
        ends = [side for ranges in (positions, scales, colors) for side in (ranges.low, ranges.high)]
        file.write(np.concatenate(ends, 1).astype("<f4").tobytes())
        for rows in pieces(len(asset)):  # a multiple of a chunk
            chunks = slice(rows.start // _CHUNK, (rows.stop - 1) // _CHUNK + 1)
            index, three = smallest_three.split(asset.quats[rows])
            turn = np.rint((three / np.sqrt(2) + 0.5) * 1023).clip(0, 1023).astype(np.uint32)
            words = np.empty((len(index), 4), "<u4")
            words[:, 0] = positions.rows(chunks).pack(asset.means[rows], _POSITION_BITS)
            words[:, 1] = index.astype(np.uint32) << 30 | turn[:, 0] << 20 | turn[:, 1] << 10 | turn[:, 2]
            words[:, 2] = scales.rows(chunks).pack(np.log(asset.scales[rows].astype(np.float64)), _SCALE_BITS)
            rgb = colors.rows(chunks).pack(0.5 + C0 * asset.sh[rows, 0].astype(np.float64), _COLOR_BITS)
            words[:, 3] = rgb << 8 | np.rint(255 * asset.opacities[rows]).astype(np.uint32)
            file.write(words.tobytes())
        if names:
            for rows in pieces(len(asset)):
                values = harmonic_columns(asset.sh[rows])[:, 3:]
                file.write(np.floor((values / _SH_WIDTH + 0.5) * 256).clip(0, 255).astype(np.uint8).tobytes())


def _check_layout(header: Header, size: int) -> int:
    """Everything that can be wrong with a header, before anything is allocated; how many harmonics above degree 0."""
    chunk, vertex = header.find("chunk")[0], header.find("vertex")[0]
    sh = next((element for element in header.elements if element.name == "sh"), Element("sh", 0))
    if header.ascii or any(element.has_lists for element in header.elements):
        raise ValueError("expected rows of fixed length in a binary file")
    for element, needed in ((chunk, _RANGES), (vertex, _PACKED)):
        if missing := [name for name in needed if name not in dict(element.properties)]:
            raise ValueError(f"not a compressed .ply: {', '.join(missing)} missing")
    if any(kind != "u4" for name, kind in vertex.properties if name in _PACKED):
        raise ValueError("not a compressed .ply: what is packed should be of type uint")
    names = [name for name, _ in sh.properties]
    if sorted(names) != sorted(f"f_rest_{i}" for i in range(len(names))) or len(names) not in (0, 9, 24, 45):
        raise ValueError(f"expected f_rest_0 onwards, 0, 9, 24 or 45 of them (degree 0 to 3), got {len(names)}")
    if any(kind != "u1" for _, kind in sh.properties):
        raise ValueError("expected harmonics of type uchar")
    if vertex.count == 0:
        raise ValueError("there are no Gaussians in it")
    if chunk.count != -(-vertex.count // _CHUNK) or (names and sh.count != vertex.count):
        raise ValueError(f"{vertex.count} Gaussians do not fit {chunk.count} chunks and {sh.count} rows of harmonics")
    needed_size = header.size + sum(element.count * element.dtype.itemsize for element in header.elements)
    if size < needed_size:
        raise ValueError(f"the file is cut short: {vertex.count} Gaussians need {needed_size} bytes, it has {size}")
    return len(names) // 3


def _to_asset(file: BinaryIO, header: Header, terms: int) -> SplatAsset:
    chunk, vertex = (read_rows(file, header, name) for name in ("chunk", "vertex"))
    ranges = [columns(chunk, *names) for names in (_RANGES[:3], _RANGES[3:6], _RANGES[6:9], _RANGES[9:])]
    if "min_r" in (chunk.dtype.names or ()):
        colors = _Ranges(columns(chunk, *_COLOR_RANGES[:3]), columns(chunk, *_COLOR_RANGES[3:]))
    else:
        colors = _Ranges(np.zeros((len(chunk), 3)), np.ones((len(chunk), 3)))
    rotation, color = vertex["packed_rotation"], vertex["packed_color"]
    three = np.stack([rotation >> 20, rotation >> 10, rotation], 1) & 1023
    sh = np.zeros((len(vertex), 1 + terms, 3), np.float32)
    sh[:, 0] = (colors.unpack(color >> 8, _COLOR_BITS) - 0.5) / C0
    if terms:
        rest = read_rows(file, header, "sh")
        for rows in pieces(len(vertex)):
            values = columns(rest[rows], *(f"f_rest_{i}" for i in range(3 * terms)))
            shares = np.where(values == 0, 0, np.where(values == 255, 1, (values + 0.5) / 256))
            sh[rows, 1:] = ((shares - 0.5) * _SH_WIDTH).reshape(-1, 3, terms).transpose(0, 2, 1)
    return SplatAsset.from_activated(
        _Ranges(ranges[0], ranges[1]).unpack(vertex[MARK], _POSITION_BITS),
        smallest_three.join(rotation >> 30, (three / 1023 - 0.5) * np.sqrt(2)),
        np.exp(_Ranges(ranges[2], ranges[3]).unpack(vertex["packed_scale"], _SCALE_BITS).clip(-80, 80)),
        (color & 255) / 255,
        sh,
        up=parse_up(header.notes.get("up", "")),
        antialiased=header.notes.get("antialiased") == "1",
    )
