"""Compositing: the kernels against the reference in double precision, the reference against closed forms and differences."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.composite import composite, composite_reference
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN, TRANS_MIN
from prismfield.render.ops.project import project_reference

from .raster_fixtures import (
    as_double,
    assert_rows_close,
    cotangents,
    fragile_pixels,
    make_cameras,
    make_gaussians,
    usable_levels,
    use_kernels,
)

BUILDS = [pytest.param(None, id="reference"), *usable_levels()]
Size = tuple[int, int]
# count, image, cameras, channels: nothing, one, odd, many; each number of channels that has code of its own, and others
CASES = [
    *((count, image, 1, 3) for count in (0, 1) for image in ((1, 1), (17, 9))),
    (7, (1, 1), 3, 3),
    (7, (17, 9), 3, 5),
    (7, (70, 45), 1, 1),
    (300, (1, 1), 1, 3),
    (300, (17, 9), 3, 8),
    (300, (70, 45), 3, 3),
    (300, (70, 45), 1, 5),
    (300, (70, 45), 1, 1),
    (300, (70, 45), 1, 4),
    (300, (200, 131), 1, 3),
]


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels, or None for the reference."""
    monkeypatch.setattr(kernels_module, "enabled", request.param is not None)
    use_kernels(monkeypatch, request.param)
    return request.param


@cache
def make_inputs(count: int, image: Size, num_cameras: int, channels: int) -> tuple[Tensor, ...]:
    """`params`, `features`, `depths`, `background`, `radii` in single precision, and which pixels not to compare."""
    cameras = as_double(make_cameras(num_cameras, *image))
    gaussians = [t.double() for t in make_gaussians(count, cameras, seed=count).tensors()[:4]]
    screen = project_reference(*gaussians, cameras.viewmats, cameras.Ks, *image, False)
    params, depths, radii = (t.float() for t in screen)
    generator = torch.Generator().manual_seed(channels)
    features = torch.randn(num_cameras, count, channels, generator=generator)
    background = torch.randn(num_cameras, channels, generator=generator)
    fragile = fragile_pixels(params, depths, radii, image, 3e-4)
    assert fragile.float().mean() < 0.1
    return params, features, depths, background, radii, fragile


def upstream_of(outputs: list[Tensor], fragile: Tensor) -> list[Tensor]:
    """Random cotangents, 0 where pictures are not compared."""
    return [v.masked_fill(fragile.view(*fragile.shape, *[1] * (v.dim() - 3)), 0) for v in cotangents(*outputs)]


@cache
def expectation(case: tuple[int, Size, int, int], depth: bool) -> dict[str, Tensor]:
    """What the reference says in double precision."""
    params, features, depths, background, radii, fragile = make_inputs(*case)
    leaves = [t.double().requires_grad_() for t in (params, features, depths, background)]
    absgrad = torch.zeros_like(leaves[0][..., :2]).requires_grad_()
    lists = bin_reference("gaussian", leaves[0], leaves[2], radii.double(), *case[1], 16)
    out = composite_reference("gaussian", *leaves, Isects(*lists, 16), case[1], absgrad)
    outputs = list(out[: 3 if depth else 2])
    torch.autograd.backward(outputs, upstream_of(outputs, fragile))
    return collect(out, [*leaves, absgrad])


def collect(out: Any, leaves: list[Tensor]) -> dict[str, Tensor]:
    names = ("features", "alpha", "depth", "median_depth")
    result = {name: t.detach() for name, t in zip(names, out, strict=True) if t is not None}
    grads = ("v_params", "v_features", "v_depths", "v_background", "absgrad")
    empty = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return result | dict(zip(grads, empty, strict=True))


