"""Binning: no tile misses a primitive that shows in it, few hold one that does not, each is in order of depth."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.constants import ALPHA_MIN
from prismfield.render.ops.primitives import PRIMITIVES
from prismfield.render.ops.project import project_reference

from .raster_fixtures import (
    COUNTS,
    IMAGES,
    make_cameras,
    make_gaussians,
    usable_levels,
    use_kernels,
)

BUILDS = [pytest.param(None, id="reference"), *usable_levels()]
Screen = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels, or None for the reference."""
    monkeypatch.setattr(kernels_module, "enabled", request.param is not None)
    use_kernels(monkeypatch, request.param)
    return request.param


def make_screen(count: int, image: tuple[int, int], num_cameras: int, needles: bool = False) -> Screen:
    """Projected Gaussians, the same for every build."""
    cameras = make_cameras(num_cameras, *image)
    gaussians = make_gaussians(count, cameras, seed=count)
    means, quats, scales, opacities = gaussians.tensors()[:4]
    if needles:
        scales = torch.tensor([0.8, 0.001, 0.001]).expand(count, 3)
    screen = project_reference(means, quats, scales, opacities, cameras.viewmats, cameras.Ks, *image, False)
    return screen[0], screen[1], screen[2]


def listing(isects: Isects) -> list[tuple[int, int]]:
    """(tile, id) of each intersection, in order."""
    tiles = torch.repeat_interleave(torch.arange(len(isects.tile_ranges) - 1), isects.tile_ranges.diff().long())
    return list(zip(tiles.tolist(), isects.ids.tolist(), strict=True))


def members(isects: Isects) -> set[tuple[int, int]]:
    return set(listing(isects))


