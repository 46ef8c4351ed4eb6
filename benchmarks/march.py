"""Samples per second of marching: search in an occupancy grid, positions, compositing, distortion loss, proposals.

    python benchmarks/march.py [--runs 21] [--threads N] [--out results/march.json]

The scene is a shell of the thickness of a few cells in a grid of 128^3, seen by the rays of an 800x800 camera, in random
order. Numbers are medians in milliseconds, and millions of samples per second. "PyTorch" is the reference in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import measure
from torch import Tensor

from prismfield.render.kernels import description, kernels
from prismfield.render.march import march, trace
from prismfield.render.ops.march import (
    composite_samples,
    composite_samples_reference,
    distortion_loss,
    distortion_loss_reference,
    march_occupancy_reference,
)
from prismfield.render.samplers import OccupancyGrid, Samples, interlevel_loss, proposal_samples, uniform_samples

RAYS = 16_384
STEP = 3**0.5 * 2 / 1024


def density(xyz: Tensor) -> Tensor:
    """A shell that lets little light through."""
    return 80.0 * ((xyz.norm(dim=-1) - 0.6).abs() < 0.05)


def make_rays(count: int) -> tuple[Tensor, Tensor]:
    """Of random pixels of a camera that sees all of the box."""
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(count, 2, generator=generator) - 0.5) * 0.72
    dirs = torch.cat([pixels, torch.ones(count, 1)], -1)
    return torch.tensor([[0.05, -0.1, -4.0]]).repeat(count, 1), torch.nn.functional.normalize(dirs, dim=-1)


def query(xyz: Tensor, _dirs: Tensor) -> tuple[Tensor, Tensor]:
    """The scene, as a field that costs little."""
    return density(xyz), xyz


def time_sampling(grid: OccupancyGrid, rays: tuple[Tensor, Tensor], runs: int) -> dict[str, float]:
    """Of a training step's rays."""
    origins, dirs = rays
    jitter = torch.rand(RAYS)
    t_range = torch.tensor([0.1, 10.0]).repeat(RAYS, 1)
    nested = OccupancyGrid(grid.aabb, 128, 5)
    nested.set_occupied(grid.occupied & (torch.arange(5) == 0).view(5, 1, 1, 1))
    samples = grid.sample(origins, dirs, 0.1, 10.0, STEP, max_samples=1024, jitter=jitter)

    def proposals() -> tuple[Samples, Any]:
        with torch.no_grad():
            return proposal_samples(origins, dirs, 2.0, 6.0, [density], [64, 32], generator=torch.Generator())

    return measure(
        {
            "occupancy grid": lambda: grid.sample(origins, dirs, 0.1, 10.0, STEP, max_samples=1024, jitter=jitter),
            "occupancy grid, 5 levels, growing steps": lambda: nested.sample(
                origins, dirs, 0.1, 30.0, STEP, max_samples=1024, jitter=jitter, cone=1 / 256
            ),
            "occupancy grid, PyTorch, 1/16 of the rays": lambda: march_occupancy_reference(
                *(t[: RAYS // 16] for t in (origins, dirs, t_range, jitter)), grid.bits, grid.aabb, STEP, 0.0, 1024
            ),
            "positions": lambda: samples.points(origins, dirs),
            "uniform, 32": lambda: uniform_samples(origins, dirs, 2.0, 6.0, 32),
            "proposals 64, 32": proposals,
        },
        runs,
    )


def time_compositing(samples: Samples, runs: int) -> dict[str, float]:
    """Forward and backward."""
    total = len(samples)
    sigmas, rgbs = (30 * torch.rand(total)).requires_grad_(), torch.rand(total, 3).requires_grad_()
    many = torch.rand(total, 16).requires_grad_()
    geometry = (samples.t_starts, samples.t_ends, samples.packed_info)
    v_rgb, weights = torch.rand(RAYS, 3), (torch.rand(total) / 20).requires_grad_()
    light = torch.ones(RAYS)

    def step(op: Callable[..., Any], features: Tensor, *more: Tensor) -> None:
        blended = op(sigmas, features, *geometry, *more)[0]
        torch.autograd.grad(blended, (sigmas, features), v_rgb[:, :1].expand_as(blended))

    def spread(op: Callable[..., Tensor]) -> None:
        torch.autograd.grad(op(weights, *geometry).sum(), weights)

    def forward() -> None:
        with torch.no_grad():
            composite_samples(sigmas, rgbs, *geometry)

    return measure(
        {
            "compositing, forward": forward,
            "compositing": lambda: step(composite_samples, rgbs),
            "compositing, PyTorch": lambda: step(composite_samples_reference, rgbs, light),
            "compositing, 16 channels": lambda: step(composite_samples, many),
            "distortion loss": lambda: spread(distortion_loss),
            "distortion loss, PyTorch": lambda: spread(distortion_loss_reference),
        },
        runs,
    )


def time_others(grid: OccupancyGrid, rays: tuple[Tensor, Tensor], runs: int) -> dict[str, float]:
    """Loss of proposals, upkeep of the grid, and a picture."""
    origins, dirs = rays
    samples, histograms = proposal_samples(origins, dirs, 2.0, 6.0, [density], [64, 32])
    weights = torch.rand(len(samples))
    generator = torch.Generator().manual_seed(0)
    picture = make_rays(160_000)

    def keep_up(cells: int | None) -> None:
        grid.update(density, threshold=1.0, generator=generator, cells=cells)

    return measure(
        {
            "interlevel loss": lambda: interlevel_loss(histograms, samples, weights),
            "update of all cells, without the field": lambda: keep_up(None),
            "update of 2^17 cells, without the field": lambda: keep_up(2**17),
            "picture of 400x400, without the field: march": lambda: march(
                grid.sample(*picture, 0.1, 10.0, STEP, max_samples=1024), *picture, query
            ),
            "picture of 400x400, without the field: trace": lambda: trace(
                grid, *picture, query, near=0.1, far=10.0, step=STEP
            ),
        },
        max(runs // 3, 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if kernels is not None:
        kernels.set_num_threads(options.threads)
    torch.manual_seed(0)
    grid = OccupancyGrid(torch.tensor([[-1.0, -1, -1], [1, 1, 1]]), 128)
    grid.update(density, threshold=1.0)
    rays = make_rays(RAYS)
    samples = grid.sample(*rays, 0.1, 10.0, STEP, max_samples=1024)
    print(f"{description}, {options.threads} threads, medians of {options.runs}; {RAYS} rays, {len(samples)} samples")
    times = time_sampling(grid, rays, options.runs) | time_compositing(samples, options.runs)
    times |= time_others(grid, rays, options.runs)
    for name, milliseconds in times.items():
        print(f"{name:48s} {milliseconds:9.3f} ms")
    rates = {
        name: round(len(samples) / times[name] / 1e3, 1)
        for name in ("occupancy grid", "positions", "compositing, forward", "compositing", "distortion loss")
    }
    print("millions of samples per second:", ", ".join(f"{name} {rate}" for name, rate in rates.items()))
    if options.out:
        result = {"kernels": description, "threads": options.threads, "runs": options.runs, "rays": RAYS}
        result |= {"samples": len(samples), "milliseconds": times, "million_samples_per_second": rates}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
