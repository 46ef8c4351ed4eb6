"""The Triton compositing against the reference in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.composite import MAX_CHANNELS, composite, composite_reference
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN
from prismfield.render.ops.project_convexes import convex_primitive

from .raster_fixtures import assert_rows_close, cotangents, fragile_pixels, make_cameras
from .test_composite import Size, check_kernel, collect, draw, splat, upstream_of
from .test_gpu_project_convexes import make_convex_screen

# The interpreter's: lanes that hold nothing compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
# count, image, cameras, channels: nothing, one, a pixel, less than a tile, several tiles and cameras, long lists, many channels
CASES = [
    (0, (17, 9), 1, 3),
    (1, (17, 9), 2, 3),
    (7, (1, 1), 3, 1),
    (40, (18, 9), 2, 3),
    (130, (17, 9), 1, 8),
    (18, (17, 9), 1, MAX_CHANNELS),
]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(case: tuple[int, Size, int, int], extras: bool, triton_device: torch.device) -> None:
    check_kernel(case, extras, triton_device)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("count", "points"), [(9, 6), (9, 4), (9, 9)])
def test_convexes_against_the_reference(count: int, points: int, extras: bool, triton_device: torch.device) -> None:
    """Hulls with and without room to spare, whose missing edges add nothing."""
    image, name = (19, 9), convex_primitive(points)
    params, depths, radii = make_convex_screen(count, points, make_cameras(1, *image))
    fragile = fragile_pixels(params, depths, radii, image, 3e-4, name)
    assert fragile.float().mean() < 0.1 and (radii > 0).all(-1).sum() >= 3
    inputs = (params, *cotangents(params[..., :3]), depths, *cotangents(params[:, 0, :3]))
    found = []
    for dtype, device in ((torch.float32, triton_device), (torch.float64, torch.device("cpu"))):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
        absgrad = torch.zeros_like(leaves[0][..., :2]).requires_grad_()
        screen = [t.detach().to(device, dtype) for t in (params, depths, radii)]
        if dtype == torch.float32:
            isects = bin_primitives(name, *screen, image)
            options = {"depth": True, "median_depth": True, "absgrad": absgrad} if extras else {}
            drawn = composite(name, *leaves[:3], isects, image, leaves[3], **options)
            out = (drawn.features, drawn.alpha, drawn.depth, drawn.median_depth)
        else:
            out = composite_reference(
                name, *leaves, Isects(*bin_reference(name, *screen, *image, 16), 16), image, absgrad
            )
        outputs = [t for t in out[: 3 if extras else 2] if t is not None]
        torch.autograd.backward(outputs, upstream_of(outputs, fragile.to(device)))
        found.append({what: t.cpu() for what, t in collect(out, [*leaves, absgrad]).items()})
    got, wanted = found
    for what in ("features", "alpha", "depth", "median_depth")[: 4 if extras else 2]:
        a, b = (t[what][~fragile] for t in (got, wanted))
        assert_rows_close(a.view(len(a), -1), b.view(len(b), -1), 1e-5, what, floor=5e-6)
    length = params.shape[-1]
    columns = {"center": [0, 1], "corners": range(2, length - 3), "delta": [-3], "sigma": [-2], "opacity": [-1]}
    for what, at in columns.items():
        a, b = (t["v_params"][..., list(at)] for t in (got, wanted))
        assert_rows_close(a, b, 1e-4, f"gradient of {what}", floor=1e-5)
    for what in ("v_features", "v_background", *(("v_depths", "absgrad") if extras else ())):
        a, b = (t[what].view(-1, 1) if what == "v_depths" else t[what] for t in (got, wanted))
        assert_rows_close(a, b, 1e-4, what, floor=1e-5)


def test_cutoffs(triton_device: torch.device) -> None:
    """Alpha below 1/255 does not show, above 0.99 is held there, and nothing shows behind what stops all but 1e-4."""
    if triton_device.type == "cuda":
        pytest.skip("draws on the CPU")
    for alpha, shown in ((0.999 * ALPHA_MIN, 0.0), (1.001 * ALPHA_MIN, 1.001 * ALPHA_MIN), (1.0, ALPHA_MAX)):
        weights = draw(True, [splat(1.5, 1.5, alpha)], torch.ones(1, 1), [1.0])[0]
        assert weights.item() == pytest.approx(shown, rel=1e-5)
    weights, alpha_, _, median = draw(True, [splat(1.5, 1.5, 0.98)] * 4, torch.eye(4), [1.0, 2.0, 3.0, 4.0])
    assert weights.tolist() == pytest.approx([0.98, 0.98 * 0.02, 0, 0], rel=1e-5)
    assert alpha_.item() == pytest.approx(1 - 4e-4) and median == 1


def test_held_alpha_carries_no_gradient(triton_device: torch.device) -> None:
    params = torch.tensor([[splat(1.2, 0.9, 0.999, 30.0)]], device=triton_device).requires_grad_()
    features = torch.ones(1, 1, 1, device=triton_device).requires_grad_()
    z, radii = torch.ones(1, 1, device=triton_device), torch.full((1, 1, 2), 99.0, device=triton_device)
    isects = bin_primitives("gaussian", params, z, radii, (3, 2))
    composite("gaussian", params, features, z, isects, (3, 2)).features.sum().backward()
    assert params.grad is not None and features.grad is not None
    assert (params.grad == 0).all()
    assert features.grad.item() == pytest.approx(6 * ALPHA_MAX)


def test_what_is_not_a_number_does_not_show(triton_device: torch.device) -> None:
    bad = splat(1.5, 1.5, 0.5)
    bad[2] = math.nan
    params = torch.tensor([[bad, splat(1.5, 1.5, 0.5)]], device=triton_device)
    z, radii = torch.ones(1, 2, device=triton_device), torch.full((1, 2, 2), 99.0, device=triton_device)
    isects = bin_primitives("gaussian", params, z, radii, (3, 2))
    out = composite("gaussian", params, torch.ones(1, 2, 1, device=triton_device), z, isects, (3, 2))
    assert out.features.cpu().flatten().tolist() == pytest.approx([0.5] * 6, rel=1e-4)