@cache
def visible(
    count: int, image: tuple[int, int], num_cameras: int, needles: bool, tile_size: int
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(tile, id) of all pairs with a pixel where alpha surely reaches the cutoff, and where it all but does, pixel by pixel."""
    params, _, radii = make_screen(count, image, num_cameras, needles)
    width, height = image
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    py, px = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    tile_of = (py // tile_size * columns + px // tile_size).long().flatten()
    sure, near = set(), set()
    for camera, row in (radii[..., 0] > 0).nonzero().tolist():
        alphas = PRIMITIVES["gaussian"].alpha(params[camera, row].double(), px.double(), py.double()).flatten()
        highest = torch.zeros(rows * columns, dtype=torch.float64).scatter_reduce(0, tile_of, alphas, "amax")
        for margin, pairs in ((1e-3, sure), (-1e-2, near)):
            for tile in (highest > ALPHA_MIN * (1 + margin)).nonzero().flatten().tolist():
                pairs.add((camera * rows * columns + tile, camera * count + row))
    return sure, near


@pytest.mark.parametrize("build", BUILDS, indirect=True)
@pytest.mark.parametrize("needles", [False, True])
@pytest.mark.parametrize(("image", "num_cameras"), [*((image, 1) for image in IMAGES), ((70, 45), 3)], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_lists(build: Any, count: int, image: tuple[int, int], num_cameras: int, needles: bool) -> None:
    screen = make_screen(count, image, num_cameras, needles)
    depths = screen[1]
    isects = bin_primitives("gaussian", *screen, image)
    tile_size = isects.tile_size
    assert tile_size == (build.tile_size if build else 16)
    tiles = num_cameras * -(-image[0] // tile_size) * -(-image[1] // tile_size)
    total = len(isects.ids)
    assert len(isects.tile_ranges) == tiles + 1 and len(isects.row_starts) == num_cameras * count + 1
    assert isects.tile_ranges[0] == 0 and isects.tile_ranges[-1] == total and (isects.tile_ranges.diff() >= 0).all()

    listed = members(isects)
    sure, near = visible(count, image, num_cameras, needles, tile_size)
    assert len(listed) == total  # no pair twice
    assert sure <= listed, "a primitive is missing from a tile that it shows in"
    # In one column of tiles the bounding box alone decides; the outline is exact to the row of pixels
    spare = len(listed - near)
    assert spare <= 0.06 * len(near) + 8, f"{spare} of {total} intersections show nothing"

    by_depth = depths.flatten()[isects.ids.long()]
    bounds = isects.tile_ranges.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        assert (by_depth[first:last].diff() >= 0).all()

    # Grouped by primitive: its rows are consecutive, in order of tile
    assert torch.equal(isects.rows.sort().values, torch.arange(total, dtype=torch.int32))
    by_row = torch.empty(total, dtype=torch.int32)
    by_row[isects.rows.long()] = isects.ids
    assert torch.equal(
        by_row, torch.repeat_interleave(torch.arange(num_cameras * count), isects.row_starts.diff()).int()
    )


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_kernel_against_reference(build: Any, image: tuple[int, int]) -> None:
    """The same lists but for primitives that all but miss a tile; those that both hold stand in the same order."""
    screen = make_screen(300, image, 2)
    got = bin_primitives("gaussian", *screen, image)
    wanted = Isects(*bin_reference("gaussian", *(t.double() for t in screen), *image, got.tile_size), got.tile_size)
    ours, theirs = members(got), members(wanted)
    assert len(ours ^ theirs) <= 0.05 * len(theirs) + 8
    assert [pair for pair in listing(got) if pair in theirs] == [pair for pair in listing(wanted) if pair in ours]


@pytest.mark.parametrize("build", BUILDS, indirect=True)
@pytest.mark.parametrize("count", [40, 95, 96, 97, 700])
def test_ties_keep_their_order(build: Any, count: int) -> None:
    """On both sides of where lists are sorted by their digits; many at equal depths."""
    generator = torch.Generator().manual_seed(count)
    depths = torch.randint(1, 12, (1, count), generator=generator) * 0.7
    params = torch.tensor([8.0, 8.0, 0.01, 0.0, 0.01, -0.1]).expand(1, count, 6)
    isects = bin_primitives("gaussian", params, depths, torch.full((1, count, 2), 30.0), (16, 16))
    assert torch.equal(isects.ids.long(), depths[0].argsort(stable=True))


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_same_lists_on_any_number_of_threads(build: Any) -> None:
    screen = make_screen(300, (200, 131), 3)
    before = build.num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            build.set_num_threads(threads)
            results.append(bin_primitives("gaussian", *screen, (200, 131)))
    finally:
        build.set_num_threads(before)
    for result in results[1:]:
        for name in ("ids", "rows", "tile_ranges", "row_starts"):
            assert torch.equal(getattr(result, name), getattr(results[0], name)), name


@pytest.mark.parametrize("tile_size", [1, 5, 16, 200])
def test_the_reference_takes_any_tile_size(tile_size: int) -> None:
    screen = tuple(t.double() for t in make_screen(40, (70, 45), 2))
    isects = Isects(*bin_reference("gaussian", *screen, 70, 45, tile_size), tile_size)
    sure, near = visible(40, (70, 45), 2, False, tile_size)
    assert sure <= members(isects)
    assert len(members(isects) - near) <= 0.02 * len(near)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_opcheck(build: Any) -> None:
    screen = make_screen(7, (70, 45), 2)
    # Its lists are as long as the data says: no fake tensor knows their length beforehand
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.prismfield.bin, ("gaussian", *screen, 70, 45, build.tile_size), test_utils=checks)


def test_bad_arguments_are_named() -> None:
    params, depths, radii = make_screen(7, (70, 45), 2)
    for name, arguments in {
        "params": (params[..., :5], depths, radii),
        "depths": (params, depths[:, :6], radii),
        "radii": (params, depths, radii[..., :1]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            bin_primitives("gaussian", *arguments, (70, 45))
    with pytest.raises(ValueError, match=r"^depths: expected dtype torch\.float32"):
        bin_primitives("gaussian", params, depths.double(), radii, (70, 45))
    with pytest.raises(ValueError, match="primitive: expected one of gaussian, convex6, convex12, got 'triangle'"):
        bin_primitives("triangle", params, depths, radii, (70, 45))


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_kernels_refuse_another_tile_size(build: Any) -> None:
    with pytest.raises(ValueError, match="tile_size"):
        bin_primitives("gaussian", *make_screen(7, (70, 45), 1), (70, 45), tile_size=8)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_kernels_refuse_a_primitive_they_do_not_have(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was drawn as a Gaussian."""
    monkeypatch.setitem(PRIMITIVES, "square", PRIMITIVES["gaussian"])
    with pytest.raises(ValueError, match='primitive "square" has no C\\+\\+ kernels'):
        bin_primitives("square", *make_screen(5, (19, 13), 1), size=(19, 13))
