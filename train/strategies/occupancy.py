"""The strategy of radiance fields: look from time to time where they are empty, so that rays skip what is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.representations.fields import Field
from prismfield.train.strategies.config import OccupancyConfig

_ALL_CELLS_UNTIL = 64  # steps; 256 in the paper, which trains for longer
_SHARE = 8  # later one cell in so many is looked at; two in the paper


class Occupancy:
    """Refresh a field's occupancy grid (Instant NGP, arXiv:2201.05989, appendix E.2), and shift its samples at random."""

    extras: tuple[str, ...] = ()

    def __init__(self, config: OccupancyConfig, scene: Field, *, max_primitives: int, seed: int) -> None:
        self.config = config
        self.generator = torch.Generator(scene.grid.density.device).manual_seed(seed)
        scene.jitter = torch.Generator().manual_seed(seed + 1)
        self.jitter = scene.jitter

    def after_step(
        self, step: int, progress: float, scene: Field, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        scene.advance(progress)
        if scene.proposals is None and (step + 1) % self.config.interval == 0:
            cells = None if step < _ALL_CELLS_UNTIL else scene.grid.density.numel() // _SHARE
            options: dict[str, Any] = {"decay": self.config.decay, "threshold": self.config.threshold / scene.step}
            scene.grid.update(scene.density, **options, generator=self.generator, cells=cells)

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        return {"generator": self.generator.get_state(), "jitter": self.jitter.get_state()}

    def load_state_dict(self, state: dict[str, Any], scene: Field) -> None:
        """See `Strategy`."""
        self.generator.set_state(state["generator"])
        self.jitter.set_state(state["jitter"])
