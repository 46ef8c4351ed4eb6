"""The training loop, one for all representations."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.train.batches import Batch, ImageError
from prismfield.train.clock import Clock
from prismfield.train.config import TrainConfig
from prismfield.train.evaluate import ViewResult, evaluate_views
from prismfield.train.losses import loss_terms
from prismfield.train.metrics import psnr
from prismfield.train.progress import Progress
from prismfield.train.session import Session

_SETTLED = 0.1  # of a learning rate is left at the end
_WATCHED_STEPS = 10  # between looks at the loss: often enough for the display, seldom enough to cost nothing

log = logging.getLogger("prismfield")


class Interrupt:
    """Ctrl-C or SIGTERM ask for an end after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take the signals for the time of a `with` block; only possible on the main thread."""

        def note(_number: int, _frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever called us handles signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(session: Session, folder: Path, progress: Progress, viewer: Any = None) -> bool:
    """Run the session to its end, writing checkpoints into `folder`.

    Returns:
        Whether it reached the end; False if a signal or `pause_at` stopped it. The last state is saved either way.

    Raises:
        ImageError: a training image is damaged or gone; the state is saved.
        ValueError: the loss or a parameter is no longer finite; the last checkpoint stays as it is.
    """
    config, clock, interrupt = session.config, session.clock, Interrupt()
    tests_done, saved_at = int(clock.progress * (config.log.tests + 1)), time.monotonic()
    with interrupt.listen():
        while not clock.done and not interrupt.asked and clock.step != config.pause_at:
            clock.start_step()
            try:
                batch, rgb, terms = training_step(session)
            except ImageError:
                session.save(folder)
                log.info("saved; once the image is mended, go on with: render-train --resume %s", folder)
                raise
            clock.end_step()
            if clock.step % _WATCHED_STEPS == 0 or clock.step == 1 or clock.done:
                progress.watch(session, loss_values(terms, clock.step), train_psnr(batch, rgb))
            if int(clock.progress * (config.log.tests + 1)) > tests_done and not clock.done:
                tests_done = int(clock.progress * (config.log.tests + 1))
                session.check_finite()
                progress.tested(session, evaluate_session(session))
            if checkpoint_due(config, clock.step, time.monotonic() - saved_at):
                session.save(folder)
                saved_at = time.monotonic()
            if viewer is not None:
                viewer.update(clock.step, progress.latest)
                while viewer.paused and not interrupt.asked:
                    viewer.wait()
        session.save(folder)
    return clock.done


def training_step(session: Session) -> tuple[Batch, Tensor, dict[str, Tensor]]:
    """One update of the scene; returns what it saw, what it rendered (exposure included) and the terms of its loss.

    On a GPU nothing here waits for it but the rasterizer, once, for the number of intersections; growth steps wait more often.
    """
    config, scene, optimizer, clock = session.config, session.scene, session.optimizer, session.clock
    set_rates(optimizer, clock, config.schedule.settle)
    batch = session.batches.next(shrink_factor(session, config))
    cameras = batch.cameras if session.poses is None else session.poses(batch.cameras, batch.index)
    extras = {*session.strategy.extras, *(("depth",) if config.loss.depth_weight and batch.depth is not None else ())}
    out = scene.render(cameras, batch.pixels, batch.background, extras)
    rgb = out.rgb if session.exposure is None else session.exposure(out.rgb, batch.index)
    terms = loss_terms(out, rgb, batch, scene, config.loss)
    optimizer.zero_grad(set_to_none=True)
    sum(terms.values(), torch.zeros((), device=session.device)).backward()
    optimizer.step(rows=drawn_rows(out) if config.schedule.sparse_adam else None)
    session.strategy.after_step(clock.step, clock.progress_after_step(), scene, optimizer, out)
    return batch, rgb.detach(), terms


def drawn_rows(out: RenderOutput) -> Tensor | None:
    """[N] bool, True where a primitive was drawn in some image; None if the representation does not say."""
    return None if out.radii is None else (out.radii[..., 0] > 0).any(0)


def set_rates(optimizer: torch.optim.Optimizer, clock: Clock, settle: float) -> None:
    """Learning rates decay exponentially: to their own end throughout, or to a tenth over the share `settle` at the end.

    Rarely updated parameters wait for their turn.
    """
    settled = (clock.progress - 1 + settle) / settle if settle > 0 else 0.0
    for group in optimizer.param_groups:
        if group.get("lr_final") and group["lr_first"]:
            group["lr"] = group["lr_first"] * (group["lr_final"] / group["lr_first"]) ** clock.progress
        else:
            group["lr"] = group["lr_first"] * _SETTLED ** max(0.0, settled)
        if group.get("every", 1) > 1:
            group["params"][0].requires_grad_(clock.step % group["every"] == 0)


def shrink_factor(session: Session, config: TrainConfig) -> int:
    """How many times smaller images are drawn now."""
    left = sum(session.clock.progress < share for share in config.schedule.resolution)
    while left > 0 and min(session.train_views.size(0)) // 2**left < config.schedule.min_side:
        left -= 1
    return 2**left


def checkpoint_due(config: TrainConfig, step: int, seconds: float) -> bool:
    """Whether to save now, `seconds` after the last time."""
    by_time = 0 < 60 * config.log.checkpoint_minutes <= seconds
    return by_time or (config.log.checkpoint_steps > 0 and step % config.log.checkpoint_steps == 0)


def loss_values(terms: dict[str, Tensor], step: int) -> dict[str, float]:
    """The terms as numbers.

    Raises:
        ValueError: one is not finite.
    """
    values = {name: float(term.detach()) for name, term in terms.items()}
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(
                f"training stopped: the {name} loss is {value} at step {step}; earlier checkpoints are kept; lower the "
                "learning rates, or look at the data with render-data check"
            )
    return values


def evaluate_session(session: Session) -> list[ViewResult]:
    """The test views as the scene renders them now."""
    options: dict[str, Any] = {"use_masks": session.config.data.masks, "device": session.device}
    return list(evaluate_views(session.scene, session.test_views, session.background, **options))


@torch.no_grad()
def train_psnr(batch: Batch, rgb: Tensor) -> float:
    """Decibels of a training step's image; NaN if nothing in it counts."""
    return psnr(rgb.clamp(0, 1), batch.rgb_float, batch.mask)
