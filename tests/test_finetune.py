"""Training for a .pfz: what is drawn in training is what the file gives back, the loss of rounding is mostly won back."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.cli import CompressConfig, compress
from prismfield.export.compression.compress import Likeness, drawable, pruned_rows, taken
from prismfield.export.compression.finetune import Finetuning, finetune
from prismfield.export.compression.pfz import decode_pfz
from prismfield.export.compression.pfz_grid import PfzSteps, grid_of, importance_of
from prismfield.export.compression.pfz_write import encode_symbols
from prismfield.export.compression.rounded import RoundedGaussians
from prismfield.export.convert import ring_cameras
from prismfield.export.library import Scene, load, scene_of
from prismfield.export.ply import write_ply
from prismfield.train.optimizer import FusedAdam
from prismfield.train.strategies.rows import replace_rows

from .commands import command, refused, trained_once
from .test_pfz import covariances, splats

STEPS = PfzSteps()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The bundled scene, few Gaussians, trained until it is one."""
    words = "--scene garden --downscale 8 --steps 200 --max-primitives 4000 --log.tests 0 --threads 1 --seed 3"
    return load(trained_once(tmp_path_factory, "garden_of_4000", *words.split()))


def rounded_of(asset: SplatAsset, scene: Scene, steps: PfzSteps = STEPS) -> tuple[RoundedGaussians, bytes]:
    """The trainable form, and the file that it stands for."""
    importance = importance_of(asset)
    values, grid = grid_of(asset, steps, importance)
    rounded = RoundedGaussians(values, grid, importance, scene.frame, asset.antialiased)
    return rounded, encode_symbols(rounded.symbols(), rounded.ranks(), grid, asset)


def asset_of(scene: Scene) -> SplatAsset:
    asset = scene.asset()
    assert isinstance(asset, SplatAsset)
    return drawable(asset)


@pytest.mark.parametrize("factor", [0.3, 2.0])
def test_what_is_drawn_is_what_the_file_gives_back(trained: Scene, factor: float) -> None:
    asset = asset_of(trained)
    rounded, data = rounded_of(asset, trained, STEPS.times(factor))
    shown = scene_of(decode_pfz(data), trained.path, frame=trained.frame)
    for camera in trained.cameras()[:3]:
        seen, behind = trained.frame.cameras_to_scene(camera), torch.zeros(1, 3)
        with torch.no_grad():
            ours = rounded.render(seen, background=behind).rgb
            theirs = shown.representation.render(seen, background=behind).rgb
        assert (ours - theirs).abs().max() < 2e-3


def test_classes_of_importance_are_drawn_as_the_file_gives_them_back() -> None:
    asset = splats(9000, 2)
    scene = scene_of(asset, Path("x.ply"))
    rounded, data = rounded_of(asset, scene)
    assert rounded.ranks().max() == 2 and len(set(rounded.coarser.tolist())) == 3
    shown = scene_of(decode_pfz(data), scene.path, frame=scene.frame)
    camera = scene.frame.cameras_to_scene(ring_cameras(asset)[0])
    with torch.no_grad():
        ours, theirs = (s.render(camera).rgb for s in (rounded, shown.representation))
    assert theirs.std() > 0.02 and (ours - theirs).abs().max() < 2e-3


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    asset = splats(50)
    scene = scene_of(asset, Path("x.ply"))
    rounded, _ = rounded_of(asset, scene)
    after = rounded.rounded()
    assert all((after[name] != value).any() for name, value in rounded.continuous().items())
    sum(values.sum() for values in after.values()).backward()  # type: ignore[union-attr]
    for name in ("means", "turned", "log_scales", "colors", "coefficients"):
        gradient = rounded.get_parameter(name).grad
        assert gradient is not None and (gradient == 1).all(), name
    assert rounded.importance.grad is None


def test_bits_have_the_slope_that_they_say() -> None:
    asset = splats(2000)
    rounded, _ = rounded_of(asset, scene_of(asset, Path("x.ply")))
    rounded.bits().backward()
    step = rounded.rounding.grid.sh_step * rounded.coarser[:, None]
    wanted = rounded.coefficients.detach().sign() * rounded.coefficient_bits / step
    torch.testing.assert_close(rounded.coefficients.grad, wanted)
    magnitudes = rounded.symbols()["coefficients"].abs()
    # The code length of a geometric distribution of the same mean: one more of a symbol costs what is said.
    mean = magnitudes.mean(0).clamp(min=0.02)
    torch.testing.assert_close(rounded.coefficient_bits, -torch.log2(mean / (1 + mean)))
    gradient = rounded.log_scales.grad
    assert gradient is not None
    torch.testing.assert_close(gradient.sum(1), torch.full((2000,), -3 / np.log(2)))  # twice as large: three bits less


