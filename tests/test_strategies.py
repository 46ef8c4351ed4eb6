"""Strategies: rows change together with their moments, growth follows the gradients, relocation changes no picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prismfield.render.cameras import Cameras
from prismfield.render.ops.project import rotation_matrices
from prismfield.render.output import RenderOutput
from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.config import TRAINED_BY, ConvexesConfig, GaussiansConfig
from prismfield.representations.gaussians import Gaussians
from prismfield.representations.splats import Splats
from prismfield.train.strategies import mcmc
from prismfield.train.strategies.adc import Adc
from prismfield.train.strategies.base import STRATEGIES
from prismfield.train.strategies.config import AdcConfig, McmcConfig, SplitConfig
from prismfield.train.strategies.mcmc import MAX_COPIES, Mcmc, divided
from prismfield.train.strategies.rows import append_rows, keep_rows, replace_rows
from prismfield.train.strategies.schedule import Schedule

SPLATS: dict[str, Any] = {
    "gaussians": GaussiansConfig(sh_degree=1, sh_interval=0.2, means_lr=1e-2),
    "convexes": ConvexesConfig(sh_degree=1, sh_interval=0.2, points=4, init_opacity=0.1),
}
AABB = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def make_scene(count: int = 12, **options: Any) -> Gaussians:
    generator = torch.Generator().manual_seed(5)
    xyz = torch.rand(count, 3, generator=generator) * 2 - 1
    config = GaussiansConfig(sh_degree=1, **options)
    scene = Gaussians.from_points(xyz, torch.rand(count, 3, generator=generator), AABB, config)
    scene.quats.data = torch.randn(count, 4, generator=generator)
    return scene


def make_splats(kind: str, count: int = 40) -> Splats:
    generator = torch.Generator().manual_seed(5)
    xyz, rgb = torch.rand(2, count, 3, generator=generator)
    scene = REPRESENTATIONS[kind].from_points(xyz * 2 - 1, rgb, AABB, SPLATS[kind])
    assert isinstance(scene, Splats)
    return scene


def make_camera(distance: float = 3.0) -> Cameras:
    viewmat = torch.eye(4)
    viewmat[:3, :3] = torch.tensor([[0.8, 0, 0.6], [0, 1, 0], [-0.6, 0, 0.8]])
    viewmat[2, 3] = distance
    Ks = torch.tensor([[[60.0, 0, 21.0], [0, 48.0, 18.5], [0, 0, 1]]])
    return Cameras(viewmat[None], Ks, 46, 33)


def make_optimizer(scene: Splats) -> torch.optim.Adam:
    return torch.optim.Adam(scene.param_groups(), eps=1e-15)


def step_once(
    scene: Splats, optimizer: torch.optim.Optimizer, extras: tuple[str, ...] = (), distance: float = 3.0
) -> RenderOutput:
    out = scene.render(make_camera(distance), extras=extras)
    optimizer.zero_grad(set_to_none=True)
    (out.rgb - 0.3).square().mean().backward()
    optimizer.step()
    return out


def moments(scene: Splats, optimizer: torch.optim.Optimizer, key: str = "exp_avg") -> dict[str, Tensor]:
    return {name: optimizer.state[p][key].clone() for name, p in scene.named_parameters()}


def assert_attached(scene: Splats, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer holds the scene's parameters and nothing else, with moments of their shapes."""
    parameters = dict(scene.named_parameters())
    assert {g["name"]: id(g["params"][0]) for g in optimizer.param_groups} == {n: id(p) for n, p in parameters.items()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in parameters.values()}
    for name, parameter in parameters.items():
        assert getattr(scene, name) is parameter and parameter.is_leaf and parameter.requires_grad
        assert len(parameter) == scene.num_primitives
        for value in optimizer.state.get(parameter, {}).values():
            assert value.ndim == 0 or value.shape == parameter.shape


