"""Convexes leave as .ply and as meshes: our own values come back, other readers agree, no damaged file gets through."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import plyfile
import pytest
import torch
import trimesh
from safetensors.torch import load_file
from scipy.spatial import ConvexHull

import prismfield as pf
from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import ConvexAsset
from prismfield.export.cli import ExportConfig, export
from prismfield.export.convex_ply import convex_ply_bytes, read_convex_ply, write_convex_ply
from prismfield.export.formats import read_asset
from prismfield.export.meshes.files import y_up
from prismfield.export.meshes.hulls import write_glb, write_obj
from prismfield.export.verify import write_verified
from prismfield.render.cameras import Cameras
from prismfield.render.ops.sh import C0
from prismfield.representations.config import ConvexesConfig, GaussiansConfig
from prismfield.representations.convexes import Convexes
from prismfield.representations.convexes_from_gaussians import convexes_from_gaussians
from prismfield.representations.gaussians import Gaussians
from prismfield.train.metrics import psnr

from .commands import command, refused

SMALL = ("--scene", "garden", "--downscale", 4, "--strategy", "fixed", "--log.tests", 0, "--log.no-tensorboard")


def make_asset(count: int = 17, points: int = 6, degree: int = 3, dtype: type = np.float32) -> ConvexAsset:
    rng = np.random.default_rng(points)
    corners = rng.normal(size=(count, points, 3)) * 0.2 + rng.normal(size=(count, 1, 3)) * 3
    deltas, sigmas = rng.uniform(0.5, 20, (2, count)).astype(np.float32)
    sh = rng.normal(size=(count, (degree + 1) ** 2, 3)).astype(np.float32)
    opacities = rng.uniform(0.1, 0.9, count).astype(np.float32)
    return ConvexAsset(corners.astype(dtype), deltas, sigmas, opacities, sh, up=(0.0, 0.6, 0.8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of convexes."""
    folder = tmp_path_factory.mktemp("convexes") / "run"
    done = command("train.cli", *SMALL, "--representation", "convexes", "--steps", 4, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("count", "points", "degree", "dtype"), [(17, 6, 3, np.float32), (1, 12, 0, np.float64)])
