"""Sorting into a grid: a permutation that brings alike rows together, the same each time; kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prismfield.render import kernels as kernels_module
from prismfield.render import sort_grid as module
from prismfield.render.curves import deinterleave, hilbert_cells, interleave, morton_codes
from prismfield.render.sort_grid import grid_blur, grid_blur_reference, neighbor_distance, sort_grid

SIZES = [(4, 2), (7, 3), (63, 8), (64, 8), (1, 1), (150, 1), (150, 150), (151, 150), (999, 31)]


def rows(count: int, columns: int = 16, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, columns)).astype(np.float32)


def surface(count: int) -> NDArray[np.float32]:
    """Points of a wavy sheet in space, each with a colour that changes smoothly along it."""
    u, v = np.random.default_rng(1).uniform(-1, 1, (2, count))
    return np.stack([u, v, 0.3 * np.sin(4 * u), np.sin(3 * u + v), np.cos(2 * v)], 1).astype(np.float32)


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_blur(level: str, count: int, width: int) -> None:
    grid = rows(count)
    for radius in (1, 3, 200):
        ours = grid_blur(grid, width, radius)
        np.testing.assert_allclose(ours, grid_blur_reference(grid, width, radius), atol=1e-6)
    column = np.arange(count) % width
    wide = np.stack([grid[column == c].mean(0) for c in range(min(width, count))])
    if count % width == 0 or width == 1:  # with a full last line, a wide blur is the mean of all
        np.testing.assert_allclose(ours[0], wide.mean(0), atol=1e-5)


@pytest.mark.parametrize(("count", "width"), SIZES)
@pytest.mark.parametrize(("side", "offset"), [(3, (0, 0)), (5, (4, 2)), (9, (8, 8)), (160, (0, 0))])
def test_exchange(level: str, count: int, width: int, side: int, offset: tuple[int, int]) -> None:
    random = np.random.default_rng(2)
    shuffle, targets, grid = random.permutation(side * side), rows(count, seed=3), rows(count)
    results = []
    for exchange in (module.grid_exchange, module.grid_exchange_reference):
        ours, order = grid.copy(), np.arange(count)
        exchange(ours, targets, order, shuffle, width, offset)
        np.testing.assert_array_equal(ours, grid[order])
        results.append(order)
    np.testing.assert_array_equal(*results)
    assert count < 999 or (results[0] != np.arange(count)).mean() > 0.4


def test_exchange_takes_the_best_of_24_orders() -> None:
    targets, grid, order = rows(4), rows(4, seed=1), np.arange(4)
    module.grid_exchange(grid, targets, order, np.arange(4), 2, (0, 0))
    best = min(np.square(rows(4, seed=1)[list(p)] - targets).sum() for p in module.permutations(range(4)))
    assert np.square(grid - targets).sum() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("count", "width"), [(0, 1), (1, 1), (2, 5), (3, 1), *SIZES])
def test_an_order_is_a_permutation(count: int, width: int) -> None:
    order = sort_grid(rows(count, 5), width)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_neighbors_resemble_each_other() -> None:
    features, width = surface(3000), 55
    along = features[np.argsort(morton_codes(features[:, :3]))]
    ours = features[sort_grid(features, width)]
    assert neighbor_distance(features, width) > 2.5
    assert neighbor_distance(ours, width) < 0.25 * neighbor_distance(along, width)
    columns = np.zeros_like(features)
    columns[0, 0], columns[55, 1] = 1, 1  # alone, each is different from two neighbours beside or below, or three
    assert neighbor_distance(columns, width) == pytest.approx(5 / (2 * 3000 - 55 - 55))


def test_the_same_order_each_time_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    features = surface(700)
    first = sort_grid(features, 27)
    np.testing.assert_array_equal(sort_grid(features, 27), first)
    assert (sort_grid(features, 27, seed=1) != first).any()
    if kernels_module.kernels is not None:
        threads = kernels_module.kernels.num_threads()
        kernels_module.kernels.set_num_threads(3)
        try:
            np.testing.assert_array_equal(sort_grid(features, 27), first)
        finally:
            kernels_module.kernels.set_num_threads(threads)
    monkeypatch.setattr(kernels_module, "kernels", None)
    slow = sort_grid(features, 27)
    assert neighbor_distance(features[slow], 27) < 1.2 * neighbor_distance(features[first], 27)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"features: expected \[N, C\], got \[3\]"):
        sort_grid(np.zeros(3), 1)
    with pytest.raises(ValueError, match="not finite"):
        sort_grid(np.full((5, 2), np.nan), 1)
    with pytest.raises(ValueError, match="got 0 and None"):
        sort_grid(np.zeros((5, 2)), 0)


def test_curves() -> None:
    cells = np.random.default_rng(0).integers(0, 1 << 21, (200, 3)).astype(np.uint64)
    np.testing.assert_array_equal(deinterleave(interleave(cells)), cells)
    bits = [[int(c) >> b & 1 for b in range(21) for c in cell] for cell in cells[:5]]
    wanted = [sum(bit << place for place, bit in enumerate(row)) for row in bits]
    np.testing.assert_array_equal(interleave(cells[:5]), np.array(wanted, np.uint64))
    path = hilbert_cells(16 * 16, 16)
    steps = np.abs(np.diff(path // 16)) + np.abs(np.diff(path % 16))
    assert (steps == 1).all() and len(set(path.tolist())) == 256
