"""Rounding of a radiance field's tables: steps by what each level matters, and numbers that nothing depends on to the cheapest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prismfield.encodings.grid import Grid
from prismfield.export.compression.field_importance import grids_of
from prismfield.export.compression.field_pfz import CAMERA, FieldAsset, Level
from prismfield.export.compression.field_pfz_write import Tables
from prismfield.export.library import Scene
from prismfield.render.cameras import Cameras
from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.fields import Field

LIKE = 5e-5
"""Mean squared error of the pictures that rounding aims at where it is as coarse as usual: 43 dB."""
_CAMERAS = 32
MOST = 127
"""Largest magnitude of a symbol."""
_TRADE, _TRUST = 0.03, 0.7
"""Squared error that a bit is worth, by step^2, and the power of a number's importance that counts for it. Where pictures changed
in proportion to numbers these were ln 2 / 6 (Gish and Pierce 1968) and 1; but a number that becomes 0 goes far, and importance is
an estimate. On a hash field of the lego 1.05 MB are 43.1 dB like the original with these, 41.3 dB without any of it."""
_PROPOSED = 0.3  # step of the logarithm of a proposal's density
_TRIED = 0.9 ** np.arange(24)  # scales, by that which holds the largest number
_LOOKED_AT = 20_000  # rows that say which scale is best
_DERIVED = ("unbounded", "grid.", "proposals.progress", "encoding.active", "encoding.shares")
_DERIVED_HOLLOW = ("encoding.split", "encoding.dual", "encoding.kept", "encoding.steps", "encoding.cut")


def asset_of_field(scene: Scene) -> FieldAsset:
    """Everything that is needed to draw a field, on the CPU, and some of the cameras that it was photographed by.

    Args:
        scene: made of a field; cameras are left out where its capture is not at hand any more.

    Raises:
        ValueError: it has networks that are not ours.
    """
    field: Any = scene.representation
    name = next(name for name, kind in REPRESENTATIONS.items() if type(field) is kind)
    held = {key: value.cpu() for key, value in field.tensors().items()}
    tensors: dict[str, NDArray[np.float32]] = {}
    for key, value in held.items():
        if key.endswith((".table", "_mlp.weights")):
            tensors[key] = value.float().numpy().copy()
        elif not key.startswith((*_DERIVED, *_DERIVED_HOLLOW)):
            raise ValueError(f"a field with {key} cannot be compressed: only our own grids and networks can")
    if "encoding.shares" in held:
        tensors["encoding.grids.0.table"] *= held["encoding.shares"].numpy()[:, None]
    if "encoding.kept" in held:
        mask = tensors["encoding.mask.table"]
        np.multiply(np.maximum(mask, 0), held["encoding.kept"].numpy()[:, None], out=mask)
    active = int(held.get("encoding.active", 0))
    occupied, aabb = field.grid.occupied.cpu().numpy(), held["grid.aabb"].numpy()
    try:
        cameras = scene.cameras("train") if scene.has_cameras else []
    except OSError:
        cameras = []
    inwards = bool(cameras) and scene.looks_inwards
    chosen = np.linspace(0, len(cameras) - 1, min(len(cameras), _CAMERAS)).round().astype(int)
    rows = np.array([_row(scene.frame.cameras_to_scene(cameras[i])) for i in chosen], np.float32).reshape(-1, CAMERA)
    flags = bool(held["unbounded"]), active
    return FieldAsset(name, field.config, scene.frame, scene.background, aabb, *flags, occupied, rows, inwards, tensors)


def _row(camera: Cameras) -> NDArray[np.float32]:
    """[18] as a file has it."""
    K = camera.Ks[0].float().numpy()
    rest = [K[0, 0], K[1, 1], K[0, 2], K[1, 2], camera.width, camera.height]
    return np.concatenate([camera.viewmats[0, :3].float().numpy().ravel(), rest]).astype(np.float32)


class Quantiser:
    """A field's tables and what matters of them, to be rounded in several ways."""

    def __init__(self, field: Field, asset: FieldAsset, weights: dict[str, Tensor]) -> None:
        """Nothing is rounded yet.

        Args:
            field: made of `asset`.
            asset: the field.
            weights: by table [rows, F], `importance` of each number.
        """
        self.asset, self.trade = asset, _TRADE
        self.grids: dict[str, Grid] = grids_of(field)
        self.weights = {name: values.cpu().numpy().astype(np.float32) for name, values in weights.items()}
        counted = sum(
            int((w > 10 * w.min()).sum()) for name, w in self.weights.items() if not name.startswith("proposals.")
        )
        self.unit = 12 * LIKE / max(counted, 1)
        """Of importance times step^2: all tables rounded like this make about `LIKE`."""

    def by_distortion(self, factor: float, drop: bool = True) -> Tables:
        """Rounded so that no other steps cost less for the same pictures, nearly.

        Args:
            factor: how much coarser than usual.
            drop: whether a number may take another symbol than the nearest, where that costs less than it saves.
        """
        return self._rounded(lambda name, rows, weights: self._steps(name, weights, factor), MOST, drop, 1.0)

    def by_bits(self, bits: int, drop: bool = True) -> Tables:
        """Rounded to 2^bits - 1 symbols in each level, whose steps have the least error.

        Args:
            bits: 2 to 8.
            drop: as for `by_distortion`.
        """
        most = 2 ** (bits - 1) - 1
        return self._rounded(lambda name, rows, weights: scale_for(rows, weights, most), most, drop, 0.0)

    def _steps(self, name: str, weights: NDArray, factor: float) -> NDArray:
        if name.startswith("proposals."):
            return np.full(weights.shape[1], _PROPOSED * factor)
        return np.sqrt(self.unit / weights.mean(0, dtype=np.float64)) * factor

    def _rounded(self, steps_for, most: int, drop: bool, least: float) -> Tables:  # type: ignore[no-untyped-def]
        tables: Tables = {}
        for name, grid in self.grids.items():
            tables[name] = []
            limits = zip(grid.starts.tolist(), grid.starts[1:].tolist(), grid.sides.tolist(), strict=False)
            for start, end, side in limits:
                rows, weights = self.asset.tensors[name][start:end], self.weights[name][start:end]
                steps = np.asarray(steps_for(name, rows, weights), np.float64)
                # No coarser than twice the largest number: then all are 0 anyway
                largest = np.maximum(np.abs(rows).max(0), 1e-20).astype(np.float64)
                steps = np.clip(steps, least * largest / most, 2 * largest).astype(np.float32)
                symbols = rounded(rows, steps, weights, most, self.trade if drop else 0.0)
                tables[name].append((Level(end - start, side, grid.in_dim, tuple(steps.tolist())), symbols))
        return tables


