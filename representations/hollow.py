"""A hashed radiance field with a trainable mask of what matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import DenseGrid, Grid, grid
from prismfield.encodings.mlp import Mlp
from prismfield.render.march import Marched
from prismfield.render.samplers import Samples
from prismfield.representations.config import FieldConfig, HollowConfig
from prismfield.representations.fields import Field, exponential, grid_sizes


class HollowField(Field):
    """The hash field, hollowed out by a coarse mask (HollowNeRF, arXiv:2308.10122).

    The mask multiplies the features of the hash grid, so that points of which nothing is seen leave the rows that they share
    to others. ADMM makes it sparse: the loss is joined by `sparsity` times the mean of |z| under the constraint that z be the
    mask m (Boyd et al. 2011, doi:10.1561/2200000016, sections 3.1.1 and 6.4). With the scaled dual variable u,

        m follows the gradient of  loss + rho / 2 mean (m - z + u)^2,
        z = soft_threshold(m + u, sparsity / rho)  and  u = u + m - z  every `dual_interval` steps.

    After the share `prune` of the training, what z has at 0 is cut off. From the paper are the coarse mask over a hash grid and
    its pruning by ADMM; parametrisation and constants are ours: the mask is stored as it is, from 1 at first, and multiplies
    the density too, as our networks have no biases: features of 0 alone would be of density 1, not empty.
    """

    config: HollowConfig

    def make_encoding(self, config: FieldConfig) -> MaskedGrid:
        """See `Field`."""
        if not self.config.rho > 0 or self.config.dual_interval < 1 or self.config.saliency < 1:
            got = f"{self.config.rho}, {self.config.dual_interval}, {self.config.saliency}"
            raise ValueError(f"rho, dual_interval, saliency: expected above 0, 1 or more and 1 or more, got {got}")
        return MaskedGrid(Grid(3, cells="cubes", **grid_sizes(config)), self.config.saliency)

    def make_density_mlp(self, config: FieldConfig) -> tuple[Mlp, int]:
        """The density network has no use for the mask."""
        network = Mlp(self.encoding.out_dim - 1, 16, width=config.width)
        return network, network.out_dim

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter."""
        groups, config = super().param_groups(), self.config
        for group in groups:
            if group["name"] == "encoding.mask.table":
                group |= {"lr": config.saliency_lr, "lr_final": config.saliency_lr * config.lr_final / config.lr}
        return groups

    def penalties(self, marched: Marched, samples: Samples) -> dict[str, Tensor]:
        """See `Field`; until the mask is cut, the augmented Lagrangian."""
        found = super().penalties(marched, samples)
        if self.config.sparsity and not self.encoding.cut:
            found["saliency"] = 0.5 * self.config.rho * self.encoding.residual().square().mean()
        return found

    def advance(self, progress: float) -> None:
        """See `Field`; a dual update from time to time, then the cut."""
        super().advance(progress)
        if not self.config.sparsity or self.encoding.cut:
            return
        self.encoding.steps += 1
        if int(self.encoding.steps) % self.config.dual_interval == 0:
            self.encoding.update_dual(self.config.sparsity / self.config.rho)
            if progress >= self.config.prune:
                self.encoding.cut_off()

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        assert self.density_mlp is not None
        features = self.density_mlp(encoded[:, 1:])
        return exponential(features[:, 0]) * encoded[:, 0], features


class MaskedGrid(nn.Module):
    """A grid's features times a coarse mask, with what ADMM knows of the mask."""

    out_dim: int
    """One more than the grid's: the mask comes first."""
    split: Tensor
    """[rows] z: the mask, made sparse."""
    dual: Tensor
    """[rows] u: scaled dual variable, the sum of all differences so far."""
    kept: Tensor
    """[rows] bool: the mask is 0 elsewhere."""
    steps: Tensor
    """[] int64, until the cut."""
    cut: Tensor
    """[] bool: whether `kept` is decided."""

    def __init__(self, features: Grid, resolution: int) -> None:
        """The mask is 1 everywhere.

        Args:
            features: what is masked.
            resolution: cells of the mask along the unit interval.
        """
        super().__init__()
        self.features, self.out_dim = features, features.out_dim + 1
        self.mask = DenseGrid(3, resolution=resolution + 2, features=1)
        nn.init.ones_(self.mask.table)
        rows = len(self.mask.table)
        self.register_buffer("split", torch.ones(rows))
        self.register_buffer("dual", torch.zeros(rows))
        self.register_buffer("kept", torch.ones(rows, dtype=torch.bool))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("cut", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """[S, 3] in the unit cube to [S, out_dim]: the mask, not below 0, then the features times it."""
        table = self.mask.table * self.kept[:, None]
        mask = grid(x, table, self.mask.scales, self.mask.starts, self.mask.sides).relu()
        return torch.cat([mask, self.features(x) * mask], -1)

    def residual(self) -> Tensor:
        """[rows] m - z + u."""
        return self.mask.table[:, 0] - self.split + self.dual

    @torch.no_grad()
    def update_dual(self, threshold: float) -> None:
        """z = soft_threshold(m + u), then u = u + m - z."""
        mask = self.mask.table[:, 0]
        self.split.copy_(soft_threshold(mask + self.dual, threshold))
        self.dual.add_(mask - self.split)

    @torch.no_grad()
    def cut_off(self) -> None:
        """The mask is 0 for good where z is."""
        self.kept.copy_(self.split > 0)
        self.mask.table.mul_(self.kept[:, None])
        self.cut.fill_(True)


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """The minimiser over z of threshold |z| + (z - x)^2 / 2: `x`, nearer to 0 by `threshold` (Boyd et al. 2011, section 4.4.3)."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)
