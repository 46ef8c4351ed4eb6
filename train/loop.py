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
from prismfield.train.batches import Batch
from prismfield.train.config import TrainConfig
from prismfield.train.evaluate import evaluate_views, mean, psnr
from prismfield.train.losses import loss_terms
from prismfield.train.progress import Progress
from prismfield.train.session import Session

log = logging.getLogger("prismfield")


class Interrupt:
    """Set by Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take the signals for the time of a `with` block; only possible on the main thread."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

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
        ValueError: the loss is no longer finite; the last checkpoint stays as it is.
    """
    config, clock, interrupt = session.config, session.clock, Interrupt()
    saved_at, saved_step, tests_done = time.monotonic(), -1, int(clock.progress * config.log.test_times)
    with interrupt.listen():
        while not clock.done and interrupt.signal is None and clock.step != config.pause_at:
            clock.start_step()
            batch, out, terms = training_step(session)
            clock.end_step()
            if clock.step % config.log.every == 0 or clock.done:
                progress.log(session, check_finite(terms, session), train_psnr(session, batch, out))
            progress.advance(session)
            if clock.progress * config.log.test_times >= tests_done + 1 and not clock.done:
                tests_done += 1
                progress.tested(session, quick_psnr(session))
            if time.monotonic() - saved_at > 60 * config.log.checkpoint_minutes:
                session.save(folder)
                saved_at, saved_step = time.monotonic(), clock.step
            if viewer is not None:
                viewer.update(clock.step, progress.latest)
                while viewer.paused and interrupt.signal is None:
                    viewer.wait()
        if clock.step != saved_step:
            session.save(folder)
    return clock.done


def training_step(session: Session) -> tuple[Batch, RenderOutput, dict[str, Tensor]]:
    """One update of the scene."""
    config, scene, optimizer = session.config, session.scene, session.optimizer
    set_rates(optimizer, session.clock)
    batch = session.batches.next(shrink_factor(session, config))
    cameras = batch.cameras.to(session.device)
    if session.poses is not None:
        cameras = session.poses(cameras, batch.index)
    extras = {*session.strategy.extras, *(("depth",) if config.loss.depth_weight and batch.depth is not None else ())}
    out = scene.render(cameras, batch.pixels, batch.background.to(session.device), extras)
    rgb = out.rgb if session.exposure is None else session.exposure(out.rgb, batch.index)
    terms = loss_terms(out, rgb, batch, scene, config.loss)
    optimizer.zero_grad(set_to_none=True)
    sum(terms.values(), torch.zeros(())).backward()
    seen = (out.radii[..., 0] > 0).any(0) if config.schedule.sparse_adam and out.radii is not None else None
    optimizer.step(rows=seen)
    step, done = session.clock.step, session.clock.progress_after_step()
    session.strategy.after_step(step, done, scene, optimizer, out)
    return batch, out, terms


def set_rates(optimizer: torch.optim.Optimizer, clock: Any) -> None:
    """Learning rates decay exponentially with the progress; rarely updated parameters wait for their turn."""
    for group in optimizer.param_groups:
        if "lr_final" in group:
            group["lr"] = group["lr_first"] * (group["lr_final"] / group["lr_first"]) ** clock.progress
        if group.get("every", 1) > 1:
            group["params"][0].requires_grad_(clock.step % group["every"] == 0)


def shrink_factor(session: Session, config: TrainConfig) -> int:
    """How many times smaller images are drawn now."""
    left = sum(session.clock.progress < share for share in config.schedule.resolution)
    width, height = session.train_views.size(0)
    while left > 0 and min(width, height) // 2**left < config.schedule.min_side:
        left -= 1
    return 2**left


def check_finite(terms: dict[str, Tensor], session: Session) -> dict[str, float]:
    """The terms as numbers."""
    values = {name: float(term.detach()) for name, term in terms.items()}
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise ValueError(
                f"training stopped: the {name} loss is {value} at step {session.clock.step}; lower the learning rates, "
                "or look at the data with render-data check"
            )
    return values


@torch.no_grad()
def train_psnr(session: Session, batch: Batch, out: RenderOutput) -> float:
    """Decibels of this step's image."""
    truth = batch.rgb.float() / 255 if batch.rgb.dtype == torch.uint8 else batch.rgb
    rgb = out.rgb if session.exposure is None else session.exposure(out.rgb, batch.index)
    return psnr(rgb.detach().cpu().clamp(0, 1), truth, batch.mask)


def quick_psnr(session: Session, most: int = 4) -> float:
    """Mean over a few test views."""
    count = len(session.test_views)
    if count == 0:
        return float("nan")
    indices = range(0, count, max(1, count // most))
    options = {"use_masks": session.config.data.masks, "device": session.device}
    results = list(evaluate_views(session.scene, session.test_views, session.background, indices=indices, **options))
    return mean(results, lambda result: result.psnr)