def check_kernel(case: tuple[int, Size, int, int], extras: bool, device: torch.device | str = "cpu") -> None:
    """Compare what the kernels draw, and its gradients, with the reference in double precision.

    `extras`: depth, median depth and absolute gradients together, or none of them.
    """
    params, features, depths, background, radii, fragile = make_inputs(*case)
    inputs = [t.to(device) for t in (params, features, depths, background, radii)]
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    absgrad = torch.zeros_like(inputs[0][..., :2]).requires_grad_()
    isects = bin_primitives("gaussian", inputs[0], inputs[2], inputs[4], case[1])
    options: dict[str, Any] = {"depth": True, "median_depth": True, "absgrad": absgrad} if extras else {}
    out = composite("gaussian", *leaves[:3], isects, case[1], leaves[3], **options)
    outputs = [t for t in (out.features, out.alpha, out.depth) if t is not None]
    torch.autograd.backward(outputs, upstream_of(outputs, fragile.to(device)))
    got = collect((out.features, out.alpha, out.depth, out.median_depth), [*leaves, absgrad])
    got = {name: t.cpu() for name, t in got.items()}
    wanted = expectation(case, extras)
    assert (out.depth is None) == (out.median_depth is None) == (not extras)
    for name in ("features", "alpha", "depth", "median_depth")[: 4 if extras else 2]:
        a, b = (t[name][~fragile] for t in (got, wanted))
        # exp2 is a polynomial with a relative error of 2e-7, and a long list multiplies a hundred of them
        assert_rows_close(a.view(len(a), -1), b.view(len(b), -1), 1e-5, name, floor=5e-6)
    for name in ("v_params", "v_features", "v_background", *(("v_depths", "absgrad") if extras else ())):
        shape = (*got[name].shape, 1) if name == "v_depths" else got[name].shape
        # Sums over pixels of either sign: the error is that of the largest of them
        assert_rows_close(got[name].view(shape), wanted[name].view(shape), 1e-4, name, floor=1e-5)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(build: Any, case: tuple[int, Size, int, int], extras: bool) -> None:
    check_kernel(case, extras)


def splat(x: float, y: float, alpha: float, sigma: float = 1e3) -> list[float]:
    """Screen parameters of a round Gaussian; by default so wide that it is flat."""
    return [x, y, sigma**-2, 0.0, sigma**-2, math.log(alpha)]


