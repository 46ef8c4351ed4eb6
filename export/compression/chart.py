"""Curves drawn into a picture, with axes and names; enough for one measured against another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 900, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 44, 56
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 32), (222, 222, 226)
_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))


@dataclass(frozen=True)
class Curve:
    """Points joined by lines, in order."""

    name: str
    points: list[tuple[float, float]]
    """(x, y); x more than 0."""


def draw_chart(curves: list[Curve], x_name: str, y_name: str, title: str) -> NDArray[np.float32]:
    """[H, W, 3] in 0..1; the horizontal axis is logarithmic.

    Args:
        curves: at least one, with at least one point.
        x_name: what the horizontal axis is, with its unit.
        y_name: the vertical one.
        title: above it all.
    """
    page = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    points = np.array([point for curve in curves for point in curve.points])
    x_ticks, y_ticks = _ticks_log(*_span(points[:, 0])), _ticks(*_span(points[:, 1]))
    low_x, high_x = np.log(min(points[:, 0].min(), x_ticks[0])), np.log(max(points[:, 0].max(), x_ticks[-1]))
    low_y, high_y = min(points[:, 1].min(), y_ticks[0]), max(points[:, 1].max(), y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        right = (np.log(x) - low_x) / max(high_x - low_x, 1e-9) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - low_y) / max(high_y - low_y, 1e-9) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + float(right), _HEIGHT - _BOTTOM - float(up)

    for x in x_ticks:
        across = place(x, low_y)[0]
        draw.line([(across, _TOP), (across, _HEIGHT - _BOTTOM)], _FAINT)
        draw.text((across, _HEIGHT - _BOTTOM + 6), f"{x:g}", _INK, font, anchor="ma")
    for y in y_ticks:
        down = place(x_ticks[0], y)[1]
        draw.line([(_LEFT, down), (_WIDTH - _RIGHT, down)], _FAINT)
        draw.text((_LEFT - 8, down), f"{y:g}", _INK, font, anchor="rm")
    draw.text((_WIDTH / 2, _HEIGHT - 10), x_name, _INK, font, anchor="mb")
    draw.text((10, 22), y_name, _INK, font)
    draw.text((_WIDTH / 2, 8), title, _INK, font, anchor="ma")
    for i, curve in enumerate(curves):
        color = _COLORS[i % len(_COLORS)]
        places = [place(*point) for point in curve.points]
        draw.line(places, color, 2)
        for x, y in places:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
        draw.text(
            (_WIDTH - _RIGHT - 8, _HEIGHT - _BOTTOM - 20 * (len(curves) - i)), curve.name, color, font, anchor="ra"
        )
    return np.asarray(page, np.float32) / np.float32(255)


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers from about `low` to about `high`."""
    step = 10.0 ** np.floor(np.log10(max(high - low, 1e-9) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 8)
    return [float(round(i * step, 12)) for i in range(int(np.floor(low / step)), int(np.ceil(high / step)) + 1)]


def _ticks_log(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from at most `low` to at least `high`."""
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    every = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first = max(i for i, tick in enumerate(every) if tick <= low)
    last = min((i for i, tick in enumerate(every) if tick >= high), default=len(every) - 1)
    return every[first : max(last, first + 1) + 1]
