"""Everything that changes while a scene trains, in one place: what a checkpoint holds."""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismfield.datasets.base import Points, SceneData
from prismfield.datasets.initial import initial_points
from prismfield.datasets.scenes import find_scene, load_scene
from prismfield.datasets.views import Views
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.representations.compact import CompactGaussians
from prismfield.representations.config import TRAINED_BY
from prismfield.train.batches import COLORS, Batches, PixelBatches
from prismfield.train.checkpoint import load_checkpoint, save_checkpoint
from prismfield.train.clock import Clock
from prismfield.train.config import TrainConfig
from prismfield.train.corrections import Exposure, PoseDeltas
from prismfield.train.folder import CHECKPOINTS
from prismfield.train.optimizer import FusedAdam
from prismfield.train.run import part, representation_config, scene_from_checkpoint
from prismfield.train.strategies.base import STRATEGIES, Strategy
from prismfield.train.strategies.compact import Compact
from prismfield.train.warm_start import scene_from_file

log = logging.getLogger("prismfield")


@dataclass
class Session:
    """A training under way."""

    config: TrainConfig
    data: SceneData
    source: Path
    """Where the capture is."""
    train_views: Views
    test_views: Views
    background: float
    """Value behind the scene, of all three channels."""
    scene: Representation
    optimizer: FusedAdam
    strategy: Strategy
    batches: Batches | PixelBatches
    clock: Clock
    exposure: Exposure | None
    poses: PoseDeltas | None
    device: torch.device

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of everything.

        Raises:
            ValueError: a parameter is not finite; the earlier checkpoints stay.
        """
        self.check_finite()
        tensors = {f"scene.{name}": value for name, value in self.scene.tensors().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.tensors().items()}
        for name, module in self._corrections().items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        numbers: dict[str, Any] = {}
        for name, state in (("strategy", self.strategy.state_dict()), ("batches", self.batches.state_dict())):
            tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
            numbers[name] = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        tensors["rng.torch"] = torch.get_rng_state()
        kind, keys, *rest = np.random.get_state(legacy=True)  # somebody's code may draw from it
        tensors["rng.numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
        numbers["rng"] = {"numpy": [str(kind), *rest], "python": random.getstate()}
        active = {"active_sh_degree": self.scene.active_sh_degree} if hasattr(self.scene, "active_sh_degree") else {}
        state = numbers | {
            "seconds": self.clock.seconds,
            "updates": self.optimizer.counts(),
            "frame": self.data.frame.to_dict(),
            "background": self.background,
            "source": str(self.source),
            "images": self.images_digest(),
            "device": self.device.type,
            "scene": active,
        }
        return save_checkpoint(folder / CHECKPOINTS, self.clock.step, tensors, state)

    def restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take up a checkpoint; the scene is the one in it already.

        Raises:
            ValueError: the capture's images are not those that the checkpoint was trained on.
        """
        if state["images"] != self.images_digest():
            raise ValueError(f"{self.data.root}: its images are not those that the run was trained on; start a new run")
        for name, module in self._corrections().items():
            module.load_state_dict(part(tensors, name))
        self.optimizer.restore(part(tensors, "optimizer"), state["updates"])
        self.strategy.load_state_dict(part(tensors, "strategy") | state["strategy"], self.scene)
        self.batches.load_state_dict(part(tensors, "batches"))
        self.clock.step, self.clock.seconds = state["step"], state["seconds"]
        torch.set_rng_state(tensors["rng.torch"])
        kind, *rest = state["rng"]["numpy"]
        np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), *rest))
        version, keys, gauss = state["rng"]["python"]
        random.setstate((version, tuple(keys), gauss))

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise a ValueError if a parameter is not finite: what is broken is not drawn, and no loss would tell."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not torch.isfinite(parameter.sum()) and not torch.isfinite(parameter).all():
                    raise ValueError(
                        f"training stopped: {group['name']} is no longer finite at step {self.clock.step}; earlier "
                        "checkpoints are kept; lower the learning rates, or look at the data with render-data check"
                    )

    def images_digest(self) -> str:
        """Tells one set of training images from another."""
        names = [f"{self.train_views.frame(i).name} {self.train_views.size(i)}" for i in range(len(self.train_views))]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def _corrections(self) -> dict[str, torch.nn.Module]:
        modules = {"exposure": self.exposure, "poses": self.poses}
        return {name: module for name, module in modules.items() if module is not None}


