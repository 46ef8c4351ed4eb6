"""The whole renderer: against the reference, against differences, and what must hold whatever it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.cameras import Cameras
from prismfield.render.ops.bin import Isects
from prismfield.render.ops.composite import composite_reference
from prismfield.render.ops.project import project_reference
from prismfield.render.ops.sh import sh_colors_reference
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import EXTRAS, rasterize, rasterize_gaussians

from .raster_fixtures import (
    Gaussians3D,
    angle_axis,
    as_double,
    assert_rows_close,
    cotangents,
    fragile_pixels,
    make_cameras,
    make_gaussians,
    usable_levels,
    use_kernels,
)

BUILDS = [pytest.param(None, id="reference"), *usable_levels()]
IMAGE = (70, 45)


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One build of the kernels, or None for the reference, which tests run in double precision."""
    monkeypatch.setattr(kernels_module, "enabled", request.param is not None)
    use_kernels(monkeypatch, request.param)
    return request.param


def make_scene(
    build: Any, count: int = 60, num_cameras: int = 1, image: tuple[int, int] = IMAGE
) -> tuple[Gaussians3D, Cameras]:
    cameras = make_cameras(num_cameras, *image)
    gaussians = make_gaussians(count, cameras, seed=count)
    if build is not None:
        return gaussians, cameras
    return Gaussians3D(*(t.double() for t in gaussians.tensors())), as_double(cameras)


