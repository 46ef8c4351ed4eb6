"""Binary glTF with KHR_gaussian_splatting: every value as a float, y up. (Khronos, extension of glTF 2.0, 2026.)

A file turns the user's frame the shortest way from its `up` to +y (`mesh_files.y_up`; for a file that does not say, half a turn
about x), positions, rotations and harmonics alike. What was turned is noted in `asset.extras`, and undone when it is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.gltf import Glb, read_glb_file
from prismfield.export.meshes.files import y_up
from prismfield.export.reading import check_ratio, naming, numbers
from prismfield.export.rows import pieces
from prismfield.export.verify import write_verified
from prismfield.render.ops.sh import C0

_EXTENSION = "KHR_gaussian_splatting"
_FLOAT, _BYTE, _POINTS, _ARRAY_BUFFER = 5126, 5121, 0, 34962
_MAX_BYTES = (1 << 32) - 1
_LOOK = {"kernel": "ellipse", "colorSpace": "srgb_rec709_display", "projection": "perspective"}
_DEPTH = 64  # of nodes within nodes


def write_splat_glb(path: Path, asset: SplatAsset) -> None:
    """Write, read back and compare before it takes the name `path`.

    Raises:
        ValueError: the asset is empty, or needs more than the 4 GiB that a .glb can have.
        OSError: the file could not be written, or came back different.
    """
    held = replace(asset, extra={})
    reach = float(np.abs(held.means).max(initial=0))
    strongest = float(np.abs(held.sh).max(initial=0))
    tolerances = {
        "means": 1e-6 * reach,
        "quats": 1e-6,
        "scales": 1e-5,
        "opacities": 0.0,
        "sh": 1e-5 * max(strongest, 1),
        "up": 1e-5,
        "antialiased": 0.0,
    }
    write_verified(path, held, _write, read_splat_glb, tolerances)


def read_splat_glb(path: Path) -> SplatAsset:
    """Read all splats of the scene in a .glb, moved as its nodes say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    with naming(path):
        glb = read_glb_file(path.read_bytes())
        parts, total = [], 0
        for node, matrix in _placed_meshes(glb):
            for primitive in glb.item("meshes", glb.item("nodes", node).get("mesh")).get("primitives") or []:
                if not isinstance(primitive, dict) or _EXTENSION not in (primitive.get("extensions") or {}):
                    continue
                part = _splats(glb, primitive)
                total += len(part) * 4 * (11 + part.sh[0].size)
                check_ratio(total, len(glb.binary))  # one mesh may stand in many places
                parts.append(_place(part, matrix))
        if not parts:
            raise ValueError(f"there are no splats in it: no primitive has {_EXTENSION}")
        return _in_the_users_frame(glb, _joined(parts))


def _columns(asset: SplatAsset) -> Iterator[tuple[str, str, NDArray]]:
    """Name, type and values of each attribute."""
    rgb = (0.5 + C0 * asset.sh[:, 0].astype(np.float64)).clip(0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)  # sRGB, IEC 61966-2-1
    points = np.concatenate([linear, asset.opacities[:, None]], 1)  # for programs that only draw points
    yield "POSITION", "VEC3", asset.means
    yield "COLOR_0", "VEC4", np.rint(255 * points).astype(np.uint8)
    yield f"{_EXTENSION}:ROTATION", "VEC4", asset.quats[:, [1, 2, 3, 0]]
    yield f"{_EXTENSION}:SCALE", "VEC3", asset.scales
    yield f"{_EXTENSION}:OPACITY", "SCALAR", asset.opacities[:, None]
    for degree in range(asset.sh_degree + 1):
        for term in range(2 * degree + 1):
            yield f"{_EXTENSION}:SH_DEGREE_{degree}_COEF_{term}", "VEC3", asset.sh[:, degree**2 + term]


def _write(path: Path, asset: SplatAsset) -> None:
    rotation = y_up(asset.up)
    turned = asset.moved(rotation)
    views: list[dict[str, Any]] = []
    accessors: list[dict[str, Any]] = []
    attributes: dict[str, int] = {}
    size = 0
    for name, kind, values in _columns(turned):
        attributes[name] = len(accessors)
        views.append({"buffer": 0, "byteOffset": size, "byteLength": values.nbytes, "target": _ARRAY_BUFFER})
        accessor = {"bufferView": len(views) - 1, "componentType": _FLOAT, "count": len(asset), "type": kind}
        if values.dtype == np.uint8:
            accessor |= {"componentType": _BYTE, "normalized": True}
        if name == "POSITION":
            accessor |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        accessors.append(accessor)
        size += values.nbytes
    note = {"rotation": rotation.ravel().tolist(), "antialiased": asset.antialiased}
    if asset.up is not None:
        note["up"] = list(asset.up)
    primitive = {"mode": _POINTS, "attributes": attributes, "extensions": {_EXTENSION: _LOOK}}
    document = {
        "asset": {"version": "2.0", "generator": "prismfield", "extras": {"prismfield": note}},
        "extensionsUsed": [_EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "splats"}],
        "meshes": [{"primitives": [primitive]}],
        "buffers": [{"byteLength": size}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    if (whole := 28 + len(text) + size) > _MAX_BYTES:
        raise ValueError(f"{len(asset):,} Gaussians need {whole:,} bytes, a .glb can have {_MAX_BYTES:,}")
    with path.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, whole) + struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", size, b"BIN\0"))
        for _, _, values in _columns(turned):
            for rows in pieces(len(asset)):
                part = values[rows]
                file.write(part.astype("<f4" if part.dtype == np.float32 else np.uint8).tobytes())


