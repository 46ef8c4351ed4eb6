"""The compiled kernels, if there are any: the best build that this processor can run."""

from __future__ import annotations

import importlib
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import prismfield.render.first_calls  # noqa: F401

log = logging.getLogger("prismfield")

LEVELS = ("v4", "v3", "v2")
"""x86-64 feature levels, best first: AVX-512, AVX2, SSE4.2. Other processors have one portable build without a level."""


def load_kernels(wanted: str) -> tuple[Any, str]:
    """The kernel module (or None) and one line that says which it is and why.

    Args:
        wanted: what $PRISMFIELD_KERNELS says: "" for the best, "reference" for none, or one of `LEVELS`.

    Raises:
        ValueError: `wanted` is no such word, or this installation or processor does not have that level.
    """
    if wanted not in ("", "reference", *LEVELS):
        raise ValueError(f"PRISMFIELD_KERNELS={wanted}: expected reference or one of {', '.join(LEVELS)}")
    if wanted == "reference":
        return None, "reference (PRISMFIELD_KERNELS=reference)"
    built = [level for level in LEVELS if find_spec(f"prismfield._kernels_{level}")]
    try:
        if not built and not wanted and find_spec("prismfield._kernels"):
            return _import("_kernels"), "C++ portable"
        # The lowest level there is tells what the processor can run: importing a higher one could already be illegal
        supported = _import(f"_kernels_{built[-1]}").cpu_level() if built else 0
        usable = [level for level in built if int(level[1:]) <= supported]
        if wanted and wanted not in usable:
            reason = (
                f"the processor supports x86-64-v{supported}"
                if wanted in built
                else "this installation has no such build"
            )
            raise ValueError(f"PRISMFIELD_KERNELS={wanted}: {reason}; usable: {', '.join(['reference', *usable])}")
        if usable:
            level = wanted or usable[0]
            return _import(f"_kernels_{level}"), f"C++ x86-64-{level}"
        reason = "this processor is older than x86-64-v2" if built else _why_missing()
    except ImportError as error:
        reason = f"the C++ kernels cannot be loaded ({error})"
    return None, f"slow reference instead of the C++ kernels: {reason}"


def _import(name: str) -> Any:
    module = importlib.import_module(f"prismfield.{name}")
    module.keep_freed_memory()
    return module


def _why_missing() -> str:
    """What the build wrote down when it went without the kernels (CMakeLists.txt), and what to do about it."""
    package = find_spec("prismfield")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        note = Path(folder) / "_kernels_missing.txt"
        if note.is_file():
            return (
                f"{note.read_text().strip()}; then repeat pip install, with --force-reinstall --no-cache-dir --no-deps"
            )
    return "this installation has none; install with pip, with a C++20 compiler at hand"


GPU_TABLES = ("prismfield.render.gpu.bindings", "prismfield.encodings.gpu.bindings")
"""Who has Triton kernels. By name, as the compiled modules: nothing here imports what is built on it."""


def gpu_table() -> SimpleNamespace:
    """The Triton kernels under the names that the compiled ones have.

    Raises:
        ImportError: there is no Triton, or one that is too old.
    """
    tables = [vars(importlib.import_module(name)) for name in GPU_TABLES]
    return SimpleNamespace(**{name: value for table in tables for name, value in table.items() if name[0] != "_"})


def load_gpu_kernels() -> tuple[Any, str]:
    """The Triton kernels (or None) and one line that says which they are and why.

    Triton comes with every build of PyTorch for GPUs on Linux; elsewhere the reference runs.
    """
    wanted = os.environ.get("PRISMFIELD_KERNELS", "")
    if wanted == "reference":
        return None, "reference (PRISMFIELD_KERNELS=reference)"
    if find_spec("triton") is None:
        return None, "slow reference instead of the Triton kernels: triton is not installed; pip install triton"
    try:
        import triton

        return gpu_table(), f"Triton {triton.__version__}"
    except Exception as error:  # a broken or too old Triton fails in its own ways
        return None, f"slow reference instead of the Triton kernels: they cannot be loaded ({error})"


class _Late:
    """What `load_gpu_kernels` gives, asked for once and only where there is a GPU: importing Triton takes a second."""

    loaded: tuple[Any, str] | None = None

    def __call__(self) -> tuple[Any, str]:
        if self.loaded is None:
            self.loaded = load_gpu_kernels()
        return self.loaded


DEVICES = ("cpu", "cuda")
"""Types of devices that there are kernels for; PyTorch calls AMD's GPUs "cuda", too."""

kernels: ModuleType | Any
kernels, description = load_kernels(os.environ.get("PRISMFIELD_KERNELS", ""))
gpu_kernels = _Late()
"""The kernels for GPUs, and a line about them."""
told = False
"""Whether the user knows that the reference runs."""
enabled = True
"""False: run the references even where kernels are at hand."""


def kernels_of(tensor: Tensor) -> Any:
    """The kernels for the device of `tensor`: the compiled module, or Triton's with the same functions. None if there are none."""
    return kernels if tensor.device.type == "cpu" else gpu_kernels()[0]


def use_kernel(tensor: Tensor) -> bool:
    """Whether a kernel takes this tensor; otherwise the caller runs the reference, and the first one says why."""
    global told
    if not enabled or tensor.device.type not in DEVICES or tensor.dtype != torch.float32:
        return False
    found = kernels_of(tensor)
    if found is None and not told:
        told = True
        log.warning(description if tensor.device.type == "cpu" else gpu_kernels()[1])
    return found is not None
