"""The same bits in each run: what torch computes by several threads is ready for them before they start."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismfield.render import first_calls
from prismfield.render.contraction import contract, uncontract
from prismfield.representations.base import Representation

from .test_conformance import kind, make_cameras, scene  # noqa: F401
from .test_package import imports, package_files

OTHERS = {"abs", "ceil", "floor", "frac", "neg", "reciprocal", "relu", "round", "sign", "softplus", "square", "trunc"}
"""Functions of one number that torch computes by itself, or that are right to the last bit whoever computes them."""


class Log(TorchDispatchMode):
    """Names, dtypes and sizes of the functions of one tensor that give another of its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, torch.dtype, int]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_unary = len(args) == 1 and isinstance(args[0], torch.Tensor) and not kwargs
        if is_unary and isinstance(out, torch.Tensor) and out.shape == args[0].shape and "pointwise" in _tags(func):
            self.calls.add((name.rstrip("_"), args[0].dtype, args[0].numel()))
        return out


def _tags(func: Any) -> set[str]:
    return {str(tag).rpartition(".")[2] for tag in func.tags}


def called(run: Callable[[], object]) -> set[tuple[str, torch.dtype, int]]:
    with Log() as log:
        run()
    return log.calls


def test_first_calls_are_made_by_one_thread() -> None:
    """A run that was resumed on a busy machine went astray in its first square root, once in fifty times."""
    dtypes = (torch.float32, torch.float64)
    wanted = {(name, dtype, 1) for name in first_calls.FUNCTIONS for dtype in dtypes}
    assert called(lambda: importlib.reload(first_calls)) >= {call for call in wanted if call[0] != "lgamma"}


def test_training_calls_no_other_functions_first(device: torch.device, scene: Representation) -> None:  # noqa: F811
    """One that is new here belongs into `FUNCTIONS`."""

    def train() -> None:
        out = scene.render(make_cameras(device), extras=("depth",))
        sum(out.penalties.values(), out.rgb.square().sum() + out.alpha.sum()).backward()
        with torch.no_grad():
            scene.render(make_cameras(device))

    found = called(train) | called(lambda: uncontract(contract(torch.ones(3, 3))))
    names = {name for name, dtype, _ in found if dtype.is_floating_point}
    assert names >= {"sqrt", "reciprocal"}
    assert names <= {*first_calls.FUNCTIONS, *OTHERS}


def test_whatever_computes_makes_them() -> None:
    """Modules that call one of the functions import this, themselves or by what they import."""
    found = {module: {name for name, _ in imports(path, anywhere=False)} for module, path in package_files()}
    reached = {"prismfield.render.first_calls"}
    while more := {module for module, names in found.items() if names & reached} - reached:
        reached |= more
    calls = re.compile(rf"\b(torch|[a-z_]+\)?)\.({'|'.join(first_calls.FUNCTIONS)})_?\(")
    computing = {module for module, path in package_files() if calls.search(path.read_text(encoding="utf-8"))}
    computing = {module for module in computing if "torch" in found[module] and ".gpu." not in module}
    assert len(computing) > 10
    assert computing - reached == set()
