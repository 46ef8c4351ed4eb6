"""How sharp a picture is: one number that falls with motion blur and defocus."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_LONG_SIDE = (
    640  # pixels; all pictures are compared at this size, where the grain of a sensor no longer counts as detail
)


def grey(pixels: NDArray) -> NDArray[np.float32]:
    """[H, W] brightness in 0..255 of decoded pixels (grey, or BGR and perhaps alpha; 8 or 16 bits or 0..1)."""
    peak = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}.get(pixels.dtype, 1.0)
    values = pixels.astype(np.float32) * np.float32(255.0 / peak)
    if values.ndim == 2:
        return values
    if values.shape[2] == 4:
        values = values[..., :3] * (values[..., 3:] / 255.0)
    return (
        values[..., 0]
        if values.shape[2] < 3
        else cv2.cvtColor(np.ascontiguousarray(values[..., :3]), cv2.COLOR_BGR2GRAY)
    )


def sharpness(brightness: NDArray[np.float32]) -> float:
    """Variance of the Laplacian at 640 pixels or less; compare only pictures of the same scene."""
    height, width = brightness.shape
    factor = _LONG_SIDE / max(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        brightness = cv2.resize(brightness, size, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(brightness, cv2.CV_32F).var())


def blurred(values: dict[str, float]) -> list[str]:
    """Names of the pictures much less sharp than the others, worst first.

    Much less: under 40 % of the median and three deviations (of the logarithms, by their median) below it.
    """
    if len(values) < 5:
        return []
    logs = np.log(np.maximum(np.array(list(values.values())), 1e-3))
    middle = float(np.median(logs))
    deviation = 1.4826 * float(np.median(np.abs(logs - middle)))
    bound = min(middle + np.log(0.4), middle - 3 * deviation)
    return [name for name in sorted(values, key=lambda n: values[n]) if np.log(max(values[name], 1e-3)) < bound]
