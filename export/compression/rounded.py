"""Gaussians that are drawn as a .pfz would give them back, and trained as if nothing were rounded."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prismfield.datasets.base import SceneFrame
from prismfield.export.compression.pfz import COLOR
from prismfield.export.compression.pfz_grid import Grid, Rounding, Values, canonical
from prismfield.export.compression.pfz_write import file_order, levels_of, ranks_of
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_gaussians

_LEAST_LOGIT, _MOST_LOGIT = -6.0, 8.0
_LN2 = math.log(2)
_SETTLED = 0.03  # of a learning rate is left at the end
RATES = {
    "means": 6e-5,
    "turned": 4e-3,
    "log_scales": 1.2e-2,
    "opacity_logits": 4e-2,
    "colors": 1.2e-2,
    "coefficients": 6e-3,
}
"""Learning rates: of Adam, a step; of `means` in scene units."""


class _Through(torch.autograd.Function):
    """The second argument; its gradient goes to the first (Bengio et al., arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class RoundedGaussians(nn.Module):
    """N Gaussians in the canonical form of `pfz_grid.Values`, a `Representation` of whole images.

    What is drawn is rounded to the grid; gradients pass to the values as they were before.
    """

    batching: ClassVar[Literal["image"]] = "image"

    means: nn.Parameter
    """[N, 3] scene units."""
    turned: nn.Parameter
    """[N, 3] x y z of unit quaternions whose w is largest."""
    log_scales: nn.Parameter
    """[N, 3], falling."""
    opacity_logits: nn.Parameter
    colors: nn.Parameter
    """[N, 3] harmonics of degree 0, turned by `COLOR`."""
    coefficients: nn.Parameter
    """[N, R] of the basis of the higher harmonics."""
    importance: nn.Parameter
    """[N] not trained; a row goes with its Gaussian."""

    def __init__(self, values: Values, grid: Grid, importance: NDArray, frame: SceneFrame, antialiased: bool) -> None:
        """Take up values in the user's frame.

        Args:
            values: N Gaussians, N >= 1.
            grid: to round them to, in the user's frame.
            importance: [N] of each.
            frame: from the user's to the scene's, in which they are trained.
            antialiased: how they are drawn.
        """
        super().__init__()
        opacities = values["opacities"].clamp(1e-6, 1 - 1e-6)
        tensors = {
            "means": (values["means"] - torch.tensor(frame.center)) * frame.scale,
            "turned": values["turned"],
            "log_scales": values["ln_scales"] + math.log(frame.scale),
            "opacity_logits": torch.logit(opacities).clamp(_LEAST_LOGIT, _MOST_LOGIT),
            "colors": values["colors"],
            "coefficients": values["coefficients"],
        }
        for name, tensor in tensors.items():
            setattr(
                self, name, nn.Parameter(tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True))
            )
        self.importance = nn.Parameter(torch.from_numpy(importance).to(torch.float32, copy=True), requires_grad=False)
        self.grid, self.antialiased = grid, antialiased
        self.rounding = Rounding(grid.moved(frame), torch.float32)
        self._basis = torch.from_numpy(grid.basis).float()
        self._color = torch.from_numpy(COLOR).float()
        self.active_sh_degree = math.isqrt(self._basis.shape[1] // 3 + 1) - 1
        self.bit_price = 0.0
        """What a bit of the file costs, in units of the training's loss."""
        self.opacity_bits = 0.0
        """Bits that a Gaussian costs, in proportion to its opacity: what nothing speaks for fades."""
        order = torch.from_numpy(self.arrange())
        for parameter in self.parameters():
            parameter.data = parameter.data[order]
        self.arrange()

    @property
    def num_primitives(self) -> int:
        """N."""
        return len(self.opacity_logits)

    @property
    def opacities(self) -> Tensor:
        """[N] in (0, 1), not rounded."""
        return self.opacity_logits.sigmoid()

    def continuous(self) -> Values:
        """The values as they are trained."""
        return {
            "means": self.means,
            "ln_scales": self.log_scales,
            "turned": self.turned,
            "opacities": self.opacities,
            "colors": self.colors,
            "coefficients": self.coefficients,
        }

    @torch.no_grad()
    def symbols(self) -> Values:
        """What a file holds of them; see `Rounding.symbols`."""
        return self.rounding.symbols(self.continuous(), self.coarser)

    def rounded(self) -> Values:
        """The values as a file gives them back; gradients reach those before."""
        before = self.continuous()
        with torch.no_grad():
            after = self.rounding.values(self.symbols(), self.coarser, self.level)
        through: Any = _Through.apply
        return {name: through(before[name], after[name]) for name in before}

    def ranks(self) -> NDArray[np.int64]:
        """[N] classes of importance."""
        return ranks_of(self.importance.numpy())

    @torch.no_grad()
    def arrange(self) -> NDArray[np.int64]:
        """Find out again in which classes and chunks the Gaussians are, which says how coarsely they are rounded.

        Returns:
            [N] the rows as a file orders them. Those in one cell are drawn in the order of their rows: to look as the file
            does, the rows must be put in that order, and this be called again.
        """
        ranks = self.ranks()
        self.coarser = torch.from_numpy(2.0 ** (self.grid.finer(ranks) / 4)).float()
        self.level = torch.zeros(len(ranks))
        self.level = torch.from_numpy(levels_of(self.symbols(), ranks)).float()
        magnitudes = self.symbols()["coefficients"].abs().mean(0).clamp(min=0.02)
        self.coefficient_bits = torch.log2((1 + magnitudes) / magnitudes)
        """[R] bits that one more of each symbol's magnitude costs, of a geometric distribution with their mean."""
        return file_order(self.symbols(), ranks)

    @torch.no_grad()
    def misshapen(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows [M] whose values have left the canonical form, and the same Gaussians in it, by parameter name."""
        falls = (self.log_scales[:, :-1] >= self.log_scales[:, 1:]).all(1)
        w = (1 - self.turned.square().sum(1)).clamp(min=0).sqrt()
        rows = (~falls | (self.turned.abs().amax(1) > w)).nonzero()[:, 0]
        xyz = self.turned[rows].double()
        quats = torch.cat([(1 - xyz.square().sum(1, keepdim=True)).clamp(min=0).sqrt(), xyz], 1)
        quats = quats / quats.norm(dim=1, keepdim=True)
        found, scales = canonical(quats.numpy(), self.log_scales[rows].double().exp().numpy())
        values = {
            "turned": torch.from_numpy(found[:, 1:]).float(),
            "log_scales": torch.from_numpy(scales).log().float(),
        }
        return rows, values

    def bits(self) -> Tensor:
        """The part of a file's bits that depends smoothly on the values, up to a constant; for its gradient.

        Magnitudes of coefficients as `coefficient_bits` says; three bits of a position for each halving of the size, and three
        of a rotation for each doubling of the longest by the shortest standard deviation; `opacity_bits`.
        """
        first, second, third = self.log_scales.unbind(1)
        found = (3 / _LN2) * ((first - third).clamp(min=0) - 0.5 * (first + second)).sum()
        if self.coefficients.requires_grad:  # not in every step
            steps = self.rounding.grid.sh_step * self.coarser
            found = found + ((self.coefficients.abs() @ self.coefficient_bits) / steps).sum()
        return found + self.opacity_bits * self.opacities.sum() if self.opacity_bits > 0 else found

    def render(
        self,
        cameras: Cameras,
        pixels: Tensor | None = None,
        background: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> RenderOutput:
        """Draw whole images; see `Representation`."""
        if pixels is not None:
            raise ValueError("pixels: expected None, these Gaussians are drawn as whole images")
        values = self.rounded()
        turned = values["turned"]
        w = (1 - turned.square().sum(1, keepdim=True)).clamp(min=1e-12).sqrt()
        higher = (values["coefficients"] @ self._basis).unflatten(1, (-1, 3))
        out = rasterize_gaussians(
            values["means"],
            torch.cat([w, turned], 1),
            values["ln_scales"].exp(),
            values["opacities"],
            ((values["colors"] @ self._color)[:, None], higher),
            cameras,
            background,
            sh_degree=self.active_sh_degree,
            antialiased=self.antialiased,
            extras=extras,
        )
        if self.bit_price > 0:
            out.penalties["bits"] = self.bit_price * self.bits()
        return out

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter."""
        groups: list[dict[str, Any]] = []
        for name, rate in RATES.items():
            every = 2 if name == "coefficients" else 1  # there are by far the most of them
            group = {"name": name, "params": [self.get_parameter(name)], "lr": rate, "lr_final": _SETTLED * rate}
            groups.append(group | {"every": every})
        return groups

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}
