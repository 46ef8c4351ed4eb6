"""One mesh as binary glTF 2.0 (ISO/IEC 12113): colours in 16 bits or a texture, shown as they are, without light."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLOAT, _UINT16, _UINT32 = 5126, 5123, 5125
_VERTICES, _INDICES = 34962, 34963  # what a bufferView is for
_REPEAT_NOT, _LINEAR = 33071, 9729


def glb_bytes(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    colors: NDArray[np.float64] | None,
    *,
    normals: NDArray[np.float64] | None = None,
    uvs: NDArray[np.float64] | None = None,
    texture: NDArray[np.uint8] | None = None,
    unlit: bool = True,
) -> bytes:
    """The whole file.

    Colours are written linear, as the format asks for, in 16 bits: 8 would show steps in what is dark. `KHR_materials_unlit`
    makes viewers show them as they are, for the light of the scene is in them already.

    Args:
        vertices: [V, 3], y up.
        faces: [F, 3].
        colors: [V, 4] display-referred RGB and opacity, 0..1; None leaves them out.
        normals: [V, 3] unit length.
        uvs: [V, 2] places in the texture, the origin at its lower left.
        texture: [H, W, 3] display-referred.
        unlit: whether to ask for no light, and for the inner side of faces to be drawn too.
    """
    file = _File()
    # Positions are float32: where the origin is far away, a node has to hold the way there.
    middle = np.median(vertices, 0)
    attributes = {"POSITION": file.attribute((vertices - middle).astype("<f4"), limits=True)}
    if normals is not None:
        attributes["NORMAL"] = file.attribute(normals.astype("<f4"))
    blended = False
    if colors is not None:
        blended = bool((colors[:, 3] < 1).any())
        linear = np.concatenate([to_linear(colors[:, :3]), colors[:, 3:]], 1)
        attributes["COLOR_0"] = file.attribute(np.rint(65535 * linear.clip(0, 1)).astype("<u2"), normalized=True)
    material: dict[str, Any] = {"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}
    material |= {"doubleSided": unlit, "alphaMode": "BLEND" if blended else "OPAQUE"}
    if unlit:
        material["extensions"] = {"KHR_materials_unlit": {}}
        file.content["extensionsUsed"] = ["KHR_materials_unlit"]
    if texture is not None and uvs is not None:
        attributes["TEXCOORD_0"] = file.attribute((uvs * [1, -1] + [0, 1]).astype("<f4"))
        material["pbrMetallicRoughness"]["baseColorTexture"] = {"index": file.texture(texture)}
    indices = file.attribute(faces.reshape(-1, 1).astype("<u4"), target=_INDICES)
    primitive = {"attributes": attributes, "indices": indices, "material": 0, "mode": 4}
    file.content |= {
        "materials": [material],
        "meshes": [{"primitives": [primitive]}],
        "nodes": [{"mesh": 0, "translation": middle.tolist()}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
    }
    return file.whole()


def to_linear(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """From display-referred values: sRGB, IEC 61966-2-1."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0.04045) + 0.055) / 1.055) ** 2.4)


def to_display(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of `to_linear`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


class _File:
    """JSON and the binary buffer that it describes, as they grow."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.content: dict[str, Any] = {"asset": {"version": "2.0", "generator": "prismfield"}}
        self.content |= {"bufferViews": [], "accessors": []}

    def view(self, data: bytes, target: int | None = None) -> int:
        """The number of a new bufferView."""
        views = self.content["bufferViews"]
        views.append({"buffer": 0, "byteOffset": self.buffer.tell(), "byteLength": len(data)})
        if target is not None:
            views[-1]["target"] = target
        self.buffer.write(data + bytes(-len(data) % 4))
        return len(views) - 1

    def attribute(
        self, rows: NDArray, *, target: int = _VERTICES, normalized: bool = False, limits: bool = False
    ) -> int:
        """The number of a new accessor of [N, D]."""
        kind = {"f": _FLOAT, "u": _UINT16 if rows.dtype.itemsize == 2 else _UINT32}[rows.dtype.kind]
        accessor: dict[str, Any] = {"bufferView": self.view(rows.tobytes(), target), "componentType": kind}
        accessor |= {"count": len(rows), "type": {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}[rows.shape[1]]}
        if normalized:
            accessor["normalized"] = True
        if limits:
            accessor |= {"min": rows.min(0).tolist(), "max": rows.max(0).tolist()}
        self.content["accessors"].append(accessor)
        return len(self.content["accessors"]) - 1

    def texture(self, picture: NDArray[np.uint8]) -> int:
        """The number of a new texture, stored as PNG."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        self.content["images"] = [{"bufferView": self.view(png.getvalue()), "mimeType": "image/png"}]
        edge = {"wrapS": _REPEAT_NOT, "wrapT": _REPEAT_NOT}
        self.content["samplers"] = [{"magFilter": _LINEAR, "minFilter": _LINEAR} | edge]
        self.content["textures"] = [{"source": 0, "sampler": 0}]
        return 0

    def whole(self) -> bytes:
        """Header and both chunks."""
        binary = self.buffer.getvalue()
        self.content["buffers"] = [{"byteLength": len(binary)}]
        text = json.dumps(self.content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
