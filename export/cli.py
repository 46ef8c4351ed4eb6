"""render-export: a trained scene as a file that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from tyro.conf import Positional, arg

from prismfield.cli import run_cli

if TYPE_CHECKING:
    from prismfield.export.assets import Asset
    from prismfield.export.library import Scene
    from prismfield.render.cameras import Cameras

_LEAST_PSNR = 50.0  # decibels between the scene and the file read back; rounding leaves far more
_VIEWS = 3


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained scene to a file, in the axes and units of the capture; read it back and compare."""

    scene: Positional[Path]
    """A run's folder, or a .ply of splats."""
    to: Path
    """The file, replaced if it is there; its suffix says the format: .ply, for Gaussians the layout of 3D Gaussian Splatting;
    convexes also .glb and .obj, a mesh of their hulls."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


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
        OSError: the file could not be written, or came back different.
    """
    if config.to.is_dir():
        raise IsADirectoryError(f"--to {config.to}: is a folder")
    from rich.console import Console

    from prismfield.export.formats import FORMATS
    from prismfield.export.library import load
    from prismfield.train.cli import show_log, use_threads

    show_log()
    use_threads(config.threads)
    scene = load(config.scene, step=config.step)
    asset = scene.asset()
    formats, suffix = FORMATS[asset.representation], config.to.suffix.lower()
    if suffix not in formats:
        known = ", ".join(f"{suffix} ({form.about})" for suffix, form in formats.items())
        unknown = f"unknown suffix {config.to.suffix!r} for {asset.noun}"
        raise ValueError(f"--to {config.to}: {unknown}; expected one of {known}")
    written = formats[suffix].write(config.to, asset)
    console = Console(highlight=False, soft_wrap=True)
    size = config.to.stat().st_size
    about = f"{len(asset):,} {asset.noun} of degree {asset.sh_degree}" if written is None else written
    console.print(f"{config.to}: {about}, {size:,} bytes ({size / len(asset):.0f} each)", markup=False)
    if (read := formats[suffix].read) is None:
        console.print(f"read back: the same faces; a mesh of hulls is not all that there is to {asset.noun}")
        return
    psnr, cameras = verify(scene, read(config.to), config.to)
    likeness = "100 dB PSNR or more" if psnr >= 100 else f"{psnr:.1f} dB PSNR"
    console.print(f"read back and rendered: {likeness} to the scene itself, {cameras} views")
    if psnr < _LEAST_PSNR:
        raise OSError(f"{config.to}: does not look like the scene when read back ({psnr:.1f} dB)")


def verify(scene: Scene, asset: Asset, path: Path) -> tuple[float, int]:
    """How much alike the scene and the file look.

    Args:
        scene: what was written.
        asset: what was read back from `path`.
        path: the file.

    Returns:
        PSNR in decibels over all pixels, 100 at most, and from how many cameras: photographs' where the capture is at
        hand, else on a ring round the content.
    """
    import torch

    from prismfield.export.library import render, scene_of
    from prismfield.train.metrics import psnr

    # In the same frame: in another one the near plane is elsewhere, and large convexes that reach it come and go.
    again = scene_of(asset, path, frame=scene.frame)
    cameras = _some_cameras(scene)
    with torch.no_grad():
        pairs = [[render(s, camera, scene.background).rgb.clamp(0, 1) for s in (scene, again)] for camera in cameras]
    ours, theirs = (torch.cat([pair[i].reshape(-1, 3) for pair in pairs]) for i in (0, 1))
    return psnr(ours, theirs), len(cameras)


def _some_cameras(scene: Scene) -> list[Cameras]:
    import math

    import numpy as np

    from prismfield.export.library import content_frame
    from prismfield.train.camera_path import orbit, ring

    if scene.run is not None:
        try:
            cameras = scene.cameras("train")
            return cameras[:: max(1, len(cameras) // _VIEWS)][:_VIEWS]
        except (ValueError, OSError):
            pass  # the capture was moved away: the scene itself tells where to look from
    frame = content_frame(scene.asset())
    center, up = np.array(frame.center), np.array(frame.up) / np.linalg.norm(frame.up)
    flight = orbit(ring(center, up, 2.5 / frame.scale), center, up, math.radians(50), _VIEWS)
    batch = flight.cameras(640, 360)
    return [batch[index] for index in range(_VIEWS)]


if __name__ == "__main__":
    main()
