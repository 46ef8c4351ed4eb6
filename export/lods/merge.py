"""Levels of detail: Gaussians that resemble each other become one, until a quarter of them is left.

In each round every Gaussian is compared with its nearest neighbours, and the pairs that lose least by becoming one do so. What
a pair becomes has its mean and covariance (moment matching), and covers as much of a picture as the two together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import elliprg

from prismfield.export.assets import SplatAsset
from prismfield.export.rows import morton_order, pieces
from prismfield.render.ops.constants import ALPHA_MAX

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

RATIO = 4
"""How many times fewer Gaussians each level has than the one before."""
_NEIGHBORS = 6
_COVERAGE = 0.5  # what a difference in coverage counts beside one in red, green or blue
_C0 = 0.28209479177387814  # the harmonic of degree 0
_TINY = 1e-200
_SYM_ROWS, _SYM_COLUMNS = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
_PLANES = (
    (0, 1, 0, 1, 3),
    (0, 2, 0, 2, 5),
    (1, 2, 3, 4, 5),
)  # two axes, and where xx, xy, yy of them are among the six


@dataclass(frozen=True)
class Level:
    """One level of detail."""

    asset: SplatAsset
    errors: NDArray[np.float32]
    """[N] user units: root mean square distance of the centres that a Gaussian stands for from its own, by what they cover."""


@dataclass(frozen=True)
class _Splats:
    """What merging needs to know; float64 but for `sh`."""

    means: Doubles
    """[N, 3]."""
    covariances: Doubles
    """[N, 6]: xx, xy, xz, yy, yz, zz."""
    quats: Doubles
    """[N, 4] wxyz."""
    scales: Doubles
    """[N, 3]."""
    areas: Doubles
    """[N] see `mean_areas`."""
    opacities: Doubles
    """[N]."""
    sh: NDArray[np.float32]
    """[N, T, 3]."""
    squares: Doubles
    """[N] square of what `Level.errors` says."""

    @classmethod
    def of(cls, asset: SplatAsset) -> Self:
        """Those of an asset, which stand for themselves."""
        scales, quats = asset.scales.astype(np.float64), asset.quats.astype(np.float64)
        return cls(
            asset.means.astype(np.float64),
            covariances_of(quats, scales),
            quats,
            scales,
            mean_areas(scales),
            asset.opacities.astype(np.float64),
            asset.sh,
            np.zeros(len(asset)),
        )

    @property
    def weights(self) -> Doubles:
        """[N] what each covers of a picture: opacity times area."""
        return self.opacities * self.areas

    def level(self, like: SplatAsset) -> Level:
        asset = SplatAsset.from_activated(
            self.means,
            self.quats,
            self.scales,
            self.opacities,
            self.sh,
            up=like.up,
            antialiased=like.antialiased,
        )
        return Level(asset, np.sqrt(self.squares).astype(np.float32))


def build_levels(asset: SplatAsset, count: int) -> list[Level]:
    """The asset, and coarser and coarser versions of it, each with a quarter of the Gaussians of the one before, rounded up.

    Costs O(N log N) time. Gaussians that have not become part of another are bit by bit those of the level before; in what
    order a level is, means nothing. Columns in `extra` are left out of coarser levels.

    Args:
        asset: the finest level.
        count: how many levels at most, the asset among them; there are fewer if one is down to a single Gaussian.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 level, got {count}")
    levels = [Level(asset, np.zeros(len(asset), np.float32))]
    splats = _Splats.of(asset) if count > 1 else None
    while len(levels) < count and len(levels[-1].asset) > 1:
        assert splats is not None
        splats = _thinned(splats, -(-len(levels[-1].asset) // RATIO))
        levels.append(splats.level(asset))
    return levels


def mean_areas(scales: Doubles) -> Doubles:
    """[N] area under the projection of each Gaussian of opacity 1, the mean over all directions that it may be seen from.

    Along a unit vector d the projection's area is 2 pi sqrt(|S| d' S^-1 d), S the covariance; with the three products of two
    eigenvalues of S that is 2 pi sqrt(x dx^2 + y dy^2 + z dz^2), whose mean over d is Carlson's R_G(x, y, z) (DLMF 19.16.2_5).

    Args:
        scales: [N, 3] standard deviations.
    """
    x, y, z = np.square(scales).T
    return 2 * np.pi * np.asarray(elliprg(y * z, x * z, x * y))


def _thinned(splats: _Splats, target: int) -> _Splats:
    """Down to `target`. A round merges a third of them at least, for the candidates include a path through all."""
    while (count := len(splats.means)) > target:
        first, second = _candidates(splats.means)
        chosen = _matching(first, second, _costs(splats, first, second), count)[: count - target]
        splats = _merged(splats, splats.weights, first[chosen], second[chosen])
    return splats


def _candidates(means: Doubles) -> tuple[Longs, Longs]:
    """[E] and [E]: pairs of neighbours, each once, the smaller index first."""
    count = len(means)
    _, near = cKDTree(means).query(means, k=min(_NEIGHBORS + 1, count), workers=torch.get_num_threads())
    # Many in one place all have the same few nearest neighbours; along the curve each has one of its own
    path = morton_order(means)
    a = np.concatenate([np.repeat(np.arange(count), near.shape[1]), path[:-1]])
    b = np.concatenate([near.reshape(-1), path[1:]])
    low, high = np.minimum(a, b), np.maximum(a, b)
    keys = np.sort((low * count + high)[low < high])
    keys = keys[np.concatenate([[True], keys[1:] > keys[:-1]])]
    # In any order but that of the rows: where many pairs cost the same, few of the first would be without a rival
    keys = keys[np.random.default_rng(0).permutation(len(keys))]
    return keys // count, keys % count


def _colors(splats: _Splats) -> Doubles:
    """[N, 4] colour from everywhere, and a constant for what is covered at all."""
    rgb = np.maximum(0.5 + _C0 * splats.sh[:, 0].astype(np.float64), 0)
    return np.concatenate([rgb, np.full((len(rgb), 1), _COVERAGE)], 1)


def _joined(splats: _Splats, weights: Doubles, i: Longs, j: Longs) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """Moments of pairs: share of the first [E, 1], way from the first to the second [E, 3], mean [E, 3], covariance [E, 6]."""
    total = weights[i] + weights[j]
    share = np.where(total > 0, weights[i] / np.where(total > 0, total, 1), 0.5)[:, None]
    way = splats.means[j] - splats.means[i]
    spread = way[:, _SYM_ROWS] * way[:, _SYM_COLUMNS]
    inside = share * splats.covariances[i] + (1 - share) * splats.covariances[j]
    return share, way, splats.means[i] + (1 - share) * way, inside + share * (1 - share) * spread


def _costs(splats: _Splats, first: Longs, second: Longs) -> Doubles:
    """[E] of all pairs, a piece at a time, on as many threads as torch has."""
    weights, colors = splats.weights, _colors(splats)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = pool.map(lambda rows: _cost(splats, weights, colors, first[rows], second[rows]), pieces(len(first)))
        return np.concatenate(list(found))


def _cost(splats: _Splats, weights: Doubles, colors: Doubles, i: Longs, j: Longs) -> Doubles:
    """[E] what pairs lose by becoming one: a difference of pictures, relative to what the pictures show.

    The pictures are projections along the three axes, of colour and coverage, Gaussians added up; the squared difference of
    two sums of Gaussians has a closed form. Being relative it prefers neither large nor small ones, which are near to the
    camera or far, nobody knows.
    """
    share, way, _, covariances = _joined(splats, weights, i, j)
    ours, theirs = splats.covariances[i], splats.covariances[j]
    covered = splats.opacities[i] * _axis_areas(ours) + splats.opacities[j] * _axis_areas(theirs)
    opacity = np.minimum(covered / np.maximum(_axis_areas(covariances), _TINY), ALPHA_MAX)[:, None]
    both = splats.opacities[i, None] * colors[i], splats.opacities[j, None] * colors[j]
    one = opacity * (share * colors[i] + (1 - share) * colors[j])
    a_a, b_b, m_m = ((x * x).sum(1) for x in (*both, one))
    a_b, a_m, b_m = ((x * y).sum(1) for x, y in (both, (both[0], one), (both[1], one)))
    lost = np.zeros(len(i))
    for plane in _PLANES:
        a, b, m = (_planar(x, plane) for x in (ours, theirs, covariances))
        lost += np.pi * (a_a * a[3] + b_b * b[3] + m_m * m[3])
        lost += 2 * a_b * _overlap(a, b, way, plane, 1.0)
        lost -= 2 * a_m * _overlap(a, m, way, plane, 1 - share[:, 0])
        lost -= 2 * b_m * _overlap(b, m, way, plane, share[:, 0])
    shown = splats.opacities[i] * weights[i] + splats.opacities[j] * weights[j]
    return np.maximum(lost, 0) / np.maximum(shown, _TINY)


def _planar(covariances: Doubles, plane: tuple[int, ...]) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """xx, xy, yy and the square root of the determinant in a plane of two axes, each [E]."""
    xx, xy, yy = (covariances[:, k] for k in plane[2:])
    return xx, xy, yy, np.sqrt(np.maximum(xx * yy - xy * xy, 0))


def _axis_areas(covariances: Doubles) -> Doubles:
    """[E] mean over the three axes of the area of the projection."""
    return 2 * np.pi / 3 * sum((_planar(covariances, plane)[3] for plane in _PLANES), np.zeros(len(covariances)))


def _overlap(
    a: tuple[Doubles, ...], b: tuple[Doubles, ...], way: Doubles, plane: tuple[int, ...], part: Doubles | float
) -> Doubles:
    """[E] integral of the product of two Gaussians with peaks of 1, `part` of the way apart."""
    xx, xy, yy = (u + v for u, v in zip(a[:3], b[:3], strict=True))
    determinant = np.maximum(xx * yy - xy * xy, _TINY)
    dx, dy = way[:, plane[0]] * part, way[:, plane[1]] * part
    distance = (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / determinant
    return 2 * np.pi * a[3] * b[3] / np.sqrt(determinant) * np.exp(-0.5 * distance)


def _matching(first: Longs, second: Longs, cost: Doubles, count: int) -> Longs:
    """Which pairs a greedy choice takes, the cheapest first, so that nobody is in two: the cheapest of all, and so on.

    Many at a time: whatever is the cheapest left to both of its ends will be taken in any case.
    """
    order = np.argsort(cost, kind="stable")
    left, taken = order, []
    while len(left):
        ranks = np.arange(len(left))
        best = np.full((2, count), len(left))
        for side, ends in enumerate((first, second)):
            best[side, ends[left][::-1]] = ranks[::-1]  # of several the last is kept: the cheapest
        cheapest = best.min(0)
        wins = (cheapest[first[left]] == ranks) & (cheapest[second[left]] == ranks)
        taken.append(left[wins])
        is_free = np.ones(count, bool)
        is_free[first[left[wins]]] = is_free[second[left[wins]]] = False
        left = left[is_free[first[left]] & is_free[second[left]]]
    chosen = np.concatenate(taken) if taken else np.zeros(0, np.int64)
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return chosen[np.argsort(ranks[chosen])]


def _merged(splats: _Splats, weights: Doubles, i: Longs, j: Longs) -> _Splats:
    """With the pairs (i, j) as one each, behind the others."""
    share, way, means, covariances = _joined(splats, weights, i, j)
    quats, scales = _axes(covariances)
    areas = mean_areas(scales)
    covered = weights[i] + weights[j]
    part = share.astype(np.float32)[:, :, None]
    distances = np.square(way).sum(1)
    a = share[:, 0]
    merged = _Splats(
        means,
        covariances,
        quats,
        scales,
        areas,
        np.minimum(covered / np.maximum(areas, _TINY), ALPHA_MAX),
        part * splats.sh[i] + (1 - part) * splats.sh[j],
        a * splats.squares[i] + (1 - a) * splats.squares[j] + a * (1 - a) * distances,
    )
    others = np.ones(len(weights), bool)
    others[i] = others[j] = False
    both = ((f.name, getattr(splats, f.name)[others], getattr(merged, f.name)) for f in fields(splats))
    return replace(merged, **{name: np.concatenate([kept, new]) for name, kept, new in both})


def covariances_of(quats: Doubles, scales: Doubles) -> Doubles:
    """[N, 6]: xx, xy, xz, yy, yz, zz; of unit `quats` [N, 4] wxyz and standard deviations [N, 3]."""
    w, x, y, z = quats.T
    turn = np.empty((len(quats), 3, 3))
    turn[:, 0] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], 1)
    turn[:, 1] = np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], 1)
    turn[:, 2] = np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1)
    axes = turn * scales[:, None]
    return (axes @ axes.transpose(0, 2, 1))[:, _SYM_ROWS, _SYM_COLUMNS]


def _axes(covariances: Doubles) -> tuple[Doubles, Doubles]:
    """Quaternions [N, 4] wxyz and standard deviations [N, 3] of covariances [N, 6]."""
    from scipy.spatial.transform import Rotation

    if not len(covariances):
        return np.zeros((0, 4)), np.zeros((0, 3))
    squares, turns = np.linalg.eigh(covariances[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3))
    turns[np.linalg.det(turns) < 0] *= -1
    return Rotation.from_matrix(turns).as_quat()[:, [3, 0, 1, 2]], np.sqrt(np.maximum(squares, 0))