def test_values_come_back_and_plyfile_reads_them(
    tmp_path: Path, count: int, points: int, degree: int, dtype: type
) -> None:
    asset = make_asset(count, points, degree, dtype)
    path = tmp_path / "new" / "a.ply"
    write_convex_ply(path, asset)
    assert [p.name for p in path.parent.iterdir()] == ["a.ply"] and path.stat().st_size == convex_ply_bytes(asset)
    again = read_asset(path)
    assert isinstance(again, ConvexAsset) and again.points.dtype == dtype
    assert asset.differences(again) == pytest.approx(dict.fromkeys(asset.differences(again), 0), abs=1e-7)
    rows = plyfile.PlyData.read(path)["convex"]
    for i in range(points):
        np.testing.assert_array_equal(np.stack([rows[f"{a}_{i}"] for a in "xyz"], 1), asset.points[:, i])
    for name, values in (("delta", asset.deltas), ("sigma", asset.sigmas), ("opacity", asset.opacities)):
        np.testing.assert_array_equal(rows[name], values)
    np.testing.assert_array_equal(np.stack([rows[f"f_dc_{i}"] for i in range(3)], 1), asset.sh[:, 0])
    terms = asset.sh.shape[1] - 1
    for i in range(3 * terms):
        np.testing.assert_array_equal(rows[f"f_rest_{i}"], asset.sh[:, 1 + i % terms, i // terms])


@pytest.mark.parametrize("text", [False, True])
def test_reads_what_plyfile_writes_and_passes_over_the_rest(tmp_path: Path, text: bool) -> None:
    asset = make_asset(degree=0)
    names = [f"{a}_{i}" for i in range(6) for a in "xyz"]
    values = dict(zip(names, asset.points.reshape(-1, 18).T, strict=True))
    values = {"x_velocity": np.ones(17), "opacity": asset.opacities, "sigma": asset.sigmas} | values
    values |= {"delta": asset.deltas} | {f"f_dc_{i}": asset.sh[:, 0, i] for i in range(3)}
    table = np.empty(17, [(name, "f4") for name in values])
    for name, column in values.items():
        table[name] = column
    other = np.zeros(3, [("x", "f8"), ("kind", "u1")])
    elements = [plyfile.PlyElement.describe(other, "vertex"), plyfile.PlyElement.describe(table, "convex")]
    plyfile.PlyData(elements, text=text, byte_order="<").write(tmp_path / "a.ply")
    again = read_asset(tmp_path / "a.ply")
    assert isinstance(again, ConvexAsset) and again.up is None
    assert max(replace(asset, up=None).differences(again).values()) < 1e-5


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    write_convex_ply(path, make_asset())
    whole = path.read_bytes()
    nan = bytearray(whole)
    nan[-4:] = struct.pack("<f", float("nan"))
    below = bytearray(whole)
    at = whole.index(b"end_header\n") + 11 + 4 * 18  # delta of the first
    below[at : at + 4] = struct.pack("<f", -1.0)
    cases = {
        whole[:-1]: "the file is cut short: 17 convexes need",
        whole[:300]: "no line 'end_header'",
        whole.replace(b"convex 17", b"convex 9999999999999"): "cut short: 9999999999999 convexes need",
        whole.replace(b"convex 17", b"convex 0"): "there are no convexes in it",
        whole.replace(b"float delta", b"float dalta"): "not a .ply of convexes: delta missing",
        whole.replace(b"float y_3", b"float v_3"): "not a .ply of convexes: y_3 missing",
        whole.replace(b"float delta", b"list uchar int delta"): "delta missing",
        whole.replace(b"float f_rest_44", b"float rest"): "0, 9, 24 or 45 of them",
        bytes(nan): "sh: 1 of 17 convexes have a value that is not finite",
        bytes(below): "deltas: expected more than 0, got -1",
    }
    for content, message in cases.items():
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read_asset(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    two = whole
    for i in range(2, 6):
        two = two.replace(b"float x_%d" % i, b"float u_%d" % i)
    path.write_bytes(two)
    with pytest.raises(ValueError, match="3 to 12 of them, got 2"):
        read_convex_ply(path)


def test_a_file_that_comes_back_different_is_not_kept(tmp_path: Path) -> None:
    asset, path = make_asset(), tmp_path / "a.ply"
    path.write_text("old")
    wrong = replace(asset, deltas=asset.deltas * np.float32(1.001))
    with pytest.raises(OSError, match="deltas came back off"):
        write_verified(path, asset, lambda p, _: p.touch(), lambda _: wrong, {"deltas": 0.0})
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("far", [False, True])
def test_a_scene_comes_back_through_the_users_frame(tmp_path: Path, far: bool) -> None:
    frame = SceneFrame((4e6, -3e5, 120.0) if far else (4.0, -7.0, 2.0), 0.3, (0.0, 0.6, 0.8))
    torch.manual_seed(0)
    tensors = {
        "points": torch.randn(9, 1, 3) + 0.05 * torch.randn(9, 6, 3),
        "log_deltas": torch.randn(9),
        "log_sigmas": torch.randn(9),
        "opacity_logits": torch.randn(9),
        "sh0": torch.randn(9, 1, 3),
        "shN": torch.randn(9, 3, 3),
    }
    asset = ConvexAsset.from_tensors(tensors, frame)
    write_convex_ply(tmp_path / "a.ply", asset)
    again = read_convex_ply(tmp_path / "a.ply").to_tensors(frame, sh_degree=2)
    torch.testing.assert_close(again.pop("shN"), torch.cat([tensors.pop("shN"), torch.zeros(9, 5, 3)], 1))
    torch.testing.assert_close(again, tensors, rtol=1e-5, atol=1e-6)
    # What a convex looks like does not depend on units: delta times a length
    width = np.linalg.norm(asset.points[:, 0].astype(float) - asset.points[:, 1], axis=1)
    scene_width = (tensors["points"][:, 0] - tensors["points"][:, 1]).norm(dim=-1).numpy()
    np.testing.assert_allclose(asset.deltas * width, tensors["log_deltas"].exp().numpy() * scene_width, rtol=1e-3)


def read_glb(path: Path) -> tuple[dict, bytes]:
    """The JSON chunk and the binary one."""
    data = path.read_bytes()
    size = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def test_the_glb_stands_upright_with_linear_colours_and_opacity(tmp_path: Path) -> None:
    asset = make_asset()
    asset.points[3, :, 2] = asset.points[3, 0, 2]  # flat
    asset.points[:] += np.array([1000.0, 0, 0], np.float32)
    asset.sh[0, 0] = (np.array([0.5, 0.25, 1.5]) - 0.5) / C0
    said = write_glb(tmp_path / "a.glb", asset)
    hulls = [ConvexHull(points) for i, points in enumerate(asset.points.astype(float)) if i != 3]
    faces = sum(len(hull.simplices) for hull in hulls)
    assert said.startswith(f"{faces} faces") and "1 convexes are flat and left out" in said
    mesh = trimesh.load(tmp_path / "a.glb", process=False).to_mesh()
    assert len(mesh.faces) == faces
    assert mesh.volume == pytest.approx(sum(hull.volume for hull in hulls), rel=1e-4)  # faces look outwards
    kept = np.delete(asset.points, 3, 0).astype(float)
    corners = np.concatenate([points[hull.vertices] for points, hull in zip(kept, hulls, strict=True)])
    heights = corners @ np.array(asset.up)
    np.testing.assert_allclose(np.sort(mesh.vertices[:, 1]), np.sort(heights), atol=1e-4)
    content, binary = read_glb(tmp_path / "a.glb")
    assert content["materials"][0]["alphaMode"] == "BLEND"
    color = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    view = content["bufferViews"][color["bufferView"]]
    first = np.frombuffer(binary, np.uint16, 4, view["byteOffset"] + color.get("byteOffset", 0))
    np.testing.assert_allclose(
        first / 257, [54.6, 13.0, 255, 255 * asset.opacities[0]], atol=0.1
    )  # sRGB 0.5 is linear 0.214
    position = content["accessors"][content["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert max(position["max"]) < 20  # float32 holds what is near the node, which is far away


def test_the_obj_lies_where_the_capture_does(tmp_path: Path) -> None:
    asset = make_asset(points=3)
    asset.sh[:, 0] = (np.array([0.2, 0.4, 0.6]) - 0.5) / C0
    write_obj(tmp_path / "a.obj", replace(asset, points=asset.points * np.float32(1e-7)))
    mesh = trimesh.load(tmp_path / "a.obj", process=False)
    assert len(mesh.faces) == 2 * len(asset)  # of three points: both sides
    found = np.unique(np.round(mesh.vertices * 1e7, 4), axis=0)
    np.testing.assert_allclose(found, np.unique(asset.points.reshape(-1, 3), axis=0), atol=1e-3)
    assert mesh.visual.vertex_colors[0, :3].tolist() == [51, 102, 153]
    flat = replace(asset, points=np.zeros_like(asset.points))
    with pytest.raises(ValueError, match="has no hulls"):
        write_obj(tmp_path / "b.obj", flat)


@pytest.mark.parametrize("up", [(0.0, -1.0, 0.0), (0.0, 0.0, 1.0), (0.48, 0.6, -0.64), (0.0, 1.0, 0.0), None])
def test_up_becomes_y(up: tuple[float, float, float] | None) -> None:
    rotation = y_up(up)
    np.testing.assert_allclose(rotation @ np.array(up or (0, -1, 0)), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_a_run_is_exported_loaded_and_goes_on(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "scene.ply"
    done = command("export.cli", run, "--to", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"read back and rendered: (100 dB PSNR or more|[89]\d\.\d dB PSNR)", done.stdout)
    tensors = load_file(run / "checkpoints/step_00000004/tensors.safetensors")
    frame = SceneFrame.from_dict(json.loads((run / "checkpoints/step_00000004/state.json").read_text())["frame"])
    points = tensors["scene.points"].double().numpy() / frame.scale + np.array(frame.center)
    np.testing.assert_allclose(read_convex_ply(path).points, points, atol=1e-4)
    scene, ply = pf.load(run), pf.load(path)
    assert ply.num_primitives == len(points) and ply.up == pytest.approx(scene.up) and ply.frame != scene.frame
    camera = scene.cameras()[0]
    with torch.no_grad():  # the near plane is in units of the frame, so a convex that reaches the camera may come or go
        assert psnr(pf.render(scene, camera).rgb, pf.render(ply, camera).rgb) > 45
    words = ["--representation", "convexes", "--init", path, "--steps", 1, "--out", tmp_path / "on"]
    done = command("train.cli", *SMALL, *words)
    assert done.returncode == 0, done.stderr
    said = re.search(r"convexes; test PSNR before any training ([\d.]+) dB\n", done.stdout + done.stderr)
    ended = re.search(r"test PSNR \| ([\d.]+) dB", (run / "report.md").read_text())
    assert said and ended and float(said[1]) == pytest.approx(float(ended[1]), abs=0.011)


def test_a_run_becomes_meshes_and_nothing_else(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(ExportConfig(run, tmp_path / "a.glb"))
    said = re.search(r"a\.glb: ([\d,]+) faces, .* bytes", capsys.readouterr().out)
    mesh = trimesh.load(tmp_path / "a.glb", process=False).to_mesh()
    assert said and len(mesh.faces) == int(said[1].replace(",", "")) > 1000
    with pytest.raises(ValueError, match=r"'\.splat' for convexes; expected one of \.ply .*, \.glb .*, \.obj"):
        export(ExportConfig(run, tmp_path / "a.splat"))


def test_a_training_starts_from_gaussians(tiny_run: Path, run: Path, tmp_path: Path) -> None:
    export(ExportConfig(tiny_run, tmp_path / "scene.ply"))
    with pytest.raises(ValueError, match=r"'\.obj' for Gaussians; expected one of \.ply"):
        export(ExportConfig(tiny_run, tmp_path / "scene.obj"))
    words = ["--representation", "convexes", "--convexes.points", 5, "--init", tmp_path / "scene.ply", "--steps", 1]
    done = command("train.cli", *SMALL, *words, "--out", tmp_path / "on")
    assert done.returncode == 0, done.stderr
    pattern = r"made into convexes; test PSNR before any training ([\d.]+) dB, ([\d.]+) dB as they are in the file"
    said = re.search(pattern, done.stdout + done.stderr)
    ended = re.search(r"test PSNR \| ([\d.]+) dB", (tiny_run / "report.md").read_text())
    assert said and ended and float(said[2]) == pytest.approx(float(ended[1]), abs=0.011)
    assert float(said[2]) - 4 < float(said[1]) < float(said[2])
    assert pf.load(tmp_path / "on").asset().points.shape[1] == 5
    write_convex_ply(tmp_path / "b.ply", make_asset())
    line = refused("train.cli", *SMALL, "--init", tmp_path / "b.ply", "--out", tmp_path / "no")
    assert line.endswith("b.ply: expected --representation convexes, got gaussians")


@pytest.mark.parametrize(
    ("points", "scales", "limit"),
    [
        (6, (1.0, 1.0, 1.0), 0.035),
        (6, (0.2, 1.0, 0.5), 0.045),
        (6, (0.1, 1.0, 0.1), 0.035),
        (6, (1.0, 0.1, 1.0), 0.14),
        (4, (1, 1, 1), 0.12),
        (12, (1, 1, 1), 0.02),
        (3, (0.5, 1.0, 1e-9), 0.25),
    ],
)
def test_a_convex_looks_like_its_gaussian(points: int, scales: tuple[float, ...], limit: float) -> None:
    """Sum of squared differences of alpha, as a share of the Gaussian's, from many sides."""
    quat = torch.tensor([[0.5, -0.3, 0.7, 0.4]])
    tensors = {
        "means": torch.tensor([[0.2, -0.1, 0.1]]),
        "quats": 2 * quat,
        "log_scales": torch.tensor([scales]).log(),
        "opacity_logits": torch.tensor([1.0]),
        "sh0": torch.ones(1, 1, 3),
        "shN": torch.zeros(1, 0, 3),
    }
    torch.manual_seed(1)
    viewmats = torch.eye(4).repeat(16, 1, 1)
    viewmats[:, :3, :3] = torch.linalg.qr(torch.randn(16, 3, 3))[0]
    viewmats[:, :3, :3] *= torch.linalg.det(viewmats[:, :3, :3])[:, None, None]
    viewmats[:, 2, 3] = 60
    cameras = Cameras(viewmats, torch.tensor([[1200.0, 0, 64], [0, 1200, 64], [0, 0, 1]]).repeat(16, 1, 1), 128, 128)
    config = ConvexesConfig(points=points, sh_degree=0)
    made = Convexes.from_tensors(convexes_from_gaussians(tensors, points), config)
    with torch.no_grad():
        ours = made.render(cameras).alpha
        gaussian = Gaussians.from_tensors(tensors, GaussiansConfig(sh_degree=0)).render(cameras).alpha
    assert float((ours - gaussian).square().sum() / gaussian.square().sum()) < limit


def test_gaussians_become_convexes_of_a_number_of_points_that_there_is() -> None:
    tensors = {"means": torch.zeros(1, 3), "quats": torch.ones(1, 4), "log_scales": torch.zeros(1, 3)}
    with pytest.raises(ValueError, match="points: expected 3 to 12 a convex, got 13"):
        convexes_from_gaussians(tensors, 13)
