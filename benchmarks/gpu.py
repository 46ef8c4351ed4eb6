"""The rasterizer on a GPU, beside gsplat where it is installed; with --fields, a field's step; with --train, whole trainings on it.

    python benchmarks/gpu.py [--sizes 100k 1M 5M] [--images 1280x720 1920x1080] [--runs 21] [--out results/gpu.json]
    python benchmarks/gpu.py --fields [--rays 8192 65536] [--runs 21] [--out results/gpu_fields.json]
    python benchmarks/gpu.py --train [--data FOLDER] [--steps 7000 30000] [--out results/gpu_train.json]

Ours and gsplat alternate, run by run, with the same Gaussians, camera and gradients of the picture; the ratio is the median
of the runs' ratios. Times are between CUDA events, the device idle before each run, so that what the host takes to start the
kernels counts. `plain` gives colour and alpha; `absgrad` also the absolute gradients, as training asks for. The table of
stages puts our kernels beside the card: the least bytes that a stage must read and write (each input and output once, each
list entry's primitive once a tile), and the operations of the formulas for each pixel and list entry that it walks (blocks of
pixels that a primitive misses are walked, too, on paper). --device cpu runs the same on the CPU, --tiny a scene for tests.
--fields takes a training step of a hash field of the usual sizes, whose rays cross a hollow ball: samples, encoding, networks,
compositing, and all gradients. Beside it the same field with nerfacc for the samples, with tiny-cuda-nn for grid and networks (in
half precision), and with both, where these are installed; compositing and the pass that leaves out hidden samples are ours in all.
FOLDER holds the captures; by default $PRISMFIELD_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import quality
import torch
from raster import Clock, our_run
from scenes import SyntheticScene, make_scene

from prismfield.render import kernels
from prismfield.render.cameras import Cameras
from prismfield.render.ops import bin as bin_op
from prismfield.render.ops import composite as composite_op
from prismfield.render.ops import project as project_op
from prismfield.render.rasterize import rasterize_gaussians
from prismfield.representations.config import FieldConfig
from prismfield.representations.fields import HashField
from prismfield.train.cli import choose_device, use_backend

SIZES = {"tiny": 2000, "100k": 100_000, "1M": 1_000_000, "5M": 5_000_000}
MODES: dict[str, tuple[str, ...]] = {"plain": (), "absgrad": ("absgrad",)}
TRAININGS = {
    "garden": "--scene garden",
    "lego": "--scene DATA/lego",
    "fox": "--scene DATA/fox",
    "bonsai": "--scene DATA/bonsai",
    "dtu_scan65": "--scene DATA/dtu_scan65 --downscale 2 --data.cut-out --data.random-background",
}
"""Name to the options of render-train."""
CARDS = {"H200": (4.8e12, 67e12), "H100": (3.35e12, 67e12), "A100": (2.0e12, 19.5e12)}
"""Part of the name to bytes/s and float32 FLOP/s without tensor cores, of the makers' data sheets (SXM, 80 GB or more)."""
FIELDS: dict[str, dict[str, str]] = {
    "prismfield": {},
    "nerfacc": {"sampler": "nerfacc"},
    "tinycudann": {"networks": "tinycudann"},
    "nerfacc + tinycudann": {"sampler": "nerfacc", "networks": "tinycudann"},
}
"""Contenders to the options of `FieldConfig`."""
WARM_UP = 3
FLOPS = {"forward": 20, "backward": 45}
"""Of one walked pair of pixel and list entry: exponent 10, exp 1, blending three channels 9; backward, the alpha again 11,
colours 6, alpha's gradient 10, the parameters' 10 and sums over pixels 8."""


class EventClock:
    """`raster.Clock` by CUDA events."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, torch.cuda.Event]] = []
        torch.cuda.synchronize()
        self._mark("")

    def lap(self, stage: str) -> None:
        self._mark(stage)

    def _mark(self, stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.laps.append((stage, event))

    @property
    def stages(self) -> dict[str, float]:
        torch.cuda.synchronize()
        pairs = zip(self.laps, self.laps[1:], strict=False)
        return {stage: before.elapsed_time(after) for (_, before), (stage, after) in pairs}


Measured = dict[str, float]


def on_device(scene: SyntheticScene, device: torch.device) -> SyntheticScene:
    """The scene on `device`; its Gaussians collect gradients."""
    moved = {part.name: getattr(scene, part.name).to(device) for part in fields(scene)}
    for name in ("means", "quats", "scales", "opacities", "sh0", "shN"):
        moved[name].requires_grad_()
    return SyntheticScene(**moved)


def ours(scene: SyntheticScene, upstream: dict[str, torch.Tensor], extras: tuple[str, ...], clock: Any) -> Measured:
    """Forward and backward as a user's program runs them."""
    gaussians = (scene.means, scene.quats, scene.scales, scene.opacities, (scene.sh0, scene.shN))
    forget(scene)
    timer = clock()
    out = rasterize_gaussians(*gaussians, scene.cameras, scene.background, sh_degree=3, extras=extras)
    timer.lap("forward")
    torch.autograd.backward([out.rgb, out.alpha], [upstream["rgb"], upstream["alpha"]])
    timer.lap("backward")
    return timer.stages


