"""Checkpoints: tensors in safetensors, numbers in JSON, whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, STATE = "tensors.safetensors", "state.json"
_PART = ".part"

log = logging.getLogger("prismfield")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder`/step_N, then drop all but the newest `keep`, and damaged ones of later steps.

    Both files go to a temporary folder that is renamed once they are on the disk, so that a process killed at any moment
    leaves the older checkpoints as they were. A whole checkpoint of this step that is there already stays as it is.

    Raises:
        OSError: the disk is full or cannot be written; what was begun is removed.
    """
    target = folder / f"step_{step:08d}"
    if target.exists():
        if _problem(target) is None:
            _drop(folder, target, keep)
            return target
        shutil.rmtree(target)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"*{_PART}"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part = target.with_name(target.name + _PART)
    try:
        part.mkdir()
        _write_tensors(part / TENSORS, tensors)
        content = state | {"step": step, "sha256": _sha256(part / TENSORS)}
        text = json.dumps(content | {"state_sha256": _digest(content)})
        (part / STATE).write_text(text, encoding="utf-8")
        for path in (part / TENSORS, part / STATE, part):
            _sync(path)
        part.rename(target)
        _sync(folder)
    except BaseException:  # a second Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        raise
    _drop(folder, target, keep)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.name.endswith(_PART))


def load_checkpoint(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of the newest checkpoint that is whole, or of the one of `step`.

    Raises:
        ValueError: there is none, or none of that step.
    """
    problems: list[str] = []
    found = checkpoints(folder)
    if step is not None:
        steps = [int(path.name.removeprefix("step_")) for path in found]
        if step not in steps:
            raise ValueError(
                f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps)) or 'none'}"
            )
        found = [found[steps.index(step)]]
    for path in reversed(found):
        problem = _problem(path)
        if problem is None:
            for line in problems:
                log.warning("passed over a damaged checkpoint: %s", line)
            return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
        problems.append(f"{path.name}: {problem}")
    detail = f" ({'; '.join(problems)})" if problems else ", it ended before its first one"
    raise ValueError(f"{folder}: no whole checkpoint{detail}")


def _drop(folder: Path, newest: Path, keep: int) -> None:
    """Keep `keep` checkpoints up to `newest`; those beyond it that are damaged were passed over, and go too."""
    found = checkpoints(folder)
    past = found.index(newest) + 1
    for path in [*found[: max(0, past - keep)], *(path for path in found[past:] if _problem(path) is not None)]:
        shutil.rmtree(path, ignore_errors=True)


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if content.pop("state_sha256") != _digest(content):
            return f"{STATE} is not as it was written"
        if _sha256(path / TENSORS) != content["sha256"]:
            return f"{TENSORS} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{STATE} cannot be read ({error})"
    return None


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how a full disk arrives here
        raise OSError(f"{path}: cannot be written ({error})") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
