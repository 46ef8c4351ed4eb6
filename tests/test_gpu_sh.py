"""The Triton harmonics against their specification in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prismfield.render.ops.sh import sh_colors, sh_colors_reference

from .raster_fixtures import assert_rows_close, cotangents, make_cameras, make_gaussians

NAMES = ("sh0", "shN", "means", "viewmats")


def make_inputs(count: int, num_cameras: int, terms: int) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of NAMES and radii, 0 for some in one camera and for some in all."""
    cameras = make_cameras(num_cameras, 70, 45)
    gaussians = make_gaussians(count, cameras, seed=count)
    generator = torch.Generator().manual_seed(count)
    radii = 3 * torch.rand(num_cameras, count, 2, generator=generator)
    radii[torch.rand(num_cameras, count, generator=generator) < 0.3] = 0
    return [gaussians.sh0, gaussians.shN[:, :terms], gaussians.means, cameras.viewmats], radii


@pytest.mark.parametrize(("degree", "terms"), [(0, 0), (0, 15), (1, 3), (1, 15), (2, 8), (2, 15), (3, 15)])
@pytest.mark.parametrize(("count", "num_cameras"), [(0, 2), (1, 1), (7, 3), (300, 1), (205, 3)])
def test_against_the_reference(
    count: int, num_cameras: int, degree: int, terms: int, triton_device: torch.device
) -> None:
    leaves, radii = make_inputs(count, num_cameras, terms)
    hidden = torch.rand(num_cameras, count, 1, generator=torch.Generator().manual_seed(1)) < 0.2

    wanted_leaves = [t.double().requires_grad_() for t in leaves]
    wanted = sh_colors_reference(*wanted_leaves, radii.double(), degree)
    # A channel that the clamp at 0 all but cuts: rounding decides whether it has a gradient
    assert not ((wanted > 0) & (wanted < 1e-6)).any()
    upstream = torch.where(hidden, 0.0, cotangents(wanted.float())[0])
    wanted.backward(upstream.double())

    got_leaves = [t.detach().to(triton_device).requires_grad_() for t in leaves]
    got = sh_colors(*got_leaves, radii.to(triton_device), degree)
    got.backward(upstream.to(triton_device))
    assert_rows_close(got.detach().cpu(), wanted.detach(), 1e-5, "rgbs")
    for name, ours, theirs in zip(NAMES, got_leaves, wanted_leaves, strict=True):
        # Constant colours do not depend on where anything is: no gradient and zeros mean the same
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad is not None
        assert_rows_close(ours.grad.cpu(), expected, 1e-4, f"v_{name}")
    assert (got_leaves[1].grad[:, (degree + 1) ** 2 - 1 :] == 0).all()


def test_gradients_that_are_not_wanted_change_nothing(triton_device: torch.device) -> None:
    leaves, radii = make_inputs(70, 2, 15)
    found = []
    for wanted in ((True, True, True, True), (True, False, True, False)):
        inputs = [t.detach().to(triton_device).requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
        rgbs = sh_colors(*inputs, radii.to(triton_device), 3)
        rgbs.backward(*cotangents(rgbs))
        assert [t.grad is not None for t in inputs] == list(wanted)
        found.append((inputs[0].grad, inputs[2].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_rows_that_are_not_drawn_are_not_read(triton_device: torch.device) -> None:
    """What is there may be anything, even NaN, and spoils neither the others' gradients nor the cameras'."""
    leaves, radii = make_inputs(70, 2, 15)
    unseen = (radii[..., 0] == 0).all(0)
    assert 0 < unseen.sum() < 70
    outputs = []
    for value in (0.0, float("nan")):
        inputs = [torch.where(unseen.view(-1, *[1] * (t.dim() - 1)), value, t) for t in leaves[:3]] + leaves[3:]
        inputs = [t.to(triton_device).requires_grad_() for t in inputs]
        rgbs = sh_colors(*inputs, radii.to(triton_device), 3)
        rgbs.backward(*cotangents(rgbs))
        outputs.append([rgbs.detach(), *(t.grad for t in inputs)])
    for clean, spoilt in zip(*outputs, strict=True):
        assert torch.equal(clean, spoilt)
        assert torch.isfinite(spoilt).all()


def test_a_camera_that_stands_in_the_primitive(triton_device: torch.device) -> None:
    """The direction is not defined there; the linear term along z, also seen from +z and from -z, is."""
    viewmats = torch.eye(4).repeat(3, 1, 1)
    viewmats[:, 2, 3] = torch.tensor([2.0, -2.0, 0.0])  # centres at z = -2, 2 and 0
    sh0, shN = torch.zeros(1, 1, 3), torch.zeros(1, 3, 3)
    shN[0, 1] = torch.tensor([0.2, -0.4, 2.0])
    inputs = [t.to(triton_device).requires_grad_() for t in (sh0, shN, torch.zeros(1, 3), viewmats)]
    rgbs = sh_colors(*inputs, torch.ones(3, 1, 2, device=triton_device), 1)
    ahead = 0.4886025 * shN[0, 1]
    expected = torch.stack([0.5 + ahead, 0.5 - ahead, torch.full_like(ahead, 0.5)]).clamp(min=0)
    torch.testing.assert_close(rgbs.detach().cpu()[:, 0], expected, rtol=1e-6, atol=1e-6)
    rgbs[:2].sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in inputs)
