"""Training of a radiance field's tables as a file holds them: rounded, with steps that are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prismfield.datasets.views import Views
from prismfield.encodings.grid import Grid
from prismfield.export.compression.field_importance import grids_of
from prismfield.export.compression.field_pfz import FieldAsset
from prismfield.export.compression.field_pfz_write import Tables
from prismfield.train.batches import Batch, PixelBatches
from prismfield.train.checkpoint import load_checkpoint
from prismfield.train.corrections import Exposure, PoseDeltas
from prismfield.train.folder import CHECKPOINTS
from prismfield.train.losses import loss_terms
from prismfield.train.metrics import psnr
from prismfield.train.optimizer import FusedAdam
from prismfield.train.run import Run, part
from prismfield.train.session import make_batches

_SYMBOLS_LR, _STEPS_LR, _NETWORKS_LR = 0.02, 2e-3, 5e-4  # Adam's: steps of a level, their logarithm, weights
_LEFT = 0.1  # share of the rates at the end


@dataclass
class RoundedTable:
    """A grid's table in units of its first steps, and what has become of the steps."""

    grid: Grid
    places: nn.Parameter
    """[rows, F] in first steps; rounded to whole steps they are the symbols."""
    logs: nn.Parameter
    """[levels, F] logarithms of the steps by the first ones."""
    first: Tensor
    """[levels, F] steps at first."""
    most: int

    @torch.no_grad()
    def show(self) -> None:
        """Let the grid hold what the file would."""
        for level, rows in self._levels():
            ratio = self.logs[level].exp()
            self.grid.table[rows] = self._symbols(self.places[rows], ratio) * (ratio * self.first[level])

    @torch.no_grad()
    def pull(self) -> None:
        """Hand the gradient of the grid's table on, straight through the rounding.

        Learned Step Size Quantization (arXiv:1902.08153), eq. 3 and 5, for the logarithm of a step; Adam needs no scale of its gradient (section 2.2).
        """
        found = self.grid.table.grad
        assert found is not None
        self.places.grad = torch.zeros_like(self.places) if self.places.grad is None else self.places.grad
        self.logs.grad = torch.zeros_like(self.logs)
        for level, rows in self._levels():
            ratio = self.logs[level].exp()
            place, gradient = self.places[rows] / ratio, found[rows] * (ratio * self.first[level])
            symbols = self._symbols(self.places[rows], ratio)
            inside = place.abs() <= self.most
            self.places.grad[rows] = gradient * inside
            self.logs.grad[level] = (gradient * torch.where(inside, symbols - place, symbols)).sum(0)
        self.grid.table.grad = None

    def rounded(self) -> list[tuple[tuple[float, ...], Tensor]]:
        """Of each level, the steps and the symbols [rows, F]."""
        found = []
        with torch.no_grad():
            for level, rows in self._levels():
                # The file has steps in single precision
                steps = (self.logs[level].exp() * self.first[level]).float()
                symbols = self._symbols(self.places[rows], self.logs[level].exp()).to(torch.int16)
                found.append((tuple(steps.tolist()), symbols))
        return found

    def _symbols(self, places: Tensor, ratio: Tensor) -> Tensor:
        return (places / ratio).round().clamp(-self.most, self.most)

    def _levels(self) -> list[tuple[int, slice]]:
        starts = self.grid.starts.tolist()
        return [(i, slice(a, b)) for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))]


