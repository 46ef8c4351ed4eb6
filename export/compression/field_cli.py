"""What render-compress does with a radiance field."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from prismfield.export.compression.cli import CompressConfig, find, print_comparison, sweep, training_bar
from prismfield.export.compression.compress import Likeness, Result
from prismfield.export.compression.field_compress import FieldCompressor, single_bytes
from prismfield.export.compression.field_pfz_write import write_field
from prismfield.export.library import Scene
from prismfield.train.folder import write_text
from prismfield.train.report import peak_memory


def compress_field(config: CompressConfig, scene: Scene) -> dict[str, Any]:
    """Find the file that suits the targets, write it, and print how it compares; see `compress`.

    Returns:
        The numbers, as in the JSON file.

    Raises:
        ValueError: an option is of no use for a field, or a target is out of reach.
        OSError: a file could not be written, or came back different.
    """
    if config.prune or config.sh_degree != CompressConfig.sh_degree:
        raise ValueError(
            f"--prune and --sh-degree: {config.scene} is a field, not Gaussians; it has --bits and --steps"
        )
    console = Console(highlight=False, soft_wrap=True)
    likeness = Likeness(scene)
    compressor = FieldCompressor(likeness, drop=config.drop)
    whole = single_bytes(compressor.original)
    if config.sweep is not None:
        sweep(config.sweep, compressor, whole, console)
    found = find(config, compressor, console) if config.bits is None else compressor.result_of_bits(config.bits)
    untrained = None
    if config.finetune_steps:
        untrained, found = found, _finetuned(config.finetune_steps, compressor, found)
    write_field(config.to, found.data)
    numbers = _numbers(found, compressor, whole, untrained)
    kept = f"{len(found.asset):,} numbers of a field ({found.asset.representation})"
    lines = [
        f"{config.to}: {kept}, {numbers['bytes']:,} bytes ({numbers['bits_each']:.2f} bits each)",
        f"size          {numbers['ratio']:.1f} times smaller than the numbers in single precision, {whole:,} bytes",
        f"to original   {numbers['psnr']:.2f} dB PSNR, {numbers['ssim']:.4f} SSIM, {numbers['measured']}",
    ]
    if untrained is not None:
        words = f"{len(untrained.data):,} bytes, {untrained.psnr:.2f} dB PSNR to original"
        if lost := numbers["untrained"].get("photographs_after"):
            words += f", {lost['psnr'] - numbers['photographs_before']['psnr']:+.2f} dB to photos"
        lines.append(f"untrained     {words}")
    print_comparison(console, numbers, lines)
    if config.json is not None:
        write_text(config.json, json.dumps(numbers, indent=1) + "\n")
    return numbers


def _finetuned(steps: int, compressor: FieldCompressor, found: Result) -> Result:
    """`found`, trained."""
    with training_bar(steps) as show:
        return compressor.finetuned(found, steps, lambda step, psnr: show(step, f"PSNR {psnr:.2f}"))


def _numbers(found: Result, compressor: FieldCompressor, whole: int, untrained: Result | None) -> dict[str, Any]:
    likeness = compressor.likeness
    extra: dict[str, Any] = {}
    if untrained is not None:
        extra = {"untrained": {"bytes": len(untrained.data), "psnr": untrained.psnr, "ssim": untrained.ssim}}
        if photographs := likeness.to_photographs(untrained.asset):
            extra["untrained"]["photographs_after"] = photographs
    before, after = likeness.to_photographs(), likeness.to_photographs(found.asset)
    return {
        "representation": found.asset.representation,
        "numbers": len(found.asset),
        "bytes": len(found.data),
        "bytes_single": whole,
        "ratio": whole / len(found.data),
        "bits_each": 8 * len(found.data) / len(found.asset),
        "psnr": found.psnr,
        "ssim": found.ssim,
        "measured": likeness.about,
        **({"photographs_before": before, "photographs_after": after} if before and after else {}),
        "encode_seconds": found.encode_seconds,
        "decode_seconds": found.decode_seconds,
        "peak_memory_mib": peak_memory() / 2**20,
        "dropped": compressor.drop,
        "steps": found.steps,
        **extra,
    }
