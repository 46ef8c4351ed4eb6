"""The Triton projection against its specification in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.cameras import Cameras
from prismfield.render.ops.project import project, project_reference

from .raster_fixtures import EDGES, as_double, assert_rows_close, cotangents, make_cameras, make_gaussians

# The interpreter's: lanes that hold nothing, or what is not drawn, compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
NAMES = ("means", "quats", "scales", "opacities", "viewmats")


def with_gradients(
    leaves: list[Tensor], cameras: Cameras, antialiased: bool, device: torch.device | None
) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU: of the kernels on `device`, or of the reference in double precision."""
    if device is None:
        leaves, cameras = [t.double() for t in leaves], as_double(cameras)
    leaves = [t.detach().clone().to(device).requires_grad_() for t in leaves]
    size = (cameras.width, cameras.height)
    if device is None:
        params, depths, radii = project_reference(*leaves, cameras.Ks, *size, antialiased)
    else:
        params, depths, radii = project(*leaves, cameras.Ks.to(device), size, antialiased=antialiased)
    upstream = [t.to(params) for t in cotangents(params.cpu(), depths.cpu())]
    torch.autograd.backward([params, depths], upstream)
    found = {"params": params, "depths": depths, "radii": radii}
    found |= {f"v_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    return {name: t.detach().cpu() for name, t in found.items()}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert torch.equal(got["radii"] > 0, wanted["radii"] > 0)
    for name, result in got.items():
        expected = wanted[name]
        if name in ("depths", "v_opacities"):
            result, expected = result[..., None], expected[..., None]
        # A radius is the root of a level that nears 0 where alpha barely reaches the cutoff
        floor = 1e-5 if name == "radii" else 1e-6
        assert_rows_close(result, expected, 1e-4 if name.startswith("v_") else 1e-5, name, floor)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("image", [(17, 9), (200, 131)], ids=str)
@pytest.mark.parametrize(("count", "num_cameras"), [(0, 2), (1, 1), (7, 3), (300, 1), (261, 3)])
def test_against_the_reference(
    count: int, num_cameras: int, image: tuple[int, int], antialiased: bool, triton_device: torch.device
) -> None:
    cameras = make_cameras(num_cameras, *image)
    leaves = [*make_gaussians(count, cameras, seed=count).tensors()[:4], cameras.viewmats]
    got = with_gradients(leaves, cameras, antialiased, triton_device)
    assert_close(got, with_gradients(leaves, cameras, antialiased, None))
    drawn = (got["radii"] > 0).all(-1)
    assert count < 100 or 0 < drawn.sum() < drawn.numel()
    assert (got["params"][~drawn] == 0).all() and (got["depths"][~drawn] == 0).all()
    for name in NAMES[:4]:
        assert (got[f"v_{name}"][~drawn.any(0)] == 0).all(), name


def test_needles_keep_their_shape(triton_device: torch.device) -> None:
    """Long and thin and slanted: the determinant is a small difference of large products, if it is computed as one."""
    cameras = make_cameras(1, 200, 131)
    gaussians = make_gaussians(300, cameras, hard=False)
    scales = torch.tensor([3.0, 0.003, 0.003]).repeat(300, 1)
    leaves = [gaussians.means, gaussians.quats, scales, gaussians.opacities, cameras.viewmats]
    for antialiased in (False, True):
        got = with_gradients(leaves, cameras, antialiased, triton_device)
        wanted = with_gradients(leaves, cameras, antialiased, None)
        for name in ("params", "v_means", "v_quats", "v_scales"):
            assert_rows_close(got[name], wanted[name], 1e-4 if name.startswith("v_") else 1e-5, name)


def test_no_camera_gradient_where_none_is_wanted(triton_device: torch.device) -> None:
    cameras = make_cameras(2, 70, 45)
    found = []
    for wanted in (True, False):
        inputs = [t.to(triton_device).clone() for t in (*make_gaussians(33, cameras).tensors()[:4], cameras.viewmats)]
        inputs = [t.requires_grad_(wanted or t is not inputs[4]) for t in inputs]
        outputs = project(*inputs, cameras.Ks.to(triton_device), (70, 45))[:2]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        assert (inputs[4].grad is not None) == wanted
        found.append([t.grad for t in inputs[:4]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def one_gaussian(**changes: Any) -> list[Tensor]:
    """A Gaussian of 0.1 units 2 units ahead on the axis of a camera at the origin, with `changes`."""
    values = {"means": [0.0, 0.0, 2.0], "quats": [1.0, 0.0, 0.0, 0.0], "scales": [0.1, 0.1, 0.1], "opacities": 0.8}
    return [torch.tensor([(values | changes)[name]]) for name in NAMES[:4]]


@pytest.mark.parametrize(("changes", "drawn"), EDGES, ids=str)
def test_what_is_drawn(changes: dict[str, Any], drawn: bool, triton_device: torch.device) -> None:
    """What is not drawn has zeros everywhere, receives no gradient and spoils nobody else's, not even the camera's."""
    K = torch.tensor([[[150.0, 0, 82.0], [0, 220.0, 75.0], [0, 0, 1]]], device=triton_device)
    pairs = [torch.cat(pair) for pair in zip(one_gaussian(**changes), one_gaussian(), strict=True)]
    leaves = [t.to(triton_device).requires_grad_() for t in (*pairs, torch.eye(4)[None])]
    for antialiased in (False, True):
        outputs = project(*leaves, K, (200, 131), antialiased=antialiased)
        assert bool((outputs[2][0, 0] > 0).all()) == drawn
        assert drawn or all((t[0, 0] == 0).all() for t in outputs)
        grads = torch.autograd.grad(outputs[:2], leaves, [torch.ones_like(t) for t in outputs[:2]])
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert drawn or all((grad[0] == 0).all() for grad in grads[:4])
        assert all((grad[1] != 0).any() for grad in (grads[0], grads[2], grads[3]))
