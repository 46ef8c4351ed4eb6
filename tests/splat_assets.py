"""Splats for tests of file formats, and how far two of them are apart."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from prismfield.export.assets import SplatAsset


def make_splats(count: int = 700, degree: int = 3, seed: int = 0, *, antialiased: bool = False) -> SplatAsset:
    """Splats round (3, -1, 2) that differ along every axis, within what every format can hold but 0 and 1 as opacities."""
    rng = np.random.default_rng(seed)
    sh = rng.normal(0, 0.12, (count, (degree + 1) ** 2, 3)).clip(-0.9, 0.9)
    sh[:, 0] = rng.uniform(-1.5, 1.5, (count, 3))
    return SplatAsset.from_activated(
        rng.normal(size=(count, 3)) * [1.0, 0.6, 0.3] + [3.0, -1.0, 2.0],
        rng.normal(size=(count, 4)),
        np.exp(rng.normal(-2.8, 0.5, (count, 3))),
        np.concatenate([[0.0, 1.0], rng.uniform(0.05, 0.95, count - 2)])[:count],
        sh,
        antialiased=antialiased,
    )


def matched(asset: SplatAsset, again: SplatAsset) -> SplatAsset:
    """`again` with its rows in the order of those in `asset` that they are nearest to."""
    assert len(asset) == len(again)
    scale = np.ptp(asset.means, 0)
    rows = cKDTree(again.means / scale).query(asset.means / scale)[1]
    assert len(set(rows)) == len(rows), "two splats have the same nearest one"
    return again.take(rows)


def covariances(asset: SplatAsset) -> NDArray[np.float64]:
    """[N, 3, 3]: what a rotation and scales come to."""
    axes = Rotation.from_quat(asset.quats[:, [1, 2, 3, 0]]).as_matrix() * asset.scales[:, None].astype(np.float64)
    return axes @ axes.transpose(0, 2, 1)


def angles(a: SplatAsset, b: SplatAsset) -> NDArray[np.float64]:
    """[N] degrees between their rotations; half a turn about an axis of its own leaves a Gaussian what it is."""
    turns = Rotation.from_quat([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    ours, theirs = (Rotation.from_quat(x.quats[:, [1, 2, 3, 0]]) for x in (a, b))
    return np.degrees(np.min([((ours * turn).inv() * theirs).magnitude() for turn in turns], 0))


def rms(values: NDArray) -> float:
    return float(np.sqrt((np.asarray(values, np.float64) ** 2).mean()))


def assert_same_look(a: SplatAsset, b: SplatAsset, sh: float = 1e-5) -> None:
    """Same rows, within rounding, whatever turns quaternions are at."""
    np.testing.assert_allclose(a.means, b.means, atol=1e-4)
    np.testing.assert_allclose(covariances(a), covariances(b), rtol=1e-3, atol=1e-3 * np.abs(covariances(b)).max())
    np.testing.assert_allclose(a.opacities, b.opacities, atol=1e-5)
    np.testing.assert_allclose(a.sh, b.sh, atol=sh)


def splat_transform(*words: object) -> str:
    """What splat-transform says: `PRISMFIELD_SPLAT_TRANSFORM` or the one on the path. Skips where there is none."""
    program = os.environ.get("PRISMFIELD_SPLAT_TRANSFORM") or shutil.which("splat-transform")
    if program is None:
        pytest.skip("splat-transform is not installed: npm install @playcanvas/splat-transform")
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def without_up(asset: SplatAsset) -> SplatAsset:
    return replace(asset, up=None)


def write_spz_by_hand(path: Path, head: bytes, body: bytes) -> None:
    import gzip

    path.write_bytes(gzip.compress(head + body, 1))
