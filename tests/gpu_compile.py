"""Compiles Triton kernels for GPUs that need not be there, and counts registers and spills.

    python tests/gpu_compile.py SPECS.json

SPECS.json lists launches as `describe` gives them. Prints one JSON object a kernel and target. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

_FIRST = ("cuda", 90, 32)
OTHERS = [("cuda", 80, 32), ("hip", "gfx942", 64)]
_TYPES = {
    torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
    torch.int16: "*i16", torch.float64: "*fp64",
}  # fmt: skip


def describe(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """A launch in words that JSON can hold; the kernel may be an interpreted one."""
    launch_options = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: _as_words(value) for name, value in options.items() if name not in launch_options}
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(args), f"{kernel.__name__}: {len(args)} arguments for {names}"
    return {
        "module": kernel.fn.__module__,
        "kernel": kernel.fn.__name__,
        "types": {name: _type(arg) for name, arg in zip(names, args, strict=True)},
        "constants": constants,
        "options": launch_options,
    }


def _type(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return _TYPES[arg.dtype]
    if isinstance(arg, float):
        return "fp32"
    assert isinstance(arg, int), f"no type for {arg!r}"
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def _as_words(value: Any) -> Any:
    """Numbers as they are, jitted functions by name, tuples part by part."""
    if hasattr(value, "fn"):
        return {"function": value.fn.__name__, "module": value.fn.__module__}
    if isinstance(value, tuple):
        return {"tuple": [_as_words(part) for part in value]}
    return value


def _from_words(words: Any) -> Any:
    if isinstance(words, dict) and "function" in words:
        return getattr(importlib.import_module(words["module"]), words["function"])
    if isinstance(words, dict):
        return tuple(_from_words(part) for part in words["tuple"])
    return words


def compile_for(spec: dict[str, Any], target: tuple[str, Any, int]) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one kernel on one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    constants = {name: _from_words(words) for name, words in spec["constants"].items()}
    types = {name: spec["types"].get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"enable_fp_fusion": True} | spec["options"]
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    if target[0] == "cuda":
        registers, spilled = _cuda_usage(compiled.asm["cubin"])
    else:
        registers, spilled = _hip_usage(compiled.asm["amdgcn"])
    return {
        "kernel": spec["kernel"],
        "constants": {name: value for name, value in spec["constants"].items() if not isinstance(value, dict)},
        "warps": spec["options"].get("num_warps", 4),
        "target": f"sm_{target[1]}" if target[0] == "cuda" else target[1],
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
    }


def compile_all(specs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`compile_for` of all `specs`; on other targets than the first only of each kernel's form with the most registers."""
    largest: dict[str, tuple[int, dict[str, Any]]] = {}
    with ProcessPoolExecutor() as pool:
        for spec, row in zip(specs, pool.map(compile_for, specs, itertools.repeat(_FIRST)), strict=True):
            yield row
            if row["registers"] > largest.get(spec["kernel"], (-1, spec))[0]:
                largest[spec["kernel"]] = row["registers"], spec
        chosen = [spec for _, spec in largest.values()]
        yield from pool.map(compile_for, *zip(*itertools.product(chosen, OTHERS), strict=True))


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory: what does not fit."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _hip_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and what does not fit into them: how many of them, and bytes of private memory.

    Scalar registers that do not fit (`sgpr_spill_count`) move to lanes of a vector register, not to memory, and do not count.
    """
    found = {
        key: int(number) for key, number in re.findall(r"\.(\w+_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return found["vgpr_count"], found["vgpr_spill_count"] + found["private_segment_fixed_size"]


if __name__ == "__main__":
    for row in compile_all(json.loads(Path(sys.argv[1]).read_text())):
        print(json.dumps(row), flush=True)
