"""Rows sorted into a 2D grid so that neighbours resemble each other: what an image codec then finds easy.

Parallel linear assignment sorting, from Self-Organizing Gaussian Grids (arXiv:2312.13299, section 3.2): the blurred grid says
what should lie where, and cells change places four at a time towards it, while the blur shrinks. Own departures: a start along
a space-filling curve of the first three columns, which spares the wide blurs; a box for the blur; and a fixed number of passes.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.render import kernels
from prismfield.render.curves import hilbert_cells, morton_codes

_LANES = 16  # floats of the widest vectors that kernels have: rows are padded to a multiple of it
_SHRINK = 0.8  # of the blur's radius, from one to the next
_ROWS_OF_WORK = 1 << 26  # rows that all passes together look at, about: 8 s on one core
_PASSES = (2, 8)  # at one radius: least and most
_ORDERS = np.array(list(permutations(range(4))))  # as kOrders in csrc/sort_grid.cpp


def sort_grid(
    features: NDArray, width: int, *, radius: int | None = None, seed: int = 0, is_sorted: bool = False
) -> NDArray[np.int64]:
    """An order in which rows laid out line by line resemble those beside, above and below them.

    Args:
        features: [N, C], finite; columns weigh by their variance, the first three (or fewer) also say where to start.
        width: cells in a line of the grid; the last line may be short.
        radius: of the first blur, cells; None for one that suits N.
        seed: of the shuffles. The same arguments give the same order, however many threads there are.
        is_sorted: rows come in an order to start from, as an earlier sort of much the same rows left them.

    Returns:
        [N] permutation: cell i (line i // width, column i % width) holds row `order[i]`.

    Raises:
        ValueError: `features` is not [N, C] with C > 0, a value is not finite, or `width` or `radius` is below 1.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features: expected [N, C], got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError("features: a value is not finite")
    if width < 1 or (radius is not None and radius < 1):
        raise ValueError(f"expected a width and a radius of at least 1, got {width} and {radius}")
    count = len(features)
    if count < 4:
        return np.arange(count)
    order = np.arange(count)
    if not is_sorted:
        order[hilbert_cells(count, width)] = np.argsort(morton_codes(features[:, :3]), kind="stable")
    grid = np.zeros((count, -(-features.shape[1] // _LANES) * _LANES), np.float32)
    grid[:, : features.shape[1]] = features[order] - features.mean(0)
    random = np.random.default_rng(seed)
    start = radius if radius is not None else max(2, min(24, min(width, count // width + 1) // 3))
    radii = _radii(start)
    passes = int(np.clip(_ROWS_OF_WORK // (count * len(radii)), *_PASSES))
    for size in radii:
        for _ in range(passes):
            targets = grid_blur(grid, width, size)
            side = 2 * size + 1
            shuffle = random.permutation(side * side)
            offset = (int(random.integers(side)), int(random.integers(side)))
            grid_exchange(grid, targets, order, shuffle, width, offset)
    return order


def grid_width(count: int) -> int:
    """Cells in a line of a grid for `count` rows that is about square: a multiple of four, as pictures of a .sog have it."""
    return max(4, -(-math.ceil(math.sqrt(count)) // 4) * 4)


def neighbor_distance(features: NDArray, width: int) -> float:
    """Mean squared distance between rows beside and below each other, laid out line by line; 0 where there are none."""
    count = len(features)
    beside = np.flatnonzero((np.arange(count - 1) + 1) % width) if count else np.arange(0)
    pairs = [(beside, beside + 1), (np.arange(max(count - width, 0)), np.arange(min(width, count), count))]
    squares = [np.square(features[a].astype(np.float64) - features[b]).sum(1) for a, b in pairs]
    found = np.concatenate(squares)
    return float(found.mean()) if len(found) else 0.0


def grid_blur(grid: NDArray[np.float32], width: int, radius: int) -> NDArray[np.float32]:
    """[N, C] means over boxes of 2 `radius` + 1 cells a side, over what of them is in the grid."""
    module: Any = kernels.kernels
    if kernels.enabled and module is not None:
        between, out = np.empty_like(grid), np.empty_like(grid)
        module.grid_blur(grid, between, out, width, radius)
        return out
    return grid_blur_reference(grid, width, radius)


def grid_blur_reference(grid: NDArray[np.float32], width: int, radius: int) -> NDArray[np.float32]:
    """What `grid_blur` computes, in NumPy: along the columns, then along the lines."""
    count, height = len(grid), -(-len(grid) // width)
    full = np.zeros((height * width, grid.shape[1]))
    full[:count] = grid
    there = (np.arange(height * width) < count).astype(np.float64)[:, None]
    values, weights = full.reshape(height, width, -1), there.reshape(height, width, 1)
    for axis in (0, 1):
        sums = _box(values, radius, axis) / np.maximum(_box(weights, radius, axis), 1)
        values = np.where(weights > 0, sums.astype(np.float32), 0)
    return values.reshape(height * width, -1)[:count].astype(np.float32)


def grid_exchange(
    grid: NDArray[np.float32],
    targets: NDArray[np.float32],
    order: NDArray[np.int64],
    shuffle: NDArray[np.int64],
    width: int,
    offset: tuple[int, int],
) -> None:
    """Cells change places, four at a time, so that they come nearest to `targets` in sum; in place.

    Args:
        grid: [N, C], C a multiple of 16; changed.
        targets: [N, C].
        order: [N], changed as the grid is.
        shuffle: permutation of the cells of a square block, row by row: in which order they form fours.
        width: cells in a line.
        offset: (x, y) how far outside the grid the first block begins.
    """
    side = int(np.sqrt(len(shuffle)))
    module: Any = kernels.kernels
    if kernels.enabled and module is not None:
        module.grid_exchange(grid, targets, order, shuffle, width, side, *offset)
    else:
        grid_exchange_reference(grid, targets, order, shuffle, width, offset)


def grid_exchange_reference(
    grid: NDArray[np.float32],
    targets: NDArray[np.float32],
    order: NDArray[np.int64],
    shuffle: NDArray[np.int64],
    width: int,
    offset: tuple[int, int],
) -> None:
    """What `grid_exchange` does, in NumPy."""
    count, side = len(grid), int(np.sqrt(len(shuffle)))
    height = -(-count // width)
    blocks_x, blocks_y = -(-(width + offset[0]) // side), -(-(height + offset[1]) // side)
    x = (np.arange(blocks_x) * side - offset[0])[None, :, None] + shuffle % side
    y = (np.arange(blocks_y) * side - offset[1])[:, None, None] + shuffle // side
    cells = (y * width + x).reshape(-1, len(shuffle))
    inside = ((x >= 0) & (x < width) & (y >= 0) & (y * width + x < count)).reshape(cells.shape)
    cells = np.take_along_axis(np.where(inside, cells, -1), np.argsort(~inside, 1, kind="stable"), 1)
    fours = cells[:, : len(shuffle) // 4 * 4].reshape(-1, 4)
    fours = fours[(fours >= 0).all(1)]
    products = np.einsum("nic,nkc->nik", grid[fours], targets[fours])
    totals = sum(products[:, _ORDERS[:, k], k] for k in range(4))
    from_ = np.take_along_axis(fours, _ORDERS[np.argmax(totals, 1)], 1)
    grid[fours], order[fours] = grid[from_], order[from_]


def _box(values: NDArray, radius: int, axis: int) -> NDArray:
    length = values.shape[axis]
    sums = np.concatenate([np.zeros_like(values.take([0], axis)), np.cumsum(values, axis)], axis)
    i = np.arange(length)
    return sums.take(np.minimum(i + radius + 1, length), axis) - sums.take(np.maximum(i - radius, 0), axis)


def _radii(start: int) -> list[int]:
    """Shrinking to 1, each once."""
    found = [start]
    while found[-1] > 1:
        found.append(min(found[-1] - 1, int(found[-1] * _SHRINK)))
    return found