def gsplats(scene: SyntheticScene, upstream: dict[str, torch.Tensor], extras: tuple[str, ...], clock: Any) -> Measured:
    """The same by gsplat, which takes the harmonics in one tensor."""
    from gsplat import rasterization

    cameras = scene.cameras
    gaussians = (scene.means, scene.quats, scene.scales, scene.opacities)
    forget(scene)
    sh = torch.cat([scene.sh0, scene.shN], 1).detach().requires_grad_()
    timer = clock()
    options: dict[str, Any] = {"sh_degree": 3, "packed": False, "absgrad": "absgrad" in extras}
    camera = (cameras.viewmats, cameras.Ks, cameras.width, cameras.height)
    rgb, alpha, _ = rasterization(*gaussians, sh, *camera, backgrounds=scene.background, **options)
    timer.lap("forward")
    torch.autograd.backward([rgb, alpha], [upstream["rgb"], upstream["alpha"][..., None]])
    timer.lap("backward")
    return timer.stages


def reference(
    scene: SyntheticScene, upstream: dict[str, torch.Tensor], extras: tuple[str, ...], clock: Any
) -> Measured:
    """The same in plain PyTorch."""
    kernels.enabled = False
    try:
        return ours(scene, upstream, extras, clock)
    finally:
        kernels.enabled = True


def forget(scene: SyntheticScene) -> None:
    for part in fields(scene):
        if isinstance(value := getattr(scene, part.name), torch.Tensor):
            value.grad = None


