"""Grids and perceptrons: millions of samples per second, what bounds them; and simplices against cubes.

    python benchmarks/encodings.py [--runs 11] [--samples 18] [--seconds 20] [--image FILE] [--threads N] [--out results/encodings.json]

First a field's parts: a grid of 16 levels with 2 features and 2^19 rows, a density network 32-64-16 and a colour network 32-64-64-3,
forward and backward, of 2^18 positions, in random order and along rays. "PyTorch" is the reference in float32, in the same run. The
bounds are what this machine did in the same run: a product of matrices, a copy, and single reads of 8 bytes in random order.

Then simplices (arXiv:2311.15439) against cubes in tables of the same size, for D = 2, 3, 4; and the PSNR that each reaches in equal time,
in turns, on a picture and in a volume. Numbers are medians of alternating runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import measure
from torch import Tensor, nn

from prismfield.datasets import images
from prismfield.encodings.grid import Cells, Grid, grid, grid_reference
from prismfield.encodings.mlp import Mlp, mlp, mlp_reference
from prismfield.render.kernels import description, kernels
from prismfield.train.optimizer import FusedAdam

BUNDLED = Path(images.__file__).parent / "garden" / "images" / "009.jpg"
DENSITY, COLOR = [32, 64, 16], [32, 64, 64, 3]
Times = dict[str, float]


def machine_bounds(runs: int) -> Times:
    """What this machine can do, as PyTorch reaches it: GFLOP/s, GB/s of a copy (read and written), millions of reads per second."""
    a, b, c = torch.rand(1536, 1536), torch.rand(1536, 1536), torch.empty(1536, 1536)
    source, target = torch.rand(2**25), torch.empty(2**25)
    level, found = torch.randint(9, (2**19,)), torch.empty(2**21, dtype=torch.int64)
    rows = torch.randint(2**19, (2**21,))
    times = measure(
        {
            "product": lambda: torch.mm(a, b, out=c),
            "copy": lambda: target.copy_(source),
            "reads": lambda: torch.index_select(level, 0, rows, out=found),
        },
        runs,
    )
    return {
        "gflops": round(2 * 1536**3 / times["product"] / 1e6, 1),
        "copy_gb_per_second": round(2 * 4 * 2**25 / times["copy"] / 1e6, 2),
        "million_reads_per_second": round(2**21 / times["reads"] / 1e3, 1),
    }


def along_rays(count: int, in_dim: int = 3) -> Tensor:
    """[count, D]: 128 positions on each of many straight lines through the unit cube."""
    ends = torch.rand(2, math.ceil(count / 128), 1, in_dim)
    t = torch.linspace(0, 1, 128)[:, None]
    return (ends[0] + t * (ends[1] - ends[0])).view(-1, in_dim)[:count].contiguous()


class Parts:
    """Forward and backward of a field's parts, by kernels or references."""

    def __init__(self, x: Tensor, encoding: Grid) -> None:
        self.x, self.lattices = x, (encoding.scales, encoding.starts, encoding.sides, encoding.cells, encoding.smooth)
        self.table = encoding.table
        self.density, self.color = Mlp(32, 16, hidden=1).weights, Mlp(32, 3, hidden=2).weights
        self.features = encoding(x).detach().requires_grad_()
        self.v_features = torch.randn_like(self.features)
        self.codes = torch.randn(len(x), 16)
        self.v_rgb = torch.randn(len(x), 3)

    def encode(self, op: Callable[..., Tensor]) -> None:
        """To the table alone: positions do not learn."""
        torch.autograd.grad(op(self.x, self.table, *self.lattices), self.table, self.v_features)

    def networks(self, op: Callable[..., Tensor], features: Tensor) -> Tensor:
        """[S, 3], with the density's value in it, so that its gradient is not zero."""
        hidden = op(features, self.density, DENSITY, "none")
        rgb = op(torch.cat([hidden, self.codes], -1), self.color, COLOR, "sigmoid")
        return rgb * hidden[:, :1].clamp(-5, 5).exp()

    def decode(self, op: Callable[..., Tensor]) -> None:
        leaves = (self.features, self.density, self.color)
        torch.autograd.grad(self.networks(op, self.features), leaves, self.v_rgb)

    def together(self, encode: Callable[..., Tensor], op: Callable[..., Tensor]) -> None:
        features = encode(self.x, self.table, *self.lattices)
        torch.autograd.grad(self.networks(op, features), (self.table, self.density, self.color), self.v_rgb)