def finetune_field(
    run: Run, asset: FieldAsset, tables: Tables, most: int, steps: int, tell: Callable[[int, float], None]
) -> tuple[FieldAsset, Tables]:
    """Train a rounded field against the photographs of its run.

    Symbols move by straight-through gradients and take their steps along; the networks learn with them, occupied cells stay.

    Args:
        run: whose photographs, losses and corrections of exposure and pose count.
        asset: what `tables` were made of.
        tables: rounded.
        most: largest magnitude of a symbol.
        steps: of training, 1 or more.
        tell: is told the step and the PSNR of its pixels now and then.

    Returns:
        The field with its networks trained, and its tables.

    Raises:
        FileNotFoundError: the photographs are not there any more.
        ValueError: one of them is damaged.
    """
    torch.manual_seed(run.config.seed)
    field: Any = asset.field()
    field.jitter = torch.Generator().manual_seed(run.config.seed + 1)
    rounded = {name: _table(grid, asset, tables[name], most, name) for name, grid in grids_of(field).items()}
    networks = {name: p for name, p in field.named_parameters() if name not in rounded}
    groups: list[dict[str, Any]] = []
    for name, table in rounded.items():
        groups.append({"name": name, "params": [table.places], "lr": _SYMBOLS_LR})
        groups.append({"name": f"{name}.steps", "params": [table.logs], "lr": _STEPS_LR})
    groups += [{"name": name, "params": [p], "lr": _NETWORKS_LR} for name, p in networks.items()]
    optimizer = FusedAdam([group | {"lr_first": group["lr"]} for group in groups])
    batches, correct = _photographs(run)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_first"] * _LEFT ** (step / steps)
        for table in rounded.values():
            table.show()
        batch, exposed = correct(batches.next())
        out = field.render(batch.cameras, batch.pixels, batch.background)
        batches.adapt(out.samples)
        rgb = exposed(out.rgb)
        terms = loss_terms(out, rgb, batch, field, run.config.loss)
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values(), torch.zeros(())).backward()
        for table in rounded.values():
            if table.grid.table.grad is not None:
                table.pull()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            with torch.no_grad():
                tell(step + 1, psnr(rgb.clamp(0, 1), batch.rgb_float, batch.mask))
    found: Tables = {
        name: [
            (replace(level, steps=learned), symbols.numpy())
            for (level, _), (learned, symbols) in zip(tables[name], table.rounded(), strict=True)
        ]
        for name, table in rounded.items()
    }
    weights = {name: p.detach().numpy().copy() for name, p in networks.items()}
    return replace(asset, tensors=asset.tensors | weights), found


def _table(grid: Grid, asset: FieldAsset, levels: list, most: int, name: str) -> RoundedTable:
    """A table whose symbols are those of `levels`, as near to the field's own numbers as these allow."""
    first = torch.tensor([level.steps for level, _ in levels])
    symbols = torch.from_numpy(np.concatenate([symbols for _, symbols in levels])).float()
    starts = grid.starts.tolist()
    own = torch.from_numpy(asset.tensors[name])
    places = torch.cat([own[a:b] / first[i] for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False))])
    places = symbols + (places - symbols).clamp(-0.49, 0.49)  # what was dropped has its symbol, not its number
    return RoundedTable(grid, nn.Parameter(places), nn.Parameter(torch.zeros_like(first)), first, most)


def _photographs(run: Run) -> tuple[PixelBatches, Callable[[Batch], tuple[Batch, Callable[[Tensor], Tensor]]]]:
    """The run's training pixels; and what gives a batch the poses, and its colours the exposure, that the run learned."""
    config = run.config
    budget = config.data.cache_mb << 20
    views = Views(run.data.train, downscale=config.downscale, byte_budget=budget // 2, scale=run.frame.scale)
    batches = make_batches(config, "pixels", views, run.background, budget // 4, torch.device("cpu"))
    assert isinstance(batches, PixelBatches)
    modules: dict[str, nn.Module] = {}
    if config.exposure.enabled or config.pose.enabled:
        tensors, _ = load_checkpoint(run.path / CHECKPOINTS, run.step)
        kinds: dict[str, tuple[bool, type[nn.Module]]]
        kinds = {"exposure": (config.exposure.enabled, Exposure), "poses": (config.pose.enabled, PoseDeltas)}
        for name, (enabled, kind) in kinds.items():
            if enabled:
                modules[name] = kind(len(views))
                modules[name].load_state_dict(part(tensors, name))
                modules[name].requires_grad_(False)

    def correct(batch: Batch) -> tuple[Batch, Callable[[Tensor], Tensor]]:
        if "poses" in modules:
            batch = replace(batch, cameras=modules["poses"](batch.cameras, batch.camera_views))
        return batch, lambda rgb: modules["exposure"](rgb, batch.index) if "exposure" in modules else rgb

    return batches, correct
