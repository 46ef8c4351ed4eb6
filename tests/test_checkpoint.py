"""Checkpoints: whole or not there at all, whatever ends the process, fills the disk or damages the files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prismfield.train import checkpoint
from prismfield.train.checkpoint import STATE, TENSORS, checkpoints, load_checkpoint, save_checkpoint

from .commands import small_disk

STATES: dict[str, Any] = {"seconds": 1.5, "frame": {"center": [0.1, -2.0, 3e-9]}, "name": "Grün"}


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """Tensors of every kind that a session saves; the last is no contiguous one."""
    return {
        "scene.means": torch.arange(12.0).view(4, 3) + step,
        "none": torch.zeros(0, 3),
        "rng": torch.arange(5, dtype=torch.uint8),
        "order": torch.arange(6).view(2, 3).T,
    }


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, tensors_of(step), STATES, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 7)
    tensors, state = load_checkpoint(tmp_path)
    expected = tensors_of(7)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert state["step"] == 7
    assert {name: state[name] for name in STATES} == STATES
    assert names(tmp_path) == ["step_00000007"]


def test_the_newest_are_kept_and_any_of_them_can_be_had(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000010", "step_00000100"]
    assert load_checkpoint(tmp_path)[1]["step"] == 100
    assert load_checkpoint(tmp_path, 10)[1]["step"] == 10
    with pytest.raises(ValueError, match=re.escape("no checkpoint of step 9; there are 10, 100")):
        load_checkpoint(tmp_path, 9)


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint, it ended before its first one"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("at", [0, 8, None, -1], ids=["length", "header", "middle", "last"])
def test_a_flipped_bit_in_the_tensors_is_noticed(at: int | None, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip_a_bit(tmp_path / "step_00000002" / TENSORS, at)
    assert load_checkpoint(tmp_path)[1]["step"] == 1


def test_no_flipped_bit_in_the_state_goes_unnoticed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step_00000002" / STATE
    whole = path.read_bytes()
    content = json.loads(whole)
    for at in range(len(whole)):
        flip_a_bit(path, at)
        step = load_checkpoint(tmp_path)[1]["step"]
        path_content = path.read_bytes()
        path.write_bytes(whole)
        try:
            harmless = json.loads(path_content) == content  # `E-09` for `e-09`
        except ValueError:
            harmless = False
        assert step == (2 if harmless else 1), f"byte {at}"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / STATE).unlink(), f"{STATE} is missing"),
        (lambda folder: (folder / TENSORS).unlink(), f"{TENSORS} is missing"),
        (lambda folder: os.truncate(folder / TENSORS, 100), f"{TENSORS} is not as it was written"),
        (lambda folder: os.truncate(folder / STATE, 100), f"{STATE} cannot be read"),
        (lambda folder: (folder / STATE).write_text("[]"), f"{STATE} cannot be read"),
        (lambda folder: (folder / STATE).write_text("{}"), f"{STATE} cannot be read"),
    ],
)
def test_damage_is_named(damage: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002")
    assert load_checkpoint(tmp_path)[1]["step"] == 1
    assert f"passed over a damaged checkpoint: step_00000002: {said}" in caplog.text
    damage(tmp_path / "step_00000001")
    with pytest.raises(ValueError, match=re.escape(f"no whole checkpoint (step_00000002: {said}")):
        load_checkpoint(tmp_path)


def test_a_step_that_is_saved_already(tmp_path: Path) -> None:
    save(tmp_path, 3)
    before = (tmp_path / "step_00000003" / TENSORS).stat().st_ino
    save(tmp_path, 3)
    assert (tmp_path / "step_00000003" / TENSORS).stat().st_ino == before
    flip_a_bit(tmp_path / "step_00000003" / TENSORS)
    save(tmp_path, 3)
    assert load_checkpoint(tmp_path)[1]["step"] == 3


def test_damaged_ones_of_later_steps_push_no_whole_one_out(tmp_path: Path) -> None:
    save(tmp_path, 20, 30)
    flip_a_bit(tmp_path / "step_00000030" / TENSORS)
    save(tmp_path, 25)
    assert names(tmp_path) == ["step_00000020", "step_00000025"]
    save(tmp_path, 40)
    save(tmp_path, 35)  # 40 is whole: nobody passed over it
    assert names(tmp_path) == ["step_00000025", "step_00000035", "step_00000040"]


_DIES_AT = """
import os, pathlib, signal, sys
from prismfield.train import checkpoint
import torch

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

setattr({owner}, {name!r}, die)
checkpoint.save_checkpoint(pathlib.Path(sys.argv[1]), 2, {{"a": torch.ones(1000)}}, {{}}, keep=1)
"""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("checkpoint", "save_file"),
        ("pathlib.Path", "rename"),
        ("checkpoint", "_drop"),
    ],
)
def test_killed_at_any_moment_of_saving(owner: str, name: str, tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    program = _DIES_AT.format(owner=owner, name=name)
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "step_00000001").is_dir()
    is_done = name == "_drop"
    assert (tmp_path / "step_00000002.part").exists() != is_done
    assert load_checkpoint(tmp_path)[1]["step"] == (2 if is_done else 1)
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.part"))
    assert load_checkpoint(tmp_path)[1]["step"] == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_begun_is_removed(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def fail(_path: Path) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "_sync", fail)
    with pytest.raises(error):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


@pytest.mark.parametrize("floats", [90_000, 45_000], ids=["tensors", "second checkpoint"])
def test_a_full_disk_leaves_what_was_there(floats: int, disk: Path) -> None:
    save(disk, 1)
    with pytest.raises(OSError, match="No space left"):
        for step in (2, 3):
            save_checkpoint(disk, step, {"a": torch.rand(floats)}, {})
    whole = 2 if floats == 45_000 else 1
    assert names(disk) == [f"step_{step:08d}" for step in range(1, whole + 1)]
    assert load_checkpoint(disk)[1]["step"] == whole
