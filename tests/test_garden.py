"""The bundled scene: its files agree with each other, and the script that makes them builds sound geometry without Mitsuba."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from prismfield.datasets import garden_geometry as geometry
from prismfield.datasets import garden_plants, garden_textures, make_garden
from prismfield.datasets.clouds import read_cloud

GARDEN = Path(__file__).resolve().parents[1] / "datasets" / "garden"


@pytest.fixture(scope="module")
def meshes() -> dict[str, geometry.Mesh]:
    return make_garden.build()


def table(split: str) -> dict:
    return json.loads((GARDEN / f"transforms{split}.json").read_text())


@lru_cache(maxsize=80)
def picture(file_path: str) -> NDArray[np.float64]:
    image = cv2.imread(str(GARDEN / file_path))
    assert image is not None, file_path
    return image[..., ::-1].astype(np.float64)


def depth_of(frame: dict, scale: float) -> NDArray[np.float64]:
    depth = cv2.imread(str(GARDEN / frame["depth_file_path"]), cv2.IMREAD_UNCHANGED)
    assert depth is not None and depth.dtype == np.uint16
    return depth.astype(np.float64) * scale


def project(xyz: NDArray, frame: dict, shared: dict, shift: tuple[float, float] = (0.0, 0.0)) -> NDArray[np.float64]:
    """[P, 3] column, row and camera z of world points; `shift` moves the principal point."""
    pose = np.array(frame["transform_matrix"])
    local = (xyz - pose[:3, 3]) @ pose[:3, :3] * (1, -1, -1)
    x = local[:, 0] / local[:, 2] * shared["fl_x"] + shared["cx"] + shift[0]
    y = local[:, 1] / local[:, 2] * shared["fl_y"] + shared["cy"] + shift[1]
    return np.stack([x, y, local[:, 2]], -1)


def surface(frame: dict, shared: dict) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """World positions [H * W, 3] of a test view's pixels, and where its depth is known."""
    z = depth_of(frame, shared["depth_scale"]).ravel()
    row, column = np.divmod(np.arange(z.size), shared["w"])
    x = (column + 0.5 - shared["cx"]) / shared["fl_x"] * z
    y = (row + 0.5 - shared["cy"]) / shared["fl_y"] * z
    pose = np.array(frame["transform_matrix"])
    return np.stack([x, -y, -z], -1) @ pose[:3, :3].T + pose[:3, 3], z > 0


