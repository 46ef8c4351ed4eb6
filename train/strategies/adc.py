"""Adaptive density control: clone, split, prune, reset."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prismfield.render.ops.project import rotation_matrices
from prismfield.render.output import RenderOutput
from prismfield.representations.gaussians import Gaussians
from prismfield.representations.splats import Splats
from prismfield.train.strategies.fixed import Fixed
from prismfield.train.strategies.rows import append_rows, keep_rows, replace_rows
from prismfield.train.strategies.schedule import Schedule

_THRESHOLD, _ABSGRAD_THRESHOLD = 0.0002, 0.0008
_SPLIT_SHRINK = 1.6  # two children of 1 / 1.6 the size, 3D Gaussian Splatting section 5.2


class Adc(Fixed):
    """Grow where the screen gradient is large, drop what is faint or too large (arXiv:2308.04079, section 5).

    A Gaussian's score is the mean, over the images that show it since the last growth, of the length of the loss's
    gradient to its projected centre, per half image (the original's normalised device coordinates) and per image of the
    batch. Departs from the paper in never exceeding `max_primitives`, where the highest scores go first, and in
    `growth="budget"`.
    """

    config: Any

    def __init__(self, config: Any, scene: Any, *, max_primitives: int, seed: int) -> None:
        super().__init__(config, scene, max_primitives=max_primitives, seed=seed)
        self.extras = ("absgrad",) if config.absgrad else ()
        self.threshold = config.grad_threshold or (_ABSGRAD_THRESHOLD if config.absgrad else _THRESHOLD)
        self.growth = Schedule(config.start, config.interval, config.min_interval, config.stop)
        self.reset = Schedule(config.reset_interval, config.reset_interval, config.min_interval, config.stop)
        self.first_count = scene.num_primitives
        self._forget(scene)

    def after_step(
        self, step: int, progress: float, scene: Any, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        super().after_step(step, progress, scene, optimizer, out)
        if progress >= self.config.stop:
            return
        self._observe(scene, out)
        if self.growth.due(step, progress):
            self._prune(scene, optimizer, self._grow(progress, scene, optimizer))
            self._forget(scene)
        if self.reset.due(step, progress):
            _cut_opacities(scene, optimizer, self.config.reset_opacity)

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        return super().state_dict() | {
            "first_count": self.first_count,
            "last_growth": self.growth.last,
            "last_reset": self.reset.last,
            "gradients": self.gradients,
            "views": self.views,
            "widths": self.widths,
        }

    def load_state_dict(self, state: dict[str, Any], scene: Any) -> None:
        """See `Strategy`."""
        super().load_state_dict(state, scene)
        self.first_count = int(state["first_count"])
        self.growth.last, self.reset.last = int(state["last_growth"]), int(state["last_reset"])
        device = scene.opacity_logits.device
        self.gradients, self.views, self.widths = (state[k].to(device) for k in ("gradients", "views", "widths"))

    def _forget(self, scene: Any) -> None:
        count, device = scene.num_primitives, scene.opacity_logits.device
        self.gradients = torch.zeros(count, device=device)
        """[N] sum over images of the gradient's length."""
        self.views = torch.zeros(count, device=device)
        """[N] images that showed the Gaussian."""
        self.widths = torch.zeros(count, device=device)
        """[N] largest footprint, image widths."""

    @torch.no_grad()
    def _observe(self, scene: Any, out: RenderOutput) -> None:
        source = out.absgrad if self.config.absgrad else out.params
        if source is None or source.grad is None or out.radii is None:
            raise ValueError(
                "out: expected screen gradients, from a backward pass over `render` with the strategy's extras"
            )
        # `Compact` drops rows once nothing grows; a finished training that is made longer grows again.
        if len(self.gradients) != scene.num_primitives:
            self._forget(scene)
        drawn = out.radii[..., 0] > 0
        self.gradients += self._gradients(source.grad, out).sum(0)
        self.views += drawn.sum(0)
        if self.config.max_screen > 0:
            torch.maximum(self.widths, out.radii.amax((0, 2)) / out.alpha.shape[2], out=self.widths)

    def _gradients(self, grad: Tensor, out: RenderOutput) -> Tensor:
        """[C, N] how much the loss depends on each primitive in each image: what growth goes by.

        Args:
            grad: of `out.absgrad` or of `out.params`, as the config says.
            out: what was rendered.
        """
        cameras, height, width = out.alpha.shape
        along_x, along_y = grad[..., 0], grad[..., 1]
        # Numbers, not a tensor of two: that would be copied to a GPU, which the step would wait for.
        return torch.hypot(along_x * (0.5 * width * cameras), along_y * (0.5 * height * cameras))

    def _chosen(self, progress: float, scene: Any, added: int) -> Tensor:
        """Indices of what is to grow, rising, where each that grows adds `added` primitives."""
        scores = self.gradients / self.views.clamp(min=1)
        room = self.max_primitives - scene.num_primitives
        if self.config.growth == "budget":
            left = 1 - progress / self.config.stop
            target = self.first_count + (self.max_primitives - self.first_count) * (1 - left * left)
            room = min(room, round(target) - scene.num_primitives)
            chosen = (scores > 0) & (scene.opacities > self.config.min_opacity)
        else:
            chosen = scores > self.threshold
        index = chosen.nonzero().squeeze(1)
        if added * len(index) > room:
            index = index[scores[index].topk(max(room // added, 0)).indices].sort().values
        return index

    @torch.no_grad()
    def _grow(self, progress: float, scene: Any, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clone and split; returns the [N] widths of the scene that results, 0 for what is new."""
        index, widths = self._chosen(progress, scene, 1), self.widths
        if len(index) == 0:
            return widths
        large = scene.scales[index].amax(-1) > self.config.split_extent
        clones, splits = index[~large], index[large]
        first, second = _halves(scene, splits, self.generator)
        copies = {name: value[clones] for name, value in scene.rows().items()}
        replace_rows(scene, optimizer, splits, first)
        append_rows(scene, optimizer, {name: torch.cat([copies[name], second[name]]) for name in copies})
        widths[splits] = 0
        return torch.cat([widths, widths.new_zeros(len(index))])

    @torch.no_grad()
    def _prune(self, scene: Any, optimizer: torch.optim.Optimizer, widths: Tensor) -> None:
        keep = scene.opacities >= self.config.min_opacity
        if self.reset.last > 0:
            if self.config.max_extent > 0:
                keep &= scene.scales.amax(-1) <= self.config.max_extent
            if self.config.max_screen > 0:
                keep &= widths <= self.config.max_screen
        # A scene without a single Gaussian cannot recover.
        if keep.any() and not keep.all():
            keep_rows(scene, optimizer, keep)


def _halves(scene: Gaussians, index: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two smaller Gaussians for each at `index`, their centres drawn from it."""
    rows = {name: value[index] for name, value in scene.rows().items()}
    axes = rotation_matrices(rows["quats"]) * rows["log_scales"].exp()[:, None]
    normals = torch.randn(2, len(index), 3, generator=generator, device=axes.device)
    offsets = torch.einsum("nij,knj->kni", axes, normals)
    rows["log_scales"] = rows["log_scales"] - math.log(_SPLIT_SHRINK)
    return rows | {"means": rows["means"] + offsets[0]}, rows | {"means": rows["means"] + offsets[1]}


@torch.no_grad()
def _cut_opacities(scene: Splats, optimizer: torch.optim.Optimizer, opacity: float) -> None:
    logits = scene.opacity_logits.clamp(max=math.log(opacity / (1 - opacity)))
    everyone = torch.arange(len(logits), device=logits.device)
    replace_rows(scene, optimizer, everyone, {"opacity_logits": logits})