def scale_for(values: NDArray, weights: NDArray, most: int) -> NDArray:
    """[F] steps with which rounding to -most .. most has the least weighted squared error."""
    best, errors = np.ones(values.shape[1]), np.full(values.shape[1], np.inf)
    largest = np.maximum(np.abs(values).max(0), 1e-20)
    some = slice(None, None, -(-len(values) // _LOOKED_AT))
    values, weights = values[some], weights[some]
    for share in _TRIED:
        steps = largest * share / most
        found = np.clip(np.round(values / steps), -most, most) * steps
        error = (weights * np.square(found - values)).sum(0, dtype=np.float64)
        best, errors = np.where(error < errors, steps, best), np.minimum(error, errors)
    return best


def rounded(values: NDArray, steps: NDArray, weights: NDArray, most: int, trade: float) -> NDArray[np.int16]:
    """[rows, F] symbols: of the nearest, the next one towards 0, and 0, that with the least error plus cost.

    The cost of a symbol is its bits, by how often it occurs, times `trade` times the mean weight times step^2.

    Args:
        values: [rows, F].
        steps: [F].
        weights: [rows, F].
        most: largest magnitude of a symbol.
        trade: 0 takes the nearest.
    """
    found = np.clip(np.round(values / steps), -most, most).astype(np.int16)
    if trade == 0:
        return found
    for feature in range(values.shape[1]):
        scaled, nearest = values[:, feature] / steps[feature], found[:, feature]
        weight = (weights[:, feature] / weights[:, feature].mean(dtype=np.float64)) ** _TRUST
        weight /= weight.mean()
        down = nearest - np.sign(nearest)
        chosen = nearest
        for _ in range(3):
            counts = np.bincount(chosen.astype(np.int64) + most, minlength=2 * most + 1)
            bits = (-np.log2((counts + 0.5) / (len(chosen) + most))).astype(np.float32) * np.float32(trade)
            costs = [
                weight * np.square(scaled - s) + bits[s.astype(np.int64) + most]
                for s in (nearest, down, np.zeros_like(nearest))
            ]
            chosen = np.choose(np.argmin(costs, 0), (nearest, down, np.zeros_like(nearest)))
        found[:, feature] = chosen
    return found
