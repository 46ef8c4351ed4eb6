"""Coarse densities that say where along a ray the samples of an unbounded field belong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import Grid
from prismfield.render.samplers import Histogram, Samples, proposal_samples

_FINEST = (96, 192)  # cells along the unit interval, of the first proposal and of those after it
_ANNEAL = 10.0  # Mip-NeRF 360, supplement, section A


class Proposals(nn.Module):
    """Densities on small grids, which learn to cover the weights of the field (Mip-NeRF 360, arXiv:2111.12077, section 3).

    Departs from the paper in that the logarithm of a density is a sum of interpolated numbers, without a network behind: a
    proposal is asked several times as often as the field.
    """

    progress: Tensor
    """[] share of the training that is done: until its end, proposals count for less than they say."""

    def __init__(self, rounds: int) -> None:
        """Nearly the same density everywhere, from torch's generator.

        Args:
            rounds: how many proposals are asked, one after the other.
        """
        super().__init__()
        self.grids = nn.ModuleList(
            Grid(3, levels=4, features=1, log2_rows=18, coarsest=12, finest=_FINEST[min(i, 1)]) for i in range(rounds)
        )
        self.register_buffer("progress", torch.zeros(()))

    def sample(
        self,
        origins: Tensor,
        dirs: Tensor,
        density: Callable[[nn.Module, Tensor], Tensor],
        *,
        near: float,
        far: float,
        counts: tuple[int, ...],
        unit: float,
        generator: torch.Generator | None,
    ) -> tuple[Samples, list[Histogram]]:
        """Pieces of each ray for the field.

        Args:
            origins: [R, 3] world units.
            dirs: [R, 3] of unit length.
            density: a grid of this module and positions [P, 3] in world units to densities [P] per world unit.
            near: world units.
            far: world units.
            counts: pieces for each proposal, and for the field.
            unit: as for `proposal_samples`.
            generator: moves the pieces, as in training; None leaves them.

        Returns:
            The pieces, and what `interlevel_loss` takes.
        """
        share = 1.0 if generator is None else float(self.progress)
        return proposal_samples(
            origins,
            dirs,
            near,
            far,
            [partial(density, grid) for grid in self.grids],
            counts,
            generator=generator,
            unit=unit,
            anneal=_ANNEAL * share / ((_ANNEAL - 1) * share + 1),
        )
