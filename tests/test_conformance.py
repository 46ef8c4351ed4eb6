"""What every representation must do, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import SplatAsset
from prismfield.export.ply import read_ply, write_ply
from prismfield.render.cameras import Cameras
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.representations.config import ConvexesConfig, FieldConfig, GaussiansConfig, HollowConfig, VoxelConfig

_SIZES: dict[str, Any] = {
    "levels": 4,
    "coarsest": 4,
    "finest": 24,
    "width": 16,
    "occupancy": 16,
    "steps": 24,
    "lr": 2e-3,
}
_FIELD = FieldConfig(log2_rows=12, extent="box", **_SIZES)
CONFIGS: dict[str, Any] = {
    "gaussians": GaussiansConfig(sh_degree=2, init_opacity=0.6),
    "convexes": ConvexesConfig(sh_degree=2, init_opacity=0.6),
    "hash": _FIELD,
    "simplex": _FIELD,
    "triplane": _FIELD,
    "voxel": VoxelConfig(log2_rows=15, extent="box", growth=0, init_alpha=0.05, network_lr=2e-3, **_SIZES),
    "hollow": HollowConfig(log2_rows=12, extent="box", saliency=8, saliency_lr=2e-3, **_SIZES),
}
SPLATS = {"gaussians"}
"""Those whose tensors a splat file can hold."""


def make_cameras(device: torch.device | str = "cpu") -> Cameras:
    """Two turned cameras, oblong, off-centre, with fx != fy."""
    angles = torch.tensor([0.4, -0.7])
    cos, sin = angles.cos(), angles.sin()
    viewmats = torch.eye(4).repeat(2, 1, 1)
    viewmats[:, 0, 0], viewmats[:, 0, 2], viewmats[:, 2, 0], viewmats[:, 2, 2] = cos, sin, -sin, cos
    tilt = torch.tensor([[1, 0, 0, 0], [0, 0.9, 0.4359, 0], [0, -0.4359, 0.9, 0], [0, 0, 0, 1.0]])
    viewmats = tilt @ viewmats
    viewmats[:, 2, 3] = 3.0
    Ks = torch.tensor([[60.0, 0, 21.0], [0, 48.0, 18.5], [0, 0, 1]]).repeat(2, 1, 1)
    return Cameras(viewmats, Ks, 46, 33).to(device)


def make_points(count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    xyz = torch.rand(count, 3, generator=generator) * 1.6 - 0.8
    return xyz, torch.rand(count, 3, generator=generator), torch.stack([xyz.amin(0), xyz.amax(0)])


@pytest.fixture(params=sorted(REPRESENTATIONS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def scene(kind: str, device: torch.device) -> Representation:
    torch.manual_seed(0)
    made = REPRESENTATIONS[kind].from_points(*(t.to(device) for t in make_points()), CONFIGS[kind])
    for group in made.param_groups():  # away from the symmetric start, where some gradients vanish
        for parameter in group["params"]:
            parameter.data += 0.05 * torch.randn(parameter.shape).to(device)
    # As a finished scene is loaded: everything it stores is in use.
    return REPRESENTATIONS[kind].from_tensors(made.tensors(), CONFIGS[kind])


def test_it_fits_the_protocol(scene: Representation) -> None:
    assert isinstance(scene, Representation) and scene.batching in ("image", "pixels")


def test_shapes_and_ranges(scene: Representation, device: torch.device) -> None:
    out = scene.render(make_cameras(device), extras=("depth", "median_depth"))
    assert out.rgb.shape == (2, 33, 46, 3) and out.alpha.shape == (2, 33, 46)
    assert out.depth is not None and out.median_depth is not None
    assert out.depth.shape == out.median_depth.shape == (2, 33, 46)
    assert torch.isfinite(out.rgb).all() and (out.rgb >= 0).all()
    assert (out.alpha >= 0).all() and (out.alpha <= 1).all() and out.alpha.max() > 0.5
    seen = out.alpha > 0.5
    assert (out.depth[seen] > 1).all() and (out.depth[seen] < 5).all()
    assert (out.depth[out.alpha == 0] == 0).all()


def test_background_shows_through_by_what_alpha_leaves(scene: Representation, device: torch.device) -> None:
    cameras = make_cameras(device)
    background = torch.tensor([[1.0, 0.5, 0.25], [0.0, 2.0, 1.0]], device=device)
    black, out = scene.render(cameras), scene.render(cameras, background=background)
    expected = black.rgb + (1 - black.alpha)[..., None] * background[:, None, None]
    torch.testing.assert_close(out.rgb, expected, atol=2e-5, rtol=1e-5)
    assert (expected - black.rgb).amax() > 0.5


def test_every_parameter_is_in_one_group_and_learns(scene: Representation, device: torch.device) -> None:
    assert isinstance(scene, torch.nn.Module)
    groups = scene.param_groups()
    assert len({group["name"] for group in groups}) == len(groups)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in scene.parameters())
    out = scene.render(make_cameras(device), extras=("depth",))
    weights = torch.rand(out.rgb.shape, generator=torch.Generator().manual_seed(0)).to(device)
    ((out.rgb * weights).sum() + (out.alpha**2).sum()).backward()
    for group in groups:
        (parameter,) = group["params"]
        assert group["lr"] > 0
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), group["name"]
        assert parameter.grad.abs().max() > 0, group["name"]


def test_pixels_equal_the_full_image(scene: Representation, device: torch.device) -> None:
    cameras = make_cameras(device)
    pixels = torch.tensor([[0, 20, 11], [1, 45, 32], [1, 24, 16], [0, 0, 0], [0, 20, 11]], device=device)
    background = torch.tensor([[1.0, 0.5, 0.25], [0.0, 2.0, 1.0]], device=device)
    extras = ("depth", "median_depth")
    whole = scene.render(cameras, background=background, extras=extras)
    some = scene.render(cameras, pixels, background, extras)
    camera, column, row = pixels.unbind(-1)
    for name in ("rgb", "alpha", "depth", "median_depth"):
        torch.testing.assert_close(getattr(some, name), getattr(whole, name)[camera, row, column])


def test_from_tensors_of_tensors_is_the_same_scene(kind: str, scene: Representation, device: torch.device) -> None:
    tensors = scene.tensors()
    assert all(not t.requires_grad for t in tensors.values())
    again = REPRESENTATIONS[kind].from_tensors(tensors, CONFIGS[kind])
    assert torch.equal(again.render(make_cameras(device)).rgb, scene.render(make_cameras(device)).rgb)
    next(iter(tensors.values())).zero_()  # the scene is its own copy
    assert again.render(make_cameras(device)).alpha.max() > 0.5


def test_a_part_of_the_tensors_is_a_scene_too(kind: str, scene: Representation, device: torch.device) -> None:
    if kind not in SPLATS:
        pytest.skip(f"{kind} has no rows")
    for count in (1, 7):
        part = {name: tensor[:count] for name, tensor in scene.tensors().items()}
        out = REPRESENTATIONS[kind].from_tensors(part, CONFIGS[kind]).render(make_cameras(device))
        assert torch.isfinite(out.rgb).all()


def test_export_round_trips(kind: str, scene: Representation, device: torch.device, tmp_path: Path) -> None:
    if kind not in SPLATS:
        pytest.skip(f"{kind} is not made of splats")
    frame = SceneFrame(center=(4.0, -7.0, 2.0), scale=0.3, up=(0.0, 0.6, 0.8))
    write_ply(tmp_path / "scene.ply", SplatAsset.from_tensors(scene.tensors(), frame))
    asset = read_ply(tmp_path / "scene.ply")
    assert asset.up == pytest.approx(frame.up)
    again = REPRESENTATIONS[kind].from_tensors(asset.to_tensors(frame), CONFIGS[kind])
    cameras = make_cameras()
    difference = again.render(cameras).rgb - scene.render(cameras.to(device)).rgb.cpu()
    # Going through user units costs a few bits of float32.
    assert difference.abs().max() < 2e-3 and difference.square().mean().sqrt() < 2e-5


def test_it_learns_a_picture(kind: str, device: torch.device) -> None:
    cameras = make_cameras(device)
    torch.manual_seed(0)
    target = REPRESENTATIONS[kind].from_points(*(t.to(device) for t in make_points(40)), CONFIGS[kind])
    with torch.no_grad():
        truth = target.render(cameras).rgb
    xyz, rgb, aabb = (t.to(device) for t in make_points(40))
    scene = REPRESENTATIONS[kind].from_points(xyz + 0.03, 0.5 * torch.ones_like(rgb), aabb, CONFIGS[kind])
    optimizer = torch.optim.Adam([{**group, "lr": 10 * group["lr"]} for group in scene.param_groups()], eps=1e-15)
    losses = []
    for _ in range(60):
        loss = (scene.render(cameras).rgb - truth).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])
