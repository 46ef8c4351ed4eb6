"""What every strategy offers, and the table of those there are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.train.strategies.adc import Adc
from prismfield.train.strategies.fixed import Fixed
from prismfield.train.strategies.mcmc import Mcmc
from prismfield.train.strategies.occupancy import Occupancy
from prismfield.train.strategies.split import Split

State = dict[str, Tensor | float | int]


class Strategy(Protocol):
    """Edits a scene between steps: grows, prunes, raises the degree of the harmonics, finds out what is empty."""

    @property
    def extras(self) -> Collection[str]:
        """What it needs `render` to compute (see `render.rasterize.EXTRAS`)."""
        ...

    def after_step(
        self, step: int, progress: float, scene: Any, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """Called after the update, while the gradients of `out` are still there.

        Args:
            step: the first is 0.
            progress: share of the training that is done, this step included; 1 after the last.
            scene: parameters may be exchanged for others of another length.
            optimizer: changed together with the scene.
            out: of this step's `render`, with `extras`.
        """
        ...

    def state_dict(self) -> State:
        """Tensors and numbers, enough to go on exactly."""
        ...

    def load_state_dict(self, state: State, scene: Any) -> None:
        """Take up `state`; `scene` is the one it was saved with, and gets back what its tensors do not say."""
        ...


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fixed": Fixed,
    "adc": Adc,
    "mcmc": Mcmc,
    "split": Split,
    "occupancy": Occupancy,
}
"""Name to class. Each is built from `(config, scene, *, max_primitives, seed)`; `fixed` ignores its config."""
