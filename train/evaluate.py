"""Measure a scene against images it was not trained on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from torch import Tensor

from prismfield.datasets.views import Views
from prismfield.representations.base import Representation
from prismfield.train.batches import make_batch
from prismfield.train.folder import write_bytes
from prismfield.train.metrics import psnr, ssim


@dataclass(frozen=True)
class ViewResult:
    """One test view: how well it was rendered, and the pictures."""

    name: str
    psnr: float
    """Decibels, over the pixels that count; NaN, as `ssim`, if none does."""
    ssim: float
    seconds: float
    """Rendering alone."""
    rgb: Tensor
    """[H, W, 3] rendered, clamped to 0..1."""
    truth: Tensor
    """[H, W, 3] in 0..1."""
    mask: Tensor | None
    """[H, W] bool, True where a pixel counts."""


@torch.no_grad()
def evaluate_views(
    scene: Representation,
    views: Views,
    background: float,
    *,
    indices: Iterable[int] | None = None,
    use_masks: bool = True,
    device: torch.device | str = "cpu",
) -> Iterable[ViewResult]:
    """Render the test views one by one and compare.

    Args:
        scene: any representation.
        views: the test views.
        background: value behind the scene, of all three channels.
        indices: which views; default all.
        use_masks: leave masked pixels out.
        device: where the scene is.
    """
    for index in range(len(views)) if indices is None else indices:
        batch = make_batch(views[index], index, torch.full((1, 3), background), use_masks=use_masks)
        began = time.perf_counter()
        rgb = scene.render(batch.cameras.to(device), background=batch.background.to(device)).rgb.cpu().clamp(0, 1)
        seconds = time.perf_counter() - began
        truth = batch.rgb_float
        scores = psnr(rgb, truth, batch.mask), ssim(rgb, truth, batch.mask)
        mask = None if batch.mask is None else batch.mask[0]
        name = views.frame(index).name
        yield ViewResult(name, *scores, seconds, rgb[0], truth[0], mask)


def mean_scores(results: Iterable[ViewResult]) -> dict[str, float]:
    """Mean of each score over the views in which some pixel counts; empty if there are none."""
    counted = [result for result in results if not math.isnan(result.psnr)]
    if not counted:
        return {}
    return {name: sum(getattr(result, name) for result in counted) / len(counted) for name in ("psnr", "ssim")}


def save_side_by_side(result: ViewResult, folder: Path) -> Path:
    """Write `folder`/NAME.png: render on the left, photograph on the right."""
    path = folder / f"{Path(result.name).with_suffix('').as_posix().replace('/', '_')}.png"
    write_image(path, torch.cat([result.rgb, result.truth], 1))
    return path


def write_image(path: Path, rgb: Tensor) -> None:
    """Write [H, W, 3] in 0..1 as the format of the file name, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    is_written, data = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not is_written:
        raise OSError(f"{path}: cannot be encoded")
    write_bytes(path, data.tobytes())
