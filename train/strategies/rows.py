"""Add, drop and overwrite primitives: the only place that changes a parameter and its optimizer state together."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

_SECOND = "exp_avg_sq"


@torch.no_grad()
def keep_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, keep: Tensor) -> None:
    """Drop the primitives where `keep` [N] (bool) is false. The last ones move into the gaps, so the order changes.

    Costs no more than copying as many rows as are dropped.
    """
    count, gaps, movers = _moves(keep)

    def compact(values: Tensor, _name: str, _moment: str) -> Tensor:
        values[gaps] = values[movers]
        return values[:count]

    _exchange(scene, optimizer, compact)


def rows_kept(values: Tensor, keep: Tensor) -> Tensor:
    """What `keep_rows` makes of something [N, ...] beside the scene, which is changed too."""
    count, gaps, movers = _moves(keep)
    values[gaps] = values[movers]
    return values[:count]


def _moves(keep: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many stay, the places among the first so many that become free, and who moves there."""
    count = int(keep.sum())
    return count, (~keep[:count]).nonzero().squeeze(1), keep[count:].nonzero().squeeze(1) + count


@torch.no_grad()
def order_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, order: Tensor) -> None:
    """Put the primitives into another order: `order` [N] has the place of each now."""
    _exchange(scene, optimizer, lambda values, _name, _moment: values[order])


@torch.no_grad()
def append_rows(
    scene: nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Tensor], parents: Tensor | None = None
) -> None:
    """Add primitives after the last. Their moments start at zero, or the second one as that of their parents.

    Late in a training, Adam's steps without a second moment are up to six and a half times its rate.

    Args:
        rows: for every parameter of the scene, by name, [M, ...].
        parents: [M] integers, the primitive that each one comes from.
    """
    expected = [name for name, _ in scene.named_parameters(recurse=False)]
    if sorted(rows) != sorted(expected):
        raise ValueError(f"rows: expected {', '.join(expected)}, got {', '.join(rows)}")

    def extend(values: Tensor, name: str, moment: str) -> Tensor:
        longer = _with_room(values, len(values) + len(rows[name]))
        if moment == _SECOND and parents is not None:
            longer[len(values) :] = values[parents]
        else:
            longer[len(values) :] = 0 if moment else rows[name]
        return longer

    _exchange(scene, optimizer, extend)


@torch.no_grad()
def replace_rows(
    scene: nn.Module,
    optimizer: torch.optim.Optimizer,
    index: Tensor,
    rows: dict[str, Tensor],
    *,
    keep_second: bool = False,
) -> None:
    """Overwrite primitives in place and zero their moments.

    Args:
        index: [M] integers, no two alike.
        rows: by parameter name, [M, ...]; parameters that are not named stay as they are, with their moments.
        keep_second: the second moment stays; see `append_rows`.
    """
    for name, values in rows.items():
        parameter = scene.get_parameter(name)
        parameter.index_copy_(0, index, values)
        for moment, values_of in _moments(optimizer, parameter).items():
            if not (keep_second and moment == _SECOND):
                values_of.index_fill_(0, index, 0)


@torch.no_grad()
def reorder_rows(scene: nn.Module, optimizer: torch.optim.Optimizer, order: Tensor) -> None:
    """Put primitive `order[i]` in place i; `order` [N] is a permutation."""
    _exchange(scene, optimizer, lambda values, _name, _moment: values[order])


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The optimizer's tensors that have one row a primitive."""
    state = optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}


def _exchange(scene: nn.Module, optimizer: torch.optim.Optimizer, change: Callable[[Tensor, str, str], Tensor]) -> None:
    """Put `change(values, parameter name, name of the moment or "")` in the place of every parameter and moment.

    Parameters are new objects: autograd keeps the old shape of one whose data is exchanged while a graph is alive.
    """
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    for name, old in list(scene.named_parameters(recurse=False)):
        moments = {key: change(value, name, key) for key, value in _moments(optimizer, old).items()}
        new = nn.Parameter(change(old.detach(), name, ""), requires_grad=old.requires_grad)
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old) | moments
        setattr(scene, name, new)
        exchanged[old] = new
    for group in optimizer.param_groups:
        group["params"] = [exchanged.get(parameter, parameter) for parameter in group["params"]]


def _with_room(values: Tensor, total: int) -> Tensor:
    """A tensor of `total` rows that begins with `values`, in the same memory where that has room.

    New memory has room for half as many rows again, which take no physical memory before they are written.
    """
    size = (total, *values.shape[1:])
    room = values.untyped_storage().nbytes() // values.element_size() - values.storage_offset()
    if values.is_contiguous() and math.prod(size) <= room:
        return values.as_strided(size, values.stride())
    longer = values.new_empty(max(total, len(values) * 3 // 2), *values.shape[1:])
    longer[: len(values)] = values
    return longer[:total]
