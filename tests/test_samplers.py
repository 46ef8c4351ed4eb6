"""Samplers: the occupancy grid's walk against the specification, its upkeep, even pieces, proposals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.ops.march import clip_to_box, march_occupancy, march_occupancy_reference
from prismfield.render.samplers import (
    Histogram,
    OccupancyGrid,
    Samples,
    interlevel_loss,
    proposal_samples,
    resample,
    uniform_samples,
)

from .raster_fixtures import usable_levels, use_kernels

AABB = torch.tensor([[-1.0, -0.7, -0.4], [0.8, 1.1, 0.9]])
RAYS = [0, 1, 17, 300]


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels."""
    use_kernels(monkeypatch, request.param)
    return request.param


def make_rays(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """From inside and outside of the box, along axes, past it, not all of them where it is looked for."""
    generator = torch.Generator().manual_seed(count)
    origins = 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    target = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 1.6 - 0.7
    dirs = target - origins
    dirs[::5, :2] = 0
    origins[::5, :2] = target[::5, :2]
    dirs[1::9, 1] = 0
    return origins.to(dtype), torch.nn.functional.normalize(dirs, dim=-1).to(dtype)


def make_grid(levels: int, resolution: int = 32, share: float = 0.3) -> OccupancyGrid:
    """Occupied in lumps and in single cells; much of it empty."""
    grid = OccupancyGrid(AABB, resolution, levels)
    generator = torch.Generator().manual_seed(levels)
    lumps = torch.rand(levels, *[resolution // 8] * 3, generator=generator) < share
    occupied = lumps
    for axis in (1, 2, 3):
        occupied = occupied.repeat_interleave(8, axis)
    grid.set_occupied(occupied | (torch.rand(occupied.shape, generator=generator) < 0.01))
    return grid


def check_packed(samples: Samples, rays: int) -> None:
    """Sorted by ray, then by distance; the runs are those of the rays."""
    start, count = samples.packed_info.unbind(-1)
    assert torch.equal(count, torch.bincount(samples.ray_indices, minlength=rays))
    assert torch.equal(start, count.cumsum(0) - count)
    assert (samples.ray_indices.diff() >= 0).all()
    assert (samples.t_ends >= samples.t_starts).all()
    same = samples.ray_indices.diff() == 0
    assert (samples.t_starts.diff()[same] >= (samples.t_ends - samples.t_starts)[:-1][same] * 0.999).all()


def unmatched(a: Samples, b: Samples) -> int:
    """How many of `a` have none in `b` with the same midpoint and length."""
    place = [1000.0 * s.ray_indices + s.mids.double() for s in (a, b)]
    if not len(b):
        return len(a)
    after = torch.searchsorted(place[1], place[0]).clamp(max=len(b) - 1)
    before = (after - 1).clamp(min=0)
    nearest = torch.where((place[1][after] - place[0]).abs() < (place[1][before] - place[0]).abs(), after, before)
    lengths = [(s.t_ends - s.t_starts).double() for s in (a, b)]
    fits = (place[1][nearest] - place[0]).abs() < 1e-4
    return int((~fits | ((lengths[1][nearest] - lengths[0]).abs() > 1e-4)).sum())


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("cone", [0.0, 0.02])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("rays", RAYS)
def test_walk_against_reference(build: Any, rays: int, levels: int, cone: float) -> None:
    """The walk skips nothing that every step of the reference finds, and finds no more."""
    grid, (origins, dirs) = make_grid(levels), make_rays(rays)
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(rays, generator=generator)
    t_range = torch.tensor([0.05, 7.0]).repeat(rays, 1)
    t_range[::4] = torch.tensor([1.0, 2.5])
    inputs = (origins, dirs, t_range, jitter)
    got = march_occupancy(*inputs, grid.bits, grid.aabb, step=0.011, cone=cone, max_samples=10_000)
    double = tuple(t.double() for t in inputs)
    wanted = march_occupancy_reference(*double, grid.bits, grid.aabb.double(), 0.011, cone, 10_000)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64, torch.int64]
    check_packed(Samples(*got), rays)
    assert len(wanted[0]) >= 5 * (rays - 1)
    # Rounding moves a step a little, and so a midpoint at the border of a cell into the next
    assert unmatched(Samples(*got), Samples(*wanted)) <= 1e-3 * len(wanted[0])
    assert unmatched(Samples(*wanted), Samples(*got)) <= 1e-3 * len(wanted[0])


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_samples_are_where_the_grid_is_occupied(build: Any) -> None:
    """Against the cells themselves, not against the reference's search for them."""
    grid, (origins, dirs) = make_grid(2), make_rays(100)
    samples = grid.sample(origins, dirs, 0.0, 9.0, 0.02, max_samples=1000)
    boxes = [AABB.mean(0) + (AABB - AABB.mean(0)) * 2**level for level in range(2)]
    every = uniform_samples(origins, dirs, 0.0, 9.0, 450)
    occupied = grid.occupied
    found = {}
    for name, some in (("kept", samples), ("all", every)):
        xyz = some.points(origins, dirs)[0]
        inside = [((xyz > box[0]) & (xyz < box[1])).all(-1) for box in boxes]
        hit = torch.zeros(len(some), dtype=torch.bool)
        for level in (1, 0):
            cell = ((xyz - boxes[level][0]) / (boxes[level][1] - boxes[level][0]) * 32).long().clamp(0, 31)
            hit = torch.where(inside[level], occupied[level][cell.unbind(-1)], hit)
        found[name] = hit.float()
    assert found["kept"].mean() > 0.998
    lengths = [
        float((s.t_ends - s.t_starts).double() @ found[name].double())
        for name, s in (("kept", samples), ("all", every))
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)


@pytest.mark.parametrize("build", [None, *usable_levels()], indirect=True)
@pytest.mark.parametrize("jittered", [False, True])
def test_no_length_is_lost_in_a_full_grid(build: Any, jittered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prismfield.render.kernels.told", True)
    origins, dirs = make_rays(60)
    jitter = torch.rand(60) if jittered else None
    for cone in (0.0, 0.05):
        samples = OccupancyGrid(AABB, 16).sample(
            origins, dirs, 0.3, 4.0, 0.05, max_samples=999, jitter=jitter, cone=cone
        )
        check_packed(samples, 60)
        part = clip_to_box(origins, dirs, AABB, torch.tensor([0.3, 4.0]).expand(60, 2))
        length = torch.zeros(60).index_add_(0, samples.ray_indices, samples.t_ends - samples.t_starts)
        torch.testing.assert_close(length, (part[:, 1] - part[:, 0]).clamp(min=0), rtol=1e-4, atol=1e-4)
        longest = torch.maximum(0.05 * samples.t_ends, torch.tensor(0.05)) if cone else torch.tensor(0.05)
        assert (samples.t_ends - samples.t_starts <= longest + 1e-5).all()


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_the_nearest_samples_are_kept(build: Any) -> None:
    grid, (origins, dirs) = make_grid(2), make_rays(100)
    every, some = (grid.sample(origins, dirs, 0.0, 9.0, 0.02, max_samples=n) for n in (1000, 7))
    count = every.packed_info[:, 1]
    assert torch.equal(some.packed_info[:, 1], count.clamp(max=7))
    place = torch.arange(len(every)) - every.packed_info[every.ray_indices, 0]
    assert torch.equal(some.t_starts, every.t_starts[place < 7])
    assert torch.equal(some.ray_indices, every.ray_indices[place < 7])


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_the_number_of_threads_changes_nothing(build: Any) -> None:
    grid, (origins, dirs) = make_grid(3), make_rays(700)
    found = []
    before = build.num_threads()
    try:
        for threads in (1, 3):
            build.set_num_threads(threads)
            found.append(grid.sample(origins, dirs, 0.0, 9.0, 0.02, max_samples=1000, jitter=torch.full((700,), 0.3)))
    finally:
        build.set_num_threads(before)
    for name in ("t_starts", "t_ends", "ray_indices", "packed_info"):
        assert torch.equal(*(getattr(s, name) for s in found)), name


@pytest.mark.parametrize("build", [None, *usable_levels()], indirect=True)
def test_rays_that_are_none(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN, no direction, an end before the start: no samples and no crash."""
    monkeypatch.setattr("prismfield.render.kernels.told", True)
    origins = torch.zeros(4, 3)
    origins[0, 1] = math.nan
    dirs = torch.tensor([[0.0, 0, 1]]).repeat(4, 1)
    dirs[1, 2] = math.inf
    far = torch.tensor([9.0, 9.0, 1.0, math.inf])
    samples = OccupancyGrid(AABB, 16).sample(origins, dirs, torch.tensor([0.0, 0, 2, 0]), far, 0.1, max_samples=99)
    assert samples.packed_info[:, 1].tolist() == [0, 0, 0, 9]


def test_bits_and_cells_are_the_same() -> None:
    grid = OccupancyGrid(AABB, 16, 2)
    assert grid.occupied.all()
    occupied = torch.rand(2, 16, 16, 16) < 0.3
    grid.set_occupied(occupied)
    assert torch.equal(grid.occupied, occupied)
    other = OccupancyGrid(torch.tensor([[0.0, 0, 0], [1, 1, 1]]), 16, 2)
    other.load_state_dict(grid.state_dict())
    assert torch.equal(other.occupied, occupied)
    assert torch.equal(other.aabb, AABB)


def test_update_finds_what_is_there() -> None:
    """A slab in world units, in each level; then it goes away, and the memory of it decays."""
    grid = OccupancyGrid(AABB, 16, 2)
    centers = grid.centers()

    def slab(xyz: Tensor) -> Tensor:
        return 50.0 * (xyz[:, 0] > 0.2)

    grid.update(slab, threshold=1.0, generator=torch.Generator().manual_seed(0))
    half = (AABB[1, 0] - AABB[0, 0]) / 16 / 2 * torch.tensor([1.0, 2.0])[:, None, None, None]
    assert grid.occupied[centers[..., 0] > 0.2 + half].all()
    assert not grid.occupied[centers[..., 0] < 0.2 - half].any()
    for _ in range(3):
        grid.update(lambda xyz: torch.zeros(len(xyz)), decay=0.5, threshold=6.0)
    torch.testing.assert_close(grid.density.max(), torch.tensor(50 / 8.0))
    assert grid.occupied.any()
    grid.update(lambda xyz: torch.zeros(len(xyz)), decay=0.5, threshold=6.0)
    # Below the threshold, but above the mean of a field that has less everywhere
    assert torch.equal(grid.occupied, grid.density > grid.density.mean())


def test_update_of_some_cells() -> None:
    """Half of them occupied ones; those that are not looked at keep what they have; chosen twice, decayed once."""
    grid = OccupancyGrid(AABB, 16)
    grid.density.fill_(8.0)
    occupied = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
    occupied[:, 3:5] = True
    grid.set_occupied(occupied)
    asked = []

    def nothing(xyz: Tensor) -> Tensor:
        asked.append(xyz)
        return torch.zeros(len(xyz))

    grid.update(nothing, decay=0.5, threshold=1.0, cells=400, generator=torch.Generator().manual_seed(0))
    xyz = torch.cat(asked)
    assert len(xyz) == 400
    column = ((xyz[:, 0] - AABB[0, 0]) / (AABB[1, 0] - AABB[0, 0]) * 16).floor()
    assert int(((column == 3) | (column == 4))[200:].sum()) == 200
    assert not ((column == 3) | (column == 4))[:200].all()
    assert set(grid.density.unique().tolist()) == {4.0, 8.0}
    again = OccupancyGrid(AABB, 16)
    again.density.fill_(8.0)
    again.set_occupied(occupied)
    again.update(nothing, decay=0.5, threshold=1.0, cells=400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.density, grid.density)


def test_what_is_ruled_out_stays_empty() -> None:
    grid = OccupancyGrid(AABB, 16)
    grid.rule_out(grid.centers()[..., 2] > 0.5)
    for _ in range(2):
        grid.update(lambda xyz: torch.full_like(xyz[:, 0], 9.0), threshold=1.0)
        assert torch.equal(grid.occupied, grid.centers()[..., 2] <= 0.5)
    empty = OccupancyGrid(AABB, 16)
    empty.rule_out(torch.ones(1, 16, 16, 16, dtype=torch.bool))
    empty.update(lambda xyz: torch.full_like(xyz[:, 0], 9.0), threshold=1.0, cells=50)
    assert not empty.occupied.any()


@pytest.mark.parametrize("spacing", ["linear", "disparity"])
def test_even_pieces(spacing: Any) -> None:
    origins, dirs = make_rays(20)
    near, far = torch.rand(20) + 0.1, torch.rand(20) + 3
    plain = uniform_samples(origins, dirs, near, far, 8, spacing=spacing)
    check_packed(plain, 20)
    t = torch.cat([plain.t_starts.view(20, 8), plain.t_ends.view(20, 8)[:, -1:]], 1)
    even = t if spacing == "linear" else 1 / t
    torch.testing.assert_close(even.diff(dim=1), ((even[:, -1] - even[:, 0]) / 8)[:, None].expand(20, 8))
    torch.testing.assert_close(t[:, [0, -1]], torch.stack([near, far], -1))
    jitter = torch.rand(20, 9)
    moved = uniform_samples(origins, dirs, near, far, 8, spacing=spacing, jitter=jitter).t_ends.view(20, 8)[:, :-1]
    moved = moved if spacing == "linear" else 1 / moved
    share = (moved - even[:, 1:-1]) / even.diff(dim=1)[:, 1:] + 0.5
    torch.testing.assert_close(share, jitter[:, 1:-1], rtol=0, atol=1e-4)
    boxed = uniform_samples(origins, dirs, 0.1, 9.0, 8, aabb=AABB)
    check_packed(boxed, 20)
    xyz = boxed.points(origins, dirs)[0][boxed.t_ends > boxed.t_starts]
    assert len(xyz) > 50
    assert ((xyz > AABB[0]) & (xyz < AABB[1])).all()


def test_resampled_pieces_hold_equal_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.cat([torch.zeros(30, 1), torch.rand(30, 12, generator=generator).cumsum(1)], 1).double()
    weights = torch.rand(30, 12, generator=generator).double() ** 4
    weights[:, 3] = 0
    weights[7] = 0
    new = resample(edges, weights, 25)
    assert (new.diff(dim=1) >= 0).all()
    assert torch.equal(new[:, [0, -1]], edges[:, [0, -1]])
    # The integral of the density at the new edges, with the hundredth that is spread evenly
    lengths = edges.diff(dim=1)
    even = lengths / lengths.sum(1, keepdim=True)
    density = 0.99 * weights / weights.sum(1, keepdim=True).clamp(min=1e-30) + 0.01 * even
    density[7] = even[7]
    overlap = (new[:, 1:, None].minimum(edges[:, None, 1:]) - new[:, :-1, None].maximum(edges[:, None, :-1])).clamp(
        min=0
    )
    shares = (overlap * (density / lengths)[:, None]).sum(-1)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 25))
    torch.testing.assert_close(new[7].diff(), (edges[7, -1] / 25).expand(25))


def test_proposals_bring_samples_to_the_surface() -> None:
    """Two that know a sphere's shell: nearly all of the field's pieces lie at it, as many as weight says."""
    origins = torch.tensor([[0.0, 0, -3]]).repeat(40, 1)
    dirs = torch.nn.functional.normalize(torch.cat([0.2 * torch.randn(40, 2), torch.ones(40, 1)], 1), dim=-1)

    def shell(xyz: Tensor) -> Tensor:
        return 200.0 * ((xyz.norm(dim=-1) - 1).abs() < 0.05)

    generator = torch.Generator().manual_seed(0)
    samples, histograms = proposal_samples(origins, dirs, 0.5, 9.0, [shell, shell], [96, 64, 48], generator=generator)
    check_packed(samples, 40)
    assert [h.weights.shape for h in histograms] == [(40, 96), (40, 64)]
    assert len(samples) == 40 * 48
    close = (samples.points(origins, dirs)[0].norm(dim=-1) - 1).abs() < 0.1
    assert close.float().mean() > 0.7  # of pieces of equal size, one in twenty
    torch.testing.assert_close(samples.t_starts.view(40, 48)[:, 0], torch.full((40,), 0.5))
    torch.testing.assert_close(samples.t_ends.view(40, 48)[:, -1], torch.full((40,), 9.0))
    even, _ = proposal_samples(origins, dirs, 0.5, 9.0, [shell], [96, 8], anneal=0.0, spacing="linear")
    torch.testing.assert_close(even.t_ends - even.t_starts, torch.full((320,), 8.5 / 8))


def test_interlevel_loss() -> None:
    """Nothing where the proposal's pieces that touch one of the field's hold its weight; the rest, squared, by hand."""
    t = torch.tensor([0.0, 1.0, 2.0, 3.0])
    samples = Samples(t[:-1], t[1:], torch.zeros(3, dtype=torch.long), torch.tensor([[0, 3]]))
    weights = torch.tensor([0.1, 0.6, 0.3], requires_grad=True)
    edges = torch.tensor([[0.0, 1.5, 2.0, 3.0]])
    enough = torch.tensor([[0.4, 0.2, 0.3]], requires_grad=True)
    assert interlevel_loss([Histogram(edges, enough)], samples, weights).item() < 1e-9
    little = torch.tensor([[0.05, 0.2, 0.1]], requires_grad=True)
    loss = interlevel_loss([Histogram(edges, little), Histogram(edges, enough)], samples, weights)
    expected = 0.05**2 / 0.1 + 0.35**2 / 0.6 + 0.2**2 / 0.3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert weights.grad is None
    bound_1, bound_2, bound_3 = -2 * 0.05 / 0.1, -2 * 0.35 / 0.6, -2 * 0.2 / 0.3
    assert little.grad is not None
    torch.testing.assert_close(little.grad, torch.tensor([[bound_1 + bound_2, bound_2, bound_3]]))


def test_a_proposal_learns_where_the_field_is() -> None:
    """By the interlevel loss alone, a trainable histogram over the distance takes on the weight of the field's peak."""
    origins, dirs = torch.zeros(32, 3), torch.tensor([0.0, 0, 1]).expand(32, 3)
    logits = torch.full((20,), -3.0, requires_grad=True)

    def proposal(xyz: Tensor) -> Tensor:
        return torch.nn.functional.softplus(logits[(xyz[:, 2] * 4).long().clamp(0, 19)])

    optimizer = torch.optim.Adam([logits], lr=0.3)
    generator = torch.Generator().manual_seed(0)
    close = []
    for _ in range(60):
        samples, histograms = proposal_samples(
            origins, dirs, 0.1, 5.0, [proposal], [40, 16], generator=generator, spacing="linear"
        )
        at_peak = (samples.mids - 3.1).abs() < 0.15
        close.append(float(at_peak.float().mean()))
        weights = at_peak.float() / 16
        loss = interlevel_loss(histograms, samples, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert close[0] < 0.15
    assert close[-1] > 0.4


def test_bad_arguments() -> None:
    grid, (origins, dirs) = OccupancyGrid(AABB, 16), make_rays(3)
    with pytest.raises(ValueError, match="aabb: expected a box with a length"):
        OccupancyGrid(AABB.flip(0))
    with pytest.raises(ValueError, match="resolution, levels: expected a multiple of 16 and 1 or more, got 40 and 1"):
        OccupancyGrid(AABB, 40)
    with pytest.raises(ValueError, match="step, cone, max_samples: expected > 0"):
        grid.sample(origins, dirs, 0.1, 1.0, 0.0, max_samples=9)
    with pytest.raises(ValueError, match=r"far: expected a number or \[3\], got \[2\]"):
        grid.sample(origins, dirs, 0.1, torch.ones(2), 0.1, max_samples=9)
    with pytest.raises(ValueError, match=r"jitter: expected \[R\] with R=3"):
        grid.sample(origins, dirs, 0.1, 1.0, 0.1, max_samples=9, jitter=torch.zeros(4))
    with pytest.raises(ValueError, match=r"dirs: expected dtype torch\.float32 like origins"):
        grid.sample(origins, dirs.double(), 0.1, 1.0, 0.1, max_samples=9)
    with pytest.raises(ValueError, match=r"bits: expected int64, levels of a multiple of 4 blocks"):
        march_occupancy(origins, dirs, dirs[:, :2], dirs[:, 0], grid.bits[:, 1:, 1:, 1:], AABB, step=1, max_samples=9)
    with pytest.raises(ValueError, match="occupied: expected bool"):
        grid.set_occupied(torch.ones(1, 16, 16, 16))
    with pytest.raises(ValueError, match="near: expected more than 0"):
        uniform_samples(origins, dirs, 0.0, 1.0, 4, spacing="disparity")
    with pytest.raises(ValueError, match=r"jitter: expected \[R, 5\], got \[3, 4\]"):
        uniform_samples(origins, dirs, 0.0, 1.0, 4, jitter=torch.rand(3, 4))
    with pytest.raises(ValueError, match="count: expected 1 or more, got 0"):
        uniform_samples(origins, dirs, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="counts: expected 2 numbers of 1 or more"):
        proposal_samples(origins, dirs, 0.1, 1.0, [lambda xyz: xyz[:, 0]], [4])
