"""Where a capture's content is: the scene frame, the bounds, the depth range, all estimated from cameras and points."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.base import Frame, SceneFrame

_POINT_MARGIN = 0.1  # of each side, added to bounds taken from percentiles of the points
_WORST_CONDITION = 1e-3  # of the axes' normal matrix: below, they are parallel within about 2 degrees


def estimate_frame(frames: list[Frame]) -> SceneFrame:
    """The scene frame of cameras given in the user's frame.

    The centre is the point nearest to all optical axes (least sum of distances, so that a few stray views do not pull
    it) when the cameras look inwards, that is when it lies before at least three quarters of them; otherwise it is the
    mean of the camera centres. The scale makes the mean distance of the cameras from the centre 1. Up is the mean of
    the cameras' -y axes, refined to the normal of their x axes when these span a plane (level cameras all round).
    """
    centers, axes, ups, rights = _poses(frames)
    center = _focus(centers, axes)
    if center is None:
        center = centers.mean(0)
    distance = float(np.linalg.norm(centers - center, axis=1).mean())
    scale = 1.0 / distance if distance > 1e-9 else 1.0
    up = _up(ups, rights)
    return SceneFrame(
        (float(center[0]), float(center[1]), float(center[2])), scale, (float(up[0]), float(up[1]), float(up[2]))
    )


def looks_inwards(frames: list[Frame]) -> bool:
    """Whether the cameras look at a common point."""
    centers, axes, _, _ = _poses(frames)
    return _focus(centers, axes) is not None


def estimate_aabb(frames: list[Frame], xyz: NDArray[np.float64] | None, *, object_only: bool) -> NDArray[np.float64]:
    """Bounds [2, 3] of the content, in the frame of the cameras.

    With points: their 1st to 99th percentile on each axis, a tenth wider on each side. Without: for objects before a
    transparent background the cube that every camera sees around the common point; else the box around the middle of
    the frusta, up to twice the distance of the common point.
    """
    if xyz is not None and len(xyz) >= 10:
        low, high = np.percentile(xyz, [1, 99], axis=0)
        margin = _POINT_MARGIN * np.maximum(high - low, 1e-3 * (high - low).max() + 1e-9)
        return np.stack([low - margin, high + margin])
    centers, axes, _, _ = _poses(frames)
    focus = _focus(centers, axes)
    middle = focus if focus is not None else centers.mean(0)
    distances = np.linalg.norm(centers - middle, axis=1)
    reach = max(float(np.median(distances)), 1e-6)
    if focus is not None and object_only:
        tangents = [
            max(f.camera.width / float(f.camera.Ks[0, 0, 0]), f.camera.height / float(f.camera.Ks[0, 1, 1])) / 2
            for f in frames
        ]
        half = reach * float(np.median(tangents))
        return np.stack([middle - half, middle + half])
    corners = np.concatenate([_frustum(frame, (0.5 * reach, 2.0 * reach)) for frame in frames])
    low, high = np.percentile(corners, [5, 95], axis=0)
    return np.stack([low, high])


def depth_range(frames: list[Frame], aabb: NDArray[np.float64], xyz: NDArray[np.float64] | None) -> tuple[float, float]:
    """Nearest and farthest camera z of the content, in the frame of the cameras.

    With points: 1st and 99th percentile of the depths at which cameras see them, widened by a quarter. Without: from
    the distances to the middle of the bounds, as far as these reach.
    """
    if xyz is not None and len(xyz) >= 10:
        some = xyz[:: max(1, len(xyz) // 5000)]
        depths = np.concatenate([_visible_depths(frame, some) for frame in frames[:: max(1, len(frames) // 50)]])
        if len(depths) >= 10:
            near, far = np.percentile(depths, [1, 99])
            return 0.75 * float(near), 1.25 * float(far)
    centers, axes, _, _ = _poses(frames)
    middle = aabb.mean(0)
    depth = float(np.median(((middle - centers) * axes).sum(1)))
    depth = depth if depth > 0 else float(np.median(np.linalg.norm(middle - centers, axis=1)))
    half = float(np.linalg.norm(aabb[1] - aabb[0])) / 2
    return max(depth - half, 0.2 * depth), depth + half


def _poses(frames: list[Frame]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Centres, viewing directions, -y axes and x axes [F, 3] in float64."""
    viewmats = np.concatenate([frame.camera.viewmats.double().numpy() for frame in frames])
    rotations = viewmats[:, :3, :3]
    centers = -np.einsum("fji,fj->fi", rotations, viewmats[:, :3, 3])
    return centers, rotations[:, 2], -rotations[:, 1], rotations[:, 0]


def _focus(centers: NDArray, axes: NDArray) -> NDArray | None:
    """The point nearest to all optical axes, or None where the cameras do not look at one."""
    projectors = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    weights = np.ones(len(centers))
    point = centers.mean(0)
    for _ in range(20):  # iteratively reweighted least squares: minimises the sum of distances, not of their squares
        normal = (weights[:, None, None] * projectors).sum(0)
        spectrum = np.linalg.eigvalsh(normal)
        if spectrum[0] < _WORST_CONDITION * spectrum[2]:
            return None
        point = np.linalg.solve(normal, (weights[:, None] * np.einsum("fij,fj->fi", projectors, centers)).sum(0))
        distances = np.linalg.norm(np.einsum("fij,fj->fi", projectors, point - centers), axis=1)
        weights = 1.0 / np.maximum(distances, 1e-3 * np.median(np.linalg.norm(point - centers, axis=1)) + 1e-12)
    ahead = ((point - centers) * axes).sum(1)
    if (ahead > 0).mean() < 0.75 or np.median(distances) > 0.5 * np.median(np.abs(ahead)):
        return None
    return point


def _up(ups: NDArray, rights: NDArray) -> NDArray:
    mean = ups.mean(0)
    if np.linalg.norm(mean) < 1e-3:  # cameras upside down as often as upright
        mean = ups[0]
    values, vectors = np.linalg.eigh(rights.T @ rights / len(rights))
    normal = vectors[:, 0] * np.sign(vectors[:, 0] @ mean)
    level = values[0] < 0.02 and values[1] > 0.15  # x axes within about 8 degrees of a plane, and all over it
    up = normal if level and normal @ mean > 0.8 * np.linalg.norm(mean) else mean
    return up / np.linalg.norm(up)


def _frustum(frame: Frame, depths: tuple[float, ...]) -> NDArray:
    """Corners of the image at each depth, lens distortion aside."""
    camera = frame.camera
    K, viewmat = camera.Ks[0].double().numpy(), camera.viewmats[0].double().numpy()
    corners = np.array([[x, y] for x in (0, camera.width) for y in (0, camera.height)])
    rays = np.concatenate([(corners - K[:2, 2]) / np.array([K[0, 0], K[1, 1]]), np.ones((4, 1))], 1)
    points = np.concatenate([rays * depth for depth in depths])
    return (points - viewmat[:3, 3]) @ viewmat[:3, :3]


def _visible_depths(frame: Frame, xyz: NDArray) -> NDArray:
    """Camera z of the points inside the image, lens distortion aside."""
    camera = frame.camera
    K, viewmat = camera.Ks[0].double().numpy(), camera.viewmats[0].double().numpy()
    local = xyz @ viewmat[:3, :3].T + viewmat[:3, 3]
    local = local[local[:, 2] > 0]
    uv = local[:, :2] / local[:, 2:] * np.array([K[0, 0], K[1, 1]]) + K[:2, 2]
    return local[((uv >= 0) & (uv < (camera.width, camera.height))).all(1), 2]
