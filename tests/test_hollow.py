"""The hollowed field: soft threshold, dual updates, and the cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from prismfield.render.cameras import Cameras
from prismfield.representations.base import size_of
from prismfield.representations.config import FieldConfig, HollowConfig
from prismfield.representations.fields import HashField
from prismfield.representations.hollow import HollowField, soft_threshold

SMALL = HollowConfig(
    levels=4, log2_rows=12, coarsest=4, finest=24, width=16, occupancy=16, steps=64, saliency=6, extent="box"
)
BOX = torch.tensor([[-1.0, -0.6, -0.8], [1.0, 0.8, 0.7]])
EMPTY = (torch.zeros(0, 3), torch.zeros(0, 3), BOX)
PIXELS = torch.tensor([[0, 20, 15], [0, 25, 18]])


def make_field(**options: Any) -> HollowField:
    torch.manual_seed(0)
    return HollowField.from_points(*EMPTY, replace(SMALL, **options))


def make_camera() -> Cameras:
    viewmat = torch.eye(4)
    viewmat[2, 3] = 3.0
    return Cameras(viewmat[None], torch.tensor([[[40.0, 0, 21.0], [0, 36.0, 18.5], [0, 0, 1]]]), 46, 33)


def test_the_soft_threshold_minimises_what_it_says() -> None:
    x = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.2, 0.5, 3.0], dtype=torch.float64)
    found = soft_threshold(x, 0.5)
    torch.testing.assert_close(found, torch.tensor([-1.5, 0, 0, 0, 0, 0, 2.5], dtype=torch.float64))
    z = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    best = z[(0.5 * z.abs()[:, None] + 0.5 * (z[:, None] - x) ** 2).argmin(0)]
    torch.testing.assert_close(found, best, atol=1.1e-3, rtol=0)


def test_a_dual_update() -> None:
    field = make_field()
    mask, grid = field.encoding.mask.table, field.encoding
    with torch.no_grad():
        mask.copy_(torch.linspace(-0.2, 1, len(mask))[:, None])
    grid.dual.fill_(0.05)
    before = mask[:, 0].detach().clone()
    grid.update_dual(0.1)
    torch.testing.assert_close(grid.split, soft_threshold(before + 0.05, 0.1))
    torch.testing.assert_close(grid.dual, (before + 0.05).clamp(-0.1, 0.1))  # what the threshold took off
    torch.testing.assert_close(grid.residual().detach(), before - grid.split + grid.dual)


def test_dual_updates_come_at_their_steps_and_the_cut_at_its_share() -> None:
    field = make_field(dual_interval=4, prune=0.5, sparsity=0.02, rho=0.2)
    grid, found = field.encoding, []
    for step in range(1, 25):
        field.advance(step / 24)
        found.append((float(grid.split[0]), bool(grid.cut)))
    # Nothing moves the mask here: z falls to 0.9, then u grows until z is 1 again
    assert [value for value, _ in found[:8]] == pytest.approx([1.0] * 3 + [0.9] * 4 + [1.0])
    assert [cut for _, cut in found] == [False] * 11 + [True] * 13
    assert int(grid.steps) == 12


def test_admm_finds_the_lasso() -> None:
    """With the loss mean (m - a)^2 / 2, the mask is soft_threshold(a, sparsity)."""
    field = make_field(sparsity=0.2, rho=0.4, dual_interval=1, prune=2.0)
    grid = field.encoding
    target = torch.linspace(0, 1, len(grid.split))
    for _ in range(60):
        with torch.no_grad():  # the exact minimum over m of the loss and the augmented term
            grid.mask.table[:, 0] = (target + 0.4 * (grid.split - grid.dual)) / 1.4
        field.advance(0.1)
    torch.testing.assert_close(grid.split, soft_threshold(target, 0.2), atol=1e-4, rtol=0)
    assert 0.19 < float((grid.split == 0).float().mean()) < 0.21


def test_the_penalty_is_the_augmented_lagrangian_until_the_cut() -> None:
    field = make_field(distortion=0.1)
    field.encoding.dual.copy_(torch.linspace(0, 0.5, len(field.encoding.dual)))
    out = field.render(make_camera(), PIXELS)
    assert set(out.penalties) == {"distortion", "saliency"}
    torch.testing.assert_close(out.penalties["saliency"], 0.1 * field.encoding.dual.square().mean())
    out.penalties["saliency"].backward()
    wanted = 0.2 * field.encoding.dual / len(field.encoding.dual)
    torch.testing.assert_close(field.encoding.mask.table.grad[:, 0], wanted)
    field.encoding.cut_off()
    assert set(field.render(make_camera(), PIXELS).penalties) == {"distortion"}
    assert set(make_field(sparsity=0.0, distortion=0.0).render(make_camera(), PIXELS).penalties) == set()


def test_the_mask_multiplies_features_and_density() -> None:
    field, x = make_field(), torch.rand(200, 3)
    nn.init.normal_(field.encoding.features.table)
    nn.init.normal_(field.encoding.mask.table)
    mask = field.encoding.mask(x).detach().clamp(min=0)
    out = field.encoding(x)
    torch.testing.assert_close(out, torch.cat([mask, mask * field.encoding.features(x)], -1))
    assert 20 < int((mask == 0).sum()) < 180
    assert field.density_mlp is not None
    sigmas, _ = field._split(out)
    torch.testing.assert_close(sigmas, mask[:, 0] * field.density_mlp(out[:, 1:])[:, 0].exp())


def test_with_a_full_mask_it_is_the_hash_field() -> None:
    field = make_field()
    nn.init.normal_(field.encoding.features.table)
    config = FieldConfig(**{name: getattr(SMALL, name) for name in FieldConfig.__dataclass_fields__})
    tensors = {name.replace("encoding.features.", "encoding."): value for name, value in field.tensors().items()}
    other = HashField.from_tensors(tensors, config)
    torch.testing.assert_close(field.render(make_camera()).rgb, other.render(make_camera()).rgb, atol=1e-5, rtol=1e-4)


def test_what_is_cut_off_stays_empty_and_gets_no_gradient() -> None:
    field = make_field()
    left = torch.arange(8).repeat(64) < 4  # x is the fastest axis
    field.encoding.split.copy_(torch.where(left, 0.0, 0.5))
    field.encoding.cut_off()
    xyz = BOX.mean(0) + torch.tensor([[-0.9, 0, 0], [-0.3, 0, 0], [0.3, 0, 0], [0.9, 0, 0]])
    sigmas = field.density(xyz)
    assert (sigmas[:2] == 0).all() and (sigmas[2:] > 0.5).all()
    sigmas[:2].sum().backward()
    assert field.encoding.features.table.grad is not None and not field.encoding.features.table.grad.any()
    with torch.no_grad():
        field.encoding.mask.table.fill_(1.0)
    assert (field.density(xyz)[:2] == 0).all()


def test_it_stores_a_third_of_the_hash_field() -> None:
    count = size_of(HollowField.from_points(*EMPTY, HollowConfig()))[1]
    assert 0.3 < count / size_of(HashField.from_points(*EMPTY, FieldConfig()))[1] < 0.34


def test_rates_and_options() -> None:
    rates = {group["name"]: (group["lr"], group["lr_final"]) for group in make_field(saliency_lr=0.02).param_groups()}
    assert rates["encoding.mask.table"] == pytest.approx((0.02, 0.001))
    assert rates["encoding.features.table"] == rates["color_mlp.weights"] == (2e-2, 1e-3)
    said = "^rho, dual_interval, saliency: expected above 0, 1 or more and 1 or more, got "
    for options, got in (
        ({"rho": 0.0}, "0.0, 16, 6"),
        ({"dual_interval": 0}, "0.2, 0, 6"),
        ({"saliency": 0}, "0.2, 16, 0"),
    ):
        with pytest.raises(ValueError, match=said + got):
            make_field(**options)
