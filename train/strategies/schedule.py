"""When a strategy acts."""

from __future__ import annotations

REFERENCE_STEPS = 30_000


class Schedule:
    """Says at which steps something periodic is due.

    Counts are those of a training of REFERENCE_STEPS. The length of this one is told from how far it has come, which
    also serves a training bounded by time; a shorter one shrinks the counts in proportion, a longer one keeps them.
    """

    def __init__(self, start: int, interval: int, min_interval: int, stop: float) -> None:
        self.start, self.interval, self.min_interval, self.stop = start, interval, min_interval, stop
        self.last = 0
        """Steps done when it was last due."""

    def due(self, step: int, progress: float) -> bool:
        """Whether to act after `step` (the first is 0) at `progress` in 0..1; true at most once a step."""
        if self.interval <= 0 or not 0 < progress < self.stop:
            return False
        done = step + 1
        pace = min(1.0, done / progress / REFERENCE_STEPS)
        start = max(self.min_interval, round(self.start * pace))
        interval = max(self.min_interval, round(self.interval * pace))
        if done < start or done - self.last < interval:
            return False
        self.last = done
        return True
