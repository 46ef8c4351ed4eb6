"""A dense cloud from the posed images themselves: optical flow between neighbouring views, triangulated and checked.

The cameras are known, so a match must lie on its epipolar line, survive the way back, and be seen under a wide enough
angle; what passes is triangulated. Starting from such points instead of growing them is the idea of EDGS
(arXiv:2504.13204), here with DIS optical flow (arXiv:1603.03590) in place of a learned matcher.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.views import View, Views

Array = NDArray[np.float64]

_REFERENCES = 64  # views that points are drawn from, evenly spread over the capture
_NEIGHBOURS = 2  # partners of each
_BASELINE = 0.12  # best distance to a partner, relative to the distance of the scene's centre: about 7 degrees
_WIDEST_TURN = 0.8  # least cosine between the axes of partners
_RETURN_ERROR = 0.5  # pixels between a pixel and where the flow there and back ends
_EPIPOLAR_ERROR = 0.5  # pixels
_LEAST_ANGLE = np.radians(1.5)  # between the two rays
_OVERSAMPLING = 3.0  # candidates drawn for each point wanted
_EDGE_WEIGHT = 4.0  # how much likelier a pixel on a strong edge is drawn than one on a plain surface


@dataclass(frozen=True)
class _Shot:
    """What is needed of a view."""

    grey: NDArray
    rgb: NDArray[np.uint8]
    usable: NDArray[np.bool_] | None
    K: Array
    rotation: Array
    """[3, 3] world to camera."""
    center: Array

    def rays(self, xy: Array) -> Array:
        """[P, 3] world directions with camera z 1 through positions [P, 2] in pixels."""
        local = (xy - self.K[:2, 2]) / np.array([self.K[0, 0], self.K[1, 1]])
        return np.concatenate([local, np.ones((len(xy), 1))], 1) @ self.rotation


def triangulate(views: Views, count: int, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """Points on the surfaces that neighbouring views share.

    Args:
        views: in the scene frame, of a moderate size (a few hundred pixels a side); masked pixels are left out.
        count: how many points at most.
        seed: of the choice of pixels.

    Returns:
        Positions [P, 3] in the scene frame and colours [P, 3]; fewer than `count`, or none, where views share little.
    """
    random = np.random.default_rng(seed)
    chosen = np.unique(np.linspace(0, len(views) - 1, min(_REFERENCES, len(views))).round().astype(int))
    pairs = [(int(i), partner) for i in chosen for partner in _partners(views, int(i))]
    if not pairs:
        return np.empty((0, 3)), np.empty((0, 3), np.uint8)
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    share = int(np.ceil(_OVERSAMPLING * count / len(pairs)))
    shots: dict[int, _Shot] = {}
    xyz, rgb = [], []
    for first, second in pairs:
        for index in (first, second):
            if index not in shots:
                shots[index] = _shot(views[index])
        points, colors = _pair(flow, shots[first], shots[second], share, random)
        xyz.append(points)
        rgb.append(colors)
    positions, colors = np.concatenate(xyz), np.concatenate(rgb)
    keep = random.permutation(len(positions))[:count]
    return positions[keep], colors[keep]


def _shot(view: View) -> _Shot:
    rgb = view.rgb.numpy() if view.rgb.dtype == torch.uint8 else (view.rgb.numpy() * 255 + 0.5).astype(np.uint8)
    viewmat = view.camera.viewmats[0].double().numpy()
    rotation = viewmat[:3, :3]
    usable = None if view.mask is None else view.mask.numpy()
    if view.alpha is not None:
        opaque = (view.alpha.float() / (255 if view.alpha.dtype == torch.uint8 else 1)).numpy() > 0.5
        usable = opaque if usable is None else usable & opaque
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return _Shot(grey, rgb, usable, view.camera.Ks[0].double().numpy(), rotation, -rotation.T @ viewmat[:3, 3])


def _partners(views: Views, index: int) -> list[int]:
    """The views best suited to be matched with one: near the ideal baseline, looking the same way."""
    viewmats = np.concatenate([views.camera(i).viewmats.double().numpy() for i in range(len(views))])
    centers = -np.einsum("fji,fj->fi", viewmats[:, :3, :3], viewmats[:, :3, 3])
    axes = viewmats[:, 2, :3]
    distance = max(float(np.linalg.norm(centers[index])), 1e-6)
    baseline = np.linalg.norm(centers - centers[index], axis=1) / distance
    cosine = axes @ axes[index]
    cost = np.abs(np.log(np.maximum(baseline, 1e-6) / _BASELINE)) + 8 * (1 - cosine)
    cost[(cosine < _WIDEST_TURN) | (baseline < 1e-4)] = np.inf
    cost[index] = np.inf
    best = np.argsort(cost, kind="stable")[:_NEIGHBOURS]
    return [int(i) for i in best if np.isfinite(cost[i])]


def _pair(
    flow: cv2.DISOpticalFlow, first: _Shot, second: _Shot, share: int, random: np.random.Generator
) -> tuple[Array, NDArray[np.uint8]]:
    """Points that two views agree on, drawn from the pixels of the first."""
    if first.grey.shape != second.grey.shape:
        return np.empty((0, 3)), np.empty((0, 3), np.uint8)
    forth = flow.calc(first.grey, second.grey, None)  # None: no flow to start from
    back = flow.calc(second.grey, first.grey, None)
    rows, columns = _draw(first, share, random)
    shift = forth[rows, columns]
    landed = np.stack([columns, rows], -1).astype(np.float32) + shift
    outside = (1e6, 1e6)
    border = cv2.BORDER_CONSTANT
    x, y = landed[None, :, 0], landed[None, :, 1]
    returned = cv2.remap(back, x, y, cv2.INTER_LINEAR, borderMode=border, borderValue=outside)[0]
    good = np.linalg.norm(shift + returned, axis=1) < _RETURN_ERROR
    rows, columns, landed = rows[good], columns[good], landed[good]
    start = np.stack([columns, rows], -1) + 0.5
    end = landed.astype(np.float64) + 0.5
    xyz, good = _meet(first, second, start, end)
    return xyz[good], first.rgb[rows[good], columns[good]]


def _draw(shot: _Shot, share: int, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of pixels drawn without repetition, preferably on edges."""
    gx, gy = (cv2.Sobel(shot.grey, cv2.CV_32F, dx, 1 - dx, scale=0.25) for dx in (1, 0))
    weight = 1 + _EDGE_WEIGHT * np.minimum(np.hypot(gx, gy) / 32, 1)
    if shot.usable is not None:
        weight = np.where(shot.usable, weight, 0)
    key = random.random(weight.shape, dtype=np.float32) ** (1 / np.maximum(weight, 1e-6))  # Efraimidis and Spirakis
    key[weight == 0] = -1
    share = min(share, int((weight > 0).sum()))
    picked = np.argpartition(key.ravel(), key.size - share)[key.size - share :] if share else np.empty(0, np.int64)
    rows, columns = np.unravel_index(picked, weight.shape)
    return rows, columns


