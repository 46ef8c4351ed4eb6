"""Splats in glTF: what is in the file, what is read back in the user's frame, and what else may stand in one."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from prismfield.export.formats import read_asset
from prismfield.export.meshes.files import y_up
from prismfield.export.splat_glb import read_splat_glb, write_splat_glb
from prismfield.render.ops.sh import sh_basis

from .other_programs import splat_transform
from .splat_assets import assert_same_look, covariances, make_splats

NAME = "KHR_gaussian_splatting"


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack_from("<I", data, 12)
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def put(path: Path, document: dict[str, Any], binary: bytes) -> Path:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)
    return path


def column(document: dict[str, Any], binary: bytes, name: str) -> np.ndarray:
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"][name]]
    view = document["bufferViews"][accessor["bufferView"]]
    kind = {5126: "<f4", 5121: "u1"}[accessor["componentType"]]
    data = binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]
    return np.frombuffer(data, kind).reshape(accessor["count"], -1)


@pytest.mark.parametrize("up", [None, (0.0, 0.0, 1.0), (0.36, -0.48, 0.8)])
def test_up_is_y_in_the_file_and_the_users_frame_when_read(
    tmp_path: Path, up: tuple[float, float, float] | None
) -> None:
    asset = replace(make_splats(200), up=up)
    write_splat_glb(tmp_path / "a.glb", asset)
    document, binary = parts(tmp_path / "a.glb")
    assert document["extensionsUsed"] == [NAME] and document["meshes"][0]["primitives"][0]["mode"] == 0
    rotation = y_up(up)
    np.testing.assert_allclose(rotation @ np.array(up or (0, -1, 0)), [0, 1, 0], atol=1e-12)
    means = column(document, binary, "POSITION")
    np.testing.assert_allclose(means, asset.means @ rotation.T, atol=1e-5)
    accessor = document["accessors"][0]
    np.testing.assert_array_equal([accessor["min"], accessor["max"]], [means.min(0), means.max(0)])
    axes = Rotation.from_quat(column(document, binary, f"{NAME}:ROTATION")).as_matrix()
    scaled = axes * column(document, binary, f"{NAME}:SCALE")[:, None]
    expected = rotation @ covariances(asset) @ rotation.T
    np.testing.assert_allclose(scaled @ scaled.transpose(0, 2, 1), expected, atol=1e-5 * np.abs(expected).max())
    names = [f"{NAME}:SH_DEGREE_{d}_COEF_{i}" for d in range(4) for i in range(2 * d + 1)]
    sh = np.stack([column(document, binary, name) for name in names], 1)
    dirs = np.random.default_rng(0).normal(size=(20, 3))
    dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
    seen = sh_basis(torch.from_numpy(dirs @ rotation.T), 3).numpy() @ sh
    np.testing.assert_allclose(seen, sh_basis(torch.from_numpy(dirs), 3).numpy() @ asset.sh, atol=1e-5)
    again = read_asset(tmp_path / "a.glb")
    assert again.up == pytest.approx(up)
    assert_same_look(again, asset)  # type: ignore[arg-type]


def test_a_file_of_another_program_has_y_up(tmp_path: Path) -> None:
    write_splat_glb(tmp_path / "a.glb", make_splats(30, degree=1))
    document, binary = parts(tmp_path / "a.glb")
    del document["asset"]["extras"]
    again = read_splat_glb(put(tmp_path / "b.glb", document, binary))
    assert again.up == (0, 1, 0)
    np.testing.assert_array_equal(again.means, column(document, binary, "POSITION"))


def test_nodes_move_what_is_in_them(tmp_path: Path) -> None:
    asset = make_splats(30, degree=2)
    write_splat_glb(tmp_path / "a.glb", asset)
    document, binary = parts(tmp_path / "a.glb")
    del document["asset"]["extras"]
    turn = Rotation.from_euler("xyz", [0.3, -0.7, 1.1])
    inner = np.eye(4)
    inner[:3, :3], inner[:3, 3] = 2 * turn.as_matrix(), [1, 2, 3]
    outer = {"children": [1], "scale": [0.5, 0.5, 0.5], "rotation": [0, 0, 1, 0], "translation": [0, 0, 9]}
    document["nodes"] = [outer, {"mesh": 0, "matrix": inner.T.ravel().tolist()}, {"mesh": 0}]
    document["scenes"] = [{"nodes": [0, 2]}]
    again = read_splat_glb(put(tmp_path / "b.glb", document, binary))
    plain = asset.moved(np.diag([1.0, -1, -1]))
    moved = plain.moved(turn.as_matrix(), (1, 2, 3), 2).moved(np.diag([-1.0, -1, 1]), (0, 0, 9), 0.5)
    assert_same_look(again.take(np.arange(30)), plain)
    assert_same_look(again.take(np.arange(30, 60)), moved)
    for broken, message in (
        ([{"mesh": 0, "scale": [1, 2, 1]}], "stretches"),
        ([{"mesh": 0, "scale": [-1, 1, 1]}], "mirrors"),
        ([{"children": [0]}], "no tree"),
        ([{"mesh": 7}], r"meshes\[7\], which is not there"),
    ):
        document["nodes"], document["scenes"] = broken, [{"nodes": [0]}]
        with pytest.raises(ValueError, match=message):
            read_splat_glb(put(tmp_path / "b.glb", document, binary))


def test_integers_and_interleaved_rows_are_read(tmp_path: Path) -> None:
    asset = make_splats(40, degree=0)
    write_splat_glb(tmp_path / "a.glb", asset)
    document, binary = parts(tmp_path / "a.glb")
    quats = np.rint(column(document, binary, f"{NAME}:ROTATION") * 32767).astype("<i2")
    opacities = np.rint(asset.opacities * 255).astype(np.uint8)
    table = np.zeros(40, [("quat", "<i2", 4), ("opacity", "u1"), ("rest", "u1", 3)])
    table["quat"], table["opacity"] = quats, opacities
    view = {"buffer": 0, "byteOffset": len(binary), "byteLength": table.nbytes, "byteStride": 12}
    document["bufferViews"].append(view)
    at, place = document["meshes"][0]["primitives"][0]["attributes"], len(document["bufferViews"]) - 1
    normal = {"bufferView": place, "count": 40, "normalized": True}
    document["accessors"][at[f"{NAME}:ROTATION"]] = normal | {"componentType": 5122, "type": "VEC4"}
    document["accessors"][at[f"{NAME}:OPACITY"]] = normal | {"componentType": 5121, "type": "SCALAR", "byteOffset": 8}
    again = read_splat_glb(put(tmp_path / "b.glb", document, binary + table.tobytes()))
    np.testing.assert_allclose(again.opacities, asset.opacities, atol=0.51 / 255)
    np.testing.assert_allclose(covariances(again), covariances(asset), atol=1e-3 * covariances(asset).max())


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    write_splat_glb(tmp_path / "a.glb", make_splats(30, degree=0))
    whole, binary = parts(tmp_path / "a.glb")
    text = json.dumps(whole)
    cases = {
        text.replace('"ellipse"', '"cube"'): "expected kernel 'ellipse', got 'cube'",
        text.replace("srgb_rec709_display", "lin_rec709_display"): "expected colorSpace",
        text.replace(f"{NAME}:SCALE", "SCALE"): f"attribute {NAME}:SCALE is missing",
        text.replace('"count": 30', '"count": 31'): "31 rows do not fit the buffer",
        text.replace('"count": 30', '"count": 2147483648'): "do not fit the buffer",
        text.replace('"count": 30', '"count": true'): "expected rows that are all there",
        text.replace('"byteOffset": 0', '"byteOffset": -4'): "the file's own buffer",
        text.replace(f'"extensions": {{"{NAME}"', '"extensions": {"other"'): "there are no splats in it",
    }
    for changed, message in cases.items():
        assert changed != text
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read_splat_glb(put(tmp_path / "b.glb", json.loads(changed), binary))
        assert "b.glb" in str(caught.value)


def test_splat_transform_writes_the_same(tmp_path: Path) -> None:
    """It turns a .ply half round about z where this turns it about x; the scene is the same."""
    from prismfield.export.ply import write_ply

    asset = make_splats(100)
    write_ply(tmp_path / "a.ply", asset)
    splat_transform(tmp_path / "a.ply", tmp_path / "b.glb")
    again = read_splat_glb(tmp_path / "b.glb")
    assert_same_look(again.moved(np.diag([-1.0, -1, 1])), asset, sh=1e-4)