class TestRows:
    def test_keep(self) -> None:
        scene = make_scene()
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        before = {name: value.clone() for name, value in scene.tensors().items()}
        average, steps = moments(scene, optimizer), optimizer.state[scene.sh0]["step"].clone()
        kept = [0, 10, 11, 3, 4, 7]  # 8 goes
        keep = torch.zeros(12, dtype=torch.bool)
        keep[kept] = True
        keep_rows(scene, optimizer, keep)
        assert_attached(scene, optimizer)
        order = [0, 7, 10, 3, 4, 11]  # 7, 10 and 11 fill the gaps at 1, 2 and 5
        for name, value in scene.tensors().items():
            assert torch.equal(value, before[name][order])
            assert torch.equal(moments(scene, optimizer)[name], average[name][order])
        assert average["means"].abs().sum() > 0 and optimizer.state[scene.sh0]["step"] == steps

    def test_append(self) -> None:
        scene = make_scene()
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        before, square = scene.tensors(), moments(scene, optimizer, "exp_avg_sq")
        rows = {name: value[[3, 3]] + 1 for name, value in before.items()}
        append_rows(scene, optimizer, rows)
        assert_attached(scene, optimizer)
        for name, value in scene.tensors().items():
            assert torch.equal(value, torch.cat([before[name], rows[name]]))
            after = moments(scene, optimizer, "exp_avg_sq")[name]
            assert torch.equal(after[:12], square[name]) and (after[12:] == 0).all()

    def test_rows_come_and_go_in_the_same_memory(self) -> None:
        scene = make_scene(count=100)
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        expected = {name: value.clone() for name, value in scene.tensors().items()}
        append_rows(scene, optimizer, {name: value[:10] for name, value in expected.items()})
        place = scene.means.data_ptr()
        keep = torch.ones(110, dtype=torch.bool)
        keep[[5, 108]] = False
        keep_rows(scene, optimizer, keep)
        append_rows(scene, optimizer, {name: value[:20] for name, value in expected.items()})
        assert scene.means.data_ptr() == place and scene.num_primitives == 128
        rows = [*range(5), 9, *range(6, 100), *range(8), *range(20)]
        for name, value in scene.tensors().items():
            assert torch.equal(value, expected[name][rows]), name
            assert (moments(scene, optimizer)[name][100:] == 0).all()

    def test_replace(self) -> None:
        scene = make_scene()
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        before, average, means = scene.tensors(), moments(scene, optimizer), scene.means
        before = {name: value.clone() for name, value in before.items()}
        index = torch.tensor([7, 2])
        replace_rows(scene, optimizer, index, {"means": torch.ones(2, 3), "opacity_logits": torch.zeros(2)})
        assert_attached(scene, optimizer)
        assert scene.means is means and (scene.means[index] == 1).all() and (scene.opacity_logits[index] == 0).all()
        others = torch.tensor([i for i in range(12) if i not in (2, 7)])
        for name, value in scene.tensors().items():
            assert torch.equal(value[others], before[name][others])
            assert torch.equal(moments(scene, optimizer)[name][others], average[name][others])
        assert (moments(scene, optimizer)["means"][index] == 0).all()
        assert torch.equal(moments(scene, optimizer)["sh0"][index], average["sh0"][index])

    def test_training_goes_on_while_the_old_graph_is_alive(self) -> None:
        scene = make_scene()
        optimizer = make_optimizer(scene)
        out = step_once(scene, optimizer)
        append_rows(scene, optimizer, {name: value[:5] for name, value in scene.tensors().items()})
        again = step_once(scene, optimizer)
        assert out.rgb.grad_fn is not None and again.rgb.grad_fn is not None
        assert scene.means.grad is not None and scene.means.grad.shape == (17, 3)

    def test_before_the_first_step_and_beside_other_parameters(self) -> None:
        scene = make_scene()
        exposure = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([*scene.param_groups(), {"name": "exposure", "params": [exposure]}])
        keep_rows(scene, optimizer, torch.arange(12) < 4)
        assert optimizer.param_groups[-1]["params"][0] is exposure and len(optimizer.state) == 0
        assert scene.num_primitives == 4 and optimizer.param_groups[0]["params"][0] is scene.means

    def test_a_name_that_is_missing(self) -> None:
        scene = make_scene()
        with pytest.raises(ValueError, match="rows: expected means"):
            append_rows(scene, make_optimizer(scene), {"means": torch.zeros(1, 3)})


