"""Codebooks and palettes: near the best there is, and what they claim to be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from prismfield.export.clusters import codebook, nearest, palette
from prismfield.export.rows import morton_order
from prismfield.export.sog import default_palette

from .splat_assets import rms


def test_a_codebook_is_as_good_as_theory_says() -> None:
    """Panter and Dite: the error of the best one for a normal distribution is sqrt(3) pi / 2 / size^2."""
    values = np.random.default_rng(0).normal(size=200_000)
    book = codebook(values, 64)
    assert (np.diff(book) > 0).all()
    error = ((book[nearest(values, book)] - values) ** 2).mean()
    assert error == pytest.approx(np.sqrt(3) * np.pi / 2 / 64**2, rel=0.1)


def test_a_codebook_of_few_values_has_them() -> None:
    values = np.array([1.0, 5.0, -2.0, 5.0], np.float32)
    book = codebook(values)
    np.testing.assert_allclose(book[nearest(values, book)], values, atol=2e-3)
    assert (codebook(np.full(3, 7.0)) == 7).all()


def test_nearest_is_nearest() -> None:
    rng = np.random.default_rng(1)
    book, values = np.sort(rng.normal(size=40)), rng.normal(size=500) * 2
    np.testing.assert_array_equal(nearest(values, book), np.abs(values[:, None] - book).argmin(1))


def test_a_palette_is_nearly_as_good_as_plain_k_means() -> None:
    rng = np.random.default_rng(2)
    vectors = (rng.normal(size=(60, 9))[rng.integers(0, 60, 4000)] + 0.3 * rng.normal(size=(4000, 9))).astype(
        np.float32
    )
    table, labels = palette(vectors, 256)
    assert 240 <= len(table) <= 256 and labels.shape == (4000,)
    plain, which = kmeans2(vectors, 256, minit="++", rng=0)
    assert rms(table[labels] - vectors) < 1.05 * rms(plain[which] - vectors)
    assert rms(table[labels] - vectors) < 0.3


@pytest.mark.parametrize(("count", "size"), [(5, 9), (5, 5), (1, 1), (300, 1), (300, 299)])
def test_palettes_of_odd_sizes(count: int, size: int) -> None:
    vectors = np.random.default_rng(3).normal(size=(count, 4)).astype(np.float32)
    table, labels = palette(vectors, size)
    assert len(table) <= max(size, 1) and labels.max() < len(table)
    if size >= count:
        np.testing.assert_array_equal(table[labels], vectors)


def test_vectors_that_are_all_the_same() -> None:
    vectors = np.ones((500, 3), np.float32)
    table, labels = palette(vectors, 64)
    np.testing.assert_array_equal(table[labels], vectors)


def test_palette_sizes() -> None:
    assert [default_palette(n) for n in (1, 700, 1025, 26_895, 100_000, 10**7)] == [1, 700, 512, 8192, 32_768, 65_536]


def test_a_z_order_curve_visits_octants_one_after_the_other() -> None:
    means = np.random.default_rng(4).uniform(-1, 1, (2000, 3)).astype(np.float32)
    means[:2] = [[-1, -1, -1], [1, 1, 1]]
    ordered = means[morton_order(means)]
    octants = (ordered > 0) @ [1, 2, 4]
    assert (np.diff(octants) >= 0).all() and len(set(octants)) == 8
    assert (ordered[0] == -1).all() and (ordered[-1] == 1).all()
    fine = (ordered[octants == 0] > -0.5) @ [1, 2, 4]
    assert (np.diff(fine) >= 0).all()


def test_an_entry_is_the_mean_of_what_it_stands_for() -> None:
    random = np.random.default_rng(3)
    places = random.normal(size=(6, 5)).astype(np.float32) * 10
    vectors = (places[random.integers(0, 6, 3000)] + random.normal(size=(3000, 5)) * 0.01).astype(np.float32)
    table, labels = palette(vectors, 64)
    for entry in np.unique(labels):
        np.testing.assert_allclose(table[entry], vectors[labels == entry].mean(0), atol=0.02)
