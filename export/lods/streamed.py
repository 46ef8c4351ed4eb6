"""Streamed SOG: levels of detail in pieces by place, of which a viewer fetches those that it needs.

`lod-meta.json` holds a tree of boxes. Each leaf says, for every level, which run of Gaussians of which chunk fills it; a chunk is
a .sog in a folder of its own (developer.playcanvas.com, Streamed SOG, version 1, and the files of splat-transform 3.7.0).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.lods.likeness import relative_errors
from prismfield.export.lods.merge import Level, build_levels, covariances_of, mean_areas
from prismfield.export.rows import morton_order
from prismfield.export.sog import write_sog

LOD_META = "lod-meta.json"
DEFAULT_CHUNK = 1 << 16
"""Gaussians in a chunk: one or two megabytes."""
_LEAF = 1 << 13  # Gaussians of the finest level in a leaf
_COARSEST = 10_000  # no level beyond the first that has so few
_MAX_LEVELS = 16
_MIN_CHUNK = 256

Longs = NDArray[np.int64]


@dataclass
class _Tree:
    """The levels, cut into leaves."""

    levels: list[Level]
    limit: int
    """Gaussians of the finest level in a leaf."""
    reach: list[tuple[NDArray, NDArray]]
    """For each level [N, 3] and [N, 3]: corners of boxes round each Gaussian, one standard deviation away."""
    leaves: list[list[Longs]] = field(default_factory=list)
    """Rows of each level, in the order of the tree."""

    def node(self, rows: list[Longs]) -> dict[str, Any]:
        """The box with these rows of each level, and those in it."""
        if len(rows[0]) > self.limit:
            children = [self.node(half) for half in self._halves(rows)]
            bounds = [child["bound"] for child in children]
            low = np.min([bound["min"] for bound in bounds], 0)
            high = np.max([bound["max"] for bound in bounds], 0)
            return {"bound": {"min": low.tolist(), "max": high.tolist()}, "children": children}
        low = np.min([lo[r].min(0) for (lo, _), r in zip(self.reach, rows, strict=True) if len(r)], 0)
        high = np.max([hi[r].max(0) for (_, hi), r in zip(self.reach, rows, strict=True) if len(r)], 0)
        sorted_rows = [
            r[morton_order(level.asset.means[r])] if len(r) else r for level, r in zip(self.levels, rows, strict=True)
        ]
        self.leaves.append(sorted_rows)
        parts = [level.asset.take(r) if len(r) else None for level, r in zip(self.levels, sorted_rows, strict=True)]
        return {
            "bound": {"min": low.tolist(), "max": high.tolist()},
            "lods": {},
            "errors": relative_errors(parts, low, high),
            "distances": [_distance(level, r) for level, r in zip(self.levels, sorted_rows, strict=True)],
        }

    def _halves(self, rows: list[Longs]) -> tuple[list[Longs], list[Longs]]:
        """Cut across the longest side, so that half of the finest level is on either side."""
        places = self.levels[0].asset.means[rows[0]]
        axis = int(np.ptp(places, 0).argmax())
        order = np.argsort(places[:, axis], kind="stable")
        middle = len(order) // 2
        plane = places[order[middle], axis]
        left, right = [rows[0][order[:middle]]], [rows[0][order[middle:]]]
        for level, some in zip(self.levels[1:], rows[1:], strict=True):
            is_left = level.asset.means[some, axis] < plane
            left.append(some[is_left])
            right.append(some[~is_left])
        return left, right


def _distance(level: Level, rows: Longs) -> float:
    """Root mean square of `Level.errors`, by what each Gaussian covers."""
    asset = level.asset
    weights = asset.opacities[rows] * mean_areas(asset.scales[rows].astype(np.float64)) + 1e-30
    return (
        float(np.sqrt((weights * np.square(level.errors[rows].astype(np.float64))).sum() / weights.sum()))
        if len(rows)
        else 0.0
    )


def default_levels(count: int) -> int:
    """How many levels `count` Gaussians have: down to 10,000 of them or fewer."""
    levels = 1
    while count > _COARSEST and levels < _MAX_LEVELS:
        count, levels = -(-count // 4), levels + 1
    return levels


def write_streamed(
    path: Path,
    asset: SplatAsset,
    levels: int | None = None,
    chunk: int | None = None,
    palette_size: int | None = None,
) -> str:
    """Build levels of detail and write them to a new folder. Each chunk is read back and compared as a .sog is.

    Args:
        path: the folder.
        asset: what to write, the finest level.
        levels: how many, with the finest; None: see `default_levels`.
        chunk: how many Gaussians a chunk has at most; None for 65,536.
        palette_size: of the harmonics of each chunk, see `write_sog`.

    Returns:
        What is in the folder, in words.

    Raises:
        ValueError: the asset is empty, or a number is out of range.
        OSError: a file could not be written, or came back different.
    """
    if len(asset) == 0:
        raise ValueError(f"{path}: there is nothing to write, the scene has no {asset.noun}")
    if levels is not None and not 1 <= levels <= _MAX_LEVELS:
        raise ValueError(f"expected 1 to {_MAX_LEVELS} levels, got {levels}")
    if chunk is not None and chunk < _MIN_CHUNK:
        raise ValueError(f"expected chunks of at least {_MIN_CHUNK} Gaussians, got {chunk}")
    most = chunk or DEFAULT_CHUNK
    made = build_levels(asset, levels or default_levels(len(asset)))
    tree = _Tree(made, min(_LEAF, most), [_boxes(level.asset) for level in made])
    root = tree.node([np.arange(len(level.asset)) for level in made])
    names, chunks = _place(tree, _leaf_nodes(root), most)
    path.mkdir()
    for (level, rows), name in zip(chunks, names, strict=True):
        write_sog((path / name).parent, made[level].asset.take(np.concatenate(rows)), palette_size, is_ordered=True)
    counts = [len(level.asset) for level in made]
    meta: dict[str, Any] = {
        "version": 1,
        "asset": {"generator": "prismfield", "chunkGaussians": most},
        "count": sum(counts),
        "counts": counts,
        "lodLevels": len(made),
        "lodErrors": True,
        "filenames": names,
        "tree": root,
    }
    (path / LOD_META).write_text(json.dumps(_rounded(meta), separators=(",", ":")))
    coarser = f", coarser levels of {', '.join(f'{n:,}' for n in counts[1:])}" if len(counts) > 1 else ""
    degree = f"{len(asset):,} {asset.noun} of degree {asset.sh_degree}"
    return f"{degree}{coarser}, in {len(tree.leaves):,} boxes and {len(names):,} chunks"


def _boxes(asset: SplatAsset) -> tuple[NDArray, NDArray]:
    covariances = covariances_of(asset.quats.astype(np.float64), asset.scales.astype(np.float64))
    sigmas = np.sqrt(covariances[:, [0, 3, 5]])
    return asset.means - sigmas, asset.means + sigmas


def _leaf_nodes(node: dict[str, Any]) -> list[dict[str, Any]]:
    """In the order in which the tree was built."""
    return [leaf for child in node["children"] for leaf in _leaf_nodes(child)] if "children" in node else [node]


def _place(tree: _Tree, nodes: list[dict[str, Any]], most: int) -> tuple[list[str], list[tuple[int, list[Longs]]]]:
    """Say in each leaf where its runs are: names of the chunks, and the level and rows of each. Coarse levels come first."""
    names: list[str] = []
    chunks: list[tuple[int, list[Longs]]] = []
    for level in reversed(range(len(tree.levels))):
        filled, of_level = most, 0  # as if one before were full
        for node, leaf in zip(nodes, tree.leaves, strict=True):
            rows = leaf[level]
            if not len(rows):
                continue
            if filled + len(rows) > most:
                names.append(f"{level}_{of_level}/meta.json")
                chunks.append((level, []))
                filled, of_level = 0, of_level + 1
            node["lods"][str(level)] = {"file": len(names) - 1, "offset": filled, "count": len(rows)}
            chunks[-1][1].append(rows)
            filled += len(rows)
    for node in nodes:
        node["lods"] = dict(sorted(node["lods"].items(), key=lambda item: int(item[0])))
    return names, chunks


def _rounded(value: Any) -> Any:
    """Numbers with the seven digits that single precision has."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
