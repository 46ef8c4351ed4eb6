"""The commands as a user starts them: in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def command(module: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `prismfield.MODULE` with the words after it, wherever that may be."""
    arguments = [sys.executable, "-m", f"prismfield.{module}", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=300)


def refused(module: str, *words: object) -> str:
    """The one line with which a command refuses what it was asked."""
    done = command(module, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines and lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]
