"""What a training tells its user: the bar, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from prismfield.train.run import METRICS
from prismfield.train.session import Session

_PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class Progress:
    """Context manager around a training."""

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self.folder = folder
        self.console = Console(stderr=True)
        self.latest: dict[str, float] = {}
        """The newest numbers, for whoever shows them."""
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(folder))
        self._bar = Bar(
            TextColumn("{task.fields[phase]}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console
        )
        self._task = self._bar.add_task("", total=1.0, phase="training", text="")
        self._is_terminal = self.console.is_terminal
        self._spoke = self._drew = 0.0
        self._marks: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_terminal:
            self._bar.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def advance(self, session: Session) -> None:
        """A step is done; redraws at most ten times a second."""
        now = time.monotonic()
        if now - self._drew < 0.1 and not session.clock.done:
            return
        self._drew = now
        self._marks = [*self._marks[-20:], (session.clock.seconds, session.clock.step)]
        if self._is_terminal:
            self._bar.update(self._task, completed=session.clock.progress, text=self._text(session))
        elif now - self._spoke > _PLAIN_SECONDS or session.clock.done:
            self._spoke = now
            print(self._text(session), file=sys.stderr, flush=True)

    def log(self, session: Session, terms: dict[str, float], psnr: float) -> None:
        """Note this step's loss."""
        self.latest = {
            "step": session.clock.step,
            "seconds": round(session.clock.seconds, 3),
            "loss": sum(terms.values()),
            "psnr": psnr,
            "primitives": getattr(session.scene, "num_primitives", 0),
            "steps_per_second": self._speed(),
        }
        self._write(self.latest | {f"loss/{name}": value for name, value in terms.items()})

    def tested(self, session: Session, psnr: float) -> None:
        """Note what the test views say on the way."""
        if not math.isnan(psnr):
            self.latest["test_psnr"] = psnr
            self._write({"step": session.clock.step, "seconds": round(session.clock.seconds, 3), "test/psnr": psnr})

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if name not in ("step", "seconds"):
                    self._board.add_scalar(name if "/" in name else f"train/{name}", value, int(values["step"]))

    def _speed(self) -> float:
        """Steps a second, lately."""
        if len(self._marks) < 2:
            return 0.0
        (seconds, step), (now_seconds, now_step) = self._marks[0], self._marks[-1]
        return (now_step - step) / max(now_seconds - seconds, 1e-9)

    def _text(self, session: Session) -> str:
        clock, left = session.clock, session.clock.seconds_left
        parts = [f"step {clock.step}" + (f"/{clock.steps}" if clock.steps else "")]
        if "loss" in self.latest:
            parts += [f"loss {self.latest['loss']:.4f}", f"PSNR {self.latest['psnr']:.2f}"]
        if "test_psnr" in self.latest:
            parts.append(f"test {self.latest['test_psnr']:.2f}")
        if hasattr(session.scene, "num_primitives"):
            parts.append(f"{session.scene.num_primitives:,} primitives")
        parts.append(f"{self._speed():.1f} it/s")
        if left is not None:
            parts.append(f"{left // 60:.0f}:{left % 60:02.0f} left")
        return "  ".join(parts)


def peak_memory() -> int:
    """Most bytes of memory that the process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
