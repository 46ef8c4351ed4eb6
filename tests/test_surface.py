"""Surfaces found: closed forms come back from samples, from depths and from densities; cleaned, coloured, drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray
from torch import Tensor

from prismfield.export.meshes.bricks import SIDE, Bricks, grown, marching_cubes, sample_places, unique_places
from prismfield.export.meshes.field_bricks import density_bricks, field_colors
from prismfield.export.meshes.files import MeshAsset
from prismfield.export.meshes.fusion import Fusion, View, points
from prismfield.export.meshes.picture import cut_open, draw, rasterize_faces
from prismfield.export.meshes.shape import (
    areas,
    colors_from_views,
    compact,
    decimated,
    largest_parts,
    open_edges,
    vertex_normals,
)
from prismfield.render.cameras import Cameras
from prismfield.representations.config import FieldConfig
from prismfield.representations.fields import HashField

CENTER = np.array([0.3, -0.2, 0.1])
RADIUS = 0.7


def all_places(x: int, y: int, z: int) -> NDArray[np.int64]:
    return np.stack(np.meshgrid(np.arange(x), np.arange(y), np.arange(z), indexing="ij"), -1).reshape(-1, 3)


def ball_bricks(counts: tuple[int, int, int] = (3, 4, 5)) -> tuple[Bricks, NDArray[np.float64], float]:
    """Signed distances to a sphere on an oblong grid, in a shuffled order; its centre and radius."""
    places = np.random.default_rng(0).permutation(all_places(*counts))
    middle, radius, voxel, origin = np.array([11.3, 14.6, 22.2]), 8.4, 0.05, np.array([3.0, -7.0, 1.0])
    values = voxel * (np.linalg.norm(sample_places(places) - middle, axis=-1) - radius)
    return Bricks(origin, voxel, places, values.astype(np.float32)), origin + voxel * middle, voxel * radius


def test_a_sphere_comes_back_from_its_samples() -> None:
    bricks, center, radius = ball_bricks()
    vertices, faces = marching_cubes(bricks)
    np.testing.assert_allclose(np.linalg.norm(vertices - center, axis=1), radius, atol=0.05 * bricks.voxel)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and open_edges(faces) == 0
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)  # and not its negative
    assert mesh.euler_number == 2 and areas(vertices, faces).min() > 0


def test_what_is_not_known_leaves_a_hole_and_what_lies_beyond_can_close_it() -> None:
    bricks, center, _ = ball_bricks()
    bricks.values[bricks.places[:, 2] * SIDE > 16] = np.nan
    _, faces = marching_cubes(bricks)
    assert open_edges(faces) > 0
    kept = bricks.places[:, 2] < 3
    half = Bricks(bricks.origin, bricks.voxel, bricks.places[kept], bricks.values[kept])
    assert open_edges(marching_cubes(half)[1]) > 0
    vertices, faces = marching_cubes(half, beyond=1.0)
    assert open_edges(faces) == 0 and vertices[:, 2].max() > center[2]


def test_every_case_of_marching_cubes_is_sealed() -> None:
    """Random signs meet all 256 cases, and all pairs of faces where corners alternate."""
    places = all_places(3, 2, 2)
    values = np.random.default_rng(1).normal(size=(len(places), SIDE, SIDE, SIDE)).astype(np.float32)
    edge = (sample_places(places) == 0) | (sample_places(places) == np.array([3, 2, 2]) * SIDE - 1)
    values[edge.any(-1)] = 1
    vertices, faces = marching_cubes(Bricks(np.zeros(3), 1.0, places, values))
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), 1)
    assert set(np.unique(edges, axis=0, return_counts=True)[1]) == {2}
    assert trimesh.Trimesh(vertices, faces, process=False).is_winding_consistent and len(faces) > 2000


def test_bricks_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="places, values"):
        Bricks(np.zeros(3), 1.0, np.zeros((2, 3), np.int64), np.zeros((1, 8, 8, 8), np.float32))
    with pytest.raises(ValueError, match="expected 0 to"):
        Bricks(np.zeros(3), 1.0, np.array([[0, -1, 0]]), np.zeros((1, 8, 8, 8), np.float32))
    assert (
        len(marching_cubes(Bricks(np.zeros(3), 1.0, np.zeros((0, 3), np.int64), np.zeros((0, 8, 8, 8), np.float32)))[1])
        == 0
    )


def test_neighbours_of_bricks() -> None:
    places = np.array([[0, 0, 0], [5, 1, 2], [0, 0, 0]])
    assert unique_places(places).tolist() == [[0, 0, 0], [5, 1, 2]]
    near = grown(places[:1], np.array([5, 5, 5]))
    assert len(near) == 8 and near.max() == 1
    assert len(grown(places[1:2], np.array([5, 5, 5]))) == 18  # the box ends there


def sphere_views(count: int = 24, *, noise: float = 0.0) -> list[View]:
    """A sphere as oblong cameras see it that are turned about their axes; its colour is its normal's."""
    torch.manual_seed(0)
    K = torch.tensor([[150.0, 0, 51], [0, 130, 40], [0, 0, 1]])
    views = []
    for number in range(count):
        height = 1 - 2 * (number + 0.5) / count
        turn = number * math.pi * (3 - math.sqrt(5))
        direction = torch.tensor(
            [math.sqrt(1 - height**2) * math.cos(turn), math.sqrt(1 - height**2) * math.sin(turn), height]
        )
        forward = -direction
        right = torch.linalg.cross(torch.tensor([0.3, 0.5, 0.8]), forward)
        right = right / right.norm()
        spin = torch.tensor(0.7 * number)
        x = spin.cos() * right + spin.sin() * torch.linalg.cross(forward, right)
        camtoworld = torch.eye(4)
        camtoworld[:3, :3] = torch.stack([x, torch.linalg.cross(forward, x), forward], 1)
        camtoworld[:3, 3] = torch.from_numpy(CENTER).float() + 3 * direction
        camera = Cameras.from_camtoworlds(camtoworld[None], K[None], 96, 72)
        row, column = torch.meshgrid(torch.arange(72), torch.arange(96), indexing="ij")
        pixels = torch.stack([torch.zeros_like(row), column, row], -1).view(-1, 3)
        origins, dirs = camera.rays(pixels)
        offset = origins - torch.from_numpy(CENTER).float()
        b = (offset * dirs).sum(-1)
        root = b * b - (offset * offset).sum(-1) + RADIUS**2
        t = torch.where(root > 0, -b - root.clamp(min=0).sqrt(), 0)
        z = t * (dirs @ camera.viewmats[0, 2, :3])
        normals = (offset + t[:, None] * dirs) / RADIUS
        rgb = torch.where(root[:, None] > 0, 0.5 + 0.5 * normals, 0)
        z = z * (1 + noise * torch.randn_like(z))
        views.append(View(camera, z.view(72, 96), (255 * rgb.view(72, 96, 3)).round().to(torch.uint8)))
    return views


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_sphere_comes_back_from_depths(noise: float) -> None:
    views = sphere_views(noise=noise)
    box = np.stack([CENTER - [0.9, 0.8, 1.0], CENTER + [0.8, 0.9, 1.1]])
    fusion = Fusion(box, 0.04, 0.16)
    fusion.allocate(views, 1 << 30)
    vertices, faces = marching_cubes(fusion.fuse(views, least_views=2))
    vertices, faces, _ = largest_parts(vertices, faces, 0.05)
    distances = np.linalg.norm(vertices - CENTER, axis=1) - RADIUS
    assert np.abs(distances).max() < 0.04 and np.abs(distances).mean() < 0.008 and abs(distances.mean()) < 0.006
    assert open_edges(faces) == 0
    assert trimesh.Trimesh(vertices, faces, process=False).volume == pytest.approx(
        4 / 3 * math.pi * RADIUS**3, rel=0.03
    )
    colors = colors_from_views(vertices, vertex_normals(vertices, faces), views, 0.16)
    expected = 0.5 + 0.5 * (vertices - CENTER) / RADIUS
    assert np.abs(colors - expected).max() < 0.1 and np.abs(colors - expected).mean() < 0.01


