"""transforms.json captures, real and made, good and bad."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from prismfield.datasets.base import SceneData
from prismfield.datasets.scenes import load_scene

from .tiny_captures import CX, CY, FX, FY, HEIGHT, WIDTH, camtoworlds, transforms, write_image, write_transforms


def user_camtoworlds(data: SceneData) -> dict[str, np.ndarray]:
    """Poses in the user's frame, undoing the scene frame."""
    poses = {}
    for frame in data.train + data.test:
        pose = frame.camera.camtoworlds[0].double()
        pose[:3, 3] = data.frame.points_to_user(pose[:3, 3])
        poses[frame.name] = pose.numpy()
    return poses


def test_poses_and_intrinsics_arrive(tmp_path: Path) -> None:
    data = load_scene(str(write_transforms(tmp_path / "scene")))
    assert (data.name, data.kind, data.split, data.points, data.background) == (
        "scene", "transforms", "every 8th", None, None,
    )  # fmt: skip
    assert [f.name for f in data.test] == ["000.png", "008.png"] and len(data.train) == 7
    poses = user_camtoworlds(data)
    for i, expected in enumerate(camtoworlds()):
        np.testing.assert_allclose(poses[f"{i:03d}.png"], expected, atol=1e-5)
    camera = data.train[0].camera
    np.testing.assert_allclose(camera.Ks[0], [[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    assert (camera.width, camera.height, camera.model, camera.viewmats.dtype) == (
        WIDTH,
        HEIGHT,
        "pinhole",
        torch.float32,
    )
    assert data.warnings == []


def test_blender_capture_without_extensions_or_sizes(tmp_path: Path) -> None:
    table = transforms(5)
    shared = {"camera_angle_x": 0.7}
    for split in ("train", "test", "val"):
        entries = [dict(f, file_path=f"./{split}/r_{i}") for i, f in enumerate(table["frames"])]
        for i in range(5):
            write_image(tmp_path / split / f"r_{i}.png", i, channels=4)
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps({**shared, "frames": entries}))
    data = load_scene(str(tmp_path))
    assert (data.kind, data.split, data.background) == ("blender", "the files' own", "white")
    assert [f.name for f in data.train] == [f"train/r_{i}.png" for i in range(5)]
    assert [f.name for f in data.test] == [f"test/r_{i}.png" for i in range(5)]
    focal = 0.5 * WIDTH / math.tan(0.35)
    np.testing.assert_allclose(data.train[0].camera.Ks[0], [[focal, 0, 20], [0, focal, 12], [0, 0, 1]], rtol=1e-6)


def test_alpha_that_is_never_used_asks_for_no_background(tmp_path: Path) -> None:
    for i in range(9):
        path = tmp_path / f"images/{i:03d}.png"
        write_image(path, i, channels=4)
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        pixels[..., 3] = 255
        cv2.imwrite(str(path), pixels)
    assert load_scene(str(write_transforms(tmp_path))).background is None


def test_per_frame_intrinsics_win(tmp_path: Path) -> None:
    table = transforms(k1=0.1)
    table["frames"][2] |= {"fl_x": 51.0, "cy": 11.0, "k1": 0.2, "time": 0.25}
    data = load_scene(str(write_transforms(tmp_path, table)))
    frames = {f.name: f for f in data.train + data.test}
    np.testing.assert_allclose(frames["002.png"].camera.Ks[0], [[51, 0, CX], [0, FY, 11], [0, 0, 1]])
    distortion = frames["002.png"].camera.distortion
    assert distortion is not None and distortion[0, 0] == pytest.approx(0.2)
    other = frames["003.png"].camera
    assert other.distortion is not None and other.distortion[0, 0] == pytest.approx(0.1)
    assert (frames["002.png"].time, frames["003.png"].time) == (0.25, None)


@pytest.mark.parametrize(
    ("shared", "model", "coefficients"),
    [
        ({}, "pinhole", None),
        ({"camera_model": "PINHOLE", "k1": 0.0}, "pinhole", None),
        ({"camera_model": "PINHOLE", "k1": 0.1}, "opencv", [0.1, 0, 0, 0, 0, 0, 0, 0]),
        ({"k1": 1, "k2": 2, "p1": 3, "p2": 4, "k3": 5, "k4": 6, "k5": 7, "k6": 8}, "opencv", [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"camera_model": "OPENCV_FISHEYE", "k1": 0.1, "k4": 0.4}, "fisheye", [0.1, 0, 0, 0.4]),
        ({"camera_model": "opencv_fisheye"}, "fisheye", [0, 0, 0, 0]),
        ({"is_fisheye": True, "k1": 0.1}, "fisheye", [0.1, 0, 0, 0]),
        ({"camera_model": "THIN_PRISM_FISHEYE", "k1": 1, "p2": 2, "k3": 3, "sx1": 4, "sy1": 5}, "thin_prism_fisheye", [1, 0, 0, 2, 3, 0, 4, 5]),
    ],
)  # fmt: skip
def test_lens_models(tmp_path: Path, shared: dict[str, Any], model: str, coefficients: list[float] | None) -> None:
    camera = load_scene(str(write_transforms(tmp_path, transforms(**shared)))).train[0].camera
    assert camera.model == model
    found = None if camera.distortion is None else camera.distortion[0].tolist()
    assert found == (None if coefficients is None else pytest.approx(coefficients))


def test_nerfstudio_file_lists_are_the_split(tmp_path: Path) -> None:
    names = [f"images/{i:03d}.png" for i in range(9)]
    table = transforms(train_filenames=names[3:8], val_filenames=[names[1]], test_filenames=[names[0], names[2]])
    data = load_scene(str(write_transforms(tmp_path, table)))
    assert data.split == "the files' own"
    assert [f.name for f in data.train] == [f"{i:03d}.png" for i in range(3, 8)]
    assert [f.name for f in data.test] == ["000.png", "002.png"]


def test_named_cloud_is_read(tmp_path: Path) -> None:
    rows = "".join(f"{i} {2 * i} -1 255 0 {i}\n" for i in range(12))
    header = "".join(f"property float {a}\n" for a in "xyz") + "".join(
        f"property uchar {c}\n" for c in ("red", "green", "blue")
    )
    ply = f"ply\nformat ascii 1.0\nelement vertex 12\n{header}end_header\n{rows}"
    write_transforms(tmp_path, transforms(ply_file_path="cloud.ply"))
    (tmp_path / "cloud.ply").write_text(ply)
    data = load_scene(str(tmp_path))
    assert data.points is not None
    xyz = data.frame.points_to_user(data.points.xyz)
    np.testing.assert_allclose(xyz[5], [5, 10, -1], atol=1e-4)
    np.testing.assert_allclose(data.points.rgb[5], [1, 0, 5 / 255], atol=1e-6)
    (tmp_path / "cloud.ply").write_text(ply.replace("vertex 12", "vertex 13"))
    with pytest.raises(ValueError, match=r"cloud\.ply: truncated"):
        load_scene(str(tmp_path))
    (tmp_path / "cloud.ply").unlink()
    data = load_scene(str(tmp_path))
    assert data.points is None and any("cloud.ply" in w for w in data.warnings)


def test_images_larger_by_a_uniform_ratio_rescale_intrinsics(tmp_path: Path) -> None:
    for i in range(9):
        write_image(tmp_path / f"images/{i:03d}.png", i, size=(2 * WIDTH, 2 * HEIGHT))
    data = load_scene(str(write_transforms(tmp_path)))
    camera = data.train[0].camera
    assert (camera.width, camera.height) == (80, 48)
    np.testing.assert_allclose(camera.Ks[0], [[2 * FX, 0, 2 * CX], [0, 2 * FY, 2 * CY], [0, 0, 1]])
    assert any("rescaled to images of 80x48" in w for w in data.warnings)


def test_image_of_another_shape_is_refused_with_both_sizes(tmp_path: Path) -> None:
    write_image(tmp_path / "images/004.png", 4, size=(HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"004\.png.*24x40.*40x24"):
        load_scene(str(write_transforms(tmp_path)))


def _nan_pose(table: dict[str, Any]) -> None:
    table["frames"][4]["transform_matrix"][1][3] = float("nan")


def _mirrored(table: dict[str, Any]) -> None:
    matrix = table["frames"][4]["transform_matrix"]
    for row in matrix[:3]:
        row[0] = -row[0]


def _sheared(table: dict[str, Any]) -> None:
    table["frames"][4]["transform_matrix"][0][1] += 0.1


def _scaled(table: dict[str, Any]) -> None:
    matrix = table["frames"][4]["transform_matrix"]
    table["frames"][4]["transform_matrix"] = [[1.1 * v for v in row] for row in matrix[:3]]


def _short_pose(table: dict[str, Any]) -> None:
    table["frames"][4]["transform_matrix"] = [[1, 0], [0, 1]]


def _no_pose(table: dict[str, Any]) -> None:
    del table["frames"][4]["transform_matrix"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nan_pose, r"004\.png: pose: .*NaN"),
        (_mirrored, r"004\.png: pose: .*mirrored"),
        (_sheared, r"004\.png: pose: .*rotation"),
        (_scaled, r"004\.png: pose: .*scaled"),
        (_short_pose, r"004\.png: transform_matrix: expected 4 rows"),
        (_no_pose, r"004\.png: transform_matrix"),
        (lambda t: t["frames"][4].update(fl_x=0.0), r"004\.png: focal length fx: .*got 0"),
        (lambda t: t["frames"][4].update(fl_y=-3.0), r"004\.png: focal length fy: .*got -3"),
        (lambda t: t["frames"][4].update(cx=float("inf")), r"004\.png: principal point"),
        (lambda t: t["frames"][4].update(k1=float("nan")), r"finite coefficients"),
        (lambda t: t.update(fl_x="wide"), r"fl_x: expected a number, got 'wide'"),
        (lambda t: t.update(camera_model="EQUIRECTANGULAR"), r"camera_model: .*EQUIRECTANGULAR"),
        (lambda t: (t.pop("fl_x"), t.pop("fl_y")), r"expected fl_x or camera_angle_x"),
        (lambda t: t.update(fl_x=None, fl_y=None, camera_angle_x=3.5), r"camera_angle_x: expected radians"),
        (lambda t: t.update(h=0), r"w, h: expected a size"),
        (lambda t: t.update(frames=[]), r"non-empty list 'frames'"),
        (lambda t: t["frames"].append({"transform_matrix": []}), r"'file_path'"),
    ],
)
def test_unusable_numbers_are_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    root = write_transforms(tmp_path)
    table = transforms()
    damage(table)
    (root / "transforms.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        load_scene(str(root))


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    root = write_transforms(tmp_path)
    for i in (1, 3, 5, 7):
        (root / f"images/{i:03d}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"4 of 9 images are missing: images/001\.png.*003.*005\.png, \.\.\."):
        load_scene(str(root))


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transforms.json").write_text('{"frames": [')
    with pytest.raises(ValueError, match=r"transforms\.json: not valid JSON"):
        load_scene(str(tmp_path))


def test_masks(tmp_path: Path) -> None:
    table = transforms()
    for i, frame in enumerate(table["frames"]):
        frame["mask_path"] = f"masks/{i:03d}.png"
        write_image(tmp_path / f"masks/{i:03d}.png", i)
    root = write_transforms(tmp_path, table)
    assert all(f.mask_path is not None for f in load_scene(str(root)).train)
    (root / "masks/003.png").unlink()
    data = load_scene(str(root))
    assert {f.name: f for f in data.train}["003.png"].mask_path is None
    assert any("mask file missing" in w and "003.png" in w for w in data.warnings)
    write_image(root / "masks/002.png", 0, size=(WIDTH + 1, HEIGHT))
    with pytest.raises(ValueError, match=r"002\.png: mask of 41x24, but 002\.png is 40x24"):
        load_scene(str(root))


def test_train_and_test_must_not_share_images(tmp_path: Path) -> None:
    table = transforms()
    write_transforms(tmp_path, table, "transforms_train.json")
    (tmp_path / "transforms_test.json").write_text(json.dumps({**table, "frames": table["frames"][:2]}))
    with pytest.raises(ValueError, match=r"share 'images/000\.png'"):
        load_scene(str(tmp_path))


def test_real_captures(shared_data: Path) -> None:
    lego = load_scene(str(shared_data / "lego"))
    assert (len(lego.train), len(lego.test), lego.kind, lego.background) == (87, 13, "blender", "white")
    assert float(lego.train[0].camera.Ks[0, 0, 0]) == pytest.approx(200 / math.tan(0.6911112070083618 / 2))
    fox = load_scene(str(shared_data / "fox"))
    assert (len(fox.train), len(fox.test), fox.kind, fox.train[0].camera.model) == (43, 7, "transforms", "opencv")
    assert fox.split == "the files' own" and {f.name for f in fox.test} >= {"0001.jpg"}
    hand = load_scene(str(shared_data / "hand_dynamic"))
    assert sorted(f.time for f in hand.train + hand.test if f.time is not None)[-1] == 1.0
    dtu = load_scene(str(shared_data / "dtu_scan65"))
    assert all(f.mask_path is not None for f in dtu.train + dtu.test)
    assert [d.warnings for d in (lego, fox, hand, dtu)] == [[], [], [], []]
