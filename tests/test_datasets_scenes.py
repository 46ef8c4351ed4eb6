"""Finding scenes, splitting them, and the scene frame."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prismfield.datasets.base import Frame, SceneFrame
from prismfield.datasets.normalize import depth_range, estimate_frame, looks_inwards
from prismfield.datasets.scenes import find_scene, known_scenes, load_scene
from prismfield.render.cameras import Cameras

from .tiny_captures import camtoworlds, transforms, write_colmap, write_image, write_transforms


def frames_at(poses: np.ndarray) -> list[Frame]:
    K = torch.tensor([[[44.0, 0, 18], [0, 47, 13], [0, 0, 1]]], dtype=torch.float64)
    cameras = [Cameras.from_camtoworlds(torch.from_numpy(p)[None], K, 40, 24) for p in poses]
    return [Frame(str(i), Path(str(i)), camera) for i, camera in enumerate(cameras)]


def test_name_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_transforms(tmp_path / "data" / "chair")
    write_colmap(tmp_path / "data" / "table", binary=True, count=2)
    (tmp_path / "data" / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'chair': no such path or name .*PRISMFIELD_DATA is not set"):
        monkeypatch.delenv("PRISMFIELD_DATA", raising=False)
        find_scene("chair")
    monkeypatch.setenv("PRISMFIELD_DATA", str(tmp_path / "data"))
    assert find_scene("chair") == tmp_path / "data" / "chair"
    assert {"chair", "table"} <= set(known_scenes()) and "notes" not in known_scenes()
    with pytest.raises(FileNotFoundError, match=r"'sofa': .*chair, table"):
        find_scene("sofa")
    write_transforms(tmp_path / "chair")
    assert find_scene("chair") == Path("chair"), "a path wins over a name"


def test_a_folder_without_a_capture_hides_no_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`render-train --scene garden --out garden` a second time took its own run for the scene."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRISMFIELD_DATA", str(tmp_path / "data"))
    for folder in ("garden/checkpoints", "chair/checkpoints", "sofa/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    write_transforms(tmp_path / "data" / "chair")
    assert find_scene("chair") == tmp_path / "data" / "chair"
    assert len(load_scene("garden").train) > 60
    assert find_scene("sofa") == Path("sofa")


def test_bundled_scene_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRISMFIELD_DATA", raising=False)
    assert "garden" in known_scenes()
    with caplog.at_level(logging.INFO, "prismfield"):
        data = load_scene("garden")
    assert [r.message for r in caplog.records if "bundled scene" in r.message and "mipnerf360/garden" in r.message]
    assert data.test and all(f.depth_path is not None for f in data.test) and data.points is not None
    write_transforms(tmp_path / "mine" / "garden")
    monkeypatch.setenv("PRISMFIELD_DATA", str(tmp_path / "mine"))
    assert find_scene("garden") == tmp_path / "mine" / "garden"


def test_folders_without_a_capture(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder is empty"):
        load_scene(str(tmp_path))
    write_image(tmp_path / "photo.png", 0)
    with pytest.raises(FileNotFoundError, match=r"no capture: expected transforms\.json.*found photo\.png"):
        load_scene(str(tmp_path))
    with pytest.raises(ValueError, match=r"photo\.png: expected a folder or a transforms\.json"):
        load_scene(str(tmp_path / "photo.png"))


@pytest.mark.parametrize(
    ("nth", "test", "words"),
    [
        (None, [0, 8, 16], "every 8th"),
        (8, [0, 8, 16], "every 8th"),
        (3, [0, 3, 6, 9, 12, 15], "every 3rd"),
        (0, [], "no test views"),
    ],
)
def test_split_by_name(tmp_path: Path, nth: int | None, test: list[int], words: str) -> None:
    table = transforms(17)
    table["frames"].reverse()  # names decide, not the order in the file
    data = load_scene(str(write_transforms(tmp_path, table)), eval_every_nth=nth)
    assert [f.name for f in data.test] == [f"{i:03d}.png" for i in test]
    assert sorted(f.name for f in data.train) == [f"{i:03d}.png" for i in range(17) if i not in test]
    assert data.split == words


def test_every_nth_overrides_the_files_own_split(shared_data: Path) -> None:
    own, other = (load_scene(str(shared_data / "fox"), eval_every_nth=nth) for nth in (None, 10))
    assert (len(own.train), len(own.test), own.split) == (43, 7, "the files' own")
    assert (len(other.train), len(other.test), other.split) == (45, 5, "every 10th")


@pytest.mark.parametrize("nth", [1, -2])
def test_unusable_nth_is_refused(tmp_path: Path, nth: int) -> None:
    with pytest.raises(ValueError, match="eval_every_nth: expected 0"):
        load_scene(str(write_transforms(tmp_path)), eval_every_nth=nth)


def test_single_image_is_for_training(tmp_path: Path) -> None:
    data = load_scene(str(write_transforms(tmp_path, transforms(1))))
    assert (len(data.train), len(data.test)) == (1, 0)


def test_scene_frame_of_cameras_that_look_inwards() -> None:
    poses = camtoworlds(12)
    frame = estimate_frame(frames_at(poses))
    np.testing.assert_allclose(frame.center, (3, -2, 5), atol=1e-6)
    mean = np.linalg.norm(poses[:, :3, 3] - [3, -2, 5], axis=1).mean()
    assert frame.scale == pytest.approx(1 / mean)
    np.testing.assert_allclose(frame.up, (0, 0, 1), atol=0.15)  # the cameras are rolled by up to 11 degrees


def test_stray_camera_does_not_move_the_centre() -> None:
    poses = camtoworlds(12)
    poses[5, :3, :3] = poses[5, :3, :3] @ np.diag([-1.0, 1.0, -1.0])  # looks away
    poses[7, :3, 3] += [0, 0, 6.0]  # looks past
    np.testing.assert_allclose(estimate_frame(frames_at(poses)).center, (3, -2, 5), atol=0.05)


def test_cameras_that_look_outwards_or_alike_are_centred_themselves() -> None:
    poses = camtoworlds(12)
    outwards = poses.copy()
    outwards[:, :3, 0] *= -1
    outwards[:, :3, 2] *= -1
    frames = frames_at(outwards)
    assert not looks_inwards(frames) and looks_inwards(frames_at(poses))
    np.testing.assert_allclose(estimate_frame(frames).center, outwards[:, :3, 3].mean(0), atol=1e-9)
    parallel = np.stack([poses[0]] * 5)
    parallel[:, 0, 3] += np.arange(5)
    np.testing.assert_allclose(estimate_frame(frames_at(parallel)).center, parallel[:, :3, 3].mean(0))
    assert estimate_frame(frames_at(poses[:1])).scale == 1.0, "one camera has no extent"


def test_up_of_level_cameras_is_exact_even_when_they_look_down() -> None:
    """Cameras on one side, all pitched down: the mean of their -y axes leans, the normal of their x axes does not."""
    poses = []
    for angle in np.linspace(-0.7, 0.7, 9):
        forward = np.array([-np.cos(angle), -np.sin(angle), -0.8])
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
        pose[:3, 3] = -4 * forward
        poses.append(pose)
    np.testing.assert_allclose(estimate_frame(frames_at(np.stack(poses))).up, (0, 0, 1), atol=1e-6)


def test_frame_survives_json_and_round_trips() -> None:
    frame = SceneFrame((1.5, -2.0, 300.0), 0.37, (0.0, 0.6, 0.8))
    assert SceneFrame.from_dict(frame.to_dict()) == frame
    xyz = torch.randn(50, 3, dtype=torch.float64) * 100
    torch.testing.assert_close(frame.points_to_user(frame.points_to_scene(xyz)), xyz)
    torch.testing.assert_close(
        frame.points_to_scene(torch.tensor([[2.5, -2.0, 300.0]])), torch.tensor([[0.37, 0.0, 0.0]])
    )


def test_scene_is_the_same_wherever_the_user_put_it(tmp_path: Path) -> None:
    """Geographic coordinates: a capture 500 km from the origin keeps its precision."""
    near, far = transforms(), transforms()
    for entry in far["frames"]:
        for axis in range(3):
            entry["transform_matrix"][axis][3] += 5e5
    one, other = (load_scene(str(write_transforms(tmp_path / n, t))) for n, t in (("near", near), ("far", far)))
    for a, b in zip(one.train, other.train, strict=True):
        torch.testing.assert_close(a.camera.viewmats, b.camera.viewmats, atol=1e-5, rtol=0)


def test_bounds_and_depths_of_real_captures(shared_data: Path) -> None:
    lego = load_scene(str(shared_data / "lego"))
    np.testing.assert_allclose(lego.aabb / lego.frame.scale, [[-1.45] * 3, [1.45] * 3], atol=0.02)
    near, far = depth_range(lego.train, lego.aabb.double().numpy(), None)
    assert 0.3 < near < 0.7 and 1.3 < far < 1.8
    bonsai = load_scene(str(shared_data / "bonsai"))
    assert bonsai.points is not None
    xyz = bonsai.points.xyz
    inside = ((xyz > bonsai.aabb[0]) & (xyz < bonsai.aabb[1])).all(1).float().mean()
    assert inside > 0.93
    near, far = depth_range(bonsai.train, bonsai.aabb.double().numpy(), xyz.double().numpy())
    assert 0.4 < near < 0.8 and 4 < far < 7


def test_frames_stay_what_they_were_but_for_the_pose(tmp_path: Path) -> None:
    table = transforms(camera_model="OPENCV_FISHEYE", k1=0.1)
    frame = load_scene(str(write_transforms(tmp_path, table))).train[0]
    assert frame.camera.model == "fisheye" and frame.camera.distortion is not None
    assert frame.camera.distortion.dtype == torch.float32
    assert replace(frame, name="x").image_path == tmp_path / "images" / "001.png"
