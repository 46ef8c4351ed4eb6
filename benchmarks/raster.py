"""The rasterizer's stages in milliseconds, beside the prototype's on the same scene in the same run.

    python benchmarks/raster.py [--prototype FOLDER] [--sizes 100k 1M] [--runs 11] [--out results/raster.json]

The two alternate, run by run, so that a machine whose speed drifts slows both; the ratio is the median of the runs' ratios.
The prototype draws three channels of constant colour; ours is timed so (`lean`) and as the full op: harmonics of degree 3,
depth and alpha with their gradients. FOLDER holds the prototype's build.sh; by default $PRISMFIELD_SHARED/prototypes/cpu_raster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scenes import SIZES, SyntheticScene, make_scene

from prismfield.render.kernels import description, kernels
from prismfield.render.ops import bin as bin_op
from prismfield.render.ops import composite as composite_op
from prismfield.render.ops import project as project_op
from prismfield.render.ops import sh as sh_op

Stages = dict[str, float]


class Clock:
    """Collects the milliseconds between calls."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = (now - self.last) * 1e3
        self.last = time.perf_counter()


def our_run(scene: SyntheticScene, upstream: dict[str, torch.Tensor], full: bool, clock: Any = None) -> Stages:
    """One forward and backward pass through the registered ops, stage by stage; `clock` is a `Clock` or laps like one."""
    cameras, degree = scene.cameras, 3 if full else 0
    size = (cameras.width, cameras.height)
    gaussians = (scene.means, scene.quats, scene.scales, scene.opacities, cameras.viewmats, cameras.Ks, *size, False)
    nothing = scene.means.new_zeros(0)
    clock = Clock() if clock is None else clock
    params, depths, radii = project_op._project(*gaussians)
    clock.lap("project")
    colour = (scene.sh0, scene.shN, scene.means, cameras.viewmats, radii, degree)
    rgbs = sh_op._sh_colors(*colour)
    clock.lap("sh")
    isects = bin_op.bin_primitives("gaussian", params, depths, radii, size)
    clock.lap("bin")
    lists = (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts, *size, isects.tile_size)
    primitives = ("gaussian", params, rgbs, depths, scene.background, nothing)
    out = composite_op._composite(*primitives, *lists, full, False)
    clock.lap("forward")
    v_depth = upstream["depth"] if full else nothing
    v_composite = (upstream["rgb"], upstream["alpha"], v_depth)
    grads = composite_op._composite_backward(*primitives, *lists, *out[4:], *v_composite)
    clock.lap("backward")
    sh_op._sh_colors_backward(*colour, rgbs, grads[1], full, False)
    clock.lap("sh backward")
    project_op._project_backward(*gaussians, radii, grads[0], grads[2], False)
    clock.lap("project backward")
    return clock.stages


def build_prototype(folder: Path, level: str) -> Any:
    """Compile the prototype in a temporary copy and import it."""
    work = Path(tempfile.mkdtemp(prefix="prototype_"))
    shutil.copytree(folder, work, dirs_exist_ok=True)
    for path in [work, *work.rglob("*")]:
        path.chmod(0o755)
    width = "-DW=16" if level == "v4" else "-DW=8"
    command = ["bash", "build.sh", "prototype", f"x86-64-{level}", width]
    subprocess.run(command, cwd=work, check=True, env=os.environ | {"PYTHON": sys.executable})
    sys.path.insert(0, str(work / "lib"))
    return importlib.import_module("prototype")


def prototype_run(context: Any, scene: SyntheticScene, upstream: dict[str, torch.Tensor]) -> Stages:
    """One forward and backward pass of the prototype."""
    cameras, K = scene.cameras, scene.cameras.Ks[0]
    image = torch.empty(cameras.height, cameras.width, 3), torch.empty(cameras.height, cameras.width)
    colour = scene.sh0[:, 0].contiguous()
    gaussians = (scene.means, scene.quats, scene.scales, scene.opacities, colour)
    grads = [torch.empty_like(t) for t in gaussians]
    intrinsics = [float(x) for x in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])]
    clock = Clock()
    context.project(*gaussians, cameras.viewmats[0], *intrinsics, cameras.width, cameras.height)
    clock.lap("project")
    context.bin_tilesort(True)
    clock.lap("bin")
    context.forward(*image, tuple(scene.background[0].tolist()))
    clock.lap("forward")
    context.backward_raster(upstream["rgb"][0], upstream["alpha"][0])
    clock.lap("backward")
    context.backward_project(*grads, torch.empty(0, 8))
    clock.lap("project backward")
    return clock.stages


def measure(contenders: dict[str, Callable[[], Stages]], runs: int) -> dict[str, list[Stages]]:
    """Alternate the contenders; the first two rounds warm up."""
    rows: dict[str, list[Stages]] = {name: [] for name in contenders}
    for round_ in range(runs + 2):
        for name, run in contenders.items():
            stages = run()
            if round_ >= 2:
                rows[name].append(stages)
    return rows


def report(size: str, rows: dict[str, list[Stages]]) -> dict[str, Any]:
    """Print the table of medians and return it."""
    totals = {name: [sum(stages.values()) for stages in runs] for name, runs in rows.items()}
    result: dict[str, Any] = {}
    for name, runs in rows.items():
        medians = {stage: statistics.median(r[stage] for r in runs) for stage in runs[0]}
        medians["total"] = statistics.median(totals[name])
        if "prototype" in totals:
            medians["ratio"] = statistics.median(a / b for a, b in zip(totals[name], totals["prototype"], strict=True))
        result[name] = {stage: round(value, 3) for stage, value in medians.items()}
        print(f"{size:5s} {name:10s} " + "  ".join(f"{stage} {value:.2f}" for stage, value in medians.items()))
    return result


def main() -> None:
    """Run the benchmark."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototype", type=Path, default=shared / "prototypes" / "cpu_raster")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if kernels is None:
        raise SystemExit(f"error: {description}")
    kernels.set_num_threads(options.threads)
    context = None
    if (options.prototype / "build.sh").exists():
        context = build_prototype(options.prototype.resolve(), description.rsplit("-", 1)[-1]).Ctx()
        context.set_threads(options.threads)
    else:
        print(f"no prototype at {options.prototype}: ours alone")
    results: dict[str, Any] = {"kernels": description, "threads": options.threads, "machine": platform.processor()}
    for size in options.sizes:
        count, width, height = SIZES[size]
        scene = make_scene(count, width, height)
        generator = torch.Generator().manual_seed(1)
        shape = (1, height, width)
        upstream = {
            k: torch.randn(*shape, *dims, generator=generator)
            for k, dims in (("rgb", (3,)), ("alpha", ()), ("depth", ()))
        }
        contenders = {name: partial(our_run, scene, upstream, full) for name, full in (("lean", False), ("full", True))}
        if context is not None:
            contenders = {"prototype": partial(prototype_run, context, scene, upstream)} | contenders
        results[size] = report(size, measure(contenders, options.runs))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
