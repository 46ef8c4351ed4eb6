"""Harmonics of Gaussians from where they are, instead of a set for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import Grid
from prismfield.encodings.mlp import Mlp
from prismfield.render.contraction import contract

_LEVELS, _FEATURES, _LOG2_ROWS, _COARSEST, _FINEST, _WIDTH = 8, 2, 16, 16, 1024, 32


class HashColor(nn.Module):
    """Positions to the harmonics above degree 0, by a hash grid and a small network.

    After Compact 3D Gaussian Splatting (arXiv:2311.13681), section 4.3. Departs from it in that the network does not look
    from a direction at a colour but says all harmonics at once, which are then Gaussians' own without any loss, and in that
    the colour of degree 0 stays with each Gaussian.
    """

    def __init__(self, sh_degree: int) -> None:
        """Nearly zero everywhere.

        Args:
            sh_degree: 1 to 3.
        """
        super().__init__()
        self.terms = (sh_degree + 1) ** 2 - 1
        self.grid = Grid(
            3, levels=_LEVELS, features=_FEATURES, log2_rows=_LOG2_ROWS, coarsest=_COARSEST, finest=_FINEST
        )
        self.mlp = Mlp(self.grid.out_dim, 3 * self.terms, width=_WIDTH)

    def forward(self, means: Tensor) -> Tensor:
        """[N, (sh_degree + 1)^2 - 1, 3] at `means` [N, 3], scene units, to which it has no gradient."""
        with torch.no_grad():
            places = contract(means) / 4 + 0.5
        return self.mlp(self.grid(places)).view(len(means), self.terms, 3)
