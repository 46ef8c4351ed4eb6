"""A scene written in a format that its name's ending chooses, kept only if it looks like the scene when it is read back."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismfield.export.assets import Asset, SplatAsset
from prismfield.export.formats import FORMATS, Format, WriteOptions, ending, is_asset, is_streamed, read_asset
from prismfield.export.library import Scene, content_frame, load, render, scene_of
from prismfield.export.lods.merge import build_levels
from prismfield.export.lods.streamed import LOD_META
from prismfield.export.lods.streamed_read import read_streamed
from prismfield.export.sog_files import META
from prismfield.render.cameras import Cameras
from prismfield.train.camera_path import orbit, ring
from prismfield.train.metrics import psnr

_VIEWS = 3
_IN_FOLDER = (META, LOD_META)  # names for what lies beside them


@dataclass(frozen=True)
class Source:
    """What is to be written."""

    path: Path
    asset: Asset
    scene: Scene
    """That draws it."""
    finer: Scene | None = None
    """All that there is, where this is a coarser level of detail made of it."""
    level: int = 0
    """Which one."""


@dataclass(frozen=True)
class Written:
    """What came of it."""

    about: str
    """What is in the file, in words."""
    bytes: int
    psnr: float | None
    """Decibels between the scene and the file read back, 100 at most; None where that was not measured."""
    psnr_held: float | None
    """The same, to the scene as far as the format can hold it; None where it can hold all."""
    views: int


def open_source(path: Path, *, step: int | None = None, level: int = 0) -> Source:
    """A run's folder, at one of its steps, or a file of primitives with every value as it is there.

    Args:
        path: a folder or a file.
        step: of a run; None for the newest.
        level: of detail: 0 is all that there is; others are read from a streamed SOG, else made by merging Gaussians.

    Raises:
        FileNotFoundError: there is no such file, or the folder is not a run's.
        ValueError: one line saying what is wrong with it, or there is no such level.
    """
    if level < 0:
        raise ValueError(f"--level: expected 0 or more, got {level}")
    if step is None and is_asset(path):
        is_stored = level > 0 and is_streamed(path)
        asset = read_streamed(path, level) if is_stored else read_asset(path)
        source = Source(path, asset, scene_of(asset, path))
        return source if is_stored else _coarser(source, level)
    scene = load(path, step=step)
    return _coarser(Source(path, scene.asset(), scene), level)


def _coarser(source: Source, level: int) -> Source:
    if level == 0:
        return source
    if not isinstance(source.asset, SplatAsset):
        raise ValueError(f"{source.path}: --level merges Gaussians, not {source.asset.noun}")
    levels = build_levels(source.asset, level + 1)
    if len(levels) <= level:
        raise ValueError(
            f"{source.path}: there is no level {level}, level {len(levels) - 1} has {len(levels[-1].asset)} left"
        )
    asset = levels[level].asset
    made = scene_of(asset, source.path, frame=source.scene.frame)
    drawn = replace(made, run=source.scene.run, background=source.scene.background)
    return Source(source.path, asset, drawn, source.scene, level)


def level_likeness(source: Source) -> float | None:
    """PSNR, decibels, of a coarser level to all that there is, seen from as much farther away as it is coarser.

    In place of the distance the pictures shrink, by 2 a level. Both are antialiased: Gaussians smaller than a pixel would be
    drawn larger than they are. None where the source is no such level.
    """
    if source.finer is None:
        return None
    scenes = []
    for scene in (source.finer, source.scene):
        asset: Any = scene.asset()
        scenes.append(scene_of(replace(asset, antialiased=True), scene.path, frame=scene.frame))
    cameras = _some_cameras(source.finer)
    small = [c.resized(max(1, c.width >> source.level), max(1, c.height >> source.level)) for c in cameras]
    with torch.no_grad():
        pairs = [[render(s, c, source.finer.background).rgb.clamp(0, 1).reshape(-1, 3) for c in small] for s in scenes]
    return psnr(torch.cat(pairs[0]), torch.cat(pairs[1]))


def turned(source: Source, degrees: tuple[float, float, float]) -> Source:
    """The same, turned by so many degrees about x, then y, then z.

    Raises:
        ValueError: they are not finite.
    """
    if not all(math.isfinite(angle) for angle in degrees):
        raise ValueError(f"--turn: expected degrees, got {degrees}")
    from scipy.spatial.transform import Rotation

    asset = source.asset.moved(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix())
    return Source(source.path, asset, scene_of(asset, source.path))


def format_for(path: Path, asset: Asset, options: WriteOptions) -> Format:
    """That with which to write `asset` to `path`.

    Raises:
        ValueError: the name's ending is not known or cannot be written, or the format does not heed one of the options.
    """
    formats = {end: form for end, form in FORMATS[asset.representation].items() if form.write is not None}
    end = ending(path, formats)
    if end is None:
        known = ", ".join(f"{end} ({form.about})" for end, form in formats.items())
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for {asset.noun}; expected one of {known}")
    unheeded = [n for n, value in vars(options).items() if value is not None and n not in formats[end].options]
    if unheeded:
        name = unheeded[0].replace("_", "-")
        raise ValueError(f"--{name} is of no use for {end}")
    return formats[end]


def write_checked(
    source: Source, path: Path, options: WriteOptions, *, sh_degree: int | None = None, is_verified: bool = True
) -> Written:
    """Write beside `path`, read back, render both, and give the file its name. Whatever was there stays until then.

    Args:
        source: what to write.
        path: folders that are missing are made.
        options: for the format.
        sh_degree: cut the harmonics to this degree, if they have more.
        is_verified: False does not render, only compares values.

    Raises:
        ValueError: the scene cannot be written in that format.
        OSError: the file could not be written, came back different or looks different.
    """
    form = format_for(path, source.asset, options)
    asset = source.asset
    if sh_degree is not None and sh_degree < asset.sh_degree:
        asset = asset.at_degree(sh_degree)
        source = Source(source.path, asset, scene_of(asset, source.path, frame=source.scene.frame))
    if form.is_folder and path.name.lower() in _IN_FOLDER:
        path = path.parent
    if form.is_folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file, expected a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        target = staging / ("files" if form.is_folder else path.name)
        assert form.write is not None
        try:
            words = form.write(target, asset, options)
        except (ValueError, OSError) as error:  # of a name that the user never gave
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(str(error).replace(str(target), str(path))) from error
        about = words or f"{len(asset):,} {asset.noun} of degree {min(asset.sh_degree, form.max_degree)}"
        written = Written(about, size_of(target), None, None, 0)
        if is_verified and form.read is not None:
            written = _verified(source, form, form.read(target), path, written)
        _settle(target, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return written


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; of a meta.json or lod-meta.json, those beside it too."""
    folder = path.parent if path.name.lower() in _IN_FOLDER else path
    if not folder.is_dir():
        return path.stat().st_size
    return sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())


