"""render-video: a flight through a trained scene."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from tyro.conf import Positional, arg

from prismfield.cli import run_cli

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from prismfield.train.camera_path import Flight
    from prismfield.train.loop import Interrupt

_PLY_SIZE, _PLY_FOV = (960, 540), 50.0  # pixels, vertical degrees: where there are no photographs to go by
_SECONDS, _FPS = 8.0, 30.0


@dataclass(frozen=True)
class VideoConfig:
    """Film a trained scene: round it, along the photographs, or through keyframes."""

    scene: Positional[Path]
    """A run's folder, or a file of splats (docs/formats.md)."""
    out: Path = Path("video.mp4")
    """The video, replaced if it is there."""
    path: str = "orbit"
    """"orbit": round the scene as it was photographed; "train": from photograph to photograph; or a .json of keyframes."""
    seconds: float | None = None
    """How long; default 8, or as the keyframes' times say."""
    fps: float = _FPS
    """Frames a second."""
    width: int | None = None
    """Pixels, made even; default as the photographs the scene was trained on, 960 for a file of splats."""
    height: int | None = None
    """Pixels, made even; with only one of the two given, the other keeps the shape."""
    fov: float | None = None
    """Vertical field of view, degrees; default the photographs', 50 for a file of splats."""
    quality: int = 18
    """x264's CRF, 1 to 51: 18 is hard to tell from the frames themselves, 28 is small."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


def main() -> NoReturn:
    """The command `render-video`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    film(tyro.cli(Annotated[VideoConfig, arg(name="")], prog="render-video"))


def film(config: VideoConfig) -> None:
    """Render the frames and write the video.

    Raises:
        FileNotFoundError: the scene or the keyframes are not there.
        ValueError: an option or a file makes no sense.
        OSError: the video cannot be written.
    """
    _check(config)
    from prismfield.train.video import check_video, even_size, write_video

    check_video(config.out)
    from rich.console import Console

    from prismfield.export.library import load
    from prismfield.train.cli import show_log, use_threads
    from prismfield.train.loop import Interrupt

    show_log()
    use_threads(config.threads)
    scene = load(config.scene, step=config.step)
    flight, size = plan(scene, config)
    size = even_size(*size)
    count = len(flight.camtoworlds)
    interrupt = Interrupt()
    with interrupt.listen():
        frames = _until(interrupt, _frames(scene, flight, size))
        write_video(config.out, frames, size, config.fps, config.quality)
    console = Console(highlight=False, soft_wrap=True)
    about = f"{size[0]}x{size[1]}, {count} frames, {count / config.fps:.1f} s, {config.out.stat().st_size:,} bytes"
    console.print(f"{config.out}: {about}", markup=False)


def _check(config: VideoConfig) -> None:
    """Raise a ValueError naming the first option that makes no sense."""
    limits: dict[str, tuple[float, float]] = {"seconds": (0.01, 3600), "fps": (1, 240), "quality": (1, 51)}
    limits |= {"width": (2, 8192), "height": (2, 8192), "fov": (1, 170), "threads": (0, 4096)}
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name}: expected {low} to {high}, got {value}")
    if config.path not in ("orbit", "train") and Path(config.path).suffix.lower() != ".json":
        raise ValueError(f"--path {config.path}: expected orbit, train or a .json file of keyframes")


def plan(scene: Any, config: VideoConfig) -> tuple[Flight, tuple[int, int]]:
    """Where the camera flies, and the size of the pictures.

    Args:
        scene: `export.library.Scene`.
        config: the command's options.
    """
    import math

    import numpy as np

    from prismfield.train import camera_path

    photographs = scene.cameras("train") if scene.has_cameras else []
    fov = camera_path.vertical_fov(photographs) if photographs else math.radians(_PLY_FOV)
    fov = fov if config.fov is None else math.radians(config.fov)
    shape = (photographs[0].width, photographs[0].height) if photographs else _PLY_SIZE
    size = _size(shape, config.width, config.height)
    up = np.array(scene.up) / np.linalg.norm(scene.up)
    if config.path.lower().endswith(".json"):
        keyframes = camera_path.read_keyframes(Path(config.path), fov)
        seconds = config.seconds
        if seconds is None:
            seconds = _SECONDS if keyframes.times is None else keyframes.duration
        return camera_path.through(keyframes, max(1, round(seconds * config.fps))), size
    seconds = _SECONDS if config.seconds is None else config.seconds
    frames = max(1, round(seconds * config.fps))
    center = np.array(scene.frame.center)
    if not photographs:
        if config.path == "train":
            raise ValueError(f"--path train: {config.scene} is a file, which has no photographs; try orbit")
        poses = camera_path.ring(center, up, _distance(fov, size) / scene.frame.scale)
        return camera_path.orbit(poses, center, up, fov, frames), size
    poses = camera_path.poses_of(photographs)
    if config.path == "orbit" and scene.looks_inwards:
        return camera_path.orbit(poses, center, up, fov, frames), size
    if config.path == "orbit":
        print("the photographs look at no common point: flying along them instead of round it", file=sys.stderr)
    return camera_path.along_photographs(poses, fov, frames, seconds), size


def _distance(fov: float, size: tuple[int, int]) -> float:
    """From which the unit ball just fills the narrower side of the picture."""
    import math

    half = math.atan(math.tan(0.5 * fov) * min(1.0, size[0] / size[1]))
    return 1 / math.sin(half)


def _size(shape: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    if width is None and height is None:
        return shape
    if height is None:
        assert width is not None
        return width, round(width * shape[1] / shape[0])
    return (round(height * shape[0] / shape[1]) if width is None else width), height


def _until(interrupt: Interrupt, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The frames, until Ctrl-C or SIGTERM. Asked between frames: an exception in the midst of an import may be swallowed there."""
    for frame in frames:
        if interrupt.asked:
            raise KeyboardInterrupt
        yield frame


def _frames(scene: Any, flight: Flight, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Each frame as it is rendered, with a progress bar."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from prismfield.export.library import render

    cameras = flight.cameras(*size)
    columns = (TextColumn("rendering"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(cameras), speed="")
        for index in range(len(cameras)):
            with torch.no_grad():
                rgb = render(scene, cameras[index]).rgb[0]
            yield (rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            speed = bar.tasks[0].speed
            bar.update(task, advance=1, speed=f"{speed:.0f} frames/s" if speed else "")


if __name__ == "__main__":
    main()
