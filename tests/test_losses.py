"""The terms of the loss, and what is learnt about each image beside the scene."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.train.batches import Batch
from prismfield.train.config import LossConfig
from prismfield.train.corrections import Exposure, PoseDeltas
from prismfield.train.losses import inverse_depth_error, loss_terms

HEIGHT, WIDTH = 13, 21


def camera() -> Cameras:
    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = turn, torch.tensor([0.3, -0.2, 2.0])
    K = torch.tensor([[30.0, 0.0, 9.0], [0.0, 26.0, 7.5], [0.0, 0.0, 1.0]])
    return Cameras(viewmat[None], K[None], WIDTH, HEIGHT)


def batch(**given: torch.Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = {"rgb": torch.rand(1, HEIGHT, WIDTH, 3, generator=generator), "background": torch.zeros(1, 3)} | given
    values = {"mask": None, "depth": None} | pixels
    return Batch(cameras=camera(), index=0, **values)


def render() -> RenderOutput:
    generator = torch.Generator().manual_seed(1)
    shape = (1, HEIGHT, WIDTH)
    depth = 1 + torch.rand(shape, generator=generator)
    return RenderOutput(torch.rand(*shape, 3, generator=generator), torch.ones(shape), depth)


def test_masked_pixels_have_no_say() -> None:
    mask = torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, 3:8, 2:9] = False
    given, out = batch(mask=mask), render()
    before = loss_terms(out, out.rgb, given, object(), LossConfig())["photometric"]
    rgb = torch.where(mask[..., None], out.rgb, 1 - out.rgb).requires_grad_()
    after = loss_terms(out, rgb, given, object(), LossConfig())["photometric"]
    assert torch.equal(before, after)
    after.backward()
    assert (rgb.grad[~mask] == 0).all() and (rgb.grad[mask] != 0).any()


def test_terms_are_weighted_and_left_out_at_zero() -> None:
    scene = SimpleNamespace(opacities=torch.tensor([0.2, 0.6]), scales=torch.full((2, 3), 0.5))
    out = render()
    assert set(loss_terms(out, out.rgb, batch(), scene, LossConfig(opacity_reg=0.0, scale_reg=0.0))) == {"photometric"}
    terms = loss_terms(out, out.rgb, batch(), scene, LossConfig(opacity_reg=0.1, scale_reg=2.0))
    assert float(terms["opacity"]) == pytest.approx(0.04)
    assert float(terms["scale"]) == pytest.approx(1.0)


def test_depth_counts_where_it_is_known_drawn_and_not_masked() -> None:
    depth = torch.full((1, 2, 3), 2.0)
    target = torch.tensor([[[4.0, 0.0, 4.0], [1.0, 4.0, 4.0]]])
    alpha = torch.tensor([[[1.0, 1.0, 0.3], [1.0, 1.0, 1.0]]])
    # 1/2 against 1/4, 1/1, 1/4, 1/4; the second is unknown, the third is not drawn
    assert float(inverse_depth_error(depth, alpha, target)) == pytest.approx((0.25 + 0.5 + 0.25 + 0.25) / 4)
    mask = torch.tensor([[[True, True, True], [False, True, True]]])
    assert float(inverse_depth_error(depth, alpha, target, mask)) == pytest.approx(0.25)
    assert float(inverse_depth_error(depth, alpha, torch.zeros_like(target))) == 0.0
    leaf = (depth.double() + 0.1 * torch.rand(1, 2, 3).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: inverse_depth_error(d, alpha.double(), target.double()), leaf)


def test_depth_term_is_in_the_loss() -> None:
    out = render()
    terms = loss_terms(
        out, out.rgb, batch(depth=torch.full((1, HEIGHT, WIDTH), 1.5)), object(), LossConfig(depth_weight=3.0)
    )
    wanted = 3 * (1 / out.depth - 1 / 1.5).abs().mean()
    torch.testing.assert_close(terms["depth"], wanted)


def test_exposures_average_to_the_identity() -> None:
    exposure, rgb = Exposure(4), render().rgb
    assert torch.equal(exposure(rgb, 2), rgb)
    with torch.no_grad():
        exposure.deltas.copy_(0.1 * torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(2)))
    mean = torch.stack([exposure(rgb, index) for index in range(4)]).mean(0)
    torch.testing.assert_close(mean, rgb)
    image = exposure(rgb, 1)
    delta = exposure.deltas[1] - exposure.deltas.mean(0)
    wanted = torch.einsum("ij,chwj->chwi", torch.eye(3) + delta[:, :3], rgb) + delta[:, 3]
    torch.testing.assert_close(image, wanted)
    image.sum().backward()
    assert (exposure.deltas.grad[1] != 0).all() and (exposure.deltas.grad[[0, 2, 3]] == 0).all()


def test_a_pose_delta_turns_and_moves_the_camera_in_its_own_frame() -> None:
    poses, start = PoseDeltas(3), camera()
    torch.testing.assert_close(poses(start, 1).viewmats, start.viewmats)
    angle, shift = 0.3, torch.tensor([0.1, -0.2, 0.4])
    with torch.no_grad():
        poses.deltas[1, 1], poses.deltas[1, 3:] = angle, shift
    moved = poses(start, 1)
    point = torch.tensor([0.7, -0.4, 1.1, 1.0])
    x, y, z, _ = start.viewmats[0] @ point
    turned = torch.stack([math.cos(angle) * x + math.sin(angle) * z, y, math.cos(angle) * z - math.sin(angle) * x])
    torch.testing.assert_close((moved.viewmats[0] @ point)[:3], turned + shift)
    assert torch.equal(poses(start, 0).viewmats, start.viewmats)
    moved.viewmats.square().sum().backward()
    assert (poses.deltas.grad[1] != 0).any() and (poses.deltas.grad[[0, 2]] == 0).all()
