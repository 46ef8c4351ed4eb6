"""Turning images of distorted cameras into pinhole images, with a mask of the pixels that the lens really saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.images import map_straight_alpha
from prismfield.datasets.lens import Lens
from prismfield.render.cameras import Cameras

MAX_TANGENT = math.tan(math.radians(60.0))
"""Half the widest field of view of a target, 120 degrees: pinhole pixels towards a hemisphere's rim grow without bound."""
_MAX_GROWTH = 2.0  # longest target side over the source's, as in COLMAP's undistorter
_BORDER_SAMPLES = 256


@dataclass(frozen=True)
class Undistortion:
    """Where each pixel of a pinhole target lies in the distorted source."""

    camera: Cameras
    """The target: one pinhole camera with the source's pose."""
    map_x: NDArray[np.float32]
    """[H, W] source column in OpenCV's convention: pixel centres at whole numbers."""
    map_y: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    """[H, W], True where the source covers the pixel; None: everywhere."""

    def apply(self, pixels: NDArray) -> NDArray:
        """Resample [H, W] or [H, W, channels] bilinearly, as COLMAP's undistorter does; a fourth channel is straight alpha."""
        if pixels.ndim == 3 and pixels.shape[2] == 4:
            return map_straight_alpha(pixels, self._remap)
        return self._remap(pixels)

    def apply_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Resample a mask; a pixel counts where all source pixels that it mixes do."""
        return self._remap(mask.astype(np.uint8) * 255) == 255

    def _remap(self, pixels: NDArray) -> NDArray:
        return cv2.remap(pixels, self.map_x, self.map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def lens_of(camera: Cameras) -> Lens:
    """The lens model of a single camera."""
    if camera.model == "pinhole" or camera.distortion is None:
        if camera.model != "pinhole":
            raise ValueError(f"distortion: expected coefficients with the camera model {camera.model!r}, got None")
        return Lens("pinhole")
    return Lens(camera.model, tuple(camera.distortion[0].double().tolist()))


def pinhole_target(camera: Cameras) -> Cameras:
    """The pinhole camera that a distorted one is resampled to.

    Pose and focal lengths stay, so that the centre keeps its resolution; the image becomes the largest rectangle around
    the principal point in which every pixel is covered by the source (COLMAP's `blank_pixels = 0`), up to 120 degrees wide.
    """
    if camera.model == "pinhole":
        return camera
    K = camera.Ks[0].double().numpy()
    low, high = _inner_bounds(lens_of(camera), K, camera.width, camera.height)
    focal = np.array([K[0, 0], K[1, 1]])
    size = np.maximum(np.floor((high - low) * focal + 1e-6), 1.0)
    growth = np.minimum(_MAX_GROWTH * np.array([camera.width, camera.height]) / size, 1.0).min()
    size = np.maximum(np.floor(size * growth), 1.0)
    focal = size / (high - low) if growth < 1 else focal
    center = -low * focal + (size - (high - low) * focal) / 2
    target = torch.tensor([[focal[0], 0.0, center[0]], [0.0, focal[1], center[1]], [0.0, 0.0, 1.0]], dtype=camera.Ks.dtype)
    return replace(camera, Ks=target[None], width=int(size[0]), height=int(size[1]), model="pinhole", distortion=None)


def undistortion(camera: Cameras) -> Undistortion:
    """The resampling from a distorted camera's image to its `pinhole_target`."""
    target = pinhole_target(camera)
    lens = lens_of(camera)
    K, K_target = camera.Ks[0].double().numpy(), target.Ks[0].double().numpy()
    x = (np.arange(target.width) + 0.5 - K_target[0, 2]) / K_target[0, 0]
    y = (np.arange(target.height) + 0.5 - K_target[1, 2]) / K_target[1, 1]
    xy = np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1)
    source = lens.distort(xy)
    u = source[..., 0] * K[0, 0] + K[0, 2]
    v = source[..., 1] * K[1, 1] + K[1, 2]
    with np.errstate(invalid="ignore"):
        valid = (u >= 0) & (u <= camera.width) & (v >= 0) & (v <= camera.height)
    reach = float(np.hypot(np.abs(x).max(), np.abs(y).max())) * 1.01
    valid &= np.hypot(xy[..., 0], xy[..., 1]) <= lens.max_radius(reach)
    # OpenCV counts from pixel centres; NaN would be undefined behaviour in its integer conversion
    map_x = np.nan_to_num(u - 0.5, nan=-1e4, posinf=-1e4, neginf=-1e4).clip(-1e4, 1e5).astype(np.float32)
    map_y = np.nan_to_num(v - 0.5, nan=-1e4, posinf=-1e4, neginf=-1e4).clip(-1e4, 1e5).astype(np.float32)
    return Undistortion(target, map_x, map_y, None if valid.all() else valid)


def _inner_bounds(lens: Lens, K: NDArray, width: int, height: int) -> tuple[NDArray, NDArray]:
    """Least and greatest undistorted (x, y) of a rectangle inside the image of the source's border."""
    t = (np.arange(_BORDER_SAMPLES) + 0.5) / _BORDER_SAMPLES

    def undistorted(u: NDArray, v: NDArray) -> NDArray:
        pixels = np.stack(np.broadcast_arrays(u, v), -1)
        return lens.undistort((pixels - K[:2, 2]) / np.array([K[0, 0], K[1, 1]]))

    def nearest(values: NDArray) -> float:
        """Distance of the border from the axis, where it is seen at all."""
        known = values[np.isfinite(values)]
        return float(min(known.min(), MAX_TANGENT)) if len(known) else MAX_TANGENT

    left = nearest(-undistorted(np.zeros(1), t * height)[..., 0])
    right = nearest(undistorted(np.full(1, float(width)), t * height)[..., 0])
    top = nearest(-undistorted(t * width, np.zeros(1))[..., 1])
    bottom = nearest(undistorted(t * width, np.full(1, float(height)))[..., 1])
    return np.array([-left, -top]), np.array([right, bottom])
