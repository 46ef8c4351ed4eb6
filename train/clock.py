"""How far a training has come: by steps, by time, or by whichever ends first."""

from __future__ import annotations

import time

DEFAULT_STEPS = 7000


class Clock:
    """Counts steps and the seconds spent in them.

    Evaluation, checkpoints and pauses do not count: time runs only between `start_step` and `end_step`.
    """

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        self.steps = steps if steps is not None or minutes is not None else DEFAULT_STEPS
        self.budget = None if minutes is None else 60.0 * minutes
        """Seconds."""
        self.step = 0
        """Steps done."""
        self.seconds = 0.0
        """Seconds spent training."""
        self._began: float | None = None

    def start_step(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def end_step(self) -> None:
        """The step is done."""
        assert self._began is not None
        self.seconds += time.perf_counter() - self._began
        self.step += 1
        self._began = None

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1; schedules are functions of this."""
        by_steps = 0.0 if self.steps is None else self.step / self.steps
        by_time = 0.0 if self.budget is None else self.seconds / self.budget
        return min(1.0, max(by_steps, by_time))

    def progress_after_step(self) -> float:
        """What `progress` will be once the step under way has ended."""
        assert self._began is not None
        now = self.seconds + time.perf_counter() - self._began
        by_steps = 0.0 if self.steps is None else (self.step + 1) / self.steps
        by_time = 0.0 if self.budget is None else now / self.budget
        return min(1.0, max(by_steps, by_time))

    @property
    def done(self) -> bool:
        """Whether the training is over."""
        return self.progress >= 1.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the progress so far; None before the first step."""
        return self.seconds * (1 / self.progress - 1) if self.progress > 0 else None
