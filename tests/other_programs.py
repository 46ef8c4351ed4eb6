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


def node_modules(package: str) -> Path:
    """The folder of npm's packages, `PRISMFIELD_NODE_MODULES` or tests/node/node_modules, if it has this one."""
    folder = Path(os.environ.get("PRISMFIELD_NODE_MODULES", NODE / "node_modules"))
    if shutil.which("node") is None or not (folder / package).is_dir():
        pytest.skip(f"{package} is not installed: npm install --ignore-scripts --prefix tests/node")
    return folder


def splat_transform(*words: object) -> str:
    """Run splat-transform; what it prints."""
    program = node_modules("@playcanvas/splat-transform") / ".bin" / "splat-transform"
    done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def gltf_report(path: Path) -> dict[str, Any]:
    """What Khronos's validator says of a .glb."""
    words = ["node", NODE / "validate_gltf.js", node_modules("gltf-validator"), path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report
