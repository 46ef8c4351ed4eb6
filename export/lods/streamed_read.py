"""Reading streamed SOG (see `streamed`): one level of detail, whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prismfield.export.assets import SplatAsset
from prismfield.export.lods.streamed import LOD_META
from prismfield.export.reading import json_object, naming
from prismfield.export.sog import sog_in
from prismfield.export.sog_files import META

_MAX_TEXT = 1 << 28
_MAX_NODES, _MAX_DEPTH, _MAX_FILES, _MAX_LEVELS = 1 << 20, 64, 1 << 16, 64


@dataclass(frozen=True)
class Run:
    """Gaussians that follow each other in a chunk."""

    file: int
    offset: int
    count: int


@dataclass(frozen=True)
class Manifest:
    """What lod-meta.json says, checked as far as it can be without the chunks."""

    filenames: list[str]
    levels: list[list[Run]]
    """Runs of each level, from fine to coarse, by file and offset; none overlaps another."""
    environment: str | None
    """A .sog that belongs to every level."""


def read_streamed(path: Path, level: int = 0) -> SplatAsset:
    """Read one level of detail, and what surrounds the scene.

    Args:
        path: lod-meta.json, or the folder that it is in.
        level: 0 is the finest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it, or there is no such level.
    """
    meta = path / LOD_META if path.is_dir() else path
    with naming(path):
        manifest = read_manifest(meta)
        if not 0 <= level < len(manifest.levels):
            raise ValueError(f"there is no level {level}, only 0 to {len(manifest.levels) - 1}")
        runs = manifest.levels[level]
        if not runs:
            raise ValueError(f"level {level} is empty")
        parts = []
        for file in sorted({run.file for run in runs}):
            name = manifest.filenames[file]
            chunk = _chunk(meta.parent, name)
            rows = []
            for run in (run for run in runs if run.file == file):
                if run.offset + run.count > len(chunk):
                    raise ValueError(
                        f"{name}: a run ends at {run.offset + run.count:,}, it has {len(chunk):,} Gaussians"
                    )
                rows.append(np.arange(run.offset, run.offset + run.count))
            parts.append(chunk.take(np.concatenate(rows)))
        if manifest.environment is not None:
            parts.append(_chunk(meta.parent, manifest.environment))
    return _together(parts)


def read_manifest(path: Path) -> Manifest:
    """Read lod-meta.json.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is wrong with it, without its name.
    """
    if (size := path.stat().st_size) > _MAX_TEXT:
        raise ValueError(f"{LOD_META} has {size:,} bytes")
    meta = json_object(path.read_bytes(), LOD_META)
    if meta.get("version", 1) != 1:
        raise ValueError(f"{LOD_META}: expected version 1, got {str(meta['version'])[:20]}")
    count = _integer(meta.get("lodLevels"), _MAX_LEVELS, "lodLevels")
    names = meta.get("filenames")
    if not isinstance(names, list) or len(names) > _MAX_FILES or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{LOD_META}: expected file names, {_MAX_FILES:,} at most")
    environment = meta.get("environment")
    if environment is not None and not isinstance(environment, str):
        raise ValueError(f"{LOD_META}: expected the name of a file in 'environment'")
    levels: list[list[Run]] = [[] for _ in range(count)]
    for node in _leaves(meta.get("tree")):
        for key, value in node.items():
            if not (key.isascii() and key.isdigit() and int(key) < count) or not isinstance(value, dict):
                raise ValueError(f"{LOD_META}: a leaf has a level {key[:20]!r}, there are {count}")
            file = _integer(value.get("file"), len(names) - 1, "file of a leaf")
            run = Run(
                file, _integer(value.get("offset"), 1 << 40, "offset"), _integer(value.get("count"), 1 << 40, "count")
            )
            if run.count:
                levels[int(key)].append(run)
    return Manifest(names, _checked(levels, meta.get("counts")), environment)


def _integer(value: Any, most: int, what: str) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{LOD_META}: {what}: expected 0 to {most:,}, got {str(value)[:20]}")
    return value


def _leaves(root: Any) -> list[dict[str, Any]]:
    """`lods` of each leaf of the tree."""
    found, open_nodes, seen = [], [(root, 0)], 0
    while open_nodes:
        node, depth = open_nodes.pop()
        seen += 1
        if seen > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(
                f"{LOD_META}: the tree has more than {_MAX_NODES:,} boxes, or more than {_MAX_DEPTH} in each other"
            )
        children = node.get("children", []) if isinstance(node, dict) else None
        lods = node.get("lods", {}) if isinstance(node, dict) else None
        if not isinstance(children, list) or not isinstance(lods, dict):
            raise ValueError(f"{LOD_META}: expected a tree of objects with 'children' or 'lods'")
        found.append(lods)
        open_nodes += [(child, depth + 1) for child in children]
    return found


def _checked(levels: list[list[Run]], counts: Any) -> list[list[Run]]:
    """Sorted. Whatever is in a chunk appears once, or a small file could ask for any amount of memory."""
    ordered = [sorted(runs, key=lambda run: (run.file, run.offset)) for runs in levels]
    everything = sorted((run for runs in levels for run in runs), key=lambda run: (run.file, run.offset))
    for before, after in zip(everything, everything[1:], strict=False):
        if before.file == after.file and before.offset + before.count > after.offset:
            raise ValueError(f"{LOD_META}: two runs share Gaussians of file {before.file}")
    totals = [sum(run.count for run in runs) for runs in ordered]
    if counts is not None and counts != totals:
        raise ValueError(f"{LOD_META}: the leaves hold {totals}, 'counts' says {str(counts)[:60]}")
    return ordered


def _chunk(folder: Path, name: str) -> SplatAsset:
    parts = name.split("/")
    is_inside = all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in parts)
    if not is_inside or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"the name {name!r} does not stay in its folder")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    try:
        return sog_in(path.parent if path.name == META else path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _together(parts: list[SplatAsset]) -> SplatAsset:
    """What they say of the whole is what the first says."""
    degree = max(part.sh_degree for part in parts)
    padded = [part.at_degree(degree) for part in parts]
    return replace(
        parts[0],
        means=np.concatenate([part.means for part in padded]),
        quats=np.concatenate([part.quats for part in padded]),
        scales=np.concatenate([part.scales for part in padded]),
        opacities=np.concatenate([part.opacities for part in padded]),
        sh=np.concatenate([part.sh for part in padded]),
    )
