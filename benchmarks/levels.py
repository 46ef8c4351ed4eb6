"""Levels of detail: how alike each level looks, how long it takes, and a picture to look at.

    python benchmarks/levels.py SCENE [SCENE ...] [--levels 4] [--picture levels.jpg] [--times 7]

A scene is a file of Gaussians or a run's folder. PSNR is between a level and all Gaussians, both antialiased, from some test
cameras of a run or from a ring: at the pictures' own size, and at 1/2, 1/4, ... of it, as from 2, 4, ... times as far. Beside the
package's rule stands the blind one: neighbours along a Z-order curve become one. `--times N` merges N copies of the scene beside
each other, to see how time grows. Seconds are of the CPU, one run, one thread. The picture is of the first scene.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prismfield.export.assets import SplatAsset
from prismfield.export.convert import Source, open_source, ring_cameras
from prismfield.export.library import render, scene_of
from prismfield.export.lods import merge
from prismfield.export.rows import morton_order
from prismfield.render.cameras import Cameras
from prismfield.train.metrics import psnr


def blind_levels(asset: SplatAsset, count: int) -> list[SplatAsset]:
    """Levels made of neighbours along a Z-order curve."""
    levels = [replace(asset, extra={})]
    for _ in range(count - 1):
        asset = levels[-1]
        for _ in range(2):
            splats = merge._Splats.of(asset.take(morton_order(asset.means)))
            first = np.arange(0, len(asset) - 1, 2)
            asset = merge._merged(splats, splats.weights, first, first + 1).level(asset).asset
        levels.append(asset)
    return levels


def drawn(source: Source, asset: SplatAsset, cameras: list[Cameras], shrink: int) -> list[Tensor]:
    """[H, W, 3] each, antialiased."""
    scene = scene_of(replace(asset, antialiased=True), source.path, frame=source.scene.frame)
    small = [c.resized(c.width // shrink, c.height // shrink) for c in cameras]
    with torch.no_grad():
        return [render(scene, c, source.scene.background).rgb[0].clamp(0, 1) for c in small]


def likeness(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """PSNR over all pixels, decibels."""
    a, b = (torch.cat([picture.reshape(-1, 3) for picture in pictures]) for pictures in (ours, theirs))
    return f"{psnr(a, b):.1f}"


def measure(source: Source, cameras: list[Cameras], count: int, console: Console) -> list[SplatAsset]:
    """Print a table of a scene; its levels."""
    asset = source.asset
    assert isinstance(asset, SplatAsset)
    start = time.process_time()
    ours = [level.asset for level in merge.build_levels(asset, count)]
    seconds = time.process_time() - start
    table = Table("level", "Gaussians", *(f"1/{1 << k} of the size" for k in range(count)), "at 1/2^level, blind")
    blind = blind_levels(asset, len(ours))
    whole = [drawn(source, asset, cameras, 1 << k) for k in range(count)]
    for k, level in enumerate(ours[1:], 1):
        cells = [likeness(drawn(source, level, cameras, 1 << s), whole[s]) for s in range(count)]
        beside = likeness(drawn(source, blind[k], cameras, 1 << k), whole[k])
        table.add_row(str(k), f"{len(level):,}", *cells, beside)
    console.print(f"{source.path}: {len(asset):,} Gaussians, {len(ours) - 1} levels in {seconds:.1f} s")
    console.print(table)
    return ours


def picture(source: Source, levels: list[SplatAsset], camera: Cameras, path: Path) -> None:
    """Above: levels 0, 1, 2. Below, at half and at a quarter of the size: all Gaussians, then the level that is enough there."""
    top = torch.cat([drawn(source, level, [camera], 1)[0] for level in levels[:3]], 1)
    small = [drawn(source, levels[k], [camera], s)[0] for k, s in ((0, 2), (1, 2), (0, 4), (2, 4))]
    below = torch.ones(small[0].shape[0], top.shape[1], 3)
    left = (top.shape[1] - sum(x.shape[1] for x in small) - 3 * 8) // 2
    for x in small:
        below[: x.shape[0], left : left + x.shape[1]] = x
        left += x.shape[1] + 8
    whole = torch.cat([top, torch.ones(8, top.shape[1], 3), below])
    Image.fromarray((whole.numpy() * 255).round().astype(np.uint8)).save(path, quality=85)


def beside_each_other(asset: SplatAsset, times: int) -> SplatAsset:
    """Copies along x, not overlapping."""
    rows = np.tile(np.arange(len(asset)), times)
    copies = asset.take(rows)
    shifts = np.repeat(np.arange(times), len(asset)) * np.ptp(asset.means[:, 0]) * 1.1
    return replace(copies, means=copies.means + np.stack([shifts, 0 * shifts, 0 * shifts], 1).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--times", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    for number, path in enumerate(options.scenes):
        source = open_source(path)
        assert isinstance(source.asset, SplatAsset)
        cameras = source.scene.cameras("test") if source.scene.run is not None else ring_cameras(source.asset)
        levels = measure(source, cameras[:: max(1, len(cameras) // 3)], options.levels, console)
        if options.picture and number == 0:
            picture(source, levels, cameras[0], options.picture)
        if options.times:
            many = beside_each_other(source.asset, options.times)
            start = time.process_time()
            made = merge.build_levels(many, options.levels)
            console.print(f"{len(many):,}: {len(made) - 1} levels in {time.process_time() - start:.1f} s of the CPU")


if __name__ == "__main__":
    main()
