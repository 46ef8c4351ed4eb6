"""The entropy coder of .pfz: many interleaved rANS states and counts that learn as they go (docs/format-pfz.md, "Planes").

rANS: asymmetric numeral systems with a range (Duda, arXiv:1311.2540), interleaved as in Giesen's "Interleaved entropy coders"
(arXiv:1402.3392), here wide enough for NumPy: a step codes one symbol of each lane. All is integers: it decodes to the same
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.render import kernels

TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS
STATE_MIN = 1 << 16  # states lie in [2^16, 2^32) between symbols
_SEEN = 32  # what a symbol adds to its count
_PRIOR = 1024  # sum of the counts that the header's prior starts with, about
_BLOCK = 1 << 14  # symbols after which counts become frequencies, once there are so many


@dataclass(frozen=True)
class Plane:
    """How the symbols of one attribute are modelled, for all chunks."""

    low: int
    """What symbol 0 stands for."""
    prior: NDArray[np.uint8]
    """[A] square roots of how often each symbol occurs, the largest being 255; A = 1 to 256. A = 1 takes no space."""
    classes: int = 1
    """Of the neighbour before it in the lane: that many contexts."""

    def near(self) -> NDArray[np.int64]:
        """[A] the class of a neighbour with each symbol: about as many neighbours are of each."""
        counts = self.prior.astype(np.int64) ** 2 + 1
        middles = np.cumsum(counts) - counts // 2
        return np.minimum(middles * self.classes // counts.sum(), self.classes - 1)


def lay_out(count: int, lanes: int) -> tuple[int, int]:
    """(steps, lanes in use): lane k has the symbols k * steps to (k + 1) * steps - 1, the last one fewer."""
    steps = max(1, -(-count // lanes))
    return steps, -(-count // steps)


def blocks(steps: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Steps [start, stop) that are coded with the same frequencies: ever longer ones up to about 16384 symbols."""
    start, length, longest = 0, 1, max(1, _BLOCK // lanes)
    while start < steps:
        yield start, min(start + length, steps)
        start, length = start + length, min(max(start + length, 1), longest)


class Counts:
    """How often each symbol was seen in each context, and the frequencies made of that."""

    def __init__(self, prior: NDArray[np.uint8], contexts: int) -> None:
        weights = prior.astype(np.int64) ** 2
        start = 1 + weights * _PRIOR // max(int(weights.sum()), 1)
        self.counts = np.repeat(start[None], contexts, 0)

    def add(self, contexts: NDArray[np.int64], symbols: NDArray[np.int64]) -> None:
        """Learn these."""
        size = self.counts.shape
        self.counts += _SEEN * np.bincount(contexts * size[1] + symbols, minlength=self.counts.size).reshape(size)

    def frequencies(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([contexts, A] of at least 1 that sum to 4096, [contexts, A] what lies below each)."""
        symbols = self.counts.shape[1]
        found = 1 + self.counts * (TOTAL - symbols) // self.counts.sum(1, keepdims=True)
        rows = np.arange(len(found))
        found[rows, self.counts.argmax(1)] += TOTAL - found.sum(1)
        return found, np.cumsum(found, 1) - found


class Decoder:
    """Reads planes one after the other."""

    def __init__(self, data: bytes, lanes: int) -> None:
        """Take the states from the front of `data`.

        Raises:
            ValueError: there are too few bytes.
        """
        if len(data) < 4 * lanes or len(data) % 2:
            raise ValueError("a chunk is too short for its lanes")
        self._states = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
        self._words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint16)
        self._at, self._lanes = 0, lanes
        if (self._states < STATE_MIN).any():
            raise ValueError("a chunk begins with a state that cannot be")

    def finish(self) -> None:
        """Raise a ValueError unless all was read, and every state is what an encoder starts from."""
        if self._at != len(self._words) or (self._states != STATE_MIN).any():
            raise ValueError("a chunk does not end where its symbols end")

    def plane(
        self, plane: Plane, count: int, given: NDArray[np.int64] | None = None, givens: int = 1
    ) -> NDArray[np.int64]:
        """[count] symbols, `plane.low` not yet added.

        Args:
            plane: its model.
            count: how many.
            given: [count] context of each, below `givens`, known from other planes; None: the same for all.
            givens: how many there are.
        """
        size, out = len(plane.prior), np.zeros(count, np.int64)
        if size == 1 or count == 0:
            return out
        known = np.zeros(count, np.int64) if given is None else given
        if known.min() < 0 or known.max() >= givens:
            raise ValueError("a chunk's symbols cannot be")
        module: Any = kernels.kernels
        if kernels.enabled and module is not None:
            start, near = Counts(plane.prior, 1).counts[0], plane.near() * givens
            shape = givens * plane.classes, known, lay_out(count, self._lanes)[0], out
            self._at = module.pfz_plane(self._states, self._words, self._at, start, near, *shape)
            if self._at < 0:
                raise ValueError("a chunk ends before its symbols do")
            return out
        return self._plane_reference(plane, known, givens)

    def _plane_reference(self, plane: Plane, known: NDArray[np.int64], givens: int) -> NDArray[np.int64]:
        """What `plane` does, in NumPy."""
        count, size, near = len(known), len(plane.prior), plane.near() * givens
        steps, lanes = lay_out(count, self._lanes)
        counts = Counts(plane.prior, givens * plane.classes)
        # Lane by lane, the last one filled up: row = lane, column = step.
        padded = np.zeros(lanes * steps, np.int64)
        padded[:count] = known
        known = padded.reshape(lanes, steps).T.copy()
        symbols, contexts = np.zeros((steps, lanes), np.int64), np.zeros((steps, lanes), np.int64)
        average = np.full(lanes, (size - 1) * 8, np.int64)
        for start, stop in blocks(steps, lanes):
            frequencies, below = counts.frequencies()
            slots = np.stack([np.repeat(np.arange(size), row) for row in frequencies])
            for step in range(start, stop):
                active = -(-(count - step) // steps)
                row = known[step, :active] + near[average[:active] >> 4]
                found = self._step(slots, frequencies, below, row)
                contexts[step, :active], symbols[step, :active] = row, found
                average[:active] = (average[:active] + (found << 4)) >> 1
            if stop < steps:
                counts.add(contexts[start:stop].ravel(), symbols[start:stop].ravel())
        return symbols.T.ravel()[:count]

    def _step(
        self, slots: NDArray[np.int64], frequencies: NDArray[np.int64], below: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """One symbol of each of the first lanes, `row` their contexts; `slots` [contexts, 4096] says whose a state's low bits are."""
        states = self._states[: len(row)].astype(np.int64)
        slot = states & (TOTAL - 1)
        symbols = slots[row, slot]
        states = frequencies[row, symbols] * (states >> TOTAL_BITS) + slot - below[row, symbols]
        low = np.flatnonzero(states < STATE_MIN)
        if self._at + len(low) > len(self._words):
            raise ValueError("a chunk ends before its symbols do")
        states[low] = (states[low] << 16) | self._words[self._at : self._at + len(low)]
        self._at += len(low)
        self._states[: len(row)] = states
        return symbols
