"""Do the poses fit the pictures? SIFT matches between neighbouring views against the geometry the capture states."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.base import Frame
from prismfield.datasets.images import decode_raw
from prismfield.datasets.sharpness import grey
from prismfield.datasets.undistort import lens_of

Array = NDArray[np.float64]

_LONG_SIDE = 640  # pixels at which features are sought
_FEATURES = 1500
_RATIO = 0.75  # of the distances of the best and the second-best match (Lowe 2004, 7.1)
_RANSAC_PIXELS = 1.5
_LEAST_MATCHES = 20
_WIDEST_ANGLE = np.radians(35)  # between two viewing directions: beyond, SIFT matches little


@dataclass(frozen=True)
class PairMatch:
    """Two views with enough matches to judge by."""

    names: tuple[str, str]
    count: int
    """Matches that agree with some epipolar geometry."""
    error: float
    """Median distance of these from the epipolar geometry of the stated poses (Sampson), pixels at 640 or less."""
    xyz: Array
    """[K, 3] the matches that fit the stated poses, triangulated, in the frame of the cameras."""
    rgb: NDArray[np.uint8]
    """[K, 3]."""


@dataclass(frozen=True)
class _Features:
    xy: Array
    """[K, 2] pixels without lens distortion, at the scale features were sought."""
    descriptors: NDArray[np.uint8]
    rgb: NDArray[np.uint8]
    projection: Array
    """[3, 4] world to pixels."""
    K: Array


class PairMatcher:
    """Matches pairs of a capture's views; the features of each are found once."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames
        self._features: dict[int, _Features] = {}
        self._centers = np.concatenate([frame.camera.centers.double().numpy() for frame in frames])
        self._axes = np.concatenate([frame.camera.viewmats[:, 2, :3].double().numpy() for frame in frames])
        self._spread = float(np.linalg.norm(self._centers - self._centers.mean(0), axis=1).mean())

    def neighbours(self, index: int, count: int) -> list[tuple[int, int]]:
        """Pairs (smaller index first) of a view with up to `count` of the nearest that look the same way from elsewhere."""
        distance = np.linalg.norm(self._centers - self._centers[index], axis=1)
        usable = (distance > 1e-2 * self._spread) & (self._axes @ self._axes[index] > np.cos(_WIDEST_ANGLE))
        nearest = np.argsort(np.where(usable, distance, np.inf), kind="stable")[: min(count, int(usable.sum()))]
        return [(min(index, int(other)), max(index, int(other))) for other in nearest]

    def match(
        self, pairs: Iterable[tuple[int, int]], advance: Callable[[int], None] = lambda n: None
    ) -> list[PairMatch]:
        """Match pairs of indices, each once; those with too few matches to judge by are left out."""
        wanted = sorted(set(pairs))
        missing = sorted({index for pair in wanted for index in pair} - self._features.keys())

        def one(pair: tuple[int, int]) -> PairMatch | None:
            a, b = pair
            advance(1)
            return _match(self._features[a], self._features[b], (self.frames[a].name, self.frames[b].name))

        def prepare(index: int) -> None:
            self._features[index] = _features(self.frames[index])
            advance(1)

        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # one image a thread beats all threads on one image
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(prepare, missing))
                return [match for match in pool.map(one, wanted) if match is not None]
        finally:
            cv2.setNumThreads(threads)


def _features(frame: Frame) -> _Features:
    pixels = decode_raw(frame.image_path)
    brightness = grey(pixels)
    height, width = brightness.shape
    factor = min(1.0, _LONG_SIDE / max(height, width))
    small = cv2.resize(
        brightness, (max(1, round(width * factor)), max(1, round(height * factor))), interpolation=cv2.INTER_AREA
    )
    keypoints, descriptors = cv2.SIFT_create(_FEATURES).detectAndCompute(np.clip(small, 0, 255).astype(np.uint8), None)
    camera = frame.camera.resized(small.shape[1], small.shape[0])
    K = camera.Ks[0].double().numpy()
    focal, center = np.array([K[0, 0], K[1, 1]]), K[:2, 2]
    xy = np.array([keypoint.pt for keypoint in keypoints]).reshape(-1, 2) + 0.5
    rgb = _colors(pixels, xy / (small.shape[1], small.shape[0]))
    xy = lens_of(camera).undistort((xy - center) / focal) * focal + center
    known = np.isfinite(xy).all(1)
    projection = K @ camera.viewmats[0, :3].double().numpy()
    if descriptors is None:
        descriptors = np.zeros((0, 128), np.float32)
    return _Features(xy[known], descriptors[known].astype(np.uint8), rgb[known], projection, K)


