"""What an encoding is, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from prismfield.encodings.frequency import Frequency
from prismfield.encodings.grid import DenseGrid, Grid
from prismfield.encodings.planes import Planes
from prismfield.encodings.sh import SphericalHarmonics


@runtime_checkable
class Encoding(Protocol):
    """An `nn.Module` that makes positions easier to learn from.

    What the table holds keeps to this, and `tests/test_encodings.py` runs over it: no position is an error, be it on the border
    of a cell, outside of the unit cube, infinite or NaN, and none changes the code of another. Trainable features stand for the
    unit cube, and a position outside of it gets those of the nearest point. NaN is an error where one looks for it, under
    `torch.autograd.set_detect_anomaly`. Positions and parameters have first and second derivatives.
    """

    in_dim: int
    out_dim: int

    def __call__(self, x: Tensor) -> Tensor:
        """What `forward` does."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] in the unit cube, for "sh" unit directions, to [..., out_dim]."""


@dataclass(frozen=True)
class EncodingConfig:
    """Sizes; each encoding takes those that it has."""

    levels: int = 16
    """Lattices of different fineness."""
    features: int = 2
    """Numbers a level: 1, 2, 4 or 8."""
    log2_rows: int = 19
    """Of a level's table."""
    coarsest: int = 16
    """Cells along the unit interval of the first level."""
    finest: int = 2048
    """Of the last level."""
    octaves: int = 10
    """Of sines and cosines."""
    degree: int = 4
    """Of spherical harmonics."""
    half: bool = False
    """Tables are read in half precision."""


def _grid(cells: str) -> Callable[[int, EncodingConfig], Encoding]:
    return lambda dims, config: Grid(
        dims,
        cells="simplices" if cells == "simplices" else "cubes",
        levels=config.levels,
        features=config.features,
        log2_rows=config.log2_rows,
        coarsest=config.coarsest,
        finest=config.finest,
        half=config.half,
    )


def _dense(dims: int, config: EncodingConfig) -> Encoding:
    """The finest one lattice that fits the table, with as many features as there may be."""
    most = math.floor(2 ** (config.log2_rows / dims) + 1e-9)
    return DenseGrid(dims, resolution=min(config.finest + 2, most), features=8, half=config.half)


def _planes(dims: int, config: EncodingConfig) -> Encoding:
    """A quarter of the levels, with four times the features."""
    return Planes(
        dims,
        levels=max(config.levels // 4, 1),
        features=min(4 * config.features, 8),
        log2_rows=config.log2_rows,
        coarsest=config.coarsest,
        finest=config.finest,
        half=config.half,
    )


def _harmonics(dims: int, config: EncodingConfig) -> Encoding:
    if dims != 3:
        raise ValueError(f"in_dim: expected 3 for directions, got {dims}")
    return SphericalHarmonics(config.degree)


ENCODINGS: dict[str, Callable[[int, EncodingConfig], Encoding]] = {
    "frequency": lambda dims, config: Frequency(dims, config.octaves),
    "sh": _harmonics,
    "dense": _dense,
    "hash": _grid("cubes"),
    "simplex": _grid("simplices"),
    "triplane": _planes,
}
"""By name: what makes an encoding of a number of axes. A ValueError naming `in_dim` where there is none of so many."""


def make_encoding(name: str, in_dim: int, config: EncodingConfig | None = None) -> Encoding:
    """The encoding of that name.

    Args:
        name: a key of `ENCODINGS`.
        in_dim: axes of the positions.
        config: sizes, those of `EncodingConfig` if None.

    Raises:
        ValueError: there is no such encoding, or none of so many axes.
    """
    if name not in ENCODINGS:
        raise ValueError(f"encoding: expected one of {', '.join(ENCODINGS)}, got {name!r}")
    return ENCODINGS[name](in_dim, config or EncodingConfig())
