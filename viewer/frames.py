"""From what the renderer returns to what a client sees: pictures of colour, depth, alpha and normals, and photos over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from viser.transforms import SO3

from prismfield.datasets.views import View
from prismfield.render.cameras import Cameras

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Mode = Literal["color", "depth", "alpha", "normal"]
Compare = Literal["off", "wipe", "blend", "error"]

_MOST_PIXELS = 2_000_000
_ERROR_WHITE = 0.25  # mean absolute error shown brightest
_DEPTH_WIDTH = 240  # of the depth that hides frusta, pixels
_NEARER_THAN_ALL = 1e-3  # scene units: hides every frustum
_NOWHERE = 160.0  # scene units; what the client takes for infinitely far, its format ends at 167


@dataclass(frozen=True)
class Eye:
    """A client's camera."""

    camtoworld: NDArray[np.float64]
    """[4, 4], OpenCV axes, scene frame."""
    fov: float
    """Vertical, radians."""
    width: int
    """Of the canvas, pixels."""
    height: int

    @classmethod
    def checked(
        cls, wxyz: NDArray[np.float64], position: NDArray[np.float64], fov: float, width: int, height: int
    ) -> Eye | None:
        """The camera that a client reports; None if nothing can be drawn with it: no window, numbers that are none."""
        norm = float(np.linalg.norm(wxyz))
        if not (np.isfinite(norm) and norm > 1e-6 and np.isfinite(position).all()):
            return None
        if not (1 <= width <= 1 << 15 and 1 <= height <= 1 << 15 and 1e-3 < fov < math.pi - 1e-3):
            return None
        camtoworld = np.eye(4)
        camtoworld[:3, :3] = SO3(wxyz / norm).as_matrix()
        camtoworld[:3, 3] = position
        return cls(camtoworld, fov, width, height)

    def near(self, camtoworld: NDArray[np.float64], *, radians: float, distance: float) -> bool:
        """Whether another pose is at most this far from this one, in rotation and in scene units."""
        # The norm of the difference of two rotations is 2 sqrt(2) |sin(angle / 2)|
        turn = np.linalg.norm(self.camtoworld[:3, :3] - camtoworld[:3, :3])
        moved = np.linalg.norm(self.camtoworld[:3, 3] - camtoworld[:3, 3])
        return bool(turn <= 2 * math.sqrt(2) * math.sin(radians / 2) and moved <= distance)


