"""Sines and cosines of doubling frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import prismfield.render.first_calls  # noqa: F401
from prismfield.encodings.points import check_points


class Frequency(nn.Module):
    """Positions as sines and cosines of doubling frequency (NeRF, arXiv:2003.08934, eq. 4)."""

    in_dim: int
    """D."""
    out_dim: int
    """`2 * in_dim * octaves`."""
    frequencies: Tensor
    """[octaves] radians per unit: pi, 2 pi, 4 pi, ..."""

    def __init__(self, in_dim: int, octaves: int) -> None:
        """No parameters.

        Args:
            in_dim: D, 1 or more.
            octaves: frequencies, 1 or more.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__()
        if in_dim < 1 or octaves < 1:
            raise ValueError(f"in_dim, octaves: expected 1 or more, got {in_dim} and {octaves}")
        self.in_dim = in_dim
        self.out_dim = 2 * in_dim * octaves
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(octaves), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: [..., D], any range: the values repeat with period 2. NaN and infinity give NaN in their own row; NaN raises under
                `torch.autograd.set_detect_anomaly`.

        Returns:
            [..., out_dim]: all sines, then all cosines, each with the octaves of one axis side by side. Differentiable any
            number of times.

        Raises:
            ValueError: the last axis is not D.
        """
        check_points(x, self.in_dim)
        angles = (x[..., None] * self.frequencies).flatten(-2)
        return torch.cat([angles.sin(), angles.cos()], -1)
