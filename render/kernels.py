"""The compiled kernels, if there are any: the best build that this processor can run."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("prismfield")

LEVELS = ("v4", "v3", "v2")
"""x86-64 feature levels, best first: AVX-512, AVX2, SSE4.2."""


def _load() -> tuple[Any, str]:
    """The kernel module (or None) and one line that says which it is and why."""
    wanted = os.environ.get("PRISMFIELD_KERNELS", "")
    if wanted == "reference":
        return None, "reference (PRISMFIELD_KERNELS=reference)"
    for level in (wanted,) if wanted else LEVELS:
        try:
            module = importlib.import_module(f"prismfield._kernels_{level}")
        except ImportError:
            continue
        module.keep_freed_memory()
        return module, f"C++ x86-64-{level}"
    return None, "reference: no compiled kernels in this installation; install a C++20 compiler and run pip install again"


kernels: ModuleType | Any
kernels, description = _load()


def use_kernel(tensor: Tensor) -> bool:
    """Whether a compiled kernel takes this tensor; otherwise the caller runs the reference."""
    return kernels is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32