def test_distances_are_along_the_rays() -> None:
    """A wall across a wide view: off the axis, a ray is longer than its z."""
    K = torch.tensor([[[20.0, 0, 20], [0, 20, 20], [0, 0, 1]]])
    view = View(Cameras(torch.eye(4)[None], K, 40, 40), torch.full((40, 40), 2.0), torch.zeros(40, 40, 3).byte())
    fusion = Fusion(np.array([[-1.5, -1.5, 1.0], [1.5, 1.5, 2.5]]), 0.1, 0.8)
    fusion.allocate([view], 1 << 30)
    bricks = fusion.fuse([view])
    xyz = bricks.origin + bricks.voxel * sample_places(bricks.places)
    expected = (2 / xyz[..., 2] - 1) * np.linalg.norm(xyz, axis=-1)
    seen = np.isfinite(bricks.values) & (np.abs(expected) < 0.7) & (np.abs(xyz[..., :2]).max(-1) < 0.9 * xyz[..., 2])
    assert seen.sum() > 1000
    np.testing.assert_allclose(0.8 * bricks.values[seen], expected[seen], atol=1e-5)


def test_points_are_where_the_camera_sees_them() -> None:
    (view,) = sphere_views(1)
    assert np.abs(np.linalg.norm(points(view).numpy() - CENTER, axis=1) - RADIUS).max() < 1e-5


