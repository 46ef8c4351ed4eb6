"""Measure a scene against images it was not trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import torch
from torch import Tensor

from prismfield.datasets.views import Views
from prismfield.render.ops.ssim import photometric_loss
from prismfield.representations.base import Representation
from prismfield.train.batches import make_batch


@dataclass(frozen=True)
class ViewResult:
    """One test view: how well it was rendered, and the pictures."""

    name: str
    psnr: float
    """Decibels, over the pixels that count."""
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
        truth = batch.rgb.float() / 255 if batch.rgb.dtype == torch.uint8 else batch.rgb
        ssim = float(photometric_loss(rgb, truth, 1.0, batch.mask)[2])
        mask = None if batch.mask is None else batch.mask[0]
        name = views.frame(index).name
        yield ViewResult(name, psnr(rgb, truth, batch.mask), ssim, seconds, rgb[0], truth[0], mask)


def psnr(rgb: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in decibels of images in 0..1 [..., 3], over the pixels of `mask` [...]."""
    errors = (rgb - truth).square()
    if mask is not None:
        errors = errors[mask]
    return float(-10 * errors.mean().clamp(min=1e-10).log10())


def save_side_by_side(result: ViewResult, folder: Path) -> Path:
    """Write `folder`/NAME.png: render on the left, photograph on the right."""
    path = folder / f"{Path(result.name).with_suffix('').as_posix().replace('/', '_')}.png"
    write_image(path, torch.cat([result.rgb, result.truth], 1))
    return path


def write_image(path: Path, rgb: Tensor) -> None:
    """Write [H, W, 3] in 0..1 as the format of the file name, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    options = {"quality": 92} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    imageio.imwrite(part, (rgb.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), **options)
    part.replace(path)


def mean(results: Iterable[ViewResult], value: Callable[[ViewResult], float]) -> float:
    """Mean over the views; NaN if there are none."""
    values = [value(result) for result in results]
    return sum(values) / len(values) if values else float("nan")