def draw(build: Any, rows: list[list[float]], features: Tensor, depths: list[float], **options: Any) -> Any:
    """One pixel of a 3x2 image, (1, 1), and the gradients of what it shows to the features."""
    dtype = torch.float32 if build else torch.float64
    params = torch.tensor([rows], dtype=dtype)
    z = torch.tensor([depths], dtype=dtype)
    features = features.to(dtype)[None]
    isects = bin_primitives("gaussian", params, z, torch.full((*z.shape, 2), 50.0, dtype=dtype), (3, 2))
    out = composite("gaussian", params, features, z, isects, (3, 2), depth=True, median_depth=True, **options)
    return out.features[0, 1, 1], out.alpha[0, 1, 1], out.depth[0, 1, 1], out.median_depth[0, 1, 1]


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_closed_form(build: Any) -> None:
    """Three flat layers given out of order, over a background."""
    dtype = torch.float32 if build else torch.float64
    rows = [splat(1.5, 1.5, 0.5), splat(1.5, 1.5, 0.25), splat(1.5, 1.5, 0.8)]
    background = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=dtype)
    features = torch.eye(3, 4)
    weights, alpha, depth, median = draw(build, rows, features, [2.0, 1.0, 4.0], background=background)
    expected = torch.tensor([0.75 * 0.5, 0.25, 0.375 * 0.8, 0.375 * 0.2], dtype=dtype)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(alpha, 1 - expected[3], rtol=1e-5, atol=0)
    torch.testing.assert_close(depth, expected[0] * 2 + expected[1] * 1 + expected[2] * 4, rtol=1e-5, atol=0)
    assert median == 2


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_cutoffs(build: Any) -> None:
    """Alpha below 1/255 does not show, above 0.99 is held there, and nothing shows behind what stops all but 1e-4."""
    for alpha, shown in ((0.999 * ALPHA_MIN, 0.0), (1.001 * ALPHA_MIN, 1.001 * ALPHA_MIN), (1.0, ALPHA_MAX)):
        weights = draw(build, [splat(1.5, 1.5, alpha)], torch.ones(1, 1), [1.0])[0]
        assert weights.item() == pytest.approx(shown, rel=1e-5)
    # 0.02, 4e-4 and then 8e-6, which is not let happen: the third is left out and what comes after it too
    weights, alpha, _, median = draw(build, [splat(1.5, 1.5, 0.98)] * 4, torch.eye(4), [1.0, 2.0, 3.0, 4.0])
    assert weights.tolist() == pytest.approx([0.98, 0.98 * 0.02, 0, 0], rel=1e-5)
    assert alpha.item() == pytest.approx(1 - 4e-4) and median == 1
    assert 4e-4 > TRANS_MIN > 8e-6
    assert draw(build, [splat(1.5, 1.5, 0.49)], torch.eye(1), [3.0])[3] == 0  # never half


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_gradient_of_held_alpha(build: Any) -> None:
    """Where alpha is held at 0.99 its parameters get no gradient; the colour does."""
    dtype = torch.float32 if build else torch.float64
    params = torch.tensor([[splat(1.2, 0.9, 0.999, 30.0)]], dtype=dtype).requires_grad_()
    features = torch.ones(1, 1, 1, dtype=dtype).requires_grad_()
    z, radii = torch.ones(1, 1, dtype=dtype), torch.full((1, 1, 2), 99.0, dtype=dtype)
    isects = bin_primitives("gaussian", params, z, radii, (3, 2))
    composite("gaussian", params, features, z, isects, (3, 2)).features.sum().backward()
    assert (params.grad == 0).all()
    assert features.grad.item() == pytest.approx(6 * ALPHA_MAX)


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_absolute_gradients_do_not_cancel(build: Any) -> None:
    """A splat in the middle of a pair of pixels: the gradients to x are equal and opposite, the absolute ones add up."""
    dtype = torch.float32 if build else torch.float64
    params = torch.tensor([[[1.0, 0.5, 0.3, 0.0, 0.2, math.log(0.5)]]], dtype=dtype).requires_grad_()
    z, radii = torch.ones(1, 1, dtype=dtype), torch.full((1, 1, 2), 9.0, dtype=dtype)
    absgrad = torch.zeros(1, 1, 2, dtype=dtype).requires_grad_()
    isects = bin_primitives("gaussian", params, z, radii, (2, 1))
    composite(
        "gaussian", params, torch.ones_like(params[..., :1]), z, isects, (2, 1), absgrad=absgrad
    ).alpha.sum().backward()
    each = 0.5 * math.exp(-0.5 * 0.3 * 0.25) * 0.3 * 0.5
    assert params.grad[0, 0, :2].tolist() == pytest.approx([0, 0], abs=1e-7)
    assert absgrad.grad.flatten().tolist() == pytest.approx([2 * each, 0], rel=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_gradients_of_the_reference(smooth: bool) -> None:
    """Central differences; with the real cutoffs over pixels that are not at one."""
    size = (7, 4)
    params, features, depths, background, radii, fragile = make_inputs(5, size, 2, 2)
    inputs = [t.double() for t in (params, features, depths, background)]
    isects = Isects(*bin_reference("gaussian", inputs[0], inputs[2], radii.double(), *size, 4), 4)
    assert len(isects.ids) > 12

    def outputs(*leaves: Tensor) -> list[Tensor]:
        out = composite_reference("gaussian", *leaves, isects, size, smooth=smooth)[:3]
        return [t[~fragile] for t in out]

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in inputs])


def test_the_smooth_cutoff_is_close_to_the_real_one() -> None:
    params, features, depths, background, radii, _ = make_inputs(300, (17, 9), 3, 8)
    inputs = [t.double() for t in (params, features, depths, background)]
    isects = Isects(*bin_reference("gaussian", inputs[0], inputs[2], radii.double(), 17, 9, 16), 16)
    real, smooth = (composite_reference("gaussian", *inputs, isects, (17, 9), smooth=s)[1] for s in (False, True))
    assert 0 < (real - smooth).abs().mean() < 0.2


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_opcheck(build: Any) -> None:
    params, features, depths, background, radii, _ = make_inputs(7, (17, 9), 3, 5)
    isects = bin_primitives("gaussian", params, depths, radii, (17, 9))
    lists = (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts)
    for extras in (False, True):
        absgrad = torch.zeros_like(params[..., :2]) if extras else torch.zeros(0)
        leaves = [t.clone().requires_grad_() for t in (params, features, depths, background, absgrad)]
        arguments = ("gaussian", *leaves, *lists, 17, 9, isects.tile_size, extras, extras)
        torch.library.opcheck(torch.ops.prismfield.composite, arguments)
        leaves = [t.detach() for t in leaves]
        out = torch.ops.prismfield.composite("gaussian", *leaves, *arguments[6:])
        backward = ("gaussian", *leaves, *lists, 17, 9, isects.tile_size, *out[4:], *cotangents(*out[:3]))
        torch.library.opcheck(torch.ops.prismfield.composite_backward, backward)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("channels", [62, 63, 130])
