"""Test PSNR over the minutes of a training, of every radiance field on every scene of docs/results.md.

    python benchmarks/fields.py [--data FOLDER] [--scenes lego ...] [--kinds hash ...] [--runs-folder FOLDER] [--list]

Each training is the command that a user types. Writes one line a training to results/fields.json and draws
results/fields.png. Time is that of training steps alone; the whole command's is given too. FOLDER holds the captures; by
default $PRISMFIELD_SHARED/data.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from quality import train

from prismfield.representations.config import TRAINED_BY

HERE = Path(__file__).resolve().parent
TABLE, PLOT = HERE / "results" / "fields.json", HERE / "results" / "fields.png"
KINDS = [name for name, strategies in TRAINED_BY.items() if "occupancy" in strategies]
SCENES = {
    "garden": ("--scene garden --minutes 1.5", "garden, 480x320"),
    "lego": ("--scene DATA/lego --minutes MINUTES", "lego, 400x400"),
    "fox": ("--scene DATA/fox --minutes 1.5", "fox, 270x480"),
    "bonsai": ("--scene DATA/bonsai --downscale 4 --minutes 1.5", "bonsai, 200x133"),
}
"""Options of render-train, and a title."""
LEGO_MINUTES = {"hash": "5", "simplex": "5"}
"""The others: 2."""
TESTS = 3
"""Of the test views on the way."""


def draw(table: dict[str, Any]) -> None:
    """The curves of all scenes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, (scene, (_, title)) in zip(panels.flat, SCENES.items(), strict=True):
        for kind in KINDS:
            if (run := table.get(f"{scene}_{kind}")) is not None:
                panel.plot(*zip(*run["curve"], strict=True), "o-", markersize=3, label=kind)
        panel.set(title=title, xlabel="seconds of training (2 CPU cores)", ylabel="test PSNR, dB")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    """Run the trainings that are asked for, one after the other."""
    shared = Path(os.environ.get("PRISMFIELD_SHARED", "../shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--scenes", nargs="*", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--runs-folder", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the results so far and draw them")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    names = [(scene, kind) for scene in SCENES for kind in KINDS]
    with tempfile.TemporaryDirectory() as temporary:
        for scene, kind in [] if options.list else names:
            if scene not in options.scenes or kind not in options.kinds:
                continue
            words = SCENES[scene][0].replace("MINUTES", LEGO_MINUTES.get(kind, "2"))
            folder = (options.runs_folder or Path(temporary)) / f"{scene}_{kind}"
            table[f"{scene}_{kind}"] = train(f"{words} --representation {kind}", options.data.resolve(), folder, TESTS)
            ordered = {f"{a}_{b}": table[f"{a}_{b}"] for a, b in names if f"{a}_{b}" in table}
            TABLE.write_text(json.dumps(ordered, indent=1) + "\n")
    for scene, kind in names:
        run = table.get(f"{scene}_{kind}")
        reached = f"{run['psnr']:.2f} dB, {run['steps']} steps, {run['seconds']:.0f} s" if run else "not measured"
        print(f"{scene:8s} {kind:10s} {reached}")
    draw(table)


if __name__ == "__main__":
    main()
