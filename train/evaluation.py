"""A run measured after its training: the numbers, the table, the JSON file and the contact sheet of `render-eval`."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from prismfield.datasets.views import Views
from prismfield.render.cameras import Cameras
from prismfield.representations.base import Representation, size_of
from prismfield.train.cli import choose_device, show_log, use_backend, use_threads
from prismfield.train.contact_sheet import Row, check_picture, contact_sheet, make_row
from prismfield.train.eval_cli import EvalConfig
from prismfield.train.evaluate import ViewResult, evaluate_views, write_image
from prismfield.train.folder import write_text
from prismfield.train.lpips import Lpips, Network, load_lpips
from prismfield.train.metrics import flip_map
from prismfield.train.report import image_sizes
from prismfield.train.run import Run, load_run

SHEET = "eval.jpg"
_SHEET_ROWS = 40
_TIMED_VIEWS, _TIMED_ROUNDS = 16, 3
_FORMATS = {"psnr": ".2f", "ssim": ".4f", "flip": ".4f", "lpips_alex": ".4f", "lpips_vgg": ".4f"}


@dataclass
class Evaluation:
    """The views of a run, measured."""

    per_image: list[dict[str, Any]] = field(default_factory=list)
    """`name` and each score."""
    rows: list[Row] = field(default_factory=list)
    """Of the contact sheet."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def scores(self) -> list[str]:
        """Names of the scores that were measured."""
        return [name for name in self.per_image[0] if name != "name"] if self.per_image else []

    def mean(self, score: str) -> float | None:
        """Over the views in which any pixel counts; None if there is none."""
        values = [view[score] for view in self.per_image if view[score] is not None]
        return sum(values) / len(values) if values else None


