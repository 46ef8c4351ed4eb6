"""What every representation can be used for once it is trained: measured, filmed, and looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismfield.datasets.views import Views
from prismfield.representations.base import REPRESENTATIONS
from prismfield.train.run import load_run
from prismfield.viewer import pace
from prismfield.viewer.live import LiveViewer, free_port

from . import test_fields, test_resume
from .commands import trained_once
from .live_client import LiveClient
from .test_live_view import canvas, drive
from .test_video import read_video

_USE = """
import sys
from pathlib import Path
from prismfield.train.eval_cli import EvalConfig
from prismfield.train.evaluation import evaluate_run
from prismfield.train.video_cli import VideoConfig, film

for run in map(Path, sys.argv[2:]):
    out = Path(sys.argv[1]) / run.name
    out.mkdir()
    evaluate_run(EvalConfig(run, json=out / "eval.json", sheet=out / "eval.png"))
    film(VideoConfig(run, out=out / "video.mp4", seconds=0.2, fps=10, width=32))
"""


def run_of(kind: str, factory: pytest.TempPathFactory) -> Path:
    """A short training, which other tests use too."""
    if kind in test_fields.FIELDS:
        return trained_once(factory, f"field_{kind}", *test_fields.words_of(kind))
    strategy = {"gaussians": "adc", "convexes": "split"}[kind]
    return trained_once(factory, f"resume_{strategy}", *test_resume.words_of(strategy))


def test_it_is_measured_and_filmed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """As render-eval and render-video do it, without the start of a process for each."""
    runs = [run_of(kind, tmp_path_factory) for kind in REPRESENTATIONS]
    done = subprocess.run([sys.executable, "-c", _USE, tmp_path, *runs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for run in runs:
        report = (run / "report.md").read_text()
        numbers = json.loads((tmp_path / run.name / "eval.json").read_text())
        assert f"| test PSNR | {numbers['psnr']:.2f} dB |" in report
        assert (tmp_path / run.name / "eval.png").stat().st_size > 1000
        about, frames = read_video(tmp_path / run.name / "video.mp4")
        assert about["size"][0] == 32 and len(frames) == 2 and frames.std() > 5


@pytest.mark.parametrize("kind", list(REPRESENTATIONS))
def test_the_live_view_shows_it(
    kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "BLOCK_SECONDS", 60.0)
    run = load_run(run_of(kind, tmp_path_factory))
    views = Views(run.data.train, downscale=16), Views(run.data.test, downscale=16)
    scene: Any = run.scene
    viewer = LiveViewer(kind, scene, run.data, *views, port=free_port("127.0.0.1", 18500))
    try:
        with LiveClient(viewer.port, width=60, height=40) as client:

            def is_shown() -> bool:
                if client.picture is None or client.picture.shape != (40, 60, 3):
                    return False
                with torch.no_grad():
                    wanted = 255 * scene.render(canvas(client)).rgb[0].clamp(0, 1).numpy()
                return bool(np.abs(client.picture - wanted).mean() < 6 and wanted.std() > 10)

            drive(viewer, is_shown)
    finally:
        viewer.close()