def _settle(made: Path, path: Path) -> None:
    """Give it its name. In a folder that is there already, meta.json comes last: until then it speaks of the old files."""
    if not (made.is_dir() and path.is_dir()):
        os.replace(made, path)
        return
    for part in sorted(made.iterdir(), key=lambda part: part.name in _IN_FOLDER):
        if part.is_dir() and (path / part.name).is_dir():  # a folder replaces none that has files in it
            os.replace(path / part.name, made.parent / f"before-{part.name}")
        os.replace(part, path / part.name)


def _verified(source: Source, form: Format, again: Asset, path: Path, written: Written) -> Written:
    whole, views = verify(source.scene, again, path)
    held, asset = None, source.asset
    loses_flag = isinstance(asset, SplatAsset) and asset.antialiased and not form.holds_antialiased
    if asset.sh_degree > form.max_degree or loses_flag:
        able: Any = asset.at_degree(min(asset.sh_degree, form.max_degree))
        if loses_flag:
            able = replace(able, antialiased=False)
        kept = replace(scene_of(able, source.path, frame=source.scene.frame), run=source.scene.run)
        held = verify(replace(kept, background=source.scene.background), again, path)[0]
    if (whole if held is None else held) < form.floor:
        found = whole if held is None else held
        raise OSError(
            f"{path}: does not look like the scene when read back: {found:.1f} dB, at least {form.floor:.0f} expected; not kept"
        )
    return replace(written, psnr=whole, psnr_held=held, views=views)


def verify(scene: Scene, asset: Asset, path: Path) -> tuple[float, int]:
    """How much alike the scene and the file look.

    Args:
        scene: what was written.
        asset: what was read back from `path`.
        path: the file.

    Returns:
        PSNR in decibels over all pixels, 100 at most, and from how many cameras: test photographs' where the capture is at
        hand, else on a ring round the content.
    """
    # In the same frame: in another one the near plane is elsewhere, and large convexes that reach it come and go.
    again = scene_of(asset, path, frame=scene.frame)
    cameras = _some_cameras(scene)
    with torch.no_grad():
        pairs = [[render(s, camera, scene.background).rgb.clamp(0, 1) for s in (scene, again)] for camera in cameras]
    ours, theirs = (torch.cat([pair[i].reshape(-1, 3) for pair in pairs]) for i in (0, 1))
    return psnr(ours, theirs), len(cameras)


def _some_cameras(scene: Scene) -> list[Cameras]:
    if scene.run is not None:
        try:
            cameras = scene.cameras("test") or scene.cameras("train")
            return cameras[:: max(1, len(cameras) // _VIEWS)][:_VIEWS]
        except (ValueError, OSError):
            pass  # the capture was moved away: the scene itself tells where to look from
    return ring_cameras(scene.asset())


def ring_cameras(asset: Asset, count: int = _VIEWS) -> list[Cameras]:
    """On a ring round most of its content, looking inwards, 640x360."""
    frame = content_frame(asset)
    center, up = np.array(frame.center), np.array(frame.up) / np.linalg.norm(frame.up)
    flight = orbit(ring(center, up, 2.5 / frame.scale), center, up, math.radians(50), count)
    batch = flight.cameras(640, 360)
    return [batch[index] for index in range(count)]
