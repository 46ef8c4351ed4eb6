"""How small radiance fields get and what that costs against the test photographs, at several settings of render-compress.

    python benchmarks/compress_fields.py NAME=RUN ... [--views N] [--downscale D] [--settings SETTING ...] [--pictures FOLDER]

Writes results/compress_fields.json, a row for each NAME and setting. What matters of a field is measured once for all its settings. PSNR is the mean over N evenly
chosen test photographs, shrunk D times beside what the run was trained on. Times are of this machine as it was, with the processor time beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismfield.datasets.views import Views
from prismfield.export.compression.compress import seeing_cameras
from prismfield.export.compression.field_compress import single_bytes
from prismfield.export.compression.field_importance import importance
from prismfield.export.compression.field_pfz import FieldAsset, decode_field
from prismfield.export.compression.field_pfz_write import Tables, encode_field
from prismfield.export.compression.field_quantise import Quantiser, asset_of_field
from prismfield.export.library import Scene, load
from prismfield.representations.base import Representation
from prismfield.train.cli import use_threads
from prismfield.train.evaluate import ViewResult, evaluate_views, mean_scores, write_image
from prismfield.train.metrics import psnr

TABLE = Path(__file__).resolve().parent / "results" / "compress_fields.json"
SETTINGS = {
    "steps 1": lambda q: q.by_distortion(1.0),
    "steps 1, no drop": lambda q: q.by_distortion(1.0, drop=False),
    "steps 2": lambda q: q.by_distortion(2.0),
    "bits 8": lambda q: q.by_bits(8),
    "bits 8, no drop": lambda q: q.by_bits(8, drop=False),
    "bits 6": lambda q: q.by_bits(6),
    "bits 6, no drop": lambda q: q.by_bits(6, drop=False),
    "bits 4": lambda q: q.by_bits(4),
    "bits 4, no drop": lambda q: q.by_bits(4, drop=False),
}


def measure(name: str, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every setting on one run."""
    scene = load(run)
    assert scene.run is not None
    asset = asset_of_field(scene)
    field = asset.field()
    cameras = [scene.frame.cameras_to_scene(camera) for camera in seeing_cameras(scene)]
    began, used = time.perf_counter(), time.process_time()
    quantiser = Quantiser(field, asset, importance(field, cameras))
    looking = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - used}
    original = _results(scene.representation, scene, options)
    rows: dict[str, Any] = {}
    for setting in options.settings:
        round_tables = SETTINGS[setting]
        rows[setting] = _measure(asset, lambda f=round_tables: f(quantiser), scene, original, options)
        print(name, setting, json.dumps(rows[setting]), flush=True)
        if options.pictures:
            pictures = torch.cat([torch.cat([a.rgb, b.rgb], 1) for a, b in zip(original, options.drawn, strict=True)])
            write_image(options.pictures / f"{name}_{setting.replace(' ', '_').replace(',', '')}.png", pictures)
    return {
        "representation": asset.representation,
        "numbers": len(asset),
        "bytes_single": single_bytes(asset),
        "original": mean_scores(original),
        "views": len(original),
        "size": [original[0].rgb.shape[1], original[0].rgb.shape[0]],
        "what_matters": looking,
        "settings": rows,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "load": round(os.getloadavg()[0], 1),
    }


def _measure(
    asset: FieldAsset, round_tables: Any, scene: Scene, original: list[ViewResult], options: argparse.Namespace
) -> dict[str, Any]:
    began = time.process_time()
    tables: Tables = round_tables()
    data = encode_field(asset, tables)
    encoded = time.process_time()
    back = decode_field(data)
    decoded = time.process_time()
    options.drawn = _results(back.field(), scene, options)
    scores, before = mean_scores(options.drawn), mean_scores(original)
    ours, theirs = (torch.cat([r.rgb.reshape(-1, 3) for r in each]) for each in (options.drawn, original))
    return {
        "bytes": len(data),
        "ratio": round(single_bytes(asset) / len(data), 1),
        "bits_each": round(8 * len(data) / len(asset), 2),
        "psnr_to_original": round(psnr(ours, theirs), 2),
        "psnr_change": round(scores["psnr"] - before["psnr"], 3),
        "ssim_change": round(scores["ssim"] - before["ssim"], 4),
        "encode_processor_seconds": round(encoded - began, 2),
        "decode_processor_seconds": round(decoded - encoded, 2),
        "zero": round(float(np.mean([np.mean(s == 0) for levels in tables.values() for _, s in levels[-4:]])), 3),
    }


def _results(representation: Representation, scene: Scene, options: argparse.Namespace) -> list[ViewResult]:
    run = scene.run
    assert run is not None
    views = Views(run.data.test, downscale=run.config.downscale * options.downscale, scale=run.frame.scale)
    indices = sorted({int(i) for i in np.linspace(0, len(views) - 1, options.views).round()})
    return list(evaluate_views(representation, views, scene.background, indices=indices))


def main() -> None:
    """Measure each run, and add it to the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=RUN")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--downscale", type=int, default=1)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    use_threads(0)
    for words in options.runs:
        name, _, run = words.partition("=")
        found = measure(name, Path(run), options)
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(table | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
