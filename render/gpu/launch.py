"""Starting a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

watch: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None
"""Called with the kernel, its arguments and its options before each start: how the tests learn what there is to compile."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` once for each point of `grid`, on the device of the tensors among `args`.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along up to three axes; nothing is started where one is 0.
        args: what the kernel takes before its `tl.constexpr` parameters: contiguous tensors and numbers, no two tensors on
            different devices.
        options: the `tl.constexpr` parameters by name, `num_warps` and `num_stages`.
    """
    if watch is not None:
        watch(kernel, args, options)
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def cdiv(count: int, block: int) -> int:
    """How many blocks hold `count`."""
    return -(-count // block)
