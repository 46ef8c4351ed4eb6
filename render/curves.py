"""Space-filling curves: along them, what is near in space is mostly near in order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BITS = 21  # a coordinate of three in 63 bits


def morton_codes(points: NDArray) -> NDArray[np.uint64]:
    """[N] places along a Z-curve through the box around the points.

    Args:
        points: [N, D], finite, D = 1 to 3.
    """
    if len(points) == 0:
        return np.zeros(0, np.uint64)
    low = points.min(0).astype(np.float64)
    extent = (points.max(0) - low).max()
    scale = ((1 << _BITS) - 1) / extent if extent > 0 else 0.0
    return interleave(((points - low) * scale).astype(np.uint64))


def interleave(cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[N] Morton codes of [N, D] cell numbers below 2^21, D = 1 to 3; the first axis has the lowest bits."""
    codes = np.zeros(len(cells), np.uint64)
    for axis in range(cells.shape[1]):
        codes |= _spread(cells[:, axis]) << np.uint64(axis)
    return codes


def deinterleave(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[N, 3] cell numbers of Morton codes below 2^63."""
    return np.stack([_gather(codes >> np.uint64(axis)) for axis in range(3)], 1)


_STEPS = (
    (32, 0x1F00000000FFFF),
    (16, 0x1F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


def _spread(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Two zero bits after each bit."""
    for shift, mask in _STEPS:
        x = (x | (x << np.uint64(shift))) & np.uint64(mask)
    return x


def _gather(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every third bit."""
    x = x & np.uint64(_STEPS[-1][1])
    for (shift, _), mask in zip(
        reversed(_STEPS), (*(mask for _, mask in reversed(_STEPS[:-1])), 0x1FFFFF), strict=True
    ):
        x = (x | (x >> np.uint64(shift))) & np.uint64(mask)
    return x


def hilbert_cells(count: int, width: int) -> NDArray[np.int64]:
    """[count] the cells of a grid, numbered line by line, in the order in which a Hilbert curve passes them.

    Args:
        count: how many cells there are; the last line may be short.
        width: cells in a line.
    """
    cells = np.arange(count)
    x, y = cells % width, cells // width
    side = 1 << max(int(max(width, -(-count // width)) - 1).bit_length(), 1)
    place = np.zeros(count, np.int64)
    half = side // 2
    while half > 0:
        right, down = (x & half) > 0, (y & half) > 0
        place += half * half * ((3 * right) ^ down)
        flip = ~down & right
        x, y = np.where(flip, side - 1 - x, x), np.where(flip, side - 1 - y, y)
        x, y = np.where(down, x, y), np.where(down, y, x)
        half //= 2
    return np.argsort(place, kind="stable")
