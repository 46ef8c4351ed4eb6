"""Smooth convexes from points to pixels: the kernels against the reference in double precision, and what a hull has to be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from scipy.spatial import ConvexHull
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.cameras import Cameras
from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.composite import composite, composite_reference
from prismfield.render.ops.constants import ALPHA_MIN
from prismfield.render.ops.primitives import PRIMITIVES
from prismfield.render.ops.project_convexes import (
    MAX_EXTENT,
    MIN_THICKNESS,
    convex_primitive,
    hull_order,
    project_convexes,
    project_convexes_reference,
)

from .raster_fixtures import (
    as_double,
    assert_rows_close,
    cotangents,
    fragile_pixels,
    make_cameras,
    usable_levels,
    use_kernels,
)

NAMES = ("points", "deltas", "sigmas", "opacities", "viewmats")
COLLINEAR, COINCIDENT, BEHIND, ONE_BEHIND, HUGE, SUBPIXEL, SOFT, HARD, CLEAR, OPAQUE, DOUBLED = range(11)
Size = tuple[int, int]


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels."""
    use_kernels(monkeypatch, request.param)
    return request.param


def make_convexes(count: int, points: int, cameras: Cameras) -> list[Tensor]:
    """Points, deltas, sigmas and opacities of convexes around the origin; the first ones are hard cases, where there are many."""
    generator = torch.Generator().manual_seed(100 * count + points)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    corners = 0.8 * randn(count, 1, 3) + 0.25 * torch.exp(0.7 * randn(count, 1, 1)) * randn(count, points, 3)
    deltas, sigmas = torch.exp(2 + 0.7 * randn(count)), torch.exp(0.5 * randn(count))
    opacities = torch.rand(count, generator=generator)
    if count > DOUBLED:
        to_world = cameras.camtoworlds[0].float()

        def place(*at: float) -> Tensor:
            return to_world[:3, :3] @ torch.tensor(at) + to_world[:3, 3]

        corners[COLLINEAR] = place(0.2, 0.1, 4.0) + torch.linspace(-1, 1, points)[:, None] * torch.tensor(
            [0.5, 0.25, 0]
        )
        corners[COINCIDENT] = place(0.0, 0.1, 4.0)
        corners[BEHIND] += place(0, 0, -3.0) - corners[BEHIND].mean(0)
        corners[ONE_BEHIND, 0] = place(0.1, 0.0, -0.5)
        corners[HUGE] = (
            place(0.3, 0.2, 6.0) + 8 * randn(points, 3) @ torch.diag(torch.tensor([1, 1, 0.1])) @ to_world[:3, :3].T
        )
        corners[SUBPIXEL] = place(0.1, -0.1, 3.0) + 1e-3 * randn(points, 3)
        corners[DOUBLED, 1] = corners[DOUBLED, 0]
        deltas[SOFT], sigmas[SOFT], deltas[HARD], sigmas[HARD] = 0.3, 0.2, 300.0, 30.0
        opacities[CLEAR], opacities[OPAQUE], opacities[HUGE] = 0.0, 1.0, 0.5
    return [corners, deltas, sigmas, opacities]


