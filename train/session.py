"""Everything that changes while a scene trains, in one place: what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismfield.datasets.base import Points, SceneData
from prismfield.datasets.initial import initial_points
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import Views
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.train.batches import COLORS, Batches
from prismfield.train.checkpoint import load_checkpoint, save_checkpoint
from prismfield.train.clock import Clock
from prismfield.train.config import FREE_ON_RESUME, TrainConfig
from prismfield.train.corrections import Exposure, PoseDeltas
from prismfield.train.optimizer import FusedAdam
from prismfield.train.run import CHECKPOINTS, representation_config, scene_from_checkpoint
from prismfield.train.strategies.base import STRATEGIES, Strategy

log = logging.getLogger("prismfield")


@dataclass
class Session:
    """A training under way."""

    config: TrainConfig
    data: SceneData
    train_views: Views
    test_views: Views
    background: float
    scene: Representation
    optimizer: FusedAdam
    strategy: Strategy
    batches: Batches
    clock: Clock
    exposure: Exposure | None
    poses: PoseDeltas | None
    device: torch.device

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of everything."""
        tensors = {f"scene.{name}": value for name, value in self.scene.tensors().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.tensors().items()}
        for name, module in self._corrections().items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        numbers: dict[str, Any] = {}
        for part, state in (("strategy", self.strategy.state_dict()), ("batches", self.batches.state_dict())):
            tensors |= {f"{part}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
            numbers[part] = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        state = numbers | {
            "seconds": self.clock.seconds,
            "updates": self.optimizer.counts(),
            "frame": self.data.frame.to_dict(),
            "background": self.background,
            "scene": {"active_sh_degree": self.scene.active_sh_degree} if hasattr(self.scene, "active_sh_degree") else {},
        }
        tensors["rng"] = torch.get_rng_state()
        return save_checkpoint(folder / CHECKPOINTS, self.clock.step, tensors, state)

    def restore(self, folder: Path) -> None:
        """Take up the newest whole checkpoint."""
        tensors, state = load_checkpoint(folder / CHECKPOINTS)
        self.scene = scene_from_checkpoint(self.config, tensors, state).to(self.device)
        for name, module in self._corrections().items():
            module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        self.optimizer = make_optimizer(self.scene, self.exposure, self.poses, self.config)
        self.optimizer.restore(_part(tensors, "optimizer"), state["updates"])
        self.strategy.load_state_dict(_part(tensors, "strategy") | state["strategy"], self.scene)
        self.batches.load_state_dict(_part(tensors, "batches") | state["batches"])
        self.clock.step, self.clock.seconds = state["step"], state["seconds"]
        torch.set_rng_state(tensors["rng"])

    def _corrections(self) -> dict[str, torch.nn.Module]:
        modules = {"exposure": self.exposure, "poses": self.poses}
        return {name: module for name, module in modules.items() if module is not None}


def _part(tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def start_session(config: TrainConfig, device: torch.device) -> Session:
    """Read the capture and make a scene to train.

    Raises:
        ValueError: the capture cannot be used as it is.
    """
    torch.manual_seed(config.seed)
    data = load_scene(config.scene, eval_every_nth=config.eval_every_nth)
    if not data.train:
        raise ValueError(f"{data.root}: no training images are left by this split ({data.split})")
    options: dict[str, Any] = {"downscale": config.downscale, "scale": data.frame.scale}
    train_views = Views(data.train, byte_budget=config.data.cache_mb << 20, **options)
    test_views = Views(data.test, byte_budget=config.data.cache_mb << 18, **options)
    background = COLORS[data.background]
    scene = initial_scene(config, data).to(device)
    exposure = Exposure(len(train_views)).to(device) if config.exposure.enabled else None
    poses = PoseDeltas(len(train_views)).to(device) if config.pose.enabled else None
    strategy = STRATEGIES[config.strategy](
        getattr(config, config.strategy, None), scene, max_primitives=config.max_primitives, seed=config.seed
    )
    batches = Batches(
        train_views,
        background=background,
        random_background=config.data.random_background and data.background is not None,
        use_masks=config.data.masks,
        seed=config.seed,
    )
    return Session(
        config,
        data,
        train_views,
        test_views,
        background,
        scene,
        make_optimizer(scene, exposure, poses, config),
        strategy,
        batches,
        Clock(config.steps, config.minutes),
        exposure,
        poses,
        device,
    )


def initial_scene(config: TrainConfig, data: SceneData) -> Any:
    """The scene before the first step: from `config.init`, or from points."""
    representation = REPRESENTATIONS[config.representation]
    if config.init is not None:
        from prismfield.export.ply import read_ply  # not at the top: export builds on train

        asset = read_ply(config.init)
        if len(asset) > config.max_primitives:
            raise ValueError(f"{config.init}: {len(asset)} splats, more than --max-primitives {config.max_primitives}")
        tensors = asset.to_tensors(data.frame, sh_degree=config.gaussians.sh_degree)
        return representation.from_tensors(tensors, representation_config(config))
    points = initial_points(data, config.data.initial_points, config.seed, config.data.points)
    if len(points) > config.max_primitives:
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(points), generator=generator)[: config.max_primitives].sort().values
        points = Points(points.xyz[chosen], points.rgb[chosen])
    log.info("starting from %d points", len(points))
    return representation.from_points(points.xyz, points.rgb, data.aabb, representation_config(config))


def make_optimizer(
    scene: Representation, exposure: Exposure | None, poses: PoseDeltas | None, config: TrainConfig
) -> FusedAdam:
    """One optimizer over the scene and the corrections."""
    groups = scene.param_groups()
    if exposure is not None:
        rates = {"lr": config.exposure.lr, "lr_final": config.exposure.lr / 10}
        groups.append({"name": "exposure", "params": [exposure.affine], "sparse": False} | rates)
    if poses is not None:
        rates = {"lr": config.pose.lr, "lr_final": config.pose.lr / 100}
        groups.append({"name": "poses", "params": [poses.deltas], "sparse": False} | rates)
    for group in groups:
        group["lr_first"] = group["lr"]
    return FusedAdam(groups)


def check_resumed(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """The config to go on with: the saved one, with what may change taken from the new.

    Raises:
        ValueError: the new one differs where it may not; the message names the fields.
    """
    default = TrainConfig()
    changed, free = [], {}
    for field in dataclasses.fields(TrainConfig):
        asked = getattr(config, field.name)
        if asked == getattr(default, field.name):
            continue  # not mentioned: as saved
        if field.name in FREE_ON_RESUME:
            free[field.name] = asked
        elif asked != getattr(saved, field.name):
            changed.append(field.name)
    if changed:
        raise ValueError(
            f"--resume {config.resume}: the run was trained with another {', '.join(changed)}; leave that out, or start a new run"
        )
    # A pause belongs to the command that asked for it.
    return dataclasses.replace(saved, **({"pause_at": None} | free))
