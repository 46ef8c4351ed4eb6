"""What checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prismfield.train.checkpoint import STATE, TENSORS


def content(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything in a checkpoint that does not tell the time."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    state = json.loads((folder / STATE).read_text())
    for key in ("seconds", "sha256", "state_sha256"):
        del state[key]
    return load_file(folder / TENSORS), state


def same_content(run: Path, other: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same, which has to be that of another run to the bit."""
    tensors, state = content(run, step)
    others, other_state = content(other, step)
    assert tensors.keys() == others.keys()
    differ = [
        f"{name}: {int((value != others[name]).sum())} of {value.numel()} numbers"
        for name, value in tensors.items()
        if not torch.equal(value, others[name])
    ]
    assert not differ, f"{run} and {other} differ at step {step}: " + "; ".join(differ)
    assert state == other_state
    return tensors, state