def run(function: Any, leaves: list[Tensor], cameras: Cameras) -> dict[str, Tensor]:
    """Outputs and gradients by name; `function` takes what the reference takes."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    params, depths, radii = function(*leaves, cameras.Ks, cameras.width, cameras.height)
    torch.autograd.backward([params, depths], cotangents(params, depths))
    columns = {"center": slice(0, 2), "corners": slice(2, -3), "delta": slice(-3, -2), "rest": slice(-2, None)}
    outputs = {name: params.detach()[..., at] for name, at in columns.items()}
    grads = {f"v_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    return outputs | {"depths": depths.detach()[..., None], "radii": radii} | grads


def by_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, width, height = args
    return project_convexes(*tensors, (width, height))


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize(
    ("count", "points", "num_cameras", "image"),
    [(0, 6, 1, (70, 45)), (1, 6, 3, (17, 9)), (7, 3, 1, (70, 45)), *((300, k, 2, (200, 131)) for k in range(3, 13))],
)
def test_projection_by_kernel_and_reference(build: Any, count: int, points: int, num_cameras: int, image: Size) -> None:
    cameras = make_cameras(num_cameras, *image)
    leaves = [*make_convexes(count, points, cameras), cameras.viewmats]
    got = run(by_kernel, leaves, cameras)
    wanted = run(project_convexes_reference, [t.double() for t in leaves], as_double(cameras))
    assert torch.equal(got["radii"] > 0, wanted["radii"] > 0)
    # A sharp corner's outline reaches as far as the sine of its angle is small
    rtol = {"radii": 1e-2, "v_points": 1e-3, "v_viewmats": 1e-3}
    for name, result in got.items():
        flat = [t.flatten(1)[..., None, :] if name == "v_points" else t for t in (result, wanted[name])]
        flat = [t[..., None] if name in ("v_deltas", "v_sigmas", "v_opacities") else t for t in flat]
        if name == "radii":  # some hundred images away 1 + cosine has lost its digits
            flat = [t.clamp(max=5e3) for t in flat]
        assert_rows_close(*flat, rtol.get(name, 1e-4 if name.startswith("v_") else 2e-5), name)
    undrawn = (got["radii"] == 0).all(-1)
    for name in ("center", "corners", "delta", "rest", "depths"):
        assert (got[name][undrawn] == 0).all(), name
    for name in NAMES[:4]:
        assert (got[f"v_{name}"][undrawn.all(0)] == 0).all(), name


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_points_that_coincide_are_one_corner(build: Any) -> None:
    """Wherever they are on the hull: on some, products of the same numbers in another order once made a second corner."""
    cameras = make_cameras(1, 200, 131)
    corners, *shape = make_convexes(300, 6, cameras)
    corners[:, 5] = corners[:, 2]
    got = project_convexes(corners, *shape, cameras.viewmats, cameras.Ks, (200, 131))[0]
    kept = project_convexes(corners[:, :5], *shape, cameras.viewmats, cameras.Ks, (200, 131))[0]
    edges = [
        (hull.roll(-1, -2) - hull).abs().sum(-1) > 0
        for hull in (t[..., 2:-3].unflatten(-1, (6, 2)) for t in (got, kept))
    ]
    assert torch.equal(*edges) and edges[0].any(-1).sum() > 150


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_what_is_drawn(build: Any) -> None:
    cameras = make_cameras(1, 200, 131)
    convexes = make_convexes(300, 6, cameras)
    params, _, radii = project_convexes(*convexes, cameras.viewmats, cameras.Ks, (200, 131))
    drawn = radii[0, :, 0] > 0
    assert not drawn[[COLLINEAR, COINCIDENT, BEHIND, ONE_BEHIND, CLEAR]].any()
    assert drawn[[HUGE, SUBPIXEL, SOFT, HARD, OPAQUE, DOUBLED]].all() and 150 < drawn.sum() < 295
    assert radii[0, HUGE].amin() > 200
    assert params[0, SUBPIXEL, 2:-3].abs().max() < 0.5
    assert kernels_module.kernels.MAX_EXTENT == MAX_EXTENT
    assert pytest.approx(MIN_THICKNESS) == kernels_module.kernels.MIN_THICKNESS


@cache
def screen_inputs(count: int, points: int, image: Size, num_cameras: int) -> tuple[Tensor, ...]:
    """`params`, `features`, `depths`, `background`, `radii` in single precision, and which pixels not to compare."""
    cameras = as_double(make_cameras(num_cameras, *image))
    convexes = [t.double() for t in make_convexes(count, points, cameras)]
    params, depths, radii = (
        t.float() for t in project_convexes_reference(*convexes, cameras.viewmats, cameras.Ks, *image)
    )
    generator = torch.Generator().manual_seed(points)
    features = torch.randn(num_cameras, count, 3, generator=generator)
    background = torch.randn(num_cameras, 3, generator=generator)
    fragile = fragile_pixels(params, depths, radii, image, 5e-4, convex_primitive(points))
    assert fragile.float().mean() < 0.1
    return params, features, depths, background, radii, fragile


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize(
    ("count", "points", "image", "num_cameras"),
    [(1, 6, (17, 9), 1), (7, 12, (70, 45), 2), (300, 6, (70, 45), 1), (300, 4, (17, 9), 3), (150, 9, (70, 45), 1)],
)
def test_pictures_by_kernel_and_reference(build: Any, count: int, points: int, image: Size, num_cameras: int) -> None:
    """Binning and compositing, forward and backward, with everything that can be asked for."""
    params, features, depths, background, radii, fragile = screen_inputs(count, points, image, num_cameras)
    primitive, results = convex_primitive(points), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (params, features, depths, background)]
        absgrad = torch.zeros_like(leaves[0][..., :2]).requires_grad_()
        if dtype == torch.float32:
            isects = bin_primitives(primitive, params, depths, radii, image)
            options: dict[str, Any] = {"depth": True, "median_depth": True, "absgrad": absgrad}
            made = composite(primitive, *leaves[:3], isects, image, leaves[3], **options)
            assert made.depth is not None and made.median_depth is not None
            out = (made.features, made.alpha, made.depth, made.median_depth)
        else:
            lists = bin_reference(primitive, leaves[0].detach(), leaves[2].detach(), radii.double(), *image, 16)
            out = composite_reference(primitive, *leaves, Isects(*lists, 16), image, absgrad)
        upstream = [v.masked_fill(fragile.view(*fragile.shape, *[1] * (v.dim() - 3)), 0) for v in cotangents(*out[:3])]
        torch.autograd.backward(list(out[:3]), upstream)
        pictures = [t.detach()[~fragile].view(-1, t[0, 0, 0].numel()) for t in out]
        v_params = leaves[0].grad
        assert v_params is not None
        parts = [v_params[..., at] for at in (slice(0, 2), slice(2, -3), slice(-3, -2), slice(-2, -1), slice(-1, None))]
        results.append([*pictures, *parts, *(t.grad for t in (*leaves[1:2], leaves[3], absgrad))])
    names = ("features", "alpha", "depth", "median", "v_center", "v_corners", "v_delta", "v_sigma", "v_opacity")
    for name, ours, wanted in zip((*names, "v_features", "v_background", "absgrad"), *results, strict=True):
        # Exponents of some hundreds are differences of pixel positions: their rounding is that many times as large
        floor = 1e-5 if name.startswith("v_") or name == "absgrad" else 1e-6
        assert_rows_close(ours, wanted, 1e-3 if name.startswith("v_") else 1e-4, name, floor)


@pytest.mark.parametrize("build", [pytest.param(None, id="reference"), *usable_levels()], indirect=True)
@pytest.mark.parametrize("points", [3, 6, 12])
def test_no_tile_misses_a_convex_that_shows_in_it(build: Any, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "enabled", build is not None)
    image = (200, 131)
    params, _, depths, _, radii, _ = screen_inputs(100, points, image, 1)
    name = convex_primitive(points)
    isects = bin_primitives(name, params, depths, radii, image)
    tile_size, columns = isects.tile_size, -(-image[0] // isects.tile_size)
    tiles = torch.repeat_interleave(torch.arange(len(isects.tile_ranges) - 1), isects.tile_ranges.diff().long())
    listed = set(zip(tiles.tolist(), isects.ids.tolist(), strict=True))
    py, px = torch.meshgrid(torch.arange(131) + 0.5, torch.arange(200) + 0.5, indexing="ij")
    tile_of = (py // tile_size * columns + px // tile_size).long().flatten()
    shown = set()
    for row in (radii[0, :, 0] > 0).nonzero().flatten().tolist():
        alphas = PRIMITIVES[name].alpha(params[0, row].double(), px.double(), py.double()).flatten()
        for tile in tile_of[alphas > ALPHA_MIN * 1.001].unique().tolist():
            shown.add((tile, row))
    assert shown <= listed and len(shown) > 100
    assert len(listed) < 1.35 * len(shown), (len(listed), len(shown))  # corners are rounder than their outline


def test_hulls_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(1)
    for count in (3, 4, 6, 9, 12):
        points = torch.randn(60, count, 2, generator=generator, dtype=torch.float64)
        order, corners = hull_order(points)
        for row in range(60):
            wanted = ConvexHull(points[row].numpy()).vertices.tolist()
            got = order[row, : corners[row]].tolist()
            start = wanted.index(got[0])
            assert got == wanted[start:] + wanted[:start]
            assert (order[row, corners[row] :] == got[0]).all()


@pytest.mark.parametrize(
    ("points", "hull"),
    [
        ([[0, 0], [1, 0], [2, 0], [3, 0]], [0, 3]),
        ([[0, 0], [1, 2], [2, 4], [3, 6]], [0, 3]),
        ([[1, 3], [1, 1], [1, 2], [1, 0]], [3, 0]),
        ([[5, 5]] * 4, [0, 3]),
        ([[0, 0], [1, 0], [1, 1], [1, 1]], [0, 1, 3]),
        ([[0, 0], [1, 1], [1, 1], [2, 0]], [0, 3, 1]),
        ([[0, 0], [0, 0], [2, 0], [1, 1]], [0, 2, 3]),
        ([[0, 0], [4, 0], [2, 1], [2, 3]], [0, 1, 3]),
        ([[0, 0], [0, 1], [0, 2], [1, 1]], [0, 3, 2]),
    ],
)
def test_degenerate_hulls(points: list[list[float]], hull: list[int]) -> None:
    """Points in line, in one place, twice, on a side: each corner once, ends of a line if there is no inside."""
    order, corners = hull_order(torch.tensor(points, dtype=torch.float32))
    assert order[: int(corners)].tolist() == hull


def test_gradients_of_the_reference() -> None:
    """From points to pixels, with cutoffs that are smooth."""
    cameras = as_double(make_cameras(1, 9, 6))
    corners, deltas, sigmas, opacities = (t.double() for t in make_convexes(3, 5, cameras))
    leaves = [corners * 0.5, deltas * 0.3, sigmas, 0.2 + 0.5 * opacities, cameras.viewmats]

    def draw(*inputs: Tensor) -> Tensor:
        params, depths, radii = project_convexes_reference(*inputs, cameras.Ks, 9, 6)
        isects = Isects(*bin_reference("convex6", params, depths, torch.full_like(radii, 99.0), 9, 6, 16), 16)
        features = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 3, 3)
        out = composite_reference("convex6", params, features, depths, features[:, 0], isects, (9, 6), smooth=True)
        return torch.cat([out[0].flatten(), out[2].flatten()])

    assert draw(*leaves).std() > 0.1
    assert torch.autograd.gradcheck(draw, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("build", [pytest.param(None, id="reference"), *usable_levels()], indirect=True)
def test_it_looks_the_same_from_twice_as_far(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a lens twice as long, and a convex flat enough for perspective not to show."""
    monkeypatch.setattr(kernels_module, "enabled", build is not None)
    corners = torch.tensor([[[-0.3, -0.2, 0], [0.35, -0.1, 0], [0.2, 0.3, 0], [-0.1, 0.25, 0]]]) + torch.tensor(
        [0, 0, 4.0]
    )
    shape = [torch.tensor([40.0]), torch.tensor([1.5]), torch.tensor([0.9])]
    Ks = torch.tensor([[[150.0, 0, 40.0], [0, 130.0, 28.0], [0, 0, 1]]])
    pictures = []
    for far in (1.0, 2.0):
        viewmats, longer = torch.eye(4)[None].clone(), Ks.clone()
        viewmats[0, 2, 3], longer[0, :2, :2] = 4.0 * (far - 1), far * Ks[0, :2, :2]
        params, depths, radii = project_convexes(corners, *shape, viewmats, longer, (80, 56))
        isects = bin_primitives("convex6", params, depths, radii, (80, 56))
        pictures.append(composite("convex6", params, torch.ones(1, 1, 3), depths, isects, (80, 56)).alpha)
    assert pictures[0].max() > 0.85 and (pictures[0] < 0.1).float().mean() > 0.3
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=1e-4)


