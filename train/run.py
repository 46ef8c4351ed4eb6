"""A trained scene, taken out of a run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prismfield.datasets.base import SceneData, SceneFrame
from prismfield.datasets.scenes import load_scene
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.representations.compact import CompactGaussians
from prismfield.train.checkpoint import load_checkpoint
from prismfield.train.config import TrainConfig
from prismfield.train.folder import CHECKPOINTS, read_config


@dataclass(frozen=True)
class Run:
    """A trained scene and where it came from."""

    path: Path
    config: TrainConfig
    scene: Representation
    """On the device that was asked for."""
    frame: SceneFrame
    """How to get from the scene's units to the user's."""
    background: float
    """Value behind the scene, of all three channels."""
    step: int
    seconds: float
    """Spent training."""
    source: str
    """Absolute path of the capture."""

    @cached_property
    def data(self) -> SceneData:
        """The capture, read when first asked for."""
        return load_scene(self.source, eval_every_nth=self.config.eval_every_nth)


def load_run(path: Path, *, device: torch.device | str = "cpu", step: int | None = None) -> Run:
    """The newest whole checkpoint of a run, or that of `step`.

    Raises:
        FileNotFoundError: `path` is not a run's folder.
        ValueError: it holds no whole checkpoint, or none of that step.
    """
    config = read_config(path)
    tensors, state = load_checkpoint(path / CHECKPOINTS, step)
    scene = scene_from_checkpoint(config, tensors, state)
    if isinstance(scene, CompactGaussians):
        scene = scene.baked()
    scene.to(device)
    frame = SceneFrame.from_dict(state["frame"])
    return Run(path, config, scene, frame, state["background"], state["step"], state["seconds"], state["source"])


def scene_from_checkpoint(config: TrainConfig, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Any:
    """The scene whose tensors were saved under "scene.", as it was trained."""
    saved, options = part(tensors, "scene"), representation_config(config)
    if config.compact.asked:
        scene: Any = CompactGaussians(saved, options, config.compact)
    else:
        scene = REPRESENTATIONS[config.representation].from_tensors(saved, options)
    for name, value in state["scene"].items():
        setattr(scene, name, value)
    return scene


def representation_config(config: TrainConfig) -> Any:
    """The part of the config that the chosen representation takes."""
    return getattr(config, config.representation)


def part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What was saved under "`name`.", without that prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
