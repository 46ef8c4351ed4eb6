"""Checkpoints: tensors in safetensors, numbers in JSON, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _STATE, _PART = "tensors.safetensors", "state.json", ".part"


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder`/step_N, then drop all but the newest `keep`.

    Both files go to a temporary folder that is renamed when they are on the disk, so that a process killed at any moment
    leaves the older checkpoints as they were.

    Raises:
        OSError: the disk is full or cannot be written; what was begun is removed.
    """
    target, part = folder / f"step_{step:08d}", folder / f"step_{step:08d}{_PART}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / _TENSORS)
        except Exception as error:  # safetensors reports a full disk as an exception of its own
            raise OSError(f"{part / _TENSORS}: cannot be written ({error})") from None
        digest = _sha256(part / _TENSORS)
        (part / _STATE).write_text(json.dumps(state | {"step": step, "sha256": digest}))
        for path in (part / _TENSORS, part / _STATE, part):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.name.endswith(_PART))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of the newest checkpoint that is whole.

    Raises:
        ValueError: there is none.
    """
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            state = json.loads((path / _STATE).read_text())
            if _sha256(path / _TENSORS) != state["sha256"]:
                raise ValueError("the tensors are not those that were saved")
            return load_file(path / _TENSORS), state
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.name}: {error}")
    detail = f" ({'; '.join(problems)})" if problems else ""
    raise ValueError(f"{folder}: no whole checkpoint{detail}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
