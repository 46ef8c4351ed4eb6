"""A mesh drawn without a GPU or a display: beside the scene's render, and cut open."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from prismfield.export import library
from prismfield.export.library import Scene
from prismfield.export.meshes.files import MeshAsset
from prismfield.export.meshes.views import rings_round
from prismfield.render.cameras import Cameras

_AT_ONCE = 1 << 21  # pixels
_NEAR = 1e-6  # of the mesh's width
_INNER = np.array([0.80, 0.36, 0.30])  # of faces seen from inside
_LEAST_LIGHT = 0.25
_GAP = 4  # pixels between pictures

Picture = NDArray[np.float64]


def four_pictures(scene: Scene, mesh: MeshAsset, number: int = 0) -> Picture:
    """The scene's render, the mesh in its colours, the mesh in grey, and the mesh cut open, as one camera sees them.

    Args:
        scene: what the mesh was made of.
        mesh: in the user's frame.
        number: of the camera: of the training's photographs, or on rings round a scene that has none.

    Returns:
        [2 H + 4, 2 W + 4, 3] 0..1: render and colours above, grey and cut-away below. Inner sides are red.

    Raises:
        FileNotFoundError: the capture is not there any more.
        ValueError: there is no such camera.
    """
    cameras = scene.cameras("train") if scene.has_cameras else rings_round(scene)
    if not 0 <= number < len(cameras):
        raise ValueError(f"--view: expected 0 to {len(cameras) - 1}, got {number}")
    camera, background = cameras[number], scene.background
    with torch.no_grad():
        render = library.render(scene, camera).rgb[0].clamp(0, 1).double().cpu().numpy()
    grey, opened = (draw(m, camera, lit=True, background=background) for m in (mesh, cut_open(mesh, camera)))
    rows = [[render, draw(mesh, camera, background=background)], [grey, opened]]
    beside = [np.concatenate([row[0], np.ones((len(render), _GAP, 3)), row[1]], 1) for row in rows]
    return np.concatenate([beside[0], np.ones((_GAP, beside[0].shape[1], 3)), beside[1]])


def draw(mesh: MeshAsset, camera: Cameras, *, lit: bool = False, background: float = 0.0) -> Picture:
    """[H, W, 3] 0..1: its colours as they are, or grey as a lamp at the camera lights it.

    Inner sides of faces are red. Faces that reach behind the camera are left out.
    """
    face, share = rasterize_faces(mesh.vertices, mesh.faces, camera)
    hit = face >= 0
    corners = mesh.faces[face[hit]]
    a, b, c = (mesh.vertices[corners[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)
    towards = camera.centers[0].double().numpy() - a
    facing = (normals * towards).sum(1) / np.maximum(np.linalg.norm(towards, axis=1), 1e-300)
    if lit:
        shown = np.full((len(corners), 3), 0.85)
    elif mesh.texture is not None and mesh.uvs is not None:
        uv = (share[hit][..., None] * mesh.uvs[corners]).sum(1)
        height, width = mesh.texture.shape[:2]
        at = (
            ((1 - uv[:, 1]) * height).astype(int).clip(0, height - 1),
            (uv[:, 0] * width).astype(int).clip(0, width - 1),
        )
        shown = mesh.texture[at] / 255
    else:
        shown = (share[hit][..., None] * mesh.colors[corners, :3]).sum(1)
    shown = np.where(facing[:, None] < 0, _INNER, shown)
    if lit:
        shown = shown * (_LEAST_LIGHT + (1 - _LEAST_LIGHT) * np.abs(facing))[:, None]
    picture = np.full((camera.height, camera.width, 3), background)
    picture[hit] = shown
    return picture


def cut_open(mesh: MeshAsset, camera: Cameras) -> MeshAsset:
    """Without the half that is nearer to the camera: faces before an upright plane through the middle of the box round it."""
    middle = 0.5 * (mesh.vertices.min(0) + mesh.vertices.max(0))
    up = np.array(mesh.up or (0, -1, 0)) / np.linalg.norm(mesh.up or (0, -1, 0))
    towards = camera.centers[0].double().numpy() - middle
    level = towards - (towards @ up) * up
    plane = level if np.linalg.norm(level) > 0.1 * np.linalg.norm(towards) else towards
    behind = (mesh.vertices[mesh.faces].mean(1) - middle) @ plane <= 0
    return replace(mesh, faces=mesh.faces[behind])


def rasterize_faces(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], camera: Cameras
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest face at the centre of each pixel.

    Returns:
        The number of the face [H, W], -1 where there is none, and the shares of its corners there [H, W, 3], true to
        perspective.
    """
    viewmat, K = camera.viewmats[0].double().numpy(), camera.Ks[0].double().numpy()
    local = vertices @ viewmat[:3, :3].T + viewmat[:3, 3]
    near = _NEAR * max(float(np.ptp(vertices, 0).max(initial=0.0)), 1e-30)
    front = np.nonzero((local[faces, 2] > near).all(1))[0]
    z = local[:, 2].clip(min=near)
    uv = local[:, :2] / z[:, None] * K[[0, 1], [0, 1]] + K[:2, 2]
    face, shares = rasterize_triangles(uv[faces[front]], z[faces[front]], camera.width, camera.height)
    return np.where(face >= 0, np.append(front, -1)[face], -1), shares


def rasterize_triangles(
    corners: NDArray[np.float64], depths: NDArray[np.float64], width: int, height: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest triangle at the centre of each pixel.

    Args:
        corners: [F, 3, 2] pixels, from the upper left.
        depths: [F, 3] of the corners, positive.
        width: pixels.
        height: pixels.

    Returns:
        As `rasterize_faces`.
    """
    size = np.array([width, height])
    low = (
        np.ceil(corners.min(1, initial=np.inf) - 0.5).clip(0, size).astype(np.int64)
    )  # first pixel centre in the box of each
    high = (np.floor(corners.max(1, initial=-np.inf) - 0.5) + 1).clip(0, size).astype(np.int64)
    spans = (high - low).clip(min=0)
    counts = spans[:, 0] * spans[:, 1]
    depth = np.full(width * height, np.inf)
    winner = np.full(len(depth), -1, np.int64)
    shares = np.zeros((len(depth), 3))
    order = np.nonzero(counts)[0]
    ends = np.cumsum(counts[order])
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        some = order[start:stop]
        row = np.repeat(some, counts[some])
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts[some]) - counts[some], counts[some])
        x, y = low[row, 0] + number % spans[row, 0], low[row, 1] + number // spans[row, 0]
        flat = _shares(corners[row], np.stack([x, y], 1) + 0.5)
        true = flat / depths[row]  # shares over depth are what is linear on the screen
        total = true.sum(1)
        inside = (flat >= 0).all(1) & (total > 0)
        at, far = (y * width + x)[inside], 1 / total[inside]
        np.minimum.at(depth, at, far)
        first = far == depth[at]
        winner[at[first]] = row[inside][first]
        shares[at[first]] = (true[inside] / total[inside, None])[first]
        start = stop
    return winner.reshape(height, width), shares.reshape(height, width, 3)


def _shares(corners: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P, 3] barycentric coordinates on the screen of points `at` [P, 2] in triangles [P, 3, 2]; negative outside, and for
    triangles seen edge on."""
    a, b, c = (corners[:, i] for i in range(3))
    area = _cross(b - a, c - a)
    parts = np.stack([_cross(c - b, at - b), _cross(a - c, at - c), _cross(b - a, at - a)], 1)
    found: NDArray[np.float64] = np.where(area[:, None] == 0, -1.0, parts / np.where(area == 0, 1, area)[:, None])
    return found


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