def colors_at(image: NDArray[np.float64], xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P, 3] bilinear; pixel centres at +0.5."""
    low = np.floor(xy - 0.5).astype(int)
    tx, ty = (xy - 0.5 - low).T[..., None]
    rows = [image[low[:, 1] + k, low[:, 0]] * (1 - tx) + image[low[:, 1] + k, low[:, 0] + 1] * tx for k in (0, 1)]
    return rows[0] * (1 - ty) + rows[1] * ty


def inside(xyz_image: NDArray[np.float64], shared: dict) -> NDArray[np.bool_]:
    x, y, z = xyz_image.T
    return (z > 0.1) & (x > 1) & (y > 1) & (x < shared["w"] - 1) & (y < shared["h"] - 1)


def test_scene_is_small_and_whole() -> None:
    files = [file for file in GARDEN.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4_000_000
    train, test, both = (table(split) for split in ("_train", "_test", ""))
    assert (len(train["frames"]), len(test["frames"])) == (64, 8)
    names = [{frame["file_path"] for frame in t["frames"]} for t in (train, test, both)]
    assert not names[0] & names[1] and names[0] | names[1] == names[2]
    assert {str(file.relative_to(GARDEN)) for file in (GARDEN / "images").iterdir()} == names[2]
    for frame in both["frames"]:
        assert picture(frame["file_path"]).shape == (both["h"], both["w"], 3)
    assert all(depth_of(frame, 1.0).shape == (test["h"], test["w"]) for frame in test["frames"])


def test_cameras_are_those_that_were_rendered() -> None:
    frames = {frame["file_path"]: np.array(frame["transform_matrix"]) for frame in table("")["frames"]}
    shots = make_garden.shots()
    assert len(shots) == len(frames)
    for shot in shots:
        stored = frames[f"images/{shot.name}.jpg"]
        np.testing.assert_allclose(stored, shot.camtoworld, rtol=0, atol=1e-9)
        np.testing.assert_allclose(stored[:3, :3].T @ stored[:3, :3], np.eye(3), atol=1e-12)
        assert np.linalg.det(stored[:3, :3]) > 0


def test_views_are_worth_looking_at() -> None:
    for frame in table("")["frames"]:
        image = picture(frame["file_path"])
        assert 70 < image.mean() < 170, "exposure"
        assert (image.max(-1) < 8).mean() < 0.02, "black areas"
        assert (image.min(-1) > 250).mean() < 0.05, "burnt-out areas"


def test_depth_of_test_views_leads_to_the_same_colors_in_their_neighbours() -> None:
    """Also sensitive to half a pixel: a principal point that is off by that much in any direction fits worse."""
    shared = table("_test")
    train = table("_train")["frames"]
    centres = np.array([frame["transform_matrix"] for frame in train])[:, :3, 3]
    shifts = [(0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (0.0, 0.5), (0.0, -0.5)]
    errors = np.zeros(len(shifts))
    for frame in shared["frames"]:
        xyz, known = surface(frame, shared)
        assert 0.3 < known.mean() < 0.5  # every other row, but for sky and mixed pixels
        seen = picture(frame["file_path"]).reshape(-1, 3)
        neighbour = train[int(np.argmin(np.linalg.norm(centres - np.array(frame["transform_matrix"])[:3, 3], axis=1)))]
        for k, shift in enumerate(shifts):
            at = project(xyz, neighbour, shared, shift)
            both = known & inside(at, shared)
            gap = np.abs(colors_at(picture(neighbour["file_path"]), at[both, :2]) - seen[both]).mean(-1)
            errors[k] += np.median(gap) / len(shared["frames"])
    assert errors[0] < 8.0, errors
    assert (errors[1:] > 1.03 * errors[0]).all(), errors


def test_point_cloud_lies_on_the_surfaces_in_their_colors() -> None:
    xyz, rgb = read_cloud(GARDEN / "points.ply")
    assert 15_000 <= len(xyz) <= 20_000 and np.isfinite(xyz).all()
    far = np.linalg.norm(xyz, axis=1) > 0.98 * make_garden.SKY_DISTANCE
    assert 100 < far.sum() < 2000 and (xyz[far, 2] > 0).all(), "sky"
    shared = table("_test")
    matched = 0
    for frame in shared["frames"]:
        at = project(xyz, frame, shared)
        seen = inside(at, shared)
        column, row, z = at[seen].T
        truth = depth_of(frame, shared["depth_scale"])[row.astype(int), column.astype(int)]
        on_surface = np.abs(truth - z) < 0.01 * z
        gap = np.abs(colors_at(picture(frame["file_path"]), at[seen][on_surface, :2]) - rgb[seen][on_surface]).mean(-1)
        assert on_surface.sum() > 800 and np.median(gap) < 12, (on_surface.sum(), np.median(gap))
        matched += int(on_surface.sum())
    assert matched > 0.6 * len(xyz)


def test_geometry_is_sound_and_needs_no_renderer(meshes: dict[str, geometry.Mesh]) -> None:
    assert "mitsuba" not in sys.modules
    assert set(make_garden.bitmaps()) <= set(meshes)
    for name, mesh in meshes.items():
        assert np.isfinite(mesh.vertices).all(), name
        assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices), name
        assert (mesh.uvs is None) != (mesh.colors is None), name
        assert np.isfinite(mesh.uvs if mesh.colors is None else mesh.colors).all(), name
        if mesh.colors is not None:
            assert mesh.colors.min() >= 0 and mesh.colors.max() <= 1, name
        a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
        without_area = float((np.linalg.norm(np.cross(b - a, c - a), axis=-1) < 1e-12).mean())
        assert without_area < 0.01, name
    faces = sum(len(mesh.faces) for mesh in meshes.values())
    assert len(meshes["foliage"].faces) > 500_000 and faces < 2_000_000


def test_geometry_is_the_same_every_time() -> None:
    first, second = (garden_plants.bouquet(np.random.default_rng(5)) for _ in range(2))
    assert (
        (first.vertices == second.vertices).all() and first.colors is not None and (first.colors == second.colors).all()
    )
    assert [(s.camtoworld == t.camtoworld).all() for s, t in zip(make_garden.shots(), make_garden.shots(), strict=True)]


def volume(mesh: geometry.Mesh) -> float:
    """Signed volume inside a closed mesh: positive when its faces look outwards."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def test_solids_enclose_their_volume_and_face_outwards() -> None:
    assert volume(geometry.box((1.0, 2.0, 3.0))) == pytest.approx(6.0)
    assert volume(geometry.box((1.0, 2.0, 3.0)).moved(geometry.turn_z(0.7), (1, 2, 3))) == pytest.approx(6.0)
    radius, height = 0.5, 2.0
    can = geometry.lathe([(0, 0), (radius, 0), (radius, height), (0, height)], segments=400)
    assert volume(can) == pytest.approx(np.pi * radius**2 * height, rel=1e-3)
    pipe = geometry.tube([(0, 0, 0), (0.1, 0, 1), (0.3, 0.1, 2)], 0.05, 12)
    a, b, c = (pipe.vertices[pipe.faces[:, k]] for k in range(3))
    assert pipe.normals is not None
    assert (np.einsum("ij,ij->i", np.cross(b - a, c - a), pipe.normals[pipe.faces[:, 0]]) > 0).all()
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], dtype=float)
    slab = geometry.block(square, -0.1, 0.0, 0.01, square)
    a, b, c = (slab.vertices[slab.faces[:, k]] for k in range(3))
    outward = np.cross(b - a, c - a)
    assert (np.einsum("ij,ij->i", outward, (a + b + c) / 3 - (0.5, 0.5, -0.1)) > 0).all()


def test_merge_rejects_meshes_that_do_not_match() -> None:
    plain = geometry.box((1, 1, 1))
    with pytest.raises(ValueError, match="1 of 2 meshes lack uvs"):
        geometry.merge([plain, plain.painted((1, 0, 0))])


def test_sky_is_brightest_where_the_sun_is() -> None:
    light = garden_textures.sky(np.random.default_rng(0), 128)
    row, column = np.unravel_index(light.sum(-1).argmax(), light.shape[:2])
    theta, phi = (row + 0.5) / 128 * np.pi, -(column + 0.5) / 256 * 2 * np.pi
    toward = np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    assert toward @ garden_textures.SUN_DIRECTION > np.cos(np.deg2rad(2.5))
