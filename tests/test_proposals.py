"""Proposals: where they send the samples of an unbounded field, what they learn, and runs that rely on them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.samplers import proposal_samples
from prismfield.representations.config import FieldConfig
from prismfield.representations.fields import HashField
from prismfield.representations.proposals import Proposals

from .test_fields import BOX, EMPTY, SMALL, make_camera, show

AUTO = replace(SMALL, sampler="auto")


def make_field(extent: Any = "space", **options: Any) -> HashField:
    torch.manual_seed(0)
    return HashField.from_points(*EMPTY, replace(AUTO, extent=extent, **options))


def wall(xyz: Tensor) -> Tensor:
    return (xyz[:, 2] > 0.1) & (xyz[:, 2] < 0.5)


def test_space_has_proposals_and_a_box_an_occupancy_grid() -> None:
    assert make_field("box").proposals is None and make_field("space").proposals is not None
    assert make_field("box", sampler="proposals").proposals is not None
    assert make_field("space", sampler="occupancy").proposals is None
    names = {name for name, _ in make_field("space").named_parameters()}
    assert {"proposals.grids.0.table", "proposals.grids.1.table"} < names
    assert FieldConfig().sampler == "auto"


@pytest.mark.parametrize("extent", ["box", "space"])
def test_they_learn_where_a_wall_is(extent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the field's weights alone; then few samples draw it as it is."""
    field = make_field(extent, sampler="proposals", proposals=(32, 24, 12))
    show(monkeypatch, field, wall)
    assert field.proposals is not None
    camera, inside = make_camera(), (slice(0, 1), slice(15, 20), slice(15, 27))

    def error() -> float:
        with torch.no_grad():
            out = field.render(camera, extras=("median_depth",))
        assert out.median_depth is not None
        return float((out.median_depth[inside] - 3.1).abs().mean())

    before = error()
    field.jitter = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(field.proposals.parameters(), lr=0.1)
    for step in range(60):
        field.advance(step / 60)
        optimizer.zero_grad()
        loss = field.render(camera).penalties["proposals"]
        loss.backward()
        optimizer.step()
    field.jitter = None
    assert error() < 0.03 < before
    samples, histograms = field._propose(
        torch.tensor([[0.0, 0.0, -3.0]]), torch.tensor([[0.0, 0.0, 1.0]]), None, (32, 24, 12)
    )
    assert len(samples) == 12 and [h.weights.shape[1] for h in histograms] == [32, 24]
    assert int((samples.mids > 2.9).logical_and(samples.mids < 3.6).sum()) >= 6


def test_the_penalty_reaches_the_proposals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    field = make_field()
    show(monkeypatch, field, wall)
    field.render(make_camera()).penalties["proposals"].backward()
    learned = {name for name, p in field.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert learned == {"proposals.grids.0.table", "proposals.grids.1.table"}


def test_proposals_count_for_less_at_first() -> None:
    """At the start of a training pieces are even, half of what they say counts after a ninth of it (10 s / (9 s + 1), Mip-NeRF
    360, supplement, section A), all of it in a finished picture."""
    proposals, seen = Proposals(1), []
    rays = (torch.zeros(4, 3), torch.nn.functional.normalize(torch.ones(4, 3), dim=-1))

    def density(grid: Any, xyz: Tensor) -> Tensor:
        seen.append(len(xyz))
        return 2.0 * (xyz.norm(dim=-1) < 1.5).float()

    def near_part(share: float, generator: torch.Generator | None) -> float:
        proposals.progress.fill_(share)
        options: dict[str, Any] = {"near": 0.0, "far": 100.0, "counts": (64, 400), "unit": 1.0, "generator": generator}
        samples, _ = proposals.sample(*rays, density, **options)
        return float((samples.mids < 0.5).float().mean())

    late = near_part(0.0, None)
    early = near_part(0.0, torch.Generator().manual_seed(0))
    middle = near_part(0.3, torch.Generator().manual_seed(0))
    last = near_part(1.0, torch.Generator().manual_seed(0))
    assert early == pytest.approx(1 / 3, abs=0.02) and last == pytest.approx(late, abs=0.02)
    assert last == pytest.approx((1 - math.exp(-1)) / (1 - math.exp(-3)), abs=0.03)
    assert early + 0.1 < middle < last - 0.01
    assert seen == [4 * 64] * 4


def test_pieces_are_even_in_the_shifted_inverse() -> None:
    """With a unit, half of the pieces lie nearer than the unit from a near plane of 0, and the last reaches the far one."""
    rays = (torch.zeros(2, 3), torch.eye(3)[:2])
    samples, histograms = proposal_samples(*rays, 0.0, 1e9, [lambda x: torch.zeros(len(x))], [10, 8], unit=2.0)
    edges = histograms[0].edges[0].double()
    torch.testing.assert_close(1 / (edges[:-1] + 2), torch.linspace(0.5, 0.05, 10).double(), rtol=1e-4, atol=1e-6)
    assert float(edges[5]) == pytest.approx(2.0, rel=1e-4) and float(edges[-1]) == pytest.approx(1e9)
    assert len(samples) == 16


def test_a_finished_field_asks_the_same_each_time() -> None:
    field = make_field()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    again = HashField.from_tensors(field.tensors(), replace(AUTO, extent="space"))
    with torch.no_grad():
        whole = again.render(make_camera())
        assert torch.equal(whole.rgb, field.render(make_camera()).rgb)
        some = again.render(make_camera(), torch.tensor([[0, 5, 9], [0, 40, 30]]))
    torch.testing.assert_close(some.rgb, whole.rgb[0, [9, 30], [5, 40]], atol=1e-5, rtol=0)


def test_bounds_do_not_matter_to_what_is_far() -> None:
    """The far plane of a box is behind it, wherever the cameras are."""
    field = make_field("box", sampler="proposals")
    origins = torch.tensor([[0.0, 0.0, -40.0]])
    samples, _ = field._propose(origins, torch.tensor([[0.0, 0.0, 1.0]]), None, (32, 24, 12))
    assert float(samples.t_ends.max()) > 40 + float(BOX[1, 2])
