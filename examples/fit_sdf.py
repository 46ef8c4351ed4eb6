"""Fit the signed distance to a mesh: `python fit_sdf.py [--mesh armadillo.obj] [--encoding hash]`.

The mesh should be closed. Writes fit_sdf.ply, the surface that was learned, and fit_sdf.png, a picture of it; prints how far the surface
is from the mesh. Without arguments, a knot in some seconds.
"""

import argparse
import io
import os
import time
from pathlib import Path

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor, nn

from prismfield.encodings.base import ENCODINGS, EncodingConfig, make_encoding
from prismfield.encodings.mlp import Mlp
from prismfield.train.optimizer import FusedAdam

_MOST = 128  # triangles that are tried for a position


def make_knot(turns: int = 240, sides: int = 24) -> trimesh.Trimesh:
    """A trefoil of round rope."""
    u = np.arange(turns) * (2 * np.pi / turns)
    path = np.stack([np.sin(u) + 2 * np.sin(2 * u), np.cos(u) - 2 * np.cos(2 * u), -np.sin(3 * u)], -1)
    along = np.stack([np.cos(u) + 4 * np.cos(2 * u), -np.sin(u) + 4 * np.sin(2 * u), -3 * np.cos(3 * u)], -1)
    along /= np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.cross(along, [0.0, 0.0, 1.0])
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    v = np.arange(sides)[:, None] * (2 * np.pi / sides)
    rings = path[:, None] + 0.6 * (np.cos(v) * across[:, None] + np.sin(v) * np.cross(along, across)[:, None])
    i, j = np.meshgrid(np.arange(turns), np.arange(sides), indexing="ij")
    a, b, c, d = (((i + di) % turns) * sides + (j + dj) % sides for di, dj in ((0, 0), (1, 0), (1, 1), (0, 1)))
    faces = np.stack([a, b, c, a, c, d], -1).reshape(-1, 3)
    mesh = trimesh.Trimesh(rings.reshape(-1, 3), faces)
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def read_mesh(path: Path) -> trimesh.Trimesh:
    """Its triangles, points at the same place being one."""
    mesh = trimesh.load(path, force="mesh", process=False)
    if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
        raise ValueError(f"{path}: expected a mesh of triangles, got none")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    mesh.update_faces(mesh.nondegenerate_faces())
    return mesh


