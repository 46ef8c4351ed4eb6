"""The Triton projection of convexes against its specification in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prismfield.render.cameras import Cameras
from prismfield.render.ops.project_convexes import project_convexes, project_convexes_reference

from .raster_fixtures import as_double, assert_rows_close, cotangents, make_cameras

# The interpreter's: lanes that hold nothing, or what is not drawn, compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
NAMES = ("points", "deltas", "sigmas", "opacities", "viewmats")


def make_leaves(count: int, points: int, cameras: Cameras) -> list[Tensor]:
    """Convexes of random points around the origin, a few too faint, and the cameras' poses."""
    generator = torch.Generator().manual_seed(count + 1000 * points)
    centers = torch.randn(count, 1, 3, generator=generator)
    places = centers + 0.3 * torch.randn(count, points, 3, generator=generator)
    deltas, sigmas = (torch.rand(2, count, generator=generator) * 4 - 1).exp()
    return [places, deltas, sigmas, torch.rand(count, generator=generator) ** 3, cameras.viewmats]


def make_convex_screen(count: int, points: int, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """`params`, `depths` and `radii` in single precision, the same for every build."""
    leaves, cameras = [t.double() for t in make_leaves(count, points, cameras)], as_double(cameras)
    params, depths, radii = project_convexes_reference(*leaves, cameras.Ks, cameras.width, cameras.height)
    return params.float(), depths.float(), radii.float()


def with_gradients(leaves: list[Tensor], cameras: Cameras, device: torch.device | None) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU: of the kernels on `device`, or of the reference in double precision."""
    if device is None:
        leaves, cameras = [t.double() for t in leaves], as_double(cameras)
    leaves = [t.detach().clone().to(device).requires_grad_() for t in leaves]
    size = (cameras.width, cameras.height)
    if device is None:
        outputs = project_convexes_reference(*leaves, cameras.Ks, *size)
    else:
        outputs = project_convexes(*leaves, cameras.Ks.to(device), size)
    upstream = [t.to(outputs[0]) for t in cotangents(*(t.cpu() for t in outputs[:2]))]
    torch.autograd.backward(outputs[:2], upstream)
    found = dict(zip(("params", "depths", "radii"), outputs, strict=True))
    found |= {f"v_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    return {name: t.detach().cpu() for name, t in found.items()}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert torch.equal(got["radii"] > 0, wanted["radii"] > 0)
    length = got["params"].shape[-1]
    columns = {"center": [0, 1], "corners": range(2, length - 3), "delta": [-3], "sigma": [-2], "opacity": [-1]}
    for name, column in columns.items():  # pixels and shares do not compare
        at = list(column)
        assert_rows_close(got["params"][..., at], wanted["params"][..., at], 1e-5, name)
    # The footprint of a sharp corner is as long as the rounding of its angle says: triangles have the sharpest
    assert_rows_close(got["radii"], wanted["radii"], 1e-3 if length == 17 else 1e-4, "radii", 1e-5)
    for name in ("depths", "v_points", "v_deltas", "v_sigmas", "v_opacities", "v_viewmats"):
        a, b = (t if name in ("v_points", "v_viewmats") else t[..., None] for t in (got[name], wanted[name]))
        assert_rows_close(a, b, 1e-4 if name.startswith("v_") else 1e-5, name)


@pytest.mark.parametrize(
    ("count", "points", "num_cameras"),
    [(0, 6, 2), (1, 6, 1), (7, 3, 3), (131, 6, 2), (40, 4, 1), (20, 5, 2), (9, 7, 1), (9, 9, 1), (5, 12, 1)],
    ids=str,
)
def test_against_the_reference(count: int, points: int, num_cameras: int, triton_device: torch.device) -> None:
    cameras = make_cameras(num_cameras, 70, 45)
    leaves = make_leaves(count, points, cameras)
    got = with_gradients(leaves, cameras, triton_device)
    assert_close(got, with_gradients(leaves, cameras, None))
    drawn = (got["radii"] > 0).all(-1)
    assert count < 100 or 0 < drawn.sum() < drawn.numel()
    assert (got["params"][~drawn] == 0).all() and (got["depths"][~drawn] == 0).all()
    for name in NAMES[:4]:
        assert (got[f"v_{name}"][~drawn.any(0)] == 0).all(), name


def test_no_camera_gradient_where_none_is_wanted(triton_device: torch.device) -> None:
    cameras = make_cameras(2, 70, 45)
    found = []
    for wanted in (True, False):
        inputs = [t.to(triton_device).clone() for t in make_leaves(9, 4, cameras)]
        inputs = [t.requires_grad_(wanted or t is not inputs[4]) for t in inputs]
        outputs = project_convexes(*inputs, cameras.Ks.to(triton_device), (70, 45))[:2]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        assert (inputs[4].grad is not None) == wanted
        found.append([t.grad for t in inputs[:4]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SQUARE = [[-0.1, -0.1], [0.1, -0.1], [0.1, 0.1], [-0.1, 0.1]]
HARD = {
    "on a side": ([*SQUARE, [0.1, 0.0], [0.0, -0.1]], [], True),
    "upper left first": ([*SQUARE[::-1], [0.0, 0.2], [0.0, -0.2]], [], True),
    "inside": ([*SQUARE, [0.02, 0.01], [-0.03, 0.0]], [], True),
    "coincident": ([*SQUARE, [-0.1, -0.1], [0.1, -0.1]], [], True),
    "coincident with the last": ([*SQUARE, [0.1, 0.1], [0.1, 0.1]], [], True),
    "turned, coincident with the last": ([[-0.11, 0.03], [0.0, -0.07], [0.13, 0.05], [0.13, 0.05], [0.01, 0.1], [0.13, 0.05]], [], True),
    "one place": ([[0.1, 0.1]] * 6, [], False),
    "two places": ([[0.1, 0.1], [-0.1, 0.0]] * 3, [], False),
    "a line": ([[0.01 * k, 0.02 * k] for k in range(6)], [], False),
    "an upright line": ([[0.0, 0.02 * k] for k in range(6)], [], False),
    "one behind": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(0, 5, 2, -1.0)], False),
    "at the near plane": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(0, 5, 2, 0.0099)], False),
    "not a number": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(0, 5, 0, math.nan)], False),
    "infinite": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(0, 5, 1, math.inf)], False),
    "faint": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(3, 1 / 255.5)], False),
    "opacity is not a number": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(3, math.nan)], False),
    "delta is not a number": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(1, math.nan)], False),
    "infinitely smooth": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(1, 1e-30)], False),
    "infinitely sharp": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(2, 1e31)], False),
    "sharp": ([*SQUARE, [0.0, 0.2], [0.0, -0.2]], [(1, 1e6), (2, 1e6)], True),
    "outside": ([[x + 5, y] for x, y in [*SQUARE, [0.0, 0.2], [0.0, -0.2]]], [], False),
    "tiny": ([[1e-4 * x, 1e-4 * y] for x, y in [*SQUARE, [0.0, 0.2], [0.0, -0.2]]], [], True),
}  # fmt: skip


def test_what_is_drawn(triton_device: torch.device) -> None:
    """What is not drawn has zeros everywhere, receives no gradient and spoils nobody else's, not even the camera's; and hulls that are
    hard to find are those of the reference."""
    leaves = [torch.tensor([[[x, y, 2.0] for x, y in points] for points, _, _ in HARD.values()])]
    leaves += [torch.full([len(HARD)], value) for value in (10.0, 1.5, 0.8)]
    for row, (_, changes, _) in enumerate(HARD.values()):
        for which, *at, value in changes:
            leaves[which][(row, *at)] = value
    Ks = torch.tensor([[[150.0, 0, 82.0], [0, 220.0, 75.0], [0, 0, 1]]])
    cameras = Cameras(torch.eye(4)[None], Ks, 200, 131)
    got = with_gradients([*leaves, cameras.viewmats], cameras, triton_device)
    drawn = torch.tensor([wanted for _, _, wanted in HARD.values()])
    assert dict(zip(HARD, (got["radii"][0] > 0).all(-1).tolist(), strict=True)) == dict(
        zip(HARD, drawn.tolist(), strict=True)
    )
    for name in ("params", "depths", "radii"):
        assert (got[name][0, ~drawn] == 0).all(), name
    assert all(torch.isfinite(t).all() for t in got.values())
    for name in NAMES[:4]:
        assert (got[f"v_{name}"][~drawn] == 0).all(), name
    kept = [t[drawn] for t in leaves]
    wanted = with_gradients([*kept, cameras.viewmats], cameras, None)
    torch.testing.assert_close(got["params"][0, drawn], wanted["params"][0].float(), rtol=1e-4, atol=1e-4)
