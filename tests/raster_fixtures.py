"""Scenes for the tests of the rasterizer: oblong images, fx != fy, an off-centre principal point, cameras that are turned and rolled."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.cameras import Cameras
from prismfield.render.ops.constants import ALPHA_MAX, ALPHA_MIN, TRANS_MIN
from prismfield.render.ops.primitives import PRIMITIVES
from prismfield.render.ops.project import rotation_matrices
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_gaussians

IMAGES = [(1, 1), (17, 9), (70, 45), (200, 131)]
"""Widths and heights: one pixel, less than a tile, a few tiles, many; none but the first a multiple of anything."""
COUNTS = [0, 1, 7, 300]
BEHIND, BEYOND, HUGE, TINY, OPAQUE, CLEAR, STACK = 0, 1, 2, 3, 4, 5, slice(6, 18)
"""Rows of a scene of 18 primitives or more that are hard in a way of their own, as camera 0 sees them."""


@dataclass(frozen=True)
class Gaussians3D:
    """What `rasterize_gaussians` takes, activated."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh0: Tensor
    shN: Tensor

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def leaves(self, dtype: torch.dtype = torch.float32) -> Self:
        """A copy whose tensors collect gradients."""
        return type(self)(*(t.detach().to(dtype, copy=True).requires_grad_() for t in self.tensors()))

    def __getitem__(self, index: Tensor) -> Self:
        return type(self)(*(t[index] for t in self.tensors()))

    def render(self, cameras: Cameras, background: Tensor | None = None, **options: Any) -> RenderOutput:
        options = {"sh_degree": 3} | options
        sh = (self.sh0, self.shN)
        return rasterize_gaussians(
            self.means, self.quats, self.scales, self.opacities, sh, cameras, background, **options
        )


def make_cameras(count: int, width: int, height: int, dtype: torch.dtype = torch.float32) -> Cameras:
    """Cameras 4 units from the origin that look past it, each rolled; built in double precision."""
    generator = torch.Generator().manual_seed(width + 1000 * count)
    quats = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    viewmats = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    viewmats[:, :3, :3] = rotation_matrices(quats)
    viewmats[:, :3, 3] = torch.tensor([0.15, -0.1, 4.0]) + 0.1 * torch.randn(count, 3, generator=generator)
    Ks = torch.zeros(count, 3, 3, dtype=torch.float64)
    Ks[:, 0, 0], Ks[:, 1, 1] = 1.3 * width, 1.7 * height
    Ks[:, 0, 2], Ks[:, 1, 2], Ks[:, 2, 2] = 0.41 * width, 0.57 * height, 1.0
    Ks[:, 0, 0] *= 1 + 0.1 * torch.arange(count)
    return Cameras(viewmats.to(dtype), Ks.to(dtype), width, height)


def make_gaussians(count: int, cameras: Cameras, *, seed: int = 0, hard: bool = True) -> Gaussians3D:
    """`count` Gaussians around the origin; with `hard` and room for them, some that test the edges of everything."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    means, quats, scales = 0.8 * randn(count, 3), randn(count, 4), 0.1 * torch.exp(0.7 * randn(count, 3))
    opacities = torch.rand(count, generator=generator)
    if hard and count >= STACK.stop:
        depths = torch.linspace(3.5, 4.5, STACK.stop - STACK.start)
        ahead = torch.stack([torch.zeros_like(depths), torch.zeros_like(depths), depths], -1)
        wanted = {BEHIND: (0.1, 0.0, -2.0), BEYOND: (60.0, 0.0, 2.0), HUGE: (0.5, 0.2, 6.0), TINY: (0.1, 0.1, 3.0)}
        camtoworld = cameras.camtoworlds[0].float()
        for row, position in wanted.items():
            means[row] = camtoworld[:3, :3] @ torch.tensor(position) + camtoworld[:3, 3]
        means[STACK] = ahead @ camtoworld[:3, :3].T + camtoworld[:3, 3]
        scales[HUGE], scales[TINY], scales[STACK] = 5.0 * scales[HUGE] / scales[HUGE].max(), 1e-5, 0.4
        opacities[HUGE] = 0.3
        opacities[OPAQUE], opacities[CLEAR], opacities[STACK] = 1.0, 0.0, 0.9
    return Gaussians3D(means, quats, scales, opacities, randn(count, 1, 3), 0.3 * randn(count, 15, 3))


def as_double(cameras: Cameras) -> Cameras:
    return replace(cameras, viewmats=cameras.viewmats.double(), Ks=cameras.Ks.double())


def usable_levels() -> list[Any]:
    """Values for `parametrize`: the instruction sets that were built and that this processor has; one skipped value if none."""
    usable = []
    for level in (*kernels_module.LEVELS, ""):
        try:
            module = kernels_module.load_kernels(level)[0]
        except ValueError:
            continue
        if module is not None and (level or not usable):
            usable.append(pytest.param(module, id=level or "portable"))
    return usable or [pytest.param(None, marks=pytest.mark.skip("no compiled kernels"), id="none")]


def use_kernels(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Run the rasterizer's ops on one build of the kernels."""
    monkeypatch.setattr(kernels_module, "kernels", module)