def time_field(count: int, runs: int, bounds: Times) -> dict[str, Any]:
    """Of a field's parts, at random positions and along rays."""
    encoding = Grid(3)
    report: dict[str, Any] = {}
    for where, x in {"random": torch.rand(count, 3), "rays": along_rays(count)}.items():
        parts = Parts(x, encoding)
        times = measure(
            {
                "grid": lambda parts=parts: parts.encode(grid),
                "networks": lambda parts=parts: parts.decode(mlp),
                "together": lambda parts=parts: parts.together(grid, mlp),
            },
            runs,
        )
        slow = measure(
            {
                "grid, PyTorch": lambda parts=parts: parts.encode(grid_reference),
                "networks, PyTorch": lambda parts=parts: parts.decode(mlp_reference),
                "together, PyTorch": lambda parts=parts: parts.together(grid_reference, mlp_reference),
            },
            max(runs // 3, 1),
        )
        times |= slow
        rates = {name: round(count / value / 1e3, 3) for name, value in times.items()}
        report[where] = {"milliseconds": times, "million_samples_per_second": rates}
    report["work"] = count_work(count, encoding)
    for where in ("random", "rays"):
        times = report[where]["milliseconds"]
        report[where]["share_of_bound"] = {
            "networks, of the product of matrices": share(
                report["work"]["flops"], bounds["gflops"] * 1e6, times["networks"]
            ),
            "grid, of single reads": share(
                report["work"]["reads"], bounds["million_reads_per_second"] * 1e3, times["grid"]
            ),
            "grid, bytes of the copy": share(
                report["work"]["bytes"], bounds["copy_gb_per_second"] * 1e6, times["grid"]
            ),
        }
    return report


def share(work: float, per_millisecond: float, milliseconds: float) -> float:
    """The time that the bound allows, as a part of that which was taken."""
    return round(work / per_millisecond / milliseconds, 3)


def count_work(count: int, encoding: Grid) -> dict[str, float]:
    """Forward and backward, of all samples: each product of a network thrice; each corner read once, and read and written once.

    The bytes are those of the corners' features, and of the codes, the positions and the whole table's gradient, each passed once a way.
    """
    layers = [a * b for dims in (DENSITY, COLOR) for a, b in zip(dims, dims[1:], strict=False)]
    corners = count * len(encoding.scales) * 2**encoding.in_dim
    width = 4 * encoding.table.shape[1]
    streams = count * (2 * 4 * encoding.in_dim + 2 * 4 * encoding.out_dim) + 4 * encoding.table.numel()
    return {"flops": 6 * sum(layers) * count, "reads": 2 * corners, "bytes": 3 * corners * width + streams}


def function(x: Tensor) -> Tensor:
    """[S, 1] something with details of several sizes, of D axes."""
    waves = [torch.sin(scale * x + scale).prod(-1, keepdim=True) for scale in (5.0, 17.0, 61.0)]
    return torch.stack(waves).sum(0) + (x.sub(0.5).norm(dim=-1, keepdim=True) < 0.3)


class Fit:
    """A grid and a network that learn a function, step by step, with the time that they took."""

    def __init__(self, cells: Cells, in_dim: int, out_dim: int, log2_rows: int, finest: int) -> None:
        torch.manual_seed(0)
        self.encoding = Grid(in_dim, cells=cells, log2_rows=log2_rows, finest=finest)
        self.network = Mlp(self.encoding.out_dim, out_dim, hidden=2)
        groups: list[dict[str, Any]] = [{"name": "table", "params": [self.encoding.table], "lr": 1e-2}]
        groups += [{"name": "weights", "params": [self.network.weights], "lr": 2e-3}]
        self.optimizer = FusedAdam(groups, betas=(0.9, 0.99))
        self.seconds, self.steps = 0.0, 0

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(self.encoding(x))

    def step(self, x: Tensor, wanted: Tensor) -> None:
        began = time.perf_counter()
        loss = (self(x) - wanted).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1

    def psnr(self, x: Tensor, wanted: Tensor, peak: float) -> float:
        with torch.no_grad():
            found = torch.cat([self(part) for part in x.split(2**16)])
        return round(-10 * math.log10((found - wanted).square().mean().item() / peak**2), 2)


def time_cells(count: int, log2_rows: int, runs: int) -> dict[str, Any]:
    """Milliseconds by axes, positions, pass and kind of cell, for tables of the same number of rows."""
    report: dict[str, Any] = {}
    for in_dim in (2, 3, 4):
        for where, x in {"random": torch.rand(count, in_dim), "rays": along_rays(count, in_dim)}.items():
            fits = {cells: Fit(cells, in_dim, 1, log2_rows, 2048) for cells in ("cubes", "simplices")}
            wanted = function(x)
            contenders: dict[str, Callable[[], Any]] = {}
            for cells, fit in fits.items():
                fixed = Grid(in_dim, cells=cells, log2_rows=log2_rows)  # a step changes the table of the other
                out = fixed(x)
                v_out = torch.randn_like(out)
                contenders |= {
                    f"forward {cells}": lambda fixed=fixed, x=x: forward(fixed, x),
                    f"backward {cells}": lambda fixed=fixed, out=out, v_out=v_out: torch.autograd.grad(
                        out, fixed.table, v_out, retain_graph=True
                    ),
                    f"step {cells}": lambda fit=fit, x=x, wanted=wanted: fit.step(x, wanted),
                }
            times = measure(contenders, runs)
            report[f"{in_dim}, {where}"] = times | {
                f"{name}, saved": round(1 - times[f"{name} simplices"] / times[f"{name} cubes"], 3)
                for name in ("forward", "backward", "step")
            }
    return report


def forward(encoding: Grid, x: Tensor) -> Tensor:
    with torch.no_grad():
        return encoding(x)


def race(
    in_dim: int, sample: Callable[[Tensor], Tensor], count: int, seconds: float, sizes: tuple[int, int]
) -> dict[str, Any]:
    """PSNR after equal time, by turns of a tenth of it, at positions that both are asked afterwards."""
    test = torch.rand(2**17, in_dim, generator=torch.Generator().manual_seed(7))
    wanted = sample(test)
    peak = float(wanted.max() - wanted.min())
    fits = {cells: Fit(cells, in_dim, wanted.shape[1], *sizes) for cells in ("cubes", "simplices")}
    report: dict[str, Any] = {cells: {"psnr": []} for cells in fits}
    for turn in range(1, 11):
        for cells, fit in fits.items():
            while fit.seconds < seconds * turn / 10:
                x = torch.rand(count, in_dim)
                fit.step(x, sample(x))
            report[cells]["psnr"].append(fit.psnr(test, wanted, peak))
    for cells, fit in fits.items():
        report[cells] |= {"steps": fit.steps, "seconds": round(fit.seconds, 2), "rows": len(fit.encoding.table)}
    return report


def read_picture(path: Path) -> Callable[[Tensor], Tensor]:
    """Colours [S, 3] at positions [S, 2] in the unit square, linear between pixels."""
    pixels = images.decode(path)[..., :3]
    picture = torch.from_numpy(pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)).permute(2, 0, 1)[
        None
    ]
    options = {"padding_mode": "border", "align_corners": False}
    return lambda x: nn.functional.grid_sample(picture, 2 * x[None, None] - 1, **options)[0, :, 0].mT