class TestSchedule:
    @staticmethod
    def steps(schedule: Schedule, total: int) -> list[int]:
        return [step for step in range(total) if schedule.due(step, (step + 1) / total)]

    def test_a_full_training(self) -> None:
        due = self.steps(Schedule(500, 100, 50, 0.5), 30_000)
        assert due[:3] == [499, 599, 699] and due[-1] == 14_899 and len(due) == 145

    def test_a_longer_one_keeps_the_intervals(self) -> None:
        due = self.steps(Schedule(500, 100, 50, 0.5), 60_000)
        assert due[:2] == [499, 599] and due[-1] == 29_899

    def test_a_shorter_one_shrinks_them_down_to_a_limit(self) -> None:
        due = self.steps(Schedule(3000, 3000, 50, 0.5), 7_000)
        assert due == [699, 1399, 2099, 2799]
        due = self.steps(Schedule(500, 100, 50, 0.5), 7_000)
        assert due[:3] == [116, 166, 216]

    def test_zero_is_never(self) -> None:
        assert self.steps(Schedule(0, 0, 50, 0.5), 1_000) == []

    def test_nothing_is_due_twice_or_before_time_has_passed(self) -> None:
        schedule = Schedule(10, 10, 5, 0.5)
        assert not schedule.due(9_000, 0.0)
        assert schedule.due(9_000, 0.3) and not schedule.due(9_000, 0.3)


def fake_output(gradients: Tensor, radii: Tensor | None = None, size: tuple[int, int] = (40, 20)) -> RenderOutput:
    """An output of [C, N, 2] screen gradients, in pixels."""
    params = torch.zeros(*gradients.shape[:2], 6)
    params.grad = torch.nn.functional.pad(gradients, (0, 4), value=99.0)
    absgrad = torch.zeros_like(gradients)
    absgrad.grad = gradients * 3
    radii = torch.ones_like(gradients) if radii is None else radii
    alpha = torch.zeros(len(gradients), size[1], size[0])
    return RenderOutput(alpha[..., None].expand(-1, -1, -1, 3), alpha, params=params, radii=radii, absgrad=absgrad)


ALWAYS = AdcConfig("threshold", absgrad=False, start=1, interval=1, min_interval=1, reset_interval=0)


