"""Paths for a camera to fly: round the scene, along the photographs, through keyframes. All in one frame, the user's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, RotationSpline, Slerp

from prismfield.render.cameras import Cameras

Array = NDArray[np.float64]

_WIDEST_GAP = math.radians(100)  # between neighbouring photographs round the scene; beyond, nobody saw what is there
_SWING_MARGIN = 0.05  # of the arc that was photographed, left out at each end
_RING_BLUR = math.radians(25)  # the ring follows the photographer's, smoothed by this
_KEYS_A_SECOND = 1.5  # of the photographs' poses; more would shake as the hand did
_WIDEST_TURN = math.radians(35)  # between two keys; beyond, the way would be cut short through what was photographed
_WORSE_THAN_TOUR = 1.6  # names are no order to fly in if that is this much longer than a short tour


@dataclass(frozen=True)
class Flight:
    """Poses in OpenCV axes, and the vertical field of view at each."""

    camtoworlds: Array
    """[F, 4, 4]."""
    fovs: Array
    """[F] vertical, radians."""

    def cameras(self, width: int, height: int) -> Cameras:
        """One camera a frame, with square pixels and the principal point in the middle."""
        focal = 0.5 * height / np.tan(0.5 * self.fovs)
        Ks = np.zeros((len(focal), 3, 3))
        Ks[:, 0, 0] = Ks[:, 1, 1] = focal
        Ks[:, 0, 2], Ks[:, 1, 2], Ks[:, 2, 2] = 0.5 * width, 0.5 * height, 1
        return Cameras.from_camtoworlds(torch.from_numpy(self.camtoworlds), torch.from_numpy(Ks), width, height)


@dataclass(frozen=True)
class Keyframes:
    """What a file of keyframes says."""

    camtoworlds: Array
    """[K, 4, 4], OpenCV axes, user's frame."""
    fovs: Array
    """[K] vertical, radians."""
    times: Array | None
    """[K] seconds, rising from 0; None: evenly along the path."""
    loop: bool
    """Whether the path goes back to the first."""

    @property
    def duration(self) -> float:
        """Seconds from the first to the last, or back to the first; 0 without times."""
        if self.times is None:
            return 0.0
        return float(self.times[-1] + (np.diff(self.times).mean() if self.loop else 0))


def vertical_fov(cameras: list[Cameras]) -> float:
    """Median vertical field of view, radians."""
    return float(np.median([2 * math.atan(0.5 * c.height / float(c.Ks[0, 1, 1])) for c in cameras]))


def poses_of(cameras: list[Cameras]) -> Array:
    """[C, 4, 4] camera to world, double precision."""
    return np.concatenate([np.linalg.inv(camera.viewmats.double().numpy()) for camera in cameras])


def orbit(poses: Array, center: Array, up: Array, fov: float, frames: int) -> Flight:
    """Round the scene on the ring that the photographs were taken from, looking where they look; the end meets the start.

    Where they go round only part of the scene, the camera swings along that part and back.

    Args:
        poses: [C, 4, 4] the photographs'.
        center: [3] what they look at.
        up: [3] unit vector.
        fov: vertical, radians.
        frames: how many, at least 1.
    """
    first = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    first /= np.linalg.norm(first)
    second = np.cross(up, first)
    offsets = poses[:, :3, 3] - center
    along, across, heights = offsets @ first, offsets @ second, offsets @ up
    radii, angles = np.hypot(along, across), np.arctan2(across, along)
    turns = np.arange(frames) / frames * 2 * math.pi
    start, arc = _photographed_arc(angles[radii > 0.05 * np.median(radii)] if radii.any() else angles)
    turns = start + arc * (0.5 - (0.5 - _SWING_MARGIN) * np.cos(turns)) if arc < 2 * math.pi else start + turns
    closeness = np.exp((np.cos(turns[:, None] - angles) - 1) / _RING_BLUR**2)
    closeness /= closeness.sum(1, keepdims=True)
    radius, height = closeness @ radii, closeness @ heights
    places = np.cos(turns)[:, None] * first + np.sin(turns)[:, None] * second
    positions = center + radius[:, None] * places + height[:, None] * up
    return Flight(_looking_at(positions, np.broadcast_to(center, positions.shape), up), np.full(frames, fov))


def ring(center: Array, up: Array, radius: float, elevation: float = 20.0, count: int = 36) -> Array:
    """[C, 4, 4] `count` poses on a ring round `center`, `elevation` degrees above it: where nobody knows of photographs."""
    first = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])
    first /= np.linalg.norm(first)
    turns = np.arange(count)[:, None] / count * 2 * math.pi
    rise = math.radians(elevation)
    level = np.cos(turns) * first + np.sin(turns) * np.cross(up, first)
    positions = center + radius * (math.cos(rise) * level + math.sin(rise) * up)
    return _looking_at(positions, np.broadcast_to(center, positions.shape), up)


