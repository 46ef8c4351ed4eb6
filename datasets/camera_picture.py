"""A picture of where a capture's cameras stand: their frusta and the points, from above and from the side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float64]

_SMOOTH = 2  # drawn at twice the size, then reduced
_PANEL = (800, 760)
_MARGIN = 46
_HEADER, _FOOTER = 84, 58
_INK, _PALE, _GRID = (38, 42, 48), (120, 126, 134), (229, 232, 236)
_TRAIN, _TEST, _WRONG, _BOX = (28, 100, 210), (236, 130, 10), (215, 20, 40), (90, 150, 90)
_AXES = ((210, 50, 50), (40, 150, 60), (50, 80, 210))
_REACH = 1.8  # points farther from the cameras' middle than this many times their spread do not widen the view


@dataclass(frozen=True)
class CameraPlot:
    """What to draw, in the user's frame."""

    camtoworlds: Array
    """[C, 4, 4], OpenCV axes."""
    tangents: Array
    """[C, 4] (left, top, right, bottom) of the image borders over the focal length."""
    is_test: NDArray[np.bool_]
    """[C]."""
    is_wrong: NDArray[np.bool_]
    """[C] the pose contradicts the pictures."""
    xyz: Array
    """[P, 3] points, perhaps none."""
    rgb: NDArray[np.uint8]
    """[P, 3]."""
    aabb: Array
    """[2, 3]."""
    up: Array
    """[3] unit."""
    title: str
    details: str
    points_label: str
    """How the points came about, for the legend; empty: there are none."""


@dataclass(frozen=True)
class _View:
    """One orthographic panel."""

    right: Array
    above: Array
    """Unit vectors of the page."""
    middle: tuple[float, float]
    """Page coordinates, user units, of the panel's centre."""
    scale: float
    """Pixels per user unit."""
    origin: tuple[int, int]
    """Upper left corner of the panel in the picture, pixels."""

    def page(self, xyz: Array) -> Array:
        """[..., 2] pixels of [..., 3] positions."""
        u, v = xyz @ self.right - self.middle[0], xyz @ self.above - self.middle[1]
        width, height = _PANEL[0] * _SMOOTH, _PANEL[1] * _SMOOTH
        return np.stack([self.origin[0] + width / 2 + u * self.scale, self.origin[1] + height / 2 - v * self.scale], -1)

    def depth(self, xyz: Array) -> Array:
        """[...] larger is nearer to the viewer."""
        return xyz @ np.cross(self.right, self.above)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the panel, pixels."""
        x, y = self.origin
        return (x, y, x + _PANEL[0] * _SMOOTH, y + _PANEL[1] * _SMOOTH)


def draw_cameras(plot: CameraPlot, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    width = 2 * _PANEL[0] + 3 * _MARGIN
    size = (width * _SMOOTH, (_HEADER + _PANEL[1] + _FOOTER) * _SMOOTH)
    image = Image.new("RGB", size, "white")
    frusta = _frusta(plot)
    for view, name in zip(_views(plot, frusta), ("from above", "from the side"), strict=True):
        panel = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(panel, "RGBA")
        _draw_grid(draw, view)
        _draw_points(panel, view, plot)
        _draw_box(draw, view, plot.aabb)
        for _, chosen, color in _groups(plot):
            for corners in frusta[chosen]:
                _draw_frustum(draw, view.page(corners), color)
        _draw_axes(draw, view)
        image.paste(panel.crop(view.box), view.box[:2])
        draw = ImageDraw.Draw(image)
        draw.rectangle(view.box, outline=_PALE, width=_SMOOTH)
        where = (view.box[0] + 10 * _SMOOTH, view.box[1] + 8 * _SMOOTH)
        left, top, right, bottom = draw.textbbox(where, name, _font(15))
        draw.rectangle((left - 5 * _SMOOTH, top - 4 * _SMOOTH, right + 5 * _SMOOTH, bottom + 4 * _SMOOTH), fill="white")
        draw.text(where, name, _INK, _font(15))
        _draw_ticks(draw, view)
    _draw_words(ImageDraw.Draw(image), plot, image.height)
    image.resize((width, image.height // _SMOOTH), Image.Resampling.LANCZOS).save(path, format="PNG", optimize=True)


def _groups(plot: CameraPlot) -> list[tuple[str, NDArray[np.bool_], tuple[int, int, int]]]:
    """Name, cameras [C] and colour of each kind that there is, in the order of drawing."""
    kinds = [
        ("train", ~plot.is_test, _TRAIN),
        ("test", plot.is_test, _TEST),
        ("pose contradicts the image", plot.is_wrong, _WRONG),
    ]
    return [kind for kind in kinds if kind[1].any()]


def _frusta(plot: CameraPlot) -> Array:
    """[C, 6, 3] apex, four corners (clockwise from the upper left), tip of the arrow that shows the image's upper edge."""
    centers = plot.camtoworlds[:, :3, 3]
    length = _frustum_length(centers, plot)
    left, top, right, bottom = (plot.tangents[:, k] for k in range(4))
    zero, one = np.zeros_like(left), np.ones_like(left)
    wide = right - left
    rays = [(zero, zero, zero), (left, top, one), (right, top, one), (right, bottom, one), (left, bottom, one)]
    rays.append(((left + right) / 2, top - 0.22 * wide, one))
    local = np.stack([np.stack(ray, -1) for ray in rays], 1) * length
    return np.einsum("cij,ckj->cki", plot.camtoworlds[:, :3, :3], local) + centers[:, None]