def _colors(pixels: NDArray, where: Array) -> NDArray[np.uint8]:
    """[K, 3] RGB at [K, 2] positions in 0..1 of the picture."""
    height, width = pixels.shape[:2]
    x = np.clip((where[:, 0] * width).astype(int), 0, width - 1)
    y = np.clip((where[:, 1] * height).astype(int), 0, height - 1)
    chosen = pixels[y, x].reshape(len(where), -1).astype(np.float32)
    chosen *= {np.dtype(np.uint8): 1.0, np.dtype(np.uint16): 255 / 65535}.get(pixels.dtype, 255.0)
    rgb = chosen[:, 2::-1] if chosen.shape[1] >= 3 else chosen[:, :1].repeat(3, 1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _match(a: _Features, b: _Features, names: tuple[str, str]) -> PairMatch | None:
    if min(len(a.xy), len(b.xy)) < _LEAST_MATCHES:
        return None
    pairs = _nearest(a.descriptors, b.descriptors)
    if len(pairs) < _LEAST_MATCHES:
        return None
    x, y = a.xy[pairs[:, 0]], b.xy[pairs[:, 1]]
    try:
        _, inliers = cv2.findFundamentalMat(x, y, cv2.USAC_MAGSAC, _RANSAC_PIXELS, 0.999, 10000)
    except cv2.error:  # an assertion of OpenCV 5.0 where no geometry fits
        inliers = None
    if inliers is None or int(inliers.sum()) < _LEAST_MATCHES:
        return None
    agree = inliers[:, 0].astype(bool)
    x, y, rgb = x[agree], y[agree], a.rgb[pairs[agree, 0]]
    error = sampson_distance(fundamental_matrix(a.projection, b.projection), x, y)
    fits = error < 2 * _RANSAC_PIXELS
    xyz, good = _triangulate(a, b, x[fits], y[fits])
    return PairMatch(names, len(x), float(np.median(error)), xyz[good], rgb[fits][good])


def _nearest(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.int64]:
    """[K, 2] indices of descriptors that are each other's nearest, and clearly nearer than the second nearest."""
    a, b = (
        side / np.maximum(np.linalg.norm(side.astype(np.float32), axis=1, keepdims=True), 1.0)
        for side in (first, second)
    )
    cosines = a.astype(np.float32) @ b.astype(np.float32).T
    there, back = cosines.argmax(1), cosines.argmax(0)
    rows = np.arange(len(a))
    best = np.sqrt(np.maximum(2 - 2 * cosines[rows, there], 0))
    cosines[rows, there] = -1.0
    runner_up = np.sqrt(np.maximum(2 - 2 * cosines.max(1), 0))
    kept = (back[there] == rows) & (best < _RATIO * runner_up)
    return np.stack([rows[kept], there[kept]], 1)


def fundamental_matrix(first: Array, second: Array) -> Array:
    """[3, 3] F with `y^T F x = 0` for images x, y of one point under two [3, 4] projections (Hartley and Zisserman, 17.1)."""
    center = np.append(-np.linalg.solve(first[:, :3], first[:, 3]), 1.0)
    epipole = second @ center
    cross = np.array([[0, -epipole[2], epipole[1]], [epipole[2], 0, -epipole[0]], [-epipole[1], epipole[0], 0]])
    return cross @ second @ np.linalg.pinv(first)


def sampson_distance(F: Array, x: Array, y: Array) -> Array:
    """[K] first-order distance, pixels, of [K, 2] matches from an epipolar geometry (Hartley and Zisserman, 11.4.3)."""
    one = np.ones((len(x), 1))
    hx, hy = np.concatenate([x, one], 1), np.concatenate([y, one], 1)
    Fx, Fy = hx @ F.T, hy @ F
    scale = Fx[:, 0] ** 2 + Fx[:, 1] ** 2 + Fy[:, 0] ** 2 + Fy[:, 1] ** 2
    return np.abs((hy * Fx).sum(1)) / np.sqrt(np.maximum(scale, 1e-30))


def _triangulate(a: _Features, b: _Features, x: Array, y: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Points [K, 3] of matches, and which of them lie before both cameras at a parallax of at least one degree."""
    if not len(x):
        return np.zeros((0, 3)), np.zeros(0, bool)
    homogeneous = cv2.triangulatePoints(a.projection, b.projection, x.T, y.T).T
    with np.errstate(divide="ignore", invalid="ignore"):
        xyz = homogeneous[:, :3] / homogeneous[:, 3:]
    centers = [-np.linalg.solve(side.projection[:, :3], side.projection[:, 3]) for side in (a, b)]
    rays = [(xyz - center) / np.linalg.norm(xyz - center, axis=1, keepdims=True) for center in centers]
    ahead = [(xyz @ side.projection[2, :3] + side.projection[2, 3]) > 0 for side in (a, b)]
    apart = (rays[0] * rays[1]).sum(1) < np.cos(np.radians(1.0))
    return xyz, np.isfinite(xyz).all(1) & ahead[0] & ahead[1] & apart