def along_photographs(poses: Array, fov: float, frames: int, seconds: float) -> Flight:
    """From photograph to photograph at even speed: by name where that is a way to go, else by a short tour.

    Args:
        poses: [C, 4, 4], ordered by name.
        fov: vertical, radians.
        frames: how many, at least 1.
        seconds: that the video lasts; of many photographs, it touches a few a second.

    Raises:
        ValueError: there are fewer than two places.
    """
    steps = _steps(poses, poses)
    order = np.arange(len(poses))
    tour = _short_tour(steps)
    if _length(steps, order) > _WORSE_THAN_TOUR * _length(steps, tour):
        order = tour
    flown = poses[order][:, :3, :3]
    cosines = 0.5 * ((flown[1:] * flown[:-1]).sum((1, 2)) - 1)
    turned = float(np.arccos(np.clip(cosines, -1, 1)).sum())
    count = min(len(order), max(4, round(_KEYS_A_SECOND * seconds), math.ceil(turned / _WIDEST_TURN) + 1))
    keys = poses[order[np.linspace(0, len(order) - 1, count).round().astype(int)]]
    return through(Keyframes(keys, np.full(len(keys), fov), None, loop=False), frames)


def through(keyframes: Keyframes, frames: int) -> Flight:
    """A smooth path through every keyframe: a Catmull-Rom spline of positions, a spline of rotations.

    Raises:
        ValueError: there are fewer than two places to be.
    """
    poses, fovs, times = keyframes.camtoworlds, keyframes.fovs, keyframes.times
    if keyframes.loop:
        poses, fovs = np.concatenate([poses, poses[:1]]), np.append(fovs, fovs[0])
        if times is not None:
            times = np.append(times, keyframes.duration)
    if times is None:
        lengths = _steps(poses[:-1], poses[1:], paired=True)
        kept = np.append(True, lengths > 1e-6 * max(lengths.max(initial=0.0), 1e-12))
        poses, fovs = poses[kept], fovs[kept]
        if len(poses) < 2:
            raise ValueError("the camera has fewer than two different places to be")
        times = np.append(0.0, np.cumsum(_steps(poses[:-1], poses[1:], paired=True)))
    shares = np.arange(frames) / (frames if keyframes.loop else max(frames - 1, 1))
    moments = times[0] + (times[-1] - times[0]) * shares
    positions = _spline(times, poses[:, :3, 3], keyframes.loop)(moments)
    rotations = Rotation.from_matrix(poses[:, :3, :3])
    turned = (Slerp if len(poses) == 2 else RotationSpline)(times, rotations)(moments)
    camtoworlds = np.tile(np.eye(4), (frames, 1, 1))
    camtoworlds[:, :3, :3], camtoworlds[:, :3, 3] = turned.as_matrix(), positions
    return Flight(camtoworlds, np.interp(moments, times, fovs))


