"""Binning by Triton: the lists of the reference, in its order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.project_convexes import convex_primitive

from .raster_fixtures import make_cameras
from .test_bin import Screen, listing, make_screen
from .test_gpu_project_convexes import make_convex_screen

# The interpreter's: lanes that hold nothing compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def lists_of(screen: Screen, image: tuple[int, int], device: torch.device, primitive: str = "gaussian") -> Isects:
    params, depths, radii = (t.to(device) for t in screen)
    found = bin_primitives(primitive, params, depths, radii, image)
    names = ("ids", "rows", "tile_ranges", "row_starts")
    return Isects(*(getattr(found, name).cpu() for name in names), found.tile_size)


def expected_lists(screen: Screen, image: tuple[int, int], primitive: str = "gaussian") -> Isects:
    params, depths, radii = (t.double() for t in screen)
    return Isects(*bin_reference(primitive, params, depths, radii, *image, 16), 16)


def assert_consistent(isects: Isects) -> None:
    """Rows number the intersections primitive by primitive, each one's in order of tile."""
    pairs = listing(isects)
    by_primitive = sorted(range(len(pairs)), key=lambda i: (pairs[i][1], pairs[i][0]))
    assert isects.rows[by_primitive].tolist() == list(range(len(pairs)))
    counts = torch.bincount(isects.ids, minlength=len(isects.row_starts) - 1)
    assert torch.equal(isects.row_starts.diff().long(), counts) and isects.row_starts[0] == 0
    assert isects.tile_ranges[0] == 0 and isects.tile_ranges[-1] == isects.row_starts[-1] == len(pairs)
    assert all(t.dtype == torch.int32 for t in (isects.ids, isects.rows, isects.tile_ranges, isects.row_starts))


@pytest.mark.parametrize("needles", [False, True])
@pytest.mark.parametrize(
    ("count", "image", "num_cameras"),
    [(0, (17, 9), 2), (1, (1, 1), 1), (7, (70, 45), 3), (300, (70, 45), 1), (300, (200, 131), 1), (131, (200, 131), 2)],
    ids=str,
)
def test_against_the_reference(
    count: int, image: tuple[int, int], num_cameras: int, needles: bool, triton_device: torch.device
) -> None:
    """The same lists; spans are slightly enlarged, so that one in thousands may have a tile more, but never one less."""
    screen = make_screen(count, image, num_cameras, needles)
    got, wanted = lists_of(screen, image, triton_device), expected_lists(screen, image)
    ours, theirs = listing(got), set(listing(wanted))
    assert [pair for pair in ours if pair in theirs] == listing(wanted)
    assert len(ours) - len(theirs) <= len(theirs) / 2000
    assert_consistent(got)
    if len(ours) == len(theirs):
        for name in ("ids", "rows", "tile_ranges", "row_starts"):
            assert torch.equal(getattr(got, name), getattr(wanted, name)), name


@pytest.mark.parametrize(("count", "points"), [(60, 3), (60, 6), (25, 9)])
def test_convexes_against_the_reference(count: int, points: int, triton_device: torch.device) -> None:
    """The same lists; the outline is slightly enlarged, so that one in hundreds may have a tile more, but never one less."""
    image, name = (131, 70), convex_primitive(points)
    screen = make_convex_screen(count, points, make_cameras(1, *image))
    got, wanted = lists_of(screen, image, triton_device, name), expected_lists(screen, image, name)
    ours, theirs = listing(got), set(listing(wanted))
    assert len(theirs) > 100
    assert [pair for pair in ours if pair in theirs] == listing(wanted)
    assert len(ours) - len(theirs) <= len(theirs) / 200
    assert_consistent(got)


