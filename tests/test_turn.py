"""Splats in another frame: colours seen along turned directions, ellipsoids, and pictures stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import Asset
from prismfield.export.convert import ring_cameras
from prismfield.export.library import render, scene_of
from prismfield.export.turn import harmonic_rotations
from prismfield.render.cameras import Cameras
from prismfield.render.ops.sh import sh_basis
from prismfield.train.metrics import psnr

from .splat_assets import covariances, make_splats
from .test_export_convexes import make_asset as make_convexes

ROTATIONS = [
    np.eye(3),
    np.diag([1.0, -1, -1]),
    np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]),
    *Rotation.random(3, rng=0).as_matrix(),
]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_colours_along_turned_directions(rotation: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    dirs = rng.normal(size=(500, 3))
    dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
    coefficients = rng.normal(size=(16, 3))
    matrices = harmonic_rotations(rotation)
    turned = np.concatenate([m @ coefficients[i**2 : (i + 1) ** 2] for i, m in enumerate(matrices)])
    before = sh_basis(torch.from_numpy(dirs), 3).numpy() @ coefficients
    after = sh_basis(torch.from_numpy(dirs @ rotation.T), 3).numpy() @ turned
    np.testing.assert_allclose(after, before, atol=1e-10)
    for matrix in matrices:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-10)


def test_degree_1_turns_as_a_vector_does() -> None:
    """Its terms are -y, z, -x."""
    rotation = ROTATIONS[-1]
    change = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]])
    np.testing.assert_allclose(harmonic_rotations(rotation)[1], change @ rotation @ change.T, atol=1e-12)


def test_one_turn_after_another_is_their_product() -> None:
    a, b = ROTATIONS[-1], ROTATIONS[-2]
    for first, second, both in zip(*map(harmonic_rotations, (a, b, b @ a)), strict=True):
        np.testing.assert_allclose(second @ first, both, atol=1e-12)


def test_covariances_turn() -> None:
    asset, rotation = make_splats(300), ROTATIONS[-1]
    moved = asset.moved(rotation, (1, 2, 3), 2.5)
    expected = 2.5**2 * rotation @ covariances(asset) @ rotation.T
    np.testing.assert_allclose(covariances(moved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: make_splats(300), lambda: make_convexes(60)], ids=["splats", "convexes"])
@pytest.mark.parametrize("rotation", ROTATIONS[1:])
def test_primitives_and_cameras_moved_together_give_the_same_picture(
    rotation: np.ndarray, make: Callable[[], Asset]
) -> None:
    asset: Any = make()
    asset = replace(asset, up=(0.0, -1.0, 0.0))
    asset.sh[:, 1:] *= 3
    shift, scale = np.array([4.0, -2.0, 7.0]), 2.5
    moved = asset.moved(rotation, shift, scale)
    assert moved.up == pytest.approx(tuple(-rotation[:, 1]))
    cameras = ring_cameras(asset, 2)
    pictures = [render(scene_of(asset, __file__), camera).rgb for camera in cameras]  # type: ignore[arg-type]
    plain = replace(moved, sh=asset.sh)  # what it looks like without turning the harmonics
    for camera, before in zip(cameras, pictures, strict=True):
        camtoworld = torch.linalg.inv(camera.viewmats.double())[0].numpy()
        place = np.eye(4)
        place[:3, :3], place[:3, 3] = rotation @ camtoworld[:3, :3], scale * rotation @ camtoworld[:3, 3] + shift
        there = Cameras.from_camtoworlds(
            torch.from_numpy(place)[None], camera.Ks, width=camera.width, height=camera.height
        )
        frame = SceneFrame((float(shift[0]), float(shift[1]), float(shift[2])), 0.5)
        after, wrong = (render(scene_of(x, __file__, frame=frame), there).rgb for x in (moved, plain))  # type: ignore[arg-type]
        assert before.std() > 0.05
        assert psnr(after, before) > 55
        assert psnr(wrong, before) < 35


def test_what_is_no_rotation_is_refused() -> None:
    asset = make_splats(5)
    with pytest.raises(ValueError, match="orthogonal"):
        asset.moved(2 * np.eye(3))
    with pytest.raises(ValueError, match="mirroring"):
        asset.moved(np.diag([1.0, 1, -1]))
    with pytest.raises(ValueError, match="positive scale"):
        asset.moved(np.eye(3), scale=0.0)
