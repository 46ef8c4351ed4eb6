"""render-compress: Gaussians or a radiance field in a small file, with the loss measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from tyro.conf import Positional, arg

from prismfield.cli import run_cli

if TYPE_CHECKING:
    from rich.console import Console

    from prismfield.export.assets import SplatAsset
    from prismfield.export.compression.compress import Compressor, Likeness, Result


@dataclass(frozen=True)
class CompressConfig:
    """Write Gaussians or a radiance field to a small file, draw what is read back, and say what was lost."""

    scene: Positional[Path]
    """A run's folder, or a file of splats or of a field."""
    to: Path
    """The file, replaced if it is there; .pfz."""
    target_mb: float | None = None
    """Make it at most so large, in millions of bytes, and as like the original as can be."""
    target_psnr: float | None = None
    """Make it as small as can be, with at least so many decibels PSNR to the original's pictures."""
    steps: float = 1.0
    """Without a target: round everything to steps so many times as coarse as usual."""
    prune: float = 0.0
    """Without a target: leave out this share of the Gaussians, the least important ones; 0 to below 1."""
    finetune_steps: int = 0
    """Of a run of a field: train what the file will hold for so many steps on the photographs."""
    bits: Literal[4, 6, 8] | None = None
    """Of a field, without a target: so many for each number of its tables, the same in all levels, instead of by what each matters."""
    drop: bool = True
    """Of a field: write what is cheapest for numbers on which no picture depends."""
    sh_degree: int = 3
    """Harmonics of at most this degree, 0 to 3."""
    sweep: Path | None = None
    """Draw likeness over size, of many files that could be written, to this picture (.png or .jpg)."""
    json: Path | None = None
    """Write the numbers to this file too."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


def main() -> NoReturn:
    """The command `render-compress`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    compress(tyro.cli(Annotated[CompressConfig, arg(name="")], prog="render-compress"))


def compress(config: CompressConfig) -> dict[str, Any]:
    """Find the file that suits the targets, write it, and print how it compares.

    Returns:
        The numbers, as in the JSON file.

    Raises:
        FileNotFoundError: the scene is not there.
        ValueError: an option cannot be, the scene is not made of Gaussians, or a target is out of reach.
        OSError: a file could not be written, or came back different.
    """
    _check(config)
    import json

    from rich.console import Console

    from prismfield.export.assets import SplatAsset
    from prismfield.export.compression.compress import Compressor, Likeness, contributions, cut_harmonics, drawable
    from prismfield.export.compression.field_cli import compress_field
    from prismfield.export.compression.pfz_write import PfzSteps, write_encoded
    from prismfield.export.library import load
    from prismfield.export.ply import ply_bytes
    from prismfield.representations.fields import Field
    from prismfield.train.cli import use_threads
    from prismfield.train.folder import write_text

    use_threads(config.threads)
    scene = load(config.scene, step=config.step)
    if isinstance(scene.representation, Field):
        return compress_field(config, scene)
    if config.bits is not None or not config.drop or config.finetune_steps:
        raise ValueError(
            f"--bits, --no-drop, --finetune-steps: {config.scene} is no field; Gaussians have --steps and --prune"
        )
    original = scene.asset()
    if not isinstance(original, SplatAsset):
        raise ValueError(f"{config.scene}: is made of {original.noun}; render-compress takes Gaussians and fields")
    if len(original) == 0:
        raise ValueError(f"{config.scene}: there is nothing to write, the scene has no Gaussians")
    console = Console(highlight=False, soft_wrap=True)
    likeness = Likeness(scene)
    asset = cut_harmonics(drawable(original), config.sh_degree)
    compressor = Compressor(asset, contributions(scene, asset), likeness, PfzSteps())
    if config.sweep is not None:
        sweep(config.sweep, compressor, ply_bytes(original), console)
    found = find(config, compressor, console)
    write_encoded(config.to, found.data)
    numbers = _numbers(found, original, likeness)
    _print(console, config.to, numbers)
    if config.json is not None:
        write_text(config.json, json.dumps(numbers, indent=1) + "\n")
    return numbers


def _check(config: CompressConfig) -> None:
    if config.to.suffix.lower() != ".pfz":
        raise ValueError(
            f"--to {config.to}: unknown suffix {config.to.suffix!r}; expected .pfz (render-export writes others)"
        )
    if config.to.is_dir():
        raise IsADirectoryError(f"--to {config.to}: is a folder")
    if config.target_mb is not None and config.target_psnr is not None:
        raise ValueError("--target-mb and --target-psnr: expected one of them, got both")
    if config.bits is not None and (config.target_mb is not None or config.target_psnr is not None):
        raise ValueError("--bits: expected no target beside it, which chooses the bits itself")
    positive = {"target-mb": config.target_mb, "target-psnr": config.target_psnr, "steps": config.steps}
    for name, value in positive.items():
        if value is not None and not 0 < value < 1e9:
            raise ValueError(f"--{name}: expected more than 0, got {value:g}")
    if config.finetune_steps < 0:
        raise ValueError(f"--finetune-steps: expected 0 or more, got {config.finetune_steps}")
    if not 0 <= config.prune < 1:
        raise ValueError(f"--prune: expected 0 to below 1, got {config.prune:g}")
    if not 0 <= config.sh_degree <= 3:
        raise ValueError(f"--sh-degree: expected 0 to 3, got {config.sh_degree}")
    if config.sweep is not None:
        from prismfield.train.contact_sheet import check_picture

        check_picture(config.sweep)


