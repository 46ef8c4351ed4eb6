"""Resuming: exact to the bit, from whatever a killed process left, and only with the options of the run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prismfield.train.checkpoint import STATE, TENSORS, load_checkpoint

from .checkpoints import content, same_content
from .commands import command, refused, trained_once

# Growth at steps 20 and 40 and a reset at 45, so that a stop at 30 falls between; each of the three resolutions is used.
_COMMON = "--scene garden --downscale 4 --steps 60 --threads 2 --max-primitives 2000 --data.points random --data.initial-points 800"
_COMMON += " --exposure.enabled --pose.enabled --schedule.resolution 0.3 0.6 --schedule.min-side 16"
_COMMON += " --log.tests 0 --log.every 10 --log.no-tensorboard"
_STRATEGY = {
    "adc": "--strategy adc --adc.start 20 --adc.min-interval 20 --adc.stop 0.9 --adc.reset-interval 22500",
    "mcmc": "--strategy mcmc --mcmc.min-interval 20 --mcmc.stop 0.9",
    "split": "--representation convexes --split.start 20 --split.min-interval 20 --split.stop 0.9",
}

_KILLED_WHILE_SAVING = """
import os, signal, sys
from prismfield.train import checkpoint, cli

digest = checkpoint._sha256

def dies_with_the_second_file_unwritten(path):
    if path.parent.name == "step_00000040.part":
        assert path.exists() and not (path.parent / checkpoint.STATE).exists()
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(path)

checkpoint._sha256 = dies_with_the_second_file_unwritten
cli.main()
"""


def words_of(strategy: str) -> list[str]:
    return [*_COMMON.split(), *_STRATEGY[strategy].split()]


@pytest.fixture
def in_one_go(strategy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps without a break."""
    return trained_once(tmp_path_factory, f"resume_{strategy}", *words_of(strategy))


def assert_same_bits(run: Path, other: Path, step: int) -> None:
    tensors, _ = same_content(run, other, step)
    assert {"exposure.deltas", "poses.deltas", "scene.sh0", "rng.torch"} <= tensors.keys()


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize("strategy", list(_STRATEGY))
def test_a_run_in_two_parts_is_the_run_in_one(strategy: str, in_one_go: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = command("train.cli", *words_of(strategy), "--pause-at", 30, "--out", run)
    assert done.returncode == 0, done.stderr
    first, _ = content(run, 30)
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "going on at step 30" in done.stderr
    assert_same_bits(run, in_one_go, 60)
    last, _ = content(run, 60)
    assert 800 < len(first["scene.sh0"]) < len(last["scene.sh0"])  # grown before the break and after it
    assert last["exposure.deltas"].abs().max() > 0
    assert last["poses.deltas"].abs().max() > 0
    assert losses(run) == losses(in_one_go)


@pytest.mark.parametrize("strategy", ["adc"])
def test_killed_between_the_two_files_of_a_checkpoint(strategy: str, in_one_go: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*words_of(strategy), "--log.checkpoint-steps", "20", "--out", str(run)]
    killed = subprocess.run([sys.executable, "-c", _KILLED_WHILE_SAVING, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000020", "step_00000040.part"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 40  # beyond the checkpoint
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "going on at step 20" in done.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000040", "step_00000060"]
    assert_same_bits(run, in_one_go, 60)
    assert losses(run) == losses(in_one_go)


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [
        "--scene",
        "garden",
        "--downscale",
        "4",
        "--steps",
        "100000",
        "--max-primitives",
        "1000",
        "--log.every",
        "1",
        "--log.tests",
        "0",
        "--out",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "prismfield.train.cli", *words, str(run)], stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == f"stopped; go on with: render-train --resume {run}"
    assert "Traceback" not in said
    _, state = load_checkpoint(run / "checkpoints")
    step = state["step"]
    assert 1 <= step < 100_000
    done = command("train.cli", "--resume", run, "--pause-at", step + 5)
    assert done.returncode == 0, done.stderr
    assert f"going on at step {step}" in done.stderr
    assert load_checkpoint(run / "checkpoints")[1]["step"] == step + 5


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run of 30 steps with checkpoints at 20 and 30, to be spoilt."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("file", [TENSORS, STATE])
def test_a_damaged_checkpoint_is_passed_over(file: str, copied_run: Path) -> None:
    flip_a_bit(copied_run / "checkpoints/step_00000030" / file)
    done = command("train.cli", "--resume", copied_run, "--pause-at", 22)
    assert done.returncode == 0, done.stderr
    assert f"passed over a damaged checkpoint: step_00000030: {file}" in done.stderr
    assert "going on at step 20" in done.stderr


def test_a_pause_that_lies_behind_is_refused(copied_run: Path) -> None:
    """It was ignored, and the run went on to its end."""
    line = refused("train.cli", "--resume", copied_run, "--steps", 60, "--pause-at", 20)
    assert "--pause-at 20: the run is already at step 30" in line


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(copied_run: Path) -> None:
    for tensors in copied_run.glob("checkpoints/*/tensors.safetensors"):
        flip_a_bit(tensors)
    before = contents(copied_run)
    line = refused("train.cli", "--resume", copied_run)
    assert f"{copied_run}/checkpoints: no whole checkpoint (step_00000030: {TENSORS} is not as it was written" in line
    assert contents(copied_run) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--downscale", "2"], "--downscale 2 (was 4)"),
        (["--strategy", "mcmc"], "--strategy mcmc (was adc)"),
        (["--seed", "1", "--adc.stop", "0.4"], "--seed 1 (was 0), --adc.stop 0.4 (was 0.5)"),
        (["--scene", "elsewhere"], "--scene elsewhere (was garden)"),
    ],
)
def test_another_config_is_refused_by_name(words: list[str], named: str, tiny_run: Path) -> None:
    before = contents(tiny_run)
    line = refused("train.cli", "--resume", tiny_run, *words)
    assert f"cannot go on with {named}" in line
    assert contents(tiny_run) == before


def test_a_finished_run_needs_more_steps(copied_run: Path) -> None:
    before = contents(copied_run)
    line = refused("train.cli", "--resume", copied_run)
    assert "the run is finished (30 steps" in line
    assert "--steps" in line
    assert contents(copied_run) == before
    done = command("train.cli", "--resume", copied_run, "--steps", 32)
    assert done.returncode == 0, done.stderr
    assert "32 steps" in (copied_run / "report.md").read_text().splitlines()[0]


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'}: no such run folder" in refused("train.cli", "--resume", tmp_path / "nowhere")
    assert f"{tmp_path}: not a run folder (config.json is missing)" in refused("train.cli", "--resume", tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 3, "colour": 1}')
    line = refused("train.cli", "--resume", tmp_path)
    assert "config.json: not a training config of this version (unknown option colour)" in line
