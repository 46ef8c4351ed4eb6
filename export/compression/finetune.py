"""Training for a .pfz: the photographs (or pictures of the scene as it was) against what the file will look like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.datasets.base import SceneData
from prismfield.datasets.views import View, Views
from prismfield.export.assets import SplatAsset
from prismfield.export.compression.compress import blending_weights, seeing_cameras
from prismfield.export.compression.pfz_grid import PfzSteps, grid_of
from prismfield.export.compression.pfz_write import encode_symbols
from prismfield.export.compression.rounded import RoundedGaussians
from prismfield.export.library import Scene, render
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.train.checkpoint import load_checkpoint
from prismfield.train.clock import Clock
from prismfield.train.config import TrainConfig
from prismfield.train.corrections import Exposure, PoseDeltas
from prismfield.train.folder import CHECKPOINTS
from prismfield.train.loop import Interrupt, loss_values, train_psnr, training_step
from prismfield.train.losses import loss_terms
from prismfield.train.run import part
from prismfield.train.session import Session, make_batches, make_optimizer
from prismfield.train.strategies.rows import keep_rows, order_rows, replace_rows

_ROUNDS, _THINNED = 6, 0.4  # times that Gaussians are dropped, over this share of the training
_ARRANGED = 16  # times that values are put in order
_WEIGHING_CAMERAS = 32
_USUAL_LOSS = 0.04  # of a photograph; learning rates are for that, and fall with it
_LOOKED_AT = 8  # photographs, to know the loss before training
_SETTLE = 0.6  # share of the training over which learning rates fall to a tenth
_OPACITY_BITS = 60.0  # about what a Gaussian costs


@dataclass(frozen=True)
class Finetuning:
    """How to train for a file."""

    steps: int
    """Updates, at least 1."""
    prune: float = 0.0
    """Share of the Gaussians that goes on the way."""
    rate: float = 0.0
    """What a bit of each Gaussian there is at first costs, as a share of the loss at first: alike in decibels for any scene."""
    seed: int = 0
    step: int | None = None
    """The run's checkpoint that the scene is of; None for the newest."""
    on_pictures: bool = False
    """Train on pictures of the scene as it is, even where there are photographs."""


Tell = Callable[[int, float, int], None]
"""Called after steps with how many are done, the PSNR of the training's picture and the number of Gaussians."""


def finetune(
    scene: Scene, asset: SplatAsset, importance: NDArray, steps: PfzSteps, options: Finetuning, tell: Tell
) -> bytes:
    """Train Gaussians to be rounded; the file's bytes.

    Args:
        scene: where they come from: its photographs are what they are trained on, or pictures of it where it has none.
        asset: what to begin with, of the same scene.
        importance: [N] of each.
        steps: how coarsely the file rounds.
        options: how long, and what is left out.
        tell: for those who wait.

    Raises:
        ImageError: a photograph is damaged.
        KeyboardInterrupt: Ctrl-C, after the step.
        ValueError: the training left the finite numbers.
    """
    torch.manual_seed(options.seed)
    values, grid = grid_of(asset, steps, importance)
    rounded = RoundedGaussians(values, grid, importance, scene.frame, asset.antialiased)
    session = _session(scene, rounded, options)
    loss = _loss_now(session)
    rounded.bit_price = options.rate * loss / len(asset)
    for group in session.optimizer.param_groups:  # steps too long for what is nearly right already would only lose it
        for name in ("lr_first", "lr_final"):
            group[name] *= min(max(loss / _USUAL_LOSS, 0.1), 1.0)
    interrupt = Interrupt()
    smooth = math.nan
    with interrupt.listen():
        while not session.clock.done:
            session.clock.start_step()
            batch, rgb, terms = training_step(session)
            session.clock.end_step()
            step = session.clock.step
            if interrupt.asked:
                raise KeyboardInterrupt
            if step % 10 == 0 or session.clock.done:
                loss_values(terms, step)
                now = train_psnr(batch, rgb)
                smooth = now if math.isnan(smooth) else smooth if math.isnan(now) else smooth + 0.1 * (now - smooth)
                tell(step, smooth, rounded.num_primitives)
    session.check_finite()
    return encode_symbols(rounded.symbols(), rounded.ranks(), grid, asset)


@torch.no_grad()
def _loss_now(session: Session) -> float:
    """Mean of a few photographs."""
    losses = []
    for _ in range(_LOOKED_AT):
        batch = session.batches.next(1)
        out = session.scene.render(batch.cameras, None, batch.background)
        rgb = out.rgb if session.exposure is None else session.exposure(out.rgb, batch.index)
        losses.append(sum(map(float, loss_terms(out, rgb, batch, session.scene, session.config.loss).values())))
    return sum(losses) / len(losses)


