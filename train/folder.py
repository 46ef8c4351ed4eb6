"""A run's folder: where things are in it. No torch here: the command line looks into it before it parses its arguments."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prismfield.train.config import TrainConfig, from_json, to_json

CONFIG, METRICS, CHECKPOINTS, TEST, REPORT = "config.json", "metrics.jsonl", "checkpoints", "test", "report.md"
STRIP = f"{TEST}/strip.jpg"


def read_config(path: Path) -> TrainConfig:
    """The config of the run in folder `path`.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: its config cannot be read.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run folder")
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{path}: not a run folder ({CONFIG} is missing)")
    return from_json((path / CONFIG).read_text(encoding="utf-8"), str(path / CONFIG))


def check_unused(path: Path | None) -> None:
    """Raise a ValueError if a new run must not be written to `path`."""
    if path is None:
        return
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir() and there != path:
        raise ValueError(f"--out {path}: {there} is not a folder")
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {path}: {there} cannot be written to")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        hint = f"; go on with it by --resume {path}" if (path / CONFIG).is_file() else ""
        raise ValueError(f"--out {path}: already exists and is not empty{hint}")


def new_folder(config: TrainConfig, scene_name: str) -> Path:
    """Make the run's folder and write its config.

    Raises:
        ValueError: the folder is in use.
    """
    check_unused(config.out)
    if config.out is not None:
        path = config.out
        path.mkdir(parents=True, exist_ok=True)
    else:
        path = first = Path("runs") / scene_name / time.strftime("%Y-%m-%d_%H%M%S")
        count = 1
        while not _made(path):
            count += 1
            path = first.with_name(f"{first.name}_{count}")
    write_config(path, config)
    return path


def write_config(path: Path, config: TrainConfig) -> None:
    """Write the config of the run in folder `path`."""
    write_text(path / CONFIG, to_json(config) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with naming(path):
            part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of the system that name nothing, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _made(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True
