"""render-data check: what it finds wrong with a capture, and what it finds right with the bundled one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from prismfield.datasets.camera_picture import draw_cameras
from prismfield.datasets.check import SceneCheck, camera_plot, duplicates, gone_astray, image_stats, inspect_scene
from prismfield.datasets.matches import PairMatch, fundamental_matrix, sampson_distance
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.sharpness import blurred, grey, sharpness

from .commands import command
from .tiny_captures import camtoworlds, transforms, write_colmap, write_transforms

GARDEN = Path(__file__).resolve().parents[1] / "datasets" / "garden"


def inspected(root: Path, *, match: bool = False) -> SceneCheck:
    return inspect_scene(load_scene(str(root)), match=match)


def some_garden(root: Path, count: int = 8) -> Path:
    """The first images of the bundled scene's outer ring, with its cameras: neighbours share most of what they see."""
    table = json.loads((GARDEN / "transforms.json").read_text())
    table["frames"] = sorted(table["frames"], key=lambda frame: frame["file_path"])[:count]
    table.pop("ply_file_path", None)
    (root / "images").mkdir(parents=True)
    for frame in table["frames"]:
        shutil.copy(GARDEN / frame["file_path"], root / frame["file_path"])
        for key in [key for key in frame if key not in ("file_path", "transform_matrix")]:
            del frame[key]
    (root / "transforms.json").write_text(json.dumps(table))
    return root


def change_poses(root: Path, change: dict[int, np.ndarray]) -> Path:
    """Multiply the poses of some frames from the right."""
    table = json.loads((root / "transforms.json").read_text())
    for index, factor in change.items():
        frame = table["frames"][index]
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ factor).tolist()
    (root / "transforms.json").write_text(json.dumps(table))
    return root


