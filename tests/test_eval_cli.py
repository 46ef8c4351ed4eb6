"""render-eval: its numbers are those of the pictures, its files whole, its refusals one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from prismfield.train.contact_sheet import contact_sheet, make_row
from prismfield.train.eval_cli import EvalConfig
from prismfield.train.evaluate import ViewResult
from prismfield.train.evaluation import Evaluation, _scores, evaluate_run
from prismfield.train.metrics import flip, psnr, ssim

from .commands import command, refused


def strict_json(path: Path) -> dict[str, Any]:
    """What a reader that knows no NaN and no Infinity makes of it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def side_by_side(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The render and the photograph that the training left, [1, H, W, 3] in 0..1."""
    picture = torch.from_numpy(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)).float()[None] / 255
    left, right = picture.chunk(2, 2)
    return left.contiguous(), right.contiguous()


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A copy of the run after `render-eval RUN --json`, what the file holds, and what was printed."""
    folder = tmp_path_factory.mktemp("eval")
    run = Path(shutil.copytree(tiny_run, folder / "run"))
    done = command("train.eval_cli", run, "--json", folder / "eval.json")
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("*.part"))
    return run, strict_json(folder / "eval.json"), done.stdout


def test_the_scores_are_those_of_the_pictures(evaluated: tuple[Path, dict[str, Any], str]) -> None:
    run, numbers, _ = evaluated
    assert [view["name"] for view in numbers["per_image"]] == [f"{n:03}.jpg" for n in range(4, 72, 9)]
    for view in numbers["per_image"]:
        rgb, truth = side_by_side(run / "test" / Path(view["name"]).with_suffix(".png"))  # rounded to 8 bits
        assert view["psnr"] == pytest.approx(psnr(rgb, truth), abs=0.02)
        assert view["ssim"] == pytest.approx(ssim(rgb, truth), abs=2e-3)
        assert view["flip"] == pytest.approx(flip(rgb, truth), abs=2e-3)
    for score in ("psnr", "ssim", "flip"):
        assert numbers[score] == pytest.approx(np.mean([view[score] for view in numbers["per_image"]]))


def test_what_the_json_says_beside_the_scores(evaluated: tuple[Path, dict[str, Any], str]) -> None:
    run, numbers, _ = evaluated
    state = json.loads((run / "checkpoints/step_00000030/state.json").read_text())
    assert numbers["steps"] == 30
    assert numbers["seconds_trained"] == state["seconds"] > 0
    assert numbers["num_primitives"] > 10_000
    assert numbers["fps"] == pytest.approx(1 / numbers["frame_seconds"])
    assert 0 < numbers["frame_seconds"] < 1
    assert 248 * numbers["num_primitives"] < numbers["bytes"] < 248 * numbers["num_primitives"] + 4000
    for words in ("8 test views", "the files' own", "120x80", "averaged over 4x4 pixels", "opaque"):
        assert words in numbers["protocol"]
    assert "\n" not in numbers["protocol"]


def test_the_table_and_the_lines_below_it(evaluated: tuple[Path, dict[str, Any], str]) -> None:
    _, numbers, printed = evaluated
    row = next(line for line in printed.splitlines() if "013.jpg" in line)
    assert f"{numbers['per_image'][1]['psnr']:.2f}" in row
    mean = next(line for line in printed.splitlines() if "mean" in line)
    assert f"{numbers['psnr']:.2f}" in mean
    assert f"{numbers['flip']:.4f}" in mean
    assert numbers["protocol"] in printed
    assert numbers["kernels"] in printed
    assert ("lpips" in numbers) != ("LPIPS (alex) left out" in printed or "LPIPS (vgg) left out" in printed)


def test_the_sheet_shows_render_photograph_and_error(evaluated: tuple[Path, dict[str, Any], str]) -> None:
    run, _, _ = evaluated
    sheet = cv2.imread(str(run / "eval.jpg")).astype(float)
    assert sheet.shape[1] == 3 * 240 + 4 * 6
    assert sheet.shape[0] == 2 * 24 + 8 * (24 + 80 + 6)
    pictures = cv2.imread(str(run / "test/004.png")).astype(float)
    top = 3 * 24
    for left, expected in ((6, pictures[:, :120]), (6 + 246, pictures[:, 120:])):
        shown = sheet[top : top + 80, left : left + 120]
        assert np.abs(shown - expected).mean() < 6  # JPEG