def test_space_that_others_see_through_is_empty() -> None:
    """A floater before one camera goes, as others look through it, also where there is nothing behind it; seen by that camera
    alone it would stay."""
    views = sphere_views()
    views[0].depth[20:30, 30:40] = 1.2
    box = np.stack([CENTER - 2.0, CENTER + 2.0])
    fusion = Fusion(box, 0.08, 0.32)
    fusion.allocate(views, 1 << 30)
    for used, stays in ((views, False), (views[:1], True)):
        vertices, _ = marching_cubes(fusion.fuse(used))
        assert (np.linalg.norm(vertices - CENTER, axis=1) > 1.2).any() == stays


def test_fusion_refuses_what_makes_no_sense() -> None:
    box = np.array([[0.0, 0, 0], [1, 2, 3]])
    with pytest.raises(ValueError, match="voxel: expected"):
        Fusion(box, 4.0, 4.0)
    with pytest.raises(ValueError, match="truncation: expected at least a voxel"):
        Fusion(box, 0.1, 0.05)
    with pytest.raises(ValueError, match="no view sees a surface in the box"):
        Fusion(box + 50, 0.1, 0.2).allocate(sphere_views(2), 1 << 30)
    sphere = np.stack([CENTER - 1, CENTER + 1])
    with pytest.raises(ValueError, match=r"voxels of 0\.02 need more memory than 0 MiB; try 0\.\d+ or more"):
        Fusion(sphere, 0.01, 0.02).allocate(sphere_views(2), 1 << 18, unit=2.0)


