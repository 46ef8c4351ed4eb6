"""What of a radiance field matters: how far pictures change with each number of its tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import Grid
from prismfield.render.cameras import Cameras
from prismfield.representations.fields import Field

_RAYS, _SAME = 4096, 2  # of a backward pass; passes with the same noise
_NOISE = 0.25  # standard deviations of a level: how far the tables are moved before each pass
_LEFT_OUT = 0.15  # share of the rows that are 0 in a pass
PASSES = 64
_UNSEEN = 1e-3  # of a level's mean: what a number counts that no ray came near


def grids_of(field: Field) -> dict[str, Grid]:
    """The grids of a field by the name of their table: the proposals' first, then from coarse to fine."""
    return {f"{name}.table": module for name, module in field.named_modules() if isinstance(module, Grid)}


def importance(field: Field, cameras: list[Cameras], passes: int = PASSES, seed: int = 0) -> dict[str, Tensor]:
    """By table [rows, F], the mean squared change of a pixel's channel, by the squared change of each number, about.

    The diagonal of J^T J, J the derivative of the pictures, from random signs s: E[(J^T s)^2] (Bekas et al. 2007,
    doi:10.1016/j.apnum.2007.01.003). As a field's density is the exponential of what it stores, and empty space would count for nothing
    until it is not empty any more, tables are moved by noise and some of their rows left out before each pass.
    A proposal is measured by the logarithm of its density where it is asked.

    Args:
        field: on the CPU; its tables are as before afterwards, its gradients are not recorded.
        cameras: in its frame; those that say from where.
        passes: of the random numbers.
        seed: of these.
    """
    random = torch.Generator().manual_seed(seed)
    grids = grids_of(field)
    tables = {name: grid.table for name, grid in grids.items()}
    kept = {name: table.detach().clone() for name, table in tables.items()}
    sums = {name: torch.zeros_like(table) for name, table in kept.items()}
    needed = {table: table.requires_grad for table in tables.values()}
    asked: dict[str, Tensor] = {}
    hooks = [
        grid.register_forward_hook(lambda _m, _x, out, name=name: asked.__setitem__(name, out))
        for name, grid in grids.items()
        if name.startswith("proposals.")
    ]
    try:
        for table in tables.values():
            table.requires_grad_(True)
        for number in range(passes):
            for name, table in tables.items() if number % _SAME == 0 else ():
                _move(table, kept[name], grids[name], random)
            with torch.enable_grad():
                rgb = _some_pixels(field, cameras[number * len(cameras) // passes], random)
                outputs = [(rgb, "")] + [(out, name) for name, out in asked.items()]
                for out, name in outputs:
                    wanted = [n for n in tables if (n == name if name else not n.startswith("proposals."))]
                    signs = (torch.rand(out.shape, generator=random) < 0.5).float() * 2 - 1
                    found = torch.autograd.grad(out, [tables[n] for n in wanted], signs, allow_unused=True)
                    for n, gradient in zip(wanted, found, strict=True):
                        if gradient is not None:
                            sums[n] += gradient.square() / (out.numel() * passes)
            asked.clear()
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, table in tables.items():
                table.copy_(kept[name])
        for table, was in needed.items():
            table.requires_grad_(was)
    return {name: _with_unseen(grids[name], found) for name, found in sums.items()}


@torch.no_grad()
def _move(table: Tensor, original: Tensor, grid: Grid, random: torch.Generator) -> None:
    """Noise on a table, level by level, and some rows at 0."""
    for start, end in zip(grid.starts.tolist(), grid.starts[1:].tolist(), strict=False):
        rows = original[start:end]
        noise = torch.randn(rows.shape, generator=random) * (_NOISE * float(rows.square().mean().sqrt()))
        stays = torch.rand(len(rows), 1, generator=random) >= _LEFT_OUT
        table[start:end] = (rows + noise) * (stays & (rows != 0))  # what is 0 exactly was cut off


def _some_pixels(field: nn.Module, camera: Cameras, random: torch.Generator) -> Tensor:
    """[R, 3] colours of random pixels."""
    size = (min(_RAYS, camera.width * camera.height),)
    columns, rows = (torch.randint(n, size, generator=random) for n in (camera.width, camera.height))
    pixels = torch.stack([torch.zeros_like(rows), columns, rows], -1)
    found: Tensor = field.render(camera, pixels, torch.full((1, 3), 0.5)).rgb  # type: ignore[operator]
    return found


def _with_unseen(grid: Grid, found: Tensor) -> Tensor:
    """A little added to what no ray came near: another camera may."""
    for start, end in zip(grid.starts.tolist(), grid.starts[1:].tolist(), strict=False):
        part = found[start:end]
        part += max(_UNSEEN * float(part.mean()), math.ulp(0.0) + 1e-30)
    return found
