"""The .ply of 3D Gaussian Splatting ("INRIA layout"): one float32 property for each stored value.

Harmonics are channel-major (all red, all green, all blue). Nothing in the layout says which way is up or how it was
drawn; comments of ours do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.verify import write_verified

_TYPES = (
    {
        "char": "i1",
        "uchar": "u1",
        "short": "i2",
        "ushort": "u2",
        "int": "i4",
        "uint": "u4",
        "float": "f4",
        "double": "f8",
    }
    | {"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"}
    | {"float32": "f4", "float64": "f8"}
)
_LAYOUT = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity")
_SCALES = ("scale_0", "scale_1", "scale_2")
_QUATS = ("rot_0", "rot_1", "rot_2", "rot_3")
_MAX_HEADER = 1 << 20
_ROWS_AT_ONCE = 1 << 16
_TAG = "prismfield"
# Only what float32 rounds in a logarithm, a logit or a unit quaternion may differ.
_TOLERANCES = {"means": 0, "quats": 1e-6, "scales": 1e-5, "opacities": 1e-6, "sh": 0, "up": 1e-6, "antialiased": 0}


@dataclass
class _Element:
    name: str
    count: int
    properties: list[tuple[str, str]] = field(default_factory=list)
    """(name, numpy type without byte order), in file order."""
    has_lists: bool = False

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([(name, f"<{kind}") for name, kind in self.properties])


@dataclass
class _Header:
    ascii: bool
    elements: list[_Element]
    notes: dict[str, str]
    """Our own comments."""
    size: int
    """Bytes up to and with the line `end_header`."""


def write_ply(path: Path, asset: SplatAsset) -> None:
    """Write a binary .ply, read it back and compare before it takes the name `path`.

    An opacity of 1 comes out as 1 - 6e-8, the largest whose logit is finite.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    write_verified(path, asset, _write, read_ply, _TOLERANCES)


