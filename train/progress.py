"""What a training tells its user on the way: the bar, or plain lines where there is no terminal, and the journal."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from prismfield.train.evaluate import ViewResult, mean_scores
from prismfield.train.journal import Journal
from prismfield.train.report import peak_memory
from prismfield.train.session import Session

_DRAW_SECONDS = 0.25
_PLAIN_SECONDS = 10.0
_SPEED_SECONDS = 3.0  # of training, that the speed is averaged over
_PICTURES = 2  # test views shown in TensorBoard

log = logging.getLogger("prismfield")


class Progress:
    """Context manager around a training."""

    def __init__(self, folder: Path, session: Session) -> None:
        """Open the files; the display starts with the `with` block.

        Raises:
            OSError: they cannot be written.
        """
        self.latest: dict[str, float] = {}
        """The newest numbers, for whoever shows them."""
        self._journal = Journal(folder, session.clock.step, tensorboard=session.config.log.tensorboard)
        self._noted = session.clock.step
        """Step of the journal's last line."""
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        # Redrawn by `_show` alone: rich's own thread would take the processor from the kernels ten times a second.
        self._bar = Bar(
            TextColumn("{task.fields[count]}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("", total=1.0, count="", numbers="")
        self._shown = self._spoken = time.monotonic()
        self._marks = deque([(session.clock.seconds, session.clock.step)])

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_terminal:
            self._bar.stop()
        self._journal.close()

    def watch(self, session: Session, terms: dict[str, float], psnr: float) -> None:
        """Take note of a step's loss, term by term, and of the PSNR of its image, NaN if nothing in it counts."""
        clock, config = session.clock, session.config
        self._mark(clock.seconds, clock.step)
        # Images differ in how hard they are: the mean over the latest says more than the last.
        before = self.latest.get("psnr", math.nan)
        self.latest |= {
            "step": clock.step,
            "seconds": clock.seconds,
            "progress": clock.progress,
            "loss": sum(terms.values()),
            "psnr": psnr if math.isnan(before) else before if math.isnan(psnr) else before + 0.1 * (psnr - before),
            "primitives": getattr(session.scene, "num_primitives", 0),
            "steps_per_second": self._speed(),
        }
        if clock.step // config.log.every > self._noted // config.log.every or clock.done or self._noted == 0:
            self._noted = clock.step
            values = {name: self.latest[name] for name in ("loss", "psnr", "primitives", "steps_per_second")}
            values |= {f"loss/{name}": value for name, value in terms.items()}
            values |= {f"lr/{group['name']}": group["lr"] for group in session.optimizer.param_groups}
            values["memory_mib"] = peak_memory() / 2**20
            if session.device.type == "cuda":
                values["gpu_memory_mib"] = torch.cuda.max_memory_allocated(session.device) / 2**20
            self._journal.write(clock.step, clock.seconds, values)
        self._show(session)

    def tested(self, session: Session, results: list[ViewResult]) -> None:
        """Take note of what the test views say."""
        step, scores = session.clock.step, mean_scores(results)
        if not scores:
            return
        self._journal.write(step, session.clock.seconds, {f"test/{name}": value for name, value in scores.items()})
        for result in results[:: max(1, len(results) // _PICTURES)][:_PICTURES]:
            self._journal.picture(step, f"test/{result.name}", torch.cat([result.rgb, result.truth], 1))
        self.latest["test_psnr"] = scores["psnr"]
        log.info(
            "step %d, %.1f s: test PSNR %.2f dB, SSIM %.4f", step, session.clock.seconds, scores["psnr"], scores["ssim"]
        )

    def _show(self, session: Session) -> None:
        now, done = time.monotonic(), session.clock.done
        if self._is_terminal and (done or now - self._shown >= _DRAW_SECONDS):
            self._shown = now
            count, numbers = self._text(session)
            self._bar.update(self._task, completed=session.clock.progress, count=count, numbers=numbers, refresh=True)
        elif not self._is_terminal and (done or now - self._spoken >= _PLAIN_SECONDS):
            self._spoken = now
            print("  ".join(self._text(session)), file=sys.stderr, flush=True)

    def _text(self, session: Session) -> tuple[str, str]:
        clock, latest = session.clock, self.latest
        count = f"step {clock.step}" + (f"/{clock.steps}" if clock.steps is not None else "")
        parts = [f"loss {latest['loss']:.4f}", f"PSNR {latest['psnr']:.2f}"]
        if latest["primitives"]:
            parts.append(f"{latest['primitives']:,} primitives")
        parts.append(f"{latest['steps_per_second']:.1f} it/s")
        left = clock.seconds_left(latest["steps_per_second"])
        if left is not None:
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        return count, "  ".join(parts)

    def _mark(self, seconds: float, step: int) -> None:
        self._marks.append((seconds, step))
        while len(self._marks) > 2 and self._marks[1][0] < seconds - _SPEED_SECONDS:
            self._marks.popleft()

    def _speed(self) -> float:
        """Steps a second, lately."""
        (began, first), (now, last) = self._marks[0], self._marks[-1]
        return (last - first) / (now - began) if now > began else 0.0
