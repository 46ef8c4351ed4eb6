"""Compositing of samples, distortion loss, and marching: kernels against references in double precision, these against closed forms."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.march import march, trace
from prismfield.render.ops.constants import TRANS_MIN
from prismfield.render.ops.march import (
    Composited,
    composite_samples,
    composite_samples_reference,
    distortion_loss,
    distortion_loss_reference,
)
from prismfield.render.samplers import OccupancyGrid, uniform_samples

from .raster_fixtures import assert_rows_close, cotangents, usable_levels, use_kernels

RAYS = [0, 1, 5, 150]
"""None, one, less than what a thread takes at a time, several times that."""
CHANNELS = [0, 1, 3, 7]


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels."""
    use_kernels(monkeypatch, request.param)
    return request.param


def pack(counts: Tensor) -> Tensor:
    """[R, 2] runs of so many samples."""
    return torch.stack([counts.cumsum(0) - counts, counts], -1)


@cache
def make_samples(rays: int, channels: int) -> tuple[Tensor, ...]:
    """Densities, features, starts, ends, runs and light of rays with 0 to 90 samples; some thin, some opaque, gaps between."""
    generator = torch.Generator().manual_seed(rays + channels)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    counts = (rand(rays) * 91).long()
    counts[rays // 3 : rays // 3 + rays // 9] = 0
    total = int(counts.sum())
    lengths = 0.02 + 0.1 * rand(total)
    lengths[::11] = 0
    gaps = torch.where(rand(total) < 0.3, rand(total), 0)
    ends, runs = (lengths + gaps).cumsum(0), pack(counts)
    begins = torch.cat([ends.new_zeros(1), ends])[runs[:, 0]]
    ends = ends - (begins - 0.5).repeat_interleave(counts)
    sigmas = torch.exp(6 * rand(total) - 3)
    sigmas[::7] *= 1e-4
    sigmas[5::31] = 3e4
    sigmas[3::17] = 0
    light = torch.where(rand(rays) < 0.5, 1.0, rand(rays))
    return sigmas, torch.randn(total, channels, generator=generator), ends - lengths, ends, runs, light


def fragile_rays(inputs: tuple[Tensor, ...]) -> Tensor:
    """[R]: where rounding decides whether a ray has ended, or has lost half of its light."""
    sigmas, _, starts, ends, runs, light = (t.double() for t in inputs)
    tau = sigmas * (ends - starts)
    fragile = torch.zeros(len(runs), dtype=torch.bool)
    for ray, (start, count) in enumerate(runs.long().tolist()):
        trans = light[ray] * torch.exp(-tau[start : start + count].cumsum(0))
        fragile[ray] = any(bool(((trans / cutoff - 1).abs() < 1e-4).any()) for cutoff in (TRANS_MIN, 0.5))
    return fragile


def upstream(out: list[Tensor], fragile: Tensor, runs: Tensor) -> list[Tensor]:
    """Random cotangents, 0 for rays that are not compared."""
    dead = fragile.repeat_interleave(runs[:, 1])
    return [
        v.masked_fill((dead if i == 3 else fragile).view(-1, *[1] * (v.dim() - 1)), 0)
        for i, v in enumerate(cotangents(*out))
    ]


def differentiable(out: Composited) -> list[Tensor]:
    return [out.features, out.alpha, out.distance, out.weights]


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rays", RAYS)
def test_compositing_against_reference(build: Any, rays: int, channels: int) -> None:
    inputs = make_samples(rays, channels)
    fragile, runs = fragile_rays(inputs), inputs[4]
    assert fragile.float().sum() <= 0.05 * rays
    results = []
    for dtype in (torch.float64, torch.float32):
        sigmas, features, starts, ends, _, light = (t if t is runs else t.to(dtype) for t in inputs)
        leaves = [sigmas.clone().requires_grad_(), features.clone().requires_grad_()]
        out = composite_samples(*leaves, starts, ends, runs, light)
        assert not out.median_distance.requires_grad
        torch.autograd.backward(differentiable(out), upstream(differentiable(out), fragile, runs))
        results.append((*(t.detach() for t in out), *(leaf.grad for leaf in leaves)))
    dead = fragile.repeat_interleave(runs[:, 1])
    names = ("features", "alpha", "distance", "median_distance", "weights", "v_sigmas", "v_features")
    for name, wanted, got in zip(names, *results, strict=True):
        left = ~(fragile if len(wanted) == rays and name not in ("weights", "v_sigmas", "v_features") else dead)
        rows = [t[left] if t.dim() > 1 else t[left, None] for t in (got, wanted)]
        # Sums of either sign over a ray: the error is that of the largest
        assert_rows_close(*rows, 1e-4 if name.startswith("v_") else 1e-5, name, floor=1e-5)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("rays", RAYS)
def test_distortion_against_reference(build: Any, rays: int) -> None:
    _, _, starts, ends, runs, _ = make_samples(rays, 1)
    weights = torch.rand(len(starts), generator=torch.Generator().manual_seed(2)) / 40
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = weights.to(dtype).requires_grad_()
        loss = distortion_loss(leaf, starts.to(dtype), ends.to(dtype), runs)
        loss.backward(cotangents(loss)[0])
        results.append((loss.detach(), leaf.grad))
    for name, wanted, got in zip(("loss", "v_weights"), *results, strict=True):
        assert got is not None and wanted is not None
        assert_rows_close(got[:, None], wanted[:, None], 1e-5, name)


def test_distortion_is_the_double_sum() -> None:
    """Mip-NeRF 360, eq. 15, as it stands."""
    _, _, starts, ends, runs, _ = (t.double() if t.is_floating_point() else t for t in make_samples(5, 1))
    w = torch.rand(len(starts), dtype=torch.float64)
    got = distortion_loss_reference(w, starts, ends, runs)
    mids, lengths = 0.5 * (starts + ends), ends - starts
    for ray, (start, count) in enumerate(runs.tolist()):
        i = slice(start, start + count)
        pairs = w[i, None] * w[None, i] * (mids[i, None] - mids[None, i]).abs()
        torch.testing.assert_close(got[ray], pairs.sum() + (w[i] ** 2 * lengths[i]).sum() / 3)


def test_gradients_of_the_references() -> None:
    counts = torch.tensor([3, 0, 5])
    generator = torch.Generator().manual_seed(0)
    sigmas = (torch.rand(8, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    features = torch.rand(8, 2, generator=generator, dtype=torch.float64).requires_grad_()
    ends = torch.linspace(0.3, 2, 8, dtype=torch.float64)
    geometry = (ends - 0.2, ends, pack(counts))
    light = torch.tensor([1.0, 0.5, 0.7], dtype=torch.float64)

    def outputs(sigmas: Tensor, features: Tensor) -> list[Tensor]:
        return differentiable(composite_samples(sigmas, features, *geometry, light))

    assert torch.autograd.gradcheck(outputs, (sigmas, features))
    assert torch.autograd.gradgradcheck(outputs, (sigmas, features))
    assert torch.autograd.gradcheck(lambda w: distortion_loss(w, *geometry), sigmas)
    assert torch.autograd.gradgradcheck(lambda w: distortion_loss(w, *geometry), sigmas)


@pytest.mark.parametrize("build", usable_levels()[:1], indirect=True)
def test_opcheck(build: Any) -> None:
    sigmas, features, *geometry, runs, light = make_samples(5, 3)
    leaves = (sigmas.clone().requires_grad_(), features.clone().requires_grad_())
    torch.library.opcheck(torch.ops.prismfield.composite_samples, (*leaves, *geometry, runs, light))
    torch.library.opcheck(torch.ops.prismfield.distortion_loss, (leaves[0], *geometry, runs))


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_samples_are_finite(build: Any, dtype: torch.dtype) -> None:
    """Opaque at once, without length, infinite, NaN or negative densities, an empty ray."""
    inf, nan = math.inf, math.nan
    sigmas = torch.tensor([1e30, 1.0, inf, 2.0, inf, 3.0, nan, -4.0, 1.0, 0.0], dtype=dtype)
    lengths = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=dtype)
    runs = pack(torch.tensor([2, 2, 0, 2, 2, 2]))
    starts = torch.arange(10, dtype=dtype)
    leaves = [sigmas.requires_grad_(), torch.ones(10, 3, dtype=dtype).requires_grad_()]
    out = composite_samples(*leaves, starts, starts + lengths, runs)
    torch.autograd.backward(differentiable(out), cotangents(*differentiable(out)))
    alpha = torch.tensor([1, 1 - math.exp(-2), 0, 1, 0, 0], dtype=dtype)
    torch.testing.assert_close(out.alpha, alpha)
    torch.testing.assert_close(out.features, alpha[:, None].expand(-1, 3))
    torch.testing.assert_close(out.distance, torch.tensor([0.5, 3.5, 0, 4.5, 0, 0], dtype=dtype))
    torch.testing.assert_close(out.weights[:2], torch.tensor([1.0, 0.0], dtype=dtype))
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_a_uniform_medium_absorbs_alike_however_it_is_cut(build: Any, count: int) -> None:
    dirs = torch.nn.functional.normalize(torch.randn(9, 3), dim=-1)
    jitter = torch.rand(9, count + 1)
    samples = uniform_samples(torch.zeros(9, 3), dirs, 1.0, 4.0, count, jitter=jitter)

    def query(xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(xyz[:, 0], 0.7), torch.full_like(xyz, 0.25)

    background = torch.tensor([0.0, 0.5, 1.0])
    out = march(samples, torch.zeros(9, 3), dirs, query, background, ("depth", "median_depth"))
    absorbed = 1 - math.exp(-0.7 * 3)
    torch.testing.assert_close(out.alpha, torch.full((9,), absorbed))
    torch.testing.assert_close(out.rgb, (absorbed * 0.25 + (1 - absorbed) * background).expand(9, 3))
    assert out.median_depth is not None and out.depth is not None
    torch.testing.assert_close(out.median_depth, torch.full((9,), 1 + math.log(2) / 0.7))
    if count == 1000:  # the mean of the exponential distribution, cut off
        mean = 1 + 1 / 0.7 - 3 * math.exp(-2.1) / absorbed
        torch.testing.assert_close(out.depth, torch.full((9,), mean), rtol=1e-4, atol=0)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_what_is_behind_an_opaque_sample_counts_for_nothing(build: Any) -> None:
    """The sample that takes the light below TRANS_MIN still counts, the next one does not."""
    sigmas = torch.tensor([-math.log(TRANS_MIN) * 1.01, 5.0, 1.0]).requires_grad_()
    features = torch.eye(3).requires_grad_()
    starts = torch.arange(3.0)
    out = composite_samples(sigmas, features, starts, starts + 1, pack(torch.tensor([3])))
    torch.testing.assert_close(out.weights, torch.tensor([1 - TRANS_MIN**1.01, 0.0, 0.0]))
    out.features.sum().backward()
    assert sigmas.grad is not None and features.grad is not None
    assert not sigmas.grad[1:].any()
    assert not features.grad[1:].any()


def blob(xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
    """Thin at its border, opaque in the middle."""
    return 300 * (0.7 - xyz.norm(dim=-1)).clamp(min=0), torch.cat([torch.sigmoid(3 * xyz), 2 * dirs[:, :1]], -1)


def make_rays(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """From around the unit ball, more or less towards it."""
    generator = torch.Generator().manual_seed(seed)
    origins = 3 * torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    dirs = 0.3 * torch.randn(count, 3, generator=generator) - origins / 3
    return origins, torch.nn.functional.normalize(dirs, dim=-1)


@pytest.mark.parametrize("cone", [0.0, 0.01])
def test_tracing_draws_what_marching_draws(cone: float) -> None:
    grid = OccupancyGrid(torch.tensor([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]), 32, levels=2)
    grid.update(lambda xyz: blob(xyz, xyz)[0], threshold=0.01, generator=torch.Generator().manual_seed(0))
    origins, dirs = make_rays(300)
    background, cosines, extras = torch.rand(300, 3), torch.rand(300) + 0.5, ("depth", "median_depth", "absgrad")
    samples = grid.sample(origins, dirs, 0.1, 9.0, 0.01, max_samples=10_000, cone=cone)
    asked = []

    def query(xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(xyz))
        return blob(xyz, dirs)

    wanted = march(samples, origins, dirs, blob, background, extras, cosines=cosines)
    got = trace(
        grid, origins, dirs, query, background, extras, near=0.1, far=9.0, step=0.01, cone=cone, cosines=cosines
    )
    assert wanted.alpha.max() > 0.999
    assert sum(asked) < 0.7 * len(samples)
    for name in ("rgb", "alpha", "depth", "median_depth"):
        # A ray that starts again rounds its steps anew; one of them may then fall into another cell
        error = (getattr(got, name) - getattr(wanted, name)).abs()
        assert error.median() < 1e-6, name
        assert error.max() < 3e-2, name
    assert wanted.features is not None
    torch.testing.assert_close(wanted.features[:, 0], 2 * dirs[:, 0] * wanted.alpha)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_turning_scene_and_rays_together_changes_nothing(build: Any) -> None:
    origins, dirs = make_rays(40)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))[0]

    def turned(xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        return blob(xyz @ turn, dirs @ turn)

    a = march(uniform_samples(origins, dirs, 1.0, 5.0, 200), origins, dirs, blob)
    b = march(
        uniform_samples(origins @ turn.mT, dirs @ turn.mT, 1.0, 5.0, 200), origins @ turn.mT, dirs @ turn.mT, turned
    )
    torch.testing.assert_close(a.rgb, b.rgb, rtol=1e-4, atol=1e-4)


def test_gradients_through_a_ray_agree_with_differences() -> None:
    """From the field's parameter to the picture, with the kernels."""
    origins, dirs = make_rays(30)
    samples = uniform_samples(origins, dirs, 1.0, 5.0, 100)

    def loss(size: Tensor) -> Tensor:
        def query(xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
            return 3 * torch.sigmoid(8 * (size - xyz.norm(dim=-1))), torch.sigmoid(xyz * size)

        out = march(samples, origins, dirs, query, torch.ones(3), ("depth",))
        assert out.depth is not None
        return out.rgb.square().mean() + 0.1 * out.depth.mean()

    size = torch.tensor(0.8, requires_grad=True)
    loss(size).backward()
    assert size.grad is not None
    difference = (loss(torch.tensor(0.81)) - loss(torch.tensor(0.79))) / 0.02
    assert float(size.grad) == pytest.approx(float(difference), rel=2e-2)


def test_no_rays_and_no_samples() -> None:
    for rays in (0, 4):
        origins, dirs = torch.zeros(rays, 3), torch.tensor([0.0, 0, 1]).expand(rays, 3)
        grid = OccupancyGrid(torch.tensor([[5.0, 5, 5], [6, 6, 6]]), 16)
        samples = grid.sample(origins, dirs, 0.0, 9.0, 0.1, max_samples=9)
        assert len(samples) == 0
        for out in (
            march(samples, origins, dirs, blob, torch.ones(3), ("depth", "median_depth")),
            trace(grid, origins, dirs, blob, torch.ones(3), ("depth", "median_depth"), near=0, far=9.0, step=0.1),
        ):
            assert out.depth is not None and out.median_depth is not None
            assert torch.equal(out.rgb, torch.ones(rays, 3))
            assert not out.alpha.any() and not out.depth.any() and not out.median_depth.any()


def test_bad_arguments() -> None:
    sigmas, features, starts, ends, runs, _ = make_samples(5, 3)
    with pytest.raises(ValueError, match=r"features: expected \[S, D\]"):
        composite_samples(sigmas, features[1:], starts, ends, runs)
    with pytest.raises(ValueError, match=r"t_ends: expected dtype torch\.float32"):
        composite_samples(sigmas, features, starts, ends.double(), runs)
    with pytest.raises(ValueError, match="packed_info: expected int64"):
        composite_samples(sigmas, features, starts, ends, runs.int())
    with pytest.raises(ValueError, match="packed_info: expected runs of"):
        composite_samples(sigmas, features, starts, ends, runs[1:])
    with pytest.raises(ValueError, match="packed_info: expected runs of"):
        distortion_loss(sigmas, starts, ends, runs.flip(0))
    with pytest.raises(ValueError, match=r"light: expected \[R\] with R=5"):
        composite_samples(sigmas, features, starts, ends, runs, torch.ones(4))
    origins, dirs = make_rays(2)
    samples = uniform_samples(origins, dirs, 1.0, 5.0, 3)
    with pytest.raises(ValueError, match=r"query: expected densities \[6\] and colours"):
        march(samples, origins, dirs, lambda xyz, dirs: (xyz, xyz))
    with pytest.raises(ValueError, match=r"background: expected \[3\] or \[2, 3\], got \[1, 3\]"):
        march(samples, origins, dirs, lambda xyz, dirs: (xyz[:, 0], xyz), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"cosines: expected \[R\] with R=2"):
        march(samples, origins, dirs, lambda xyz, dirs: (xyz[:, 0], xyz), cosines=torch.ones(1))


def test_the_reference_is_the_float32_result_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, None)
    monkeypatch.setattr("prismfield.render.kernels.told", True)
    inputs = make_samples(5, 3)
    out = composite_samples(*inputs)
    reference = composite_samples_reference(*inputs)
    assert torch.equal(out.features, reference[0])
    assert torch.equal(out.weights, reference[4])
