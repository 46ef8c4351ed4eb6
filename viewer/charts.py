"""The numbers of a training in the live view: a line of text and a few curves."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

_CURVES = {"loss": "Loss", "psnr": "PSNR, dB", "primitives": "Primitives"}
_MOST_POINTS = 400  # of a curve; halved when it has more
_TEXT_SECONDS, _CURVES_SECONDS = 0.5, 2.0  # between changes that clients see
_AXIS = "#909296"  # readable on the dark theme


class Charts:
    """Text and curves in the part of the panel that all clients share."""

    def __init__(self, gui: Any, text: Any) -> None:
        """`text` is the markdown element for the numbers; the curves come into a folder of their own."""
        self._text = text
        self._latest: dict[str, float] = {}
        self._step = 0
        self._points: list[tuple[float, ...]] = []
        """(step, value of each curve)."""
        self._stride = 1
        self._skipped = 0
        self._lock = threading.Lock()
        """`record` and `show` may run on different threads."""
        self._text_at = self._curves_at = float("-inf")
        text.content = words(0, {})
        with gui.add_folder("Curves", order=4):
            self._curves = {
                name: gui.add_uplot(
                    (np.zeros(1), np.full(1, np.nan)),
                    ({}, {"label": label, "stroke": "#4690ff", "width": 1.5}),
                    scales={"x": {"time": False}},
                    axes=tuple(_axis(size) for size in (24, 52)),
                    legend={"show": False},
                    title=label,
                    height=130,
                )
                for name, label in _CURVES.items()
            }

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of a step; a few microseconds."""
        self._step = step
        if metrics.get("step") == self._latest.get("step"):  # nothing has been measured since
            return
        self._latest = dict(metrics)
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        with self._lock:
            self._points.append((float(step), *(float(metrics.get(name, math.nan)) for name in _CURVES)))
            if len(self._points) > _MOST_POINTS:
                self._points = self._points[::2]
                self._stride *= 2

    def show(self, *, force: bool = False) -> None:
        """Bring what clients see up to date, if it is time for it."""
        now = time.perf_counter()
        if force or now - self._text_at >= _TEXT_SECONDS:
            self._text_at = now
            self._text.content = words(self._step, self._latest)
        if force or now - self._curves_at >= _CURVES_SECONDS:
            self._curves_at = now
            with self._lock:
                columns = np.array(self._points, np.float64).T
            for row, chart in enumerate(self._curves.values(), 1):
                if columns.size:
                    chart.data = (columns[0], columns[row])


def words(step: int, latest: Mapping[str, float]) -> str:
    """The numbers as a table."""
    rows = [("Step", f"{step:,}" + (f" ({latest['progress']:.0%})" if "progress" in latest else ""))]
    formats = {
        "loss": ("Loss", "{:.4f}"),
        "psnr": ("PSNR", "{:.2f} dB"),
        "test_psnr": ("Test PSNR", "{:.2f} dB"),
        "primitives": ("Primitives", "{:,.0f}"),
        "steps_per_second": ("Steps a second", "{:.1f}"),
    }
    rows += [(label, form.format(latest[name])) for name, (label, form) in formats.items() if name in latest]
    return "\n".join(["| | |", "|:--|--:|", *(f"| {label} | **{value}** |" for label, value in rows)])


def _axis(size: int) -> dict[str, Any]:
    return {
        "stroke": _AXIS,
        "size": size,
        "font": "11px sans-serif",
        "grid": {"stroke": "#80808030", "width": 1},
        "ticks": {"stroke": "#80808030", "width": 1},
    }
