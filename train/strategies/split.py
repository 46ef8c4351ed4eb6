"""Density control of convexes: split, prune."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.representations.convexes import Convexes
from prismfield.train.strategies.adc import Adc
from prismfield.train.strategies.config import SplitConfig
from prismfield.train.strategies.rows import append_rows, replace_rows

_ABSGRAD_THRESHOLD, _SIGMA_THRESHOLD = 0.0008, 2.5e-5


class Split(Adc):
    """Split a convex where the gradient is large into K smaller ones, one at each of its points (arXiv:2411.14974, section 3.4).

    The rest is as `Adc` has it, but for one thing: the parts inherit Adam's second moment. Without it their first steps are as
    large as they are, since points move in proportion to their convex, and long trainings fell apart (11 dB on the garden).
    """

    config: Any

    def __init__(self, config: SplitConfig, scene: Convexes, *, max_primitives: int, seed: int) -> None:
        super().__init__(config, scene, max_primitives=max_primitives, seed=seed)
        self.threshold = config.grad_threshold or (_ABSGRAD_THRESHOLD if config.absgrad else _SIGMA_THRESHOLD)

    def _gradients(self, grad: Tensor, out: RenderOutput) -> Tensor:
        """That of the position, or of the sharpness."""
        return super()._gradients(grad, out) if self.config.absgrad else grad[..., -2].abs() * len(out.alpha)

    @torch.no_grad()
    def _grow(self, progress: float, scene: Convexes, optimizer: torch.optim.Optimizer) -> Tensor:
        """Split; returns the [N] widths of the scene that results, 0 for what is new."""
        each = 2 if self.config.into == "halves" else scene.points.shape[1]
        index, widths = self._chosen(progress, scene, each - 1), self.widths
        if len(index) == 0:
            return widths
        rows = {name: value[index] for name, value in scene.rows().items()}
        parts = {name: value[:, None].expand(-1, each, *value.shape[1:]).clone() for name, value in rows.items()}
        split = halves if self.config.into == "halves" else at_points
        parts["points"] = split(rows["points"], self.config.shrink)
        parts["log_deltas"] += math.log(self.config.part_delta)
        parts["log_sigmas"] += math.log(self.config.part_sigma)
        opacities = (self.config.part_opacity * rows["opacity_logits"].sigmoid()).clamp(min=1e-6, max=1 - 1e-6)
        parts["opacity_logits"] = opacities.logit()[:, None].expand(-1, each)
        replace_rows(scene, optimizer, index, {name: value[:, 0] for name, value in parts.items()}, keep_second=True)
        added = {name: value[:, 1:].flatten(0, 1) for name, value in parts.items()}
        append_rows(scene, optimizer, added, index.repeat_interleave(each - 1))
        widths[index] = 0
        return torch.cat([widths, widths.new_zeros(len(index) * (each - 1))])


def at_points(points: Tensor, shrink: float) -> Tensor:
    """[M, K, K, 3] copies of M convexes `points` [M, K, 3], one around each of its points, `shrink` times as large."""
    center = points.mean(1, keepdim=True)
    return points[:, :, None] + shrink * (points - center)[:, None]


def halves(points: Tensor, shrink: float) -> Tensor:
    """[M, 2, K, 3] copies of M convexes `points` [M, K, 3], squeezed by `shrink` along the longest axis and moved to its ends."""
    center = points.mean(1, keepdim=True)
    arms = points - center
    axis = torch.linalg.eigh(arms.mT @ arms)[1][:, :, 2]  # of the largest eigenvalue
    along = (arms @ axis[:, :, None]).squeeze(2)
    ends = torch.stack([along.amin(1), along.amax(1)], 1)
    moved = (shrink - 1) * along[:, None] + (1 - shrink) * ends[:, :, None]
    return points[:, None] + moved[..., None] * axis[:, None, None]
