"""Meshes in files: what trimesh, an independent reader, finds in each, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from prismfield.export.meshes import files as mesh_files
from prismfield.export.meshes.files import MeshAsset, write_mesh, y_up
from prismfield.export.meshes.glb import to_display, to_linear

UP = (0.0, 0.6, 0.8)


def make_mesh(*, normals: bool = False, offset: float = 0.0, textured: bool = False) -> MeshAsset:
    """An oblong box, a different colour at each corner."""
    box = trimesh.creation.box((1.0, 2.0, 3.0))
    rng = np.random.default_rng(0)
    colors = np.concatenate([rng.uniform(0, 1, (8, 3)), np.ones((8, 1))], 1)
    colors[0, :3] = 0.02  # dark: 8 linear bits could not tell it from 0.05
    picture = rng.integers(0, 256, (4, 6, 3), np.uint8)
    return MeshAsset(
        box.vertices + np.array([7.0, -3.0, 2.0]) + offset,
        np.asarray(box.faces),
        np.ones((8, 4)) if textured else colors,
        normals=np.asarray(box.vertex_normals) if normals else None,
        uvs=rng.uniform(0, 1, (8, 2)) if textured else None,
        texture=picture if textured else None,
        up=UP,
    )


@pytest.mark.parametrize("normals", [False, True])
@pytest.mark.parametrize("suffix", [".glb", ".ply", ".obj", ".stl"])
def test_trimesh_finds_what_was_written(tmp_path: Path, suffix: str, normals: bool) -> None:
    mesh, path = make_mesh(normals=normals), tmp_path / "new" / f"a{suffix}"
    write_mesh(path, mesh)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found = trimesh.load(path, process=False)
    if isinstance(found, trimesh.Scene):
        found = found.to_mesh()
    turn = y_up(UP).T if suffix == ".glb" else np.eye(3)
    np.testing.assert_allclose(found.triangles, (mesh.vertices @ turn)[mesh.faces], atol=1e-5)
    assert found.volume == pytest.approx(6, rel=1e-5)  # faces look outwards
    if suffix == ".stl":
        return
    if normals:
        assert mesh.normals is not None
        np.testing.assert_allclose(found.vertex_normals[found.faces], (mesh.normals @ turn)[mesh.faces], atol=1e-6)
    if suffix != ".glb":
        colors = found.visual.vertex_colors[found.faces] / 255
        np.testing.assert_allclose(colors, mesh.colors[mesh.faces], atol=0.51 / 255)


def glb_parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    magic, version, length, size = struct.unpack_from("<4sIII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data)) and size % 4 == 0
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def test_the_glb_has_fine_linear_colours_that_no_light_changes(tmp_path: Path) -> None:
    mesh = make_mesh()
    write_mesh(tmp_path / "a.glb", mesh)
    content, binary = glb_parts(tmp_path / "a.glb")
    assert content["extensionsUsed"] == ["KHR_materials_unlit"] and content["materials"][0]["alphaMode"] == "OPAQUE"
    accessor = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    assert accessor["componentType"] == 5123 and accessor["normalized"]
    raw = np.frombuffer(binary, "<u2", 4 * 8, content["bufferViews"][accessor["bufferView"]]["byteOffset"])
    np.testing.assert_allclose(to_display(raw.reshape(8, 4)[:, :3] / 65535), mesh.colors[:, :3], atol=2e-4)
    assert to_linear(np.array([0.5]))[0] == pytest.approx(0.21404, abs=1e-5)


def test_a_texture_travels_in_the_glb_the_right_way_up(tmp_path: Path) -> None:
    mesh = make_mesh(textured=True)
    write_mesh(tmp_path / "a.glb", mesh)
    found = trimesh.load(tmp_path / "a.glb", process=False).to_mesh()
    assert mesh.uvs is not None
    np.testing.assert_allclose(found.visual.uv[found.faces], mesh.uvs[mesh.faces], atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.visual.material.baseColorTexture)[..., :3], mesh.texture)
    content, binary = glb_parts(tmp_path / "a.glb")
    accessor = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"]]
    first = np.frombuffer(binary, "<f4", 2, content["bufferViews"][accessor["bufferView"]]["byteOffset"])
    np.testing.assert_allclose(first, [mesh.uvs[0, 0], 1 - mesh.uvs[0, 1]], atol=1e-6)  # glTF counts from above
    with pytest.raises(ValueError, match=r"a\.ply: a texture needs a \.glb"):
        write_mesh(tmp_path / "a.ply", mesh)


def test_far_from_the_origin_only_formats_that_can_are_written(tmp_path: Path) -> None:
    mesh = make_mesh(offset=4e6)
    for suffix in (".glb", ".obj"):
        write_mesh(tmp_path / f"a{suffix}", mesh)
    for suffix in (".ply", ".stl"):
        with pytest.raises(ValueError, match="too far from the origin for the single precision"):
            write_mesh(tmp_path / f"a{suffix}", mesh)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.glb", "a.obj"]
    content, _ = glb_parts(tmp_path / "a.glb")
    assert max(content["accessors"][0]["max"]) < 4  # float32 holds what is near the node, which is far away


def test_nothing_is_written_of_nothing_or_under_a_strange_name(tmp_path: Path) -> None:
    mesh = make_mesh()
    with pytest.raises(ValueError, match="has no surface"):
        write_mesh(tmp_path / "a.glb", replace(mesh, faces=mesh.faces[:0]))
    with pytest.raises(
        ValueError, match=r"unknown suffix '\.fbx' for a mesh; expected one of \.glb, \.ply, \.obj, \.stl"
    ):
        write_mesh(tmp_path / "a.fbx", mesh)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["vertices", "colors"])
def test_a_file_that_comes_back_different_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, read = tmp_path / "a.ply", mesh_files._read
    path.write_text("old")

    def wrong(part: Path, suffix: str) -> MeshAsset:
        found = read(part, suffix)
        return replace(found, **{what: getattr(found, what) * 0.99})

    monkeypatch.setattr(mesh_files, "_read", wrong)
    with pytest.raises(OSError, match=f"{what} came back off"):
        write_mesh(path, make_mesh())
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
