"""metrics.jsonl and TensorBoard's file: strict lines, and none of a future that was lost with its process."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from prismfield.train.journal import Journal, read_metrics


def write(folder: Path, start: int, steps: list[int], *, tensorboard: bool = False) -> None:
    journal = Journal(folder, start, tensorboard=tensorboard)
    for step in steps:
        journal.write(step, step / 3, {"loss": 1 / step, "lr/means": 0.5})
    journal.close()


def test_lines_are_json_and_hold_no_nan(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, tensorboard=False)
    journal.write(1, 1 / 3, {"loss": 0.25, "psnr": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()  # there before it is closed
    assert text == '{"step": 1, "seconds": 0.333, "loss": 0.25}\n'
    journal.close()


def test_lines_beyond_the_checkpoint_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, [10, 20, 30, 40])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 50, "sec')
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40]
    write(tmp_path, 20, [25, 35])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 25, 35]
    assert lines[1] == {"step": 20, "seconds": 6.667, "loss": 0.05, "lr/means": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_one_curve_of_a_run_in_two_parts(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, [10, 20, 30, 40], tensorboard=True)
    (first,) = tmp_path.glob("events.out.tfevents.*")
    first.rename(first.with_name(first.name.replace(".tfevents.", ".tfevents.0")))  # of an earlier second
    write(tmp_path, 20, [25, 35], tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in (10, 20, 25, 35)
    ]
    assert events.Tags()["scalars"] == ["train/loss", "lr/means"]


def test_pictures_go_to_tensorboard_alone(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    journal = Journal(tmp_path, 0, tensorboard=True)
    journal.picture(3, "test/a.jpg", torch.tensor([2.0, 0.0, -1.0]).expand(8, 12, 3))
    journal.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    (picture,) = events.Images("test/a.jpg")
    assert (picture.step, picture.width, picture.height) == (3, 12, 8)


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with caplog.at_level(logging.WARNING, "prismfield"):
        write(tmp_path, 0, [10], tensorboard=True)
    assert [record.message for record in caplog.records] == [
        "no TensorBoard file (import of tensorboard.compat.proto halted; None in sys.modules); pip install tensorboard"
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
