"""Spherical harmonics: the kernels against the reference in double precision, the reference against scipy and differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from prismfield.render.ops.sh import sh_basis, sh_colors, sh_colors_reference

from .raster_fixtures import (
    COUNTS,
    assert_rows_close,
    cotangents,
    make_cameras,
    make_gaussians,
    usable_levels,
    use_kernels,
)

NAMES = ("sh0", "shN", "means", "viewmats")


def make_inputs(count: int, num_cameras: int, terms: int = 15, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of NAMES and radii, 0 for some in one camera and for some in all."""
    cameras = make_cameras(num_cameras, 70, 45)
    gaussians = make_gaussians(count, cameras, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    radii = 3 * torch.rand(num_cameras, count, 2, generator=generator)
    radii[torch.rand(num_cameras, count, generator=generator) < 0.3] = 0
    return [gaussians.sh0, gaussians.shN[:, :terms], gaussians.means, cameras.viewmats], radii


def with_gradients(function: Any, leaves: list[Tensor], radii: Tensor, degree: int) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    rgbs = function(*leaves, radii, degree)
    rgbs.backward(*cotangents(rgbs))
    # Constant colours do not depend on where anything is: no gradient and zeros mean the same
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return {"rgbs": rgbs.detach()} | {f"v_{name}": grad for name, grad in zip(NAMES, grads, strict=True)}


@pytest.mark.parametrize("module", usable_levels())
@pytest.mark.parametrize(("degree", "terms"), [(0, 0), (0, 15), (1, 3), (1, 15), (2, 8), (2, 15), (3, 15)])
@pytest.mark.parametrize("num_cameras", [1, 3])
@pytest.mark.parametrize("count", [*COUNTS, 5000])
def test_kernel_against_reference(
    module: Any, count: int, num_cameras: int, degree: int, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernels(monkeypatch, module)
    leaves, radii = make_inputs(count, num_cameras, terms)
    got = with_gradients(sh_colors, leaves, radii, degree)
    wanted = with_gradients(sh_colors_reference, [t.double() for t in leaves], radii, degree)
    if count >= 300:
        assert (wanted["rgbs"] == 0)[radii[..., 0] > 0].any()  # some are clamped
    # A channel that the clamp at 0 all but cuts: rounding decides whether it has a gradient
    assert not ((wanted["rgbs"] > 0) & (wanted["rgbs"] < 1e-6)).any()
    for name, result in got.items():
        assert result.dtype == torch.float32
        assert_rows_close(result, wanted[name], 1e-4 if name.startswith("v_") else 1e-5, name)
    assert (got["v_shN"][:, (degree + 1) ** 2 - 1 :] == 0).all()


@pytest.mark.parametrize("module", usable_levels())
def test_gradients_larger_than_the_caches(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past 2^23 numbers the gradient of `shN` takes another way to memory."""
    use_kernels(monkeypatch, module)
    count = 2**23 // 45 + 18
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(count, *shape, generator=generator) for shape in ((1, 3), (15, 3), (3,))]
    leaves += [make_cameras(2, 17, 9).viewmats]
    radii = (torch.rand(2, count, 1, generator=generator) > 0.4).float().expand(-1, -1, 2)
    got = with_gradients(sh_colors, leaves, radii, 2)
    for chosen in (slice(0, 1000), slice(count - 1000, count)):
        rows = [t[chosen] for t in leaves[:3]] + leaves[3:]
        rgbs = got["rgbs"][:, chosen]
        upstream = torch.zeros_like(got["rgbs"]).copy_(cotangents(got["rgbs"])[0])[:, chosen] * (rgbs > 0)
        dirs = torch.nn.functional.normalize(
            rows[2].double() + (rows[3][:, :3, :3].mT @ rows[3][:, :3, 3:]).squeeze(-1)[:, None].double(), dim=-1
        )
        v_coefficients = torch.einsum("cnk,cnd->nkd", sh_basis(dirs, 2), upstream.double())
        assert_rows_close(got["v_sh0"][chosen], v_coefficients[:, :1], 1e-4, "v_sh0")
        assert_rows_close(got["v_shN"][chosen, :8], v_coefficients[:, 1:], 1e-4, "v_shN", floor=1e-5)
    assert (got["v_shN"][:, 8:] == 0).all()


def test_basis_against_scipy() -> None:
    """Ordered by degree, then by order from -l to l; the Condon-Shortley phase is kept, unlike in most real harmonics."""
    generator = torch.Generator().manual_seed(0)
    dirs = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator, dtype=torch.float64), dim=-1)
    x, y, z = dirs.numpy().T
    azimuth = np.arctan2(y, x)
    expected = []
    for degree in range(4):
        for signed in range(-degree, degree + 1):
            order = abs(signed)
            norm = (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - order) / math.factorial(degree + order)
            wave = math.sqrt(2) * (np.cos if signed > 0 else np.sin)(order * azimuth) if signed else 1.0
            expected.append(math.sqrt(norm) * special.lpmv(order, degree, z) * wave)
    np.testing.assert_allclose(sh_basis(dirs, 3), np.stack(expected, -1), atol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_gradients_of_the_reference(degree: int) -> None:
    """To the directions too, through the means and the cameras."""
    leaves, radii = make_inputs(5, 2, seed=3)
    leaves = [t.double().requires_grad_() for t in leaves]
    assert (radii[..., 0] == 0).any()

    def colors(*inputs: Tensor) -> Tensor:
        return sh_colors_reference(*inputs, radii, degree)

    assert (colors(*leaves) > 1e-3).any()
    assert torch.autograd.gradcheck(colors, leaves)
    dirs = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=-1).requires_grad_()
    if degree:
        assert torch.autograd.gradcheck(lambda d: sh_basis(d, degree), dirs)


@pytest.mark.parametrize("module", [pytest.param(None, id="reference"), *usable_levels()])
def test_a_colour_seen_from_its_front(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear term along z, seen from +z and from -z, and a camera that stands in the primitive itself."""
    use_kernels(monkeypatch, module)
    dtype = torch.float32 if module is not None else torch.float64
    viewmats = torch.eye(4, dtype=dtype).repeat(3, 1, 1)
    viewmats[:, 2, 3] = torch.tensor([2.0, -2.0, 0.0])  # centres at z = -2, 2 and 0
    sh0, shN = torch.zeros(1, 1, 3, dtype=dtype), torch.zeros(1, 3, 3, dtype=dtype)
    shN[0, 1] = torch.tensor([0.2, -0.4, 2.0])
    inputs = [t.requires_grad_() for t in (sh0, shN, torch.zeros(1, 3, dtype=dtype), viewmats)]
    rgbs = sh_colors(*inputs, torch.ones(3, 1, 2, dtype=dtype), 1)
    ahead = 0.4886025 * shN[0, 1].detach()
    expected = torch.stack([0.5 + ahead, 0.5 - ahead, torch.full_like(ahead, 0.5)]).clamp(min=0)
    torch.testing.assert_close(rgbs.detach()[:, 0], expected, rtol=1e-6, atol=1e-6)
    rgbs[:2].sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("module", usable_levels())
def test_opcheck(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kernels(monkeypatch, module)
    leaves, radii = make_inputs(7, 2)
    torch.library.opcheck(torch.ops.prismfield.sh_colors, (*[t.requires_grad_() for t in leaves], radii, 2))
    inputs = [t.detach() for t in leaves]
    rgbs = sh_colors(*inputs, radii, 2)
    for wanted in (True, False):
        arguments = (*inputs, radii, 2, rgbs, *cotangents(rgbs), wanted, wanted)
        torch.library.opcheck(torch.ops.prismfield.sh_colors_backward, arguments)


def test_no_gradient_where_none_is_asked_for() -> None:
    leaves, radii = make_inputs(7, 2)
    leaves[0].requires_grad_()
    sh_colors(*leaves, radii, 3).sum().backward()
    assert leaves[0].grad is not None and all(t.grad is None for t in leaves[1:])


@pytest.mark.parametrize("position", range(5))
def test_bad_arguments_are_named(position: int) -> None:
    leaves, radii = make_inputs(7, 2)
    inputs = [*leaves, radii]
    name = (*NAMES, "radii")[position]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        sh_colors(*[t[..., :-1] if i == position else t for i, t in enumerate(inputs)], 3)
    with pytest.raises(ValueError, match=rf"^(shN|{name}): expected dtype"):
        sh_colors(*[t.double() if i == position else t for i, t in enumerate(inputs)], 3)


def test_degrees_that_do_not_fit() -> None:
    leaves, radii = make_inputs(7, 1, terms=8)
    for degree in (-1, 3, 4):
        with pytest.raises(ValueError, match=f"^degree: .*8 terms.*got {degree}"):
            sh_colors(*leaves, radii, degree)