class Ball(HashField):
    """A field whose density is known: exponential across the sphere; its colour is the direction it is seen along."""

    def density(self, xyz: Tensor) -> Tensor:
        assert len(xyz) <= 1 << 18
        return 50 * ((RADIUS - (xyz - torch.from_numpy(CENTER).float()).norm(dim=-1)) / 0.05).exp()

    def query(self, xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(xyz), 0.5 + 0.5 * dirs


def make_ball(*, extent: str = "box") -> Ball:
    config = FieldConfig(levels=2, log2_rows=8, coarsest=4, finest=8, occupancy=32, extent=extent)  # type: ignore[arg-type]
    aabb = torch.tensor([[-1.0, -1.1, -0.9], [1.2, 0.9, 1.0]])
    return Ball.from_points(torch.zeros(1, 3), torch.zeros(1, 3), aabb, config)


@pytest.mark.parametrize("extent", ["box", "space"])
def test_a_sphere_comes_back_from_its_density(extent: str) -> None:
    field = make_ball(extent=extent)
    box = field.grid.aabb.double().numpy()
    cells = field.grid.centers()
    near = ((cells - torch.from_numpy(CENTER).float()).norm(dim=-1) - RADIUS).abs() < 0.2
    field.grid.set_occupied(near)  # a shell: neither inside nor far out is anything asked for
    shell = make_ball(extent=extent).grid.occupied.sum() > near.sum()
    bricks = density_bricks(field, box, 0.04, 50.0, 1 << 30)
    vertices, faces = marching_cubes(bricks)
    vertices, faces, _ = largest_parts(vertices, faces, 0.9)
    assert shell and open_edges(faces) == 0
    np.testing.assert_allclose(np.linalg.norm(vertices - CENTER, axis=1), RADIUS, atol=0.002)
    normals = vertex_normals(vertices, faces)
    np.testing.assert_allclose(field_colors(field, vertices, normals), 0.5 - 0.5 * normals, atol=1e-6)
    higher = marching_cubes(density_bricks(field, box, 0.04, 50.0 * math.e, 1 << 30))[0]
    assert np.linalg.norm(higher - CENTER, axis=1).max() == pytest.approx(RADIUS - 0.05, abs=0.003)
    with pytest.raises(ValueError, match="need more memory than 0 MiB"):
        density_bricks(field, box, 0.04, 50.0, 1 << 16)


def test_a_box_that_cuts_through_is_closed() -> None:
    field = make_ball()
    box = np.stack([CENTER - 1, CENTER + [0.3, 0.8, 0.85]])
    vertices, faces = marching_cubes(density_bricks(field, box, 0.04, 50.0, 1 << 30))
    assert open_edges(faces) == 0 and vertices[:, 0].max() < box[1, 0] + 0.04
    height = RADIUS + 0.3
    volume = math.pi * height**2 * (RADIUS - height / 3)
    assert trimesh.Trimesh(vertices, faces, process=False).volume == pytest.approx(volume, rel=0.05)


def test_small_parts_go_and_the_rest_is_decimated() -> None:
    large, small = trimesh.creation.icosphere(4), trimesh.creation.icosphere(2, radius=0.05)
    vertices = np.concatenate([[[9.0, 9, 9]], small.vertices + 3, large.vertices])
    faces = np.concatenate([small.faces + 1, large.faces + 1 + len(small.vertices)])
    kept, rows, gone = largest_parts(vertices, faces, 0.01)
    assert gone == 1 and len(rows) == len(large.faces) and len(kept) == len(large.vertices)
    assert largest_parts(vertices, faces, 0.0)[2] == 0 and len(largest_parts(vertices, faces, 0.0)[1]) == len(faces)
    far = 1e6 * np.ones(3)
    fewer, rows = decimated(3 * kept + far, rows, 1000)
    assert 900 <= len(rows) <= 1000 and open_edges(rows) == 0
    assert np.abs(np.linalg.norm(fewer - far, axis=1) - 3).max() < 0.05
    assert decimated(kept, rows[:4], 4)[1].shape == (4, 3)
    assert open_edges(rows[:-1]) == 3 and open_edges(np.concatenate([rows[:-1], rows[-1:, ::-1]])) > 0
    assert len(compact(kept, np.array([[0, 1, 1], [0, 1, 2]]))[1]) == 1


def test_what_no_view_sees_takes_the_colour_next_to_it() -> None:
    view = sphere_views()[0]
    towards = (view.camera.centers[0].double().numpy() - CENTER) / 3
    positions = CENTER + RADIUS * np.stack([towards, -towards])
    colors = colors_from_views(positions, np.stack([towards, -towards]), [view], 0.1)
    np.testing.assert_allclose(colors[0], 0.5 + 0.5 * towards, atol=0.02)
    np.testing.assert_array_equal(colors[1], colors[0])  # the far side is hidden, though it lies in the picture
    hidden = colors_from_views(positions[1:], towards[None], [view], 0.1)  # turned to the camera, but behind the sphere
    np.testing.assert_array_equal(hidden, np.full((1, 3), 0.5))


def test_the_picture_of_a_mesh_is_what_rays_meet() -> None:
    sphere = trimesh.creation.icosphere(4, radius=RADIUS)
    vertices, faces = sphere.vertices + CENTER, np.asarray(sphere.faces)
    wall = np.array([[-9.0, -9, -3], [9, -9, -3], [0, 9, -3]])
    vertices, faces = np.concatenate([vertices, wall]), np.concatenate([faces, [[0, 1, 2]] + np.array(len(vertices))])
    for view in sphere_views(6):
        face, share = rasterize_faces(vertices, faces, view.camera)
        on_sphere = (face >= 0) & (face < len(faces) - 1)
        assert (on_sphere != (view.depth.numpy() > 0)).mean() < 0.01
        both = on_sphere & (view.depth.numpy() > 0)
        found = (share[both][..., None] * vertices[faces[face[both]]]).sum(1)
        expected = points(View(view.camera, view.depth * torch.from_numpy(both), view.rgb)).numpy()
        assert np.abs(found - expected).max() < 0.06 and np.abs(found - expected).mean() < 0.002
    seen = [(rasterize_faces(vertices, faces, view.camera)[0] == len(faces) - 1).any() for view in sphere_views(6)]
    assert any(seen) and not all(seen)


def test_a_cut_shows_the_inner_side() -> None:
    sphere = trimesh.creation.icosphere(4, radius=RADIUS)
    colors = np.concatenate([0.5 + 0.5 * sphere.vertices / RADIUS, np.ones((len(sphere.vertices), 1))], 1)
    mesh = MeshAsset(sphere.vertices + CENTER, np.asarray(sphere.faces), colors, up=(0.0, 0.0, 1.0))
    view = sphere_views(9)[4]
    whole = draw(mesh, view.camera, background=0.0)
    both = (whole.sum(-1) > 0) & (view.depth.numpy() > 0)
    assert np.abs(whole - view.rgb.numpy() / 255)[both].mean() < 0.02
    half = cut_open(mesh, view.camera)
    assert 0.45 < len(half) / len(mesh) < 0.55
    assert np.ptp(half.vertices[half.faces].reshape(-1, 3)[:, 2]) == pytest.approx(2 * RADIUS, rel=0.01)  # upright
    red = draw(half, view.camera, lit=True)[36, 48]
    assert red[0] > 2 * red[1] > 0 and np.ptp(draw(mesh, view.camera, lit=True)[36, 48]) == 0


def test_a_texture_has_the_colours_of_the_places_on_the_surface() -> None:
    pytest.importorskip("xatlas", reason="xatlas is not installed: pip install -e '.[meshes]'")
    from prismfield.export.meshes.texture import textured

    ball = trimesh.creation.icosphere(2, radius=1000)
    colors = np.ones((len(ball.vertices), 4))
    mesh = MeshAsset(ball.vertices + 5000, np.asarray(ball.faces), colors)
    found = textured(mesh, 256, lambda at, normals: 0.5 + 0.25 * (at - 5000) / 1000 + 0.25 * normals)
    assert found.uvs is not None and found.texture is not None and max(found.texture.shape) == 256
    np.testing.assert_allclose(found.vertices[found.faces].mean(1), mesh.vertices[mesh.faces].mean(1), atol=1e-6)
    assert found.uvs.min() >= 0 and found.uvs.max() <= 1
    height, width = found.texture.shape[:2]
    corners = found.uvs[found.faces]
    for share in (
        (1 / 3, 1 / 3, 1 / 3),
        (0.9, 0.05, 0.05),
        (0.02, 0.49, 0.49),
    ):  # near corners and edges of charts, too
        u, v = (np.array(share)[:, None] * corners).sum(1).T
        texel = found.texture[((1 - v) * height).astype(int), (u * width).astype(int)] / 255
        at = (np.array(share)[:, None] * found.vertices[found.faces]).sum(1) - 5000
        expected = 0.5 + 0.5 * at / np.linalg.norm(at, axis=1, keepdims=True)
        assert np.abs(texel - expected).max() < 0.06 and np.abs(texel - expected).mean() < 0.015


def test_normals_and_areas() -> None:
    vertices, faces = np.array([[0.0, 0, 0], [2, 0, 0], [0, 3, 0]]), np.array([[0, 1, 2]])
    np.testing.assert_array_equal(vertex_normals(vertices, faces), np.tile([0.0, 0, 1], (3, 1)))
    np.testing.assert_array_equal(areas(vertices, faces), [3.0])
