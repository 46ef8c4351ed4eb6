"""Lens models against COLMAP's and OpenCV's own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from prismfield.datasets.colmap import ColmapCamera, _spec
from prismfield.datasets.lens import Lens

# name: (parameters, focal lengths among them)
COLMAP = {
    "SIMPLE_PINHOLE": ((500.0, 330.0, 230.0), 1),
    "PINHOLE": ((500.0, 520.0, 330.0, 230.0), 2),
    "SIMPLE_RADIAL": ((500.0, 330.0, 230.0, 0.05), 1),
    "RADIAL": ((500.0, 330.0, 230.0, 0.05, -0.02), 1),
    "OPENCV": ((500.0, 520.0, 330.0, 230.0, 0.05, -0.08, -0.001, 0.002), 2),
    "FULL_OPENCV": ((500.0, 520.0, 330.0, 230.0, 0.05, -0.08, -0.001, 0.002, 0.01, 0.02, -0.01, 0.005), 2),
    "OPENCV_FISHEYE": ((500.0, 520.0, 330.0, 230.0, 0.05, -0.02, 0.003, -0.001), 2),
    "SIMPLE_RADIAL_FISHEYE": ((500.0, 330.0, 230.0, 0.03), 1),
    "RADIAL_FISHEYE": ((500.0, 330.0, 230.0, 0.03, -0.01), 1),
    "SIMPLE_FISHEYE": ((500.0, 330.0, 230.0), 1),
    "FISHEYE": ((500.0, 520.0, 330.0, 230.0), 2),
    "FOV": ((500.0, 520.0, 330.0, 230.0, 0.9), 2),
    "THIN_PRISM_FISHEYE": (
        (500.0, 520.0, 330.0, 230.0, 0.05, -0.02, 0.001, -0.002, 0.003, -0.001, 0.002, -0.003),
        2,
    ),
    "RAD_TAN_THIN_PRISM_FISHEYE": (
        (
            500.0,
            520.0,
            330.0,
            230.0,
            0.05,
            -0.02,
            0.003,
            -0.001,
            5e-4,
            -2e-4,
            0.001,
            -0.002,
            0.002,
            0.001,
            -0.003,
            0.0015,
        ),
        2,
    ),
    "SIMPLE_DIVISION": ((500.0, 330.0, 230.0, -0.1), 1),
    "DIVISION": ((500.0, 520.0, 330.0, 230.0, -0.1), 2),
    "EUCM": ((500.0, 520.0, 330.0, 230.0, 0.6, 1.1), 2),
}


def colmap_lens(model: str) -> tuple[Lens, np.ndarray, np.ndarray]:
    spec = _spec(1, ColmapCamera(model, 640, 480, COLMAP[model][0]))
    return spec.lens, np.array([spec.fx, spec.fy]), np.array([spec.cx, spec.cy])


@pytest.fixture
def rays() -> np.ndarray:
    """Normalised coordinates over an oblong field of view, the axis itself among them."""
    xy = np.random.default_rng(0).uniform(-1, 1, (400, 2)) * [0.6, 0.45]
    return np.concatenate([xy, [[0.0, 0.0], [1e-12, 0.0]]])


@pytest.mark.parametrize("model", COLMAP)
def test_pixels_agree_with_colmap(model: str, rays: np.ndarray) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is the oracle")
    camera = pycolmap.Camera(model=model, width=640, height=480, params=COLMAP[model][0])
    expected = camera.img_from_cam(np.concatenate([rays, np.ones((len(rays), 1))], 1) * 2.5)
    lens, focal, center = colmap_lens(model)
    np.testing.assert_allclose(lens.distort(rays) * focal + center, expected, atol=1e-9)


@pytest.mark.parametrize("model", COLMAP)
def test_undistort_inverts_distort(model: str, rays: np.ndarray) -> None:
    lens, _, _ = colmap_lens(model)
    np.testing.assert_allclose(lens.undistort(lens.distort(rays)), rays, atol=1e-9)


def test_rational_model_agrees_with_opencv(rays: np.ndarray) -> None:
    coefficients = (0.1, -0.05, 0.002, -0.003, 0.01, 0.08, -0.02, 0.004)
    points = np.concatenate([rays, np.ones((len(rays), 1))], 1)
    expected, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), np.array(coefficients))
    np.testing.assert_allclose(Lens("opencv", coefficients).distort(rays), expected[:, 0], atol=1e-12)


def test_fisheye_agrees_with_opencv(rays: np.ndarray) -> None:
    coefficients = np.array([0.05, -0.02, 0.003, -0.001])
    points = np.concatenate([rays[:-2], np.ones((len(rays) - 2, 1))], 1)[None]
    expected, _ = cv2.fisheye.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
    np.testing.assert_allclose(Lens("fisheye", tuple(coefficients)).distort(rays[:-2]), expected[0], atol=1e-12)


def test_max_radius_is_where_the_polynomial_turns_back() -> None:
    barrel = Lens("opencv", (-0.3, 0, 0, 0, 0, 0, 0, 0))  # r - 0.3 r^3 peaks at r = 1 / sqrt(0.9)
    assert barrel.max_radius(3.0) == pytest.approx(1 / np.sqrt(0.9), rel=0.01)
    assert barrel.max_radius(0.8) == 0.8
    assert Lens("fisheye", (0, 0, 0, 0)).max_radius(30.0) == 30.0


def test_points_that_no_ray_reaches_are_nan() -> None:
    barrel = Lens("opencv", (-0.3, 0, 0, 0, 0, 0, 0, 0))
    peak = 1 / np.sqrt(0.9) * (1 - 0.3 / 0.9)
    found = barrel.undistort(np.array([[0.9 * peak, 0.0], [1.2 * peak, 0.0]]))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("model", "coefficients", "message"),
    [
        ("plumb_bob", (), "lens model"),
        ("fisheye", (0.1,), "expected 4 coefficients, got 1"),
        ("fov", (float("nan"),), "finite"),
        ("pinhole", (0.1,), "lens model"),
    ],
)
def test_bad_lenses_are_refused(model: str, coefficients: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lens(model, coefficients)
