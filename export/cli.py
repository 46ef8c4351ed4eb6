"""render-export: a trained scene as a file that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from tyro.conf import OmitArgPrefixes, Positional, arg

from prismfield.cli import run_cli


@dataclass(frozen=True)
class OutputOptions:
    """How the file is written."""

    sh_degree: Literal[0, 1, 2, 3] | None = None
    """Cut the harmonics to this degree; default all that there are and the format holds."""
    spz_version: Literal[3, 4] | None = None
    """Version of an .spz: 3 (default) is read by most programs, 4 is smaller."""
    spz_sh_bits: tuple[int, int] | None = None
    """Bits of an .spz for harmonics of degree 1 and for higher ones, 1 to 8; default 5 4."""
    sog_palette: int | None = None
    """How many sets of harmonics the Gaussians of a .sog (or of a chunk) share, 65,536 at most; default about one for two to four."""
    turn: tuple[float, float, float] | None = None
    """Turn the scene first by so many degrees about x, then y, then z, harmonics too: `180 0 0` rights what stands on its head."""
    level: int = 0
    """Level of detail to write: 0 all Gaussians, 1 a quarter of them, 2 a quarter of these; of a streamed SOG, one that it has."""
    levels: int | None = None
    """How many levels of detail a streamed SOG has; default down to 10,000 Gaussians."""
    chunk_splats: int | None = None
    """How many Gaussians a chunk of a streamed SOG has at most; default 65,536."""
    verify: bool = True
    """Render what was written and what is read back, print the PSNR, and keep the file only if it is above the format's floor."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained scene to a file, in the axes and units of the capture; read it back and compare."""

    scene: Positional[Path]
    """A run's folder, or a file of splats."""
    to: Path
    """The file, replaced if it is there; its suffix says the format. Gaussians: .ply (the layout of 3D Gaussian Splatting),
    .compressed.ply, .spz, .sog (or a folder NAME_sog), streamed SOG (a folder NAME_lod, or DIR/lod-meta.json), .splat, .glb (KHR_gaussian_splatting); convexes: .ply, and .glb and .obj, a mesh of their hulls."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""
    writing: OmitArgPrefixes[OutputOptions] = OutputOptions()


def main() -> NoReturn:
    """The command `render-export`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    export(tyro.cli(Annotated[ExportConfig, arg(name="")], prog="render-export"))


def export(config: ExportConfig) -> None:
    """Write, read back, render both, and say how they compare.

    Raises:
        FileNotFoundError: the scene is not there.
        ValueError: the suffix is not known, or the scene cannot be written in that format.
        OSError: the file could not be written, came back different, or looks different.
    """
    write(config.scene, config.to, config.writing, config.step, config.threads, "--to ")


def write(scene: Path, to: Path, options: OutputOptions, step: int | None, threads: int, option: str = "") -> None:
    """What `render-export` and `render-convert` do; `option` is what stands before the file on the command line."""
    from rich.console import Console

    from prismfield.export.convert import format_for, level_likeness, open_source, turned, write_checked
    from prismfield.export.formats import WriteOptions
    from prismfield.export.report import describe
    from prismfield.train.cli import show_log, use_threads

    show_log()
    use_threads(threads)
    source = open_source(scene, step=step, level=options.level)
    if options.turn is not None:
        source = turned(source, options.turn)
    told = WriteOptions(
        options.spz_version, options.spz_sh_bits, options.sog_palette, options.levels, options.chunk_splats
    )
    try:
        form = format_for(to, source.asset, told)
    except ValueError as error:
        if to.is_dir():
            raise IsADirectoryError(f"{option}{to}: is a folder") from error
        raise ValueError(f"{option}{error}") from error
    if to.is_dir() and not form.is_folder:
        raise IsADirectoryError(f"{option}{to}: is a folder")
    written = write_checked(source, to, told, sh_degree=options.sh_degree, is_verified=options.verify)
    console = Console(highlight=False, soft_wrap=True)
    for line in describe(source, to, written):
        console.print(line, markup=False)
    if options.verify and source.finer is not None and (alike := level_likeness(source)) is not None:
        size = 1 << source.level
        print_line = f"level {source.level} of {source.finer.num_primitives:,} {source.asset.noun}: {alike:.1f} dB PSNR to all of them at 1/{size} of the size"
        console.print(print_line, markup=False)
    if form.read is None:
        console.print(f"read back: the same faces; a mesh of hulls is not all that there is to {source.asset.noun}")


if __name__ == "__main__":
    main()