def read_ply(path: Path) -> SplatAsset:
    """Read a .ply in the INRIA layout, binary or ascii, degree 0 to 3. Other elements and properties are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = _read_header(file)
            _check_layout(header, size)
            table = _read_ascii(file, header) if header.ascii else _read_binary(file, header)
            return _to_asset(table, header)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _property_names(terms: int) -> list[str]:
    rest = [f"f_rest_{i}" for i in range(3 * (terms - 1))]
    return ["x", "y", "z", "nx", "ny", "nz", *_LAYOUT[3:6], *rest, "opacity", *_SCALES, *_QUATS]


def ply_bytes(asset: SplatAsset) -> int:
    """Size of the file that `write_ply` makes of it."""
    return len(_header(asset)) + 4 * len(asset) * len(_property_names(asset.sh.shape[1]))


def _header(asset: SplatAsset) -> bytes:
    try:
        version = metadata.version("prismfield")
    except metadata.PackageNotFoundError:
        version = "from a source tree"
    lines = ["ply", "format binary_little_endian 1.0", f"comment {_TAG} version {version}"]
    if asset.up is not None:
        lines.append(f"comment {_TAG} up {asset.up[0]:.9g} {asset.up[1]:.9g} {asset.up[2]:.9g}")
    lines += [f"comment {_TAG} antialiased {int(asset.antialiased)}", f"comment {_TAG} sh_degree {asset.sh_degree}"]
    lines += [f"element vertex {len(asset)}"]
    lines += [f"property float {name}" for name in _property_names(asset.sh.shape[1])]
    return "\n".join([*lines, "end_header", ""]).encode("ascii")


def _write(path: Path, asset: SplatAsset) -> None:
    terms = asset.sh.shape[1]
    logits, log_scales = asset.logits, asset.log_scales
    with path.open("wb") as file:
        file.write(_header(asset))
        for start in range(0, len(asset), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            means, sh = asset.means[rows], asset.sh[rows]
            higher = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), 3 * (terms - 1))
            columns: list[NDArray] = [means, np.zeros_like(means), sh[:, 0], higher]
            columns += [logits[rows, None], log_scales[rows], asset.quats[rows]]
            file.write(np.concatenate(columns, 1).astype("<f4").tobytes())


def _read_header(file: BinaryIO) -> _Header:
    start = file.read(_MAX_HEADER)
    if not start.startswith((b"ply\n", b"ply\r\n", b"ply\r")):
        raise ValueError("not a .ply file: it does not begin with the line 'ply'")
    end = start.find(b"end_header")
    newline = start.find(b"\n", end)
    if end < 0 or newline < 0:
        raise ValueError("the header has no line 'end_header'; the file may be cut short")
    file.seek(newline + 1)
    header = _Header(ascii=False, elements=[], notes={}, size=newline + 1)
    form = ""
    for line in start[:end].decode("ascii", "replace").splitlines()[1:]:
        match line.split():
            case ["format", form, _]:
                pass
            case ["comment", tag, key, *values] if tag == _TAG:
                header.notes[key] = " ".join(values)
            case ["element", name, count] if count.isdecimal() and len(count) < 16:
                header.elements.append(_Element(name, int(count)))
            case ["property", "list", _, _, _] if header.elements:
                header.elements[-1].has_lists = True
            case ["property", kind, name] if header.elements and kind in _TYPES:
                if name in dict(header.elements[-1].properties):
                    raise ValueError(f"the header names property {name!r} twice")
                header.elements[-1].properties.append((name, _TYPES[kind]))
            case [] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise ValueError(f"the header has a line that is not understood: {line[:80]!r}")
    if form not in ("ascii", "binary_little_endian"):
        raise ValueError(f"expected format binary_little_endian or ascii, got {form or 'none'!r}")
    header.ascii = form == "ascii"
    return header


def _vertices(header: _Header) -> tuple[_Element, list[_Element]]:
    """The element that holds the Gaussians, and those before it."""
    for i, element in enumerate(header.elements):
        if element.name == "vertex":
            return element, header.elements[:i]
    raise ValueError("there is no element 'vertex'")


def _check_layout(header: _Header, size: int) -> None:
    """Everything that can be wrong with a header, before anything is allocated."""
    vertices, before = _vertices(header)
    names = dict(vertices.properties)
    if "packed_position" in names:
        raise ValueError("this is a compressed .ply (packed_position), not the INRIA layout")
    if missing := [name for name in (*_LAYOUT, *_SCALES, *_QUATS) if name not in names]:
        raise ValueError(f"not a .ply of Gaussians: {', '.join(missing)} missing")
    if vertices.count == 0:
        raise ValueError("there are no Gaussians in it")
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise ValueError(f"expected f_rest_0 onwards, 0, 9, 24 or 45 of them (degree 0 to 3), got {rest}")
    if vertices.has_lists or (not header.ascii and any(element.has_lists for element in before)):
        raise ValueError("a list property stands where rows of fixed length were expected")
    # In ascii a value takes two bytes at least.
    bytes_of = (lambda e: 2 * len(e.properties)) if header.ascii else (lambda e: e.dtype.itemsize)
    needed = header.size + sum(e.count * bytes_of(e) for e in (*before, vertices)) - header.ascii
    if size < needed:
        raise ValueError(f"the file is cut short: {vertices.count} Gaussians need {needed} bytes, it has {size}")


def _read_binary(file: BinaryIO, header: _Header) -> NDArray:
    vertices, before = _vertices(header)
    file.seek(header.size + sum(element.count * element.dtype.itemsize for element in before))
    table = np.fromfile(file, vertices.dtype, vertices.count)
    if len(table) < vertices.count:
        raise ValueError("the file is cut short")
    return table


def _read_ascii(file: BinaryIO, header: _Header) -> NDArray:
    vertices, before = _vertices(header)
    file.seek(header.size)
    for _ in range(sum(element.count for element in before)):
        file.readline()
    rows = np.loadtxt(islice(file, vertices.count), np.float64, comments=None, ndmin=2)
    shape = (vertices.count, len(vertices.properties))
    if rows.shape != shape:
        raise ValueError(f"expected {shape[0]} lines of {shape[1]} numbers, got {list(rows.shape)}")
    table = np.empty(len(rows), [(name, "f8") for name, _ in vertices.properties])
    for column, (name, _) in zip(rows.T, vertices.properties, strict=True):
        table[name] = column
    return table


def _to_asset(table: NDArray, header: _Header) -> SplatAsset:
    def columns(*names: str) -> NDArray:
        return np.stack([table[name] for name in names], 1)

    rest = sum(name.startswith("f_rest_") for name in table.dtype.names or ())
    sh = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    if rest:
        higher = columns(*(f"f_rest_{i}" for i in range(rest)))
        sh = np.concatenate([sh, higher.reshape(len(table), 3, rest // 3).transpose(0, 2, 1)], 1)
    return SplatAsset.from_stored(
        columns("x", "y", "z"),
        columns(*_QUATS),
        columns(*_SCALES),
        table["opacity"],
        sh,
        up=_parse_up(header.notes.get("up", "")),
        antialiased=header.notes.get("antialiased") == "1",
    )


def _parse_up(note: str) -> tuple[float, float, float] | None:
    """The vector in a comment of ours; a comment that somebody else changed is not worth refusing the file."""
    try:
        x, y, z = (float(word) for word in note.split())
    except ValueError:
        return None
    return (x, y, z) if np.isfinite([x, y, z]).all() and (x, y, z) != (0, 0, 0) else None