def turned(degrees: float) -> np.ndarray:
    """[4, 4] about the camera's y axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1.0]])


def test_the_command_prints_a_table_and_draws_the_cameras(tmp_path: Path) -> None:
    root = write_colmap(tmp_path / "scene", binary=True)
    done = command("datasets.cli", "check", root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in done.stdout.splitlines() if line[:1] == "│"
    }
    assert rows["images"] == "9: 7 train, 2 test (every 8th)"
    assert rows["size"] == "40x24"
    assert rows["camera model"] == "pinhole; 1 camera"
    assert rows["intrinsics"].startswith("fx 44  fy 47  cx 18.5  cy 13.25 px, 49 x 29 degrees")
    assert rows["duplicates"] == rows["unregistered"] == "none"
    assert {"points", "near, far", "up", "sharpness", "pose check"} <= rows.keys()
    with Image.open(tmp_path / "scene_cameras.png") as picture:
        assert picture.size == (1738, 902)


def test_what_cannot_be_read_at_all_is_one_line(tmp_path: Path) -> None:
    root = write_colmap(tmp_path / "scene", binary=False)
    (root / "images" / "003.png").unlink()
    done = command("datasets.cli", "check", root, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {root}/images: 1 of 9 images are missing: 003.png"
    assert not list(tmp_path.glob("*.png"))


def test_a_truncated_image_is_an_error_and_the_rest_is_still_looked_over(tmp_path: Path) -> None:
    root = some_garden(tmp_path / "scene", 4)
    path = root / "images" / "002.jpg"
    os.truncate(path, path.stat().st_size - 1000)
    done = command("datasets.cli", "check", root, "--no-poses", "--out", tmp_path / "here.png")
    assert done.returncode == 1
    assert "wrong: cannot be decoded: 1 image (002.jpg); " in done.stdout
    assert "sharpness" in done.stdout and (tmp_path / "here.png").is_file()


def test_the_bundled_scene_has_nothing_to_complain_about() -> None:
    check = inspect_scene(load_scene(str(GARDEN)), match=False)
    assert not check.errors and not check.warnings
    rows = dict(check.rows)
    assert rows["duplicates"] == rows["unregistered"] == "none"
    # the nearest and farthest surfaces of the scene's script, in metres: plants before a camera, the hedge behind all
    assert 0.3 < check.near < 1.5 and 8 < check.far < 16


def test_true_poses_agree_with_the_images(tmp_path: Path) -> None:
    check = inspected(some_garden(tmp_path / "scene"), match=True)
    assert check.pairs is not None and len(check.pairs) >= 5
    assert np.median([pair.error for pair in check.pairs]) < 0.5
    assert not check.errors and not check.astray
    # triangulated matches are where the scene is: within the hedge, above the ground
    xyz = load_scene(str(tmp_path / "scene")).frame.points_to_user(
        torch.from_numpy(np.concatenate([pair.xyz for pair in check.pairs]))
    )
    inside = (xyz[:, :2].abs().amax(1) < 9) & (xyz[:, 2] > -0.2) & (xyz[:, 2] < 5)
    assert len(xyz) > 500 and inside.float().mean() > 0.9


def test_lens_distortion_counts(tmp_path: Path) -> None:
    """Stated for images that have none, it must show."""
    root = some_garden(tmp_path / "scene", 4)
    table = json.loads((root / "transforms.json").read_text())
    (root / "transforms.json").write_text(json.dumps(table | {"k1": 0.5}))
    check = inspected(root, match=True)
    assert [text for text in check.warnings + check.errors if "px" in text and "poses" in text]


def test_another_axes_convention_is_told_by_the_images(tmp_path: Path) -> None:
    """OpenCV poses in a file of OpenGL ones: every number is in order, and every view looks the other way."""
    root = some_garden(tmp_path / "scene")
    change_poses(root, dict.fromkeys(range(8), np.diag([1.0, -1.0, -1.0, 1.0])))
    check = inspected(root, match=True)
    assert len(check.errors) == 1 and check.errors[0].startswith("the poses contradict the images")
    assert "axes convention" in check.errors[0]


def test_one_image_gone_astray_is_named(tmp_path: Path) -> None:
    root = change_poses(some_garden(tmp_path / "scene"), {3: turned(7)})
    check = inspected(root, match=True)
    assert check.astray == ["003.jpg"]
    assert not check.errors
    assert camera_plot(check).is_wrong.sum() == 1


def pair(a: str, b: str, error: float, count: int = 100) -> PairMatch:
    return PairMatch((a, b), count, error, np.zeros((0, 3)), np.zeros((0, 3), np.uint8))


def test_the_worst_does_not_tell_against_its_neighbours() -> None:
    ring = "abcdefghijklm"
    matches = [pair(a, b, 50.0 if {"d", "j"} & {a, b} else 0.2) for a, b in zip(ring, ring[1:] + ring[0], strict=True)]
    assert gone_astray(matches) == ["d", "j"]
    assert gone_astray([dataclasses.replace(match, error=0.2) for match in matches]) == []
    assert gone_astray([dataclasses.replace(match, error=50.0) for match in matches]) == []  # all wrong: no single one


def test_matches_of_true_poses_lie_on_epipolar_lines() -> None:
    views = np.linalg.inv(camtoworlds(9))[:2, :3]
    K = np.array([[440.0, 0, 185], [0, 470, 132], [0, 0, 1]])
    xyz = np.array([3.0, -2.0, 5.0]) + np.random.default_rng(0).normal(size=(30, 3))
    x, y = (uvw[:, :2] / uvw[:, 2:] for uvw in (np.c_[xyz, np.ones(30)] @ (K @ view).T for view in views))
    F = fundamental_matrix(K @ views[0], K @ views[1])
    assert sampson_distance(F, x, y).max() < 1e-8
    # both points moved by d across their lines: the Sampson distance is d * sqrt(2) for parallel lines of equal slope
    lines = np.c_[x, np.ones(30)] @ F.T
    across = lines[:, :2] / np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
    moved = sampson_distance(F, x, y + 0.5 * across)
    assert (moved < 0.5 + 1e-9).all() and moved.min() > 0.2


def test_duplicates_are_found_and_pairs_across_the_split_are_told(tmp_path: Path) -> None:
    root = some_garden(tmp_path / "scene")
    for repeated in ("005.jpg", "006.jpg"):
        shutil.copy(root / "images" / "002.jpg", root / "images" / repeated)  # the same file
    cv2.imwrite(str(root / "images" / "007.jpg"), cv2.imread(str(root / "images" / "000.jpg")))  # saved once more
    check = inspected(root)
    assert dict(check.rows)["duplicates"] == "005.jpg = 002.jpg, 006.jpg = 002.jpg, 007.jpg = 000.jpg"
    assert [w for w in check.warnings if "looks the same as another" in w and "1 of a train and a test view" in w]
    data = load_scene(str(root))
    stats = image_stats(data.train + data.test, lambda n: None)[0]
    assert [kind for _, _, kind in duplicates(stats)] == ["identical", "identical", "alike"]


def test_images_without_a_camera_are_named(tmp_path: Path) -> None:
    root = some_garden(tmp_path / "scene")
    shutil.copy(root / "images" / "001.jpg", root / "images" / "left_out.jpg")
    shutil.copy(root / "images" / "001.jpg", root / "images" / "002_depth.jpg")  # goes with 002.jpg
    assert dict(inspected(root).rows)["unregistered"] == "1 files without a camera: left_out.jpg"


def test_a_blurred_image_is_told_by_its_neighbours(tmp_path: Path) -> None:
    root = some_garden(tmp_path / "scene")
    path = str(root / "images" / "006.jpg")
    cv2.imwrite(path, cv2.GaussianBlur(cv2.imread(path), (0, 0), 3))
    warnings = [w for w in inspected(root).warnings if "less sharp" in w]
    assert warnings == ["much less sharp than the others (blurred, or plain): 1 image (006.jpg)"]


def test_sharpness_does_not_depend_on_bit_depth_and_falls_with_blur() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    eight, sixteen = sharpness(grey(pixels)), sharpness(grey(pixels.astype(np.uint16) * 257))
    assert sixteen == pytest.approx(eight, rel=1e-3)
    assert sharpness(grey(cv2.GaussianBlur(pixels, (0, 0), 1))) < 0.2 * eight
    assert blurred({str(i): 100.0 + i for i in range(9)}) == []
    assert blurred({str(i): 100.0 + i for i in range(9)} | {"x": 5.0, "y": 12.0}) == ["x", "y"]


def test_poses_shared_and_cameras_far_off_are_told(tmp_path: Path) -> None:
    table = transforms()
    table["frames"][2]["transform_matrix"] = table["frames"][1]["transform_matrix"]
    for row, value in zip(table["frames"][6]["transform_matrix"], (500.0, 0, 0), strict=False):
        row[3] += value
    warnings = inspected(write_transforms(tmp_path / "scene", table)).warnings
    assert [w for w in warnings if "several images have the same pose: 001.png = 002.png" in w]
    assert [w for w in warnings if w == "more than ten times farther off than the others: 1 image (006.png)"]


def test_a_stretched_pixel_is_doubted(tmp_path: Path) -> None:
    root = write_transforms(tmp_path / "scene", transforms(fl_x=44.0, fl_y=60.0))
    assert [w for w in inspected(root).warnings if "differ by more than 5 %" in w]


def test_the_picture_shows_the_cameras_where_they_are(tmp_path: Path) -> None:
    """Blue for training, orange for test views, and from the side the ring of cameras above the points."""
    check = inspected(write_colmap(tmp_path / "scene", binary=True, points=400))
    draw_cameras(
        dataclasses.replace(camera_plot(check), rgb=np.full((400, 3), (250, 0, 250), np.uint8)), tmp_path / "c.png"
    )
    pixels = np.array(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    side = pixels[90:840, 900:1690]

    def rows(color: tuple[int, int, int], within: int) -> np.ndarray:
        return np.nonzero((np.abs(side - np.array(color)) < within).all(-1))[0]

    train, test, points = rows((28, 100, 210), 60), rows((236, 130, 10), 60), rows((230, 0, 230), 60)
    assert min(len(train), len(test), len(points)) > 50
    assert train.mean() + 40 < points.mean()  # rows count downwards: 1 to 1.6 units above


def test_a_real_capture(shared_data: Path) -> None:
    check = inspect_scene(load_scene(str(shared_data / "fox")), match=True)
    assert check.pairs is not None and len(check.pairs) > 30
    assert np.median([pair.error for pair in check.pairs]) < 0.3
    assert not check.errors and not check.warnings and not check.astray
    up = np.array(check.data.frame.up)
    assert up @ (0, 0, 1) > 0.98
