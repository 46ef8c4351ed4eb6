"""The page that a run ends with."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

from prismfield.render.kernels import description
from prismfield.train.evaluate import ViewResult, mean, write_image
from prismfield.train.progress import peak_memory
from prismfield.train.run import REPORT, TEST, write_text
from prismfield.train.session import Session

STRIP = "strip.jpg"
_STRIP_VIEWS, _STRIP_HEIGHT = 4, 240


def write_report(session: Session, folder: Path, results: list[ViewResult]) -> None:
    """Write report.md with the numbers of the test views and a strip of pictures, renders above photographs."""
    clock, config, data = session.clock, session.config, session.data
    lines = [f"# {data.name}: {config.representation}, {clock.step} steps", ""]
    if results:
        write_image(folder / TEST / STRIP, picture_strip(results))
        lines += [f"![renders above photographs]({TEST}/{STRIP})", ""]
    numbers = {
        "test PSNR (dB)": f"{mean(results, lambda r: r.psnr):.2f}" if results else "no test views",
        "test SSIM": f"{mean(results, lambda r: r.ssim):.4f}" if results else "no test views",
        "primitives": f"{getattr(session.scene, 'num_primitives', 0):,}",
        "training time": f"{clock.seconds:.1f} s ({1e3 * clock.seconds / max(clock.step, 1):.1f} ms a step)",
        "frames a second": f"{1 / mean(results, lambda r: r.seconds):.1f}" if results else "-",
        "peak memory": f"{peak_memory() / 2**30:.2f} GiB",
        "images": f"{len(data.train)} for training, {len(data.test)} for testing ({data.split})",
        "resolution": " x ".join(str(side) for side in session.train_views.size(0)),
        "kernels": description,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in numbers.items()), ""]
    if results:
        lines += ["| test view | PSNR | SSIM |", "|---|---|---|"]
        lines += [f"| {r.name} | {r.psnr:.2f} | {r.ssim:.4f} |" for r in results] + [""]
    lines += [f"- {warning}" for warning in data.warnings]
    write_text(folder / REPORT, "\n".join(lines) + "\n")


def picture_strip(results: list[ViewResult]) -> Tensor:
    """[H, W, 3] a few views side by side, renders above photographs."""
    chosen = results[:: max(1, len(results) // _STRIP_VIEWS)][:_STRIP_VIEWS]
    return torch.cat([_to_height(torch.cat([r.rgb, r.truth]), 2 * _STRIP_HEIGHT) for r in chosen], 1)


def _to_height(image: Tensor, height: int) -> Tensor:
    size = (height, max(1, round(image.shape[1] * height / image.shape[0])))
    planes = image.permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