@dataclass(frozen=True)
class Photo:
    """A view of the capture to compare with."""

    name: str
    camtoworld: NDArray[np.float64]
    """[4, 4], scene frame."""
    K: NDArray[np.float64]
    """[3, 3] pixels."""
    rgb: Bytes
    """[H, W, 3]."""
    alpha: Bytes | None
    """[H, W], straight; None: opaque."""

    @classmethod
    def of(cls, name: str, view: View) -> Photo:
        """The photo of a view."""
        camera = view.camera
        alpha = None if view.alpha is None else _bytes(view.alpha.numpy())
        camtoworld = np.linalg.inv(camera.viewmats[0].double().numpy())
        return cls(name, camtoworld, camera.Ks[0].double().numpy(), _bytes(view.rgb.numpy()), alpha)

    def over(self, background: tuple[float, float, float]) -> Bytes:
        """[H, W, 3], blended over a colour in 0..1."""
        if self.alpha is None:
            return self.rgb
        alpha = self.alpha[..., None].astype(np.float32) / 255
        behind = 255 * np.asarray(background, np.float32)
        return (self.rgb * alpha + behind * (1 - alpha) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Request:
    """All that decides what a client's picture shows, beside the scene."""

    eye: Eye | None = None
    mode: Mode = "color"
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    resolution: float = 1.0
    """Share of the canvas's width and height drawn at most."""
    photo: Photo | None = None
    compare: Compare = "off"
    split: float = 0.5
    """Share of the photo: of the width in "wipe", of the mixture in "blend"."""

    @property
    def photo_in_place(self) -> Photo | None:
        """The photo, if the client looks from where it was taken."""
        photo = self.photo
        if photo is None or self.eye is None or not self.eye.near(photo.camtoworld, radians=0.004, distance=0.002):
            return None
        return photo

    def full_pixels(self) -> int:
        """Pixels of the largest picture to draw."""
        assert self.eye is not None
        return max(1, min(_MOST_PIXELS, int(self.eye.width * self.eye.height * self.resolution**2)))

    def size(self, pixels: int) -> tuple[int, int]:
        """(width, height) of about so many pixels, shaped like the canvas."""
        assert self.eye is not None
        scale = math.sqrt(pixels / (self.eye.width * self.eye.height))
        return max(1, round(self.eye.width * scale)), max(1, round(self.eye.height * scale))

    def camera(self, width: int, height: int) -> Cameras:
        """The canvas's camera over `width` x `height` pixels; where a photo was taken from, exactly from there."""
        assert self.eye is not None
        photo = self.photo_in_place
        focal = self.eye.height / (2 * math.tan(self.eye.fov / 2))
        K = np.diag((focal * width / self.eye.width, focal * height / self.eye.height, 1.0))
        K[:2, 2] = width / 2, height / 2
        viewmat = np.linalg.inv(self.eye.camtoworld if photo is None else photo.camtoworld)
        return Cameras(torch.from_numpy(viewmat[None]).float(), torch.from_numpy(K[None]).float(), width, height)


@dataclass(frozen=True)
class Drawn:
    """What the training thread hands on: the renderer's channels of one picture."""

    rgb: Floats
    """[H, W, 3], not clamped."""
    alpha: Floats
    """[H, W]."""
    depth: Floats | None
    """[H, W] scene units; None: not asked for, or the representation has none."""
    K: NDArray[np.float64]
    """[3, 3]."""
    complete: bool
    """No finer picture will follow."""


@dataclass(frozen=True)
class Picture:
    """What a client receives."""

    rgb: Bytes
    depth: Floats | None
    """[h, w] scene units, smaller than the colour: what frusta hide behind; beside a photo they all do."""
    depth_range: tuple[float, float] | None
    """Scene units at the ends of the colours of "depth"."""
    psnr: float | None
    """Decibels between render and photo, where one lies over the other."""
    complete: bool
    """No finer picture will follow."""
    lacks_depth: bool
    """The mode needs a depth that the representation does not render; the colours are shown."""


def compose(drawn: Drawn, request: Request, *, with_depth: bool) -> Picture:
    """The picture that a client asked for."""
    colors = np.clip(drawn.rgb, 0, 1)
    shown, depth_range = colors, None
    behind = np.asarray(request.background, np.float32)
    if request.mode == "alpha":
        shown = np.repeat(np.clip(drawn.alpha, 0, 1)[..., None], 3, axis=2)
    elif request.mode == "depth" and drawn.depth is not None:
        shown, depth_range = depth_colors(drawn.depth, drawn.alpha, behind)
    elif request.mode == "normal" and drawn.depth is not None:
        shown = normal_colors(drawn.depth, drawn.alpha, drawn.K, behind)
    picture, psnr = _bytes(shown), None
    photo = request.photo_in_place
    if photo is not None:
        truth, inside = photo_on_canvas(photo, request.background, drawn.K, (picture.shape[1], picture.shape[0]))
        error = colors[inside] - truth[inside].astype(np.float32) / 255
        psnr = -10 * math.log10(max(float(np.mean(error**2)), 1e-10)) if inside.any() else None
        if request.compare != "error" or request.mode == "color":
            picture = compare(picture, truth, inside, request.compare, request.split)
    depth = None
    if photo is not None and request.compare != "off":
        depth = np.full((1, 1), _NEARER_THAN_ALL, np.float32)
    elif with_depth and drawn.depth is not None:
        depth = occluder(drawn.depth, drawn.alpha)
    lacks_depth = request.mode in ("depth", "normal") and drawn.depth is None
    return Picture(picture, depth, depth_range, psnr, drawn.complete, lacks_depth)


def depth_colors(depth: Floats, alpha: Floats, background: Floats) -> tuple[Floats, tuple[float, float]]:
    """Near is bright: the inverse depth between its 1st and 99th percentile, on the viridis scale.

    Returns:
        [H, W, 3] and the depths at the bright and at the dark end.
    """
    known = (alpha > 0.05) & (depth > 0)
    inverse = np.where(known, 1 / np.maximum(depth, 1e-6), 0)
    some = inverse[known]
    if len(some) == 0:
        return np.broadcast_to(background, (*depth.shape, 3)), (0.0, 0.0)
    low, high = (float(v) for v in np.percentile(some[:: max(1, len(some) // 20_000)], [1, 99]))
    level = np.clip((inverse - low) / max(high - low, 1e-6 * high), 0, 1)
    colors = cv2.applyColorMap(_bytes(level), cv2.COLORMAP_VIRIDIS)[..., ::-1].astype(np.float32) / 255
    share = np.where(known, np.clip(alpha, 0, 1), 0)[..., None]
    return colors * share + background * (1 - share), (1 / high, 1 / low)


def normal_colors(depth: Floats, alpha: Floats, K: NDArray[np.float64], background: Floats) -> Floats:
    """Normals of the depth in the camera's axes: red to the right, green up, blue towards the viewer.

    Differences are taken on the side where the depth changes less, so that silhouettes stay sharp.
    """
    height, width = depth.shape
    x = (np.arange(width, dtype=np.float32) + 0.5 - K[0, 2]) / K[0, 0]
    y = (np.arange(height, dtype=np.float32) + 0.5 - K[1, 2]) / K[1, 1]
    points = np.stack([depth * x, depth * y[:, None], depth], axis=2).astype(np.float32)
    normals = np.cross(_smaller_step(points, 0), _smaller_step(points, 1))  # down x right: towards the viewer
    normals /= np.maximum(np.linalg.norm(normals, axis=2, keepdims=True), 1e-12)
    colors = 0.5 + 0.5 * normals * np.array((1, -1, -1), np.float32)
    share = np.where((alpha > 0.05) & (depth > 0), np.clip(alpha, 0, 1), 0)[..., None]
    return colors * share + background * (1 - share)


def _smaller_step(points: Floats, axis: int) -> Floats:
    """[H, W, 3] to the next or from the last point along an axis, whichever changes z less."""
    if points.shape[axis] < 2:
        step = np.zeros_like(points)
        step[..., 1 - axis] = 1
        return step
    steps = np.diff(points, axis=axis)
    first, last = np.take(steps, [0], axis), np.take(steps, [-1], axis)
    ahead, behind = np.concatenate([steps, last], axis), np.concatenate([first, steps], axis)
    return np.where(np.abs(ahead[..., 2:]) < np.abs(behind[..., 2:]), ahead, behind)


def photo_on_canvas(
    photo: Photo, background: tuple[float, float, float], K: NDArray[np.float64], size: tuple[int, int]
) -> tuple[Bytes, NDArray[np.bool_]]:
    """The photo as the camera `K` at its place would have taken it: [H, W, 3], and where it is [H, W]."""
    image = photo.over(background)
    height, width = image.shape[:2]
    scale = np.array([K[0, 0] / photo.K[0, 0], K[1, 1] / photo.K[1, 1]])
    # Averaged first where it shrinks; what is left for the warp is a shift and nearly no scale.
    small = max(1, round(width * min(1, scale[0]))), max(1, round(height * min(1, scale[1])))
    ratio = scale * (width, height) / small
    if small != (width, height):
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    # A point p of the photo lies at scale * (p - c) + C, measured from the corner; pixel centres at +0.5.
    shift = K[:2, 2] - scale * photo.K[:2, 2] + (ratio - 1) / 2
    matrix = np.array([[ratio[0], 0, shift[0]], [0, ratio[1], shift[1]]])
    warped = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    column, row = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    x, y = (column - K[0, 2]) / scale[0] + photo.K[0, 2], (row - K[1, 2]) / scale[1] + photo.K[1, 2]
    return warped.astype(np.uint8, copy=False), ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)


def compare(picture: Bytes, truth: Bytes, inside: NDArray[np.bool_], how: Compare, split: float) -> Bytes:
    """Photo and render in one picture; the photo is only shown where `inside`."""
    if how == "wipe":
        columns = np.flatnonzero(inside.any(0))
        if len(columns) == 0:
            return picture
        edge = round(columns[0] + split * (columns[-1] + 1 - columns[0]))
        left = inside & (np.arange(picture.shape[1]) < edge)
        picture = np.where(left[..., None], truth, picture)
        if 0 < split < 1:
            picture[:, max(edge - 1, 0) : edge + 1] = 255
    elif how == "blend":
        mixed = cv2.addWeighted(truth, split, picture, 1 - split, 0)
        picture = np.where(inside[..., None], mixed, picture)
    elif how == "error":
        error = np.abs(picture.astype(np.float32) - truth).mean(2) / 255
        colors = cv2.applyColorMap(_bytes(np.minimum(error / _ERROR_WHITE, 1)), cv2.COLORMAP_INFERNO)[..., ::-1]
        picture = np.where(inside[..., None], colors, picture // 4)
    return picture


def occluder(depth: Floats, alpha: Floats) -> Floats:
    """Depth of what is mostly opaque, a few hundred pixels wide: what frusta hide behind."""
    solid = np.where((alpha > 0.5) & (depth > 0), np.minimum(depth, _NOWHERE), np.float32(_NOWHERE))
    height, width = solid.shape
    if width <= _DEPTH_WIDTH:
        return solid
    size = _DEPTH_WIDTH, max(1, round(height * _DEPTH_WIDTH / width))
    return cv2.resize(solid, size, interpolation=cv2.INTER_NEAREST).astype(np.float32, copy=False)


def _bytes(values: NDArray) -> Bytes:
    """0..1 to 0..255; bytes stay as they are."""
    return values if values.dtype == np.uint8 else (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