def cotangents(*outputs: Tensor, seed: int = 5) -> list[Tensor]:
    """Random gradients of the same shapes, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def assert_rows_close(got: Tensor, wanted: Tensor, rtol: float, what: str, floor: float = 1e-6) -> None:
    """Each row (last axis) is within `rtol` of its length, or within `floor` of the longest row's."""
    if what.endswith("params"):  # pixels, inverse square pixels and logarithms do not compare
        for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
            assert_rows_close(got[..., part], wanted[..., part], rtol, f"{what}[{part.start}:{part.stop}]", floor)
        return
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    if not got.numel():
        return
    lengths = wanted.double().norm(dim=-1)
    errors = (got.double() - wanted.double()).norm(dim=-1)
    allowed = rtol * lengths + floor * lengths.max()
    worst = (errors / allowed.clamp(min=1e-300)).argmax()
    assert (errors <= allowed).all(), (
        f"{what}: row {worst.item()} is off by {errors.flatten()[worst]:.3g}, length {lengths.flatten()[worst]:.3g}, "
        f"longest {lengths.max():.3g}, allowed {allowed.flatten()[worst]:.3g}"
    )


@torch.no_grad()
def fragile_pixels(
    params: Tensor, depths: Tensor, radii: Tensor, size: tuple[int, int], margin: float, primitive: str = "gaussian"
) -> Tensor:
    """[C, H, W]: where rounding decides on which side of a cutoff an alpha or a transmittance falls.

    Pictures jump there, so that two correct programs differ. Comparisons leave these pixels out, and tests bound how many there are.
    """
    width, height = size
    py, px = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    fragile = []
    for camera in range(len(params)):
        drawn = radii[camera, :, 0] > 0
        order = depths[camera, drawn].argsort(stable=True)
        rows = params[camera, drawn][order].double()[:, None]
        alphas = PRIMITIVES[primitive].alpha(rows, px.flatten().double(), py.flatten().double())
        near = torch.zeros(height * width, dtype=torch.bool)
        for cutoff in (ALPHA_MIN, ALPHA_MAX):
            near |= ((alphas - cutoff).abs() < margin * cutoff).any(0)
        trans = torch.cumprod(1 - torch.where(alphas >= ALPHA_MIN, alphas.clamp(max=ALPHA_MAX), 0.0), 0)
        for cutoff in (TRANS_MIN, 0.5):
            near |= ((trans - cutoff).abs() < margin * cutoff).any(0)
        fragile.append(near.view(height, width))
    return torch.stack(fragile)


def angle_axis(
    axis: tuple[float, float, float], degrees: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A rotation as a unit quaternion [4] and as a matrix [3, 3]."""
    half = math.radians(degrees) / 2
    direction = torch.nn.functional.normalize(torch.tensor(axis, dtype=dtype), dim=0)
    quat = torch.cat([torch.tensor([math.cos(half)], dtype=dtype), math.sin(half) * direction])
    return quat, rotation_matrices(quat)


EDGES: list[tuple[dict[str, Any], bool]] = [
    ({"means": [0.0, 0.0, 0.0099]}, False),
    ({"means": [0.0, 0.0, 0.0101]}, True),
    ({"means": [0.0, 0.0, -2.0]}, False),
    ({"opacities": 1 / 255.5}, False),
    ({"opacities": 1 / 253}, True),
    ({"opacities": 0.0}, False),
    (
        {"means": [1.98, 0.0, 2.0]},
        True,
    ),  # 230.5 pixels; the radius is 24.5 there with the tangent held at the margin
    ({"means": [2.6, 0.0, 2.0]}, False),
    ({"means": [0.0, -1.0, 2.0]}, True),
    ({"means": [0.0, -1.4, 2.0]}, False),
    ({"means": [float("nan"), 0.0, 2.0]}, False),
    ({"means": [0.0, float("inf"), 2.0]}, False),
    ({"scales": [0.1, float("nan"), 0.1]}, False),
    ({"scales": [1e25, 0.1, 0.1]}, False),
    ({"quats": [float("nan"), 0.0, 0.0, 1.0]}, False),
    ({"opacities": float("nan")}, False),
]
"""What to change of a Gaussian, and whether it is drawn then: either side of each reason for leaving one out."""
