"""Projection: the kernels against the reference in double precision, the reference against closed forms and differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.cameras import Cameras
from prismfield.render.ops.project import project, project_reference, rotation_matrices

from .raster_fixtures import (
    BEHIND,
    BEYOND,
    CLEAR,
    COUNTS,
    EDGES,
    HUGE,
    IMAGES,
    OPAQUE,
    TINY,
    as_double,
    assert_rows_close,
    cotangents,
    make_cameras,
    make_gaussians,
    usable_levels,
    use_kernels,
)

NAMES = ("means", "quats", "scales", "opacities", "viewmats")


def with_gradients(function: Any, leaves: list[Tensor], cameras: Cameras, antialiased: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name; `function` takes what `project_reference` takes."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    params, depths, radii = function(*leaves, cameras.Ks, cameras.width, cameras.height, antialiased)
    torch.autograd.backward([params, depths], cotangents(params, depths))
    grads = {f"v_{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}
    return {"params": params.detach(), "depths": depths.detach(), "radii": radii} | grads


def by_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, width, height, antialiased = args
    return project(*tensors, (width, height), antialiased=antialiased)


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("num_cameras", [1, 3])
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_kernel_against_reference(
    module: Any,
    count: int,
    image: tuple[int, int],
    num_cameras: int,
    antialiased: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_kernels(monkeypatch, module)
    cameras = make_cameras(num_cameras, *image)
    gaussians = make_gaussians(count, cameras, seed=count)
    leaves = [*gaussians.tensors()[:4], cameras.viewmats]
    got = with_gradients(by_kernel, leaves, cameras, antialiased)
    wanted = with_gradients(project_reference, [t.double() for t in leaves], as_double(cameras), antialiased)
    assert torch.equal(got["radii"] > 0, wanted["radii"] > 0)
    for name, result in got.items():
        assert result.dtype == torch.float32
        if name in ("depths", "v_opacities"):
            result, wanted[name] = result[..., None], wanted[name][..., None]
        # A radius is the root of a level that nears 0 where alpha barely reaches the cutoff
        floor = 1e-5 if name == "radii" else 1e-6
        assert_rows_close(result, wanted[name], 1e-4 if name.startswith("v_") else 1e-5, name, floor)
    undrawn = (got["radii"] == 0).all(-1)
    assert (got["params"][undrawn] == 0).all() and (got["depths"][undrawn] == 0).all()
    for name in NAMES[:4]:
        assert (got[f"v_{name}"][undrawn.all(0)] == 0).all(), name


@pytest.mark.parametrize("module", usable_levels())
def test_hard_primitives_are_what_they_should_be(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture is worth nothing if all of it is ordinary."""
    use_kernels(monkeypatch, module)
    cameras = make_cameras(1, 200, 131)
    gaussians = make_gaussians(300, cameras)
    for antialiased in (False, True):
        screen = project(*gaussians.tensors()[:4], cameras.viewmats, cameras.Ks, (200, 131), antialiased=antialiased)
        radii, log_opacities = screen[2][0], screen[0][0, :, 5]
        assert (radii[[BEHIND, BEYOND, CLEAR]] == 0).all()
        assert (radii[HUGE] > 200).all()
        assert (radii[TINY] < 2.1).all() and ((radii[TINY] > 0).all() != antialiased)
        if not antialiased:
            assert log_opacities[OPAQUE] == 0
        assert 150 < (radii[:, 0] > 0).sum() < 300


def one_gaussian(**changes: list[float]) -> list[Tensor]:
    """A Gaussian of 0.1 units 2 units ahead on the axis of a camera at the origin, with `changes`."""
    values = {"means": [0.0, 0.0, 2.0], "quats": [1.0, 0.0, 0.0, 0.0], "scales": [0.1, 0.1, 0.1], "opacities": 0.8}
    values |= changes
    return [torch.tensor([values[name]], dtype=torch.float64) for name in NAMES[:4]]


def straight_camera(width: int = 200, height: int = 131) -> Cameras:
    K = torch.tensor([[150.0, 0, 82.0], [0, 220.0, 75.0], [0, 0, 1]], dtype=torch.float64)
    return Cameras(torch.eye(4, dtype=torch.float64)[None], K[None], width, height)


