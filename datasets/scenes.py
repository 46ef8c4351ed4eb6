"""From what a user calls a scene to checked data: name lookup, format, split, scene frame."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from prismfield.datasets.base import Frame, Points, SceneData, SceneFrame
from prismfield.datasets.capture import Capture
from prismfield.datasets.clouds import clean_cloud
from prismfield.datasets.colmap import find_model, read_colmap
from prismfield.datasets.images import decode
from prismfield.datasets.normalize import estimate_aabb, estimate_frame
from prismfield.datasets.transforms import is_transforms, read_transforms
from prismfield.render.cameras import Cameras

DEFAULT_NTH = 8
"""Every eighth image, counted from the first by name, is a test view where a capture brings no split of its own."""
BUNDLED = {
    "garden": "'garden' is the bundled scene; for the Mip-NeRF 360 capture of that name: "
    "render-data download mipnerf360/garden, then --scene with its path",
}
"""Scenes that come with the package, each with the line that says so."""

log = logging.getLogger("prismfield")


def load_scene(scene: str, *, eval_every_nth: int | None = None) -> SceneData:
    """Read a capture, check it and move it to the scene frame.

    Only the headers of the images are read, and up to three images with an alpha channel, to see whether it is used.

    Args:
        scene: a path (a folder, or one `transforms.json`), else a name under `$PRISMFIELD_DATA`, else a bundled scene.
        eval_every_nth: every n-th image by name is a test view; 0: none is; None: the files' own split, else every 8th.

    Raises:
        FileNotFoundError: no such scene, or its images are missing.
        ValueError: a file of it cannot be used; names the file or frame.
    """
    if eval_every_nth is not None and (eval_every_nth < 0 or eval_every_nth == 1):
        raise ValueError(f"eval_every_nth: expected 0 (no test views) or at least 2, got {eval_every_nth}")
    path = find_scene(scene)
    root = path if path.is_dir() else path.parent
    capture = _read(path)
    train, test, split = _split(capture, eval_every_nth)
    if not train:
        raise ValueError(f"{path}: no training images are left ({len(test)} test images, split: {split})")
    notes = capture.notes
    scene_frame = estimate_frame(train)
    points = None
    if capture.xyz is not None and capture.rgb is not None:
        xyz, rgb, sentences = clean_cloud(capture.xyz, capture.rgb)
        for sentence in sentences:
            notes.say(sentence)
        if len(xyz):
            points = Points(
                scene_frame.points_to_scene(torch.from_numpy(xyz)).float(), torch.from_numpy(rgb).float() / 255
            )
        else:
            notes.say("the point cloud has no usable points")
    train = [_to_scene(frame, scene_frame) for frame in train]
    test = [_to_scene(frame, scene_frame) for frame in test]
    see_through = capture.has_alpha and _see_through(train)
    cloud = None if points is None else points.xyz.double().numpy()
    bounds = estimate_aabb(train, cloud, object_only=see_through)
    return SceneData(
        name=root.resolve().name,
        root=root,
        kind=capture.kind,
        train=train,
        test=test,
        points=points,
        frame=scene_frame,
        aabb=torch.from_numpy(bounds).float(),
        background="white" if see_through else None,
        split=split,
        warnings=notes.sentences(),
    )


def find_scene(scene: str) -> Path:
    """The folder or file that a scene name or path stands for.

    Raises:
        FileNotFoundError: there is none; lists the names that are known.
    """
    data = os.environ.get("PRISMFIELD_DATA")
    candidates = [Path(scene).expanduser(), *([Path(data).expanduser() / scene] if data else [])]
    if scene in BUNDLED:
        candidates.append(Path(__file__).parent / scene)
    there = [path for path in candidates if path.exists()]
    for path in there:  # a folder without a capture, a run's perhaps, hides no scene of its name
        if path.is_file() or _holds_capture(path):
            if path is candidates[-1] and scene in BUNDLED:
                log.info(BUNDLED[scene])
            return path
    if there:
        return there[0]  # its reader says what is missing
    raise FileNotFoundError(
        f"scene {scene!r}: no such path or name (known names: {', '.join(known_scenes()) or 'none'}; "
        f"$PRISMFIELD_DATA is {data or 'not set'})"
    )


def known_scenes() -> list[str]:
    """Names that `load_scene` takes: the captures under `$PRISMFIELD_DATA`, then the bundled scenes."""
    names: list[str] = []
    data = os.environ.get("PRISMFIELD_DATA")
    if data and Path(data).expanduser().is_dir():
        folders = sorted(Path(data).expanduser().iterdir())
        names += [f.name for f in folders if f.is_dir() and _holds_capture(f)]
    return names + [name for name in BUNDLED if name not in names and is_transforms(Path(__file__).parent / name)]


def _holds_capture(folder: Path) -> bool:
    return is_transforms(folder) or find_model(folder) is not None


def _read(path: Path) -> Capture:
    """Read with the reader that fits. COLMAP comes first: it brings points, and often has transforms.json beside it."""
    if path.is_file():
        if path.suffix != ".json":
            raise ValueError(f"{path}: expected a folder or a transforms.json")
        return read_transforms(path)
    if find_model(path) is not None:
        return read_colmap(path)
    if is_transforms(path):
        return read_transforms(path)
    files = sorted(entry.name for entry in path.iterdir())
    found = f"found {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else "the folder is empty"
    raise FileNotFoundError(
        f"{path}: no capture: expected transforms.json, transforms_train.json or sparse/0/cameras.bin; {found}"
    )


def _split(capture: Capture, nth: int | None) -> tuple[list[Frame], list[Frame], str]:
    if nth is None and capture.split is not None:
        return capture.train, capture.test, capture.split
    frames = sorted(capture.train + capture.test, key=lambda frame: frame.name)
    nth = DEFAULT_NTH if nth is None else nth
    if nth == 0:
        return frames, [], "no test views"
    test = frames[::nth] if len(frames) > 1 else []
    return [frame for i, frame in enumerate(frames) if i % nth or not test], test, f"every {nth}{_ordinal(nth)}"


def _ordinal(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _see_through(frames: list[Frame]) -> bool:
    """Whether images with an alpha channel use it: in one of three, some pixel is not opaque."""
    for frame in {frame.name: frame for frame in (frames[0], frames[len(frames) // 2], frames[-1])}.values():
        pixels = decode(frame.image_path)
        if pixels.shape[2] == 4 and pixels[..., 3].min() < (255 if pixels.dtype == np.uint8 else 1):
            return True
    return False


def _to_scene(frame: Frame, scene_frame: SceneFrame) -> Frame:
    """The frame with its camera in scene coordinates, in single precision."""
    camera = frame.camera
    viewmats = camera.viewmats.clone()
    center = torch.tensor(scene_frame.center, dtype=viewmats.dtype)
    viewmats[:, :3, 3] = (viewmats[:, :3, 3] + viewmats[:, :3, :3] @ center) * scene_frame.scale
    distortion = None if camera.distortion is None else camera.distortion.float()
    moved = Cameras(viewmats.float(), camera.Ks.float(), camera.width, camera.height, camera.model, distortion)
    return replace(frame, camera=moved)
