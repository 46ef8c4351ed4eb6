"""A rotation as the three components of its quaternion that are smaller, each within 1/sqrt(2): the largest follows from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST = float(np.sqrt(0.5))
_OTHERS = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])


def split(quats: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which component of unit `quats` [N, 4] is largest, [N], and the others in their order [N, 3], that one made positive."""
    index = np.abs(quats).argmax(1)
    largest = np.take_along_axis(quats, index[:, None], 1)
    signs = np.where(largest < 0, -1.0, 1.0)
    return index, np.take_along_axis(quats.astype(np.float64), _OTHERS[index], 1) * signs


def join(index: NDArray, three: NDArray) -> NDArray[np.float64]:
    """[N, 4] quaternions from what `split` gave; those whose three are too long come out longer than 1."""
    quats = np.empty((len(index), 4))
    np.put_along_axis(quats, _OTHERS[index], three, 1)
    rest = np.sqrt(np.clip(1 - (three.astype(np.float64) ** 2).sum(1, keepdims=True), 0, None))
    np.put_along_axis(quats, index[:, None].astype(np.int64), rest, 1)
    return quats


def rounding(step: float) -> float:
    """How far a component of the quaternion may be off where the three are rounded to multiples of `step`.

    Each by half a step; the largest, at least 1/2, by three halves: its derivative by another is at most 1 in size.
    The unit length is restored afterwards, which moves nothing further than the error was long.
    """
    return 2.5 * step
