"""Test PSNR over the minutes of a training, on the scenes of docs/results.md, each through the command a user types.

    python benchmarks/quality.py [--data FOLDER] [--only fox_40s ...] [--runs-folder FOLDER] [--list]

Writes one line a training to results/quality.json and draws results/quality.png beside the curves of OpenSplat. Time is that
of training steps alone, as for OpenSplat; the whole command's is given too. FOLDER holds the captures; by default
$PRISMFIELD_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE, PLOT = HERE / "results" / "quality.json", HERE / "results" / "quality.png"

TRAININGS = {
    "garden": "--scene garden",
    "lego": "--scene DATA/lego --steps 7000",
    "fox": "--scene DATA/fox --steps 7000",
    "dtu_scan65": "--scene DATA/dtu_scan65 --downscale 2 --steps 7000 --max-primitives 60000"
    " --data.cut-out --data.random-background --gaussians.means-lr 1.6e-4 --gaussians.means-lr-final 3e-6",
    "bonsai": "--scene DATA/bonsai --steps 7000",
    "fox_40s": "--scene DATA/fox --minutes 0.6666",
    "fox_40s_random": "--scene DATA/fox --minutes 0.6666 --data.points random",
    "bonsai_half_40s": "--scene DATA/bonsai --downscale 2 --minutes 0.6666",
    "fox_600s": "--scene DATA/fox --minutes 10",
    "fox_600s_random": "--scene DATA/fox --minutes 10 --data.points random",
    "bonsai_half_600s": "--scene DATA/bonsai --downscale 2 --minutes 10 --max-primitives 300000",
    "lego_60s_adc": "--scene DATA/lego --minutes 1",
    "lego_60s_mcmc": "--scene DATA/lego --minutes 1 --strategy mcmc",
    "fox_60s_adc": "--scene DATA/fox --minutes 1",
    "fox_60s_mcmc": "--scene DATA/fox --minutes 1 --strategy mcmc",
    "bonsai_half_60s_adc": "--scene DATA/bonsai --downscale 2 --minutes 1",
    "bonsai_half_60s_mcmc": "--scene DATA/bonsai --downscale 2 --minutes 1 --strategy mcmc",
}
"""Name to the options of render-train."""

OPENSPLAT = {
    "fox": {120: 22.74, 240: 25.11, 360: 25.94, 480: 26.44, 600: 26.72},
    "bonsai_half": {120: 19.46, 240: 23.90, 360: 24.71, 480: 25.13, 600: 25.34},
}
"""OpenSplat 1.1.5 on two CPU cores, same images and test views: seconds of training to dB."""


def train(options: str, data: Path, folder: Path, tests: int = 14) -> dict[str, Any]:
    """Run one training with these options of render-train, its test views measured so often on the way; what it reached."""
    words = options.split()
    command = [sys.executable, "-m", "prismfield.train.cli", *(word.replace("DATA", str(data)) for word in words)]
    began = time.monotonic()
    subprocess.run([*command, "--out", str(folder), "--log.tests", str(tests)], check=True)
    whole = time.monotonic() - began
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tests = [line for line in lines if "test/psnr" in line]
    report = (folder / "report.md").read_text()
    memory = re.search(r"peak memory \| (\d+) MiB(?: and (\d+) MiB on the GPU)?", report)
    computed = re.search(r"computed by \| (.*) \|", report)
    size = re.search(r"\| (primitives|parameters) \| ([\d,]+) \|", report)
    assert memory and computed and size
    return {
        "command": shlex.join(["render-train", *words]),
        "psnr": round(tests[-1]["test/psnr"], 2),
        "ssim": round(tests[-1]["test/ssim"], 4),
        "steps": tests[-1]["step"],
        "seconds": round(tests[-1]["seconds"], 1),
        "seconds_whole_command": round(whole, 1),
        size[1]: int(size[2].replace(",", "")),
        "peak_memory_mib": int(memory[1]),
        **({"peak_gpu_memory_mib": int(memory[2])} if memory[2] else {}),
        "computed_by": computed[1],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "curve": [[line["seconds"], round(line["test/psnr"], 2)] for line in tests],
    }


def draw(table: dict[str, Any]) -> None:
    """The curves of the two scenes that OpenSplat was measured on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharex=True, layout="constrained")
    titles = {"fox": "fox, 270x480, 7 test views", "bonsai_half": "bonsai, 400x266, 37 test views"}
    labels = {"_40s": "40 s budget", "_600s": "10 min budget", "": "7000 steps"}
    for panel, (scene, curve) in zip(panels, OPENSPLAT.items(), strict=True):
        for budget, label in labels.items():
            for points in ("", "_random"):
                if (run := table.get(f"{scene}{budget}{points}")) is not None:
                    style = ":" if points else "-"
                    end = ", random points" if points else ""
                    color = {"_40s": "tab:green", "_600s": "tab:blue", "": "tab:cyan"}[budget]
                    panel.plot(*zip(*run["curve"], strict=True), style, color=color, label=f"Prismfield, {label}{end}")
        panel.plot(list(curve), list(curve.values()), "o-", color="tab:red", label="OpenSplat 1.1.5")
        panel.set(title=titles[scene], xlabel="seconds of training (2 CPU cores)", ylabel="test PSNR, dB")
        panel.set_xscale("log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(loc="upper left", fontsize=8)
        panel.set_ylim(top=panel.get_ylim()[1] + 2.5)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Run the trainings that are asked for, one after the other."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--only", nargs="*", choices=list(TRAININGS), default=list(TRAININGS))
    parser.add_argument("--runs-folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the commands and the results so far")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    TABLE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in [] if options.list else options.only:
            runs = options.runs_folder or Path(temporary)
            table[name] = train(TRAININGS[name], options.data.resolve(), runs / name)
            ordered = {key: table[key] for key in TRAININGS if key in table}
            TABLE.write_text(json.dumps(ordered, indent=1) + "\n")
    for name, words in TRAININGS.items():
        run = table.get(name)
        reached = f"{run['psnr']:.2f} dB, {run['steps']} steps, {run['seconds']:.0f} s" if run else "not measured"
        print(f"{name:24s} {reached:36s} render-train {words}")
    draw(table)


if __name__ == "__main__":
    main()
