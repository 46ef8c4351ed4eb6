"""render-eval: how well a run renders the views it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from tyro.conf import Positional, arg

from prismfield.cli import run_cli


@dataclass(frozen=True)
class EvalConfig:
    """Measure a run: PSNR, SSIM, FLIP, LPIPS where its weights are found, speed and size."""

    run: Positional[Path]
    """The run's folder."""
    json: Path | None = None
    """Write the numbers to this file too."""
    sheet: Path | None = None
    """Where the contact sheet goes (.jpg or .png); default eval.jpg in the run's folder."""
    split: Literal["test", "train"] = "test"
    """Which views."""
    step: int | None = None
    """Of which checkpoint; default the newest."""
    downscale: int | None = None
    """Use images this many times smaller; default as in the training."""
    masks: bool = True
    """Leave masked pixels out, if the training did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to render."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


def main() -> NoReturn:
    """The command `render-eval`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    config = tyro.cli(Annotated[EvalConfig, arg(name="")], prog="render-eval")
    from prismfield.train.folder import read_config

    read_config(config.run)  # a mistyped name should not wait for torch
    from prismfield.train.evaluation import evaluate_run

    evaluate_run(config)


if __name__ == "__main__":
    main()
