"""Convexes that are split: where their parts lie, what they inherit, and which are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.output import RenderOutput
from prismfield.representations.convexes import Convexes, fibonacci_sphere
from prismfield.train.strategies.config import SplitConfig
from prismfield.train.strategies.split import Split, at_points, halves

from .test_strategies import assert_attached, make_optimizer, make_splats, moments, step_once

ONCE: dict[str, Any] = {"start": 1, "interval": 1, "min_interval": 1, "growth": "threshold", "grad_threshold": 0.5}


def make_points(count: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 1, 3, generator=generator) + 0.3 * torch.randn(count, 6, 3, generator=generator)


def output_for(gradients: Tensor, column: int | None = None) -> RenderOutput:
    """As after a backward pass in which convex i had this absolute gradient, or its parameter `column` this gradient."""
    params = torch.zeros(1, len(gradients), 17)
    params.grad = torch.zeros_like(params)
    absgrad = torch.zeros(1, len(gradients), 2)
    absgrad.grad = torch.zeros_like(absgrad)
    if column is None:
        absgrad.grad[0, :, 0] = gradients / 23  # half an image of 46 pixels
    else:
        params.grad[0, :, column] = gradients
    images = torch.zeros(1, 33, 46)
    radii = torch.ones(1, len(gradients), 2)
    return RenderOutput(images[..., None].expand(1, 33, 46, 3), images, params=params, radii=radii, absgrad=absgrad)


def test_halves_lie_end_to_end() -> None:
    """Squeezed along the longest axis alone, to either end of what they were."""
    points = make_points()
    parts = halves(points, 0.5)
    center = points.mean(1, keepdim=True)
    axis = torch.linalg.svd(points - center).Vh[:, 0]
    along = torch.einsum("nkc,nc->nk", points, axis)
    low, high = along.amin(1), along.amax(1)
    moved = torch.einsum("nhkc,nc->nhk", parts, axis)
    torch.testing.assert_close(moved.amin((1, 2)), low, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.amax((1, 2)), high, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.amax(2) - moved.amin(2), 0.5 * (high - low)[:, None].expand(-1, 2))
    across = parts - moved[..., None] * axis[:, None, None]
    before = points - along[..., None] * axis[:, None]
    torch.testing.assert_close(across, before[:, None].expand_as(across), atol=1e-5, rtol=1e-5)
    # Together they fill what they were: neither ends before the other begins
    inner = moved.amin(2).amax(1), moved.amax(2).amin(1)
    torch.testing.assert_close(*inner, atol=1e-5, rtol=1e-5)


def test_parts_at_points_are_small_copies() -> None:
    points = make_points()
    parts = at_points(points, 0.4)
    torch.testing.assert_close(parts.mean(2), points)
    arms = parts - parts.mean(2, keepdim=True)
    expected = 0.4 * (points - points.mean(1, keepdim=True))
    torch.testing.assert_close(arms, expected[:, None].expand_as(arms))


@pytest.mark.parametrize(("into", "each"), [("halves", 2), ("points", 4)])
def test_a_split_convex_is_replaced_by_its_parts(into: Any, each: int) -> None:
    scene = make_splats("convexes", 12)
    assert isinstance(scene, Convexes)
    optimizer = make_optimizer(scene)
    step_once(scene, optimizer, ("absgrad",))
    before = {name: value.clone() for name, value in scene.tensors().items()}
    seconds = moments(scene, optimizer, "exp_avg_sq")
    config = SplitConfig(**ONCE, into=into, part_opacity=0.5, part_delta=2.0, part_sigma=3.0, min_opacity=0.0)
    strategy = Split(config, scene, max_primitives=100, seed=0)
    gradients = torch.zeros(12)
    gradients[[3, 7]] = 1.0
    strategy.after_step(0, 0.1, scene, optimizer, output_for(gradients))
    assert_attached(scene, optimizer)
    assert scene.num_primitives == 12 + 2 * (each - 1)
    others = [row for row in range(12) if row not in (3, 7)]
    for name, value in scene.tensors().items():
        assert torch.equal(value[others], before[name][others]), name
    split = (halves if into == "halves" else at_points)(before["points"][[3, 7]], config.shrink)
    rows = [[3, *range(12, 11 + each)], [7, *range(11 + each, 10 + 2 * each)]]
    for which, row in enumerate((3, 7)):
        torch.testing.assert_close(scene.points[rows[which]], split[which])
        torch.testing.assert_close(scene.opacities[rows[which]], before["opacity_logits"][[row] * each].sigmoid() / 2)
        torch.testing.assert_close(scene.deltas[rows[which]], 2 * before["log_deltas"][[row] * each].exp())
        torch.testing.assert_close(scene.sigmas[rows[which]], 3 * before["log_sigmas"][[row] * each].exp())
        assert torch.equal(scene.sh0[rows[which]], before["sh0"][[row] * each])
        assert (optimizer.state[scene.points]["exp_avg"][rows[which]] == 0).all()
        for name, value in moments(scene, optimizer, "exp_avg_sq").items():
            assert torch.equal(value[rows[which]], seconds[name][[row] * each]), name
        assert seconds["points"][row].any()  # not of points inside the hull


@pytest.mark.parametrize("absgrad", [False, True])
def test_the_largest_gradients_come_first_where_there_is_little_room(absgrad: bool) -> None:
    scene = make_splats("convexes", 12)
    optimizer = make_optimizer(scene)
    strategy = Split(SplitConfig(**ONCE, into="halves", absgrad=absgrad), scene, max_primitives=15, seed=0)
    before = scene.tensors()["points"].clone()
    strategy.after_step(0, 0.1, scene, optimizer, output_for(1.0 + torch.arange(12.0), None if absgrad else -2))
    assert scene.num_primitives == 15
    moved = (scene.tensors()["points"][:12] != before).flatten(1).any(1)
    assert moved.nonzero().flatten().tolist() == [9, 10, 11]


def test_faint_ones_are_dropped() -> None:
    scene = make_splats("convexes", 12)
    scene.opacity_logits.data[[2, 5]] = -6.0
    optimizer = make_optimizer(scene)
    Split(SplitConfig(**ONCE), scene, max_primitives=15, seed=0).after_step(
        0, 0.1, scene, optimizer, output_for(torch.zeros(12))
    )
    assert scene.num_primitives == 10 and scene.opacities.min() > 0.03
    assert_attached(scene, optimizer)


def test_points_of_the_fibonacci_sphere_are_evenly_spread() -> None:
    for count in (3, 6, 12):
        points = fibonacci_sphere(count)
        torch.testing.assert_close(points.norm(dim=1), torch.ones(count, dtype=torch.float64))
        assert points.mean(0).norm() < 0.2
        distances = torch.cdist(points, points) + 9 * torch.eye(count, dtype=torch.float64)
        assert distances.amin(1).min() > 0.75 * distances.amin(1).max()