def _splats(glb: Glb, primitive: dict[str, Any]) -> SplatAsset:
    look, attributes = primitive["extensions"][_EXTENSION], primitive.get("attributes")
    if not isinstance(look, dict) or not isinstance(attributes, dict):
        raise ValueError(f"a primitive of {_EXTENSION} is not whole")
    if look.get("extensions"):
        raise ValueError(f"its splats are compressed ({', '.join(map(str, look['extensions']))}), which is not read")
    for key, expected in (("kernel", "ellipse"), ("colorSpace", "srgb_rec709_display")):
        if look.get(key, expected) != expected:
            raise ValueError(f"expected {key} {expected!r}, got {str(look[key])[:40]!r}")

    def column(name: str, components: int) -> NDArray:
        full = name if name == "POSITION" else f"{_EXTENSION}:{name}"
        if full not in attributes:
            raise ValueError(f"attribute {full} is missing")
        return glb.accessor(attributes[full], components)

    degree = 0
    while degree < 3 and f"{_EXTENSION}:SH_DEGREE_{degree + 1}_COEF_0" in attributes:
        degree += 1
    names = [f"SH_DEGREE_{d}_COEF_{term}" for d in range(degree + 1) for term in range(2 * d + 1)]
    means, quats = column("POSITION", 3), column("ROTATION", 4)
    columns = [means, quats, column("SCALE", 3), column("OPACITY", 1), *(column(name, 3) for name in names)]
    if len({len(values) for values in columns}) > 1:
        raise ValueError(f"attributes have {' and '.join(sorted({str(len(v)) for v in columns}))} rows")
    sh = np.stack(columns[4:], 1)
    return SplatAsset.from_activated(means, quats[:, [3, 0, 1, 2]], columns[2], columns[3][:, 0].clip(0, 1), sh)


def _placed_meshes(glb: Glb) -> Iterator[tuple[int, NDArray]]:
    """(node, its matrix [4, 4] to the world) of the nodes with a mesh in the scene that is shown."""
    scenes = glb.document.get("scenes")
    if scenes:
        roots = glb.item("scenes", glb.document.get("scene", 0)).get("nodes") or []
    else:
        roots = list(range(len(glb.document.get("nodes") or [])))
    pending = [(node, np.eye(4), 0) for node in roots if isinstance(roots, list)]
    seen: set[int] = set()
    while pending:
        node, above, depth = pending.pop()
        entry = glb.item("nodes", node)
        if node in seen or depth > _DEPTH:
            raise ValueError("its nodes are no tree")
        seen.add(node)
        matrix = above @ _matrix(entry)
        if "mesh" in entry:
            yield node, matrix
        pending += [(child, matrix, depth + 1) for child in entry.get("children") or []]


def _matrix(node: dict[str, Any]) -> NDArray[np.float64]:
    if "matrix" in node:
        return np.array(numbers(node["matrix"], 16, "a node's matrix")).reshape(4, 4).T
    from scipy.spatial.transform import Rotation

    quat = numbers(node.get("rotation", [0, 0, 0, 1]), 4, "a node's rotation")
    if not any(quat):
        raise ValueError("a node's rotation is 0")
    matrix = np.eye(4)
    scale = numbers(node.get("scale", [1, 1, 1]), 3, "a node's scale")
    matrix[:3, :3] = Rotation.from_quat(quat).as_matrix() * np.array(scale)
    matrix[:3, 3] = numbers(node.get("translation", [0, 0, 0]), 3, "a node's translation")
    return matrix


def _place(asset: SplatAsset, matrix: NDArray) -> SplatAsset:
    if (matrix == np.eye(4)).all():
        return asset
    linear = matrix[:3, :3]
    scale = float(np.cbrt(np.linalg.det(linear)))
    if not scale > 0 or not np.allclose(linear @ linear.T, scale**2 * np.eye(3), atol=1e-4 * scale**2):
        raise ValueError("a node mirrors its splats, or stretches them in one direction")
    return asset.moved(linear / scale, matrix[:3, 3].tolist(), scale)


def _joined(parts: list[SplatAsset]) -> SplatAsset:
    if len(parts) == 1:
        return parts[0]
    degree = max(part.sh_degree for part in parts)
    parts = [part.at_degree(degree) for part in parts]
    names = ("means", "quats", "scales", "opacities", "sh")
    values: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return SplatAsset(**values)


def _in_the_users_frame(glb: Glb, asset: SplatAsset) -> SplatAsset:
    """Turned back as the note in the file says; as it is, with y up, where there is none or somebody has spoilt it."""
    note: Any = glb.document.get("asset")
    for key in ("extras", "prismfield"):
        note = note.get(key) if isinstance(note, dict) else None
    if not isinstance(note, dict):
        return replace(asset, up=(0.0, 1.0, 0.0))
    try:
        rotation = np.array(numbers(note.get("rotation"), 9, "rotation")).reshape(3, 3)
        back = asset.moved(rotation.T)
        up = numbers(note["up"], 3, "up") if "up" in note else None
    except ValueError:
        return replace(asset, up=(0.0, 1.0, 0.0))
    return replace(back, up=None if up is None else (up[0], up[1], up[2]), antialiased=note.get("antialiased") is True)