def show(result: dict[str, Any]) -> None:
    """Three tables."""
    console = Console()
    parts = Table("forward + backward", "positions", "ms", "M samples/s", title="parts of a field")
    for where in ("random", "rays"):
        for name, value in result["field"][where]["milliseconds"].items():
            parts.add_row(
                name, where, f"{value:.1f}", f"{result['field'][where]['million_samples_per_second'][name]:.2f}"
            )
    console.print(parts)
    work, bounds = result["field"]["work"], result["bounds"]
    console.print(
        f"a sample: {work['flops'] / result['samples']:,.0f} FLOP, {work['bytes'] / result['samples']:,.0f} bytes"
    )
    console.print(", ".join(f"{name} {value}" for name, value in bounds.items()))
    for where in ("random", "rays"):
        shares = result["field"][where]["share_of_bound"].items()
        console.print(f"{where}: " + ", ".join(f"{name} {value:.0%}" for name, value in shares))
    cells = Table("D, positions", *(f"{name}: cubes, simplices" for name in ("forward", "backward", "step")))
    for where, times in result["cells"].items():
        row = [
            f"{times[f'{name} cubes']:.1f} {times[f'{name} simplices']:.1f} ({-times[f'{name}, saved']:+.0%})"
            for name in ("forward", "backward", "step")
        ]
        cells.add_row(where, *row)
    cells.title = "milliseconds"
    console.print(cells)
    races = Table(
        "signal", "cells", "seconds", "steps", "PSNR at a fifth of the time", "at its end", title="equal time"
    )
    for signal, kinds in result["races"].items():
        for kind, found in kinds.items():
            races.add_row(
                signal, kind, f"{found['seconds']}", f"{found['steps']}", f"{found['psnr'][1]}", f"{found['psnr'][-1]}"
            )
    console.print(races)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--samples", type=int, default=18, help="log2 of the positions of a run")
    parser.add_argument("--log2-rows", type=int, default=19, help="of the tables that are compared")
    parser.add_argument("--seconds", type=float, default=20, help="of training of each in the races")
    parser.add_argument("--image", type=Path, default=BUNDLED)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if kernels is not None:
        kernels.set_num_threads(options.threads)
    torch.manual_seed(0)
    count = 2**options.samples
    print(f"{description}, {options.threads} threads, medians of {options.runs}, {count} positions")
    bounds = machine_bounds(options.runs)
    result: dict[str, Any] = {
        "kernels": description,
        "threads": options.threads,
        "runs": options.runs,
        "samples": count,
        "log2_rows": options.log2_rows,
        "image": options.image.name,
        "bounds": bounds,
        "field": time_field(count, options.runs, bounds),
        "cells": time_cells(count, options.log2_rows, options.runs),
    }
    batch, seconds = min(count, 2**16), options.seconds
    result["races"] = {
        "picture": race(2, read_picture(options.image), batch, seconds, (options.log2_rows - 3, 1024)),
        "volume": race(3, function, batch, seconds, (options.log2_rows - 1, 256)),
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
