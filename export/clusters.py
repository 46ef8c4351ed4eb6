"""Few values that stand for many: numbers by a codebook, vectors by a palette. k-means, arranged so that it takes seconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prismfield.export.rows import pieces

_SAMPLE = 1 << 15
_ROUNDS = 5
_NEAREST_GROUPS = 4


def codebook(values: NDArray, size: int = 256, rounds: int = 20) -> NDArray[np.float32]:
    """[size] numbers in rising order so that the nearest of them is near to each of `values` in the mean of squares.

    Lloyd's algorithm on sorted values. It starts where the density to the power 1/3 puts them, which is best for many numbers
    (Panter and Dite, Quantization distortion in pulse-count modulation with nonuniform spacing of levels, 1951).
    """
    ordered = np.sort(values, None).astype(np.float64)
    low, high = ordered[0], ordered[-1]
    if low == high:
        return np.full(size, low, np.float32)
    counts, edges = np.histogram(ordered, 4096)
    reached = np.concatenate([[0], np.cumsum(counts ** (1 / 3))])
    centers = np.interp((np.arange(size) + 0.5) / size * reached[-1], reached, edges)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    for _ in range(rounds):
        ends = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(ordered)]])
        many = np.diff(ends)
        centers = np.where(many > 0, np.diff(sums[ends]) / np.maximum(many, 1), centers)
    return np.sort(centers).astype(np.float32)


def nearest(values: NDArray, book: NDArray) -> NDArray[np.int64]:
    """Which entry of the rising `book` is nearest to each value."""
    return np.searchsorted((book[1:].astype(np.float64) + book[:-1]) / 2, values)


def palette(vectors: NDArray[np.float32], size: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[size, D] vectors and for each of `vectors` [N, D] which one stands for it.

    In two levels: vectors fall into about sqrt(size) groups, each of which has a share of the palette. In the end a vector may
    also take what belongs to the groups that are next to its own. Costs about N sqrt(size) distances, not N size.
    """
    rng = np.random.default_rng(seed)
    count = len(vectors)
    if size >= count:
        return vectors.copy(), np.arange(count)
    groups = max(1, int(np.sqrt(size)))
    sample = vectors[rng.permutation(count)[:_SAMPLE]]
    middles = sample[rng.permutation(len(sample))[:groups]].copy()
    for _ in range(_ROUNDS):
        middles = _means(sample, _nearest_rows(sample, middles, 1)[:, 0], middles)
    close = _nearest_rows(vectors, middles, min(_NEAREST_GROUPS, len(middles)))
    members = _rows_by(close[:, 0], len(middles))
    shares = _shares(vectors, middles, members, size)
    entries = []
    for rows, share in zip(members, shares, strict=True):
        own = vectors[rows]
        book = own[rng.permutation(len(rows))[:share]].copy()
        for _ in range(_ROUNDS if share else 0):
            book = _means(own, _nearest_rows(own, book, 1)[:, 0], book)
        entries.append(book)
    table, starts = np.concatenate(entries), np.concatenate([[0], np.cumsum(shares)])
    labels = _assign(vectors, table, starts, close)
    table = _means(vectors, labels, table)
    return table, _assign(vectors, table, starts, close)


def _nearest_rows(vectors: NDArray, table: NDArray, many: int) -> NDArray[np.int64]:
    """[N, many] rows of `table` that are nearest to each vector, the nearest first."""
    norms = (table**2).sum(1)
    found = np.empty((len(vectors), many), np.int64)
    for rows in pieces(len(vectors), max(1, (1 << 22) // len(table))):
        distances = norms - 2 * (vectors[rows] @ table.T)
        if many == 1:
            found[rows, 0] = distances.argmin(1)
            continue
        some = np.argpartition(distances, many - 1, 1)[:, :many]
        order = np.take_along_axis(distances, some, 1).argsort(1)
        found[rows] = np.take_along_axis(some, order, 1)
    return found


def _rows_by(labels: NDArray, size: int) -> list[NDArray[np.int64]]:
    """The rows with label 0, with label 1, ..."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=size))[:-1])


def _means(vectors: NDArray, labels: NDArray, before: NDArray) -> NDArray:
    """Of the vectors with each label; `before` where there are none."""
    many = np.bincount(labels, minlength=len(before))
    order = np.argsort(labels, kind="stable")
    used = np.flatnonzero(many)
    starts = np.concatenate([[0], np.cumsum(many)[:-1]])[used]
    after = before.copy()
    after[used] = np.add.reduceat(vectors[order], starts, 0) / many[used, None]
    return after


def _shares(vectors: NDArray, middles: NDArray, members: list[NDArray], size: int) -> NDArray[np.int64]:
    """How many entries each group has: by the square root of its number times its sum of squares, at most one a vector."""
    many = np.array([len(rows) for rows in members])
    error = np.array([((vectors[rows] - middle) ** 2).sum() for rows, middle in zip(members, middles, strict=True)])
    weight = np.sqrt(many * error) + 1e-9 * many
    if not weight.any():
        return np.minimum(many, 1)
    shares = np.minimum(many, 1)
    for _ in range(20):  # what groups cannot take goes to the others
        left = size - shares.sum()
        open_ = weight * (shares < many)
        if left <= 0 or not open_.any():
            break
        shares = np.minimum(many, shares + np.floor(left * open_ / open_.sum()).astype(np.int64))
        if left == size - shares.sum():
            break
    return shares


def _assign(vectors: NDArray, table: NDArray, starts: NDArray, close: NDArray) -> NDArray[np.int64]:
    """The nearest entry among those of the groups `close` [N, M] to each vector."""
    best = np.full(len(vectors), np.inf, np.float32)
    labels = np.zeros(len(vectors), np.int64)
    norms = (table**2).sum(1)
    for rank in range(close.shape[1]):
        for group, rows in enumerate(_rows_by(close[:, rank], len(starts) - 1)):
            book = table[starts[group] : starts[group + 1]]
            if not len(book):
                continue
            for part in pieces(len(rows), max(1, (1 << 22) // len(book))):
                own = rows[part]
                distances = norms[starts[group] : starts[group + 1]] - 2 * (vectors[own] @ book.T)
                index = distances.argmin(1)
                least = np.take_along_axis(distances, index[:, None], 1)[:, 0]
                better = least < best[own]
                best[own[better]], labels[own[better]] = least[better], index[better] + starts[group]
    return labels
