"""Points to start from: cloud, triangulated, random, visual hull."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from prismfield.datasets.base import Frame, SceneData
from prismfield.datasets.hull import hull_points
from prismfield.datasets.initial import initial_points
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.triangulate import triangulate
from prismfield.datasets.views import Views

from .tiny_captures import transforms, write_colmap, write_transforms


def in_view(frame: Frame, xyz: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Camera z of each point and whether the image holds it."""
    camera = frame.camera
    local = (xyz @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]).numpy()
    pixels = local @ camera.Ks[0].numpy().T
    uv = pixels[:, :2] / pixels[:, 2:]
    return local[:, 2], (local[:, 2] > 0) & ((uv >= 0) & (uv < (camera.width, camera.height))).all(1)


def test_cloud_comes_whole(tmp_path: Path) -> None:
    data = load_scene(str(write_colmap(tmp_path, binary=True)))
    for method in ("auto", "cloud"):
        assert initial_points(data, 5, 0, method) is data.points
    with pytest.raises(ValueError, match="count"):
        initial_points(data, 0, 0)
    with pytest.raises(ValueError, match="'cloud' needs a point cloud"):
        initial_points(replace(data, points=None), 5, 0, "cloud")


@pytest.mark.parametrize("method", ["auto", "random"])
def test_seed_decides(tmp_path: Path, method: str) -> None:
    data = load_scene(str(write_transforms(tmp_path)))
    one, same, other = (initial_points(data, 300, seed, method) for seed in (4, 4, 5))  # type: ignore[arg-type]
    assert torch.equal(one.xyz, same.xyz) and torch.equal(one.rgb, same.rgb)
    assert not torch.equal(one.xyz, other.xyz)
    assert one.xyz.shape == one.rgb.shape == (300, 3) and one.xyz.dtype == one.rgb.dtype == torch.float32
    assert float(one.rgb.min()) >= 0 and float(one.rgb.max()) <= 1 and float(one.rgb.std()) > 0.1


def test_random_points_lie_before_the_cameras_in_their_pixels_colours(tmp_path: Path) -> None:
    table = transforms(1)
    data = load_scene(str(write_transforms(tmp_path, table)))
    points = initial_points(data, 2000, 0, "random")
    z, inside = in_view(data.train[0], points.xyz)
    assert inside.all()
    distance = float(data.train[0].camera.centers[0].norm())
    distance = max(distance, 1e-3)
    assert 0.49 * distance <= z.min() and z.max() <= 4.01 * distance
    camera, view = data.train[0].camera, Views(data.train)[0]
    local = points.xyz @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
    uv = (local @ camera.Ks[0].T)[:, :2] / local[:, 2:]
    expected = view.rgb[uv[:, 1].long(), uv[:, 0].long()].float() / 255
    assert float((points.rgb - expected).abs().mean()) < 0.01


def test_random_points_of_a_real_capture_can_be_seen(shared_data: Path) -> None:
    data = load_scene(str(shared_data / "fox"))
    points = initial_points(data, 3000, 0, "random")
    seen = np.stack([in_view(frame, points.xyz)[1] for frame in data.train]).sum(0)
    assert seen.min() >= 1 and np.median(seen) > 5


