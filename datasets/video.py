"""Still frames from a video: evenly spread, the sharpest of its neighbours each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.sharpness import grey, sharpness

EXTENSIONS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".3gp", ".gif")
_CANDIDATES = 8  # looked at for each frame that is kept
_DEFAULT_FPS = 2.0
_DEFAULT_LIMITS = (60, 300)


def frame_count(video: Path, *, frames: int | None, fps: float | None) -> tuple[int, int]:
    """How many frames to keep, and how many the video has.

    Args:
        video: the file.
        frames: as many, spread evenly.
        fps: as many a second. With neither: 2 a second, but at least 60 and at most 300 (and never more than there are).

    Raises:
        ValueError: both are given, one is not positive, or ffmpeg cannot read the file.
    """
    if frames is not None and fps is not None:
        raise ValueError("--frames and --fps: give one of them")
    if frames is not None and frames < 3:
        raise ValueError(f"--frames: expected at least 3, got {frames}")
    if fps is not None and not fps > 0:
        raise ValueError(f"--fps: expected a positive number, got {fps}")
    ffmpeg = _imageio_ffmpeg()
    try:
        total, seconds = ffmpeg.count_frames_and_secs(str(video))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{video}: ffmpeg reads no video in this file") from error
    if total < 3:
        raise ValueError(f"{video}: the video has {total} frame(s), too few to find poses")
    if frames is None:
        low, high = (1, total) if fps is not None else _DEFAULT_LIMITS
        frames = min(max(round(seconds * (fps or _DEFAULT_FPS)), low), high)
    return max(3, min(frames, total)), total


def extract_frames(video: Path, folder: Path, kept: int, total: int, advance: Callable[[int], None]) -> list[str]:
    """Write `kept` of the video's frames as `frame_00001.jpg`, ...

    The video is cut into `kept` windows of equal length; of each, the sharpest of up to eight frames is written.

    Args:
        video: the file.
        folder: where to; made if need be.
        kept: number of windows.
        total: number of frames in the video.
        advance: told how many frames were written since the last call.

    Returns:
        The file names. A few less than `kept` if the video has fewer frames than it states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = max(1, total // (kept * _CANDIDATES))
    names: list[str] = []
    best: tuple[float, NDArray[np.uint8]] | None = None
    window = 0

    def keep() -> None:
        if best is not None:
            names.append(f"frame_{len(names) + 1:05d}.jpg")
            encoded = cv2.imencode(".jpg", best[1], [cv2.IMWRITE_JPEG_QUALITY, 97])[1]
            (folder / names[-1]).write_bytes(encoded.tobytes())
            advance(1)

    for index, pixels in enumerate(_decoded(video, step)):
        if (here := min(index * step * kept // total, kept - 1)) != window:
            keep()
            best, window = None, here
        score = sharpness(grey(pixels))
        if best is None or score > best[0]:
            best = (score, pixels)
    keep()
    if len(names) < 3:
        raise ValueError(f"{video}: only {len(names)} frame(s) could be decoded")
    return names


def _decoded(video: Path, step: int) -> Iterator[NDArray[np.uint8]]:
    """[H, W, 3] BGR pixels of every `step`-th frame, turned upright as the video asks."""
    command = [_imageio_ffmpeg().get_ffmpeg_exe(), "-v", "error", "-nostdin", "-i", str(video), "-map", "0:v:0"]
    command += ["-vf", f"select=not(mod(n\\,{step}))", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]  # of a 10-bit video, 16 bits would come
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            while (pixels := _read_ppm(process.stdout)) is not None:
                yield cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        finally:
            process.kill()


def _read_ppm(stream: IO[bytes]) -> NDArray[np.uint8] | None:
    """The next binary PPM of a stream as ffmpeg writes them: three header lines, then RGB bytes."""
    if stream.readline() != b"P6\n":
        return None
    width, height = (int(word) for word in stream.readline().split())
    stream.readline()
    data = stream.read(width * height * 3)
    if len(data) < width * height * 3:
        return None
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _imageio_ffmpeg() -> ModuleType:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ValueError("reading videos needs the imageio-ffmpeg package: pip install 'prismfield[poses]'") from error
    return imageio_ffmpeg
