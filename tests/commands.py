"""The commands as a user starts them: in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


def command(module: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `prismfield.MODULE` with the words after it, wherever that may be."""
    arguments = [sys.executable, "-m", f"prismfield.{module}", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=300)


def trained_once(factory: pytest.TempPathFactory, name: str, *words: object) -> Path:
    """The folder of a run that `render-train` made of these words, once for all processes that run tests."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with FileLock(base / f"{name}.lock"):
        if not (folder / "report.md").exists():
            done = command("train.cli", *words, "--out", folder)
            assert done.returncode == 0, done.stderr
    return folder


def refused(module: str, *words: object) -> str:
    """The one line with which a command refuses what it was asked."""
    done = command(module, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes (as mount spells them) at `folder`. Skips where none can be made."""
    folder.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no small disk can be made: {error}")
    if made.returncode != 0:
        pytest.skip(f"no small disk can be made: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