class TestAdc:
    def test_the_score_is_a_mean_over_views_per_half_image(self) -> None:
        scene = make_scene()
        strategy = Adc(replace(ALWAYS, min_interval=100), scene, max_primitives=100, seed=0)
        optimizer = make_optimizer(scene)
        gradients = torch.zeros(2, 12, 2)
        gradients[:, 0] = torch.tensor([[0.3, 0.4], [0.0, 0.1]])
        gradients[0, 1] = torch.tensor([0.0, 0.2])
        radii = torch.ones(2, 12, 2)
        radii[1, 1] = 0
        strategy.after_step(0, 0.01, scene, optimizer, fake_output(gradients, radii))
        strategy.after_step(1, 0.02, scene, optimizer, fake_output(gradients[:1], radii[:1]))
        # Pixels to half widths of 20 and heights of 10; a batch of two halves each image's share of the loss.
        first = [2 * (6.0**2 + 4.0**2) ** 0.5, 2 * 1.0, (6.0**2 + 4.0**2) ** 0.5]
        scores = strategy.gradients / strategy.views
        assert scores[0].item() == pytest.approx(sum(first) / 3)
        assert scores[1].item() == pytest.approx((2 * 2.0 + 2.0) / 2)
        assert scores[2] == 0 and strategy.views.tolist() == [3, 2] + [3] * 10

    def test_absolute_gradients_come_from_the_extra(self) -> None:
        scene = make_scene()
        strategy = Adc(AdcConfig(), scene, max_primitives=100, seed=0)
        assert strategy.extras == ("absgrad",)
        assert Adc(ALWAYS, scene, max_primitives=100, seed=0).extras == ()
        strategy.after_step(0, 0.01, scene, make_optimizer(scene), fake_output(torch.ones(1, 12, 2)))
        assert strategy.gradients[0].item() == pytest.approx(3 * (20.0**2 + 10.0**2) ** 0.5)
        with pytest.raises(ValueError, match="screen gradients"):
            out = fake_output(torch.ones(1, 12, 2))
            out.absgrad = None
            strategy.after_step(1, 0.02, scene, make_optimizer(scene), out)

    @pytest.mark.parametrize(("factor", "grows"), [(0.9, False), (1.1, True)])
    @pytest.mark.parametrize("threshold", [0.0, 0.003])
    def test_the_threshold_is_the_originals_or_ones_own(self, threshold: float, factor: float, grows: bool) -> None:
        scene = make_scene()
        gradients = torch.zeros(1, 12, 2)
        gradients[0, 4, 1] = factor * (threshold or 0.0002) / 10  # half of 20 rows
        strategy = Adc(replace(ALWAYS, grad_threshold=threshold), scene, max_primitives=100, seed=0)
        strategy.after_step(0, 0.01, scene, make_optimizer(scene), fake_output(gradients))
        assert scene.num_primitives == 12 + grows

    def test_small_ones_are_cloned_and_large_ones_split(self) -> None:
        scene = make_scene()
        scene.log_scales.data[:] = np.log(0.005)
        scene.log_scales.data[3] = torch.tensor([0.3, 0.002, 0.001]).log()
        before = {name: value.clone() for name, value in scene.tensors().items()}
        gradients = torch.zeros(1, 12, 2)
        gradients[0, [1, 3]] = 1.0
        optimizer = make_optimizer(scene)
        config = replace(ALWAYS, max_extent=0)
        Adc(config, scene, max_primitives=100, seed=0).after_step(0, 0.01, scene, optimizer, fake_output(gradients))
        assert_attached(scene, optimizer)
        assert scene.num_primitives == 14
        for name, value in scene.tensors().items():
            assert torch.equal(value[12], before[name][1]) and torch.equal(value[1], before[name][1])  # the clone
            others = [i for i in range(12) if i != 3]
            assert torch.equal(value[others], before[name][others])
        halves = scene.tensors()
        for row in (3, 13):
            torch.testing.assert_close(halves["log_scales"][row].exp(), before["log_scales"][3].exp() / 1.6)
            offset = rotation_matrices(before["quats"][3]).T @ (halves["means"][row] - before["means"][3])
            assert 0 < offset[0].abs() < 1.5 and offset[1].abs() < 0.01 and offset[2].abs() < 0.005
        assert not torch.equal(halves["means"][3], halves["means"][13])

    def test_the_halves_of_a_split_spread_like_their_parent(self) -> None:
        scene = make_scene(count=1)
        scene.log_scales.data[:] = torch.tensor([0.3, 0.2, 0.1]).log()
        parent = {name: value.expand(4000, *value.shape[1:]) for name, value in scene.tensors().items()}
        scene = Gaussians.from_tensors(parent, scene.config)
        strategy = Adc(ALWAYS, scene, max_primitives=9000, seed=0)
        strategy.after_step(0, 0.01, scene, make_optimizer(scene), fake_output(torch.ones(1, 4000, 2)))
        assert scene.num_primitives == 8000
        axes = rotation_matrices(parent["quats"][:1])[0] * torch.tensor([0.3, 0.2, 0.1])
        torch.testing.assert_close(scene.means.T.cov(), axes @ axes.T, atol=0.004, rtol=0)

    def test_faint_ones_are_dropped_and_large_ones_after_a_reset(self) -> None:
        scene = make_scene()
        scene.opacity_logits.data[2] = -6.0
        scene.log_scales.data[:] = np.log(0.005)
        scene.log_scales.data[5, 1] = np.log(0.2)
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        strategy = Adc(replace(ALWAYS, reset_interval=2), scene, max_primitives=100, seed=0)
        kept = scene.means[[i for i in range(12) if i != 2]].clone()
        strategy.after_step(0, 1 / 30_000, scene, optimizer, fake_output(torch.zeros(1, 12, 2)))
        assert torch.equal(scene.means.sort(0).values, kept.sort(0).values) and scene.opacities.max() > 0.09
        strategy.after_step(1, 2 / 30_000, scene, optimizer, fake_output(torch.zeros(1, 11, 2)))
        assert scene.num_primitives == 11  # the reset comes after the pruning
        torch.testing.assert_close(scene.opacities, torch.full((11,), 0.01))
        assert (optimizer.state[scene.opacity_logits]["exp_avg"] == 0).all()
        assert optimizer.state[scene.sh0]["exp_avg"].abs().sum() > 0
        strategy.after_step(2, 3 / 30_000, scene, optimizer, fake_output(torch.zeros(1, 11, 2)))
        assert scene.num_primitives == 10 and scene.scales.max() < 0.1

    def test_wide_footprints_are_dropped_when_asked(self) -> None:
        scene = make_scene()
        optimizer = make_optimizer(scene)
        config = replace(ALWAYS, reset_interval=1, max_screen=0.1, max_extent=0)
        strategy = Adc(config, scene, max_primitives=100, seed=0)
        radii = torch.ones(1, 12, 2)
        radii[0, 4, 1] = 4.1  # of 40 columns
        strategy.after_step(0, 0.01, scene, optimizer, fake_output(torch.zeros(1, 12, 2), radii))
        gone = scene.means[4].clone()
        strategy.after_step(1, 0.02, scene, optimizer, fake_output(torch.zeros(1, 12, 2), radii))
        assert scene.num_primitives == 11 and not (scene.means == gone).all(1).any()

    def test_the_last_gaussian_is_never_dropped(self) -> None:
        scene = make_scene(count=2)
        scene.opacity_logits.data[:] = -9.0
        strategy = Adc(ALWAYS, scene, max_primitives=100, seed=0)
        strategy.after_step(0, 0.01, scene, make_optimizer(scene), fake_output(torch.zeros(1, 2, 2)))
        assert scene.num_primitives == 2

    def test_room_goes_to_the_largest_gradients(self) -> None:
        scene = make_scene()
        scene.log_scales.data[:] = np.log(0.005)
        gradients = torch.arange(1.0, 13)[None, :, None].expand(1, 12, 2)
        before = scene.means.clone()
        strategy = Adc(ALWAYS, scene, max_primitives=15, seed=0)
        strategy.after_step(0, 0.01, scene, make_optimizer(scene), fake_output(gradients))
        assert torch.equal(scene.means, torch.cat([before, before[[9, 10, 11]]]))
        gradients = torch.ones(1, 15, 2)
        strategy.after_step(1, 0.02, scene, make_optimizer(scene), fake_output(gradients))
        assert scene.num_primitives == 15

    def test_a_budget_is_spent_along_a_curve(self) -> None:
        scene = make_scene(count=100)
        config = replace(ALWAYS, growth="budget", stop=0.4)
        strategy = Adc(config, scene, max_primitives=500, seed=0)
        counts = []
        for step in range(20):
            gradients = torch.rand(1, scene.num_primitives, 2) + 0.01
            strategy.after_step(step, (step + 1) / 40, scene, make_optimizer(scene), fake_output(gradients))
            counts.append(scene.num_primitives)
        # 100 + 400 (1 - (1 - t)^2), t = progress / 0.4; a Gaussian can at most double.
        assert counts[3] == 100 + round(400 * (1 - (1 - 0.25) ** 2)) and counts[7] == 400
        assert counts[14] == round(100 + 400 * (1 - (1 / 16) ** 2)) and counts[-1] == counts[14]

    def test_nothing_changes_after_the_stop(self) -> None:
        scene = make_scene()
        scene.opacity_logits.data[2] = -6.0
        strategy = Adc(ALWAYS, scene, max_primitives=100, seed=0)
        strategy.after_step(0, 0.5, scene, make_optimizer(scene), fake_output(torch.ones(1, 12, 2)))
        assert scene.num_primitives == 12


