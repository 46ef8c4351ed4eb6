"""How small Gaussians get and what that costs, through the command a user types, and how fast a million are coded.

    python benchmarks/compress.py [--data FOLDER] [--run FOLDER] [--runs FOLDER] [--only NAME ...]

Writes results/compress.json. FOLDER of the data holds the assets; by default $PRISMFIELD_SHARED/data. Without --run, the bundled
garden is trained for a minute first; --runs holds whole trainings (garden, lego, bonsai, garden5), for the cases of those. Times are of this machine as it was, with the processor time beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TABLE = HERE / "results" / "compress.json"
MILLION = 1_000_000

CASES = {
    "garden_1min": "RUN",
    "garden_1min_finer": "RUN --steps 0.6",
    "garden_1min_pruned": "RUN --prune 0.3",
    "flowers": "DATA/splats/flowers_lod3_inria.ply",
    "flowers_finer": "DATA/splats/flowers_lod3_inria.ply --steps 0.6",
    "flowers_36db": "DATA/splats/flowers_lod3_inria.ply --target-psnr 36",
    "flowers_finetuned": "DATA/splats/flowers_lod3_inria.ply --finetune-steps 300",
}
"""Name to the words of render-compress."""
WHOLE = {
    **{f"{name}_finetuned": f"{name} --finetune-steps 500" for name in ("garden", "lego", "bonsai", "garden5")},
    **{
        f"{name}_thinned": f"{name} --finetune-steps 500 --prune 0.3"
        for name in ("garden", "lego", "bonsai", "garden5")
    },
    **{
        f"{name}_control": f"{name} --finetune-steps 500 --finetune-rate 0 --steps 0.1"
        for name in ("garden", "lego", "bonsai", "garden5")
    },
}
"""The same of runs that are trained already, fine-tuned; controls are trained on with steps that hardly round."""


def measure(words: str, folder: Path) -> dict[str, Any]:
    """Run one command; its numbers."""
    arguments = [*words.split(), "--to", str(folder / "a.pfz"), "--json", str(folder / "a.json")]
    subprocess.run([sys.executable, "-m", "prismfield.export.compression.cli", *arguments], check=True)
    return json.loads((folder / "a.json").read_text())


def million(path: Path) -> dict[str, Any]:
    """A million Gaussians, copies of an asset side by side: the times of encoding and decoding."""
    from prismfield.export.assets import SplatAsset
    from prismfield.export.compression.compress import ratio
    from prismfield.export.compression.pfz import decode_pfz
    from prismfield.export.compression.pfz_grid import PfzSteps
    from prismfield.export.compression.pfz_write import encode_pfz
    from prismfield.export.ply import read_ply
    from prismfield.render.sort_grid import sort_grid
    from prismfield.train.cli import use_threads
    from prismfield.train.report import peak_memory

    threads = use_threads(0)
    one = read_ply(path)
    rows = np.arange(MILLION) % len(one)
    aside = (np.arange(MILLION) // len(one))[:, None] * np.array([[np.ptp(one.means[:, 0]), 0, 0]])
    rest = {name: getattr(one, name)[rows] for name in ("quats", "scales", "opacities", "sh")}
    asset = SplatAsset((one.means[rows] + aside).astype(np.float32), **rest)
    times: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        began, used = time.perf_counter(), time.process_time()
        result = work()
        times[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
        times[f"{name}_processor_seconds"] = round(time.process_time() - used, 2)
        return result

    data = timed("encode", lambda: encode_pfz(asset, PfzSteps()))
    back = timed("decode", lambda: decode_pfz(data))
    features = np.concatenate([asset.means, asset.log_scales, asset.sh[:, 0], asset.opacities[:, None]], 1)
    timed("sort_grid", lambda: sort_grid(features / features.std(0), 1000))
    numbers = {"gaussians": len(back), "bytes": len(data), "ratio": ratio(asset, len(data)), "threads": threads}
    return numbers | times | {"peak_memory_mib": peak_memory() / 2**20}


def main() -> None:
    """Measure what was asked for, and write the table."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", HERE.parent.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--run", type=Path, help="of the garden, trained already")
    parser.add_argument("--runs", type=Path, help="trainings of whole scenes, for the cases of those")
    parser.add_argument("--only", nargs="*", choices=[*CASES, *WHOLE, "million"], default=[*CASES, "million"])
    options = parser.parse_args()
    if options.runs is None and any(name in WHOLE for name in options.only):
        parser.error("--runs is needed for " + ", ".join(name for name in options.only if name in WHOLE))
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = options.run or folder / "garden"
        if options.run is None and any(CASES.get(name, "").startswith("RUN") for name in options.only):
            words = ["--scene", "garden", "--minutes", "1", "--out", str(run)]
            subprocess.run([sys.executable, "-m", "prismfield.train.cli", *words], check=True)
        for name in sorted(
            options.only, key=lambda name: name == "million"
        ):  # a command's peak memory starts at its parent's
            if name == "million":
                found = million(options.data / "splats" / "flowers_lod3_inria.ply")
            elif name in WHOLE:
                found = measure(str(options.runs / WHOLE[name]), folder)
            else:
                found = measure(CASES[name].replace("RUN", str(run)).replace("DATA", str(options.data)), folder)
            machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
            table[name] = found | {"machine": machine, "load": round(os.getloadavg()[0], 1)}
            TABLE.parent.mkdir(exist_ok=True)
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