def _frustum_length(centers: Array, plot: CameraPlot) -> float:
    """Long enough to see, short enough that neighbours stay apart."""
    spread = float(np.linalg.norm(centers - np.median(centers, axis=0), axis=1).mean())
    spread = max(spread, 0.1 * float(np.linalg.norm(plot.aabb[1] - plot.aabb[0])), 1e-9)
    some = centers[:: max(1, len(centers) // 400)]
    gaps = np.linalg.norm(some[:, None] - some[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    nearest = float(np.median(gaps.min(1))) if len(some) > 1 else spread
    return float(np.clip(0.8 * nearest, 0.08 * spread, 0.22 * spread))


def _views(plot: CameraPlot, frusta: Array) -> list[_View]:
    """From above and from the side, in one scale; the page's right is the cameras' widest horizontal direction."""
    up = plot.up / np.linalg.norm(plot.up)
    centers = plot.camtoworlds[:, :3, 3]
    flat = (centers - centers.mean(0)) @ (np.eye(3) - np.outer(up, up))
    right = (
        np.linalg.svd(flat, full_matrices=False)[2][0]
        if len(centers) > 2 and np.ptp(flat) > 1e-9
        else np.eye(3)[int(np.argmin(np.abs(up)))]
    )
    right = right - up * (right @ up)
    right /= np.linalg.norm(right)
    right *= 1.0 if right[int(np.argmax(np.abs(right)))] > 0 else -1.0
    behind = np.cross(up, right)
    shown = np.concatenate([frusta.reshape(-1, 3), _near_points(plot, centers)])
    pages = [(right, behind), (right, up)]
    lows = [np.array([(shown @ a).min(), (shown @ b).min()]) for a, b in pages]
    highs = [np.array([(shown @ a).max(), (shown @ b).max()]) for a, b in pages]
    room = np.array(_PANEL) * 0.9
    extent = max(float(((high - low) / room).max()) for low, high in zip(lows, highs, strict=True))
    scale = _SMOOTH / max(extent, 1e-9)
    views = []
    for k, (a, b) in enumerate(pages):
        middle = (lows[k] + highs[k]) / 2
        origin = ((_MARGIN + k * (_PANEL[0] + _MARGIN)) * _SMOOTH, _HEADER * _SMOOTH)
        views.append(_View(a, b, (float(middle[0]), float(middle[1])), scale, origin))
    return views


def _near_points(plot: CameraPlot, centers: Array) -> Array:
    """Points, or corners of the bounds, that the view must contain: without far background, without strays."""
    if not len(plot.xyz):
        corners = np.array(
            [[plot.aabb[i, 0], plot.aabb[j, 1], plot.aabb[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        )
        return corners
    middle = np.median(centers, axis=0)
    away = np.linalg.norm(plot.xyz - middle, axis=1)
    reach = _REACH * max(float(np.linalg.norm(centers - middle, axis=1).max()), float(np.percentile(away, 25)))
    near = plot.xyz[away < reach]
    if len(near) < 10:
        return near
    low, high = np.percentile(near, [1, 99], axis=0)
    return near[((near >= low) & (near <= high)).all(1)]


def _step(scale: float) -> float:
    """Distance of grid lines: 1, 2 or 5 times a power of ten, at least 70 pixels of the finished picture."""
    least = 70 * _SMOOTH / scale
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _grid_lines(view: _View) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(value, pixel) of the vertical and of the horizontal grid lines."""
    step = _step(view.scale)
    lines: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for axis in (0, 1):
        half = _PANEL[axis] * _SMOOTH / 2 / view.scale
        first = math.ceil((view.middle[axis] - half) / step)
        last = math.floor((view.middle[axis] + half) / step)
        for k in range(first, last + 1):
            offset = (k * step - view.middle[axis]) * view.scale
            middle = view.origin[axis] + _PANEL[axis] * _SMOOTH / 2
            lines[axis].append((k * step, middle + offset if axis == 0 else middle - offset))
    return lines


def _draw_grid(draw: ImageDraw.ImageDraw, view: _View) -> None:
    left, top, right, bottom = view.box
    vertical, horizontal = _grid_lines(view)
    for _, x in vertical:
        draw.line([(x, top), (x, bottom)], _GRID, _SMOOTH)
    for _, y in horizontal:
        draw.line([(left, y), (right, y)], _GRID, _SMOOTH)


def _draw_ticks(draw: ImageDraw.ImageDraw, view: _View) -> None:
    """Numbers at the lower and left border, in user units."""
    left, _, _, bottom = view.box
    vertical, horizontal = _grid_lines(view)
    for value, x in vertical:
        draw.text((x, bottom + 5 * _SMOOTH), f"{value:.6g}", _PALE, _font(12), anchor="mt")
    for value, y in horizontal:
        draw.text((left - 5 * _SMOOTH, y), f"{value:.6g}", _PALE, _font(12), anchor="rm")


def _draw_points(panel: Image.Image, view: _View, plot: CameraPlot) -> None:
    """Dots, the nearest to the viewer last; larger ones where there are few."""
    if not len(plot.xyz):
        return
    order = np.argsort(view.depth(plot.xyz), kind="stable")
    page = np.floor(view.page(plot.xyz[order])).astype(np.int64)
    radius = 1 if len(page) > 150000 else 2 if len(page) > 2000 else 3
    pixels = np.array(panel)
    colors = (plot.rgb[order].astype(np.float32) * 0.92).astype(np.uint8)  # white ones must show on white
    for dy in range(-(radius // 2), radius - radius // 2 + 1 if radius > 1 else 1):
        for dx in range(-(radius // 2), radius - radius // 2 + 1 if radius > 1 else 1):
            x, y = page[:, 0] + dx, page[:, 1] + dy
            inside = (x >= 0) & (x < pixels.shape[1]) & (y >= 0) & (y < pixels.shape[0])
            pixels[y[inside], x[inside]] = colors[inside]
    panel.paste(Image.fromarray(pixels))


def _draw_frustum(draw: ImageDraw.ImageDraw, page: Array, color: tuple[int, int, int]) -> None:
    apex, *corners, tip = [(float(x), float(y)) for x, y in page]
    draw.polygon(corners, fill=(*color, 26))
    for corner in corners:
        draw.line([apex, corner], (*color, 150), _SMOOTH)
    draw.line([*corners, corners[0]], (*color, 235), _SMOOTH)
    draw.line([corners[0], tip, corners[1]], (*color, 235), _SMOOTH)
    r = 2 * _SMOOTH
    draw.ellipse([apex[0] - r, apex[1] - r, apex[0] + r, apex[1] + r], fill=(*color, 255))


def _draw_box(draw: ImageDraw.ImageDraw, view: _View, aabb: Array) -> None:
    """The twelve edges of the content's bounds, dashed."""
    corners = np.array([[aabb[i, 0], aabb[j, 1], aabb[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    page = view.page(corners)
    for i in range(8):
        for bit in (1, 2, 4):
            if not i & bit:
                _dashed(draw, page[i], page[i | bit])


def _dashed(draw: ImageDraw.ImageDraw, start: Array, end: Array) -> None:
    length = float(np.linalg.norm(end - start))
    count = min(int(length / (5 * _SMOOTH)), 2000)
    for k in range(0, count, 2):
        a, b = start + (end - start) * (k / count), start + (end - start) * (min(k + 1, count) / count)
        draw.line([tuple(a), tuple(b)], (*_BOX, 200), _SMOOTH)


def _draw_axes(draw: ImageDraw.ImageDraw, view: _View) -> None:
    """The user's x, y and z axes, in the lower left corner."""
    left, _, _, bottom = view.box
    start = np.array([left + 46 * _SMOOTH, bottom - 46 * _SMOOTH])
    order = np.argsort(view.depth(np.eye(3)))
    for axis in order:
        along = np.array([view.right[axis], -view.above[axis]])
        end = start + along * 30 * _SMOOTH
        draw.line([tuple(start), tuple(end)], (*_AXES[axis], 255), 2 * _SMOOTH)
        if np.linalg.norm(along) > 0.4:
            label = start + along / np.linalg.norm(along) * (30 * float(np.linalg.norm(along)) + 9) * _SMOOTH
            draw.text(tuple(label), "xyz"[axis], _AXES[axis], _font(13), anchor="mm")


def _draw_words(draw: ImageDraw.ImageDraw, plot: CameraPlot, height: int) -> None:
    """Title above, legend below."""
    x: float = _MARGIN * _SMOOTH
    draw.text((x, 16 * _SMOOTH), plot.title, _INK, _font(24))
    draw.text((x, 52 * _SMOOTH), plot.details, _PALE, _font(15))
    y = height - 20 * _SMOOTH
    entries = [(color, f"{name}: {int(chosen.sum())}") for name, chosen, color in _groups(plot)]
    entries.append((_BOX, "bounds of the content"))
    for color, label in entries:
        draw.line([(x, y), (x + 22 * _SMOOTH, y)], color, 3 * _SMOOTH)
        x = _label(draw, x + 30 * _SMOOTH, y, label)
    words = [plot.points_label] if plot.points_label else ["no points"]
    for label in [*words, "scale in the capture's own units; the tick on a frustum marks the image's upper edge"]:
        x = _label(draw, x, y, label)


def _label(draw: ImageDraw.ImageDraw, x: float, y: float, text: str) -> float:
    draw.text((x, y), text, _INK, _font(14), anchor="lm")
    return x + draw.textlength(text, _font(14)) + 26 * _SMOOTH


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SMOOTH)
