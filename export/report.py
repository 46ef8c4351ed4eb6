"""What the commands that write files print about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prismfield.export.convert import Source, Written


def describe(source: Source, path: Path, written: Written) -> list[str]:
    """Lines: what is in the file, how large it is beside what it was made from, and how it looks."""
    from prismfield.export.convert import size_of
    from prismfield.export.formats import FORMATS, is_asset

    count = len(source.asset)
    lines = [f"{path}: {written.about}, {written.bytes:,} bytes ({written.bytes / count:.0f} each)"]
    if is_asset(source.path):
        before, name = size_of(source.path), str(source.path)
    else:
        size = FORMATS[source.asset.representation][".ply"].size
        assert size is not None
        before, name = size(source.asset), "the same as .ply"
    ratio = before / written.bytes
    if abs(ratio - 1) >= 0.005:
        size_words = f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"
        lines.append(f"{size_words} than {name} ({before:,} bytes)")
    if written.psnr is not None:
        lines.append(f"read back and rendered: {_decibels(written.psnr)} to the scene itself, {written.views} views")
    if written.psnr_held is not None:
        lines.append(f"to what the format can hold of the scene: {_decibels(written.psnr_held)}")
    return lines


def _decibels(psnr: float) -> str:
    return "100 dB PSNR or more" if psnr >= 100 else f"{psnr:.1f} dB PSNR"
