"""Voxels: their closed forms, and what cameras teach them before the first step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.representations.config import FieldConfig, VoxelConfig
from prismfield.representations.voxels import VoxelField, VoxelPyramid, count_views, entropy
from prismfield.train.optimizer import FusedAdam

SMALL = VoxelConfig(
    levels=3, log2_rows=13, coarsest=4, finest=16, width=16, occupancy=16, steps=64, nests=3, growth=0.4
)
BOX = torch.tensor([[-1.0, -0.6, -0.8], [1.0, 0.8, 0.7]])
EMPTY = (torch.zeros(0, 3), torch.zeros(0, 3), BOX)


def make_field(extent: Any = "box", **options: Any) -> VoxelField:
    torch.manual_seed(0)
    return VoxelField.from_points(*EMPTY, replace(SMALL, extent=extent, **options))


def look(position: tuple[float, float, float], width: int = 46, height: int = 33) -> Cameras:
    """Along +z; oblong, off-centre, fx != fy."""
    viewmat = torch.eye(4)
    viewmat[:3, 3] = -torch.tensor(position)
    K = torch.tensor([[40.0, 0, 21.0], [0, 36.0, 18.5], [0, 0, 1]])
    return Cameras(viewmat[None], K[None], width, height)


@pytest.mark.parametrize("alpha", [1e-6, 0.02])
def test_each_voxel_on_the_way_starts_with_the_same_opacity(alpha: float) -> None:
    """Equation 9: what is left behind N voxels is (1 - alpha)^N."""
    large = VoxelField.from_points(*EMPTY[:2], 3 * BOX, replace(make_field().config, init_alpha=alpha))
    field = make_field(init_alpha=alpha)
    for level in field.encoding.grids:
        nn.init.zeros_(level.table)
    sigmas = field.density(BOX[0] + (BOX[1] - BOX[0]) * torch.rand(50, 3))
    torch.testing.assert_close(sigmas, torch.full((50,), -math.log1p(-alpha) / (2.0 / 16)), rtol=1e-4, atol=0)
    # As many voxels in a larger box are larger
    torch.testing.assert_close(large.density(torch.zeros(1, 3)), sigmas[:1] / 3, rtol=2e-3, atol=0)
    if alpha > 1e-3:
        out = field.render(look((0.0, 0.0, -3.0)), torch.tensor([[0, 20, 18]]))
        ray = torch.tensor([20.5 - 21, 0.0, 1.0]) / torch.tensor([40.0, 1, 1])
        voxels = 1.5 * float(ray.norm()) * 8
        assert out.alpha.item() == pytest.approx(1 - (1 - alpha) ** voxels, rel=0.02)


def test_voxels_of_contracted_space_are_as_many() -> None:
    assert make_field("space").voxel == pytest.approx(4 / 16) and make_field().voxel == pytest.approx(2 / 16)


def test_activated_after_interpolation() -> None:
    """Equation 7c: between a value of -40 and one of 40, half of the voxel is empty."""
    field = make_field(levels=1, coarsest=16, init_alpha=0.5)
    table = field.encoding.grids[0].table
    with torch.no_grad():
        table.view(18, 18, 18, 4)[..., 0] = torch.where(torch.arange(18) < 9, -40.0, 40.0)  # along x
    middle, side = BOX.mean(0), 2 / 16
    shares = torch.tensor([-0.4, -0.1, 0.1, 0.4])
    xyz = middle + shares[:, None] * torch.tensor([side, 0, 0])
    wanted = nn.functional.softplus(80 * shares.double() + math.log(math.expm1(math.log(2)))) / side
    torch.testing.assert_close(field.density(xyz), wanted.float(), rtol=1e-4, atol=1e-5)


def reference(pyramid: VoxelPyramid, x: Tensor) -> Tensor:
    """The sum of the trilinear interpolations, in double precision."""
    found = x.new_zeros(len(x), pyramid.out_dim, dtype=torch.float64)
    for number, level in enumerate(pyramid.grids[: int(pyramid.active)]):
        side = pyramid.resolutions[number] + 2
        table = level.table.double() * (pyramid.shares[:, None] if number == 0 else 1)
        volume = table.view(side, side, side, -1).permute(3, 0, 1, 2)[None]
        position = (x.double() * pyramid.resolutions[number] + 0.5) / (side - 1) * 2 - 1
        found = (
            found
            + nn.functional.grid_sample(volume, position.view(1, -1, 1, 1, 3), align_corners=True)[0, :, :, 0, 0].T
        )
    return found


@pytest.mark.parametrize("active", [1, 2, 3])
def test_grids_add_up(active: int) -> None:
    torch.manual_seed(1)
    pyramid = VoxelPyramid([3, 5, 8], 4, active)
    pyramid.shares.copy_(torch.rand(125))
    for level in pyramid.grids:
        nn.init.normal_(level.table)
    x, weights = torch.rand(301, 3), torch.randn(301, 4)
    out = pyramid(x)
    torch.testing.assert_close(out, reference(pyramid, x).float(), atol=1e-5, rtol=1e-5)
    (out * weights).sum().backward()
    tables = [level.table for level in pyramid.grids]
    found = [table.grad for table in tables]
    assert [grad is not None for grad in found] == [number < active for number in range(3)]
    wanted = torch.autograd.grad((reference(pyramid, x) * weights).sum(), tables[:active])
    for grad, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)
    assert torch.autograd.gradcheck(
        lambda t: torch.func.functional_call(pyramid.grids[1], {"table": t}, (x[:5].double(),)),
        tables[1].detach().double().requires_grad_(),
    )


def test_points_are_where_the_rows_are() -> None:
    pyramid = VoxelPyramid([6, 8], 2, 1)
    nn.init.normal_(pyramid.grids[0].table)
    points = pyramid.points()
    inside = ((points >= 0) & (points <= 1)).all(-1)
    assert int(inside.sum()) == 6**3
    torch.testing.assert_close(pyramid(points[inside]), pyramid.grids[0].table[inside], atol=1e-5, rtol=1e-5)


def test_grids_come_in_one_after_the_other_and_change_nothing_at_once() -> None:
    assert [SMALL.levels_at(p) for p in (0, 0.19, 0.2, 0.39, 0.4, 1)] == [1, 1, 2, 2, 3, 3]
    assert replace(SMALL, growth=0.0).levels_at(0.0) == 3
    field, pixels = make_field(init_alpha=0.1), torch.tensor([[0, 20, 15], [0, 25, 18]])
    for level in field.encoding.grids:
        nn.init.zeros_(level.table)
    groups = field.param_groups()
    optimizer, finer = FusedAdam(groups), field.encoding.grids[1].table
    for progress, moves in ((0.1, False), (0.2, True)):
        field.advance(progress)
        optimizer.zero_grad(set_to_none=True)
        field.render(look((0.0, 0.0, -3.0)), pixels).rgb.square().sum().backward()
        optimizer.step()
        assert bool((finer != 0).any()) == moves
    assert optimizer.counts()["encoding.grids.0.table"] == 2 and optimizer.counts()["encoding.grids.1.table"] == 1
    again = VoxelField.from_tensors(field.tensors(), field.config)
    assert int(again.encoding.active) == 2


def test_the_network_learns_at_its_own_rate() -> None:
    rates = {group["name"]: (group["lr"], group["lr_final"]) for group in make_field().param_groups()}
    assert rates["color_mlp.weights"] == pytest.approx((5e-3, 5e-4))
    assert rates["encoding.grids.0.table"] == rates["encoding.grids.2.table"] == (0.1, 0.01)


def test_what_few_cameras_see_learns_slowly() -> None:
    """Section 4.1.3: by the share of the cameras, whatever the size of the gradient."""
    pyramid = VoxelPyramid([4], 2, 1)
    nn.init.zeros_(pyramid.grids[0].table)
    pyramid.shares.copy_(torch.linspace(0, 1, 216))
    optimizer = FusedAdam([{"name": "table", "params": [pyramid.grids[0].table], "lr": 0.1}])
    before, x = pyramid(pyramid.points().clamp(0, 1)), pyramid.points()
    inside = ((x >= 0) & (x <= 1)).all(-1)
    (pyramid(x[inside]) * torch.logspace(-3, 3, 64)[:, None]).sum().backward()
    optimizer.step()
    moved = (before - pyramid(x.clamp(0, 1)))[inside]
    torch.testing.assert_close(moved, 0.1 * pyramid.shares[inside, None].expand(-1, 2), atol=1e-5, rtol=1e-4)


def test_counts_agree_with_projected_points() -> None:
    xyz = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 8 - 4
    angle = torch.tensor(0.8)
    turned = look((0.5, 0.2, -1.0))
    turn = torch.eye(4)
    turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = angle.cos(), angle.sin(), -angle.sin(), angle.cos()
    turned = replace(turned, viewmats=turn @ turned.viewmats)
    wanted = torch.zeros(4000, dtype=torch.int64)
    for camera in (look((0.0, 0.0, -3.0)), turned):
        local = xyz @ camera.viewmats[0, :3, :3].T + camera.viewmats[0, :3, 3]
        u, v, _ = (local @ camera.Ks[0].T / local[:, 2:]).unbind(-1)
        wanted += (local[:, 2] > 0) & (u > 0) & (u < 46) & (v > 0) & (v < 33)
    cameras = [look((0.0, 0.0, -3.0)), turned]
    assert torch.equal(count_views(xyz, torch.zeros(4000), cameras), wanted)
    assert torch.equal(count_views(xyz, torch.zeros(4000), [Cameras.stack(cameras)]), wanted)
    assert {0, 1, 2} == set(wanted.tolist())
    # A ball of radius 1/2 half a unit beyond the left side of the picture just does not touch it
    edge = torch.tensor([-21.0 / 40, 0.0, 1.0])
    outward = nn.functional.normalize(torch.tensor([-40.0, 0.0, -21.0]), dim=0)
    beyond = (4 * edge + 0.5 * outward).expand(2, 3)
    assert count_views(beyond, torch.tensor([0.499, 0.501]), [look((0.0, 0.0, 0.0))]).tolist() == [0, 1]


@pytest.mark.parametrize("extent", ["box", "space"])
def test_what_no_camera_sees_is_empty_for_good(extent: str) -> None:
    field = make_field(extent, occupancy=64, coarsest=16)
    field.observe([look((0.0, 0.0, -1.0)), look((0.0, 0.0, -0.7))])
    centers = field.grid.centers().view(-1, 3)
    seen = count_views(centers, torch.zeros(len(centers)), [look((0.0, 0.0, -1.0)), look((0.0, 0.0, -0.7))]) > 0
    occupied = field.grid.occupied.view(-1)
    assert occupied[seen].all() and not occupied.all()
    field.grid.update(lambda xyz: torch.full((len(xyz),), 100.0), threshold=0.01)
    assert torch.equal(field.grid.occupied.view(-1), occupied)
    shares = field.encoding.shares
    assert float(shares.max()) == 1 and 0.5 in shares.tolist()
    again = VoxelField.from_tensors(field.tensors(), field.config)
    assert torch.equal(again.encoding.shares, shares) and torch.equal(again.grid.occupied, field.grid.occupied)


@pytest.mark.parametrize("extent", ["box", "space"])
def test_shares_belong_to_the_places_that_cameras_see(extent: str) -> None:
    """Of three cameras, one looks from the side: only the middle has a share of 1."""
    field = make_field(extent, coarsest=16)
    aside = look((0.0, 0.0, 0.0))
    turn = torch.tensor([[0, 0, -1.0, 0], [0, 1, 0, 0], [1, 0, 0, 4], [0, 0, 0, 1]])
    field.observe([look((0.0, 0.0, -4.0)), look((0.0, 0.0, -4.0)), replace(aside, viewmats=turn[None])])
    field.advance(1.0)
    for level in field.encoding.grids:
        nn.init.ones_(level.table)
    middle, high = BOX.mean(0), BOX.mean(0) + torch.tensor([0, 40.0 if extent == "space" else 0, 0])
    x = torch.stack([middle, high])
    seen: list[Tensor] = []
    field.encoding.register_forward_hook(lambda module, inputs, out: seen.append(out))
    field.density(x)
    found = seen[0][:, 0].detach()
    assert float(found[0]) == 3 and (float(found[1]) < 2.5) == (extent == "space")  # two more grids are


def test_entropy_of_a_pixel() -> None:
    alpha = torch.tensor([0.0, 0.25, 0.5, 1.0], requires_grad=True)
    found = entropy(alpha)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(found.detach(), torch.tensor([0.0, quarter, math.log(2), 0.0]), atol=3e-5, rtol=1e-6)
    found.sum().backward()
    assert alpha.grad is not None
    torch.testing.assert_close(alpha.grad, torch.tensor([0.0, math.log(3), 0.0, 0.0]), atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(entropy, torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64, requires_grad=True))
    field, pixels = make_field(init_alpha=0.1, entropy=0.5, distortion=0.1), torch.tensor([[0, 20, 15], [0, 25, 18]])
    out = field.render(look((0.0, 0.0, -3.0)), pixels)
    assert set(out.penalties) == {"distortion", "entropy"}
    torch.testing.assert_close(out.penalties["entropy"], 0.5 * entropy(out.alpha).mean())


def test_options_that_make_no_sense_are_named() -> None:
    for options, said in (
        ({"log2_rows": 12}, "log2_rows: expected room for 5832 voxels, got 4096"),
        ({"init_alpha": 1.0}, "init_alpha: expected a number between 0 and 1, got 1.0"),
        ({"features": 1}, "features: expected 2, 4 or 8, got 1"),
    ):
        with pytest.raises(ValueError, match=f"^{said}$"):
            make_field(**options)
    assert isinstance(SMALL, FieldConfig)