def test_values_that_left_the_canonical_form_come_back_as_the_same_ellipsoids() -> None:
    asset = splats(300)
    rounded, _ = rounded_of(asset, scene_of(asset, Path("x.ply")))
    assert len(rounded.misshapen()[0]) == 0
    with torch.no_grad():
        rounded.log_scales[:40] = rounded.log_scales[:40].flip(1)
        rounded.turned[40:60] = torch.tensor([0.9, 0.1, 0.2])

    def shapes() -> np.ndarray:
        xyz, scales = rounded.turned.detach(), rounded.log_scales.detach().exp()
        quats = torch.cat([(1 - xyz.square().sum(1, keepdim=True)).sqrt(), xyz], 1)
        values = {"quats": quats.numpy(), "scales": scales.numpy()}
        return covariances(replace(asset, **values))  # type: ignore[arg-type]

    before = shapes()
    optimizer = FusedAdam(rounded.param_groups())
    rows, values = rounded.misshapen()
    assert len(rows) == 60
    replace_rows(rounded, optimizer, rows, values)
    assert len(rounded.misshapen()[0]) == 0
    np.testing.assert_allclose(shapes(), before, rtol=1e-3, atol=1e-6 * before.max())


def test_most_of_the_loss_is_won_back_and_the_same_each_time(trained: Scene) -> None:
    asset, likeness = asset_of(trained), Likeness(trained)
    importance = importance_of(asset)
    told: list[tuple[int, float, int]] = []

    def tuned(options: Finetuning) -> bytes:
        return finetune(trained, asset, importance, STEPS, options, lambda *words: told.append(words))

    plain = decode_pfz(rounded_of(asset, trained)[1])
    first = tuned(Finetuning(60))
    before, after, better = (likeness.to_photographs(x)["psnr"] for x in (asset, plain, decode_pfz(first)))
    assert after < before - 0.2
    assert better > after + 0.5 * (before - after)
    assert told[-1][0] == 60 and told[-1][2] == len(asset) and told[-1][1] > 15
    assert tuned(Finetuning(60)) == first
    dear = tuned(Finetuning(60, rate=0.015))
    assert len(dear) < 0.9 * len(first)


def test_gaussians_that_go_while_others_learn(trained: Scene) -> None:
    asset, likeness = asset_of(trained), Likeness(trained)
    importance = importance_of(asset)
    cut = taken(asset, pruned_rows(importance, 0.4))
    found = decode_pfz(finetune(trained, asset, importance, STEPS, Finetuning(60, 0.4), lambda *_: None))
    assert len(found) == round(0.6 * len(asset))
    assert likeness.to_photographs(found)["psnr"] > likeness.to_photographs(cut)["psnr"] + 0.5


def test_a_file_is_trained_on_pictures_of_it(trained: Scene, tmp_path: Path) -> None:
    asset = asset_of(trained)
    write_ply(tmp_path / "few.ply", taken(asset, pruned_rows(importance_of(asset), 0.5)))
    config = CompressConfig(tmp_path / "few.ply", tmp_path / "a.pfz", threads=1)
    plain, tuned = compress(config), compress(replace(config, finetune_steps=60, finetune_rate=0.0))
    assert tuned["untrained"]["bytes"] < plain["bytes"] and tuned["untrained"]["psnr"] < plain["psnr"]
    assert tuned["psnr"] > tuned["untrained"]["psnr"] + 0.5
    assert tuned["gaussians_kept"] == plain["gaussians_kept"]


def test_the_command(trained: Scene, tmp_path: Path) -> None:
    path = tmp_path / "a.pfz"
    done = command("export.compression.cli", trained.path, "--to", path, "--finetune-steps", 30, "--threads", 1)
    assert done.returncode == 0, done.stderr
    untrained, trained_ = (
        float(re.search(rf"{word}.* \(([-+][\d.]+) dB", done.stdout)[1])  # type: ignore[index]
        for word in ("untrained", "to photos")
    )
    assert trained_ > untrained
    assert f"{path.stat().st_size:,} bytes" in done.stdout
    assert "--finetune-steps: expected 0 or more, got -1" in refused(
        "export.compression.cli", trained.path, "--to", path, "--finetune-steps", -1
    )


def test_ctrl_c_leaves_no_file(trained: Scene, tmp_path: Path) -> None:
    words = [trained.path, "--to", tmp_path / "new" / "a.pfz", "--finetune-steps", 100000, "--threads", 1]
    arguments = [sys.executable, "-m", "prismfield.export.compression.cli", *map(str, words)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "fine-tuning" in line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 130
    assert not (tmp_path / "new").exists()
