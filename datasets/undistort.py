"""Turning images of distorted cameras into pinhole images, with a mask of the pixels that the lens really saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.images import map_straight_alpha
from prismfield.datasets.lens import Lens
from prismfield.render.cameras import Cameras

MAX_TANGENT = math.tan(math.radians(60.0))
"""Tangent of half a target's widest field of view, 120 degrees: beyond, a pinhole image grows without bound."""
_MAX_GROWTH = 2.0  # longest target side over the source's, as in COLMAP's undistorter
_KEEP_SIZE = 0.05  # relative change of a side up to which a target keeps the source's size
_STRIP = 64  # rows mapped at once, so that the double-precision intermediates stay small
_BORDER_SAMPLES = 65  # a side; odd, so that the middle is one of them


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
        """Resample [H, W] or [H, W, channels] bilinearly, as COLMAP does; a fourth channel is straight alpha."""
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

    It sees the largest rectangle around the principal point that the source covers (COLMAP's `blank_pixels = 0`), up
    to 120 degrees wide, at the source's focal lengths, so that the centre keeps its resolution. Where that changes the
    size of the image by no more than 5 %, the size stays instead and the focal lengths give way.
    """
    if camera.model == "pinhole":
        return camera
    K = camera.Ks[0].double().numpy()
    focal = np.array([K[0, 0], K[1, 1]])
    bounds = _inner_bounds(lens_of(camera), (*focal.tolist(), *K[:2, 2].tolist()), camera.width, camera.height)
    low, high = np.array(bounds[:2]), np.array(bounds[2:])
    source_size = np.array([camera.width, camera.height], np.float64)
    extent = (high - low) * focal
    if np.abs(extent / source_size - 1).max() <= _KEEP_SIZE:
        size = source_size
        focal = size / (high - low)
    else:
        shrunk = min(1.0, float((_MAX_GROWTH * source_size / extent).min()))
        focal = focal * shrunk
        size = np.maximum(np.floor(extent * shrunk + 1e-6), 1.0)
    center = -low * focal + (size - (high - low) * focal) / 2
    target = torch.tensor(
        [[focal[0], 0.0, center[0]], [0.0, focal[1], center[1]], [0.0, 0.0, 1.0]], dtype=camera.Ks.dtype
    )
    return replace(camera, Ks=target[None], width=int(size[0]), height=int(size[1]), model="pinhole", distortion=None)


def undistortion(camera: Cameras) -> Undistortion:
    """The resampling from a distorted camera's image to its `pinhole_target`."""
    target = pinhole_target(camera)
    lens = lens_of(camera)
    K, K_target = camera.Ks[0].double().numpy(), target.Ks[0].double().numpy()
    x = (np.arange(target.width) + 0.5 - K_target[0, 2]) / K_target[0, 0]
    y = (np.arange(target.height) + 0.5 - K_target[1, 2]) / K_target[1, 1]
    reach = lens.max_radius(1.01 * float(np.hypot(np.abs(x).max(), np.abs(y).max())))
    map_x, map_y = (np.empty((target.height, target.width), np.float32) for _ in range(2))
    mask = np.empty((target.height, target.width), bool)
    for top in range(0, target.height, _STRIP):
        rows = slice(top, top + _STRIP)
        xy = np.stack(np.broadcast_arrays(x[None, :], y[rows, None]), -1)
        u, v = np.moveaxis(lens.distort(xy) * (K[0, 0], K[1, 1]) + K[:2, 2], -1, 0)
        with np.errstate(invalid="ignore"):
            mask[rows] = (u >= 0) & (u <= camera.width) & (v >= 0) & (v <= camera.height)
        mask[rows] &= np.hypot(xy[..., 0], xy[..., 1]) <= reach
        # OpenCV counts from pixel centres; what it cannot represent is masked anyway
        map_x[rows] = np.where(mask[rows], u - 0.5, -1)
        map_y[rows] = np.where(mask[rows], v - 0.5, -1)
    return Undistortion(target, map_x, map_y, None if mask.all() else mask)


@lru_cache(256)
def _inner_bounds(
    lens: Lens, intrinsics: tuple[float, ...], width: int, height: int
) -> tuple[float, float, float, float]:
    """Least x and y and greatest x and y, undistorted, of a rectangle inside the image of the source's border."""
    fx, fy, cx, cy = intrinsics
    t = np.linspace(0, 1, _BORDER_SAMPLES)
    zero = np.zeros_like(t)
    sides = [(zero, t * height), (zero + width, t * height), (t * width, zero), (t * width, zero + height)]
    border = np.stack([np.stack(side, -1) for side in sides])
    rays = lens.undistort((border - (cx, cy)) / (fx, fy))
    limit = lens.max_radius(MAX_TANGENT)

    def nearest(values: NDArray) -> float:
        """Distance of a side from the axis; the limit where the lens shows less than the whole side."""
        return float(np.nanmin(np.append(values, limit)))

    return (
        -nearest(-rays[0, :, 0]),
        -nearest(-rays[2, :, 1]),
        nearest(rays[1, :, 0]),
        nearest(rays[3, :, 1]),
    )
