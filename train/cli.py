"""render-train: photographs with poses in, a trained scene out."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prismfield.cli import run_cli
from prismfield.train.config import TrainConfig, check_config, parse_arguments

if TYPE_CHECKING:
    import torch

    from prismfield.train.session import Session

log = logging.getLogger("prismfield")


def main() -> NoReturn:
    """The command `render-train`."""
    run_cli(lambda: train_command(parse_arguments()))


def train_command(config: TrainConfig) -> int:
    """Train as `config` says, measure, and report; returns the exit code."""
    check_config(config)
    _show_log()
    from prismfield.train.run import read_config
    from prismfield.train.session import check_resumed

    folder = config.resume
    if folder is not None:
        config = check_resumed(config, read_config(folder))
        check_config(config)
    device = choose_device(config.device)
    use_threads(config.threads)
    choose_backend(config.backend, device)
    return _run(config, folder, device)


def _run(config: TrainConfig, folder: Path | None, device: torch.device) -> int:
    from prismfield.render.kernels import description
    from prismfield.train.loop import train
    from prismfield.train.progress import Progress
    from prismfield.train.run import new_folder
    from prismfield.train.session import start_session

    session = start_session(config, device)
    for warning in session.data.warnings:
        log.warning("%s", warning)
    if folder is None:
        folder = new_folder(config, session.data.name)
    else:
        session.restore(folder)
        log.info("going on from step %d", session.clock.step)
    log.info("run folder %s; rasterizer: %s", folder, description if device.type == "cpu" else "reference on " + str(device))
    viewer = _open_viewer(session, folder) if config.viewer else None
    with Progress(folder, tensorboard=config.log.tensorboard) as progress:
        finished = train(session, folder, progress, viewer)
    if viewer is not None:
        viewer.close()
    if not finished:
        log.info("stopped at step %d; go on with --resume %s", session.clock.step, folder)
        return 0 if session.clock.step == config.pause_at else 130
    _finish(session, folder)
    return 0


def _finish(session: Session, folder: Path) -> None:
    """Measure the test views, write pictures and the report."""
    from prismfield.train.evaluate import evaluate_views, mean, save_side_by_side
    from prismfield.train.report import write_report
    from prismfield.train.run import REPORT, TEST

    options: dict[str, Any] = {"use_masks": session.config.data.masks, "device": session.device}
    results = []
    for result in evaluate_views(session.scene, session.test_views, session.background, **options):
        save_side_by_side(result, folder / TEST)
        results.append(result)
    write_report(session, folder, results)
    quality = f"test PSNR {mean(results, lambda r: r.psnr):.2f} dB, " if results else ""
    log.info("%strained %.1f s; report: %s", quality, session.clock.seconds, folder / REPORT)


def _open_viewer(session: Session, folder: Path) -> Any:
    from prismfield.viewer.live import LiveViewer  # not at the top: the viewer builds on train

    return LiveViewer(folder.name, session.scene, session.data, session.train_views, session.test_views)


def choose_device(wanted: str) -> torch.device:
    """The device to train on.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("--device cuda: this PyTorch finds no CUDA device; leave the option out to train on the CPU")
    return torch.device("cuda" if wanted != "cpu" and available else "cpu")


def use_threads(count: int) -> None:
    """Let torch and the kernels use `count` threads, 0 for all processors."""
    import torch

    from prismfield.render.kernels import kernels

    count = count or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count or os.cpu_count() or 1
    torch.set_num_threads(count)
    if kernels is not None:
        kernels.set_num_threads(count)


def choose_backend(backend: str, device: torch.device) -> None:
    """Make `backend` the one that rasterizes.

    Raises:
        ValueError: it cannot be used here.
    """
    from prismfield.render import backends

    backends.choose(backend, device)


def _show_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
