"""The writing half of the entropy coder of .pfz; the reading half, and what both share, is `pfz_models.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prismfield.export.compression.pfz_models import STATE_MIN, TOTAL_BITS, Counts, Plane, blocks, lay_out


def plane_of(values: NDArray[np.int64], classes: int = 1, low: int | None = None) -> Plane:
    """The model that suits these integers, whose range must not exceed 256.

    Args:
        values: all that the file holds of them.
        classes: see `Plane`; none where there is but one value.
        low: the least value there may be; None for the least there is.
    """
    if len(values) == 0:
        return Plane(0, np.full(1, 255, np.uint8))
    low = int(values.min()) if low is None else low
    counts = np.bincount(values - low)
    if len(counts) > 256:
        raise ValueError(f"expected values within 256 of each other, got {len(counts)}")
    prior = np.ceil(255 * np.sqrt(counts / counts.max())).astype(np.uint8)
    return Plane(low, prior, classes if len(counts) > 1 else 1)


class Encoder:
    """Takes planes in the order in which `Decoder` reads them."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._steps: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = []  # (frequency, what lies below) of lanes

    def plane(
        self, plane: Plane, values: NDArray[np.int64], given: NDArray[np.int64] | None = None, givens: int = 1
    ) -> None:
        """What `Decoder.plane` gives back, `plane.low` added."""
        size, count = len(plane.prior), len(values)
        if size == 1 or count == 0:
            return
        symbols = values - plane.low
        (steps, lanes), near = lay_out(count, self._lanes), plane.near() * givens
        table = np.zeros(lanes * steps, np.int64)
        table[:count] = symbols
        symbols = table.reshape(lanes, steps).T.copy()
        contexts = np.zeros_like(symbols)
        if given is not None:
            table[:count] = given
            contexts = table.reshape(lanes, steps).T.copy()
        if plane.classes > 1:
            average = np.full(lanes, (size - 1) * 8, np.int64)
            for step in range(steps):
                contexts[step] += near[average >> 4]
                average = (average + (symbols[step] << 4)) >> 1
        there = (np.arange(lanes) * steps)[None] + np.arange(steps)[:, None] < count
        counts = Counts(plane.prior, givens * plane.classes)
        for start, stop in blocks(steps, lanes):
            frequencies, below = counts.frequencies()
            where = contexts[start:stop] * size + symbols[start:stop]
            pairs = frequencies.ravel()[where].astype(np.uint32), below.ravel()[where].astype(np.uint32)
            for step in range(start, stop):
                active = -(-(count - step) // steps)
                self._steps.append((pairs[0][step - start, :active], pairs[1][step - start, :active]))
            if stop < steps:  # lanes that have ended count as the decoder counts them: context 0, symbol 0
                some = there[start:stop]
                counts.add((contexts[start:stop] * some).ravel(), (symbols[start:stop] * some).ravel())

    def finish(self) -> bytes:
        """The states, then the words in the order in which they are read."""
        states = np.full(self._lanes, STATE_MIN, np.uint64)
        words: list[NDArray[np.uint16]] = []
        for frequency32, below32 in reversed(self._steps):
            frequency, below = frequency32.astype(np.uint64), below32.astype(np.uint64)
            now = states[: len(frequency)]
            full = now >= frequency << np.uint64(32 - TOTAL_BITS)
            words.append((now[full] & np.uint64(0xFFFF)).astype(np.uint16))
            now = np.where(full, now >> np.uint64(16), now)
            states[: len(frequency)] = ((now // frequency) << np.uint64(TOTAL_BITS)) + now % frequency + below
        self._steps.clear()
        stream = np.concatenate([np.zeros(0, np.uint16), *reversed(words)]).astype("<u2")
        return states.astype("<u4").tobytes() + stream.tobytes()
