"""The .ksplat of GaussianSplats3D (mkkellogg), which is read and not written: floats, or buckets of 16-bit offsets.

A header of 4096 bytes; one of 1024 bytes for each section; then the sections: sizes of buckets that are not full, their centres,
and a record for each splat. Axes are those of the .ply.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.reading import naming
from prismfield.render.ops.sh import C0

_HEADER, _SECTION = 4096, 1024
_TERMS = (0, 3, 8, 15)
_STEPS = 32767  # of half a bucket, where the section does not say


@dataclass(frozen=True)
class _Section:
    count: int
    rows: int
    """Records there is room for."""
    capacity: int
    """Of a full bucket."""
    buckets: int
    block: float
    """Edge of a bucket, user units."""
    center_bytes: int
    steps: int
    full: int
    partial: int
    degree: int

    @classmethod
    def parse(cls, data: bytes, at: int) -> _Section:
        count, rows, capacity, buckets, block, center_bytes = struct.unpack_from("<4IfH", data, at)
        (steps,), (full, partial, degree) = (
            struct.unpack_from("<I", data, at + 24),
            struct.unpack_from("<IIH", data, at + 32),
        )
        if degree >= len(_TERMS) or count > rows:
            raise ValueError(f"a section has {count} of {rows} splats of degree {degree}")
        return cls(count, rows, capacity, buckets, block, center_bytes, steps or _STEPS, full, partial, degree)

    @property
    def bucket_bytes(self) -> int:
        return 4 * self.partial + self.center_bytes * self.buckets


def _record(level: int, degree: int) -> np.dtype:
    """Of a splat: floats (level 0), halves and 16-bit places (1), and harmonics in bytes too (2)."""
    place, other, sh = (("<f4", "<f4", "<f4"), ("<u2", "<f2", "<f2"), ("<u2", "<f2", "u1"))[level]
    fields = [("mean", place, 3), ("scale", other, 3), ("quat", other, 4), ("rgba", "u1", 4)]
    return np.dtype([*fields, ("sh", sh, 3 * _TERMS[degree])])


def read_ksplat(path: Path) -> SplatAsset:
    """Read a .ksplat of compression level 0, 1 or 2 and degree 0 to 3.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    with naming(path):
        return _parse(path.read_bytes())


def _parse(data: bytes) -> SplatAsset:
    if len(data) < _HEADER or data[0] != 0 or data[1] < 1:
        raise ValueError("not a .ksplat of version 0.1 or later, or cut short")
    (sections,), (count, level) = struct.unpack_from("<I", data, 4), struct.unpack_from("<IH", data, 16)
    low, high = (
        value or default for value, default in zip(struct.unpack_from("<2f", data, 36), (-1.5, 1.5), strict=True)
    )
    if level > 2 or not count or _HEADER + _SECTION * sections > len(data) or not np.isfinite([low, high]).all():
        raise ValueError(
            f"{count} splats in {sections} sections of compression {level}: not so, or the file is cut short"
        )
    at = _HEADER + _SECTION * sections
    parts: list[tuple[_Section, NDArray, NDArray]] = []
    for index in range(sections):
        section = _Section.parse(data, _HEADER + _SECTION * index)
        record = _record(level, section.degree)
        size = section.bucket_bytes + record.itemsize * section.rows
        if size > len(data) - at:
            raise ValueError(
                f"the file is cut short: section {index} needs {size:,} bytes, there are {len(data) - at:,}"
            )
        table = np.frombuffer(data, record, section.count, at + section.bucket_bytes)
        parts.append((section, table, _places(data, at, section, table, level)))
        at += size
    if sum(section.count for section, _, _ in parts) != count:
        raise ValueError(f"its sections have {sum(s.count for s, _, _ in parts)} splats, its header says {count}")
    degree = max(section.degree for section, _, _ in parts)
    rgba = np.concatenate([table["rgba"] for _, table, _ in parts]) / 255
    sh = np.zeros((count, 1 + _TERMS[degree], 3))
    sh[:, 0] = (rgba[:, :3] - 0.5) / C0
    start = 0
    for section, table, _ in parts:
        values = table["sh"] / 255 * (high - low) + low if level == 2 else table["sh"].astype(np.float64)
        _spread_bands(sh[start : start + section.count], values, section.degree)
        start += section.count
    names = ("quat", "scale")
    quats, scales = (np.concatenate([table[name].astype(np.float64) for _, table, _ in parts]) for name in names)
    return SplatAsset.from_activated(np.concatenate([m for _, _, m in parts]), quats, scales, rgba[:, 3], sh)


def _places(data: bytes, at: int, section: _Section, table: NDArray, level: int) -> NDArray[np.float64]:
    """[N, 3] positions."""
    if level == 0:
        return table["mean"].astype(np.float64)
    if section.center_bytes < 12 or section.full > section.buckets or section.partial > section.buckets - section.full:
        raise ValueError("its buckets do not add up")
    sizes = np.concatenate(
        [
            np.full(section.full, section.capacity, np.int64),
            np.frombuffer(data, "<u4", section.partial, at).astype(np.int64),
        ]
    )
    bucket = np.searchsorted(np.cumsum(sizes), np.arange(section.count), side="right")
    if section.count and bucket[-1] >= len(sizes):
        raise ValueError(f"its buckets hold {sizes.sum()} splats, the section has {section.count}")
    layout = np.dtype({"names": ["center"], "formats": [("<f4", (3,))], "itemsize": section.center_bytes})
    centers = np.frombuffer(data, layout, section.buckets, at + 4 * section.partial)["center"].astype(np.float64)
    step = section.block / 2 / section.steps
    return (table["mean"].astype(np.float64) - section.steps) * step + centers[bucket]


def _spread_bands(sh: NDArray, values: NDArray, degree: int) -> None:
    """Into `sh` [N, T, 3] what lies degree by degree, in each channel by channel."""
    start = 0
    for band in range(1, degree + 1):
        terms = 2 * band + 1
        block = values[:, start : start + 3 * terms].reshape(len(values), 3, terms)
        sh[:, band**2 : (band + 1) ** 2] = block.transpose(0, 2, 1)
        start += 3 * terms
