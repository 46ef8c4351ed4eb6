"""Gaussians trained to become small files: what masks drop, what the grid makes smooth, exact resume, and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import SplatAsset
from prismfield.export.cli import ExportConfig, OutputOptions, export
from prismfield.export.library import load
from prismfield.export.rows import morton_order
from prismfield.export.sog import read_sog, write_sog
from prismfield.render.cameras import Cameras
from prismfield.render.sort_grid import grid_width, neighbor_distance
from prismfield.representations.compact import SMOOTHED_EVERY, CompactGaussians
from prismfield.representations.config import CompactConfig, GaussiansConfig
from prismfield.representations.gaussians import Gaussians
from prismfield.train.eval_cli import EvalConfig
from prismfield.train.evaluation import evaluate_run
from prismfield.train.optimizer import FusedAdam
from prismfield.train.strategies.adc import Adc
from prismfield.train.strategies.compact import Compact
from prismfield.train.strategies.config import AdcConfig, McmcConfig
from prismfield.train.strategies.fixed import Fixed
from prismfield.train.strategies.mcmc import Mcmc
from prismfield.train.strategies.rows import append_rows, keep_rows

from .checkpoints import content, same_content
from .commands import command, refused, trained_once

# Growth at steps 20 and 40; then looks at all Gaussians every 50 steps, at 60 and at the end.
_COMMON = "--scene garden --downscale 4 --steps 80 --threads 2 --max-primitives 1200 --data.points random"
_COMMON += " --data.initial-points 800 --adc.start 20 --adc.min-interval 20 --adc.stop 0.6"
_COMMON += " --schedule.resolution 0.3 0.6 --schedule.min-side 16 --log.tests 0 --log.every 10 --log.no-tensorboard"
_COMMON += (
    " --compact.prune 0.2 --compact.masks --compact.mask-weight 0.3 --compact.mask-lr 0.3 --compact.sog --compact.hash"
)
BACKGROUND = torch.tensor([[0.2, 0.4, 0.1]])


def make_cameras(count: int = 1) -> Cameras:
    """Turned, oblong, off-centre, fx != fy."""
    angles = torch.tensor([0.4, -0.7, 1.2])[:count]
    viewmats = torch.eye(4).repeat(count, 1, 1)
    viewmats[:, 0, 0], viewmats[:, 0, 2] = angles.cos(), angles.sin()
    viewmats[:, 2, 0], viewmats[:, 2, 2] = -angles.sin(), angles.cos()
    viewmats[:, 2, 3] = 3.0
    Ks = torch.tensor([[60.0, 0, 21.0], [0, 48.0, 18.5], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(viewmats, Ks, 46, 33)


def make_scene(count: int = 40, **compact: Any) -> CompactGaussians:
    generator = torch.Generator().manual_seed(5)
    xyz, rgb = torch.rand(2, count, 3, generator=generator)
    aabb = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    plain = Gaussians.from_points(xyz * 2 - 1, rgb, aabb, GaussiansConfig(sh_degree=1, sh_interval=0, init_opacity=0.5))
    plain.quats.data = torch.randn(count, 4, generator=generator)
    plain.shN.data = 0.1 * torch.randn(count, 3, 3, generator=generator)
    return CompactGaussians.made_of(plain, CompactConfig(**compact))


def make_optimizer(scene: Gaussians) -> FusedAdam:
    return FusedAdam([group | {"lr_first": group["lr"]} for group in scene.param_groups()])


def picture(scene: Gaussians) -> Tensor:
    with torch.no_grad():
        return scene.render(make_cameras(2), background=BACKGROUND.expand(2, 3)).rgb


def fit(scene: CompactGaussians, strategy: Any, truth: Tensor, steps: int) -> None:
    """Steps as the training's loop does them."""
    optimizer = make_optimizer(scene)
    for step in range(steps):
        out = scene.render(make_cameras(2), background=BACKGROUND.expand(2, 3), extras=strategy.extras)
        loss = (out.rgb - truth).abs().mean() + sum(out.penalties.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        strategy.after_step(step, (step + 1) / steps, scene, optimizer, out)
    for group in optimizer.param_groups:
        assert scene.get_parameter(group["name"]) is group["params"][0]
        for value in optimizer.state.get(group["params"][0], {}).values():
            assert not isinstance(value, Tensor) or value.shape == group["params"][0].shape


def fixed(scene: CompactGaussians) -> Compact:
    return Compact(Fixed(None, scene, max_primitives=100, seed=0), scene)


class TestMasks:
    def test_none_masked_is_the_picture_without_masks(self) -> None:
        scene = make_scene(masks=True)
        assert torch.equal(picture(scene), picture(scene.baked()))
        assert scene.baked().num_primitives == 40

    def test_the_gradient_is_that_of_opacity_and_size(self) -> None:
        scene = make_scene(masks=True)
        weights = torch.rand(1, 33, 46, 3, generator=torch.Generator().manual_seed(1))
        (scene.render(make_cameras()).rgb * weights).sum().backward()
        grad = scene.mask_logits.grad
        assert grad is not None and (grad != 0).sum() > 20
        soft = scene.mask_logits.detach().sigmoid()
        for row in grad.abs().topk(3).indices:
            values = []
            for factor in (0.99, 1.01):
                moved = scene.baked()
                moved.opacity_logits.data[row] = (moved.opacities.detach()[row] * factor).logit()
                moved.log_scales.data[row] += float(np.log(factor))
                with torch.no_grad():
                    values.append((moved.render(make_cameras()).rgb * weights).sum())
            slope = (values[1] - values[0]) / 0.02
            torch.testing.assert_close(grad[row], slope * soft[row] * (1 - soft[row]), rtol=0.03, atol=1e-3)

    def test_what_is_masked_is_not_drawn_and_not_baked(self) -> None:
        scene = make_scene(masks=True)
        before = picture(scene)
        scene.mask_logits.data[::2] = -5.0
        after = picture(scene)
        assert (before - after).abs().max() > 0.1
        kept = Gaussians({n: v[1::2] for n, v in scene.tensors().items() if n != "mask_logits"}, scene.config)
        assert torch.equal(after, picture(kept))
        assert scene.baked().num_primitives == 20 and torch.equal(after, picture(scene.baked()))
        assert (scene.opacities[::2] == 0).all() and (scene.opacities[1::2] > 0).all()

    def test_the_term_is_weighted_and_in_the_loss(self) -> None:
        scene = make_scene(masks=True, mask_weight=0.25)
        out = scene.render(make_cameras())
        torch.testing.assert_close(out.penalties["masks"], torch.tensor(0.25).mul(torch.tensor(1.0).sigmoid()))
        with torch.no_grad():
            assert not scene.render(make_cameras()).penalties

    def test_it_drops_what_the_picture_can_do_without(self) -> None:
        """A quarter of the Gaussians lie behind the cameras, a quarter are nearly transparent; more is wanted of the others."""
        scene = make_scene(masks=True, mask_weight=0.003, mask_lr=0.2)
        scene.config = replace(scene.config, opacity_logits_lr=0.0, log_scales_lr=0.0, means_lr=0.0, sh0_lr=0.0)
        scene.means.data[::4] = torch.tensor([0.0, 0.0, -8.0])
        scene.opacity_logits.data[2::4] = -5.0
        brighter = scene.baked()
        brighter.opacity_logits.data[1::2] += 1.5
        needed = scene.means.detach()[1::2].clone()
        fit(scene, fixed(scene), picture(brighter), 60)
        assert 17 <= scene.num_primitives <= 22
        assert torch.cdist(scene.means.detach(), needed).amin(1).le(1e-6).sum() >= 17
        assert scene.kept.all()

    def test_without_weight_it_drops_nothing(self) -> None:
        scene = make_scene(masks=True, mask_weight=0.0)
        fit(scene, fixed(scene), picture(scene), 60)
        assert scene.num_primitives == 40

    def test_a_scene_without_any_left_is_an_error(self) -> None:
        scene = make_scene(masks=True)
        strategy, optimizer = fixed(scene), make_optimizer(scene)
        scene.mask_logits.data[:] = -9.0
        with pytest.raises(ValueError, match=r"--compact\.mask-weight 0\.005 is too much"):
            strategy.after_step(9, 1.0, scene, optimizer, scene.render(make_cameras()))

    def test_growth_starts_anew_on_what_is_left(self) -> None:
        """A finished training that is made longer grows again: what it had observed was of other rows."""
        scene = make_scene(masks=True)
        adc = Adc(AdcConfig(), scene, max_primitives=100, seed=0)
        optimizer = make_optimizer(scene)
        scene.mask_logits.data[:7] = -9.0
        strategy = Compact(adc, scene)
        strategy.after_step(9, 1.0, scene, optimizer, scene.render(make_cameras(), extras=adc.extras))
        assert scene.num_primitives == 33 and len(adc.views) == 40
        out = scene.render(make_cameras(), extras=adc.extras)
        out.rgb.sum().backward()
        strategy.after_step(10, 0.1, scene, optimizer, out)
        assert len(adc.views) == 33

    def test_relocation_takes_what_is_masked(self) -> None:
        """Gaussians that the masks leave out are dead to `mcmc`: it moves them onto others, with the masks of those."""
        scene = make_scene(masks=True)
        mcmc = Mcmc(McmcConfig(start=1, interval=1, min_interval=1, growth=0.0), scene, max_primitives=40, seed=0)
        strategy, optimizer = Compact(mcmc, scene), make_optimizer(scene)
        scene.mask_logits.data[:9] = -9.0
        out = scene.render(make_cameras())
        strategy.after_step(9, 0.5, scene, optimizer, out)
        assert scene.num_primitives == 40 and scene.kept.all()
        scene.mask_logits.data[:9] = -9.0
        strategy.after_step(19, 1.0, scene, optimizer, out)
        assert scene.num_primitives == 31


class TestPruning:
    def test_a_score_is_what_the_picture_loses(self) -> None:
        """Squared error without that Gaussian alone, in the mean over many random signs."""
        scene = make_scene(12)
        with torch.no_grad():
            whole = scene.render(make_cameras()).rgb
        for _ in range(300):
            scene.scores.add(scene, make_cameras())
        assert scene.scores.pictures == 300
        lost = []
        for row in range(12):
            without = scene.baked()
            without.opacity_logits.data[row] = -20.0
            with torch.no_grad():
                lost.append((without.render(make_cameras()).rgb - whole).square().sum())
        torch.testing.assert_close(scene.scores.values / 300, torch.stack(lost), rtol=0.3, atol=0.05)
        assert max(lost) > 5

    def test_in_rounds_it_drops_what_is_missed_least(self) -> None:
        """Of Gaussians that lie twice in the same place one is enough, and what lies behind the cameras goes first."""
        scene = make_scene(40, prune=0.5)
        scene.means.data[:10] = torch.tensor([0.0, 0.0, -8.0])
        scene.opacity_logits.data[10:20] = -4.0
        needed = scene.means.detach()[20:].clone()
        strategy = fixed(scene)
        fit(scene, strategy, picture(scene), 50)
        assert scene.num_primitives == 20 and strategy.rounds == 3
        assert torch.cdist(scene.means.detach(), needed).amin(1).max() < 0.1
        assert not strategy.scores.is_on

    def test_nothing_goes_before_growth_has_ended(self) -> None:
        scene = make_scene(40, prune=0.5)
        adc = Adc(AdcConfig(stop=0.9, start=100_000), scene, max_primitives=100, seed=0)
        strategy, optimizer = Compact(adc, scene), make_optimizer(scene)
        for progress in (0.2, 0.5, 0.89):
            out = scene.render(make_cameras(), extras=adc.extras)
            out.rgb.sum().backward()
            strategy.after_step(3, progress, scene, optimizer, out)
        assert scene.num_primitives == 40 and scene.scores.pictures == 0


class TestGrid:
    def test_rows_are_sorted_and_become_alike(self) -> None:
        """The picture stays; what lies side by side comes nearer than without the term."""
        found = {}
        for weight in (0.0, 1.0):
            scene = make_scene(144, sog=True, sog_weight=weight)
            truth = picture(scene)
            before = neighbor_distance(scene.grid_values().detach().numpy(), grid_width(144))
            fit(scene, fixed(scene), truth, 60)
            assert scene.grid_rows == 144
            found[weight] = neighbor_distance(scene.grid_values().detach().numpy(), grid_width(144))
            assert (picture(scene) - truth).square().mean() < 4e-3
        assert found[0.0] < before  # by the order alone
        assert found[1.0] < 0.95 * found[0.0]

    def test_sorting_changes_no_picture(self) -> None:
        scene = make_scene(144, sog=True)
        truth, means = picture(scene), scene.means.detach().clone()
        fixed(scene).after_step(9, 1.0, scene, make_optimizer(scene), scene.render(make_cameras()))
        assert not torch.equal(scene.means, means)
        torch.testing.assert_close(picture(scene), truth, rtol=1e-5, atol=1e-5)

    def test_the_gradient_of_roughness(self) -> None:
        """It is that of the distance to the blurred grid as it is now."""
        scene = make_scene(64, sog=True)
        scene.roughness().backward()
        assert scene.sh0.grad is not None and scene.quats.grad is not None
        values = scene.grid_values().detach()
        width = grid_width(64)
        cells = [(i // width, i % width) for i in range(64)]
        near = [[j for j, b in enumerate(cells) if max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 2] for a in cells]
        blurred = torch.stack([values[rows].mean(0) for rows in near])
        off = values - blurred
        huber = torch.where(off.abs() < 1, 0.5 * off.square(), off.abs() - 0.5)
        torch.testing.assert_close(scene.roughness().detach(), huber.mean())
        expected = off.clamp(-1, 1) / values.numel()
        columns = slice(8, 11)  # sh0
        torch.testing.assert_close(scene.sh0.grad[:, 0], expected[:, columns] / 0.12)

    def test_the_term_comes_every_few_steps_while_rows_are_sorted(self) -> None:
        scene = make_scene(sog=True, sog_weight=0.5)
        scene.is_smoothed = True
        assert "sog" not in scene.render(make_cameras()).penalties
        scene.grid_rows = 40
        out = scene.render(make_cameras())
        torch.testing.assert_close(out.penalties["sog"], 0.5 * SMOOTHED_EVERY * scene.roughness())
        scene.is_smoothed = False
        assert "sog" not in scene.render(make_cameras()).penalties


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 steps without a break."""
    return trained_once(tmp_path_factory, "compact", *_COMMON.split())


class TestHashColor:
    def test_it_has_no_harmonics_of_its_own_and_bakes_them(self) -> None:
        """The same picture, to the bit, as plain Gaussians."""
        torch.manual_seed(0)
        scene = make_scene(masks=True, hash=True)
        assert scene.shN.shape == (40, 0, 3) and scene.sh_degree == 1 and scene.color is not None
        scene.color.grid.table.data.mul_(1e4)
        scene.mask_logits.data[::3] = -9.0
        scene.active_sh_degree = 1
        plain = scene.baked()
        assert type(plain) is Gaussians and plain.shN.shape == (26, 3, 3) and plain.shN.abs().max() > 0.1
        assert torch.equal(picture(plain), picture(scene))
        plain.shN.data.zero_()
        assert (picture(plain) - picture(scene)).abs().max() > 0.01

    def test_it_learns_colours_that_change_with_the_direction(self) -> None:
        torch.manual_seed(0)
        truth = make_scene()
        truth.shN.data = (
            0.6 * truth.means.detach()[:, None, :].expand(40, 3, 3).contiguous()
        )  # smooth in space, as a hash grid can say it
        scene = make_scene(hash=True)
        before = (picture(scene) - picture(truth)).square().mean()
        scene.config = replace(
            scene.config, means_lr=0.0, opacity_logits_lr=0.0, log_scales_lr=0.0, quats_lr=0.0, sh0_lr=0.0
        )
        fit(scene, fixed(scene), picture(truth), 80)
        assert (picture(scene) - picture(truth)).square().mean() < 0.3 * before

    def test_rows_come_and_go_without_it(self) -> None:
        torch.manual_seed(0)
        scene = make_scene(hash=True)
        optimizer = make_optimizer(scene)
        names = [group["name"] for group in optimizer.param_groups]
        assert {"color.grid.table", "color.mlp.weights"} <= set(names) and set(scene.rows()) < set(scene.tensors())
        scene.render(make_cameras()).rgb.sum().backward()
        optimizer.step()
        table = scene.tensors()["color.grid.table"].clone()
        append_rows(scene, optimizer, {name: value[:5] for name, value in scene.rows().items()})
        keep_rows(scene, optimizer, torch.arange(45) % 2 == 0)
        assert scene.num_primitives == 23 and scene.render(make_cameras()).rgb.isfinite().all()
        assert torch.equal(scene.tensors()["color.grid.table"], table)
        again = CompactGaussians(scene.tensors(), scene.config, scene.compact)
        again.active_sh_degree = scene.active_sh_degree
        assert torch.equal(picture(again), picture(scene))


def test_a_sog_keeps_the_order_of_a_grid(tmp_path: Path) -> None:
    """Where neighbours in it are alike; else rows lie along a curve."""
    grid = make_scene(400)
    along = torch.linspace(-1, 1, 400)
    grid.log_scales.data[:] = along[:, None] - 3
    grid.sh0.data[:] = along[:, None, None]
    grid.opacity_logits.data[:] = along
    frame = SceneFrame(scale=1.0, center=(0.0, 0.0, 0.0))
    asset = SplatAsset.from_scene(grid, frame)
    shuffled = asset.take(np.random.default_rng(0).permutation(400))
    for name, given, is_kept in (("grid", asset, True), ("mixed", shuffled, False)):
        write_sog(tmp_path / f"{name}.sog", given)
        means = read_sog(tmp_path / f"{name}.sog").means
        assert np.allclose(means, given.means, atol=1e-3) == is_kept
        order = morton_order(given.means)
        assert np.allclose(means, given.means[order], atol=1e-3) != is_kept


def test_a_run_in_two_parts_is_the_run_in_one(run: Path, tmp_path: Path) -> None:
    parts = tmp_path / "run"
    done = command("train.cli", *_COMMON.split(), "--pause-at", 66, "--out", parts)
    assert done.returncode == 0, done.stderr
    first, _ = content(parts, 66)
    done = command("train.cli", "--resume", parts)
    assert done.returncode == 0, done.stderr
    last, state = same_content(parts, run, 80)
    assert {"scene.color.grid.table", "scene.mask_logits", "optimizer.mask_logits.exp_avg"} <= last.keys()
    assert 0 < len(last["scene.means"]) < len(first["scene.means"])  # dropped after the break
    assert state["strategy"]["compact_grid_rows"] == len(last["scene.means"])


def test_it_is_exported_and_measured(run: Path, tmp_path: Path) -> None:
    report = (run / "report.md").read_text()
    evaluate_run(EvalConfig(run, json=tmp_path / "eval.json"))
    assert f"| test PSNR | {json.loads((tmp_path / 'eval.json').read_text())['psnr']:.2f} dB |" in report
    scene = load(run)
    assert f"| primitives | {scene.num_primitives:,} |" in report
    for name in ("a.ply", "a.sog", "a.pfz"):
        export(ExportConfig(run, tmp_path / name, threads=2, writing=OutputOptions(verify=False)))
        assert len(load(tmp_path / name).asset()) == scene.num_primitives
    np.testing.assert_allclose(load(tmp_path / "a.ply").asset().means, scene.asset().means, rtol=1e-5, atol=1e-6)


def test_what_has_no_sense_is_refused() -> None:
    line = refused("train.cli", "--scene", "garden", "--compact.hash", "--gaussians.sh-degree", "0")
    assert "--compact.hash: there is no sense in it with --gaussians.sh-degree 0" in line
    line = refused("train.cli", "--scene", "garden", "--representation", "convexes", "--compact.masks")
    assert "--compact.masks: expected gaussians, got --representation convexes" in line