def project_one(antialiased: bool = False, **changes: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    cameras = straight_camera()
    inputs = (*one_gaussian(**changes), cameras.viewmats, cameras.Ks)
    return tuple(t[0, 0] for t in project(*inputs, (200, 131), antialiased=antialiased))


def test_closed_form_on_the_axis() -> None:
    params, depth, radii = project_one(scales=[0.1, 0.04, 0.3])
    variance = torch.tensor([(150 * 0.1 / 2) ** 2 + 0.3, (220 * 0.04 / 2) ** 2 + 0.3], dtype=torch.float64)
    expected = torch.tensor([82.0, 75.0, 1 / variance[0], 0.0, 1 / variance[1], 0.8]).double()
    expected[5] = expected.new_tensor(0.8).log()
    torch.testing.assert_close(params, expected)
    assert depth == 2
    torch.testing.assert_close(radii, (2 * torch.tensor(0.8 * 255.0).double().log() * variance).sqrt())


def test_antialiased_opacity_keeps_the_mass() -> None:
    sharp = torch.tensor([(150 * 0.004 / 2) ** 2, (220 * 0.004 / 2) ** 2], dtype=torch.float64)
    params, _, _ = project_one(antialiased=True, scales=[0.004, 0.004, 0.004])
    mass = params[5].exp() / (params[2] * params[4]).sqrt()
    torch.testing.assert_close(mass, 0.8 * sharp.prod().sqrt())


def test_turning_a_quaternion_turns_the_ellipse() -> None:
    """A quarter turn about the view axis swaps the axes; the length and the sign of a quaternion do not matter."""
    half = 0.5**0.5
    turned = project_one(quats=[3 * half, 0, 0, 3 * half], scales=[0.1, 0.04, 0.3])
    swapped = project_one(scales=[0.04, 0.1, 0.3])
    for got, wanted in zip(turned, swapped, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    tilted = project_one(quats=[0.9, 0.3, -0.2, 0.1], scales=[0.1, 0.04, 0.3])
    negated = project_one(quats=[-0.9, -0.3, 0.2, -0.1], scales=[0.1, 0.04, 0.3])
    assert all(torch.equal(a, b) for a, b in zip(tilted, negated, strict=True))


def test_covariance_of_samples() -> None:
    """The projected covariance is that of points drawn from a small Gaussian and projected exactly."""
    generator = torch.Generator().manual_seed(0)
    gaussian = one_gaussian(means=[0.3, -0.2, 2.0], quats=[0.9, 0.3, -0.2, 0.1], scales=[0.02, 0.008, 0.03])
    mean, quat, scale, _ = (t[0] for t in gaussian)
    points = mean + (torch.randn(200_000, 3, generator=generator).double() * scale) @ rotation_matrices(quat).T
    pixels = points[:, :2] / points[:, 2:] * torch.tensor([150.0, 220.0]).double()
    params, _, _ = project_one(means=[0.3, -0.2, 2.0], quats=[0.9, 0.3, -0.2, 0.1], scales=[0.02, 0.008, 0.03])
    a, b, c = params[2:5]
    covariance = torch.linalg.inv(torch.stack([a, b, b, c]).view(2, 2)) - 0.3 * torch.eye(2).double()
    torch.testing.assert_close(covariance, torch.cov(pixels.T), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(("changes", "drawn"), EDGES, ids=str)
@pytest.mark.parametrize("module", [pytest.param(None, id="reference"), *usable_levels()])
def test_what_is_drawn(module: Any, changes: dict[str, Any], drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not drawn has zeros everywhere, receives no gradient and spoils nobody else's, not even the camera's."""
    monkeypatch.setattr(kernels_module, "enabled", module is not None)
    use_kernels(monkeypatch, module)
    cameras = straight_camera()
    leaves = [torch.cat(pair).float() for pair in zip(one_gaussian(**changes), one_gaussian(), strict=True)]
    leaves = [t.requires_grad_() for t in (*leaves, cameras.viewmats.float())]
    for antialiased in (False, True):
        outputs = project(*leaves, cameras.Ks.float(), (200, 131), antialiased=antialiased)
        assert bool((outputs[2][0, 0] > 0).all()) == drawn
        assert drawn or all((t[0, 0] == 0).all() for t in outputs)
        grads = torch.autograd.grad(outputs[:2], leaves, cotangents(*outputs[:2]))
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert drawn or all((grad[0] == 0).all() for grad in grads[:4])
        assert all((grad[1] != 0).any() for grad in (grads[0], grads[2], grads[3]))


@pytest.mark.parametrize("antialiased", [False, True])
def test_gradients_of_the_reference(antialiased: bool) -> None:
    """To everything, the intrinsics too; one Gaussian lies outside the widened image, where the tangent is held."""
    cameras = as_double(make_cameras(2, 17, 9))
    gaussians = make_gaussians(4, cameras, hard=False)
    means = gaussians.means.double()
    means[0] = (cameras.camtoworlds[0, :3, :3] @ means.new_tensor([2.2, 0.5, 3.0])) + cameras.camtoworlds[0, :3, 3]
    scales = gaussians.scales.double()
    scales[0] = scales.new_tensor([0.9, 0.8, 0.7])
    opacities = gaussians.opacities.double().clamp(min=0.3)
    inputs = (means, gaussians.quats.double(), scales, opacities, cameras.viewmats, cameras.Ks)
    assert (project_reference(*inputs, 17, 9, antialiased)[2] > 0).all()

    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return project_reference(*leaves, 17, 9, antialiased)[:2]

    assert torch.autograd.gradcheck(outputs, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("module", usable_levels())
def test_needles_keep_their_shape(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long and thin and slanted: the determinant is a small difference of large products, if it is computed as one."""
    use_kernels(monkeypatch, module)
    cameras = make_cameras(1, 200, 131)
    gaussians = make_gaussians(300, cameras, hard=False)
    scales = torch.tensor([3.0, 0.003, 0.003]).repeat(300, 1)
    leaves = [gaussians.means, gaussians.quats, scales, gaussians.opacities, cameras.viewmats]
    for antialiased in (False, True):
        got = with_gradients(by_kernel, leaves, cameras, antialiased)
        wanted = with_gradients(project_reference, [t.double() for t in leaves], as_double(cameras), antialiased)
        for name in ("params", "v_means", "v_quats", "v_scales"):
            assert_rows_close(got[name], wanted[name], 1e-4 if name.startswith("v_") else 1e-5, name)


@pytest.mark.parametrize("module", usable_levels())
def test_opcheck(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    cameras = make_cameras(2, 17, 9)
    inputs = [t.requires_grad_() for t in (*make_gaussians(7, cameras).tensors()[:4], cameras.viewmats)]
    for antialiased in (False, True):
        torch.library.opcheck(torch.ops.prismfield.project, (*inputs, cameras.Ks, 17, 9, antialiased))
    upstream = cotangents(*(torch.empty(2, 7, length) for length in (2, 6)), torch.empty(2, 7))
    inputs = [t.detach() for t in inputs]
    torch.library.opcheck(torch.ops.prismfield.project_backward, (*inputs, cameras.Ks, 17, 9, False, *upstream, True))


def test_strided_inputs() -> None:
    cameras = make_cameras(2, 70, 45)
    plain = [*make_gaussians(33, cameras).tensors()[:4], cameras.viewmats]
    strided = [torch.stack([t, t], -1)[..., 1] for t in plain]
    expected = with_gradients(by_kernel, plain, cameras, True)
    for name, result in with_gradients(by_kernel, strided, cameras, True).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("position", range(6))
def test_bad_arguments_are_named(position: int) -> None:
    cameras = make_cameras(2, 17, 9)
    inputs = [*make_gaussians(7, cameras).tensors()[:4], cameras.viewmats, cameras.Ks]
    name = (*NAMES, "Ks")[position]
    wrong_shape = [t[..., :-1] if i == position else t for i, t in enumerate(inputs)]
    with pytest.raises(ValueError, match=f"^{'quats' if name == 'means' else name}: expected|^{name}: expected"):
        project(*wrong_shape, (17, 9))
    for dtype in (torch.float64, torch.int32):
        wrong_dtype = [t.to(dtype) if i == position else t for i, t in enumerate(inputs)]
        with pytest.raises(ValueError, match=rf"^means: expected a floating|^(quats|{name}): expected dtype"):
            project(*wrong_dtype, (17, 9))
