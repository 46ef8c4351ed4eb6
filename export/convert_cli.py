"""render-convert: a file of splats from one format to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

from tyro.conf import OmitArgPrefixes, Positional, arg

from prismfield.cli import run_cli
from prismfield.export.cli import OutputOptions, write


@dataclass(frozen=True)
class ConvertConfig:
    """Write what is in one file to another, in the format that its name asks for; read it back and compare."""

    scene: Positional[Path]
    """The file to read (or a run's folder)."""
    to: Positional[Path]
    """The file to write, replaced if it is there."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""
    writing: OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)


def main() -> NoReturn:
    """The command `render-convert`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    config = tyro.cli(Annotated[ConvertConfig, arg(name="")], prog="render-convert")
    write(config.scene, config.to, config.writing, None, config.threads)


if __name__ == "__main__":
    main()
