"""File formats: size and likeness of each, ours beside splat-transform's, on the same splats.

    python benchmarks/formats.py SCENE [SCENE ...] [--splat-transform PROGRAM] [--peer-iterations 10] [--out results/formats.json]

A scene is a file of splats or a run's folder. Each is written in every format by the package and, from an INRIA .ply of the same
splats, by splat-transform where there is one; both files are read by the package and drawn beside the scene, from the test
cameras of a run or from six on a ring. PSNR is over all pixels; PSNR of the format is to the scene as far as the format can hold
it (.splat has no harmonics above degree 0). Results join those in the file. Seconds are of the CPU, one run: writing includes reading back and comparing values.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prismfield.export.assets import SplatAsset
from prismfield.export.convert import open_source, ring_cameras, size_of
from prismfield.export.formats import FORMATS, WriteOptions, ending, read_asset
from prismfield.export.library import Scene, render, scene_of
from prismfield.export.ply import write_ply
from prismfield.render.cameras import Cameras
from prismfield.train.metrics import psnr


@dataclass(frozen=True)
class Kind:
    """A way to write."""

    name: str
    file: str
    options: WriteOptions
    words: tuple[str, ...] | None = ()
    """For splat-transform; None where it does not write the same."""


KINDS = [
    Kind(".ply", "a.ply", WriteOptions()),
    Kind(".glb", "a.glb", WriteOptions()),
    Kind(".compressed.ply", "a.compressed.ply", WriteOptions()),
    Kind(".sog", "a.sog", WriteOptions()),
    Kind(".sog, palette of 65,536", "b.sog", WriteOptions(sog_palette=1 << 16), None),
    Kind(".spz 3, harmonics of 8 bits", "b.spz", WriteOptions(spz_sh_bits=(8, 8)), None),
    Kind(".spz 3", "c.spz", WriteOptions(), ("--spz-version", "3")),
    Kind(".spz 4", "d.spz", WriteOptions(spz_version=4), ("--spz-version", "4")),
    Kind(".splat", "a.splat", WriteOptions(), None),
    Kind(".pfz", "a.pfz", WriteOptions(), None),
]


def pictures(scene: Scene, cameras: list[Cameras]) -> torch.Tensor:
    """All pixels from all cameras, [P, 3]."""
    with torch.no_grad():
        drawn = [render(scene, camera, scene.background).rgb.clamp(0, 1).reshape(-1, 3) for camera in cameras]
    return torch.cat(drawn)


def measure_scene(path: Path, program: list[str] | None, limit: float, folder: Path) -> dict[str, Any]:
    """Every way to write the splats in `path`."""
    source = open_source(path)
    asset, background = source.asset, source.scene.background
    assert isinstance(asset, SplatAsset)
    run_cameras = source.scene.cameras("test") if source.scene.run is not None else []
    cameras = run_cameras[:: max(1, len(run_cameras) // 6)][:6] or ring_cameras(asset, 6)
    frame = source.scene.frame

    def drawn(splats: SplatAsset) -> torch.Tensor:
        scene = scene_of(splats, path, frame=frame)
        object.__setattr__(scene, "background", background)
        return pictures(scene, cameras)

    whole, without = drawn(asset), drawn(asset.at_degree(0))
    write_ply(folder / "source.ply", asset)
    found: dict[str, Any] = {}
    for kind in KINDS:
        form = FORMATS["gaussians"][str(ending(Path(kind.file), FORMATS["gaussians"]))]
        target = folder / kind.file
        assert form.write is not None and form.read is not None
        times = [time.process_time()]
        form.write(target, asset, kind.options)
        times.append(time.process_time())
        again = form.read(target)
        times.append(time.process_time())
        assert isinstance(again, SplatAsset)
        picture = drawn(again)
        entry: dict[str, Any] = {
            "bytes": size_of(target),
            "psnr": round(psnr(picture, whole), 2),
            "psnr_of_format": round(psnr(picture, without if form.max_degree == 0 else whole), 2),
            "write_seconds": round(times[1] - times[0], 2),
            "read_seconds": round(times[2] - times[1], 2),
        }
        if program is not None and kind.words is not None:
            entry["splat_transform"] = peer(program, kind, limit, folder, drawn, whole)
        found[kind.name] = entry
    return {"splats": len(asset), "degree": asset.sh_degree, "cameras": len(cameras), "formats": found}


def peer(program: list[str], kind: Kind, limit: float, folder: Path, drawn: Any, whole: torch.Tensor) -> dict[str, Any]:
    """The same by splat-transform."""
    target = folder / f"peer_{kind.file}"
    words = [*program, "-w", "-g", "cpu", *(kind.words or ()), str(folder / "source.ply"), str(target)]
    before = os.times()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    after = os.times()
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1:] or ["failed"]}
    again = read_asset(target)
    assert isinstance(again, SplatAsset)
    if target.suffix == ".glb":  # turned half round about z, not as ours would be
        again = again.moved(torch.diag(torch.tensor([-1.0, -1, 1])).numpy())
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    likeness = round(psnr(drawn(again), whole), 2)
    return {"bytes": size_of(target), "psnr": likeness, "seconds": round(seconds, 2)}


def show(name: str, result: dict[str, Any]) -> Table:
    """One scene's results."""
    table = Table(title=f"{name}: {result['splats']:,} splats of degree {result['degree']}, {result['cameras']} views")
    for column in ("format", "bytes", "ratio", "PSNR", "write s", "read s", "peer bytes", "peer PSNR", "peer s"):
        table.add_column(column, justify="left" if column == "format" else "right")
    plain = result["formats"][".ply"]["bytes"]
    for kind, entry in result["formats"].items():
        other = entry.get("splat_transform") or {}
        own = [f"{entry['bytes']:,}", f"{plain / entry['bytes']:.1f}", f"{entry['psnr']:.1f}"]
        own += [f"{entry['write_seconds']:.1f}", f"{entry['read_seconds']:.1f}"]
        peers = (
            [f"{other['bytes']:,}", f"{other['psnr']:.1f}", f"{other['seconds']:.1f}"] if "bytes" in other else [""] * 3
        )
        table.add_row(kind, *own, *peers)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", nargs="+", type=Path)
    parser.add_argument("--splat-transform", default=shutil.which("splat-transform"))
    parser.add_argument("--peer-iterations", type=int, default=10, help="of its k-means; 10 is its default")
    parser.add_argument("--peer-limit", type=float, default=900, help="seconds by the clock for one of its conversions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "formats.json")
    options = parser.parse_args()
    program = None
    if options.splat_transform is not None:
        program = [options.splat_transform, "-i", str(options.peer_iterations)]
    version = None
    if program is not None:
        said = subprocess.run([program[0], "--version"], capture_output=True, text=True)
        version = (said.stdout + said.stderr).strip() or None
    for path in options.scenes:
        with tempfile.TemporaryDirectory() as folder:
            result = measure_scene(path, program, options.peer_limit, Path(folder))
        Console(width=max(120, Console().width)).print(show(path.stem, result))
        result |= {"peer": version, "peer_iterations": options.peer_iterations}
        before = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps(before | {path.stem: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
