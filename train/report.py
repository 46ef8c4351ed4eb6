"""The page that a run ends with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from prismfield.datasets.views import Views
from prismfield.train.config import command_line
from prismfield.train.evaluate import ViewResult, mean_scores, write_image
from prismfield.train.folder import REPORT, STRIP, write_text
from prismfield.train.session import Session

_STRIP_VIEWS, _STRIP_WIDTH = 3, 480


def write_report(session: Session, folder: Path, results: list[ViewResult], *, seconds: float, kernels: str) -> None:
    """Write report.md: the test views' numbers, a strip of pictures, and how to get them again.

    Args:
        session: at its end.
        folder: the run's.
        results: of the test views, perhaps none.
        seconds: that this process has taken in all.
        kernels: what computed it, in words.
    """
    clock, config, data = session.clock, session.config, session.data
    lines = [f"# {data.name}: {config.representation}, {config.strategy}, {clock.step} steps", ""]
    if results:
        write_image(folder / STRIP, picture_strip(results))
        lines += [f"![renders beside photographs]({STRIP})", "", "Left: rendered. Right: the photograph.", ""]
    scores = mean_scores(results)
    nothing = "nothing in the test views counts" if results else "no test views"
    numbers = {
        "test PSNR": f"{scores['psnr']:.2f} dB" if scores else nothing,
        "test SSIM": f"{scores['ssim']:.4f}" if scores else nothing,
        "primitives": f"{getattr(session.scene, 'num_primitives', 0):,}",
        "training": f"{clock.step} steps in {clock.seconds:.1f} s, {1e3 * clock.seconds / max(clock.step, 1):.1f} ms a step",
        "in all": f"{seconds:.1f} s with reading, tests, checkpoints and pictures (this process)",
        "peak memory": _memory(session.device),
        "images": f"{len(data.train)} for training, {len(data.test)} for testing ({data.split})",
        "resolution": f"{image_sizes(session.train_views)}; {session.train_views.source}",
        "computed by": kernels,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"prismfield {_version('prismfield')}, Python {platform.python_version()}, PyTorch {torch.__version__}",
    }
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in numbers.items()), ""]
    lines += ["Again:", "", "```", command_line(config), "```", ""]
    if results:
        lines += ["| test view | PSNR | SSIM |", "|---|---|---|"]
        lines += [f"| {r.name} | {r.psnr:.2f} | {r.ssim:.4f} |" for r in results] + [""]
    lines += [f"- {warning}" for warning in data.warnings]
    write_text(folder / REPORT, "\n".join(lines).rstrip() + "\n")


def picture_strip(results: list[ViewResult]) -> Tensor:
    """[H, W, 3] a few views, one below the other: the render and, on its right, the photograph."""
    chosen = results[:: max(1, len(results) // _STRIP_VIEWS)][:_STRIP_VIEWS]
    return torch.cat([_to_width(torch.cat([r.rgb, r.truth], 1), 2 * _STRIP_WIDTH) for r in chosen])


def image_sizes(views: Views) -> str:
    """The size of the images, or how sizes vary."""
    sizes = sorted({views.size(index) for index in range(len(views))})
    first, last = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    return first if len(sizes) == 1 else f"{first} to {last}"


def peak_memory() -> int:
    """Most bytes of memory that the process has held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory(device: torch.device) -> str:
    text = f"{peak_memory() / 2**20:.0f} MiB"
    if device.type == "cuda":
        text += f" and {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    return text


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from a source tree"


def _to_width(image: Tensor, width: int) -> Tensor:
    size = (max(1, round(image.shape[0] * width / image.shape[1])), width)
    planes = image.permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