def test_order_and_inner_points_do_not_matter() -> None:
    cameras = as_double(make_cameras(1, 70, 45))
    corners, *shape = (t.double() for t in make_convexes(5, 6, cameras))
    shuffled = corners[:, [3, 0, 5, 1, 4, 2]]
    one, two = (
        project_convexes_reference(c, *shape, cameras.viewmats, cameras.Ks, 70, 45) for c in (corners, shuffled)
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    inner = torch.cat([corners, corners.mean(1, keepdim=True)], 1)
    three = project_convexes_reference(inner, *shape, cameras.viewmats, cameras.Ks, 70, 45)
    drawn = one[2][0, :, 0] > 0
    assert drawn.sum() >= 3
    # Relative to another centre, and in a longer row
    hull = one[0][0, :, None, :2] + one[0][0, :, 2:-3].unflatten(-1, (6, 2))
    same = three[0][0, :, None, :2] + three[0][0, :, 2:-3].unflatten(-1, (12, 2))
    torch.testing.assert_close(same[drawn][:, :6], hull[drawn])


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("delta", [1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e6, 1e30])
def test_extremes_stay_finite(build: Any, delta: float, sigma: float) -> None:
    cameras = make_cameras(2, 70, 45)
    corners, _, _, opacities = make_convexes(40, 6, cameras)
    leaves = [corners, torch.full((40,), delta), torch.full((40,), sigma), opacities]
    for leaf in leaves:
        leaf.requires_grad_()
    params, depths, radii = project_convexes(*leaves, cameras.viewmats, cameras.Ks, (70, 45))
    isects = bin_primitives("convex6", params.detach(), depths.detach(), radii, (70, 45))
    out = composite("convex6", params, torch.rand(2, 40, 3), depths, isects, (70, 45), depth=True)
    assert torch.isfinite(out.features).all() and (out.alpha >= 0).all() and (out.alpha <= 1).all()
    out.features.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_same_bits_on_any_number_of_threads(build: Any) -> None:
    cameras = make_cameras(2, 200, 131)
    leaves = [*make_convexes(3000, 6, cameras), cameras.viewmats]
    before, results = build.num_threads(), []
    try:
        for threads in (1, 2, 5):
            build.set_num_threads(threads)
            results.append(run(by_kernel, leaves, cameras))
    finally:
        build.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_opcheck(build: Any) -> None:
    cameras = make_cameras(2, 70, 45)
    leaves = [*make_convexes(7, 5, cameras), cameras.viewmats]
    arguments = [*(t.requires_grad_() for t in leaves), cameras.Ks, 70, 45]
    torch.library.opcheck(torch.ops.prismfield.project_convexes, arguments)
    plain = [t.detach() for t in leaves]
    params, depths, radii = torch.ops.prismfield.project_convexes(*plain, cameras.Ks, 70, 45)
    backward = (*plain, cameras.Ks, 70, 45, radii, *cotangents(params, depths), True)
    torch.library.opcheck(torch.ops.prismfield.project_convexes_backward, backward)


def test_bad_arguments_are_named() -> None:
    cameras = make_cameras(1, 70, 45)
    convexes = make_convexes(4, 6, cameras)
    for at, name in enumerate(NAMES[:4]):
        bad = [t[:3] if k == at and at else t for k, t in enumerate(convexes)]
        bad[0] = bad[0][..., :2] if at == 0 else bad[0]
        with pytest.raises(ValueError, match=f"{name}: expected"):
            project_convexes(*bad, cameras.viewmats, cameras.Ks, (70, 45))
    for points in (2, 13):
        with pytest.raises(ValueError, match=f"points: expected 3 to 12 a convex, got {points}"):
            project_convexes(torch.zeros(4, points, 3), *convexes[1:], cameras.viewmats, cameras.Ks, (70, 45))
    with pytest.raises(ValueError, match="cameras: expected pinhole"):
        from prismfield.render.rasterize import rasterize_convexes

        fisheye = replace(cameras, model="fisheye", distortion=torch.zeros(1, 4))
        rasterize_convexes(*convexes, (torch.zeros(4, 1, 3), torch.zeros(4, 0, 3)), fisheye, sh_degree=0)
