"""render-mesh: what a run, a .ply and a field become, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh

import prismfield as pf
from prismfield.export.assets import SplatAsset
from prismfield.export.meshes.cli import MeshConfig, write
from prismfield.export.meshes.config import SurfaceConfig
from prismfield.export.meshes.files import y_up
from prismfield.export.meshes.fusion import points
from prismfield.export.meshes.surface import find_surface
from prismfield.export.meshes.views import SceneViews
from prismfield.export.ply import write_ply

from .commands import command, refused

SMALL = SurfaceConfig(resolution=48, views=12)


@pytest.fixture(scope="module")
def field_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field that has hardly learned anything: of density about 1 everywhere."""
    folder = tmp_path_factory.mktemp("field") / "run"
    words = ["--scene", "garden", "--downscale", 8, "--representation", "hash", "--steps", 1, "--log.tests", 0]
    done = command("train.cli", *words, "--log.no-tensorboard", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_becomes_a_mesh_where_its_cameras_see_it(tiny_run: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "new" / "a.glb", tmp_path / "a.png"
    words = ["--resolution", 48, "--views", 12, "--faces", 3000, "--picture", picture, "--view", 2]
    done = command("export.meshes.cli", tiny_run, "--to", path, *words)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["a.glb"]
    mesh = trimesh.load(path, process=False).to_mesh()
    said = re.search(r"a\.glb: ([\d,]+) faces, ([\d,]+) vertices, ([\d,]+) bytes", done.stdout)
    assert said and [int(n.replace(",", "")) for n in said.groups()] == [
        len(mesh.faces),
        len(mesh.vertices),
        path.stat().st_size,
    ]
    assert 2000 < len(mesh.faces) <= 3000
    assert "median depths of 12 views fused" in done.stdout and "open edges" in done.stdout
    voxel = float(re.search(r"voxels of ([\d.]+)", done.stdout)[1])  # type: ignore[index]
    scene = pf.load(tiny_run)
    views = SceneViews(scene, most=12)
    seen = torch.cat([points(view)[::50] for view in views]).numpy()
    box = views.box()
    seen = seen[((seen > box[0]) & (seen < box[1])).all(1)] / scene.frame.scale + np.array(scene.frame.center)
    turn = y_up(scene.frame.up)
    near = trimesh.proximity.ProximityQuery(mesh).vertex(seen[::20] @ turn.T)[0]
    assert np.median(near) < 2 * voxel
    drawn = cv2.imread(str(picture))
    camera = scene.cameras("train")[2]
    assert drawn.shape == (2 * camera.height + 4, 2 * camera.width + 4, 3)
    with torch.no_grad():
        render = (255 * pf.render(scene, camera).rgb[0].clamp(0, 1)).numpy()
    ours = drawn[: camera.height, : camera.width, ::-1]
    theirs = drawn[: camera.height, camera.width + 4 :, ::-1].astype(float)
    assert np.abs(ours - render).max() <= 1
    hit = theirs.sum(-1) > 0
    assert hit.mean() > 0.4 and np.abs(theirs - render)[hit].mean() < 45  # the mesh stands where the scene does


def test_an_asset_without_cameras_is_seen_from_all_round(tmp_path: Path) -> None:
    """Gaussians on a sphere far from the origin, a thousand units wide."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4000, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    center, radius = np.array([3000.0, -500.0, 200.0]), 500.0
    asset = SplatAsset(
        (center + radius * directions).astype(np.float32),
        np.tile(np.array([1, 0, 0, 0], np.float32), (4000, 1)),
        np.full((4000, 3), 25, np.float32),
        np.full(4000, 0.99, np.float32),
        rng.uniform(-0.5, 1, (4000, 1, 3)).astype(np.float32),
        up=(0.0, 0.0, 1.0),
    )
    write_ply(tmp_path / "in.ply", asset)
    config = SurfaceConfig(resolution=48, views=9, smallest_part=0.2)
    write(MeshConfig(tmp_path / "in.ply", tmp_path / "a.obj", config))
    mesh = trimesh.load(tmp_path / "a.obj", process=False)
    heights = (mesh.vertices - center)[:, 2]
    off = np.linalg.norm(mesh.vertices - center, axis=1) - radius
    assert np.percentile(np.abs(off), 90) < 50 and 0 < np.median(off) < 40  # a Gaussian is as wide as 25
    assert heights.max() > 480 and heights.min() < -200


def test_a_field_becomes_a_sealed_mesh(field_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    box = (-0.5, -0.6, 0.1, 0.4, 0.5, 0.7)
    config = SurfaceConfig(resolution=24, threshold=0.01, box=box)
    write(MeshConfig(field_run, tmp_path / "a.ply", config))
    mesh = trimesh.load(tmp_path / "a.ply", process=False)
    assert mesh.is_watertight and mesh.volume > 0
    np.testing.assert_allclose(mesh.bounds, np.array(box).reshape(2, 3), atol=0.06)  # all of the box is denser
    said = capsys.readouterr().out
    assert "watertight" in said and "the field's surface of density 0.01 per unit" in said
    with pytest.raises(ValueError, match=r"there is no surface of density 1e\+09 per unit"):
        write(MeshConfig(field_run, tmp_path / "b.ply", SurfaceConfig(resolution=24, threshold=1e9, box=box)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_bad_input_is_refused_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    assert "no such run" in refused("export.meshes.cli", tmp_path / "nowhere", "--to", tmp_path / "a.glb")
    line = refused("export.meshes.cli", tiny_run, "--to", tmp_path / "a.fbx")
    assert line.endswith("unknown suffix '.fbx' for a mesh; expected one of .glb, .ply, .obj, .stl")
    (tmp_path / "dir.glb").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(MeshConfig(tiny_run, tmp_path / "dir.glb"))
    (tmp_path / "dir.glb").rmdir()
    cases = {
        "--method density: .* it is not a field": SurfaceConfig(method="density"),
        "--resolution: expected 8 to 8192, got 4": SurfaceConfig(resolution=4),
        "--least-views: expected 1 to 10000, got 0": SurfaceConfig(least_views=0),
        "--voxel: expected more than 0, got -1": SurfaceConfig(voxel=-1),
        "--voxel: expected .* in this box, got 1000": SurfaceConfig(voxel=1000, views=2),
        "--box: expected the least x y z": SurfaceConfig(box=(0, 0, 0, 1, -1, 1)),
        "no view sees a surface in the box": SurfaceConfig(box=(900, 900, 900, 901, 902, 901), views=2),
        "need more memory than 1 MiB; try": SurfaceConfig(resolution=512, memory_mb=1, views=2),
        "there is no surface that 9 views see": SurfaceConfig(resolution=16, views=2, least_views=9),
    }
    for message, config in cases.items():
        with pytest.raises(ValueError, match=message):
            write(MeshConfig(tiny_run, tmp_path / "a.glb", config))
    with pytest.raises(ValueError, match=r"expected a picture's name ending in"):
        write(MeshConfig(tiny_run, tmp_path / "a.glb", SMALL, picture=tmp_path / "a.gif"))
    assert not list(tmp_path.iterdir())


def test_a_run_whose_capture_was_moved_away_says_so(tiny_run: Path, tmp_path: Path) -> None:
    scene = pf.load(tiny_run)
    assert scene.run is not None
    object.__setattr__(scene.run, "source", str(tmp_path / "gone"))
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path / "gone")):
        find_surface(scene, SMALL)