def test_a_sheet_of_tall_and_wide_views(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = [
        make_row(f"{h}x{w}", "words", *torch.rand(2, h, w, 3, generator=rng), torch.zeros(h, w))
        for h, w in ((900, 30), (20, 1600))
    ]
    page = contact_sheet(rows, "title")
    assert page.shape == (2 * 24 + 400 + 5 + 2 * 30, 3 * 400 + 4 * 6, 3)
    errors = rows[1].pictures[2]
    assert errors.max() < 10  # no error is black


def test_masked_pixels_count_in_no_score() -> None:
    rgb, truth = torch.full((12, 16, 3), 0.5), torch.full((12, 16, 3), 0.5)
    mask = torch.ones(12, 16, dtype=torch.bool)
    mask[:, 8:] = False
    rgb[:, 8:] = 1.0
    result = ViewResult("a", 100.0, 1.0, 0.1, rgb, truth, mask)
    scores, errors = _scores(result, [])
    assert scores["flip"] == 0
    assert float(errors.max()) == 0
    empty = ViewResult("a", float("nan"), 1.0, 0.1, rgb, truth, torch.zeros_like(mask))
    assert _scores(empty, [])[0] == {"psnr": None, "ssim": 1.0, "flip": None}


def test_views_in_which_nothing_counts_are_left_out_of_the_mean() -> None:
    evaluation = Evaluation([{"name": "a", "psnr": None}, {"name": "b", "psnr": 20.0}, {"name": "c", "psnr": 30.0}])
    assert evaluation.mean("psnr") == 25.0
    assert Evaluation([{"name": "a", "psnr": None}]).mean("psnr") is None


def test_other_views_another_step_and_another_size(tiny_run: Path, tmp_path: Path) -> None:
    options = {"split": "train", "step": 20, "downscale": 8, "sheet": tmp_path / "a.png", "json": tmp_path / "a.json"}
    evaluate_run(EvalConfig(tiny_run, **options))  # type: ignore[arg-type]
    numbers = strict_json(tmp_path / "a.json")
    assert len(numbers["per_image"]) == 64
    assert numbers["steps"] == 20
    for words in ("64 train views", "trained on", "60x40", "8x8"):
        assert words in numbers["protocol"]
    assert cv2.imread(str(tmp_path / "a.png")).shape[0] == 2 * 24 + 40 * (24 + 40 + 6)  # forty of them
    assert not (tiny_run / "eval.jpg").exists()


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    assert "no such run" in refused("train.eval_cli", tmp_path / "nowhere")
    assert "config.json is missing" in refused("train.eval_cli", tmp_path)


def test_a_damaged_checkpoint_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    for tensors in run.glob("checkpoints/*/tensors.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-100])
    line = refused("train.eval_cli", run)
    assert "no whole checkpoint" in line
    assert "not as it was written" in line


def test_targets_that_cannot_be_written_are_refused_at_once(tiny_run: Path, tmp_path: Path) -> None:
    line = refused("train.eval_cli", tiny_run, "--json", tmp_path / "no folder" / "a.json")
    assert "a.json" in line
    assert "does not exist" in line
    with pytest.raises(ValueError, match=r"a\.gif: expected a picture's name"):
        evaluate_run(EvalConfig(tiny_run, sheet=tmp_path / "a.gif"))
    with pytest.raises(ValueError, match="--downscale: expected at least 1"):
        evaluate_run(EvalConfig(tiny_run, downscale=0))
    with pytest.raises(ValueError, match="no checkpoint of step 7; there are 20, 30"):
        evaluate_run(EvalConfig(tiny_run, step=7))


def test_a_run_without_test_views_says_so(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"eval_every_nth": 0}))
    with pytest.raises(ValueError, match="no test views; --split train"):
        evaluate_run(EvalConfig(run))