@pytest.mark.parametrize("column", [0, 5, 14, 16])
def test_convexes_that_are_not_numbers(column: int, triton_device: torch.device) -> None:
    """They are in no list, and the others' are as they were."""
    params, depths, radii = make_convex_screen(3, 6, make_cameras(1, 60, 40))
    alone = lists_of((params[:, ::2], depths[:, ::2], radii[:, ::2]), (60, 40), triton_device, "convex6")
    angles = torch.arange(6) * math.pi / 3
    params[0, 1, :2] = torch.tensor([30.0, 20.0])
    params[0, 1, 2:14] = 15 * torch.stack([angles.cos(), angles.sin()], -1).flatten()
    params[0, 1, 14:] = torch.tensor([1.0, 1.0, 0.8])
    params[0, 1, column] = math.nan
    depths[0, 1], radii[0, 1] = 1.0, 25.0
    got = lists_of((params, depths, radii), (60, 40), triton_device, "convex6")
    assert len(alone.ids) > 0
    assert listing(got) == [(tile, 2 * i) for tile, i in listing(alone)]


def discs(centers: list[list[float]], sigma: float, depths: list[float]) -> Screen:
    """Round Gaussians, half opaque, on one camera's screen."""
    rows = [[x, y, sigma**-2, 0.0, sigma**-2, math.log(0.5)] for x, y in centers]
    radius = sigma * math.sqrt(2 * math.log(0.5 * 255))
    return torch.tensor([rows]), torch.tensor([depths]), torch.full((1, len(rows), 2), radius)


def test_ties_keep_their_order(triton_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    depths = (torch.randint(1, 12, (700,), generator=generator) * 0.7).tolist()
    got = lists_of(discs([[8.0, 8.0]] * 700, 3.0, depths), (16, 16), triton_device)
    assert torch.equal(got.ids.long(), torch.tensor(depths).argsort(stable=True))


def test_more_tiles_than_16_bits_hold(triton_device: torch.device) -> None:
    image = (2912, 2912)
    screen = discs([[20.0, 2900.0], [2900.0, 2905.0], [1500.0, 0.0], [33.0, 2899.0]], 4.0, [3.0, 1.0, 1.0, 2.0])
    got, wanted = lists_of(screen, image, triton_device), expected_lists(screen, image)
    assert len(got.tile_ranges) > 2**15 and len(got.ids) > 12
    assert listing(got) == listing(wanted)
    assert_consistent(got)


@pytest.mark.parametrize("column", range(6))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_ran_away(value: float, column: int, triton_device: torch.device) -> None:
    """Whatever a primitive's parameters are, the lists hold tiles of the image, and the others' are as they were."""
    params, depths, radii = discs([[20.0, 20.0], [30.0, 9.0], [22.0, 20.0]], 6.0, [1.0, 2.0, 3.0])
    alone = lists_of((params[:, ::2], depths[:, ::2], radii[:, ::2]), (50, 40), triton_device)
    params[0, 1, column] = value
    got = lists_of((params, depths, radii), (50, 40), triton_device)
    assert_consistent(got)
    assert [(tile, i) for tile, i in listing(got) if i != 1] == [(tile, 2 * i) for tile, i in listing(alone)]
    if math.isnan(value):
        assert 1 not in got.ids


def test_another_tile_size_is_refused(triton_device: torch.device) -> None:
    params, depths, radii = (t.to(triton_device) for t in make_screen(7, (70, 45), 1))
    with pytest.raises(ValueError, match="tile_size"):
        bin_primitives("gaussian", params, depths, radii, (70, 45), tile_size=8)


def test_footprints_off_the_image(triton_device: torch.device) -> None:
    """Drawn as far as `radii` say, but beyond each edge, or between two pixel centres."""
    centers = [[-30.0, 20.0], [90.0, 20.0], [20.0, -30.0], [20.0, 90.0], [-1e6, 5.0], [5.0, 1e6], [1e30, 1e30]]
    params, depths, radii = discs([*centers, [20.0, 20.0]], 6.0, [1.0] * 8)
    params[0, 7, 2:5] = torch.tensor([1e4, 0.0, 1e4])  # a hundredth of a pixel, on the corner of four
    got = lists_of((params, depths, radii), (50, 40), triton_device)
    assert len(got.ids) == 0 and (got.tile_ranges == 0).all()


def test_the_lists_are_the_same_each_time(triton_device: torch.device) -> None:
    screen = make_screen(131, (70, 45), 1)
    first, second = (lists_of(screen, (70, 45), triton_device) for _ in range(2))
    pairs: list[tuple[Tensor, Tensor]] = [(first.ids, second.ids), (first.rows, second.rows)]
    assert all(torch.equal(a, b) for a, b in pairs)
