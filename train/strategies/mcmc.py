"""Training as sampling: dead Gaussians move onto live ones, the count grows to a cap, and the faint wander."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prismfield.render.ops.project import rotation_matrices
from prismfield.render.output import RenderOutput
from prismfield.representations.gaussians import Gaussians
from prismfield.train.strategies.config import McmcConfig
from prismfield.train.strategies.fixed import Fixed
from prismfield.train.strategies.rows import append_rows, replace_rows
from prismfield.train.strategies.schedule import Schedule

MAX_COPIES = 51  # most Gaussians that one is divided into at a time, as in the paper's program
_GATE_STEEPNESS, _GATE_CENTRE = 100.0, 0.995  # eq. 8's sigmoid over 1 - opacity
_GATE_OPACITY = 0.1  # above it the gate is under 1e-4 and the noise is left out


class Mcmc(Fixed):
    """3D Gaussian Splatting as Markov chain Monte Carlo (arXiv:2404.09591).

    Departs from the paper in two things: noise goes only to Gaussians fainter than 0.1, where its gate is not closed;
    and the moments of a divided Gaussian's centre, rotation and colour are kept.
    """

    config: McmcConfig

    def __init__(self, config: McmcConfig, scene: Gaussians, *, max_primitives: int, seed: int) -> None:
        super().__init__(config, scene, max_primitives=max_primitives, seed=seed)
        self.schedule = Schedule(config.start, config.interval, config.min_interval, config.stop)

    def after_step(
        self, step: int, progress: float, scene: Gaussians, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        super().after_step(step, progress, scene, optimizer, out)
        if self.schedule.due(step, progress):
            self._relocate(scene, optimizer)
            self._grow(scene, optimizer)
        if self.config.noise > 0:
            self._add_noise(scene, optimizer)

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        return super().state_dict() | {"last": self.schedule.last}

    def load_state_dict(self, state: dict[str, Any], scene: Gaussians) -> None:
        """See `Strategy`."""
        super().load_state_dict(state, scene)
        self.schedule.last = int(state["last"])

    @torch.no_grad()
    def _relocate(self, scene: Gaussians, optimizer: torch.optim.Optimizer) -> None:
        is_dead = scene.opacities <= self.config.min_opacity
        dead = is_dead.nonzero().squeeze(1)
        if 0 < len(dead) < scene.num_primitives:
            replace_rows(scene, optimizer, dead, self._divide(scene, optimizer, ~is_dead, len(dead)))

    @torch.no_grad()
    def _grow(self, scene: Gaussians, optimizer: torch.optim.Optimizer) -> None:
        count = scene.num_primitives
        wanted = min(self.max_primitives, math.ceil((1 + self.config.growth) * count))
        if wanted > count:
            everyone = torch.ones(count, dtype=torch.bool, device=scene.means.device)
            append_rows(scene, optimizer, self._divide(scene, optimizer, everyone, wanted - count))

    def _divide(
        self, scene: Gaussians, optimizer: torch.optim.Optimizer, live: Tensor, count: int
    ) -> dict[str, Tensor]:
        """Draw `count` live Gaussians by opacity and divide each over itself and its copies; returns the copies."""
        weights = torch.where(live, scene.opacities, 0.0)
        drawn = _draw(weights, count, self.generator)
        copies = torch.bincount(drawn, minlength=scene.num_primitives)[drawn] + 1
        opacities, scales = divided(scene.opacities[drawn], scene.scales[drawn], copies)
        opacities = opacities.clamp(min=self.config.min_opacity, max=1 - 1e-6)
        rows = {name: value[drawn] for name, value in scene.rows().items()}
        rows |= {"opacity_logits": opacities.logit(), "log_scales": scales.log()}
        sources, first = _unique(drawn)
        changed = {name: rows[name][first] for name in ("opacity_logits", "log_scales")}
        replace_rows(scene, optimizer, sources, changed)
        return rows

    @torch.no_grad()
    def _add_noise(self, scene: Gaussians, optimizer: torch.optim.Optimizer) -> None:
        """Langevin noise on the centres (eq. 8): lr * strength * gate(opacity) * covariance @ normal."""
        lr = next(group["lr"] for group in optimizer.param_groups if group["params"][0] is scene.means)
        is_faint = scene.opacity_logits < math.log(_GATE_OPACITY / (1 - _GATE_OPACITY))
        quats, log_scales, opacities = scene.quats, scene.log_scales, scene.opacities
        strength = lr * self.config.noise
        if _all_at_once(is_faint.device):
            noise = self._noise(quats, log_scales, opacities, strength)
            scene.means.add_(torch.where(is_faint[:, None], noise, 0.0))
        else:
            faint = is_faint.nonzero().squeeze(1)
            noise = self._noise(quats[faint], log_scales[faint], opacities[faint], strength)
            scene.means.index_add_(0, faint, noise)

    def _noise(self, quats: Tensor, log_scales: Tensor, opacities: Tensor, strength: float) -> Tensor:
        """[M, 3] strength * gate(opacity) * covariance @ normal, of M Gaussians."""
        gates = torch.sigmoid(_GATE_STEEPNESS * ((1 - opacities) - _GATE_CENTRE))
        normals = torch.randn(len(quats), 3, generator=self.generator, device=quats.device)
        # Normals turned into the Gaussian's axes are normals, so the covariance's first rotation can be left out.
        local = normals * (2 * log_scales).exp() * (gates * strength)[:, None]
        return torch.einsum("nij,nj->ni", rotation_matrices(quats), local)


def _all_at_once(device: torch.device) -> bool:
    """Whether work on a few rows is done on all of them: on a GPU, where the step would have to wait for how many they are."""
    return device.type != "cpu"


def divided(opacities: Tensor, scales: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity and scales of each of n equal Gaussians in one place that together look like one.

    Eq. 9 of 3DGS-MCMC (arXiv:2404.09591). The opacity at the centre is exact, o' = 1 - (1 - o)^(1/n). The scale keeps
    the integral along a line through the centre: o s = s' sum_{k=1..n} C(n, k) (-1)^(k-1) o'^k / sqrt(k), the paper's
    double sum with one of its sums carried out.

    Args:
        opacities: [M] in (0, 1).
        scales: [M, 3].
        copies: [M] integers from 1; more than MAX_COPIES count as that many.
    """
    copies = copies.clamp(max=MAX_COPIES)
    # In double precision: the terms alternate and largely cancel.
    old = opacities.double().clamp(max=1 - 1e-6)
    new = -torch.expm1(torch.log1p(-old) / copies)
    powers = new[:, None] ** torch.arange(1, MAX_COPIES + 1, device=new.device)
    integrals = (_binomials().to(new.device)[copies] * powers).sum(-1)
    return new.to(opacities), scales * (old / integrals).to(scales)[:, None]


@cache
def _binomials() -> Tensor:
    """[MAX_COPIES + 1, MAX_COPIES]: row n, column k - 1 holds C(n, k) (-1)^(k-1) / sqrt(k)."""
    table = [
        [math.comb(n, k) * (-1) ** (k - 1) / math.sqrt(k) for k in range(1, MAX_COPIES + 1)]
        for n in range(MAX_COPIES + 1)
    ]
    return torch.tensor(table, dtype=torch.float64)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count] indices drawn with replacement in proportion to `weights`; torch.multinomial stops at 2^24 of them."""
    total = weights.double().cumsum(0)
    targets = torch.rand(count, generator=generator, device=weights.device, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, targets, right=True).clamp(max=len(weights) - 1)


def _unique(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of `drawn`, sorted, and a position of each."""
    order = drawn.argsort(stable=True)
    values = drawn[order]
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = values[1:] != values[:-1]
    return values[starts], order[starts]
