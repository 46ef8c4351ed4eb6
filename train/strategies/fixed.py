"""The strategy that neither adds nor drops anything; those of splats (`representations/splats.py`) start from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput


class Fixed:
    """Raises the degree of the harmonics and leaves the primitives as they are."""

    extras: tuple[str, ...] = ()

    def __init__(self, config: Any, scene: Any, *, max_primitives: int, seed: int) -> None:
        if max_primitives < 1:
            raise ValueError(f"max_primitives: expected at least 1, got {max_primitives}")
        self.config = config
        self.max_primitives = max_primitives
        self.generator = torch.Generator(scene.opacity_logits.device).manual_seed(seed)
        self.sh_degree = scene.active_sh_degree

    def after_step(
        self, step: int, progress: float, scene: Any, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        # Never lowered: a scene that started from a finished one keeps its harmonics.
        wanted = min(scene.sh_degree, scene.config.sh_degree_at(progress))
        scene.active_sh_degree = self.sh_degree = max(scene.active_sh_degree, wanted)

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        return {"sh_degree": self.sh_degree, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], scene: Any) -> None:
        """See `Strategy`."""
        self.sh_degree = scene.active_sh_degree = int(state["sh_degree"])
        self.generator.set_state(state["generator"])
