"""Test views: what is rendered is compared over what counts, and its pictures are written whole."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import Views
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.train.evaluate import ViewResult, evaluate_views, mean_scores, save_side_by_side, write_image

from .commands import command
from .tiny_captures import HEIGHT, WIDTH, transforms, write_transforms
from .tiny_captures import write_image as write_picture


class Flat:
    """A scene that looks the same from everywhere; notes what it was asked for."""

    def __init__(self, rgb: Tensor) -> None:
        self.rgb = rgb.requires_grad_()
        self.asked: list[tuple[Cameras, Tensor]] = []

    def render(self, cameras: Cameras, pixels: None = None, background: Tensor | None = None) -> RenderOutput:
        assert background is not None
        self.asked.append((cameras, background))
        rgb = self.rgb.expand(1, cameras.height, cameras.width, 3) * 1.0
        return RenderOutput(rgb, torch.ones(1, cameras.height, cameras.width))


def write_capture(root: Path, dark: tuple[int, ...] = (), *, channels: int = 3) -> Path:
    """Nine frames with masks: the left 16 columns count, nothing does in the frames `dark`."""
    table = transforms()
    for index, frame in enumerate(table["frames"]):
        write_picture(root / frame["file_path"], index, channels=channels)
        frame["mask_path"] = f"masks/{index:03d}.png"
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, :16] = 0 if index in dark else 255
        (root / "masks").mkdir(exist_ok=True)
        assert cv2.imwrite(str(root / frame["mask_path"]), mask)
    return write_transforms(root, table)


def views_of(root: Path) -> Views:
    return Views(load_scene(str(root)).test)


def evaluate(scene: Flat, views: Views, background: float = 0.0, **options: Any) -> list[ViewResult]:
    return list(evaluate_views(scene, views, background, **options))  # type: ignore[arg-type]


def decibels(rgb: float, truth: np.ndarray) -> float:
    return -10 * np.log10(np.mean((rgb - truth.astype(np.float64) / 255) ** 2))


def test_scores_are_over_what_counts(tmp_path: Path) -> None:
    views = views_of(write_capture(tmp_path))
    scene = Flat(torch.tensor(0.25))
    results = evaluate(scene, views)
    assert [result.name for result in results] == ["000.png", "008.png"]
    for index, result in enumerate(results):
        truth = views[index].rgb.numpy()
        assert result.psnr == pytest.approx(decibels(0.25, truth[:, :16]), abs=1e-4)
        assert result.mask is not None
        assert int(result.mask.sum()) == 16 * HEIGHT
        assert not result.rgb.requires_grad
        np.testing.assert_allclose(result.truth.numpy() * 255, truth, atol=1e-3)
        assert result.seconds > 0
        torch.testing.assert_close(scene.asked[index][0].viewmats, views.camera(index).viewmats)
    whole = evaluate(scene, views, use_masks=False, indices=[1])
    assert [result.name for result in whole] == ["008.png"]
    assert whole[0].mask is None
    assert whole[0].psnr == pytest.approx(decibels(0.25, views[1].rgb.numpy()), abs=1e-4)
    assert abs(whole[0].ssim - results[1].ssim) > 1e-3


def test_renders_are_clamped_before_they_are_compared(tmp_path: Path) -> None:
    views = views_of(write_capture(tmp_path))
    for given, shown in ((1.7, 1.0), (-0.4, 0.0)):
        (result, _) = evaluate(Flat(torch.tensor(given)), views)
        assert torch.equal(result.rgb, torch.full((HEIGHT, WIDTH, 3), shown))
        assert result.psnr == pytest.approx(decibels(shown, views[0].rgb[:, :16].numpy()), abs=1e-4)


def test_transparent_photographs_lie_over_the_scenes_background(tmp_path: Path) -> None:
    views = views_of(write_capture(tmp_path, channels=4))
    scene = Flat(torch.tensor([0.2, 0.4, 0.6]))
    (result, _) = evaluate(scene, views, 1.0)
    assert torch.equal(scene.asked[0][1], torch.ones(1, 3))
    view = views[0]
    assert view.alpha is not None
    alpha = view.alpha[..., None].float() / 255
    torch.testing.assert_close(result.truth, view.rgb / 255 * alpha + 1 - alpha, rtol=0, atol=0.51 / 255)


def test_views_in_which_nothing_counts_are_left_out_of_the_mean(tmp_path: Path) -> None:
    results = evaluate(Flat(torch.tensor(0.5)), views_of(write_capture(tmp_path, dark=(0,))))
    assert math.isnan(results[0].psnr)
    assert math.isnan(results[0].ssim)
    assert mean_scores(results) == {"psnr": results[1].psnr, "ssim": results[1].ssim}
    assert mean_scores(results[:1]) == {}
    assert mean_scores([]) == {}
    (other,) = evaluate(Flat(torch.tensor(0.9)), views_of(tmp_path), indices=[1])
    both = mean_scores([*results, other])
    assert both["psnr"] == pytest.approx((results[1].psnr + other.psnr) / 2)
    assert both["ssim"] == pytest.approx((results[1].ssim + other.ssim) / 2)


def test_training_where_nothing_counts_in_some_images(tmp_path: Path) -> None:
    scene, run = write_capture(tmp_path / "capture", dark=(0, 3, 8)), tmp_path / "run"
    words = ["--steps", "20", "--data.initial-points", "200", "--log.tests", "1", "--log.every", "10"]
    done = command("train.cli", "--scene", scene, *words, "--out", run)
    assert done.returncode == 0, done.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20]
    assert all(5 < line.get("psnr", 10) < 40 for line in lines)  # not the 100 dB of no error in no pixel
    assert "psnr" in lines[-1]
    report = (run / "report.md").read_text()
    assert "| test PSNR | nothing in the test views counts |" in report
    assert "nan dB" not in done.stderr + report


def result_of(rgb: Tensor, name: str = "left/photo 1.jpeg") -> ViewResult:
    return ViewResult(name, 20.0, 0.9, 0.1, rgb, torch.full_like(rgb, 0.25), None)


def test_pictures_show_the_render_on_the_left(tmp_path: Path) -> None:
    rgb = torch.tensor([1.0, 0.5, 0.0]).expand(6, 10, 3)
    path = save_side_by_side(result_of(rgb), tmp_path / "new")
    assert path == tmp_path / "new" / "left_photo 1.png"  # folders of a capture do not collide
    picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert picture.shape == (6, 20, 3)
    assert (picture[:, :10] == (255, 128, 0)).all()
    assert (picture[:, 10:] == 64).all()


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    write_image(path, torch.zeros(4, 5, 3))
    before = path.read_bytes()
    write = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left") as caught:
        write_image(path, torch.ones(4, 5, 3))
    assert caught.value.filename == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == before