class Thinning:
    """The strategy (`train/strategies/base.py`) that drops the least important Gaussians bit by bit, and keeps values in order."""

    extras: tuple[str, ...] = ()

    def __init__(self, scene: RoundedGaussians, share: float, cameras: Sequence[Cameras], steps: int) -> None:
        """Nothing is dropped yet.

        Args:
            scene: what is trained.
            share: of its Gaussians to drop in all.
            cameras: in the scene's frame; say what is important.
            steps: of the training.
        """
        self.share, self.cameras, self.count = share, cameras, scene.num_primitives
        self.rounds_done = 0
        self.every = max(1, steps // _ARRANGED)

    def after_step(
        self, step: int, progress: float, scene: Any, optimizer: torch.optim.Optimizer, out: RenderOutput
    ) -> None:
        """See `Strategy`."""
        due = min(_ROUNDS, 1 + int(progress / _THINNED * (_ROUNDS - 1))) if self.share > 0 else 0
        is_last = progress >= 1
        if due > self.rounds_done:
            self.rounds_done = due
            self._drop(scene, optimizer, self.share * due / _ROUNDS)
        elif step % self.every != self.every - 1 and not is_last:
            return
        rows, values = scene.misshapen()
        if len(rows) and not is_last:
            replace_rows(scene, optimizer, rows, values)
        scene.opacity_bits = _OPACITY_BITS if 0 < self.rounds_done < _ROUNDS else 0.0
        order_rows(scene, optimizer, torch.from_numpy(scene.arrange()))
        scene.arrange()

    def _drop(self, scene: RoundedGaussians, optimizer: torch.optim.Optimizer, share: float) -> None:
        seen = blending_weights(lambda camera: scene.render(camera).rgb, scene.colors, self.cameras)
        with torch.no_grad():
            scene.importance.copy_(torch.from_numpy(seen / max(seen.mean(), 1e-30)))
        kept = max(1, round(self.count * (1 - share)))
        if kept >= scene.num_primitives:
            return
        keep = torch.zeros(scene.num_primitives, dtype=torch.bool)
        keep[scene.importance.argsort(descending=True, stable=True)[:kept]] = True
        keep_rows(scene, optimizer, keep)

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """See `Strategy`."""
        return {"rounds_done": self.rounds_done}

    def load_state_dict(self, state: dict[str, Any], scene: Any) -> None:
        """See `Strategy`."""
        self.rounds_done = int(state["rounds_done"])


class DrawnViews(Views):
    """Pictures of a scene in the place of photographs, drawn when they are first asked for, 8 bits a channel."""

    def __init__(self, scene: Scene, cameras: list[Cameras]) -> None:
        """Nothing is drawn yet; the cameras, one at a time, are in the user's frame."""
        self._scene, self._cameras = scene, cameras
        self._drawn: dict[int, View] = {}

    def __len__(self) -> int:
        return len(self._cameras)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._drawn:
            camera = self._cameras[index]
            with torch.no_grad():
                rgb = render(self._scene, camera).rgb[0]
            pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8)
            self._drawn[index] = View(self.camera(index), pixels, None, None, None)
        return self._drawn[index]

    def camera(self, index: int) -> Cameras:
        """In the scene's frame."""
        return self._scene.frame.cameras_to_scene(self._cameras[index])

    def prefetch(self, index: int) -> None:
        """Nothing: there is no file to read."""

    def size(self, index: int) -> tuple[int, int]:
        """(width, height)."""
        return self._cameras[index].width, self._cameras[index].height


def _session(scene: Scene, rounded: RoundedGaussians, options: Finetuning) -> Session:
    run = scene.run
    config = TrainConfig() if run is None else run.config
    config = replace(
        config,
        steps=options.steps,
        minutes=None,
        seed=options.seed,
        schedule=replace(config.schedule, resolution=(), settle=_SETTLE, sparse_adam=True),
        loss=replace(config.loss, opacity_reg=0.0, scale_reg=0.0),
    )
    data, views = _photographs(scene, options.on_pictures)
    budget = config.data.cache_mb << 18
    batches = make_batches(config, "image", views, scene.background, budget, torch.device("cpu"))
    is_drawn = isinstance(views, DrawnViews)
    exposure, poses = (None, None) if is_drawn else _corrections(scene, config, len(views), options.step)
    every = max(1, len(views) // _WEIGHING_CAMERAS)
    cameras = [views.camera(i) for i in range(0, len(views), every)]
    trained: Any = rounded  # all of the protocol `Representation` that a step asks for
    return Session(
        config=config,
        data=data,
        source=scene.path,
        train_views=views,
        test_views=views,
        background=scene.background,
        scene=trained,
        optimizer=make_optimizer(trained, None, None, config),
        strategy=Thinning(rounded, options.prune, cameras, options.steps),
        batches=batches,
        clock=Clock(options.steps, None),
        exposure=exposure,
        poses=poses,
        device=torch.device("cpu"),
    )


def _photographs(scene: Scene, on_pictures: bool) -> tuple[SceneData, Views]:
    """The run's training photographs; without any, pictures from where importance is measured."""
    run = scene.run
    if run is not None and not on_pictures:
        try:
            data = run.data
            options = {"downscale": run.config.downscale, "byte_budget": run.config.data.cache_mb << 19}
            if data.train:
                return data, Views(data.train, scale=data.frame.scale, **options)
        except OSError:
            pass  # the capture was moved away
    nothing = SceneData(
        scene.path.stem, Path(), "transforms", [], [], None, scene.frame, torch.zeros(2, 3), None, "none"
    )
    return nothing, DrawnViews(scene, seeing_cameras(scene))


def _corrections(
    scene: Scene, config: TrainConfig, images: int, step: int | None
) -> tuple[Exposure | None, PoseDeltas | None]:
    """What the run has learnt about its photographs, which stays as it is."""
    run = scene.run
    if run is None or not (config.exposure.enabled or config.pose.enabled):
        return None, None
    tensors, _ = load_checkpoint(run.path / CHECKPOINTS, step)
    found: list[Any] = []
    for name, kind, is_on in (
        ("exposure", Exposure, config.exposure.enabled),
        ("poses", PoseDeltas, config.pose.enabled),
    ):
        module = kind(images) if is_on and len(part(tensors, name)) else None
        if module is not None:
            module.load_state_dict(part(tensors, name))
            module.requires_grad_(False)
        found.append(module)
    return found[0], found[1]