def _meet(first: _Shot, second: _Shot, start: Array, end: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Where rays through matching positions come closest, on the first one, and whether to trust the match."""
    rays, others = first.rays(start), second.rays(end)
    baseline = second.center - first.center
    # epipolar line in the second view: the plane of the baseline and the ray
    line = np.cross(baseline, rays) @ second.rotation.T
    focal = np.array([second.K[0, 0], second.K[1, 1]])
    local = (end - second.K[:2, 2]) / focal
    off = np.abs((line[:, :2] * local).sum(1) + line[:, 2]) / np.maximum(
        np.linalg.norm(line[:, :2] / focal, axis=1), 1e-12
    )
    aa, bb, ab = (rays * rays).sum(1), (others * others).sum(1), (rays * others).sum(1)
    determinant = aa * bb - ab * ab
    ahead = ((rays @ baseline) * bb - ab * (others @ baseline)) / np.maximum(determinant, 1e-12)
    beyond = (ab * (rays @ baseline) - aa * (others @ baseline)) / np.maximum(determinant, 1e-12)
    sine = np.sqrt(np.maximum(determinant, 0) / (aa * bb))
    good = (off < _EPIPOLAR_ERROR) & (ahead > 0) & (beyond > 0) & (sine > np.sin(_LEAST_ANGLE))
    return first.center + rays * ahead[:, None], good