def find(config: CompressConfig, compressor: Compressor, console: Console) -> Result:
    """The file that suits the targets."""

    def tell(result: Result) -> None:
        words = f"{len(result.data) / 1e6:.3f} MB, {result.psnr:.2f} dB"
        pruned = "tried" if compressor.shares == (0.0,) else f"{result.pruned:.0%} pruned"
        console.print(f"{pruned}: {words}", markup=False)

    if config.target_mb is not None:
        return compressor.to_size(int(config.target_mb * 1e6), tell)
    if config.target_psnr is not None:
        return compressor.to_psnr(config.target_psnr, tell)
    return compressor.result(config.steps, config.prune)


def sweep(path: Path, compressor: Compressor, whole: int, console: Console) -> None:
    """Try many files, print how they compare, and draw the curves; `whole`: bytes of what they are made from."""
    import torch

    from prismfield.export.compression.chart import Curve, draw_chart
    from prismfield.train.evaluate import write_image

    points: dict[float, list[tuple[float, float]]] = {}
    for result in compressor.sweep():
        size = len(result.data)
        points.setdefault(result.pruned, []).append((size / 1e6, result.psnr))
        words = f"{size / 1e6:8.3f} MB  {whole / size:5.1f} times smaller  {result.psnr:6.2f} dB"
        pruned = "" if compressor.shares == (0.0,) else f"{result.pruned:4.0%} pruned  "
        console.print(pruned + words, markup=False)
    everything = "the whole field" if compressor.shares == (0.0,) else "all Gaussians"
    curves = [Curve(everything if share == 0 else f"{share:.0%} pruned", each) for share, each in points.items()]
    chart = draw_chart(curves, "MB", "dB PSNR to the original", compressor.likeness.scene.name)
    write_image(path, torch.from_numpy(chart))
    console.print(f"{path}: likeness over size", markup=False)


def _numbers(found: Result, original: SplatAsset, likeness: Likeness) -> dict[str, Any]:
    from prismfield.export.compression.compress import ratio
    from prismfield.export.ply import ply_bytes
    from prismfield.train.report import peak_memory

    before, after = likeness.to_photographs(), likeness.to_photographs(found.asset)
    return {
        "gaussians": len(original),
        "gaussians_kept": len(found.asset),
        "sh_degree": found.asset.sh_degree,
        "bytes": len(found.data),
        "bytes_ply": ply_bytes(original),
        "ratio": ratio(original, len(found.data)),
        "bits_each": 8 * len(found.data) / len(found.asset),
        "psnr": found.psnr,
        "ssim": found.ssim,
        "measured": likeness.about,
        **({"photographs_before": before, "photographs_after": after} if before and after else {}),
        "encode_seconds": found.encode_seconds,
        "decode_seconds": found.decode_seconds,
        "peak_memory_mib": peak_memory() / 2**20,
        "pruned": found.pruned,
        "steps": vars(found.steps),
    }


def _print(console: Console, path: Path, numbers: dict[str, Any]) -> None:
    kept = f"{numbers['gaussians_kept']:,} of {numbers['gaussians']:,} Gaussians of degree {numbers['sh_degree']}"
    lines = [
        f"{path}: {kept}, {numbers['bytes']:,} bytes ({numbers['bits_each']:.1f} bits each)",
        f"size          {numbers['ratio']:.1f} times smaller than the .ply of {numbers['bytes_ply']:,} bytes",
        f"to original   {numbers['psnr']:.2f} dB PSNR, {numbers['ssim']:.4f} SSIM, {numbers['measured']}",
    ]
    print_comparison(console, numbers, lines)


def print_comparison(console: Console, numbers: dict[str, Any], lines: list[str]) -> None:
    """Print `lines`, then how the file compares to the photographs, and what it took."""
    if "photographs_before" in numbers:
        before, after = numbers["photographs_before"], numbers["photographs_after"]
        change = f"{after['psnr'] - before['psnr']:+.2f} dB, {after['ssim'] - before['ssim']:+.4f}"
        lines.append(
            f"to photos     {after['psnr']:.2f} dB PSNR, {after['ssim']:.4f} SSIM ({change} to the original's)"
        )
    times = f"encoded in {numbers['encode_seconds']:.2f} s, decoded in {numbers['decode_seconds']:.2f} s"
    lines.append(f"time          {times}, peak memory {numbers['peak_memory_mib']:.0f} MiB")
    for line in lines:
        console.print(line, markup=False)


if __name__ == "__main__":
    main()
