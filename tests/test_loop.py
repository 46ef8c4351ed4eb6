"""What changes from step to step, how a training is asked to end, and what happens when its numbers run away."""

from __future__ import annotations

import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.train.batches import Batch
from prismfield.train.checkpoint import load_checkpoint
from prismfield.train.clock import Clock
from prismfield.train.config import LogConfig, ScheduleConfig, TrainConfig
from prismfield.train.loop import (
    Interrupt,
    checkpoint_due,
    drawn_rows,
    loss_values,
    set_rates,
    shrink_factor,
    train_psnr,
)

from .commands import command


def clock_at(step: int, steps: int = 100) -> Clock:
    clock = Clock(steps, None)
    clock.step = step
    return clock


def rates(step: int, settle: float) -> dict[str, float]:
    """Of one parameter that decays to its own end, one that does not, and one that stands still."""
    named = {"decays": {"lr_first": 0.8, "lr_final": 0.008}, "steady": {"lr_first": 0.5}, "still": {"lr_first": 0.0}}
    groups = [
        {"name": name, "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 9.0, **values}
        for name, values in named.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_rates(optimizer, clock_at(step), settle)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("step", "settle", "decays", "steady"),
    [
        (0, 0.2, 0.8, 0.5),
        (50, 0.2, 0.08, 0.5),
        (80, 0.2, 0.8 * 0.01**0.8, 0.5),
        (90, 0.2, 0.8 * 0.01**0.9, 0.5 * 0.1**0.5),
        (100, 0.2, 0.008, 0.05),
        (99, 0.0, 0.8 * 0.01**0.99, 0.5),
        (50, 1.0, 0.08, 0.5 * 0.1**0.5),
    ],
)
def test_rates_decay_throughout_or_settle_at_the_end(step: int, settle: float, decays: float, steady: float) -> None:
    assert rates(step, settle) == pytest.approx({"decays": decays, "steady": steady, "still": 0.0})


def test_rarely_updated_parameters_wait_for_their_turn() -> None:
    often, seldom = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [often], "lr_first": 1.0}, {"params": [seldom], "lr_first": 1.0, "every": 3}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    given = []
    for step in range(7):
        set_rates(optimizer, clock_at(step), 0.0)
        optimizer.zero_grad(set_to_none=True)
        (often * seldom).sum().backward()
        given.append((often.grad is not None, seldom.grad is not None))
    assert given == [(True, step % 3 == 0) for step in range(7)]


@pytest.mark.parametrize(
    ("schedule", "size", "factors"),
    [
        (ScheduleConfig(), (480, 256), {0: 4, 4: 4, 5: 2, 14: 2, 15: 1, 99: 1}),
        (ScheduleConfig(), (480, 200), {0: 2, 5: 2, 15: 1}),  # a quarter would have fewer than 64 rows
        (ScheduleConfig(min_side=300), (480, 320), {0: 1}),
        (ScheduleConfig(resolution=()), (480, 320), {0: 1}),
        (ScheduleConfig(resolution=(0.1, 0.2, 0.3), min_side=0), (480, 320), {9: 8, 10: 4, 20: 2, 30: 1}),
    ],
)
def test_images_grow_to_their_size(schedule: ScheduleConfig, size: tuple[int, int], factors: dict[int, int]) -> None:
    config = TrainConfig(schedule=schedule)
    views = SimpleNamespace(size=lambda _: size)
    for step, factor in factors.items():
        session = SimpleNamespace(clock=clock_at(step), train_views=views)
        assert shrink_factor(session, config) == factor, step  # type: ignore[arg-type]


def test_checkpoints_are_due_by_the_clock_and_by_steps() -> None:
    config = TrainConfig(log=LogConfig(checkpoint_minutes=2.0, checkpoint_steps=0))
    assert [checkpoint_due(config, 7, seconds) for seconds in (0.0, 119.9, 120.0)] == [False, False, True]
    config = replace(config, log=LogConfig(checkpoint_minutes=0.0, checkpoint_steps=5))
    assert [checkpoint_due(config, step, 1e6) for step in (4, 5, 6, 10)] == [False, True, False, True]
    config = replace(config, log=LogConfig(checkpoint_minutes=0.0, checkpoint_steps=0))
    assert not checkpoint_due(config, 5, 1e6)


def test_drawn_rows_are_those_seen_by_some_camera() -> None:
    radii = torch.tensor([[[2, 1], [0, 0], [0, 0]], [[0, 0], [0, 0], [1, 3]]])
    out = RenderOutput(torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1), radii=radii)
    rows = drawn_rows(out)
    assert rows is not None
    assert rows.tolist() == [True, False, True]
    assert drawn_rows(replace(out, radii=None)) is None


def test_psnr_of_a_training_image_is_over_what_counts() -> None:
    cameras = Cameras(torch.eye(4)[None], torch.eye(3)[None], 4, 2)
    mask = torch.tensor([[True, True, False, False]]).expand(1, 2, 4)
    target = torch.full((1, 2, 4, 3), 51, dtype=torch.uint8)  # 0.2
    batch = Batch(cameras, target, mask, None, torch.zeros(1, 3), 0)
    rgb = torch.full((1, 2, 4, 3), 0.3)
    rgb[:, :, 2:] = 7.0
    assert train_psnr(batch, rgb) == pytest.approx(20.0, abs=1e-4)
    everywhere = -10 * math.log10((0.1**2 + 0.8**2) / 2)  # clamped to 1 first
    assert train_psnr(replace(batch, mask=None), rgb) == pytest.approx(everywhere, abs=1e-4)


def test_a_loss_that_is_not_finite_is_named() -> None:
    terms = {"photometric": torch.tensor(0.25), "depth": torch.tensor(0.5)}
    assert loss_values(terms, 7) == {"photometric": 0.25, "depth": 0.5}
    for bad in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"^training stopped: the depth loss is {bad} at step 7; earlier checkp"):
            loss_values(terms | {"depth": torch.tensor(float(bad))}, 7)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_insists(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt = Interrupt()
    with interrupt.listen():
        assert not interrupt.asked
        os.kill(os.getpid(), number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_leaves_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen() -> None:
        with Interrupt().listen():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_numbers_that_run_away_end_the_training_and_spare_the_checkpoints(tmp_path: Path) -> None:
    words = ["--scene", "garden", "--downscale", "8", "--max-primitives", "500", "--steps", "40", "--log.tests", "0"]
    words += ["--log.checkpoint-steps", "1", "--log.no-tensorboard", "--gaussians.sh0-lr", "1e37"]
    done = command("train.cli", *words, "--out", tmp_path / "run")
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: training stopped: ")
    assert "lower the learning rates" in line
    assert "Traceback" not in done.stderr
    tensors, state = load_checkpoint(tmp_path / "run/checkpoints")
    assert state["step"] >= 1
    assert all(torch.isfinite(value).all() for name, value in tensors.items() if name.startswith("scene."))
