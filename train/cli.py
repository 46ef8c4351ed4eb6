"""render-train: photographs with known cameras in, a trained scene out."""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prismfield.cli import run_cli
from prismfield.train.config import TrainConfig, check_config, parse_arguments, resolved

if TYPE_CHECKING:
    import torch

    from prismfield.train.session import Session

log = logging.getLogger("prismfield")


def main() -> NoReturn:
    """The command `render-train`."""
    run_cli(_main)


def _main() -> int:
    config = parse_arguments()
    show_log()
    folder, finished = train_run(config)
    if finished:
        return 0
    log.info("stopped; go on with: render-train --resume %s", folder)
    return 0 if config.pause_at is not None and _last_step(folder) == config.pause_at else 130


def train_run(config: TrainConfig) -> tuple[Path, bool]:
    """Train as `config` says, measure, and report.

    Returns:
        The run's folder, and whether the training reached its end; if not, Ctrl-C, SIGTERM or `pause_at` stopped it, and
        its state is saved.

    Raises:
        FileNotFoundError: the scene, or the run to go on with, is not there.
        ValueError: an option, the scene's files or the checkpoint cannot be used, or the numbers ran away.
        OSError: the run's folder cannot be written.
    """
    began = time.monotonic()
    config = resolved(config)
    check_config(config)
    from prismfield.train.folder import check_unused, naming, new_folder, write_config

    if config.resume is None:
        check_unused(config.out)  # before a minute goes into reading
    from prismfield.train.loop import train
    from prismfield.train.progress import Progress
    from prismfield.train.session import start_session

    device = choose_device(config.device, config.backend)
    use_threads(config.threads)
    kernels = use_backend(config.backend, device, config.device)
    log.info("computed by %s", kernels)
    session = start_session(config, device, config.resume)
    _describe(session)
    if config.resume is None:
        folder = new_folder(config, session.data.name)
    else:
        folder = config.resume
        _check_unfinished(session, folder)
        write_config(folder, config)
        log.info("going on at step %d", session.clock.step)
    log.info("run folder %s", folder)
    viewer = _open_viewer(session, folder) if config.viewer else None
    try:
        with naming(folder), Progress(folder, session) as progress:
            finished = train(session, folder, progress, viewer)
            if finished:
                _finish(session, folder, progress, began, kernels)
        if finished and viewer is not None:
            _stay_open(viewer)
    finally:
        if viewer is not None:
            viewer.close()
    return folder, finished


def _describe(session: Session) -> None:
    from prismfield.representations.base import size_of

    data, views = session.data, session.train_views
    width, height = views.size(0)
    what, count = size_of(session.scene)
    log.info(
        "%s: %d images for training, %d for testing (%s), the first %dx%d; %d %s",
        data.name, len(data.train), len(data.test), data.split, width, height, count, what,
    )  # fmt: skip


def _check_unfinished(session: Session, folder: Path) -> None:
    from prismfield.train.folder import REPORT

    if session.clock.done and (folder / REPORT).exists():
        end = f"{session.clock.step} steps, {session.clock.seconds / 60:.1f} minutes"
        raise ValueError(f"--resume {folder}: the run is finished ({end}); give it more --steps or --minutes to go on")
    pause_at = session.config.pause_at
    if pause_at is not None and pause_at <= session.clock.step:
        raise ValueError(f"--pause-at {pause_at}: the run is already at step {session.clock.step}")


def _finish(session: Session, folder: Path, progress: Any, began: float, kernels: str) -> None:
    """Measure the test views, write pictures and the report."""
    from prismfield.train.evaluate import save_side_by_side
    from prismfield.train.folder import REPORT, TEST
    from prismfield.train.loop import evaluate_session
    from prismfield.train.report import write_report

    results = evaluate_session(session)
    progress.tested(session, results)
    for result in results:
        save_side_by_side(result, folder / TEST)
    seconds = time.monotonic() - began
    write_report(session, folder, results, seconds=seconds, kernels=kernels)
    log.info("trained %.1f s of %.1f s in all; report: %s", session.clock.seconds, seconds, folder / REPORT)


def _open_viewer(session: Session, folder: Path) -> Any:
    from prismfield.viewer.live import LiveViewer  # not at the top: the viewer builds on train

    views = session.train_views, session.test_views
    return LiveViewer(folder.name, session.scene, session.data, *views, port=session.config.viewer_port)


def _stay_open(viewer: Any) -> None:
    """Serve the trained scene until Ctrl-C or SIGTERM."""
    from prismfield.train.loop import Interrupt

    interrupt = Interrupt()
    viewer.finish()
    log.info("the live view stays open at %s; Ctrl-C ends it", viewer.url)
    with interrupt.listen():
        while not interrupt.asked:
            viewer.wait()


def _last_step(folder: Path) -> int:
    from prismfield.train.checkpoint import checkpoints
    from prismfield.train.folder import CHECKPOINTS

    return int(checkpoints(folder / CHECKPOINTS)[-1].name.removeprefix("step_"))


def choose_device(wanted: str, backend: str = "auto") -> torch.device:
    """The device to train on: for "auto" CUDA where there is one and kernels that run on it.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    import torch

    from prismfield.render import backends

    cuda, available = torch.device("cuda"), torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError(
            f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; --device cpu trains without one"
        )
    if wanted == "auto" and available and backend == "auto":
        # The plain PyTorch reference is slower there than the kernels on the CPU.
        return torch.device("cpu") if backends.gpu_kernels(cuda)[0] is None else cuda
    return cuda if wanted == "cuda" or (wanted == "auto" and available and backend == "gsplat") else torch.device("cpu")


def use_threads(count: int) -> int:
    """Let torch and the kernels use `count` threads, 0 for every processor of this process; returns how many."""
    import torch

    from prismfield.render.kernels import kernels

    if count == 0:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count)
    if kernels is not None:
        kernels.set_num_threads(count)
    return count


def use_backend(backend: str, device: torch.device, wanted: str = "auto") -> str:
    """Make `backend` the one that rasterizes; returns what will compute, in words, and why it is not something faster.

    Args:
        backend: what `--backend` says.
        device: what `choose_device` chose.
        wanted: what `--device` says.

    Raises:
        ValueError: it cannot be used here.
    """
    import torch

    from prismfield.render import backends, kernels

    backends.choose(backend, device)  # type: ignore[arg-type]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if backend == "gsplat":
            return f"gsplat {metadata.version('gsplat')} on {name}"
        if backend == "reference":
            return f"the PyTorch reference on {name}, as --backend asks"
        found, line = backends.gpu_kernels(device)
        kernels.told = kernels.told or found is None  # by what is returned
        return f"{line if found is not None else f'the {line}'} on {name}"
    if backend == "reference":
        return "the PyTorch reference, as --backend asks"
    beside = ""
    if wanted == "auto" and torch.cuda.is_available():
        beside = f"; {torch.cuda.get_device_name()} is left alone: {backends.gpu_kernels(torch.device('cuda'))[1]}"
    if kernels.kernels is None:
        kernels.told = True
        return f"the {kernels.description}{beside}"
    return f"{kernels.description}, {torch.get_num_threads()} threads{beside}"


class _Lines(logging.Handler):
    """Log lines to wherever stderr goes when they come: a progress bar puts itself between."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_log() -> None:
    """Show what the package logs, as plain lines."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    main()