def to_unit_cube(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """With a tenth of the cube left free at each end of the longest side."""
    low, high = mesh.bounds
    return trimesh.Trimesh(
        (mesh.vertices - (low + high) / 2) * (0.8 / (high - low).max()) + 0.5, mesh.faces, process=False
    )


class Distance:
    """Signed distances to a closed mesh, negative inside.

    Triangles are tried in the order of their centres, until what is left is too far away, or a position so far from the mesh that
    it hardly matters which of many it takes: the distance is then too large by less than the size of a triangle. The sign is that of the angle to the
    pseudonormal of the nearest face, edge or vertex (Baerentzen and Aanaes 2005), which for closed meshes is never wrong.
    """

    def __init__(self, mesh: trimesh.Trimesh) -> None:
        self.corners = np.asarray(mesh.triangles, np.float64)  # [F, 3, 3]
        centers = self.corners.mean(1)
        self.tree = cKDTree(centers)
        self.reach = float(np.linalg.norm(self.corners - centers[:, None], axis=-1).max())
        normals = np.asarray(mesh.face_normals)
        sides = np.roll(self.corners, -1, 1) - self.corners
        sides /= np.linalg.norm(sides, axis=-1, keepdims=True).clip(1e-12)
        angles = np.arccos(-(sides * np.roll(sides, 1, 1)).sum(-1).clip(-1, 1))
        at_vertices = np.zeros_like(mesh.vertices)
        np.add.at(at_vertices, mesh.faces, angles[..., None] * normals[:, None])
        edges = np.sort(np.stack([mesh.faces, np.roll(mesh.faces, -1, 1)], -1), -1).reshape(-1, 2)
        _, edge = np.unique(edges, axis=0, return_inverse=True)
        at_edges = np.zeros((edge.max() + 1, 3))
        np.add.at(at_edges, edge.reshape(-1, 3), normals[:, None])
        # [F, 7, 3]: of the corners, of the edges behind each, and of the face
        self.normals = np.concatenate([at_vertices[mesh.faces], at_edges[edge.reshape(-1, 3)], normals[:, None]], 1)

    def __call__(self, points: NDArray) -> NDArray[np.float32]:
        """[S] of points [S, 3]."""
        found, left, tried = np.empty(len(points)), np.arange(len(points)), 8
        while len(left):
            tried = min(tried, len(self.corners), _MOST)
            unsure = []
            for part in np.array_split(left, 1 + len(left) * tried // 2**19):
                gaps, faces = self.tree.query(points[part], tried)
                found[part] = self._nearest(points[part], faces.reshape(len(part), -1))
                unsure.append(part[np.abs(found[part]) > gaps.reshape(len(part), -1)[:, -1] - self.reach])
            if tried in (len(self.corners), _MOST):
                break
            left, tried = np.concatenate(unsure), 4 * tried
        return found.astype(np.float32)

    def _nearest(self, points: NDArray, faces: NDArray) -> NDArray:
        """[S] to the nearest of faces [S, K]."""
        a, b, c = np.moveaxis(self.corners[faces], 2, 0)
        normal = self.normals[faces, 6]
        p = points[:, None] - a
        offset = (p * normal).sum(-1)
        # Nearest points on the three edges, and straight below
        best, feature = (
            np.where(self._is_above(p, b - a, c - a, normal), np.abs(offset), np.inf),
            np.full(faces.shape, 6),
        )
        for number, (start, end) in enumerate(((a, b), (b, c), (c, a))):
            along, to_point = end - start, points[:, None] - start
            t = (to_point * along).sum(-1) / (along * along).sum(-1).clip(1e-30)
            distance = np.linalg.norm(to_point - t.clip(0, 1)[..., None] * along, axis=-1)
            kind = np.where(t <= 0, number, np.where(t >= 1, (number + 1) % 3, 3 + number))
            feature = np.where(distance < best, kind, feature)
            best = np.minimum(best, distance)
        rows, chosen = np.arange(len(points)), best.argmin(1)
        face, feature = faces[rows, chosen], feature[rows, chosen]
        anchor = self.corners[face, np.where(feature < 6, feature % 3, 0)]
        sign = ((points - anchor) * self.normals[face, feature]).sum(-1)
        return np.where(sign < 0, -1, 1) * best[rows, chosen]

    @staticmethod
    def _is_above(p: NDArray, ab: NDArray, ac: NDArray, normal: NDArray) -> NDArray[np.bool_]:
        """Whether the foot of the perpendicular lies in the triangle."""
        v = (np.cross(p, ac) * normal).sum(-1)
        w = (np.cross(ab, p) * normal).sum(-1)
        return (v >= 0) & (w >= 0) & (v + w <= (np.cross(ab, ac) * normal).sum(-1))


def draw_samples(mesh: trimesh.Trimesh, exact: Distance, count: int) -> tuple[Tensor, Tensor]:
    """Points [S, 3] and their distances [S]: near the surface, and a few all over the cube."""
    random = np.random.default_rng(0)
    near, _ = trimesh.sample.sample_surface(mesh, count, seed=0)
    width = np.where(np.arange(count) % 2, 0.005, 0.03)[:, None]
    points = np.concatenate([near + width * random.normal(size=near.shape), random.random((count // 4, 3))])
    return torch.from_numpy(points.astype(np.float32)), torch.from_numpy(exact(points))


def fit(points: Tensor, distances: Tensor, encoding: str, config: EncodingConfig, steps: int, batch: int) -> nn.Module:
    """A network of positions that gives distances."""
    torch.manual_seed(0)
    code = make_encoding(encoding, 3, config)
    model = nn.Sequential(code, Mlp(code.out_dim, 1, width=64, hidden=2))
    rates = {"0": 5e-3, "1": 2e-3}  # features see fewer samples each than weights
    groups = [{"name": name, "params": [p], "lr": rates[name[0]]} for name, p in model.named_parameters()]
    highest = [group["lr"] for group in groups]
    optimizer = FusedAdam(groups, betas=(0.9, 0.99))
    began = time.perf_counter()
    for step in range(steps):
        drawn = torch.randint(len(points), (batch,))
        wanted = distances[drawn]
        error = (model(points[drawn])[:, 0] - wanted).abs()
        loss = (error / (wanted.abs() + 0.01)).mean()  # what is near the surface counts most, Instant NGP, section 5.2
        optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * 0.03 ** (step / steps)
        optimizer.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            print(f"step {step + 1}: off by {error.mean().item():.5f}, {time.perf_counter() - began:.1f} s")
    return model


def evaluate(model: nn.Module, points: Tensor) -> Tensor:
    """[S] distances at points [S, 3]."""
    with torch.no_grad():
        return torch.cat([model(part)[:, 0] for part in points.split(2**16)])


def extract(model: nn.Module, resolution: int) -> trimesh.Trimesh:
    """The surface where the distance is 0, by marching tetrahedra: six of each cube of a regular lattice, around its diagonal."""
    side = resolution + 1
    index = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), -1).view(-1, 3)
    values = evaluate(model, index / resolution).numpy()
    stride = np.array([side * side, side, 1])
    inside = (values < 0).reshape(side, side, side)
    corners = [inside[x : x + resolution, y : y + resolution, z : z + resolution] for x, y, z in np.ndindex(2, 2, 2)]
    count = sum(c.astype(np.int8) for c in corners)
    base = np.argwhere((count > 0) & (count < 8)) @ stride
    axes = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]])  # the last three: mirrored
    steps = np.concatenate([np.zeros((6, 1), np.int64), stride[axes].cumsum(1)], 1)
    steps[3:] = steps[3:, [1, 0, 2, 3]]  # all of one handedness
    tetrahedra = (base[:, None, None] + steps).reshape(-1, 4)
    below = values[tetrahedra] < 0
    # Vertices in the order that leaves handedness as it is; then the edges of a triangle
    triangles = []
    for lone in range(4):
        a, b, c, d = [(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)][lone]
        others = below[:, [b, c, d]]
        for case, order in ((below[:, a] & ~others.any(1), (b, c, d)), (~below[:, a] & others.all(1), (b, d, c))):
            t = tetrahedra[case]
            triangles.append(np.stack([t[:, [a, e]] for e in order], 1))
    for a, b, c, d in ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (2, 3, 0, 1), (3, 1, 0, 2), (1, 2, 0, 3)):
        t = tetrahedra[below[:, a] & below[:, b] & ~below[:, c] & ~below[:, d]]
        triangles += [
            np.stack([t[:, e] for e in edges], 1) for edges in (([a, c], [a, d], [b, d]), ([a, c], [b, d], [b, c]))
        ]
    edges, faces = np.unique(np.sort(np.concatenate(triangles).reshape(-1, 2), -1), axis=0, return_inverse=True)
    low, high = values[edges[:, 0]], values[edges[:, 1]]
    start, end = index.numpy()[edges[:, 0]], index.numpy()[edges[:, 1]]
    points = (start + (low / (low - high))[:, None] * (end - start)) / resolution
    return trimesh.Trimesh(points, faces.reshape(-1, 3), process=False)