class TestDivision:
    """Eq. 9 of 3DGS-MCMC: one Gaussian and the n that replace it look alike."""

    @pytest.mark.parametrize("copies", [1, 2, 3, 10, MAX_COPIES])
    @pytest.mark.parametrize("opacity", [0.02, 0.5, 0.9, 0.99])
    def test_centre_and_integral_along_a_line_are_kept(self, opacity: float, copies: int) -> None:
        new, scales = divided(torch.tensor([opacity]), torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([copies]))
        assert 1 - (1 - new.item()) ** copies == pytest.approx(opacity, rel=2e-5)
        x = np.linspace(-20, 20, 40_001)
        together = 1 - (1 - new.item() * np.exp(-0.5 * (x / scales[0, 0].item()) ** 2)) ** copies
        # A tall stack has a flat top and must be narrower; its integral is numeric here, a sum in the code.
        assert np.trapezoid(together, x) == pytest.approx(opacity * 2.0 * (2 * np.pi) ** 0.5, rel=1e-4)
        ratios = scales[0] / torch.tensor([2.0, 1.0, 0.5])
        assert ratios.max() - ratios.min() < 1e-6 and (copies > 1 or ratios[0].item() == pytest.approx(1.0))

    def test_the_double_sum_of_the_paper(self) -> None:
        from math import comb

        opacity, copies = 0.83, 7
        new = 1 - (1 - opacity) ** (1 / copies)
        denominator = sum(
            comb(i - 1, k) * (-1) ** k * new ** (k + 1) / (k + 1) ** 0.5 for i in range(1, copies + 1) for k in range(i)
        )
        _, scales = divided(torch.tensor([opacity]), torch.ones(1, 3), torch.tensor([copies]))
        assert scales[0, 0].item() == pytest.approx(opacity / denominator, rel=1e-5)

    def test_saturated_opacities_and_too_many_copies_stay_finite(self) -> None:
        copies = torch.tensor([1, 2, 51, 51, 4000])
        new, scales = divided(torch.tensor([1.0, 1.0, 1.0, 1e-4, 0.5]), torch.ones(5, 3), copies)
        assert torch.isfinite(new).all() and torch.isfinite(scales).all() and (scales > 0).all() and (new > 0).all()
        capped, _ = divided(torch.tensor([0.5]), torch.ones(1, 3), torch.tensor([MAX_COPIES]))
        assert new[4] == capped[0]

    @pytest.mark.parametrize("copies", [2, 5, 20])
    def test_the_picture_stays(self, copies: int) -> None:
        scene = make_scene(count=1, init_opacity=0.8)
        scene.means.data[:] = 0.05
        scene.log_scales.data[:] = torch.tensor([0.5, 0.3, 0.4]).log()
        before = scene.render(make_camera()).rgb
        opacities, scales = divided(scene.opacities.detach(), scene.scales.detach(), torch.tensor([copies]))
        rows = scene.tensors() | {"opacity_logits": opacities.logit(), "log_scales": scales.log()}
        stacked = {name: value.expand(copies, *value.shape[1:]) for name, value in rows.items()}
        after = Gaussians.from_tensors(stacked, scene.config).render(make_camera()).rgb
        naive = Gaussians.from_tensors(stacked | {"log_scales": scene.log_scales.expand(copies, 3)}, scene.config)
        wrong = (naive.render(make_camera()).rgb - before).detach().abs()
        right = (after - before).detach().abs()
        # Not zero: the stack has a flatter top, and every copy is cut where it alone falls below 1/255.
        assert right.mean() < 0.45 * wrong.mean() and right.max() < 0.75 * wrong.max()
        assert right.max() < (0.05 if copies < 20 else 0.14) * before.max()


