"""Real spherical harmonics under a rotation of space."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_DEGREES = 4


def harmonic_rotations(rotation: NDArray) -> list[NDArray[np.float64]]:
    """The matrices that turn harmonics of degree 0 to 3 with space (real Wigner matrices).

    A colour sum_k c_k Y_k(d) seen along d is sum_k (D c)_k Y_k(R d) after the turn, so Y(R d) D = Y(d) for every d. Directions
    that determine D are fixed, and the equations solved for it.

    Args:
        rotation: [3, 3] of determinant 1.

    Returns:
        For each degree l [2l+1, 2l+1], orthogonal; they work on coefficients as columns.
    """
    dirs, basis = _directions()
    turned = _basis(dirs @ rotation.T)
    bands = [slice(degree**2, (degree + 1) ** 2) for degree in range(_DEGREES)]
    return [np.asarray(np.linalg.lstsq(turned[:, band], basis[:, band])[0], np.float64) for band in bands]


@cache
def _directions() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Directions all round (a Fibonacci lattice) and the basis there."""
    count = 32
    z = 1 - (2 * np.arange(count) + 1) / count
    angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
    dirs = np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], 1)
    return dirs, _basis(dirs)


def _basis(dirs: NDArray) -> NDArray[np.float64]:
    import torch

    from prismfield.render.ops.sh import sh_basis

    return sh_basis(torch.from_numpy(dirs), _DEGREES - 1).numpy()
