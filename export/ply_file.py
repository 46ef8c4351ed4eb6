"""Files in the Polygon File Format (.ply): their header, and an element's rows as a table. What is in them, `ply.py` and
`convex_ply.py` know.

Harmonics lie channel-major (all red, all green, all blue) in f_dc and f_rest, as in the files of 3D Gaussian Splatting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prismfield.export.rows import pieces

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
TYPE_NAMES = {"i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint"} | {
    "f4": "float",
    "f8": "double",
}
"""What a header calls numpy's types."""
_MAX_HEADER = 1 << 20
_TAG = "prismfield"
_DC = ("f_dc_0", "f_dc_1", "f_dc_2")


@dataclass
class Element:
    """Rows of one kind, as the header describes them."""

    name: str
    count: int
    properties: list[tuple[str, str]] = field(default_factory=list)
    """(name, numpy type without byte order), in file order."""
    has_lists: bool = False

    @property
    def dtype(self) -> np.dtype:
        """Of a row of a binary file."""
        return np.dtype([(name, f"<{kind}") for name, kind in self.properties])


@dataclass
class Header:
    """What a file says about itself before its rows."""

    ascii: bool
    elements: list[Element]
    notes: dict[str, str]
    """Our own comments."""
    size: int
    """Bytes up to and with the line `end_header`."""

    def find(self, name: str) -> tuple[Element, list[Element]]:
        """The first element of that name, and those before it.

        Raises:
            ValueError: there is none.
        """
        for i, element in enumerate(self.elements):
            if element.name == name:
                return element, self.elements[:i]
        raise ValueError(f"there is no element {name!r}")


def read_header(file: BinaryIO) -> Header:
    """The header, bounded in size; the file is left at its end.

    Raises:
        ValueError: one line saying what is wrong with it.
    """
    start = file.read(_MAX_HEADER)
    if not start.startswith((b"ply\n", b"ply\r\n", b"ply\r")):
        raise ValueError("not a .ply file: it does not begin with the line 'ply'")
    end = start.find(b"end_header")
    newline = start.find(b"\n", end)
    if end < 0 or newline < 0:
        raise ValueError("the header has no line 'end_header'; the file may be cut short")
    file.seek(newline + 1)
    header = Header(ascii=False, elements=[], notes={}, size=newline + 1)
    form = ""
    for line in start[:end].decode("ascii", "replace").splitlines()[1:]:
        match line.split():
            case ["format", form, _]:
                pass
            case ["comment", tag, key, *values] if tag == _TAG:
                header.notes[key] = " ".join(values)
            case ["element", name, count] if count.isdecimal() and len(count) < 16:
                header.elements.append(Element(name, int(count)))
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


def check_rows(header: Header, name: str, what: str, size: int) -> None:
    """Hold the rows of element `name` that the header promises against the file's `size`, before anything is allocated.

    Raises:
        ValueError: there are no rows, rows are not of fixed length, harmonics are not of degree 0 to 3, or the file is too
            short; `what` is what its rows are called.
    """
    element, before = header.find(name)
    if element.count == 0:
        raise ValueError(f"there are no {what} in it")
    names = dict(element.properties)
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise ValueError(f"expected f_rest_0 onwards, 0, 9, 24 or 45 of them (degree 0 to 3), got {rest}")
    if element.has_lists or (not header.ascii and any(other.has_lists for other in before)):
        raise ValueError("a list property stands where rows of fixed length were expected")
    # In ascii a value takes two bytes at least.
    bytes_of = (lambda e: 2 * len(e.properties)) if header.ascii else (lambda e: e.dtype.itemsize)
    needed = header.size + sum(e.count * bytes_of(e) for e in (*before, element)) - header.ascii
    if size < needed:
        raise ValueError(f"the file is cut short: {element.count} {what} need {needed} bytes, it has {size}")


