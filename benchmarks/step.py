"""Where the milliseconds of a training step go.

    python benchmarks/step.py [--scene garden] [--steps 1000] [--runs 200] [--out results/step.json] [-- OPTIONS of render-train]

Trains for --steps, so that the scene has the primitives of a real training, then times --runs more steps. Counted as
rasterizer, loss and optimizer is time inside their compiled kernels alone; activations, autograd, memory and Python around
them are "other". The shares are of the whole, means over the runs: a step that grows the scene costs more than the median.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prismfield.render import kernels as kernels_module
from prismfield.render.kernels import description, kernels
from prismfield.train.cli import use_threads
from prismfield.train.config import parse_arguments, resolved
from prismfield.train.loop import training_step
from prismfield.train.session import Session, start_session

PARTS = {
    "project": "rasterizer", "sh": "rasterizer", "bin": "rasterizer", "composite": "rasterizer",
    "photometric": "loss", "adam": "optimizer", "next": "batches", "after": "strategy",
}  # fmt: skip
"""First word of a function's name to the part of the step that it belongs to."""
COUNTED = ("rasterizer", "loss", "optimizer")


class Stopwatch:
    """Adds up the seconds inside the functions it has wrapped."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed


class TimedKernels:
    """The kernel module, its functions timed."""

    def __init__(self, module: Any, watch: Stopwatch) -> None:
        self._module, self._watch, self._wrapped = module, watch, {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value
        return self._wrapped.setdefault(name, self._watch.wrap(name, value))


def run_steps(session: Session, count: int) -> float:
    """Seconds that `count` training steps take."""
    began = time.perf_counter()
    for _ in range(count):
        session.clock.start_step()
        training_step(session)
        session.clock.end_step()
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", default="garden")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path)
    parser.add_argument("options", nargs="*", help="options of render-train, after --")
    options = parser.parse_args()
    if kernels is None:
        raise SystemExit(f"error: {description}")
    total = options.steps + options.runs
    config = resolved(parse_arguments(["--scene", options.scene, "--steps", str(total), *options.options]))
    threads = use_threads(config.threads)
    session = start_session(config, torch.device("cpu"))
    run_steps(session, options.steps)

    watch = Stopwatch()
    kernels_module.kernels = TimedKernels(kernels, watch)
    session.batches.next = watch.wrap("next", session.batches.next)  # type: ignore[method-assign]
    session.strategy.after_step = watch.wrap("after_step", session.strategy.after_step)  # type: ignore[method-assign]
    seconds = run_steps(session, options.runs)

    milliseconds = {name: 1e3 * value / options.runs for name, value in watch.seconds.items()}
    whole = 1e3 * seconds / options.runs
    milliseconds["other"] = whole - sum(milliseconds.values())
    parts: dict[str, float] = defaultdict(float)
    width, height = session.train_views.size(0)
    count = getattr(session.scene, "num_primitives", 0)
    print(
        f"{options.scene}: {width}x{height}, {count:,} primitives, {whole:.2f} ms a step, {description}, {threads} threads"
    )
    for name, value in milliseconds.items():
        part = PARTS.get(name.split("_")[0], "other")
        parts[part] += value
        print(f"  {part:10s}  {name:18s} {value:7.2f} ms  {100 * value / whole:5.1f} %")
    outside = 1 - sum(parts[name] for name in COUNTED) / whole
    print("  " + ", ".join(f"{name} {100 * value / whole:.1f} %" for name, value in parts.items()))
    print(f"  outside rasterizer, loss and optimizer: {100 * outside:.1f} %")
    if options.out:
        result = {
            "scene": Path(options.scene).name, "size": [width, height], "primitives": count, "options": options.options,
            "kernels": description, "threads": threads, "machine": platform.processor() or platform.machine(),
            "python": sys.version.split()[0], "torch": torch.__version__, "runs": options.runs,
            "step_ms": round(whole, 3), "ms": {name: round(value, 3) for name, value in milliseconds.items()},
            "outside_share": round(outside, 4),
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