def test_triangulated_points_lie_on_the_surfaces(shared_data: Path) -> None:
    """Against COLMAP's cloud: where a camera sees one of its points, the nearest triangulated pixel is about as deep."""
    data = load_scene(str(shared_data / "bonsai"))
    assert data.points is not None
    near = replace(data, train=data.train[:40])
    xyz, rgb = triangulate(Views(near.train, downscale=2), 20000, 0)
    assert len(xyz) > 8000 and rgb.dtype == np.uint8
    frame = data.train[20]
    K, viewmat = frame.camera.Ks[0].numpy(), frame.camera.viewmats[0].numpy()

    def pixels_and_depths(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        local = points @ viewmat[:3, :3].T + viewmat[:3, 3]
        local = local[local[:, 2] > 0.1]
        uv = (local @ K.T)[:, :2] / local[:, 2:]
        inside = ((uv >= 0) & (uv < (frame.camera.width, frame.camera.height))).all(1)
        return uv[inside], local[inside, 2]

    from scipy.spatial import cKDTree

    uv, z = pixels_and_depths(data.points.xyz.numpy())
    ours, depths = pixels_and_depths(xyz)
    distance, index = cKDTree(uv).query(ours, k=1)
    near_pixel = distance < 2
    error = np.abs(np.log(depths / z[index]))[near_pixel]
    assert near_pixel.sum() > 500
    assert np.median(error) < 0.05  # many of the cloud's points lie behind what is seen


def test_captures_without_a_cloud_are_triangulated_and_filled_up(shared_data: Path) -> None:
    data = load_scene(str(shared_data / "fox"))
    data = replace(data, train=data.train[:8])
    triangulated = initial_points(data, 4000, 0, "triangulate")
    assert 500 < len(triangulated) <= 4000
    filled = initial_points(data, 60000, 0, "auto")
    assert len(filled) == 60000
    best = initial_points(data, 60000, 0, "triangulate")
    torch.testing.assert_close(filled.xyz[: len(best)], best.xyz)


def test_views_that_share_nothing_give_random_points(tmp_path: Path) -> None:
    data = load_scene(str(write_transforms(tmp_path, transforms(4))), eval_every_nth=0)
    assert len(initial_points(data, 200, 0, "triangulate")) < 200
    assert len(initial_points(data, 200, 0, "auto")) == 200


def ball(root: Path, radius: float, center: np.ndarray) -> SceneData:
    """RGBA photographs of an orange ball."""
    table = transforms(24)
    table |= {"w": 160, "h": 120, "fl_x": 170.0, "fl_y": 180.0, "cx": 75.0, "cy": 64.0}
    K = np.array([[170.0, 0, 75], [0, 180, 64], [0, 0, 1]])
    (root / "images").mkdir(parents=True)
    for entry in table["frames"]:
        pose = np.array(entry["transform_matrix"]) @ np.diag([1.0, -1, -1, 1])
        v, u = np.mgrid[0:120, 0:160] + 0.5
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T @ pose[:3, :3].T
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        offset = center - pose[:3, 3]
        miss = np.linalg.norm(offset - (rays @ offset)[..., None] * rays, axis=-1)
        pixels = np.zeros((120, 160, 4), np.uint8)
        pixels[miss < radius] = (40, 120, 230, 255)  # BGRA
        cv2.imwrite(str(root / entry["file_path"]), pixels)
    return load_scene(str(write_transforms(root, table)), eval_every_nth=0)


def test_visual_hull_of_a_ball_is_the_ball(tmp_path: Path) -> None:
    radius, center = 0.6, np.array([3.2, -2.1, 5.1])
    data = ball(tmp_path / "ball", radius, center)
    assert data.background == "white"
    points = initial_points(data, 3000, 0)
    xyz = data.frame.points_to_user(points.xyz.double()).numpy()
    distance = np.linalg.norm(xyz - center, axis=1)
    # a ring of cameras carves the poles less: points may stand out there, none may lie deep inside
    assert np.quantile(distance, 0.02) > 0.85 * radius  # cells are up to 4 pixels, here 0.06, wide
    assert np.median(distance) == pytest.approx(radius, rel=0.08)
    assert np.linalg.norm(xyz.mean(0) - center) < 0.1 * radius
    np.testing.assert_allclose(points.rgb.median(0).values, [230 / 255, 120 / 255, 40 / 255], atol=0.01)


def test_silhouettes_that_disagree_have_no_hull(tmp_path: Path) -> None:
    data = ball(tmp_path / "ball", 0.3, np.array([3.0, -2.0, 5.0]))
    for frame in data.train[::2]:
        cv2.imwrite(str(frame.image_path), np.zeros((120, 160, 4), np.uint8))
    assert len(hull_points(Views(data.train), data.aabb.numpy(), 100, 0)[0]) == 0
    assert len(initial_points(data, 100, 0)) == 100
