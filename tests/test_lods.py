"""Levels of detail: what merging keeps, how many are left, and that a level looks like the scene from farther away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.convert import ring_cameras
from prismfield.export.library import load, render, scene_of
from prismfield.export.lods.merge import _costs, _matching, _merged, _Splats, _thinned, build_levels, mean_areas
from prismfield.export.rows import morton_order
from prismfield.train.metrics import psnr

from .splat_assets import covariances, make_splats


def weights(asset: SplatAsset) -> NDArray[np.float64]:
    return asset.opacities * mean_areas(asset.scales.astype(np.float64))


def two(**values: object) -> SplatAsset:
    """Two Gaussians of low opacity that nothing is like."""
    asset = replace(
        make_splats(4, degree=3, seed=3).take(np.array([2, 3])), opacities=np.array([0.2, 0.05], np.float32)
    )
    return replace(asset, means=asset.means * np.float32(0.1), **values)  # type: ignore[arg-type]


def test_mean_area_is_that_of_projections_from_everywhere() -> None:
    rng = np.random.default_rng(0)
    scales = np.array([[1.0, 1.0, 1.0], [0.1, 2.0, 0.5], [0.0, 1.0, 3.0], [0.0, 0.0, 2.0]])
    dirs = rng.normal(size=(200_000, 3))
    dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
    for s, area in zip(scales, mean_areas(scales), strict=True):
        products = np.array([s[1] * s[2], s[0] * s[2], s[0] * s[1]])
        np.testing.assert_allclose(
            area, 2 * np.pi * np.linalg.norm(dirs * products, axis=1).mean(), rtol=3e-3, atol=1e-12
        )


def test_a_pair_becomes_what_sums_over_both_say() -> None:
    asset = two()
    one = build_levels(asset, 2)[1]
    share = weights(asset) / weights(asset).sum()
    means = asset.means.astype(np.float64)
    mean = share @ means
    offsets = means - mean
    expected = np.einsum("n,nij->ij", share, covariances(asset) + offsets[:, :, None] * offsets[:, None])
    np.testing.assert_allclose(one.asset.means[0], mean, rtol=1e-6)
    np.testing.assert_allclose(covariances(one.asset)[0], expected, rtol=1e-5, atol=1e-6 * expected.max())
    np.testing.assert_allclose(one.asset.sh[0], np.einsum("n,ntc->tc", share, asset.sh), atol=1e-6)
    np.testing.assert_allclose(weights(one.asset)[0], weights(asset).sum(), rtol=1e-5)
    np.testing.assert_allclose(one.errors[0], np.sqrt(share @ np.square(offsets).sum(1)), rtol=1e-5)


def test_a_cluster_of_many_keeps_its_moments() -> None:
    """Sixteen become one in several rounds, which comes to the same as all at once."""
    asset = replace(make_splats(16, degree=1), opacities=np.full(16, 0.02, np.float32))
    one = build_levels(asset, 3)[2]
    assert len(one.asset) == 1
    share = weights(asset) / weights(asset).sum()
    mean = share @ asset.means.astype(np.float64)
    offsets = asset.means - mean
    expected = np.einsum("n,nij->ij", share, covariances(asset) + offsets[:, :, None] * offsets[:, None])
    np.testing.assert_allclose(one.asset.means[0], mean, rtol=1e-5)
    np.testing.assert_allclose(covariances(one.asset)[0], expected, rtol=1e-4, atol=1e-5 * expected.max())
    np.testing.assert_allclose(one.asset.sh[0], np.einsum("n,ntc->tc", share, asset.sh), atol=1e-5)
    np.testing.assert_allclose(one.errors[0], np.sqrt(share @ np.square(offsets).sum(1)), rtol=1e-4)


def test_what_is_covered_stays_and_levels_are_quarters() -> None:
    asset = replace(make_splats(1001, degree=2), opacities=np.full(1001, 0.01, np.float32))
    levels = build_levels(asset, 4)
    assert [len(level.asset) for level in levels] == [1001, 251, 63, 16]
    assert levels[0].asset is asset and not levels[0].errors.any()
    for before, level in zip(levels, levels[1:], strict=False):
        assert level.asset.opacities.max() < 0.99
        np.testing.assert_allclose(weights(level.asset).sum(), weights(asset).sum(), rtol=1e-4)
        assert level.asset.sh.shape[1] == 9 and np.isfinite(level.errors).all()
        assert level.errors.mean() > before.errors.mean()


def test_opaque_ones_in_one_place_do_not_become_more_than_opaque() -> None:
    asset = replace(make_splats(64, degree=0), opacities=np.ones(64, np.float32))
    asset = replace(asset, means=np.zeros_like(asset.means))
    assert build_levels(asset, 2)[1].asset.opacities.max() == pytest.approx(0.99)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_few(count: int) -> None:
    asset = make_splats(8, degree=1).take(np.arange(count))
    levels = build_levels(asset, 5)
    assert len(levels[0].asset) == count
    assert [len(level.asset) for level in levels[1:]] == {5: [2, 1], 3: [1], 2: [1]}.get(count, [])
    with pytest.raises(ValueError, match="at least 1 level"):
        build_levels(asset, 0)


def test_all_alike_in_one_place_and_in_a_row() -> None:
    """Nothing tells neighbours apart: neither many rounds nor a number that is none."""
    one = make_splats(8, degree=1).take(np.zeros(3000, np.int64) + 2)
    row = replace(one, means=(np.arange(9000).reshape(3000, 3) // 3).astype(np.float32))
    invisible = replace(one, opacities=np.zeros(3000, np.float32), scales=np.zeros_like(one.scales))
    for asset in (one, row, invisible):
        levels = build_levels(asset, 3)
        assert [len(level.asset) for level in levels] == [3000, 750, 188]
        np.testing.assert_allclose(levels[2].asset.sh, np.broadcast_to(one.sh[:1], levels[2].asset.sh.shape), atol=1e-5)
    again = build_levels(one, 2)[1]
    np.testing.assert_allclose(again.asset.means, one.means[:750], rtol=1e-6)
    assert again.errors.max() < 1e-6


def test_the_same_twice_and_those_that_stay_untouched() -> None:
    asset = make_splats(500, degree=1)
    far = replace(asset, means=asset.means + np.where(np.arange(500) == 7, 1e4, 0)[:, None].astype(np.float32))
    a, b = build_levels(far, 2)[1], build_levels(far, 2)[1]
    for name in ("means", "quats", "scales", "opacities", "sh"):
        np.testing.assert_array_equal(getattr(a.asset, name), getattr(b.asset, name))
    kept = np.flatnonzero(a.errors == 0)
    rows = {bytes(x) for x in far.means}
    assert len(kept) and all(bytes(a.asset.means[k]) in rows for k in kept)


def test_matching_is_the_greedy_one() -> None:
    rng = np.random.default_rng(1)
    pairs = np.unique(np.sort(rng.integers(0, 60, (400, 2)), 1), axis=0)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    cost = rng.integers(0, 30, len(pairs)).astype(float)
    used: set[int] = set()
    expected = []
    for k in np.argsort(cost, kind="stable"):
        if not used & set(pairs[k].tolist()):
            used |= set(pairs[k].tolist())
            expected.append(k)
    np.testing.assert_array_equal(_matching(pairs[:, 0], pairs[:, 1], cost, 60), expected)


def test_two_of_one_shape_in_one_place_lose_nothing() -> None:
    """Whatever their colours: what they add up to is one Gaussian of the same shape."""
    asset = two()
    same = {name: getattr(asset, name)[[0, 0]] for name in ("means", "quats", "scales")}
    splats = _Splats.of(replace(asset, **same))  # type: ignore[arg-type]
    cost = _costs(splats, np.array([0]), np.array([1]))
    assert np.abs(asset.sh[0, 0] - asset.sh[1, 0]).max() > 0.3 and cost[0] < 1e-10
    assert _costs(_Splats.of(asset), np.array([0]), np.array([1]))[0] > 1e-3


def test_alike_ones_are_merged_first() -> None:
    """Red beside blue stays, red beside red does not, though it is farther away."""
    base = make_splats(8, degree=0).take(np.full(4, 2))
    sh = np.full((4, 1, 3), -1.5, np.float32)
    sh[:2, 0, 0], sh[2:, 0, 2] = 1.5, 1.5
    means = np.array([[0, 0, 0], [1.1, 0, 0], [1.0, 1, 0], [0, 1.0, 0]], np.float32) * base.scales.max()
    asset = replace(base, means=means, sh=sh)
    found = _thinned(_Splats.of(asset), 2).level(asset).asset
    assert np.abs(found.sh[:, 0, [0, 2]]).min() == pytest.approx(1.5, abs=1e-5)


def pictures(asset: SplatAsset, like: SplatAsset, width: int) -> torch.Tensor:
    """From three sides; antialiased, or many small Gaussians would be drawn larger than they are."""
    frame = scene_of(like, Path("x")).frame
    scene = scene_of(replace(asset, antialiased=True), Path("x"), frame=frame)
    with torch.no_grad():
        return torch.cat([render(scene, c.resized(width, width * 9 // 16)).rgb for c in ring_cameras(like)]).clamp(0, 1)


def in_pairs_along_a_curve(asset: SplatAsset) -> SplatAsset:
    """A quarter of them by merging neighbours along a curve, whatever they look like: what not to do."""
    for _ in range(2):
        order = morton_order(asset.means)
        splats = _Splats.of(asset.take(order))
        first = np.arange(0, len(order) - 1, 2)
        asset = _merged(splats, splats.weights, first, first + 1).level(asset).asset
    return asset


def test_flowers_look_the_same_from_twice_as_far(shared_data: Path) -> None:
    asset = load(shared_data / "splats" / "flowers_lod3_inria.ply").asset()
    assert isinstance(asset, SplatAsset)
    level = build_levels(asset, 2)[1].asset
    assert len(level) == 6724
    half = pictures(asset, asset, 320)
    drawn = pictures(level, asset, 320)
    found, blind = psnr(drawn, half), psnr(pictures(in_pairs_along_a_curve(asset), asset, 320), half)
    assert found > 39 and found > blind + 5, (found, blind)
    assert float(drawn.mean()) == pytest.approx(float(half.mean()), rel=0.02)
