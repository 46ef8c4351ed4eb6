"""The rows of an asset: in pieces that bound the memory, and in an order in which neighbours resemble each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 1 << 16
_BITS = 21  # an axis; three fit into 64


def pieces(count: int, at_once: int = ROWS_AT_ONCE) -> Iterator[slice]:
    """Slices that cover rows 0 to `count`."""
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))


def morton_order(means: NDArray) -> NDArray[np.int64]:
    """[N] the rows along a Z-order curve through `means` [N, 3]; equal places keep their order."""
    low, high = means.min(0).astype(np.float64), means.max(0).astype(np.float64)
    steps = ((1 << _BITS) - 1) / np.where(high > low, high - low, 1)
    keys = np.zeros(len(means), np.uint64)
    for axis in range(3):
        cells = ((means[:, axis].astype(np.float64) - low[axis]) * steps[axis]).astype(np.uint64)
        keys |= _spread(cells) << np.uint64(axis)
    return np.argsort(keys, kind="stable")


def _spread(cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Two zero bits between one bit and the next of 21."""
    masks = 0x1F00000000FFFF, 0x1F0000FF0000FF, 0x100F00F00F00F00F, 0x10C30C30C30C30C3, 0x1249249249249249
    for shift, mask in zip((32, 16, 8, 4, 2), masks, strict=True):
        cells = (cells | (cells << np.uint64(shift))) & np.uint64(mask)
    return cells