def evaluate_run(config: EvalConfig) -> dict[str, Any]:
    """Measure a run as `render-eval` does: print the table, write the files.

    Returns:
        What the JSON file holds.

    Raises:
        FileNotFoundError: the run or its capture is not there.
        ValueError: the run's files are damaged, or it has no such views.
        OSError: a file cannot be written.
    """
    show_log()
    sheet = config.run / SHEET if config.sheet is None else config.sheet
    check_picture(sheet)
    for path in (config.json, config.sheet):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder it should go to does not exist")
    if config.downscale is not None and config.downscale < 1:
        raise ValueError(f"--downscale: expected at least 1, got {config.downscale}")
    device = choose_device(config.device)
    use_threads(config.threads)
    kernels = use_backend("auto", device, config.device)
    run = load_run(config.run, device=device, step=config.step)
    views = _views(run, config)
    use_masks = config.masks and run.config.data.masks
    evaluation = measure(run, views, use_masks=use_masks, device=device)
    seconds = frame_seconds(run.scene, [views.camera(i) for i in range(len(views))], run.background, device)
    numbers: dict[str, Any] = {
        **{name: evaluation.mean(name) for name in evaluation.scores if not name.startswith("lpips_")},
        f"num_{size_of(run.scene)[0]}": size_of(run.scene)[1],
        "bytes": exported_bytes(run),
        "fps": 1 / seconds,
        "frame_seconds": seconds,
        "seconds_trained": run.seconds,
        "steps": run.step,
        "protocol": protocol(run, views, config.split, use_masks=use_masks),
        "kernels": kernels,
        "per_image": evaluation.per_image,
    }
    if lpips := {n.removeprefix("lpips_"): evaluation.mean(n) for n in evaluation.scores if n.startswith("lpips_")}:
        numbers["lpips"] = lpips
    title = f"{run.data.name}, step {run.step}: {_text('psnr', evaluation.mean('psnr'))} dB"
    write_image(sheet, contact_sheet(evaluation.rows, title))
    if config.json is not None:
        write_text(config.json, json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    _print(evaluation, numbers, [str(sheet), *([] if config.json is None else [str(config.json)])])
    return numbers


def _views(run: Run, config: EvalConfig) -> Views:
    frames = getattr(run.data, config.split)
    if not frames:
        other = "test" if config.split == "train" else "train"
        raise ValueError(f"{config.run}: the run has no {config.split} views; --split {other} takes the others")
    downscale = run.config.downscale if config.downscale is None else config.downscale
    budget = run.config.data.cache_mb << 20
    return Views(frames, downscale=downscale, byte_budget=budget // 8, scale=run.frame.scale)


def measure(run: Run, views: Views, *, use_masks: bool, device: torch.device) -> Evaluation:
    """Every score of every view, and the rows of the contact sheet: of evenly chosen views if there are many."""
    evaluation, networks = Evaluation(), []
    for name in get_args(Network):
        network, line = load_lpips(name)
        if network is None:
            evaluation.notes.append(line)
        else:
            networks.append(network)
    shown = {int(i) for i in np.linspace(0, len(views) - 1, min(len(views), _SHEET_ROWS)).round()}
    results = evaluate_views(run.scene, views, run.background, use_masks=use_masks, device=device)
    progress = track(results, "measuring", total=len(views), console=Console(stderr=True), transient=True)
    for index, result in enumerate(progress):
        scores, errors = _scores(result, networks)
        evaluation.per_image.append({"name": result.name, **scores})
        if index in shown:
            words = f"PSNR {_text('psnr', scores['psnr'])}  SSIM {_text('ssim', scores['ssim'])}"
            words += f"  FLIP {_text('flip', scores['flip'])}"
            evaluation.rows.append(make_row(result.name, words, result.rgb, result.truth, errors))
    return evaluation


def _scores(result: ViewResult, networks: list[Lpips]) -> tuple[dict[str, float | None], Tensor]:
    """The scores of one view, None for what no pixel counts in, and its FLIP map [H, W]."""
    rgb, truth, mask = result.rgb, result.truth, result.mask
    if mask is not None:
        rgb = torch.where(mask[..., None], rgb, truth)
    errors = flip_map(rgb[None], truth[None])[0]
    mean_error = errors.mean() if mask is None else errors[mask].mean()
    scores = {"psnr": result.psnr, "ssim": result.ssim, "flip": float(mean_error)}
    for network in networks:
        scores[f"lpips_{network.network}"] = float(network(rgb[None], truth[None]))
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}, errors


@torch.no_grad()
def frame_seconds(scene: Representation, cameras: list[Cameras], background: float, device: torch.device) -> float:
    """Median seconds that a frame takes to render, nothing else: several rounds over evenly chosen views, after one that
    does not count."""
    chosen = cameras[:: max(1, len(cameras) // _TIMED_VIEWS)][:_TIMED_VIEWS]
    behind = torch.full((1, 3), background, device=device)
    seconds = []
    for number in range(1 + _TIMED_ROUNDS):
        for camera in chosen:
            moved = camera.to(device)
            _wait(device)
            began = time.perf_counter()
            scene.render(moved, background=behind)
            _wait(device)
            if number:
                seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def exported_bytes(run: Run) -> int:
    """Size as .ply of what can be written as one, of anything else as it is stored in a checkpoint."""
    from prismfield.export.formats import ASSETS, FORMATS, asset_of  # not at the top: export builds on train

    name = run.config.representation
    if name in ASSETS and (size := FORMATS[name][".ply"].size) is not None:
        return size(asset_of(run.scene, run.frame))
    return sum(tensor.numel() * tensor.element_size() for tensor in run.scene.tensors().values())


def protocol(run: Run, views: Views, split: str, *, use_masks: bool) -> str:
    """What was measured against what, in one line."""
    data, frames = run.data, [views.frame(index) for index in range(len(views))]
    lenses = sorted({frame.camera.model for frame in frames} - {"pinhole"})
    words = [
        f"{len(views)} {split} views (split: {data.split})" + ("" if split == "test" else ", which it was trained on"),
        f"{image_sizes(views)}, {views.source}" + (f", undistorted ({', '.join(lenses)} lens)" if lenses else ""),
        f"{data.background} behind transparent images" if data.background else "opaque images",
    ]
    has_masks = bool(lenses) or any(frame.mask_path is not None for frame in frames)
    if has_masks:
        words.append("masked pixels left out" if use_masks else "masked pixels counted")
    return "; ".join(words)


def _text(name: str, value: float | None) -> str:
    return "-" if value is None else format(value, _FORMATS[name])


def _print(evaluation: Evaluation, numbers: dict[str, Any], written: list[str]) -> None:
    console, names = Console(highlight=False, soft_wrap=True), evaluation.scores
    table = Table(header_style="bold")
    table.add_column("view")
    for name in names:
        table.add_column(name.upper().replace("_", " "), justify="right")
    for view in evaluation.per_image:
        table.add_row(view["name"], *(_text(name, view[name]) for name in names))
    table.add_section()
    table.add_row("mean", *(_text(name, evaluation.mean(name)) for name in names), style="bold")
    console.print(table)
    milliseconds = 1e3 * numbers["frame_seconds"]
    console.print(f"speed       {numbers['fps']:.1f} frames a second (median {milliseconds:.1f} ms, rendering alone)")
    what, form = ("primitives", "as .ply") if "num_primitives" in numbers else ("parameters", "as stored")
    console.print(f"size        {numbers[f'num_{what}']:,} {what}, {numbers['bytes']:,} bytes {form}")
    console.print(f"training    {numbers['steps']} steps in {numbers['seconds_trained']:.1f} s")
    console.print(f"protocol    {numbers['protocol']}")
    console.print(f"computed by {numbers['kernels']}")
    for note in evaluation.notes:
        console.print(note, markup=False)
    console.print(f"written     {', '.join(written)}", markup=False)
