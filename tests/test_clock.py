"""How far a training is: by steps, by time, by whichever ends first; resumed."""

from __future__ import annotations

import time

import pytest

from prismfield.train.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the clock sees, as the one item of a list."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def run(clock: Clock, now: list[float], steps: int, seconds: float) -> None:
    for _ in range(steps):
        clock.start_step()
        now[0] += seconds
        clock.end_step()


def test_steps(now: list[float]) -> None:
    clock = Clock(8, None)
    run(clock, now, 2, 5.0)
    assert (clock.progress, clock.done, clock.seconds) == (0.25, False, 10.0)
    assert clock.seconds_left(2.0) == 3.0
    run(clock, now, 6, 0.0)
    assert clock.done


def test_only_the_time_in_steps_counts(now: list[float]) -> None:
    clock = Clock(None, 0.5)
    run(clock, now, 3, 5.0)
    now[0] += 1000.0  # an evaluation
    assert clock.progress == 0.5 and not clock.done
    assert clock.seconds_left(1.0) == 15.0
    run(clock, now, 3, 5.0)
    assert clock.done


def test_whichever_ends_first(now: list[float]) -> None:
    by_steps, by_time = Clock(4, 1.0), Clock(100, 1.0)
    run(by_steps, now, 2, 6.0)
    run(by_time, now, 2, 15.0)
    assert (by_steps.progress, by_time.progress) == (0.5, 0.5)
    assert by_steps.seconds_left(1.0) == 2.0
    assert by_time.seconds_left(1.0) == 30.0


def test_progress_after_the_step_under_way(now: list[float]) -> None:
    clock = Clock(10, 1.0)
    clock.start_step()
    now[0] += 3.0
    assert clock.progress == 0.0
    assert clock.progress_after_step() == pytest.approx(0.1)
    now[0] += 27.0
    assert clock.progress_after_step() == pytest.approx(0.5)
    clock.end_step()
    assert clock.progress == pytest.approx(0.5)


def test_resumed_with_more_to_do(now: list[float]) -> None:
    clock = Clock(20, None)
    clock.step, clock.seconds = 10, 50.0
    assert clock.progress == 0.5
    run(clock, now, 1, 5.0)
    assert (clock.step, clock.seconds) == (11, 55.0)
