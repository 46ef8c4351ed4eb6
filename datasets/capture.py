"""What a reader of one format hands over, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.datasets.base import Frame
from prismfield.datasets.images import ImageInfo, read_info
from prismfield.datasets.lens import Lens
from prismfield.render.cameras import CameraModel, Cameras

_FOCALS = 1e-3, 1e5  # least and greatest focal length, image lengths: what lies beyond is no number of pixels
_RIGID_TOLERANCE = 1e-2  # of rotation entries; files written with few digits are repaired, others refused


class Notes:
    """Warnings gathered over many frames, one sentence for each kind."""

    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._frames: dict[str, list[str]] = {}

    def say(self, sentence: str) -> None:
        """Note something about the capture as a whole."""
        if sentence not in self._sentences:
            self._sentences.append(sentence)

    def about(self, frame: str, what: str) -> None:
        """Note something about one frame: "EXIF rotation ignored"."""
        self._frames.setdefault(what, []).append(frame)

    def sentences(self) -> list[str]:
        """All of them, frames counted and at most three of them named."""
        return self._sentences + [f"{what}: {name_some(frames)}" for what, frames in self._frames.items()]


@dataclass
class Capture:
    """A capture in the user's frame, before it is split and normalised."""

    kind: Literal["blender", "transforms", "colmap"]
    train: list[Frame]
    test: list[Frame]
    split: str | None
    """The files' own split in words; None: they have none, and all frames are in `train`."""
    has_alpha: bool
    xyz: NDArray[np.float64] | None = None
    """[P, 3] user units; None: no cloud."""
    rgb: NDArray[np.uint8] | None = None
    """[P, 3]."""
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class CameraSpec:
    """Intrinsics as a file states them."""

    fx: float
    fy: float
    cx: float
    cy: float
    lens: Lens
    size: tuple[int, int]
    """(width, height) that the numbers refer to."""


def name_some(names: Iterable[str]) -> str:
    """'3 images (a, b, c)', at most three by name."""
    listed = list(names)
    return f"{len(listed)} image{'s' if len(listed) != 1 else ''} ({first_three(listed)})"


def first_three(names: list[str]) -> str:
    """'a, b, c, ...'."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def image_infos(paths: dict[str, Path | None], where: Path) -> dict[str, ImageInfo]:
    """Headers of the images by frame name.

    Raises:
        FileNotFoundError: images are missing (a path is None or no file); says how many of how many and names three.
    """
    missing = [name for name, path in paths.items() if path is None or not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{where}: {len(missing)} of {len(paths)} images are missing: {first_three(missing)}")
    return {name: read_info(path) for name, path in paths.items() if path is not None}


def make_frame(
    name: str,
    image: tuple[Path, ImageInfo],
    camtoworld: NDArray[np.float64],
    spec: CameraSpec,
    notes: Notes,
    *,
    mask_path: Path | None = None,
    time: float | None = None,
    depth: tuple[Path, float] | None = None,
) -> Frame:
    """A checked frame in the user's coordinates.

    Args:
        name: the frame's name.
        image: file and header.
        camtoworld: [4, 4], OpenCV axes.
        spec: intrinsics, rescaled here if the image has another resolution.
        notes: gathers warnings.
        mask_path: a mask, whose size is checked if the file exists and which is dropped with a warning if not.
        time: moment of a dynamic capture.
        depth: depth file and user units per unit of its values.

    Raises:
        ValueError: the pose is not finite or not rigid, an intrinsic is not usable, or a size does not fit.
    """
    path, info = image
    pose = _rigid(name, camtoworld)
    for label, value in (("focal length fx", spec.fx), ("focal length fy", spec.fy)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {label}: expected a positive number, got {value}")
        if not _FOCALS[0] * max(spec.size) <= value <= _FOCALS[1] * max(spec.size):
            raise ValueError(f"{name}: {label}: expected pixels, got {value} for an image {max(spec.size)} pixels long")
    if not (np.abs([spec.cx, spec.cy]) <= _FOCALS[1] * max(spec.size)).all():
        raise ValueError(f"{name}: principal point: expected a place in pixels, got ({spec.cx}, {spec.cy})")
    width, height = spec.size
    K = torch.tensor([[[spec.fx, 0, spec.cx], [0, spec.fy, spec.cy], [0, 0, 1]]], dtype=torch.float64)
    distortion = torch.tensor([spec.lens.coefficients], dtype=torch.float64) if spec.lens.coefficients else None
    viewmats = torch.linalg.inv(torch.from_numpy(pose))[None]
    camera = Cameras(viewmats, K, width, height, cast(CameraModel, spec.lens.model), distortion)
    if (info.width, info.height) != (width, height):
        _check_resized(name, (info.width, info.height), (width, height))
        notes.about(name, f"intrinsics for {width}x{height} rescaled to images of {info.width}x{info.height}")
        camera = camera.resized(info.width, info.height)
    if info.rotated:
        notes.about(name, "EXIF rotation ignored, as COLMAP ignores it")
    if mask_path is not None:
        if mask_path.is_file():
            mask = read_info(mask_path)
            if (mask.width, mask.height) != (info.width, info.height):
                raise ValueError(
                    f"{mask_path}: mask of {mask.width}x{mask.height}, but {path.name} is {info.width}x{info.height}"
                )
        else:
            notes.about(name, "mask file missing, the whole image counts")
            mask_path = None
    if depth is not None and not depth[0].is_file():
        notes.about(name, "depth file missing")
        depth = None
    depth_path, depth_scale = depth if depth is not None else (None, 1.0)
    return Frame(name, path, camera, mask_path, time, depth_path, depth_scale)


def _rigid(name: str, camtoworld: NDArray[np.float64]) -> NDArray[np.float64]:
    """The pose with its rotation made exactly orthonormal."""
    if not np.isfinite(camtoworld).all():
        raise ValueError(f"{name}: pose: expected finite numbers, got NaN or infinity")
    rotation = camtoworld[:3, :3]
    if np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{name}: pose: expected a rotation, got a mirrored one (determinant {np.linalg.det(rotation):.3g})"
        )
    excess = np.abs(rotation.T @ rotation - np.eye(3)).max()
    if excess > _RIGID_TOLERANCE:
        raise ValueError(
            f"{name}: pose: expected a rotation, got a matrix that is off by {excess:.2g} (scaled or sheared)"
        )
    u, _, vt = np.linalg.svd(rotation)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = u @ vt, camtoworld[:3, 3]
    return pose


def _check_resized(name: str, actual: tuple[int, int], stated: tuple[int, int]) -> None:
    """Accept a uniform scale, each side rounded to whole pixels."""
    (w, h), (w0, h0) = actual, stated
    if abs(w / w0 * h0 - h) >= 1 and abs(h / h0 * w0 - w) >= 1:
        raise ValueError(f"{name}: image of {w}x{h}, but the cameras were stated for {w0}x{h0}, another aspect ratio")
