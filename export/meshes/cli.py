"""render-mesh: the surface of a trained scene as a mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

from tyro.conf import OmitArgPrefixes, Positional, arg

from prismfield.cli import run_cli
from prismfield.export.meshes.config import SurfaceConfig


@dataclass(frozen=True)
class MeshConfig:
    """Write the surface of a trained scene as a mesh, with colours; read it back and compare."""

    scene: Positional[Path]
    """A run's folder, or a .ply of splats."""
    to: Path
    """The file, replaced if it is there: .glb (y is up), or .ply, .obj, .stl (no colours) in the axes and units of the capture."""
    surface: OmitArgPrefixes[SurfaceConfig] = field(default_factory=SurfaceConfig)
    picture: Path | None = None
    """Draw the scene, the mesh, and the mesh in grey and cut open beside each other into this .png or .jpg."""
    view: int = 0
    """The picture's camera: which photograph of the training, from 0."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


def main() -> NoReturn:
    """The command `render-mesh`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    write(tyro.cli(Annotated[MeshConfig, arg(name="")], prog="render-mesh"))


def write(config: MeshConfig) -> None:
    """Find the surface, write it, and say what there is.

    Raises:
        FileNotFoundError: the scene, or its capture, is not there.
        ValueError: an option makes no sense, or there is no surface.
        OSError: the file could not be written, or came back different.
    """
    from prismfield.export.meshes.files import check_suffix, write_mesh

    check_suffix(config.to, textured=config.surface.texture is not None)
    config.surface.check()
    for path in (config.to, config.picture):
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder")
    import time

    import numpy as np
    import torch
    from rich.console import Console

    from prismfield.export.library import load
    from prismfield.export.meshes.surface import find_surface
    from prismfield.train.cli import show_log, use_threads
    from prismfield.train.contact_sheet import check_picture

    if config.picture is not None:
        check_picture(config.picture)
    began = time.monotonic()
    show_log()
    use_threads(config.threads)
    scene = load(config.scene, step=config.step)
    surface = find_surface(scene, config.surface)
    mesh = surface.mesh
    write_mesh(config.to, mesh)
    console = Console(highlight=False, soft_wrap=True)
    colors = "" if mesh.texture is None else f"a texture of {mesh.texture.shape[1]}x{mesh.texture.shape[0]}, "
    about = f"{len(mesh):,} faces, {len(mesh.vertices):,} vertices, {colors}{config.to.stat().st_size:,} bytes"
    console.print(f"{config.to}: {about}", markup=False)
    size = " x ".join(f"{side:.4g}" for side in np.ptp(mesh.vertices, 0))
    sealed = "watertight" if not surface.open_edges else f"not watertight ({surface.open_edges:,} open edges)"
    console.print(f"{size} units, voxels of {surface.voxel:.3g}, {sealed}")
    parts = f"; {surface.parts_left_out:,} small parts left out" if surface.parts_left_out else ""
    seconds = f"; {time.monotonic() - began:.1f} s"
    console.print(f"{surface.method}, {surface.found:,} faces found{parts}{seconds}; read back: the same")
    if config.picture is not None:
        from prismfield.export.meshes.picture import four_pictures
        from prismfield.train.evaluate import write_image

        write_image(config.picture, torch.from_numpy(four_pictures(scene, mesh, config.view)))
        console.print(f"{config.picture}: as rendered and in its colours, in grey and cut open", markup=False)


if __name__ == "__main__":
    main()
