"""Point clouds in PLY files, and the clean-up that every cloud needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_LONGEST_HEADER = 1 << 16


def read_cloud(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Positions [P, 3] and colours [P, 3] of the vertices of a PLY file; grey where it has no colours.

    Raises:
        ValueError: not a PLY file, no x y z, or fewer bytes than its header states.
    """
    data = path.read_bytes()
    end = data.find(b"end_header", 0, _LONGEST_HEADER)
    if not data.startswith(b"ply") or end < 0:
        raise ValueError(f"{path}: not a PLY file")
    lines = data[:end].decode("ascii", "replace").splitlines()
    body = data.find(b"\n", end) + 1
    style, count, fields = _header(path, lines)
    if style == "ascii":
        rows = [row for row in data[body:].splitlines() if row.strip()][:count]
        try:
            values = np.array(
                [[float(word) for word in row.split()[: len(fields)]] for row in rows], np.float64
            ).reshape(-1, len(fields))
        except ValueError as error:
            raise ValueError(f"{path}: a vertex is not {len(fields)} numbers") from error
        columns = {name: values[:, i] for i, (name, _) in enumerate(fields)}
        found = len(values)
    else:
        order = "<" if style == "binary_little_endian" else ">"
        dtype = np.dtype([(name, order + kind) for name, kind in fields])
        found = min(count, (len(data) - body) // dtype.itemsize)
        table = np.frombuffer(data, dtype, found, body)
        columns = {name: table[name] for name, _ in fields}
    if found < count:
        raise ValueError(f"{path}: truncated: the header states {count} vertices, the file holds {found}")
    xyz = np.stack([np.asarray(columns[axis], np.float64) for axis in "xyz"], -1)
    return xyz, _colors(columns, dict(fields), count)


def _header(path: Path, lines: list[str]) -> tuple[str, int, list[tuple[str, str]]]:
    """Encoding, number of vertices, and (name, numpy type) of each vertex property."""
    style, count, fields, element = "", -1, [], ""
    for line in lines[1:]:
        words = line.split()
        if words[:1] == ["format"] and len(words) > 1:
            style = words[1]
        elif words[:1] == ["element"] and len(words) == 3:
            if count < 0 and words[1] != "vertex":
                raise ValueError(f"{path}: expected vertices as the first element, got {words[1]!r}")
            element = words[1]
            count = int(words[2]) if element == "vertex" and words[2].isdigit() else count
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES:
                raise ValueError(f"{path}: vertex property of unknown type: {line.strip()!r}")
            fields.append((words[2], _TYPES[words[1]]))
    if style not in ("ascii", "binary_little_endian", "binary_big_endian") or count < 0:
        raise ValueError(f"{path}: no usable PLY header")
    if not {"x", "y", "z"} <= {name for name, _ in fields}:
        raise ValueError(f"{path}: expected vertex properties x, y, z")
    return style, count, fields


def _colors(columns: dict[str, NDArray], kinds: dict[str, str], count: int) -> NDArray[np.uint8]:
    if not {"red", "green", "blue"} <= kinds.keys():
        return np.full((count, 3), 128, np.uint8)
    rgb = np.stack([np.asarray(columns[c], np.float64) for c in ("red", "green", "blue")], -1)
    peak = {"f": 1.0, "u": 255.0, "i": 255.0}[kinds["red"][0]] if kinds["red"] != "u2" else 65535.0
    return np.nan_to_num(rgb / peak * 255.0 + 0.5).clip(0, 255).astype(np.uint8)


def clean_cloud(
    xyz: NDArray[np.float64], rgb: NDArray[np.uint8]
) -> tuple[NDArray[np.float64], NDArray[np.uint8], list[str]]:
    """The cloud without points that are not finite and without repeated positions, and sentences on what went."""
    sentences = []
    finite = np.isfinite(xyz).all(1)
    if not finite.all():
        sentences.append(f"{int((~finite).sum())} of {len(xyz)} points are not finite and were dropped")
        xyz, rgb = xyz[finite], rgb[finite]
    _, first = np.unique(xyz, axis=0, return_index=True)
    if len(first) < len(xyz):
        sentences.append(f"{len(xyz) - len(first)} of {len(xyz)} points repeat a position and were dropped")
        first.sort()
        xyz, rgb = xyz[first], rgb[first]
    return xyz, rgb, sentences