def picture(model: nn.Module, size: int) -> NDArray[np.uint8]:
    """[size, size, 3]: spheres traced along parallel rays, shaded by the slope of the distance."""

    def distance(at: Tensor) -> Tensor:
        inner = at.clamp(0, 1)  # what was learned; outside, the way to the cube comes on top
        return evaluate(model, inner) + (at - inner).norm(dim=-1)

    eye = nn.functional.normalize(torch.tensor([0.5, 0.35, 1.0]), dim=0)
    right = nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), eye), dim=0)
    up = torch.linalg.cross(eye, right)
    rows, columns = torch.meshgrid(*[(torch.arange(size) + 0.5) / size - 0.5] * 2, indexing="ij")
    x = (0.5 + 0.9 * eye + 1.25 * (columns[..., None] * right - rows[..., None] * up)).view(-1, 3)
    t = torch.zeros(len(x))
    last = distance(x)
    for _ in range(80):
        alive = ((last > 1e-4) & (t < 1.8)).nonzero()[:, 0]
        before, step = last[alive], 0.9 * last[alive]
        now = distance(x[alive] - (t[alive] + step)[:, None] * eye)
        # A step through the surface ends where a straight line between its ends is 0
        t[alive] += torch.where(now < 0, before / (before - now), 1) * step
        last[alive] = now.clamp(min=0)
    hit = (last < 1e-3) & (t < 1.8)
    at = x[hit] - t[hit, None] * eye
    slopes = [evaluate(model, at + step) - evaluate(model, at - step) for step in torch.eye(3) / 96]
    normals = nn.functional.normalize(torch.stack(slopes, -1), dim=-1)
    light = nn.functional.normalize(eye + 0.8 * up - 0.6 * right, dim=0)
    shade = 0.15 + 0.85 * (normals @ light).clamp(min=0)
    image = torch.ones(size * size, 3)
    image[hit] = shade[:, None] * torch.tensor([0.95, 0.75, 0.5])
    return (image.view(size, size, 3).numpy() ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=Path, help="closed, in a format that trimesh reads; a knot without it")
    parser.add_argument("--encoding", choices=[name for name in ENCODINGS if name != "sh"], default="hash")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=2**13, help="positions a step")
    parser.add_argument("--samples", type=int, default=3 * 2**14, help="positions whose distance is computed")
    parser.add_argument("--log2-rows", type=int, default=14, help="rows of the largest table, a power of two")
    parser.add_argument("--finest", type=int, default=64, help="cells along the cube of the last level")
    parser.add_argument("--resolution", type=int, default=96, help="cubes along the cube of the mesh that is written")
    parser.add_argument("--size", type=int, default=256, help="pixels along the picture that is written")
    parser.add_argument("--out", type=Path, default=Path("fit_sdf"), help="name of both, without an ending")
    options = parser.parse_args()
    try:
        mesh = to_unit_cube(read_mesh(options.mesh) if options.mesh else make_knot())
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    exact = Distance(mesh)
    points, distances = draw_samples(mesh, exact, options.samples)
    print(f"{len(mesh.faces):,} triangles, {len(points):,} distances")
    config = EncodingConfig(levels=8, log2_rows=options.log2_rows, coarsest=8, finest=options.finest, octaves=5)
    model = fit(points, distances, options.encoding, config, options.steps, options.batch)
    surface = extract(model, options.resolution)
    if not len(surface.faces):
        parser.exit(1, f"error: {options.encoding}: no surface was learned: try more --steps\n")
    image = io.BytesIO()
    Image.fromarray(picture(model, options.size)).save(image, "PNG")
    names = []
    for ending, content in ((".ply", surface.export(file_type="ply")), (".png", image.getvalue())):
        names.append(options.out.with_name(options.out.name + ending))
        partial = names[-1].with_name(names[-1].name + ".partial")
        partial.write_bytes(content)
        os.replace(partial, names[-1])
    off = np.abs(exact(trimesh.sample.sample_surface(surface, 4096, seed=0)[0])) * 100
    print(
        f"{options.encoding}: on average {off.mean():.3f} % of the cube's side off, {off.max():.3f} % at most; {names[0]}, {names[1]}"
    )


if __name__ == "__main__":
    main()
