"""Add, drop and overwrite primitives: the only place that changes a parameter and its optimizer state together."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def keep_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, keep: Tensor) -> None:
    """Keep the primitives where `keep` [N] (bool) is true, in their order."""
    index = keep.nonzero().squeeze(1)
    _rebuild(scene, optimizer, index, {})


def append_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Tensor]) -> None:
    """Add primitives after the last.

    Args:
        rows: for every parameter of the scene, by name, [M, ...]. Their moments start at zero.
    """
    _rebuild(scene, optimizer, None, rows)


@torch.no_grad()
def replace_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, index: Tensor, rows: dict[str, Tensor]) -> None:
    """Overwrite primitives in place and zero their moments.

    Args:
        index: [M] integers, no two alike.
        rows: by parameter name, [M, ...]; parameters that are not named stay as they are, with their moments.
    """
    for name, values in rows.items():
        parameter = scene.get_parameter(name)
        parameter.index_copy_(0, index, values)
        for moments in _moments(optimizer, parameter).values():
            moments.index_fill_(0, index, 0)


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors that have one row a primitive."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}


@torch.no_grad()
def _rebuild(scene: nn.Module, optimizer: torch.optim.Optimizer, index: Tensor | None, rows: dict[str, Tensor]) -> None:
    """Give every parameter the rows at `index` (all if None) followed by `rows`.

    Parameters are new objects: autograd keeps the old shape of one whose data is exchanged while a graph is alive.
    """
    parameters = dict(scene.named_parameters())
    if rows and rows.keys() != parameters.keys():
        raise ValueError(f"rows: expected {', '.join(parameters)}, got {', '.join(rows)}")
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in parameters.items():
        new = nn.Parameter(_joined(old, index, rows.get(name)), requires_grad=old.requires_grad)
        moments = {key: _joined(value, index, None, new) for key, value in _moments(optimizer, old).items()}
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old) | moments
        setattr(scene, name, new)
        replaced[old] = new
    for group in optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]


def _joined(values: Tensor, index: Tensor | None, rows: Tensor | None, like: Tensor | None = None) -> Tensor:
    """`values[index]`, then `rows`, or zeros up to the length of `like`; each row is copied once."""
    kept = len(values) if index is None else len(index)
    total = len(like) if like is not None else kept + (0 if rows is None else len(rows))
    joined = values.new_empty(total, *values.shape[1:])
    if index is None:
        joined[:kept] = values
    else:
        torch.index_select(values, 0, index, out=joined[:kept])
    joined[kept:] = 0 if rows is None else rows
    return joined
