"""The representation `gaussians`: how it starts, what it stores, what it asks of the optimizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prismfield.render.cameras import Cameras
from prismfield.representations.config import GaussiansConfig
from prismfield.representations.gaussians import Gaussians

AABB = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def from_xyz(xyz: torch.Tensor, **options: float) -> Gaussians:
    return Gaussians.from_points(xyz, torch.full_like(xyz, 0.5), AABB, replace(GaussiansConfig(), **options))


def test_scales_are_the_mean_distance_to_three_neighbours() -> None:
    xyz = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 4], [30, 0, 0]])
    scales = from_xyz(xyz, init_scale=0.5).scales
    assert scales[0].tolist() == pytest.approx([0.5 * (1 + 2 + 4) / 3] * 3)
    assert scales[1, 0].item() == pytest.approx(0.5 * (1 + 5**0.5 + 17**0.5) / 3)
    assert scales[4, 0].item() == pytest.approx(0.5 * (29 + 30 + 904**0.5) / 3)


def test_points_that_coincide_get_a_finite_width() -> None:
    xyz = torch.cat([torch.zeros(6, 3), torch.rand(20, 3, generator=torch.Generator().manual_seed(0))])
    scales = from_xyz(xyz).scales
    assert torch.isfinite(scales.log()).all() and scales.min() > 0.01 * scales.median()
    assert torch.isfinite(from_xyz(torch.zeros(5, 3)).log_scales).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_points_than_neighbours(count: int) -> None:
    scene = from_xyz(torch.arange(3.0 * count).view(count, 3))
    assert scene.num_primitives == count and (scene.scales > 0).all() and torch.isfinite(scene.scales).all()


def test_a_point_shows_its_colour_from_everywhere() -> None:
    rgb = torch.tensor([[0.9, 0.4, 0.1]])
    scene = Gaussians.from_points(torch.zeros(1, 3), rgb, AABB, GaussiansConfig(init_opacity=0.7, init_scale=10))
    viewmats = torch.eye(4).repeat(2, 1, 1)
    viewmats[1, :3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    viewmats[:, 2, 3] = 2.0
    Ks = torch.tensor([[40.0, 0, 16.5], [0, 30.0, 12.5], [0, 0, 1]]).repeat(2, 1, 1)
    for degree in (0, 3):
        scene.active_sh_degree = degree
        out = scene.render(Cameras(viewmats, Ks, 31, 25))
        centre = out.rgb[:, 12, 16]
        torch.testing.assert_close(centre, (0.7 * rgb).expand(2, 3), atol=2e-3, rtol=0)


def test_it_starts_without_view_dependence_and_a_loaded_one_has_all_of_it() -> None:
    scene = from_xyz(torch.rand(5, 3))
    assert (scene.active_sh_degree, scene.sh_degree, scene.shN.shape[1]) == (0, 3, 15)
    assert Gaussians.from_tensors(scene.tensors(), GaussiansConfig()).active_sh_degree == 3
    assert from_xyz(torch.rand(5, 3), sh_interval=0.0).active_sh_degree == 3


def test_the_degree_rises_with_progress() -> None:
    config = GaussiansConfig(sh_degree=2, sh_interval=0.1)
    assert [config.sh_degree_at(p) for p in (0.0, 0.0999, 0.1, 0.19, 0.2, 0.3, 1.0)] == [0, 0, 1, 1, 2, 2, 2]
    assert GaussiansConfig(sh_interval=1 / 30).sh_degree_at(2000 / 30000) == 2


def test_the_stored_degree_is_that_of_the_tensors() -> None:
    tensors = from_xyz(torch.rand(4, 3)).tensors()
    tensors["shN"] = tensors["shN"][:, :3]
    assert Gaussians.from_tensors(tensors, GaussiansConfig(sh_degree=3)).sh_degree == 1


def test_groups_carry_the_rates_of_the_config() -> None:
    config = GaussiansConfig(means_lr=1.0, means_lr_final=0.1, quats_lr=2.0, shN_lr=3.0)
    scene = Gaussians.from_points(torch.rand(4, 3), torch.rand(4, 3), AABB, config)
    groups = {group["name"]: group for group in scene.param_groups()}
    assert list(groups) == ["means", "quats", "log_scales", "opacity_logits", "sh0", "shN"]
    assert all(group["params"][0] is getattr(scene, name) for name, group in groups.items())
    assert (groups["means"]["lr"], groups["means"]["lr_final"]) == (1.0, 0.1)
    assert (groups["quats"]["lr"], groups["shN"]["lr"]) == (2.0, 3.0)
    assert "lr_final" not in groups["quats"]


def test_antialiasing_is_the_configs() -> None:
    cameras = Cameras(torch.eye(4)[None], torch.tensor([[[40.0, 0, 16.5], [0, 30.0, 12.5], [0, 0, 1]]]), 31, 25)
    xyz = torch.tensor([[0.0, 0, 5]])
    tensors = from_xyz(xyz, init_scale=1.0).tensors()
    plain, antialiased = (Gaussians(tensors, GaussiansConfig(antialiased=a)) for a in (False, True))
    assert antialiased.render(cameras).alpha.sum() < 0.8 * plain.render(cameras).alpha.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quats": torch.zeros(4, 3)}, r"quats: expected \[N, 4\]"),
        ({"opacity_logits": torch.zeros(5)}, "opacity_logits: expected"),
        ({"shN": torch.zeros(4, 5, 3)}, "shN: expected 0, 3, 8 or 15 terms"),
        ({"means": None}, "means missing"),
    ],
)
def test_tensors_that_do_not_fit(change: dict, message: str) -> None:
    tensors = from_xyz(torch.rand(4, 3)).tensors() | change
    with pytest.raises(ValueError, match=message):
        Gaussians.from_tensors({k: v for k, v in tensors.items() if v is not None}, GaussiansConfig())


def test_points_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        from_xyz(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="init_opacity"):
        from_xyz(torch.zeros(2, 3), init_opacity=1.0)
    with pytest.raises(ValueError, match="rgb: expected"):
        Gaussians.from_points(torch.zeros(2, 3), torch.zeros(3, 3), AABB, GaussiansConfig())
