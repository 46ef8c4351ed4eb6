"""What is in a binary glTF file: its document and its buffer, each reference held against what is there."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.reading import json_object

_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
_MAX_DOCUMENT = 1 << 28


@dataclass(frozen=True)
class Glb:
    """A document and the buffer beside it."""

    document: dict[str, Any]
    binary: memoryview

    def item(self, key: str, index: Any) -> dict[str, Any]:
        """An object of one of the document's lists.

        Raises:
            ValueError: there is none.
        """
        entries = self.document.get(key)
        if not isinstance(entries, list) or type(index) is not int or not 0 <= index < len(entries):
            raise ValueError(f"it refers to {key}[{str(index)[:20]}], which is not there")
        if not isinstance(entries[index], dict):
            raise ValueError(f"{key}[{index}] is not an object")
        return entries[index]

    def accessor(self, index: Any, components: int) -> NDArray[np.floating]:
        """[N, components] of an accessor; integers that are normalised come as -1..1 or 0..1.

        Raises:
            ValueError: it is not whole, of another type, or not in the file's buffer.
        """
        entry = self.item("accessors", index)
        count, kind = entry.get("count"), _TYPES.get(entry.get("componentType", 0))
        if _COMPONENTS.get(str(entry.get("type"))) != components or kind is None:
            raise ValueError(f"accessors[{index}]: expected {components} components of a known type")
        if type(count) is not int or count < 1 or "sparse" in entry:
            raise ValueError(f"accessors[{index}]: expected rows that are all there, got {str(count)[:20]}")
        view = self.item("bufferViews", entry.get("bufferView"))
        width = np.dtype(kind).itemsize * components
        places = view.get("byteOffset", 0), entry.get("byteOffset", 0), view.get("byteStride", width)
        length = view.get("byteLength")
        if any(type(place) is not int or place < 0 for place in (*places, length)) or view.get("buffer") != 0:
            raise ValueError(f"accessors[{index}]: expected bytes in the file's own buffer")
        start, stride = places[0] + places[1], places[2]
        needed = places[1] + stride * (count - 1) + width
        if stride < width or needed > length or places[0] + length > len(self.binary):
            raise ValueError(f"accessors[{index}]: {count} rows do not fit the buffer, or the file is cut short")
        layout = np.dtype({"names": ["row"], "formats": [(kind, (components,))], "itemsize": stride})
        # The last row need not be followed by what stands between rows
        data = bytes(self.binary[start : start + stride * (count - 1) + width]) + bytes(stride - width)
        values = np.frombuffer(data, layout, count)["row"].reshape(count, components)
        if entry.get("normalized") is True and values.dtype.kind in "iu":
            return np.maximum(values / np.iinfo(values.dtype).max, -1)
        return values.astype(np.float32)


def read_glb_file(data: bytes) -> Glb:
    """The chunks of a .glb.

    Raises:
        ValueError: it is none, or cut short.
    """
    if len(data) < 20 or data[:4] != b"glTF":
        raise ValueError("not a .glb: it does not begin with 'glTF'")
    version, whole = struct.unpack_from("<II", data, 4)
    if version != 2 or whole > len(data):
        raise ValueError(f"expected version 2 and {whole:,} bytes, got version {version}, {len(data):,} bytes")
    chunks: dict[bytes, memoryview] = {}
    at = 12
    while at + 8 <= whole:
        size, kind = struct.unpack_from("<I4s", data, at)
        if size > whole - at - 8:
            raise ValueError("a chunk goes beyond the end of the file")
        chunks.setdefault(kind, memoryview(data)[at + 8 : at + 8 + size])
        at += 8 + size + (-size % 4)
    if b"JSON" not in chunks or len(chunks[b"JSON"]) > _MAX_DOCUMENT:
        raise ValueError("it has no JSON chunk of reasonable size")
    return Glb(json_object(bytes(chunks[b"JSON"]), "its JSON chunk"), chunks.get(b"BIN\0", memoryview(b"")))
