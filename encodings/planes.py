"""Trainable features on planes: triplanes in space, K-planes in space and time."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import Grid
from prismfield.encodings.points import check_points

Combine = Literal["product", "sum"]


class Planes(nn.Module):
    """Positions to features of their projections on the planes of each two axes, multiplied or added up.

    K-Planes (arXiv:2301.10241), eq. 1: one plane for D = 2, three for D = 3, six for D = 4, each with lattices of several
    resolutions. The sum is that of the triplanes of EG3D (arXiv:2112.07945). A product can be zero where one factor is, and so
    tells positions apart that a sum confuses.
    """

    in_dim: int
    """D."""
    out_dim: int
    """`levels * features`."""

    def __init__(
        self,
        in_dim: int,
        *,
        combine: Combine = "product",
        levels: int = 4,
        features: int = 8,
        log2_rows: int = 22,
        coarsest: int = 64,
        finest: int = 512,
        half: bool = False,
    ) -> None:
        """Features to be multiplied uniform in 0.1 to 0.5, as in K-Planes, those to be added in +-1e-4; from torch's generator.

        Args:
            in_dim: D, 2 to 4.
            combine: what is done with the features of the planes.
            levels: L, lattices of a plane.
            features: numbers a level, 1, 2, 4 or 8.
            log2_rows: of the largest lattice that is stored; a finer one is hashed.
            coarsest: cells along the unit interval of the first level.
            finest: of the last; those between grow by a constant factor.
            half: as for `Grid`.

        Raises:
            ValueError: a number is out of its range, or there is no such way to combine.
        """
        super().__init__()
        if in_dim not in (2, 3, 4) or combine not in ("product", "sum"):
            raise ValueError(f"in_dim, combine: expected 2 to 4 and product or sum, got {in_dim} and {combine}")
        self.in_dim, self.combine = in_dim, combine
        self.axes = list(itertools.combinations(range(in_dim), 2))
        self.planes = nn.ModuleList(
            Grid(
                2,
                levels=levels,
                features=features,
                log2_rows=log2_rows,
                coarsest=coarsest,
                finest=finest,
                half=half,
            )
            for _ in self.axes
        )
        self.out_dim = levels * features
        if combine == "product":
            for plane in self.grids():
                nn.init.uniform_(plane.table, 0.1, 0.5)  # products of tiny numbers would hardly learn

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: [..., D] in the unit cube; outside, the nearest point of it; NaN counts as 0, and raises under
                `torch.autograd.set_detect_anomaly`.

        Returns:
            [..., out_dim]. Differentiable twice.

        Raises:
            ValueError: the last axis is not `in_dim`.
        """
        check_points(x, self.in_dim)
        found = [plane(x[..., axes]) for plane, axes in zip(self.grids(), self.axes, strict=True)]
        return math.prod(found[1:], start=found[0]) if self.combine == "product" else sum(found[1:], start=found[0])

    def grids(self) -> list[Grid]:
        """That of each plane, in the order of `axes`."""
        return [plane for plane in self.planes if isinstance(plane, Grid)]

    def total_variation(self) -> Tensor:
        """[] mean over planes, levels and points of the squared distance to the two neighbours' features (K-Planes, eq. 2).

        Raises:
            ValueError: a level is hashed: its points have no neighbours.
        """
        terms = []
        for plane in self.grids():
            ranges = zip(plane.starts.tolist(), plane.starts[1:].tolist(), plane.sides.tolist(), strict=False)
            for start, end, side in ranges:
                if not side:
                    raise ValueError("log2_rows: expected room for all points of each level, got one that is hashed")
                points = plane.table[start:end].view(side, side, -1)
                steps = points.diff(dim=0).square().sum() + points.diff(dim=1).square().sum()
                terms.append(steps / side**2)
        return torch.stack(terms).mean()
