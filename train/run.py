"""A run's folder: what is in it, and a trained scene taken out of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from prismfield.datasets.base import SceneData, SceneFrame
from prismfield.datasets.scenes import load_scene
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.train.checkpoint import checkpoints, load_checkpoint
from prismfield.train.config import TrainConfig, from_json, to_json

CONFIG, METRICS, CHECKPOINTS, TEST, REPORT = "config.json", "metrics.jsonl", "checkpoints", "test", "report.md"


@dataclass
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

    @cached_property
    def data(self) -> SceneData:
        """The capture, read when first asked for."""
        return load_scene(self.config.scene, eval_every_nth=self.config.eval_every_nth)


def load_run(path: Path, *, device: str = "cpu") -> Run:
    """The newest whole checkpoint of a run.

    Raises:
        ValueError: `path` is not a run's folder or holds no whole checkpoint.
    """
    config = read_config(path)
    tensors, state = load_checkpoint(path / CHECKPOINTS)
    scene = scene_from_checkpoint(config, tensors, state).to(device)
    frame = SceneFrame.from_dict(state["frame"])
    return Run(path, config, scene, frame, state["background"], state["step"], state["seconds"])


def scene_from_checkpoint(config: TrainConfig, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Any:
    """The scene whose tensors were saved under "scene."."""
    own = {name.removeprefix("scene."): value for name, value in tensors.items() if name.startswith("scene.")}
    scene = REPRESENTATIONS[config.representation].from_tensors(own, representation_config(config))
    for name, value in state["scene"].items():
        setattr(scene, name, value)
    return scene


def representation_config(config: TrainConfig) -> Any:
    """The part of the config that the chosen representation takes."""
    return getattr(config, config.representation)


def read_config(path: Path) -> TrainConfig:
    """The config of the run in folder `path`."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such run folder")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: not a run folder ({CONFIG} is missing)")
    return from_json((path / CONFIG).read_text(), str(path / CONFIG))


def new_folder(config: TrainConfig, scene_name: str) -> Path:
    """Make the run's folder and write its config.

    Raises:
        ValueError: the folder already holds a run.
    """
    path = config.out or Path("runs") / scene_name / time.strftime("%Y-%m-%d_%H%M%S")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = f"; go on with it by --resume {path}" if checkpoints(path / CHECKPOINTS) else ""
        raise ValueError(f"{path}: already exists and is not empty{hint}")
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / CONFIG, to_json(config))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