class TestMcmc:
    CONFIG = McmcConfig(start=1, interval=1, min_interval=1, noise=0.0)

    def test_dead_ones_move_onto_live_ones(self) -> None:
        scene = make_scene(init_opacity=0.6)
        dead = [1, 4, 8]
        scene.opacity_logits.data[dead] = torch.tensor([0.25, 0.29, 0.01]).logit()
        scene.opacity_logits.data[9] = 4.0
        optimizer = make_optimizer(scene)
        step_once(scene, optimizer)
        before = {name: value.clone() for name, value in scene.tensors().items()}
        config = replace(self.CONFIG, growth=0.0, min_opacity=0.3)
        strategy = Mcmc(config, scene, max_primitives=12, seed=0)
        strategy.after_step(0, 0.1, scene, optimizer, fake_output(torch.zeros(1, 12, 2)))
        assert_attached(scene, optimizer)
        assert scene.num_primitives == 12 and scene.opacities.min() > 0.29
        for row in dead:
            source = (before["means"] - scene.means[row]).abs().sum(1).argmin()
            assert source not in dead and torch.equal(scene.means[row], before["means"][source])
            for name in ("quats", "sh0", "shN"):
                assert torch.equal(scene.tensors()[name][row], before[name][source])
            group = (scene.means == scene.means[row]).all(1)
            assert group.sum() >= 2 and (scene.opacities[group] == scene.opacities[row]).all()
            covered = 1 - (1 - scene.opacities[group]).prod()
            assert covered.item() >= before["opacity_logits"][source].sigmoid().item() - 1e-4
            assert (scene.scales[row] < before["log_scales"][source].exp()).all()
            assert all((moment[row] == 0).all() for moment in moments(scene, optimizer).values())

    def test_growth_draws_by_opacity_up_to_the_cap(self) -> None:
        scene = make_scene(count=1000)
        scene.opacity_logits.data[:500] = -4.0
        scene.opacity_logits.data[500:] = 1.0
        optimizer = make_optimizer(scene)
        strategy = Mcmc(replace(self.CONFIG, growth=0.4), scene, max_primitives=1500, seed=0)
        means = scene.means.clone()
        strategy.after_step(0, 0.1, scene, optimizer, fake_output(torch.zeros(1, 1000, 2)))
        assert scene.num_primitives == 1400 and torch.equal(scene.means[:1000], means)
        faint = (scene.means[1000:, None] == means[None, :500]).all(-1).any(-1).float().mean()
        assert faint.item() == pytest.approx(0.018 / (0.018 + 0.731), abs=0.03)
        strategy.after_step(1, 0.2, scene, optimizer, fake_output(torch.zeros(1, 1400, 2)))
        assert scene.num_primitives == 1500
        strategy.after_step(2, 0.3, scene, optimizer, fake_output(torch.zeros(1, 1500, 2)))
        assert scene.num_primitives == 1500

    def test_a_scene_of_dead_ones_is_left_alone(self) -> None:
        scene = make_scene(init_opacity=0.001)
        before = scene.means.clone()
        strategy = Mcmc(replace(self.CONFIG, growth=0.0), scene, max_primitives=12, seed=0)
        strategy.after_step(0, 0.1, scene, make_optimizer(scene), fake_output(torch.zeros(1, 12, 2)))
        assert torch.equal(scene.means, before)

    @pytest.mark.parametrize("at_once", [False, True])
    def test_noise_has_the_shape_of_the_gaussian_and_spares_the_opaque(
        self, at_once: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At once: as on a GPU."""
        monkeypatch.setattr(mcmc, "_all_at_once", lambda _device: at_once)
        one = make_scene(count=1)
        one.log_scales.data[:] = torch.tensor([0.3, 0.2, 0.05]).log()
        rows = {name: value.expand(6000, *value.shape[1:]) for name, value in one.tensors().items()}
        logits = torch.full((6000,), 0.01).logit()
        logits[4000:5000], logits[5000:] = torch.tensor(0.03).logit(), torch.tensor(0.5).logit()
        scene = Gaussians.from_tensors(rows | {"opacity_logits": logits}, one.config)
        strategy = Mcmc(McmcConfig(noise=50.0, start=100), scene, max_primitives=6000, seed=0)
        optimizer = make_optimizer(scene)
        optimizer.param_groups[0]["lr"] = 0.1
        strategy.after_step(0, 0.9, scene, optimizer, fake_output(torch.zeros(1, 6000, 2)))
        offsets = scene.means.detach() - rows["means"]
        assert (offsets[5000:] == 0).all()
        axes = rotation_matrices(rows["quats"][0]) * torch.tensor([0.3, 0.2, 0.05])
        covariance = axes @ axes.T
        for part, opacity in ((offsets[:4000], 0.01), (offsets[4000:5000], 0.03)):
            strength = 0.1 * 50.0 / (1 + np.exp(-100 * ((1 - opacity) - 0.995)))
            expected = strength**2 * covariance @ covariance
            torch.testing.assert_close(part.T.cov(), expected, atol=0.12 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SPLATS for name in sorted(TRAINED_BY[kind])])
class TestEveryStrategy:
    TOTAL = 60

    def start(self, kind: str, name: str) -> tuple[Splats, torch.optim.Optimizer, Any]:
        scene = make_splats(kind)
        adc = AdcConfig("budget", start=4, interval=4, min_interval=4, reset_interval=13, stop=0.8, max_extent=0)
        config = {
            "adc": adc,
            "mcmc": McmcConfig(start=4, interval=4, min_interval=4, growth=0.1, noise=10.0),
            "split": SplitConfig(start=4, interval=4, min_interval=4, reset_interval=13, stop=0.8, min_opacity=0.005),
            "fixed": None,
        }[name]
        return scene, make_optimizer(scene), STRATEGIES[name](config, scene, max_primitives=90, seed=7)

    def go(self, scene: Splats, optimizer: Any, strategy: Any, steps: range) -> None:
        for step in steps:
            # The near camera does not see all of them.
            out = step_once(scene, optimizer, tuple(strategy.extras), 3.0 if step % 3 else 0.5)
            strategy.after_step(step, (step + 1) / self.TOTAL, scene, optimizer, out)
            assert_attached(scene, optimizer)

    def test_resume_is_exact(self, kind: str, name: str) -> None:
        torch.manual_seed(0)
        scene, optimizer, strategy = self.start(kind, name)
        self.go(scene, optimizer, strategy, range(22))
        saved = {n: t.clone() for n, t in scene.tensors().items()}
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in strategy.state_dict().items()}
        assert all(isinstance(v, Tensor | int | float) for v in state.values())
        moments_saved = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in scene.named_parameters()}
        self.go(scene, optimizer, strategy, range(22, 44))

        torch.manual_seed(1)  # nothing may depend on the global generator
        _, _, fresh = self.start(kind, name)
        resumed = type(scene).from_tensors(saved, scene.config)
        assert resumed.num_primitives != 40 or name == "fixed"
        again = make_optimizer(resumed)
        for n, p in resumed.named_parameters():
            again.state[p] = moments_saved[n]
        fresh.load_state_dict(state, resumed)
        assert resumed.active_sh_degree == 1 and fresh.state_dict().keys() == state.keys()
        self.go(resumed, again, fresh, range(22, 44))
        for n, tensor in scene.tensors().items():
            assert torch.equal(tensor, resumed.tensors()[n]), n

    def test_the_degree_is_raised_and_restored(self, kind: str, name: str) -> None:
        scene, optimizer, strategy = self.start(kind, name)
        self.go(scene, optimizer, strategy, range(2))
        assert scene.active_sh_degree == 0
        loaded = type(scene).from_tensors(scene.tensors(), scene.config)
        assert loaded.active_sh_degree == 1
        self.start(kind, name)[2].load_state_dict(strategy.state_dict(), loaded)
        assert loaded.active_sh_degree == 0
        self.go(scene, optimizer, strategy, range(2, 12))
        assert scene.active_sh_degree == 1

    def test_a_finished_scene_keeps_its_degree(self, kind: str, name: str) -> None:
        scene, _, _ = self.start(kind, name)
        scene = type(scene).from_tensors(scene.tensors(), scene.config)
        strategy = type(self.start(kind, name)[2])(self.start(kind, name)[2].config, scene, max_primitives=64, seed=0)
        self.go(scene, make_optimizer(scene), strategy, range(1))
        assert scene.active_sh_degree == 1

    def test_the_cap_holds(self, kind: str, name: str) -> None:
        scene, optimizer, strategy = self.start(kind, name)
        self.go(scene, optimizer, strategy, range(50))
        assert scene.num_primitives <= 90
        assert scene.num_primitives == 40 if name == "fixed" else scene.num_primitives > 60

    def test_a_cap_of_nothing_is_refused(self, kind: str, name: str) -> None:
        scene, _, strategy = self.start(kind, name)
        with pytest.raises(ValueError, match="max_primitives"):
            STRATEGIES[name](strategy.config, scene, max_primitives=0, seed=0)
