"""Every format that is written, as a program of others reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from prismfield.export.assets import SplatAsset
from prismfield.export.convert import Source, write_checked
from prismfield.export.formats import FORMATS, WriteOptions, ending, read_asset
from prismfield.export.library import scene_of
from prismfield.export.meshes.files import write_mesh
from prismfield.export.meshes.glb import to_linear
from prismfield.export.meshes.hulls import write_glb
from prismfield.export.ply import read_ply
from prismfield.render.ops.sh import C0

from .other_programs import gltf_report, splat_transform
from .splat_assets import angles, assert_same_look, make_splats, without_up
from .test_export_convexes import make_asset
from .test_mesh_files import make_mesh

SPLATS = "KHR_gaussian_splatting"
HALF_TURN = np.diag([1.0, -1, -1])
BY_SPLAT_TRANSFORM = ["a.ply", "a.compressed.ply", "a.spz", "b.spz", "a.sog", "a_sog", "meta.json", "a.splat"]


def written(folder: Path, name: str, degree: int = 3) -> tuple[SplatAsset, Path]:
    """Splats as they come back from a file here, and the file; b.* is of the format's other version."""
    asset, path = make_splats(degree=degree), folder / name
    options = WriteOptions(spz_version=4) if name == "b.spz" else WriteOptions()
    write_checked(Source(folder, asset, scene_of(asset, folder)), path, options, is_verified=False)
    again = read_asset(path)
    assert isinstance(again, SplatAsset)
    return again, path


def complaints(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors and warnings; the rest is advice, as on a picture's width."""
    return [message for message in report["issues"]["messages"] if message["severity"] < 2]


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("name", BY_SPLAT_TRANSFORM)
def test_splat_transform_reads_the_same(tmp_path: Path, name: str, degree: int) -> None:
    again, path = written(tmp_path, name, degree)
    splat_transform(path / "meta.json" if path.is_dir() else path, tmp_path / "seen.ply")
    seen = read_ply(tmp_path / "seen.ply")
    if (
        name == "a.splat"
    ):  # rotations are (byte - 127.5) / 127.5 there; in the viewer that the format is of, (byte - 128) / 128
        assert angles(seen, again).max() < 0.95
        seen = replace(seen, quats=again.quats)
    if path.suffix == ".spz":  # since version 3 it takes their axes for those of a .ply
        seen = seen.moved(HALF_TURN)
    assert_same_look(seen, without_up(again))


@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply", "a.spz", "b.spz"])
def test_gsply_reads_the_same(tmp_path: Path, name: str, degree: int) -> None:
    gsply = pytest.importorskip("gsply", reason="gsply is not installed: pip install gsply")
    again, path = written(tmp_path, name, degree)
    found = gsply.read_spz(path) if path.suffix == ".spz" else gsply.plyread(path)
    higher = [] if found.shN is None else [found.shN.reshape(len(again), -1, 3)]
    sh = np.concatenate([found.sh0[:, None], *higher], 1)
    opacities = 1 / (1 + np.exp(-found.opacities))
    seen = SplatAsset.from_activated(found.means, found.quats, np.exp(found.scales), opacities, sh)
    if path.suffix == ".spz":  # whose axes it takes for those of a .ply
        seen = seen.moved(HALF_TURN)
    assert_same_look(seen, without_up(again), opacity=5e-5)  # logits are 10 at most there


def test_a_glb_of_splats_is_points_to_programs_that_do_not_know_splats(tmp_path: Path) -> None:
    asset, path = written(tmp_path, "a.glb")
    (cloud,) = trimesh.load(path, process=False).geometry.values()
    np.testing.assert_allclose(np.asarray(cloud.vertices), asset.means * [1, -1, -1], atol=1e-5)
    colors = to_linear((asset.sh[:, 0] * C0 + 0.5).clip(0, 1))
    np.testing.assert_allclose(np.asarray(cloud.colors)[:, :3] / 255, colors, atol=0.51 / 255)
    report = gltf_report(path)
    # Of this extension the validator knows nothing, so the attributes that it brings are strange to it
    strange = [m for m in report["issues"]["messages"] if SPLATS not in m.get("pointer", "") + m["message"]]
    assert not strange and report["info"]["totalVertexCount"] == len(asset)


def test_meshes_are_valid_gltf(tmp_path: Path) -> None:
    for name, mesh in {
        "plain": make_mesh(),
        "normals": make_mesh(normals=True),
        "textured": make_mesh(textured=True, normals=True),
    }.items():
        write_mesh(tmp_path / f"{name}.glb", mesh)
        report = gltf_report(tmp_path / f"{name}.glb")
        assert not complaints(report), name
        assert report["info"]["totalTriangleCount"] == len(mesh)


def test_hulls_are_valid_gltf(tmp_path: Path) -> None:
    asset = make_asset(20)
    write_glb(tmp_path / "a.glb", asset)
    report = gltf_report(tmp_path / "a.glb")
    assert not complaints(report) and report["info"]["totalTriangleCount"] > 20 * 4


def test_every_format_has_a_reader_elsewhere() -> None:
    read = {ending(Path(name), FORMATS["gaussians"]) for name in BY_SPLAT_TRANSFORM} | {".glb"}
    read |= {"lod-meta.json", "_lod"}  # tests/test_streamed.py
    ours = {".pfz"}  # opens in this program only
    assert read | ours == {end for end, form in FORMATS["gaussians"].items() if form.write is not None}
