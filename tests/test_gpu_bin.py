"""The Triton binning against the reference."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference

from .test_bin import listing, make_screen, members


def lists_of(isects: Isects) -> Isects:
    """The same on the CPU."""
    return Isects(
        **{f.name: v.cpu() if isinstance(v := getattr(isects, f.name), torch.Tensor) else v for f in fields(isects)}
    )


@pytest.mark.parametrize("needles", [False, True])
@pytest.mark.parametrize(
    ("count", "image", "num_cameras"),
    [(0, (17, 9), 1), (1, (17, 9), 1), (7, (1, 1), 3), (300, (70, 45), 2), (130, (200, 131), 1)],
    ids=str,
)
def test_the_same_lists(
    count: int, image: tuple[int, int], num_cameras: int, needles: bool, triton_device: torch.device
) -> None:
    """But for primitives that all but miss a tile; those that both hold stand in the same order."""
    screen = make_screen(count, image, num_cameras, needles)
    got = lists_of(bin_primitives("gaussian", *(t.to(triton_device) for t in screen), image))
    wanted = Isects(*bin_reference("gaussian", *(t.double() for t in screen), *image, got.tile_size), got.tile_size)
    ours, theirs = members(got), members(wanted)
    assert len(ours) == len(got.ids)
    assert len(ours ^ theirs) <= 0.05 * len(theirs) + 4
    assert [pair for pair in listing(got) if pair in theirs] == [pair for pair in listing(wanted) if pair in ours]

    total = len(got.ids)  # grouped by primitive: its rows are consecutive
    assert torch.equal(got.rows.sort().values, torch.arange(total, dtype=torch.int32))
    by_row = torch.empty(total, dtype=torch.int32)
    by_row[got.rows.long()] = got.ids
    assert torch.equal(by_row, torch.repeat_interleave(torch.arange(num_cameras * count), got.row_starts.diff()).int())


def test_ties_keep_their_order(triton_device: torch.device) -> None:
    count = 97
    depths = torch.randint(1, 12, (1, count), generator=torch.Generator().manual_seed(3)) * 0.7
    params = torch.tensor([8.0, 8.0, 0.01, 0.0, 0.01, -0.1]).expand(1, count, 6)
    inputs = (t.to(triton_device) for t in (params, depths, torch.full((1, count, 2), 30.0)))
    isects = bin_primitives("gaussian", *inputs, (16, 16))
    assert torch.equal(isects.ids.cpu().long(), depths[0].argsort(stable=True))
