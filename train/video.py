"""Frames to an mp4 that plays everywhere: H.264, 4:2:0, BT.709."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def even_size(width: int, height: int) -> tuple[int, int]:
    """The nearest size that 4:2:0 video can have."""
    return max(2, 2 * round(width / 2)), max(2, 2 * round(height / 2))


def check_video(path: Path) -> None:
    """Raise a ValueError or an OSError if no video can be written to `path`."""
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: expected a name ending in .mp4")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder it should go to does not exist")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder it should go to cannot be written")


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], size: tuple[int, int], fps: float, crf: int) -> None:
    """Encode frames; the file takes its name once it is whole, and whatever stops this leaves none behind.

    Args:
        path: ends in .mp4; a file of that name is replaced.
        frames: [H, W, 3] each; the iterator may take its time.
        size: (width, height), even.
        fps: frames a second.
        crf: quality, 1 to 51, lower is better; 18 is hard to tell from the original.

    Raises:
        OSError: ffmpeg is not there, or could not write.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    command = [_ffmpeg(), "-y", "-loglevel", "error", "-nostdin", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{size[0]}x{size[1]}", "-r", f"{fps:g}", "-i", "pipe:0", "-an"]
    tags = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    command += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,{tags}"]
    command += ["-c:v", "libx264", "-crf", str(crf), "-pix_fmt", "yuv420p"]
    command += ["-movflags", "+faststart", "-f", "mp4", str(part)]
    # In a group of its own: Ctrl-C is ours to answer, and ffmpeg would complain about the pipe.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.stderr is not None
    try:
        try:
            for frame in frames:
                if frame.shape != (size[1], size[0], 3) or frame.dtype != np.uint8:
                    raise ValueError(f"frames: expected uint8 {[size[1], size[0], 3]}, got {list(frame.shape)}")
                process.stdin.write(np.ascontiguousarray(frame).data)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it says why
        said = process.stderr.read().decode(errors="replace")
        if process.wait() != 0 or not part.is_file():
            raise OSError(f"{path}: ffmpeg could not write the video ({_last_line(said) or 'it ended early'})")
        os.replace(part, path)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stderr.close()
        part.unlink(missing_ok=True)


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise OSError(f"no ffmpeg to make a video with: {error}") from None


def _last_line(said: str) -> str:
    lines = [re.sub(r"^\[[^]]*\]\s*", "", line).strip() for line in said.splitlines()]
    return next((line for line in reversed(lines) if line), "")