def alternate(contenders: dict[str, Callable[[], Measured]], runs: int, device: torch.device) -> dict[str, Any]:
    """Median milliseconds of each contender, the median ratio to ours, and the most memory that it had."""
    rows: dict[str, list[Measured]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for number in range(runs + WARM_UP):
        for name, run in contenders.items():
            if name == "reference" and number >= 2:
                continue  # once to warm up, once to count
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            stages = run()
            if number >= WARM_UP or (name == "reference" and number == 1):
                rows[name].append(stages | {"total": sum(stages.values())})
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**20
    result: dict[str, Any] = {}
    for name, measured in rows.items():
        result[name] = {stage: round(statistics.median(m[stage] for m in measured), 4) for stage in measured[0]}
        if name not in ("prismfield", "reference"):
            pairs = zip(measured, rows["prismfield"], strict=True)
            result[name]["total_over_ours"] = round(statistics.median(a["total"] / b["total"] for a, b in pairs), 3)
        if name in memory:
            result[name]["peak_mib"] = round(memory[name])
    return result


@torch.no_grad()
def count_work(scene: SyntheticScene) -> dict[str, int]:
    """How many primitives, drawn ones, list entries, pixels, and pairs of pixel and list entry that are walked."""
    cameras = scene.cameras
    size = (cameras.width, cameras.height)
    gaussians = (scene.means, scene.quats, scene.scales, scene.opacities)
    params, depths, radii = project_op.project(*gaussians, cameras.viewmats, cameras.Ks, size)
    isects = bin_op.bin_primitives("gaussian", params, depths, radii, size)
    lists = (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts, *size, isects.tile_size)
    colours, nothing = params[..., :3].contiguous(), params.new_zeros(0)
    primitives = ("gaussian", params, colours, depths, scene.background, nothing)
    stops = composite_op._composite(*primitives, *lists, False, False)[5]
    return {
        "primitives": depths.numel(),
        "drawn": int((radii[..., 0] > 0).sum()),
        "entries": len(isects.ids),
        "pixels": size[0] * size[1],
        "pairs": int(stops.long().sum()),
    }


def stage_work(work: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Least bytes and operations of each stage of `raster.our_run` for colour and alpha."""
    every, drawn, entries, pixels = (work[name] for name in ("primitives", "drawn", "entries", "pixels"))
    gaussian, screen, harmonics = 4 * 11, 4 * 9, 4 * 48
    fetched = entries * 4 * (1 + 6 + 3)  # its number, parameters and colour
    records = entries * 4 * 12  # written by tile, read again by primitive
    return {
        "project": (every * (gaussian + screen), every * 200),
        "sh": (every * (8 + 12) + drawn * (harmonics + 12), drawn * 150),
        "bin": (every * screen + entries * 8, 0),
        "forward": (fetched + pixels * 4 * (4 + 2), work["pairs"] * FLOPS["forward"]),
        "backward": (
            fetched + entries * 12 + 2 * records + every * 36 + pixels * 24,
            work["pairs"] * FLOPS["backward"],
        ),
        "sh backward": (every * (12 + 12 + 12 + harmonics) + drawn * harmonics, drawn * 250),
        "project backward": (every * (2 * gaussian + screen), every * 400),
    }


def stage_table(scene: SyntheticScene, upstream: dict[str, torch.Tensor], runs: int, clock: Any, card: str) -> Any:
    """Median milliseconds of our stages, bytes/s and FLOP/s, and their shares of the card's where that is known."""
    work = count_work(scene)
    peak = next((peaks for name, peaks in CARDS.items() if name in card), None)
    with torch.no_grad():
        measured = [our_run(scene, upstream, False, clock()) for _ in range(runs + WARM_UP)][WARM_UP:]
    table: dict[str, Any] = {"work": work}
    for stage, (moved, operations) in stage_work(work).items():
        seconds = statistics.median(run[stage] for run in measured) / 1e3
        row = {"ms": 1e3 * seconds, "gigabytes_per_s": moved / seconds / 1e9, "gflops": operations / seconds / 1e9}
        if peak is not None:
            row |= {"of_bandwidth": moved / seconds / peak[0], "of_flops": operations / seconds / peak[1]}
        table[stage] = {name: round(value, 4) for name, value in row.items()}
    return table


def measure(size: str, image: str, options: argparse.Namespace, device: torch.device, card: str) -> dict[str, Any]:
    """One scene: all contenders in each mode, and our stages."""
    width, height = (int(side) for side in image.split("x"))
    scene = on_device(make_scene(SIZES[size], width, height), device)
    generator = torch.Generator().manual_seed(1)
    shapes = {"rgb": (1, height, width, 3), "alpha": (1, height, width)}
    upstream = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    clock = EventClock if device.type == "cuda" else Clock
    contenders = {"prismfield": ours}
    if has_gsplat(device):
        contenders["gsplat"] = gsplats
    if options.reference:
        contenders["reference"] = reference
    result: dict[str, Any] = {}
    for mode, extras in MODES.items():
        runs = {name: partial(run, scene, upstream, extras, clock) for name, run in contenders.items()}
        result[mode] = alternate(runs, options.runs, device)
        for name, values in result[mode].items():
            text = "  ".join(f"{key} {value}" for key, value in values.items())
            print(f"{size:5s} {image:10s} {mode:8s} {name:10s} {text}", flush=True)
    lean = SyntheticScene(*(v.detach() if isinstance(v, torch.Tensor) else v for v in vars(scene).values()))
    result["stages"] = stage_table(lean, upstream, options.runs, clock, card)
    for stage, row in result["stages"].items():
        print(f"    {stage:17s} " + "  ".join(f"{key} {value:,}" for key, value in row.items()), flush=True)
    return result


def make_field(tiny: bool, options: dict[str, str], device: torch.device) -> HashField:
    """A field that has learned nothing, in which a hollow ball is occupied."""
    small: dict[str, Any] = {"levels": 4, "log2_rows": 8, "finest": 64, "occupancy": 16, "steps": 32} if tiny else {}
    torch.manual_seed(0)
    box = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    field = HashField(box, False, FieldConfig(**small, **options)).to(device)  # type: ignore[arg-type]
    distance = field.grid.centers().norm(dim=-1)
    field.grid.set_occupied((distance > 0.5) & (distance < 0.7))
    return field


def field_step(
    field: HashField, cameras: Cameras, pixels: torch.Tensor, upstream: torch.Tensor, clock: Any
) -> Measured:
    """Forward and backward as a step of training runs them."""
    field.zero_grad(set_to_none=True)
    timer = clock()
    out = field.render(cameras, pixels)
    timer.lap("forward")
    torch.autograd.backward([out.rgb], [upstream])
    timer.lap("backward")
    return timer.stages


def measure_fields(rays: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A training step of all contenders that can run here."""
    cameras = make_scene(SIZES["tiny"], 640, 480).cameras
    back = torch.eye(4)
    back[2, 3] = 2.5  # from the middle of the ball
    cameras = replace(cameras, viewmats=back[None]).to(device)
    generator = torch.Generator().manual_seed(1)
    columns, rows = (torch.randint(size, (rays,), generator=generator) for size in (640, 480))
    pixels = torch.stack([torch.zeros_like(rows), columns, rows], -1).to(device)
    upstream = torch.randn(rays, 3, generator=generator).to(device)
    clock = EventClock if device.type == "cuda" else Clock
    contenders, samples = {}, {}
    for name, words in FIELDS.items():
        try:
            field = make_field(options.tiny, words, device)
            samples[name] = field.render(cameras, pixels).samples
        except ValueError as error:
            print(f"without {name}: {error}", file=sys.stderr)
            continue
        contenders[name] = partial(field_step, field, cameras, pixels, upstream, clock)
    result = alternate(contenders, options.runs, device)
    for name, row in result.items():
        row |= {"samples": samples[name], "msamples_per_s": round(samples[name] / row["total"] / 1e3, 3)}
        text = "  ".join(f"{key} {value}" for key, value in row.items())
        print(f"{rays} rays {name:20s} {text}", flush=True)
    return result


def has_gsplat(device: torch.device) -> bool:
    """Whether gsplat can run here."""
    if device.type != "cuda":
        return False
    try:
        use_backend("gsplat", device)
    except ValueError as error:
        print(f"without gsplat: {error}", file=sys.stderr)
        return False
    finally:
        use_backend("auto", device)
    return True


def machine(device: torch.device, computed_by: str) -> dict[str, Any]:
    """What the numbers were measured on, its clocks included."""
    names = ("torch", "triton", "gsplat", "nerfacc", "tinycudann", "prismfield")
    versions = {name: _version(name) for name in names} | {"python": platform.python_version()}
    described = {
        "computed_by": computed_by,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
    if device.type == "cuda":
        described["cuda"] = torch.version.cuda or torch.version.hip
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        try:
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            described["nvidia_smi"] = f"{query}: {subprocess.check_output(command, text=True).strip()}"
        except (OSError, subprocess.CalledProcessError):
            described["nvidia_smi"] = "not at hand"
    return described


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def train_all(options: argparse.Namespace, device: torch.device, save: Callable[[dict[str, Any]], None]) -> None:
    """Each scene to each number of steps through the command that a user types."""
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.only:
            for steps in options.steps:
                tiny = " --downscale 8" if options.tiny else f" --max-primitives {options.max_primitives}"
                words = f"{TRAININGS[name]}{tiny} --device {device.type} --steps {steps}"
                run = quality.train(words, options.data.resolve(), Path(temporary) / f"{name}_{steps}")
                table[f"{name}_{steps}"] = run | {"minutes": round(run["seconds"] / 60, 3)}
                print(
                    f"{name} {steps}: {run['psnr']} dB, {run['seconds']} s, {run['primitives']} primitives", flush=True
                )
                save(table)


def parse() -> argparse.Namespace:
    """The options."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small scene, or short trainings of the bundled one")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["100k", "1M", "5M"])
    parser.add_argument("--images", nargs="+", default=["1280x720", "1920x1080"], metavar="WIDTHxHEIGHT")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--reference", action="store_true", help="plain PyTorch, too: minutes a run")
    parser.add_argument("--fields", action="store_true", help="a field's training step instead of the rasterizer")
    parser.add_argument("--rays", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--train", action="store_true", help="whole trainings instead of the rasterizer")
    parser.add_argument("--only", nargs="+", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--steps", nargs="+", type=int, default=[7000, 30000])
    parser.add_argument("--max-primitives", type=int, default=1_000_000)
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.images, options.runs = ["tiny"], ["97x63"], min(options.runs, 3)
        options.rays = [64]
        options.only, options.steps = ["garden"], [min(step, 20) for step in options.steps[:1]]
    return options


def main() -> None:
    """Run the benchmark."""
    options = parse()
    try:
        device = choose_device(options.device)
        computed_by = use_backend("auto", device, options.device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if device.type == "cuda" and kernels.gpu_kernels()[0] is None:
        raise SystemExit(f"error: {computed_by}")
    results: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M"), "machine": machine(device, computed_by)}

    def save(part: dict[str, Any]) -> None:
        results.update(part)
        results["machine_after"] = machine(device, computed_by)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")

    print(json.dumps(results["machine"]))
    if options.train:
        train_all(options, device, save)
        return
    if options.fields:
        for rays in options.rays:
            save({f"{rays}_rays": measure_fields(rays, options, device)})
        return
    for size in options.sizes:
        for image in options.images:
            save({f"{size}_{image}": measure(size, image, options, device, computed_by)})


if __name__ == "__main__":
    main()
