"""Undistorted images show what a pinhole camera would have seen."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from prismfield.datasets.lens import LENSES, Lens
from prismfield.datasets.undistort import MAX_TANGENT, lens_of, pinhole_target, undistortion
from prismfield.render.cameras import Cameras

SIZE = (320, 200)
COEFFICIENTS = {
    "opencv": (0.25, -0.2, -0.008, 0.01, 0.02, 0.05, -0.02, 0.01),
    "fisheye": (0.05, -0.02, 0.003, -0.001),
    "thin_prism_fisheye": (0.05, -0.02, 0.002, -0.003, 0.003, -0.001, 0.002, -0.003),
    "rad_tan_thin_prism_fisheye": (
        0.05,
        -0.02,
        0.003,
        -0.001,
        5e-4,
        -2e-4,
        0.002,
        -0.002,
        0.002,
        0.001,
        -0.003,
        0.0015,
    ),
    "fov": (0.9,),
    "division": (-0.12,),
    "eucm": (0.6, 1.1),
}


def distorted_camera(
    model: str,
    coefficients: tuple[float, ...],
    focal: tuple[float, float] = (300.0, 290.0),
    center: tuple[float, float] = (150.0, 108.0),
    size: tuple[int, int] = SIZE,
) -> Cameras:
    K = torch.tensor([[focal[0], 0, center[0]], [0, focal[1], center[1]], [0, 0, 1]], dtype=torch.float64)
    distortion = torch.tensor([coefficients], dtype=torch.float64)
    return Cameras(torch.eye(4, dtype=torch.float64)[None], K[None], *size, model, distortion)  # type: ignore[arg-type]


def grid_of_rays(camera: Cameras) -> np.ndarray:
    """[H, W, 2] normalised coordinates of the pixel centres of a pinhole camera."""
    K = camera.Ks[0].double().numpy()
    x = (np.arange(camera.width) + 0.5 - K[0, 2]) / K[0, 0]
    y = (np.arange(camera.height) + 0.5 - K[1, 2]) / K[1, 1]
    return np.stack(np.broadcast_arrays(x[None], y[:, None]), -1)


def soft_checker(xy: np.ndarray) -> np.ndarray:
    """A scene at infinity: straight lines between smooth light and dark squares."""
    return 0.5 + 0.4 * np.sin(40 * xy[..., 0]) * np.sin(40 * xy[..., 1])


def photograph(camera: Cameras) -> np.ndarray:
    """What the distorted camera sees of the checker; 0 where it sees nothing."""
    pinhole = Cameras(camera.viewmats, camera.Ks, camera.width, camera.height)
    rays = lens_of(camera).undistort(grid_of_rays(pinhole))
    return np.nan_to_num(soft_checker(rays)).astype(np.float32)


def test_every_lens_model_is_tested() -> None:
    assert set(COEFFICIENTS) == set(LENSES)


@pytest.mark.parametrize("model", COEFFICIENTS)
def test_undistorted_picture_is_the_pinhole_picture(model: str) -> None:
    camera = distorted_camera(model, COEFFICIENTS[model])
    warp = undistortion(camera)
    expected = soft_checker(grid_of_rays(warp.camera))
    assert warp.camera.model == "pinhole"
    assert warp.mask is None, "a mild lens covers every pixel of its target"
    error = np.abs(warp.apply(photograph(camera)) - expected)[1:-1, 1:-1]
    assert error.max() < 0.02  # bilinear, about 24 pixels a period
    assert np.abs(photograph(camera)[:150, :300] - expected[:150, :300]).max() > 0.1  # the lens does something


def test_target_agrees_with_opencv() -> None:
    """The camera of the fox capture: alpha 0 of OpenCV fits the same inner rectangle into the same size."""
    coefficients = (0.0578421, -0.0805099, -0.000980296, 0.00015575, 0.0, 0.0, 0.0, 0.0)
    camera = distorted_camera("opencv", coefficients, (343.88, 343.6225), (138.6395, 241.317), (270, 480))
    target = pinhole_target(camera)
    K = camera.Ks[0].numpy()
    expected, _ = cv2.getOptimalNewCameraMatrix(K, np.array(coefficients), (270, 480), 0)
    assert (target.width, target.height) == (270, 480)
    np.testing.assert_allclose(target.Ks[0].numpy(), expected, atol=0.2)


def test_target_of_a_barrel_lens_keeps_focal_length_and_loses_nothing_inside() -> None:
    camera = distorted_camera("fisheye", (0.0, 0.0, 0.0, 0.0), focal=(200.0, 210.0))
    target = pinhole_target(camera)
    assert target.Ks[0, 0, 0] == 200.0 and target.Ks[0, 1, 1] == 210.0
    # the sides of the target touch those of the source on the axes: tan(angle) instead of angle
    left, right = 200 * np.tan(150 / 200), 200 * np.tan(170 / 200)
    assert target.width == pytest.approx(left + right, abs=1.5)
    assert float(target.Ks[0, 0, 2]) == pytest.approx(left, abs=1.0)
    assert undistortion(camera).mask is None


def test_wide_fisheye_is_cut_at_120_degrees() -> None:
    camera = distorted_camera("fisheye", (0.0, 0.0, 0.0, 0.0), focal=(90.0, 90.0))  # 200 degrees across
    target = pinhole_target(camera)
    reach = grid_of_rays(target)[..., 0]
    assert reach.min() >= -MAX_TANGENT and reach.max() <= MAX_TANGENT
    assert reach.max() - reach.min() > 1.9 * MAX_TANGENT


def test_pixels_beyond_the_model_are_masked() -> None:
    """A barrel polynomial that turns back inside the image must not show the image twice."""
    camera = distorted_camera("opencv", (-0.3, 0, 0, 0, 0, 0, 0, 0), focal=(180.0, 180.0), center=(160.0, 100.0))
    warp = undistortion(camera)
    assert warp.mask is not None
    radius = np.linalg.norm(grid_of_rays(warp.camera), axis=-1)
    assert not warp.mask[radius > 1.08].any()
    assert warp.mask[radius < 0.7].all()
    error = np.abs(warp.apply(photograph(camera)) - soft_checker(grid_of_rays(warp.camera)))
    assert error[warp.mask & (radius < 0.9)].max() < 0.05


def test_mask_pixel_counts_only_if_all_its_sources_do() -> None:
    warp = undistortion(distorted_camera("opencv", COEFFICIENTS["opencv"]))
    mask = np.ones((SIZE[1], SIZE[0]), bool)
    mask[80:90, 100:140] = False
    warped = warp.apply_mask(mask)
    softened = warp.apply(mask.astype(np.float32))
    np.testing.assert_array_equal(warped, softened > 0.999)
    assert (~warped).sum() > 300


def test_colour_under_transparent_pixels_does_not_leak() -> None:
    warp = undistortion(distorted_camera("opencv", COEFFICIENTS["opencv"]))
    pixels = np.zeros((SIZE[1], SIZE[0], 4), np.uint8)
    pixels[:, :160] = (0, 0, 255, 255)
    pixels[:, 160:] = (255, 0, 0, 0)
    warped = warp.apply(pixels)
    edge = (warped[..., 3] > 0) & (warped[..., 3] < 255)
    assert edge.any()
    assert (warped[edge][:, 0] <= 1).all() and (warped[edge][:, 2] >= 254).all()


def test_distorted_camera_without_coefficients_is_refused() -> None:
    camera = Cameras(torch.eye(4)[None], torch.eye(3)[None], 4, 4, "opencv")
    with pytest.raises(ValueError, match="coefficients"):
        lens_of(camera)
    assert lens_of(Cameras(torch.eye(4)[None], torch.eye(3)[None], 4, 4)) == Lens("pinhole")
