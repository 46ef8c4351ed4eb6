"""What the options of `--compact` do between steps, beside the strategy that grows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.render.sort_grid import grid_width, sort_grid
from prismfield.representations.compact import SMOOTHED_EVERY, CompactGaussians
from prismfield.train.strategies.rows import keep_rows, reorder_rows, rows_kept
from prismfield.train.strategies.schedule import Schedule

_INTERVAL, _MIN_INTERVAL = 1500, 50  # steps from one look at masks and grid to the next
_PRUNED_BY = 0.6  # of the training that is left once nothing grows any more
_ROUNDS = 3  # of pruning until then: of two that do the same, neither is missed until one is gone
_SCORED_EVERY = 2  # steps from one whose picture is scored to the next
_SORTED_BY = 11  # columns of `grid_values`: scales, opacity, rotation, colour
_PLACE_WEIGHT = 4.0  # of the position, in the spread of the other properties, when rows are sorted


class Compact:
    """Another strategy, and after it: drop Gaussians by their scores and by their masks, sort those that stay into a grid.

    All of it once the other one is past its `stop`. Until then that one drops what has no opacity by its mask.
    """

    def __init__(self, grower: Any, scene: CompactGaussians) -> None:
        """
        Args:
            grower: the strategy that is done first, one of `Splats`.
            scene: that it was made for.
        """
        self.grower = grower
        self.options = scene.compact
        self.stop = getattr(grower.config, "stop", 0.0)
        self.schedule = Schedule(0, _INTERVAL, _MIN_INTERVAL, 1.0)
        self.scores = scene.scores
        self.rounds, self.first_count = 0, 0
        """Of pruning that are done; how many Gaussians there were before the first."""
        self.grid_rows, self.is_smoothed = 0, False
        """As the scene has them."""

    @property
    def extras(self) -> Collection[str]:
        """See `Strategy`."""
        return self.grower.extras

    def after_step(
        self, step: int, progress: float, scene: CompactGaussians, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        self.grower.after_step(step, progress, scene, optimizer, out)
        self.scores.is_on = False
        if self.options.prune > 0 and progress >= self.stop:
            self._prune(step, progress, scene, optimizer)
        if progress >= 1 or (progress >= self.stop and self.schedule.due(step, progress)):
            if self.options.masks:
                self._drop_masked(scene, optimizer)
            if self.options.sog:
                self._sort(scene, optimizer)
        self.is_smoothed = scene.is_smoothed = (step + 1) % SMOOTHED_EVERY == 0

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        own = {
            "last": self.schedule.last,
            "rounds": self.rounds,
            "first_count": self.first_count,
            "grid_rows": self.grid_rows,
            "is_smoothed": self.is_smoothed,
            "is_scored": self.scores.is_on,
            "pictures": self.scores.pictures,
            "scores": self.scores.values,
        }
        return self.grower.state_dict() | {f"compact_{name}": value for name, value in own.items()}

    def load_state_dict(self, state: dict[str, Any], scene: CompactGaussians) -> None:
        """See `Strategy`."""
        self.grower.load_state_dict(state, scene)
        self.schedule.last = int(state["compact_last"])
        self.rounds, self.first_count = int(state["compact_rounds"]), int(state["compact_first_count"])
        self.grid_rows = scene.grid_rows = int(state["compact_grid_rows"])
        self.is_smoothed = scene.is_smoothed = bool(state["compact_is_smoothed"])
        self.scores = scene.scores
        self.scores.is_on, self.scores.pictures = bool(state["compact_is_scored"]), int(state["compact_pictures"])
        self.scores.values = state["compact_scores"].to(scene.means.device)

    def _prune(self, step: int, progress: float, scene: CompactGaussians, optimizer: torch.optim.Optimizer) -> None:
        """Rounds at equal intervals, before each of which pictures are scored."""
        if self.first_count == 0:
            self.first_count = scene.num_primitives
        until = self.stop + _PRUNED_BY * (1 - self.stop)
        if self.rounds < _ROUNDS and progress >= self.stop + (until - self.stop) * (self.rounds + 1) / _ROUNDS:
            self.rounds += 1
            wanted = max(1, round(self.first_count * (1 - self.options.prune * self.rounds / _ROUNDS)))
            if wanted < scene.num_primitives == len(self.scores.values):
                keep = torch.zeros(scene.num_primitives, dtype=torch.bool, device=scene.means.device)
                keep[self.scores.values.argsort(descending=True, stable=True)[:wanted]] = True
                keep_rows(scene, optimizer, keep)
            self.scores.values = self.scores.values[:0]
        self.scores.is_on = self.rounds < _ROUNDS and step % _SCORED_EVERY == 0

    def _drop_masked(self, scene: CompactGaussians, optimizer: torch.optim.Optimizer) -> None:
        keep = scene.kept
        if not keep.any():
            weight = self.options.mask_weight
            raise ValueError(
                f"training stopped: the masks leave no Gaussian; --compact.mask-weight {weight:g} is too much"
            )
        if not keep.all():
            if len(self.scores.values) == len(keep):
                self.scores.values = rows_kept(self.scores.values, keep)
            keep_rows(scene, optimizer, keep)

    @torch.no_grad()
    def _sort(self, scene: CompactGaussians, optimizer: torch.optim.Optimizer) -> None:
        """Rows into the order of a grid; near to how they lay where they lay in one."""
        parts = (scene.means, _PLACE_WEIGHT), (scene.grid_values()[:, :_SORTED_BY], 1.0)
        spread = [weight / x.std(unbiased=False).clamp(min=1e-12) * (x - x.mean(0)) for x, weight in parts]
        features = torch.cat(spread, 1).cpu().numpy()
        was_sorted = scene.grid_rows == scene.num_primitives
        radius = 2 if was_sorted else None
        found = sort_grid(features, grid_width(len(features)), radius=radius, is_sorted=was_sorted)
        order = torch.from_numpy(found).to(scene.means.device)
        reorder_rows(scene, optimizer, order)
        if len(self.scores.values) == len(order):
            self.scores.values = self.scores.values[order]
        self.grid_rows = scene.grid_rows = scene.num_primitives
