"""`import prismfield as pf`: light, and in the user's frame."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import prismfield as pf
from prismfield.datasets.base import SceneFrame
from prismfield.datasets.views import Views
from prismfield.export.assets import SplatAsset
from prismfield.export.library import content_frame, scene_of
from prismfield.export.ply import write_ply
from prismfield.train.metrics import psnr

ROOT = Path(__file__).resolve().parent.parent


def test_importing_costs_nothing_and_names_everything() -> None:
    code = (
        "import sys, prismfield as pf; heavy = {'torch', 'numpy', 'rich', 'tyro', 'cv2'} & set(sys.modules);"
        "assert not heavy, heavy; assert set(pf.__all__) <= set(dir(pf)); assert pf.__version__;"
        "import prismfield.render.output; assert callable(pf.render), pf.render;"
        "import prismfield.render.cameras as cameras; assert pf.Cameras is cameras.Cameras;"
        "from prismfield.render import kernels; assert pf.render.kernels is kernels;"
        "missing = [name for name in pf.__all__ if getattr(pf, name, None) is None]; assert not missing, missing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = pf.lode


def test_a_run_renders_its_photographs(tiny_run: Path) -> None:
    scene = pf.load(tiny_run)
    assert scene.name == "garden"
    assert scene.num_primitives > 10_000
    cameras = scene.cameras("test")
    assert len(cameras) == 8
    views = Views(pf.load_scene("garden").test, downscale=4)
    journal = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    expected = next(line["test/psnr"] for line in reversed(journal) if "test/psnr" in line)
    found = [
        psnr(pf.render(scene, camera).rgb[0].clamp(0, 1), views[index].rgb / 255)
        for index, camera in enumerate(cameras)
    ]
    assert sum(found) / len(found) == pytest.approx(expected, abs=1e-3)


def test_cameras_are_those_of_the_captures_files(tiny_run: Path) -> None:
    scene = pf.load(str(tiny_run))
    content = json.loads((ROOT / "datasets/garden/transforms_test.json").read_text())
    for camera, entry in zip(scene.cameras("test"), content["frames"], strict=True):
        expected = torch.tensor(entry["transform_matrix"], dtype=torch.float64)
        expected[:, 1:3] *= -1  # OpenGL axes in the file
        torch.testing.assert_close(camera.camtoworlds[0], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="expected 'train' or 'test', got 'val'"):
        scene.cameras("val")  # type: ignore[arg-type]


def test_a_run_and_its_ply_look_the_same(tiny_run: Path, tmp_path: Path) -> None:
    run = pf.load(tiny_run)
    write_ply(tmp_path / "scene.ply", run.asset())
    ply = pf.load(tmp_path / "scene.ply")
    assert ply.frame != run.frame
    assert ply.up == pytest.approx(run.up)
    camera = run.cameras()[0]
    ours, theirs = (pf.render(scene, camera, extras=("depth", "median_depth")) for scene in (run, ply))
    assert psnr(ours.rgb, theirs.rgb) > 60
    opaque = ours.alpha > 0.9
    for name in ("depth", "median_depth"):
        a, b = getattr(ours, name)[opaque], getattr(theirs, name)[opaque]
        assert float(((a - b).abs() / a).quantile(0.99)) < 1e-3
    with pytest.raises(ValueError, match=r"scene\.ply: a file of splats has no cameras"):
        ply.cameras()
    with pytest.raises(ValueError, match="has no steps"):
        pf.load(tmp_path / "scene.ply", step=3)


def tiny_asset(center: tuple[float, float, float], size: float) -> SplatAsset:
    """A ball of `size` user units at `center`, and one stray far away."""
    rng = torch.Generator().manual_seed(3)
    means = torch.randn(200, 3, generator=rng, dtype=torch.float64) * size / 2
    means[0] = 1000 * size
    sh = torch.rand(200, 1, 3, generator=rng).numpy()
    scales = torch.full((200, 3), 0.1 * size).log().numpy()
    quats = torch.tensor([[1.0, 0, 0, 0]]).repeat(200, 1).numpy()
    return SplatAsset.from_stored(
        (means + torch.tensor(center)).numpy(), quats, scales, torch.full((200,), 2.0).numpy(), sh
    )


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_units_do_not_matter(size: float) -> None:
    """Tiny units are not cut by the near plane, and depth comes back in them."""
    center = (20 * size, -30 * size, 10 * size)
    asset = tiny_asset(center, size)
    scene = scene_of(asset, Path("a.ply"))
    assert torch.linalg.norm(torch.tensor(scene.frame.center) - torch.tensor(center)) < 0.3 * size
    camtoworld = torch.eye(4, dtype=torch.float64)
    camtoworld[:3, 3] = torch.tensor(center) - torch.tensor([0, 0, 5 * size])
    Ks = torch.tensor([[[60.0, 0, 31], [0, 55, 20], [0, 0, 1]]], dtype=torch.float64)
    out = pf.render(scene, pf.Cameras.from_camtoworlds(camtoworld[None], Ks, 64, 40), extras=("depth",))
    assert out.depth is not None
    assert float(out.depth[0, 20, 31]) == pytest.approx(5 * size, rel=0.2)
    reference = scene_of(tiny_asset((20.0, -30, 10), 1.0), Path("b.ply"))
    camtoworld[:3, 3] = torch.tensor([20.0, -30, 5])
    same = pf.render(reference, pf.Cameras.from_camtoworlds(camtoworld[None], Ks, 64, 40))
    assert psnr(out.rgb, same.rgb) > 45


def test_the_background_is_the_scenes_or_what_one_asks_for(tmp_path: Path) -> None:
    scene = scene_of(tiny_asset((0, 0, 0), 1), tmp_path / "a.ply")
    away = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    away[:, 2, 3] = 2000  # past everything
    cameras = pf.Cameras.from_camtoworlds(away, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), 4, 3)
    assert float(pf.render(scene, cameras).rgb.max()) == 0
    assert float(pf.render(replace(scene, background=1.0), cameras).rgb.min()) == 1
    assert float(pf.render(scene, cameras, 0.25).rgb.min()) == 0.25
    two = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    torch.testing.assert_close(pf.render(scene, cameras, two).rgb[:, 1, 1], two)
    torch.testing.assert_close(pf.render(scene, cameras, two[0]).rgb[1, 0, 0], two[0])
    with pytest.raises(ValueError, match=r"background: expected a number, \[3\] or \[2, 3\], got \[4\]"):
        pf.render(scene, cameras, torch.zeros(4))
    with pytest.raises(ValueError, match="expected pinhole cameras, got 'fisheye'"):
        pf.render(scene, replace(cameras, model="fisheye", distortion=torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="cameras: expected at least one"):
        pf.render(scene, cameras[:0])


def test_gradients_reach_the_cameras_and_nothing_else() -> None:
    scene = scene_of(tiny_asset((0, 0, 0), 1), Path("a.ply"))
    camtoworld = torch.eye(4, dtype=torch.float64)[None].clone()
    camtoworld[:, 2, 3] = -4
    viewmats = torch.linalg.inv(camtoworld).requires_grad_()
    Ks = torch.tensor([[[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]], dtype=torch.float64)
    pf.render(scene, pf.Cameras(viewmats, Ks, 32, 24)).rgb.square().sum().backward()
    assert viewmats.grad is not None
    assert float(viewmats.grad[0, :3, 3].abs().max()) > 0
    assert not any(p.requires_grad for group in scene.representation.param_groups() for p in group["params"])


def test_cameras_move_between_frames_and_back() -> None:
    frame = SceneFrame((1e5, -2e5, 300.0), 0.01)
    rotation = torch.linalg.qr(torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    camtoworlds = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    camtoworlds[:, :3, :3] = rotation
    camtoworlds[:, :3, 3] = torch.tensor(frame.center, dtype=torch.float64) + torch.tensor([10.0, 20, -30])
    Ks = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    cameras = pf.Cameras.from_camtoworlds(camtoworlds, Ks, 5, 4)
    moved = frame.cameras_to_scene(cameras)
    assert moved.viewmats.dtype == torch.float32
    torch.testing.assert_close(moved.centers, torch.tensor([[0.1, 0.2, -0.3]]).repeat(3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(frame.cameras_to_user(moved).centers, cameras.centers, atol=1e-4, rtol=0)


def test_the_frame_of_a_lone_splat() -> None:
    asset = tiny_asset((1, 2, 3), 1.0)
    one = SplatAsset(asset.means[1:2], asset.quats[:1], asset.scales[:1], asset.opacities[:1], asset.sh[:1])
    assert content_frame(one).scale == 1.0
    assert content_frame(one).up == (0.0, -1.0, 0.0)


def test_the_example_runs_on_a_run(tiny_run: Path, tmp_path: Path) -> None:
    example = ROOT / "examples/render_views.py"
    assert len(example.read_text().splitlines()) < 30
    done = subprocess.run([sys.executable, example, tiny_run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "views").iterdir()) == [f"{i}.png" for i in range(4)]