def start_session(config: TrainConfig, device: torch.device, folder: Path | None = None) -> Session:
    """Read the capture and make a scene to train, or take up the newest whole checkpoint in `folder`.

    Raises:
        ValueError: the capture or the checkpoint cannot be used as it is.
    """
    torch.manual_seed(config.seed)
    np.random.seed(config.seed % 2**32)  # ours draws from generators; somebody's code may not
    random.seed(config.seed)
    saved = None if folder is None else load_checkpoint(folder / CHECKPOINTS)
    if saved is not None and saved[1]["device"] != device.type:
        before = saved[1]["device"]
        raise ValueError(f"{folder}: was trained on {before}, cannot go on exactly on {device.type}; --device {before}")
    source = find_scene(config.scene if saved is None else saved[1]["source"]).resolve()
    data = load_scene(str(source), eval_every_nth=config.eval_every_nth)
    for warning in data.warnings:
        log.warning("%s", warning)
    budget = config.data.cache_mb << 20
    options: dict[str, Any] = {"downscale": config.downscale, "scale": data.frame.scale}
    # On a GPU half of it is there, and what is there is not asked for again; on the CPU only what is not a view's own.
    batch_budget = budget // 4 if device.type == "cpu" else budget // 2
    test_views = Views(data.test, byte_budget=budget // 8, **options)
    train_views = Views(data.train, byte_budget=budget - budget // 8 - batch_budget, **options)
    _decode_early(test_views, budget // 8)
    background = COLORS[data.background]
    if saved is not None:
        scene = scene_from_checkpoint(config, *saved).to(device)
    else:
        scene = initial_scene(config, data, test_views, device)
        scene = (CompactGaussians.made_of(scene, config.compact) if config.compact.asked else scene).to(device)
    if saved is None and (observe := getattr(scene, "observe", None)) is not None:
        observe([train_views.camera(index) for index in range(len(train_views))])
    exposure = Exposure(len(train_views)).to(device) if config.exposure.enabled else None
    poses = PoseDeltas(len(train_views)).to(device) if config.pose.enabled else None
    name = config.strategy or TRAINED_BY[config.representation][0]
    strategy = STRATEGIES[name](
        getattr(config, name, None), scene, max_primitives=config.max_primitives, seed=config.seed
    )
    if isinstance(scene, CompactGaussians):
        strategy = Compact(strategy, scene)
    batches = make_batches(config, scene.batching, train_views, background, batch_budget, device)
    session = Session(
        config,
        data,
        source,
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
    if saved is not None:
        session.restore(*saved)
    return session


def make_batches(
    config: TrainConfig, batching: str, views: Views, background: float, byte_budget: int, device: torch.device
) -> Batches | PixelBatches:
    """What the steps see: whole images, or pixels."""
    options: dict[str, Any] = {
        "background": background,
        "random_background": config.data.random_background,
        "use_masks": config.data.masks,
        "cut_out": config.data.cut_out,
        "seed": config.seed,
        "byte_budget": byte_budget,
        "device": device,
    }
    if batching == "image":
        return Batches(views, **options)
    # Over one colour alone, fog of that colour in empty space goes unnoticed.
    options["random_background"] = True
    return PixelBatches(views, samples=config.schedule.samples, with_depth=config.loss.depth_weight > 0, **options)


def _decode_early(test_views: Views, byte_budget: int) -> None:
    """Decode the test views if they can stay in memory: a damaged file should not show only after the training."""
    sizes = [test_views.size(index) for index in range(len(test_views))]
    if sum(4 * width * height for width, height in sizes) <= byte_budget:
        for index in range(len(test_views)):
            test_views[index]


def initial_scene(config: TrainConfig, data: SceneData, test_views: Views, device: torch.device) -> Any:
    """The scene before the first step: from `config.init`, which is measured on the test views, or from points.

    Raises:
        FileNotFoundError: there is no such `config.init`.
        ValueError: it is no file of primitives, has more than `config.max_primitives`, or cannot become what is asked for.
    """
    representation, options = REPRESENTATIONS[config.representation], representation_config(config)
    if config.init is not None:
        return scene_from_file(config, options, data, test_views, device)
    if getattr(options, "extent", None) == "auto":
        options = replace(options, extent="space" if data.background is None else "box")
    if representation.batching == "pixels":  # nothing is made of points
        return representation.from_points(torch.zeros(0, 3), torch.zeros(0, 3), data.aabb, options)
    points = initial_points(data, config.data.initial_points, config.seed, config.data.points)
    if len(points) > config.max_primitives:
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(points), generator=generator)[: config.max_primitives].sort().values
        points = Points(points.xyz[chosen], points.rgb[chosen])
    log.info("starting from %d points", len(points))
    return representation.from_points(points.xyz, points.rgb, data.aabb, options)


def make_optimizer(
    scene: Representation, exposure: Exposure | None, poses: PoseDeltas | None, config: TrainConfig
) -> FusedAdam:
    """One optimizer over the scene and the corrections."""
    groups = scene.param_groups()
    if exposure is not None:
        rates = {"lr": config.exposure.lr, "lr_final": config.exposure.lr / 10}
        groups.append({"name": "exposure", "params": [exposure.deltas], "sparse": False} | rates)
    if poses is not None:
        rates = {"lr": config.pose.lr, "lr_final": config.pose.lr / 100}
        groups.append({"name": "poses", "params": [poses.deltas], "sparse": False} | rates)
    for group in groups:
        group["lr_first"] = group["lr"]
    return FusedAdam(groups)