def test_many_channels(build: Any, channels: int) -> None:
    """As many as one pass takes, one more, and three passes."""
    params, _, depths, _, radii, fragile = make_inputs(7, (17, 9), 3, 5)
    isects = bin_primitives("gaussian", params, depths, radii, (17, 9))
    generator = torch.Generator().manual_seed(0)
    features, background = (
        torch.randn(3, 7, channels, generator=generator),
        torch.rand(3, channels, generator=generator),
    )
    ours = [t.clone().requires_grad_() for t in (params, features, depths, background)]
    theirs = [t.double().requires_grad_() for t in (params, features, depths, background)]
    out = composite("gaussian", *ours[:3], isects, (17, 9), ours[3], depth=True)
    wanted = composite_reference("gaussian", *theirs, isects, (17, 9))
    for images in ([out.features, out.alpha, out.depth], list(wanted[:3])):
        torch.autograd.backward(images, upstream_of(images, fragile))
    assert_rows_close(out.features[~fragile], wanted[0][~fragile], 1e-5, "features")
    for name, a, b in zip(("params", "features", "depths", "background"), ours, theirs, strict=True):
        assert_rows_close(a.grad, b.grad, 1e-4, f"v_{name}")
    if channels > 62:
        with pytest.raises(ValueError, match="absgrad: expected None with more than 62 channels"):
            composite("gaussian", params, features, depths, isects, (17, 9), absgrad=torch.zeros_like(params[..., :2]))


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_same_bits_on_any_number_of_threads(build: Any) -> None:
    params, features, depths, background, radii, _ = make_inputs(300, (200, 131), 1, 3)
    isects = bin_primitives("gaussian", params, depths, radii, (200, 131))
    before, results = build.num_threads(), []
    try:
        for threads in (1, 2, 5):
            build.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (params, features, depths, background)]
            out = composite("gaussian", *leaves[:3], isects, (200, 131), leaves[3], depth=True)
            outputs = [out.features, out.alpha, out.depth]
            grads = torch.autograd.grad(outputs, leaves, cotangents(*outputs))
            results.append([*outputs, *grads])
    finally:
        build.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_bad_arguments_are_named(build: Any) -> None:
    params, features, depths, background, radii, _ = make_inputs(7, (17, 9), 3, 5)
    isects = bin_primitives("gaussian", params, depths, radii, (17, 9))
    good = {"params": params, "features": features, "depths": depths, "background": background}

    def run(size: Size = (17, 9), isects: Isects = isects, absgrad: Tensor | None = None, **changes: Tensor) -> None:
        a = good | changes
        composite("gaussian", a["params"], a["features"], a["depths"], isects, size, a["background"], absgrad=absgrad)

    run()
    for name, wrong in {"params": params[..., :5], "depths": depths[:2], "background": background[:, :4]}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            run(**{name: wrong})
        if name != "params":
            with pytest.raises(ValueError, match=f"^{name}: expected dtype"):
                run(**{name: good[name].double()})
    with pytest.raises(ValueError, match=r"^absgrad: expected"):
        run(absgrad=torch.zeros(3, 7, 3))
    # A kernel that believed these would read memory that is not its own
    with pytest.raises(ValueError, match=r"^isects: expected those of 3 cameras, 7 primitives and 200x131 pixels"):
        run(size=(200, 131))
    with pytest.raises(ValueError, match=r"^isects: .* got \d+ tiles, 7 rows"):
        run(isects=replace(isects, row_starts=isects.row_starts[:8]))
    if build:
        with pytest.raises(ValueError, match=f"^isects: expected tiles of {build.tile_size} pixels, got 64"):
            run(isects=Isects(*bin_reference("gaussian", params, depths, radii, 17, 9, 64), 64))
