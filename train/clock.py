"""How far a training has come: by steps, by time, or by whichever ends first."""

from __future__ import annotations

import time


class Clock:
    """Counts steps and the seconds spent in them.

    Evaluation, checkpoints and pauses do not count: time runs only between `start_step` and `end_step`.
    """

    def __init__(self, steps: int | None, minutes: float | None) -> None:
        """Ends after `steps` or `minutes`, whichever comes first; at least one of them is given."""
        assert steps is not None or minutes is not None
        self.steps = steps
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
        return self._share(self.step, self.seconds)

    def progress_after_step(self) -> float:
        """What `progress` will be once the step under way has ended."""
        assert self._began is not None
        return self._share(self.step + 1, self.seconds + time.perf_counter() - self._began)

    @property
    def done(self) -> bool:
        """Whether the training is over."""
        return self.progress >= 1.0

    def seconds_left(self, steps_per_second: float) -> float | None:
        """Seconds of training still to come at this speed; None if there is no telling."""
        left = [] if self.budget is None else [self.budget - self.seconds]
        if self.steps is not None and steps_per_second > 0:
            left.append((self.steps - self.step) / steps_per_second)
        return max(0.0, min(left)) if left else None

    def _share(self, step: int, seconds: float) -> float:
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.budget is None else seconds / self.budget
        return min(1.0, max(by_steps, by_time))
