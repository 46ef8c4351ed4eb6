"""render-train: it learns, and what a finished run leaves can be read."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors import safe_open

from .commands import command

# Decibels. Seeds 0, 1 and 2 reach 21.3, 21.2 and 21.0; after a single step the scene stands at 13.3.
LEARNT_PSNR = 20.5


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of 150 steps, named by the command itself, and what it said."""
    folder = tmp_path_factory.mktemp("learnt")
    words = ["--scene", "garden", "--downscale", "4", "--steps", "150", "--log.tests", "1", "--log.every", "25"]
    done = command("train.cli", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = folder.glob("runs/garden/*")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}", run.name)
    return run, done.stderr


def lines_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as a strict reader takes it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_it_learns(learnt: tuple[Path, str]) -> None:
    run, said = learnt
    tests = [line for line in lines_of(run) if "test/psnr" in line]
    assert [line["step"] for line in tests] == [75, 150]
    assert tests[1]["test/psnr"] > LEARNT_PSNR
    assert tests[0]["test/psnr"] < tests[1]["test/psnr"]
    assert f"step 150, {tests[1]['seconds']:.1f} s: test PSNR {tests[1]['test/psnr']:.2f} dB" in said


def test_the_journal(learnt: tuple[Path, str]) -> None:
    lines = [line for line in lines_of(learnt[0]) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 30, 50, 80, 100, 130, 150]  # looked at every tenth step
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    for line in lines:
        assert line["loss"] == pytest.approx(sum(value for name, value in line.items() if name.startswith("loss/")))
        assert {"psnr", "primitives", "steps_per_second", "lr/means", "memory_mib"} <= line.keys()
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]


def test_tensorboard_reads_its_events(learnt: tuple[Path, str]) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    (path,) = learnt[0].glob("events.out.tfevents.*")
    loaded = list(loader.EventFileLoader(str(path)).Load())  # stops at a checksum that does not fit
    assert loaded[0].file_version == "brain.Event:2"
    values = [(event.step, value) for event in loaded for value in event.summary.value]
    losses = [(step, np.float32(value.tensor.float_val[0])) for step, value in values if value.tag == "train/loss"]
    expected = [(line["step"], np.float32(line["loss"])) for line in lines_of(learnt[0]) if "loss" in line]
    assert losses == expected
    pictures = [value for step, value in values if value.tag == "test/004.jpg" and step == 150]
    data = np.frombuffer(pictures[0].tensor.string_val[2], np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (80, 240, 3)
    data = path.read_bytes()  # every byte belongs to a record
    at = 0
    while at < len(data):
        at += struct.unpack_from("<Q", data, at)[0] + 16
    assert at == len(data)


def test_the_report_and_its_pictures(learnt: tuple[Path, str]) -> None:
    run, _ = learnt
    report = (run / "report.md").read_text(encoding="utf-8")
    final = [line for line in lines_of(run) if "test/psnr" in line][-1]
    assert report.splitlines()[0] == "# garden: gaussians, adc, 150 steps"
    assert f"| test PSNR | {final['test/psnr']:.2f} dB |" in report
    assert "render-train --scene garden --steps 150 --downscale 4" in report
    views = re.findall(r"^\| (\d+\.jpg) \| ([\d.]+) \|", report, re.MULTILINE)
    assert np.mean([float(psnr) for _, psnr in views]) == pytest.approx(final["test/psnr"], abs=0.01)
    assert len(views) == 8
    for name, _ in views:
        assert cv2.imread(str(run / "test" / name.replace(".jpg", ".png"))).shape == (80, 240, 3)
    (strip,) = re.findall(r"!\[.*\]\((.*)\)", report)
    picture = cv2.imread(str(run / strip)).astype(float)
    rendered, photograph = np.split(picture, 2, axis=1)
    shown = [float(psnr) for _, psnr in views[:6:2]]
    expected = -10 * np.log10(np.mean([10 ** (-psnr / 10) for psnr in shown]))
    assert 10 * np.log10(255**2 / np.mean((rendered - photograph) ** 2)) == pytest.approx(expected, abs=0.6)
    assert photograph.std() > 20


def test_what_else_is_in_the_folder(learnt: tuple[Path, str]) -> None:
    run, _ = learnt
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 150
    assert config["loss"]["opacity_reg"] == 0.0  # resolved: None on the command line
    with safe_open(run / "checkpoints/step_00000150/tensors.safetensors", "np") as tensors:
        count = tensors.get_slice("scene.means").get_shape()[0]
    final = [line for line in lines_of(run) if "primitives" in line][-1]
    assert count == final["primitives"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000150"]
    assert not [path for path in run.rglob("*") if path.suffix in (".part", ".pkl", ".pt")]


def test_a_time_budget_ends_the_training(tmp_path: Path) -> None:
    words = [
        "--scene",
        "garden",
        "--downscale",
        "8",
        "--minutes",
        "0.02",
        "--log.tests",
        "0",
        "--max-primitives",
        "2000",
    ]
    done = command("train.cli", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    final = [line for line in lines_of(tmp_path / "run") if "loss" in line][-1]
    assert 1.2 <= final["seconds"] < 10  # one step too long on a busy machine
    assert final["step"] > 5
    # The learning rate has come to its own end, however many steps that took.
    assert final["lr/means"] < 0.05 * lines_of(tmp_path / "run")[0]["lr/means"]


def test_help_lists_the_options_and_loads_no_torch() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "prismfield.train.cli", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "prismfield.train.config" in loaded
    assert not loaded & {"torch", "cv2", "scipy", "viser", "tensorboard"}
    named = "scene representation strategy steps minutes out downscale eval-every-nth seed device max-primitives init"
    for option in [*named.split(), "resume", "viewer", "exposure.enabled", "adc.stop"]:
        assert f"--{option}" in done.stdout