def render_and_differentiate(
    gaussians: Gaussians3D, cameras: Cameras, background: Tensor, fragile: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Pictures, and gradients to everything, the cameras too; pixels at a cutoff get no cotangent."""
    leaves = gaussians.leaves(gaussians.means.dtype)
    viewmats = cameras.viewmats.clone().requires_grad_()
    background = background.clone().requires_grad_()
    out = leaves.render(replace(cameras, viewmats=viewmats), background, extras=EXTRAS, **options)
    outputs = [out.rgb, out.alpha, out.depth]
    upstream = [v.masked_fill(fragile.view(*fragile.shape, *[1] * (v.dim() - 3)), 0) for v in cotangents(*outputs)]
    torch.autograd.backward(outputs, upstream)
    names = ("means", "quats", "scales", "opacities", "sh0", "shN")
    result = {f"v_{name}": t.grad for name, t in zip(names, leaves.tensors(), strict=True)}
    result |= {"v_viewmats": viewmats.grad, "v_background": background.grad, "absgrad": out.absgrad.grad}
    pictures = {"rgb": out.rgb, "alpha": out.alpha, "depth": out.depth, "median_depth": out.median_depth}
    return result | {name: t.detach() for name, t in pictures.items()}


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize(("count", "num_cameras"), [(0, 1), (1, 1), (7, 3), (300, 2)])
def test_kernels_against_reference(
    build: Any, count: int, num_cameras: int, antialiased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looser than for each op alone: an error of 1e-7 in a position is one of 1e-5 in what an op in the middle is given."""
    gaussians, cameras = make_scene(build, count, num_cameras)
    background = torch.rand(num_cameras, 3, generator=torch.Generator().manual_seed(2))
    exact = [t.double() for t in (*gaussians.tensors()[:4], cameras.viewmats, cameras.Ks)]
    fragile = fragile_pixels(*project_reference(*exact, *IMAGE, antialiased), IMAGE, 1e-3)
    assert fragile.float().mean() < 0.2
    got = render_and_differentiate(gaussians, cameras, background, fragile, antialiased=antialiased)
    monkeypatch.setattr(kernels_module, "enabled", False)
    doubles = Gaussians3D(*(t.double() for t in gaussians.tensors()))
    wanted = render_and_differentiate(
        doubles, as_double(cameras), background.double(), fragile, antialiased=antialiased
    )
    for name, result in got.items():
        a, b = (
            (result, wanted[name])
            if name in ("absgrad",) or name.startswith("v_")
            else (result[~fragile], wanted[name][~fragile])
        )
        if name == "depth":  # a mean over next to nothing: its weights are what is exact
            a, b = (x * wanted["alpha"][~fragile].clamp(min=1e-2) for x in (a, b))
        if name in ("alpha", "depth", "median_depth", "v_opacities"):
            a, b = a[..., None], b[..., None]
        assert_rows_close(a, b, 1e-3 if name.startswith("v_") or name == "absgrad" else 1e-4, name, floor=1e-5)


@pytest.mark.parametrize("antialiased", [False, True])
def test_central_differences_through_everything(antialiased: bool) -> None:
    """With the smooth cutoff, in double precision, to the Gaussians and to the cameras."""
    cameras = as_double(make_cameras(2, 6, 5))
    gaussians = make_gaussians(4, cameras, hard=False, seed=8)
    inputs = [t.double() for t in gaussians.tensors()]
    inputs[3] = inputs[3].clamp(0.2, 0.9)
    inputs[5] = inputs[5][:, :3]

    def pictures(viewmats: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        means, quats, scales, opacities, sh0, shN = leaves
        params, depths, radii = project_reference(
            means, quats, scales, opacities, viewmats, cameras.Ks, 6, 5, antialiased
        )
        assert (radii > 0).all()
        rgbs = sh_colors_reference(sh0, shN, means, viewmats, radii, 1)
        # One tile that holds everything: footprints end at the real cutoff
        order = torch.cat([depths[c].argsort() + c * 4 for c in range(2)]).int()
        isects = Isects(order, order, torch.tensor([0, 4, 8]), torch.arange(9), 9)
        background = torch.full((2, 3), 0.3, dtype=torch.float64)
        return composite_reference("gaussian", params, rgbs, depths, background, isects, (6, 5), smooth=True)[:3]

    assert torch.autograd.gradcheck(pictures, [t.requires_grad_() for t in (cameras.viewmats, *inputs)])


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_moving_scene_and_cameras_together_changes_nothing(build: Any) -> None:
    """Colours that depend on the view are fixed in the world, so only constant ones may be turned."""
    gaussians, cameras = make_scene(build, num_cameras=2)
    quat, rotation = (t.to(gaussians.means.dtype) for t in angle_axis((0.3, -1.0, 0.5), 77.0))
    shift = gaussians.means.new_tensor([0.4, -0.9, 1.3])
    w, x, y, z = quat.tolist()
    product = gaussians.quats.new_tensor([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])
    moved = replace(gaussians, means=gaussians.means @ rotation.T + shift, quats=gaussians.quats @ product.T)
    motion = torch.eye(4, dtype=rotation.dtype)
    motion[:3, :3], motion[:3, 3] = rotation, shift
    cameras_moved = replace(cameras, viewmats=cameras.viewmats @ torch.linalg.inv(motion))
    options: dict[str, Any] = {"sh_degree": 0, "extras": EXTRAS}
    before, after = gaussians.render(cameras, **options), moved.render(cameras_moved, **options)
    other = moved.render(cameras, **options)
    assert (before.rgb - other.rgb).abs().mean() > 0.01
    for name in ("rgb", "alpha", "depth"):
        error = (getattr(before, name) - getattr(after, name)).abs()
        # Single precision: where a cutoff falls on a pixel it may flip, by 1/255 of a colour or so
        assert error.median() < (1e-5 if build else 1e-12) and error.max() < (0.05 if build else 1e-8), name


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_background_shows_through(build: Any) -> None:
    gaussians, cameras = make_scene(build, num_cameras=2)
    black = gaussians.render(cameras)
    background = gaussians.means.new_tensor([[0.9, 0.1, 0.4], [-0.2, 3.0, 0.7]])
    out = gaussians.render(cameras, background)
    assert 0.1 < black.alpha.mean() < 0.9
    assert torch.equal(out.alpha, black.alpha)
    torch.testing.assert_close(out.rgb, black.rgb + (1 - black.alpha[..., None]) * background[:, None, None])
    assert black.depth is None and black.median_depth is None and black.absgrad is None


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_a_batch_of_cameras_is_that_many_pictures(build: Any) -> None:
    gaussians, cameras = make_scene(build, num_cameras=3)
    background = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).to(gaussians.means)

    def run(cameras: Cameras, background: Tensor, upstream: Tensor | None) -> tuple[RenderOutput, list[Tensor]]:
        leaves = gaussians.leaves(gaussians.means.dtype)
        out = leaves.render(cameras, background, extras=EXTRAS)
        out.rgb.backward(cotangents(out.rgb)[0] if upstream is None else upstream)
        return out, [t.grad for t in leaves.tensors()]

    together, grads = run(cameras, background, None)
    upstream = cotangents(together.rgb)[0]
    alone = [run(cameras[c], background[c : c + 1], upstream[c : c + 1]) for c in range(3)]
    for name in ("rgb", "alpha", "depth", "median_depth", "radii", "params"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(out, name) for out, _ in alone])), name
    for together_grad, *single in zip(grads, *(g for _, g in alone), strict=True):
        torch.testing.assert_close(together_grad, sum(single), rtol=1e-4, atol=1e-5 * float(together_grad.abs().max()))


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_order_of_the_primitives_does_not_matter(build: Any) -> None:
    gaussians, cameras = make_scene(build, count=300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(4))
    plain, shuffled = gaussians.leaves(gaussians.means.dtype), gaussians[order].leaves(gaussians.means.dtype)
    outs = [g.render(cameras, extras=EXTRAS) for g in (plain, shuffled)]
    for name in ("rgb", "alpha", "depth", "median_depth"):
        torch.testing.assert_close(getattr(outs[0], name), getattr(outs[1], name), rtol=0, atol=0, msg=name)
    for out in outs:
        out.rgb.backward(*cotangents(out.rgb))
    for a, b in zip(plain.tensors(), shuffled.tensors(), strict=True):
        torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-5, atol=1e-6 * float(a.grad.abs().max()))


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_depth_of_walls(build: Any) -> None:
    """An opaque splat facing the camera has its z everywhere it is opaque; behind a veil, the mean and the median differ."""
    _, cameras = make_scene(build)
    camtoworld = cameras.camtoworlds[0]
    at = camtoworld.new_tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 5.0]])
    dtype = camtoworld.dtype
    # A plane's normal is its third axis: the splats are turned like the camera
    quats = quaternion_of(camtoworld[:3, :3]).expand(2, 4)
    scales = torch.tensor([[40.0, 40.0, 1e-4]], dtype=dtype).expand(2, 3)
    colours = torch.zeros(2, 1, 3, dtype=dtype), torch.zeros(2, 0, 3, dtype=dtype)
    means = at @ camtoworld[:3, :3].T + camtoworld[:3, 3]

    def draw(opacities: list[float]) -> RenderOutput:
        values = torch.tensor(opacities, dtype=dtype)
        walls = Gaussians3D(means, quats, scales, values, *colours)
        return walls.render(cameras, sh_degree=0, extras=("depth", "median_depth"))

    near = draw([1.0, 0.0])
    torch.testing.assert_close(near.depth, torch.full_like(near.depth, 3.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(near.median_depth, torch.full_like(near.depth, 3.0), rtol=1e-5, atol=0)
    assert (near.alpha > 0.98).all()
    both = draw([0.4, 1.0])
    assert ((both.depth > 4) & (both.depth < 4.5)).all()
    torch.testing.assert_close(both.median_depth, torch.full_like(both.depth, 5.0), rtol=1e-5, atol=0)
    assert (draw([0.4, 0.0]).median_depth == 0).all()


def quaternion_of(rotation: Tensor) -> Tensor:
    """wxyz of a rotation matrix."""
    # The axis is what the rotation leaves alone: the eigenvector of 1 in the 4x4 form of Bar-Itzhack
    r = rotation.double()
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 0] = r.trace()
    matrix[0, 1:] = torch.stack([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    matrix[1:, 0] = matrix[0, 1:]
    matrix[1:, 1:] = r + r.T - r.trace() * torch.eye(3)
    return torch.linalg.eigh(matrix).eigenvectors[:, -1].to(rotation)


@pytest.mark.parametrize("build", usable_levels(), indirect=True)
def test_same_bits_on_any_number_of_threads(build: Any) -> None:
    """Enough primitives that each stage is shared out in several pieces."""
    gaussians, cameras = make_scene(build, count=9000, num_cameras=2, image=(200, 131))
    background, nothing = torch.ones(2, 3), torch.zeros(2, 131, 200, dtype=torch.bool)
    before, results = build.num_threads(), []
    try:
        for threads in (1, 2, 3):
            build.set_num_threads(threads)
            results.append(render_and_differentiate(gaussians, cameras, background, nothing, antialiased=True))
    finally:
        build.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_nothing_to_draw_is_the_background(build: Any) -> None:
    gaussians, cameras = make_scene(build, count=0, num_cameras=2)
    leaves = gaussians.leaves(gaussians.means.dtype)
    background = gaussians.means.new_tensor([[0.9, 0.1, 0.4], [-0.2, 3.0, 0.7]])
    out = leaves.render(cameras, background, extras=EXTRAS)
    assert torch.equal(out.rgb, background[:, None, None].expand(2, 45, 70, 3))
    assert all((t == 0).all() for t in (out.alpha, out.depth, out.median_depth))
    out.rgb.sum().backward()
    assert leaves.means.grad.shape == (0, 3)
    gaussians, _ = make_scene(build, count=20, num_cameras=2)
    leaves = replace(gaussians, opacities=torch.zeros_like(gaussians.opacities)).leaves(gaussians.means.dtype)
    out = leaves.render(cameras, background, extras=EXTRAS)
    assert torch.equal(out.rgb, background[:, None, None].expand(2, 45, 70, 3))
    out.rgb.sum().backward()
    assert all((t.grad == 0).all() for t in leaves.tensors())


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_more_features_than_colours(build: Any) -> None:
    gaussians, cameras = make_scene(build)
    means, quats, scales, opacities = gaussians.tensors()[:4]
    screen = project_reference(means, quats, scales, opacities, cameras.viewmats, cameras.Ks, *IMAGE, False)
    features = torch.rand(1, 60, 7, generator=torch.Generator().manual_seed(0)).to(means)
    out = rasterize("gaussian", screen, features, cameras)
    three = rasterize("gaussian", screen, features[..., 2:5].contiguous(), cameras)
    assert out.rgb.shape == (1, 45, 70, 7)
    torch.testing.assert_close(out.rgb[..., 2:5], three.rgb)


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_bad_arguments_are_named(build: Any) -> None:
    gaussians, cameras = make_scene(build, count=7)
    sh = (gaussians.sh0, gaussians.shN)
    good = dict(zip(("means", "quats", "scales", "opacities"), gaussians.tensors()[:4], strict=True))
    other = torch.float16

    def run(sh: tuple[Tensor, Tensor] = sh, cameras: Cameras = cameras, background: Any = None, **changes: Any) -> None:
        extras = changes.pop("extras", ())
        rasterize_gaussians(**good | changes, sh=sh, cameras=cameras, background=background, sh_degree=1, extras=extras)

    run()
    for name, tensor in good.items():
        with pytest.raises(ValueError, match=f"^{'quats' if name == 'means' else name}: expected"):
            run(**{name: tensor[:-1]}, **({"sh": (sh[0][:-1], sh[1][:-1])} if name == "means" else {}))
        with pytest.raises(ValueError, match=rf"^({name}|quats): expected dtype"):
            run(**{name: tensor.to(other)})
    with pytest.raises(ValueError, match=r"^sh0: expected"):
        run(sh=(sh[1], sh[1]))
    with pytest.raises(ValueError, match=r"^shN: expected"):
        run(sh=(sh[0], sh[1][:3]))
    with pytest.raises(ValueError, match=r"^viewmats: expected dtype"):
        run(cameras=replace(cameras, viewmats=cameras.viewmats.to(other)))
    with pytest.raises(ValueError, match=r"^background: expected"):
        run(background=torch.zeros(3).to(gaussians.means))
    with pytest.raises(ValueError, match=r"^background: expected dtype"):
        run(background=torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^extras: expected some of depth, .*got normals"):
        run(extras=("normals", "depth"))
    with pytest.raises(ValueError, match=r"^cameras: expected pinhole, got 'opencv'; undistort"):
        run(cameras=replace(cameras, model="opencv", distortion=torch.zeros(1, 8)))


def test_any_device(device: torch.device) -> None:
    """The reference draws and differentiates wherever its tensors lie."""
    gaussians, cameras = make_scene(None, count=20)
    leaves = Gaussians3D(*(t.to(device) for t in gaussians.tensors())).leaves(torch.float64)
    out = leaves.render(cameras.to(device), extras=EXTRAS)
    assert out.rgb.device.type == device.type
    wanted = gaussians.render(cameras, extras=EXTRAS)
    torch.testing.assert_close(out.rgb.cpu(), wanted.rgb)
    out.rgb.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in leaves.tensors())
