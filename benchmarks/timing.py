"""How contenders are timed against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def measure(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median milliseconds of each, in alternation; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(runs + 2):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if round_ >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}
