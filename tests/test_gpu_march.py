"""The Triton marching, compositing of samples and distortion loss against their specifications in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from prismfield.render.march import march, trace
from prismfield.render.ops.constants import TRANS_MIN
from prismfield.render.ops.march import (
    Composited,
    composite_samples,
    distortion_loss,
    march_occupancy,
    march_occupancy_reference,
)
from prismfield.render.samplers import OccupancyGrid, Samples

from .raster_fixtures import assert_rows_close, cotangents
from .test_march import blob, differentiable, fragile_rays, make_samples, pack, upstream
from .test_march import make_rays as rays_around_a_ball
from .test_samplers import AABB, check_packed, make_grid, make_rays, unmatched

# The interpreter's: lanes that hold nothing compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize(("rays", "channels"), [(0, 3), (1, 3), (5, 0), (5, 1), (37, 3), (5, 16), (5, 35)])
def test_compositing_against_the_reference(rays: int, channels: int, triton_device: torch.device) -> None:
    inputs = make_samples(rays, channels)
    fragile, runs = fragile_rays(inputs), inputs[4]
    assert fragile.float().sum() <= 0.05 * rays
    assert rays < 37 or runs[:, 1].max() > 64  # more than two blocks of a ray
    results = []
    for dtype, device in ((torch.float64, torch.device("cpu")), (torch.float32, triton_device)):
        sigmas, features, starts, ends, _, light = (t if t is runs else t.to(device, dtype) for t in inputs)
        leaves = [sigmas.clone().requires_grad_(), features.clone().requires_grad_()]
        out = composite_samples(*leaves, starts, ends, runs.to(device), light)
        assert not out.median_distance.requires_grad
        v_out = upstream([t.cpu() for t in differentiable(out)], fragile, runs)
        torch.autograd.backward(differentiable(out), [v.to(device) for v in v_out])
        results.append([t.detach().cpu() for t in (*out, *(leaf.grad for leaf in leaves))])
    dead = fragile.repeat_interleave(runs[:, 1])
    names = (*Composited._fields, "v_sigmas", "v_features")
    for name, wanted, got in zip(names, *results, strict=True):
        left = ~(dead if name in ("weights", "v_sigmas", "v_features") else fragile)
        rows = [t[left] if t.dim() > 1 else t[left, None] for t in (got, wanted)]
        assert_rows_close(*rows, 1e-4 if name.startswith("v_") else 1e-5, name, floor=1e-5)


@pytest.mark.parametrize("rays", [0, 1, 37])
def test_distortion_against_the_reference(rays: int, triton_device: torch.device) -> None:
    _, _, starts, ends, runs, _ = make_samples(rays, 1)
    weights = torch.rand(len(starts), generator=torch.Generator().manual_seed(2)) / 40
    results = []
    for dtype, device in ((torch.float64, torch.device("cpu")), (torch.float32, triton_device)):
        leaf = weights.to(device, dtype).requires_grad_()
        loss = distortion_loss(leaf, starts.to(device, dtype), ends.to(device, dtype), runs.to(device))
        loss.backward(*(v.to(device) for v in cotangents(loss.cpu())))
        results.append((loss.detach().cpu(), leaf.grad.cpu()))
    for name, wanted, got in zip(("loss", "v_weights"), *results, strict=True):
        assert_rows_close(got[:, None], wanted[:, None], 1e-5, name)


def test_hard_samples_are_finite(triton_device: torch.device) -> None:
    """Opaque at once, without length, infinite, NaN or negative densities, an empty ray, and NaN where no light comes."""
    inf, nan = math.inf, math.nan
    sigmas = torch.tensor([1e30, 1.0, inf, 2.0, inf, 3.0, nan, -4.0, 1.0, 0.0])
    lengths = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    features = torch.ones(10, 3)
    features[[1, 5]] = nan
    runs, starts = pack(torch.tensor([2, 2, 0, 2, 2, 2])), torch.arange(10.0)
    leaves = [t.to(triton_device).requires_grad_() for t in (sigmas, features)]
    out = composite_samples(*leaves, *(t.to(triton_device) for t in (starts, starts + lengths, runs)))
    torch.autograd.backward(differentiable(out), cotangents(*differentiable(out)))
    alpha = torch.tensor([1, 1 - math.exp(-2), 0, 1, 0, 0])
    torch.testing.assert_close(out.alpha.detach().cpu(), alpha)
    torch.testing.assert_close(out.features.detach().cpu(), alpha[:, None].expand(-1, 3))
    torch.testing.assert_close(out.distance.detach().cpu(), torch.tensor([0.5, 3.5, 0, 4.5, 0, 0]))
    median = torch.tensor([math.log(2) / 80, 3 + math.log(2) / 2, 0, 4 + math.log(2) / 80, 0, 0])
    torch.testing.assert_close(out.median_distance.cpu(), median)
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_what_is_behind_an_opaque_sample_counts_for_nothing(triton_device: torch.device) -> None:
    """Nor does it matter how much of it there is: here blocks of it."""
    sigmas = torch.full((100,), 5.0)
    sigmas[0] = -math.log(TRANS_MIN) * 1.01
    leaves = [t.to(triton_device).requires_grad_() for t in (sigmas, torch.ones(100, 2))]
    starts, runs = torch.arange(100.0, device=triton_device), pack(torch.tensor([100])).to(triton_device)
    out = composite_samples(*leaves, starts, starts + 1, runs)
    torch.testing.assert_close(out.weights[0].item(), 1 - TRANS_MIN**1.01)
    assert not out.weights[1:].any()
    out.features.sum().backward()
    for leaf in leaves:
        assert leaf.grad[0].all()
        assert not leaf.grad[1:].any()


@pytest.mark.parametrize(
    ("rays", "levels", "cone"), [(0, 1, 0.0), (1, 1, 0.0), (34, 1, 0.0), (33, 3, 0.0), (33, 3, 0.03)]
)
def test_walk_against_the_reference(rays: int, levels: int, cone: float, triton_device: torch.device) -> None:
    """The walk skips nothing that every step of the reference finds, and finds no more."""
    grid, (origins, dirs) = make_grid(levels), make_rays(rays)
    jitter = torch.rand(rays, generator=torch.Generator().manual_seed(0))
    t_range = torch.tensor([0.05, 7.0]).repeat(rays, 1)
    t_range[::4] = torch.tensor([1.0, 2.5])
    inputs, options = (origins, dirs, t_range, jitter), {"step": 0.047, "cone": cone, "max_samples": 10_000}
    on_device = (t.to(triton_device) for t in (*inputs, grid.bits, grid.aabb))
    got = Samples(*(t.cpu() for t in march_occupancy(*on_device, **options)))
    wanted = Samples(
        *march_occupancy_reference(*(t.double() for t in inputs), grid.bits, grid.aabb.double(), 0.047, cone, 10_000)
    )
    assert [t.dtype for t in vars(got).values()] == [torch.float32, torch.float32, torch.int64, torch.int64]
    check_packed(got, rays)
    assert len(wanted) >= 5 * (rays - 1)
    # Rounding moves a step a little, and so a midpoint at the border of a cell into the next
    assert unmatched(got, wanted) <= 1e-3 * len(wanted)
    assert unmatched(wanted, got) <= 1e-3 * len(wanted)


def test_the_nearest_samples_are_kept(triton_device: torch.device) -> None:
    grid = make_grid(2).to(triton_device)
    origins, dirs = (t.to(triton_device) for t in make_rays(33))
    every, some = (grid.sample(origins, dirs, 0.0, 9.0, 0.1, max_samples=n) for n in (1000, 3))
    count = every.packed_info[:, 1]
    assert torch.equal(some.packed_info[:, 1], count.clamp(max=3))
    kept = torch.arange(len(every), device=triton_device) - every.packed_info[every.ray_indices, 0] < 3
    assert 0 < kept.sum() < len(every)
    assert torch.equal(some.t_starts, every.t_starts[kept])
    assert torch.equal(some.t_ends, every.t_ends[kept])
    assert torch.equal(some.ray_indices, every.ray_indices[kept])


def test_rays_that_are_none(triton_device: torch.device) -> None:
    """NaN anywhere, no direction, an end before the start: no samples and an end."""
    nan = math.nan
    origins = torch.zeros(7, 3)
    origins[0, 1] = nan
    dirs = torch.tensor([[0.0, 0, 1]]).repeat(7, 1)
    dirs[1, 2] = math.inf
    dirs[2, 0] = nan
    near = torch.tensor([0.0, 0, 0, 2, nan, 0, 0])
    far = torch.tensor([9.0, 9.0, 9.0, 1.0, 9.0, nan, math.inf])
    jitter = torch.zeros(7)
    grid = OccupancyGrid(AABB, 16).to(triton_device)
    for broken, last in ((0.0, 9), (nan, 0)):
        jitter[6] = broken
        rays = (t.to(triton_device) for t in (origins, dirs, near, far))
        samples = grid.sample(*rays, 0.1, max_samples=99, jitter=jitter.to(triton_device))
        assert samples.packed_info[:, 1].tolist() == [0, 0, 0, 0, 0, 0, last]


def test_tracing_draws_what_marching_draws(triton_device: torch.device) -> None:
    """All kernels together, and against the compiled ones or the references."""
    grid = OccupancyGrid(torch.tensor([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]), 32, levels=2)
    grid.update(lambda xyz: blob(xyz, xyz)[0], threshold=0.01, generator=torch.Generator().manual_seed(0))
    grid.to(triton_device)
    rays = [t.to(triton_device) for t in rays_around_a_ball(12)]
    samples = grid.sample(*rays, 0.1, 9.0, 0.06, max_samples=10_000)
    wanted = march(samples, *rays, blob, None, ("depth", "median_depth"))
    got = trace(grid, *rays, blob, None, ("depth", "median_depth"), near=0.1, far=9.0, step=0.06)
    assert wanted.alpha.max() > 0.999
    for name in ("rgb", "alpha", "depth", "median_depth"):
        error = (getattr(got, name) - getattr(wanted, name)).abs()
        assert error.median() < 1e-6, name
        assert error.max() < 3e-2, name
