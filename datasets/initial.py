"""The points that training starts from: the capture's cloud, or points made from the images and their poses."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.base import Points, SceneData
from prismfield.datasets.hull import hull_points
from prismfield.datasets.triangulate import triangulate
from prismfield.datasets.views import Views

Method = Literal["auto", "cloud", "triangulate", "random"]

_WORKING_SIZE = 450  # pixels of the longer side that images are matched at
_FEWEST_TRIANGULATED = 500  # below, the views are too far apart or too plain to be matched
_DEPTHS = (0.5, 4.0)  # of random points, relative to the camera's distance from the scene's centre
_RANDOM_VIEWS = 64  # that random points take their places and colours from

log = logging.getLogger("prismfield")


def initial_points(data: SceneData, count: int, seed: int, method: Method = "auto") -> Points:
    """Points to start training from, in the scene frame; the same ones for the same seed.

    Args:
        data: the scene.
        count: how many points are made. The capture's own cloud comes whole, however large.
        seed: of whatever is drawn.
        method: "cloud": the capture's own. "triangulate": matches between neighbouring images
            (`datasets/triangulate.py`), at most `count`. "random": on the surface of the visual hull
            (`datasets/hull.py`) for images with alpha, else along the rays of random pixels, whose colours they take,
            uniformly in inverse depth from half to four times the distance of the scene's centre. "auto": the cloud if
            there is one; else for images with alpha "random"; else "triangulate", filled up with "random".

    Raises:
        ValueError: `count` is not positive, or "cloud" was asked for and there is none.
    """
    if count < 1:
        raise ValueError(f"count: expected at least one point, got {count}")
    if method == "cloud" and data.points is None:
        raise ValueError(f"{data.name}: method 'cloud' needs a point cloud, and the capture has none")
    if data.points is not None and method in ("auto", "cloud"):
        return data.points
    views = _working_views(data)
    if method == "random" or (method == "auto" and data.background is not None):
        return _points(*_random(data, views, count, seed))
    xyz, rgb = triangulate(views, count, seed)
    if method == "auto" and len(xyz) < count:
        if len(xyz) < _FEWEST_TRIANGULATED:
            log.info(
                "only %d points could be triangulated between neighbouring images: starting from random ones", len(xyz)
            )
        more_xyz, more_rgb = _random(data, views, count - len(xyz), seed)
        xyz, rgb = np.concatenate([xyz, more_xyz]), np.concatenate([rgb, more_rgb])
    return _points(xyz, rgb)


def _points(xyz: NDArray[np.floating], rgb: NDArray[np.uint8]) -> Points:
    return Points(torch.from_numpy(xyz).float(), torch.from_numpy(rgb).float() / 255)


def _working_views(data: SceneData) -> Views:
    """The training images at the size at which they are matched."""
    camera = data.train[0].camera
    return Views(data.train, downscale=max(1, round(max(camera.width, camera.height) / _WORKING_SIZE)))


def _random(data: SceneData, views: Views, count: int, seed: int) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    if data.background is not None:
        found = hull_points(views, data.aabb.numpy(), count, seed)
        if len(found[0]):
            return found
    return _along_rays(views, count, seed)


def _along_rays(views: Views, count: int, seed: int) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
    """Points at random depths behind random pixels, in their colours; pixels that do not count are not drawn."""
    random = np.random.default_rng(seed)
    chosen = np.unique(np.linspace(0, len(views) - 1, min(_RANDOM_VIEWS, len(views))).round().astype(int))
    shares = np.bincount(random.integers(0, len(chosen), count), minlength=len(chosen))
    xyz, rgb = [], []
    for index, share in zip(chosen, shares, strict=True):
        view = views[int(index)]
        camera = view.camera
        counts = np.ones((camera.height, camera.width), bool) if view.mask is None else view.mask.numpy()
        rows, columns = np.nonzero(counts if counts.any() else np.ones_like(counts))
        picked = random.integers(0, len(rows), int(share))
        rows, columns = rows[picked], columns[picked]
        viewmat, K = camera.viewmats[0].double().numpy(), camera.Ks[0].double().numpy()
        center = -viewmat[:3, :3].T @ viewmat[:3, 3]
        distance = max(float(np.linalg.norm(center)), 1e-3)  # the scene's centre is the origin
        z = distance / random.uniform(1 / _DEPTHS[1], 1 / _DEPTHS[0], int(share))
        local = np.stack(
            [(columns + 0.5 - K[0, 2]) / K[0, 0], (rows + 0.5 - K[1, 2]) / K[1, 1], np.ones(int(share))], -1
        )
        xyz.append(center + (local * z[:, None]) @ viewmat[:3, :3])
        pixels = view.rgb.numpy()[rows, columns]
        rgb.append(pixels if pixels.dtype == np.uint8 else (pixels * 255 + 0.5).astype(np.uint8))
    return np.concatenate(xyz), np.concatenate(rgb)