def read_rows(file: BinaryIO, header: Header, name: str) -> NDArray:
    """The rows of element `name`, whose header passed `check_rows`, with a field for each property.

    Raises:
        ValueError: there are fewer, or they are not numbers.
    """
    element, before = header.find(name)
    return (_read_ascii if header.ascii else _read_binary)(file, header, element, before)


def _read_binary(file: BinaryIO, header: Header, element: Element, before: list[Element]) -> NDArray:
    file.seek(header.size + sum(other.count * other.dtype.itemsize for other in before))
    table = np.fromfile(file, element.dtype, element.count)
    if len(table) < element.count:
        raise ValueError("the file is cut short")
    return table


def _read_ascii(file: BinaryIO, header: Header, element: Element, before: list[Element]) -> NDArray:
    file.seek(header.size)
    for _ in range(sum(other.count for other in before)):
        file.readline()
    rows = np.loadtxt(islice(file, element.count), np.float64, comments=None, ndmin=2)
    shape = (element.count, len(element.properties))
    if rows.shape != shape:
        raise ValueError(f"expected {shape[0]} lines of {shape[1]} numbers, got {list(rows.shape)}")
    table = np.empty(len(rows), [(name, "f8") for name, _ in element.properties])
    for column, (name, _) in zip(rows.T, element.properties, strict=True):
        table[name] = column
    return table


def columns(table: NDArray, *names: str) -> NDArray:
    """[N, len(names)] of those fields."""
    return np.stack([table[name] for name in names], 1)


def harmonics(table: NDArray) -> NDArray:
    """[N, T, 3] from f_dc and f_rest."""
    higher = sum(name.startswith("f_rest_") for name in table.dtype.names or ()) // 3
    sh = np.empty((len(table), 1 + higher, 3), table.dtype[_DC[0]])
    for rows in pieces(len(table)):
        sh[rows, 0] = columns(table[rows], *_DC)
        for channel in range(3 if higher else 0):
            names = (f"f_rest_{higher * channel + term}" for term in range(higher))
            sh[rows, 1:, channel] = columns(table[rows], *names)
    return sh


def harmonic_names(terms: int) -> list[str]:
    """Properties of `terms` harmonics a channel."""
    return [*_DC, *(f"f_rest_{i}" for i in range(3 * (terms - 1)))]


def harmonic_columns(sh: NDArray) -> NDArray:
    """[N, 3 T] in the order of `harmonic_names`, from [N, T, 3]."""
    higher = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), 3 * (sh.shape[1] - 1))
    return np.concatenate([sh[:, 0], higher], 1)


def write_header(elements: Mapping[str, tuple[int, Mapping[str, str]]], notes: Mapping[str, str]) -> bytes:
    """The header of a binary file.

    Args:
        elements: by name, in the order of the file: how many rows, and the type of each property by name, in the order of
            the columns.
        notes: comments of ours.
    """
    try:
        version = metadata.version("prismfield")
    except metadata.PackageNotFoundError:
        version = "from a source tree"
    lines = ["ply", "format binary_little_endian 1.0", f"comment {_TAG} version {version}"]
    lines += [f"comment {_TAG} {key} {value}" for key, value in notes.items()]
    for element, (count, properties) in elements.items():
        lines += [f"element {element} {count}"]
        lines += [f"property {kind} {name}" for name, kind in properties.items()]
    return "\n".join([*lines, "end_header", ""]).encode("ascii")


Up = tuple[float, float, float]


def up_note(up: Up | None) -> dict[str, str]:
    """The comment that says which way is up; none where nobody knows."""
    return {} if up is None else {"up": " ".join(f"{value:.9g}" for value in up)}


def parse_up(note: str) -> Up | None:
    """The vector in a comment of ours; a comment that somebody else changed is not worth refusing the file."""
    try:
        x, y, z = (float(word) for word in note.split())
    except ValueError:
        return None
    return (x, y, z) if np.isfinite([x, y, z]).all() and (x, y, z) != (0, 0, 0) else None