def read_keyframes(path: Path, default_fov: float) -> Keyframes:
    """Read keyframes from JSON; docs/evaluate-export.md describes it.

    Args:
        path: the file.
        default_fov: vertical, radians, for keyframes that state none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line naming the keyframe and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    try:
        return _keyframes(content, default_fov)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _keyframes(content: Any, default_fov: float) -> Keyframes:
    if not isinstance(content, dict) or not isinstance(content.get("keyframes"), list):
        raise ValueError('expected {"keyframes": [...]}')
    if unknown := set(content) - {"keyframes", "axes", "loop"}:
        raise ValueError(f"unknown entry {', '.join(sorted(unknown))}; expected keyframes, axes, loop")
    axes, loop = content.get("axes", "opencv"), content.get("loop", False)
    if axes not in ("opencv", "opengl"):
        raise ValueError(f"axes: expected opencv or opengl, got {axes!r}")
    if not isinstance(loop, bool):
        raise ValueError(f"loop: expected true or false, got {loop!r}")
    entries = content["keyframes"]
    if len(entries) < 2:
        raise ValueError(f"expected at least two keyframes, got {len(entries)}")
    poses = np.stack([_pose(entry, number) for number, entry in enumerate(entries)])
    if axes == "opengl":
        poses[:, :3, 1:3] *= -1
    degrees = [_number(entry, "fov", number, math.degrees(default_fov)) for number, entry in enumerate(entries)]
    if bad := [number for number, value in enumerate(degrees) if not 1 <= value <= 170]:
        raise ValueError(f"keyframe {bad[0]}: fov: expected 1 to 170 degrees, got {degrees[bad[0]]:g}")
    have_times = ["time" in entry for entry in entries]
    if any(have_times) and not all(have_times):
        raise ValueError(f"keyframe {have_times.index(False)} has no time; either all have one or none has")
    times = None
    if all(have_times):
        times = np.array([_number(entry, "time", number, 0) for number, entry in enumerate(entries)])
        if (np.diff(times) <= 0).any():
            raise ValueError(f"keyframe {int(np.argmax(np.diff(times) <= 0)) + 1}: time is not after the one before")
        times = times - times[0]
    return Keyframes(poses, np.radians(degrees), times, loop)


def _pose(entry: Any, number: int) -> Array:
    if not isinstance(entry, dict):
        raise ValueError(f'keyframe {number}: expected {{"camtoworld": ...}}, got {str(entry)[:40]}')
    if unknown := set(entry) - {"camtoworld", "fov", "time"}:
        raise ValueError(
            f"keyframe {number}: unknown entry {', '.join(sorted(unknown))}; expected camtoworld, fov, time"
        )
    try:
        matrix = np.array(entry.get("camtoworld"), dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(f"keyframe {number}: camtoworld: expected 4x4 or 3x4 finite numbers")
    pose = np.eye(4)
    pose[:3] = matrix[:3]
    rotation = pose[:3, :3]
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-2 or np.linalg.det(rotation) < 0:
        raise ValueError(f"keyframe {number}: camtoworld: its upper left 3x3 is no rotation")
    return pose


def _number(entry: dict[str, Any], key: str, number: int, default: float) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"keyframe {number}: {key}: expected a number, got {value!r}")
    return float(value)


def _photographed_arc(angles: Array) -> tuple[float, float]:
    """Where the arc of the photographs begins and how long it is; 2 pi if they go all round."""
    sorted_angles = np.sort(angles)
    gaps = np.diff(np.append(sorted_angles, sorted_angles[0] + 2 * math.pi))
    widest = int(gaps.argmax())
    start = float(sorted_angles[(widest + 1) % len(sorted_angles)])
    return start, 2 * math.pi if gaps[widest] < _WIDEST_GAP else 2 * math.pi - float(gaps[widest])


def _looking_at(positions: Array, targets: Array, up: Array) -> Array:
    """[F, 4, 4] camera to world of level cameras."""
    forward = targets - positions
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    right = np.cross(forward, up)
    lengths = np.linalg.norm(right, axis=1, keepdims=True)
    sideways = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])  # for a camera that looks straight down
    right = np.where(lengths > 1e-6, right / np.maximum(lengths, 1e-6), sideways / np.linalg.norm(sideways))
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3] = np.stack([right, np.cross(forward, right), forward, positions], 2)
    return poses


def _steps(a: Array, b: Array, *, paired: bool = False) -> Array:
    """Distances between poses, [A, B] or [A] if `paired`: how far to go, and to turn, a radian counting as the mean
    distance of the positions from their middle."""
    everything = np.concatenate([a, b])[:, :3, 3]
    radian = max(float(np.linalg.norm(everything - everything.mean(0), axis=1).mean()), 1e-9)
    if not paired:
        a, b = a[:, None], b[None]
    away = np.linalg.norm(a[..., :3, 3] - b[..., :3, 3], axis=-1)
    cosine = 0.5 * ((a[..., :3, :3] * b[..., :3, :3]).sum((-1, -2)) - 1)
    return away + radian * np.arccos(np.clip(cosine, -1, 1))


def _length(steps: Array, order: NDArray[np.int64]) -> float:
    return float(steps[order[:-1], order[1:]].sum())


def _short_tour(steps: Array) -> NDArray[np.int64]:
    """An open tour through all poses: the nearest that is left each time, then crossings undone (2-opt)."""
    count = len(steps)
    left, order = set(range(1, count)), [0]
    while left:
        nearest = min(left, key=lambda i: steps[order[-1], i])
        left.remove(nearest)
        order.append(nearest)
    tour = np.array(order)
    improved = True
    while improved:
        improved = False
        for i in range(count - 2):
            # Reversing tour[i+1 : j+1] replaces two steps; at the open end only one.
            ends = np.arange(i + 2, count)
            after = np.append(tour[i + 3 :], -1)
            old = steps[tour[i], tour[i + 1]] + np.where(after >= 0, steps[tour[ends], after], 0)
            new = steps[tour[i], tour[ends]] + np.where(after >= 0, steps[tour[i + 1], after], 0)
            best = int(np.argmax(old - new))
            if old[best] - new[best] > 1e-9:
                tour[i + 1 : ends[best] + 1] = tour[i + 1 : ends[best] + 1][::-1].copy()
                improved = True
    return tour


def _spline(times: Array, values: Array, loop: bool) -> CubicHermiteSpline:
    """Catmull-Rom for uneven times: at each key, the slope of the parabola through its neighbours."""
    slopes = np.diff(values, axis=0) / np.diff(times)[:, None]
    if loop:
        slopes = np.concatenate([slopes[-1:], slopes, slopes[:1]])
        spans = np.diff(times)
        spans = np.concatenate([spans[-1:], spans, spans[:1]])[:, None]
        tangents = (slopes[:-1] * spans[1:] + slopes[1:] * spans[:-1]) / (spans[:-1] + spans[1:])
    else:
        spans = np.diff(times)[:, None]
        inner = (slopes[:-1] * spans[1:] + slopes[1:] * spans[:-1]) / (spans[:-1] + spans[1:])
        tangents = np.concatenate([slopes[:1], inner, slopes[-1:]])
    return CubicHermiteSpline(times, values, tangents)
