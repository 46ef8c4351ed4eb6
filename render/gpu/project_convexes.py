"""Projection of smooth convexes on a GPU, forward and backward: a convex a lane, the maths of `csrc/project_convexes.cpp`.

Each lane goes round its hull, from a corner to the next: K times K turns, in a loop, where the K^3 / 6 of `csrc/hull.h` in registers
would take minutes to compile. As in `project.py`, the forward pass is a program a block and camera, and the backward pass goes
through the cameras inside the program. It goes round again to know which point each corner is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.gpu.vectors import (
    add,
    keep,
    load3,
    load_pose,
    scaled,
    store3,
    store_sums,
    transform,
    transform_vjp,
)
from prismfield.render.ops.constants import ALPHA_MIN, NEAR
from prismfield.render.ops.project_convexes import MAX_EXTENT, MIN_THICKNESS

BLOCK = 128
_ALPHA_MIN, _NEAR = tl.constexpr(ALPHA_MIN), tl.constexpr(NEAR)
_MAX_EXTENT, _MIN_THICKNESS = tl.constexpr(MAX_EXTENT), tl.constexpr(MIN_THICKNESS)


@triton.jit
def _first_corner(x, y, K: tl.constexpr):
    """Of K points the one of least x, or y if there are several: x, y, which it is, and that the way round is not over."""
    first_x, first_y, first = x[0], y[0], tl.zeros(x[0].shape, tl.int32)
    for k in tl.static_range(1, K):
        sooner = (x[k] < first_x) | ((x[k] == first_x) & (y[k] < first_y))
        first_x, first_y = tl.where(sooner, x[k], first_x), tl.where(sooner, y[k], first_y)
        first = tl.where(sooner, k, first)
    return first_x, first_y, first, first < 0


@triton.jit
def _next_corner(x, y, corner, first, K: tl.constexpr):
    """The corner after `corner`, counter-clockwise where y points up: the point with all others to the left of the way there, the
    farthest if there are several. Once round it stays at the first."""
    next_x, next_y, which = corner[0], corner[1], corner[2]
    far_x, far_y, far = tl.zeros_like(next_x), tl.zeros_like(next_x), tl.zeros_like(next_x)
    for k in tl.static_range(K):
        to_x, to_y = x[k] - corner[0], y[k] - corner[1]
        turn, squared = far_x * to_y - far_y * to_x, to_x * to_x + to_y * to_y
        better = (turn < 0) | ((turn == 0) & (squared > far))
        next_x, next_y, which = (
            tl.where(better, x[k], next_x),
            tl.where(better, y[k], next_y),
            tl.where(better, k, which),
        )
        far_x, far_y, far = tl.where(better, to_x, far_x), tl.where(better, to_y, far_y), tl.where(better, squared, far)
    closed = corner[3] | ((next_x == first[0]) & (next_y == first[1]))
    next_x, next_y = tl.where(closed, first[0], next_x), tl.where(closed, first[1], next_y)
    return next_x, next_y, tl.where(closed, first[2], which), closed


@triton.jit
def _hull(x, y, K: tl.constexpr):
    """Corners of the convex hull of K points in the order of `hull_order` of ops/project_convexes.py, then the first again: tuples of
    x and of y, and how many there are."""
    first = _first_corner(x, y, K)
    hull_x, hull_y, corner, corners = (), (), first, tl.full(first[2].shape, 1, tl.int32)
    for _ in tl.static_range(K):
        hull_x += (first[0],)
        hull_y += (first[1],)
    for slot in range(1, K):
        corner = _next_corner(x, y, corner, first, K)
        corners += tl.where(corner[3], 0, 1)
        placed_x, placed_y = (), ()
        for k in tl.static_range(K):
            placed_x += (tl.where(slot == k, corner[0], hull_x[k]),)
            placed_y += (tl.where(slot == k, corner[1], hull_y[k]),)
        hull_x, hull_y = placed_x, placed_y
    return (hull_x, hull_y), corners


@triton.jit
def _hull_vjp(x, y, v_corners, drawn, K: tl.constexpr, ROOM: tl.constexpr):
    """Gradients of the points relative to the centre, tuples of x and of y, from those of the corners that `v_corners` points to;
    and the sums of each."""
    corner = _first_corner(x, y, K)
    first, v_x, v_y = corner, (), ()
    sum_x, sum_y = tl.load(v_corners, mask=drawn, other=0.0), tl.load(v_corners + 1, mask=drawn, other=0.0)
    for slot in tl.static_range(K, ROOM):  # the first again
        sum_x += tl.load(v_corners + 2 * slot, mask=drawn, other=0.0)
        sum_y += tl.load(v_corners + 2 * slot + 1, mask=drawn, other=0.0)
    for k in tl.static_range(K):
        v_x += (tl.where(first[2] == k, sum_x, 0.0),)
        v_y += (tl.where(first[2] == k, sum_y, 0.0),)
    for slot in range(1, K):
        corner = _next_corner(x, y, corner, first, K)
        here_x = tl.load(v_corners + 2 * slot, mask=drawn, other=0.0)
        here_y = tl.load(v_corners + 2 * slot + 1, mask=drawn, other=0.0)
        more_x, more_y = (), ()
        for k in tl.static_range(K):
            more_x += (v_x[k] + tl.where(corner[2] == k, here_x, 0.0),)
            more_y += (v_y[k] + tl.where(corner[2] == k, here_y, 0.0),)
        v_x, v_y, sum_x, sum_y = more_x, more_y, sum_x + here_x, sum_y + here_y
    return v_x, v_y, sum_x, sum_y


@triton.jit
def _load_camera(viewmats, Ks, camera):
    """The pose, (fx, fy), (cx, cy), and the geometric mean of the focal lengths: scalars."""
    first = Ks + 9 * camera
    fx, fy = tl.load(first), tl.load(first + 4)
    return load_pose(viewmats, camera), (fx, fy), (tl.load(first + 2), tl.load(first + 5)), tl.sqrt(fx * fy)


@triton.jit
def _to_screen(points, at, exists, camera, K: tl.constexpr):
    """Of each point, tuples of its place in the camera, 1 / z, and its pixel relative to the centre; then the centre and mean z."""
    pose, focal, center = camera[0], camera[1], camera[2]
    placed, inverses, x, y = (), (), (), ()
    for k in tl.static_range(K):
        placed += (add(transform(pose[0], load3(points + 3 * k, at * K, exists)), pose[1]),)
        inverses += (1.0 / placed[k][2],)
        x += (placed[k][0] * inverses[k] * focal[0] + center[0],)
        y += (placed[k][1] * inverses[k] * focal[1] + center[1],)
    mean_x, mean_y, mean_z = x[0], y[0], placed[0][2]
    for k in tl.static_range(1, K):
        mean_x += x[k]
        mean_y += y[k]
        mean_z += placed[k][2]
    mean_x, mean_y, mean_z = mean_x * (1.0 / K), mean_y * (1.0 / K), mean_z * (1.0 / K)
    relative_x, relative_y = (), ()
    for k in tl.static_range(K):
        relative_x += (x[k] - mean_x,)
        relative_y += (y[k] - mean_y,)
    return placed, inverses, relative_x, relative_y, (mean_x, mean_y, mean_z)


@triton.jit
def _edges(hull, K: tl.constexpr):
    """Of each edge its normal and whether it exists; then the hull's area and perimeter."""
    normals, area, perimeter = (), tl.zeros_like(hull[0][0]), tl.zeros_like(hull[0][0])
    for i in tl.static_range(K):
        x, y, to_x, to_y = hull[0][i], hull[1][i], hull[0][(i + 1) % K], hull[1][(i + 1) % K]
        edge_x, edge_y = to_x - x, to_y - y
        squared = edge_x * edge_x + edge_y * edge_y
        length = tl.sqrt(squared)
        inverse = tl.where(squared > 0, 1.0 / length, 0.0)
        normals += ((edge_y * inverse, -edge_x * inverse, squared > 0),)
        area += (x * to_y - y * to_x) * 0.5
        perimeter += length
    return normals, area, perimeter


@triton.jit
def _reach(hull, normals, margin, K: tl.constexpr):
    """Extent of the outline of `gpu/primitives.py` relative to the centre: low and high x and y."""
    last_x, last_y = normals[0][0], normals[0][1]
    for i in tl.static_range(1, K):
        last_x, last_y = tl.where(normals[i][2], normals[i][0], last_x), tl.where(normals[i][2], normals[i][1], last_y)
    low_x, low_y = tl.full(margin.shape, 1e30, tl.float32), tl.full(margin.shape, 1e30, tl.float32)
    high_x, high_y = tl.full(margin.shape, -1e30, tl.float32), tl.full(margin.shape, -1e30, tl.float32)
    for i in tl.static_range(K):
        normal_x, normal_y, exists = normals[i][0], normals[i][1], normals[i][2]
        shift = margin / tl.maximum(last_x * normal_x + last_y * normal_y + 1.0, 1e-12)
        x, y = hull[0][i] + shift * (last_x + normal_x), hull[1][i] + shift * (last_y + normal_y)
        low_x, high_x = tl.where(exists, tl.minimum(low_x, x), low_x), tl.where(exists, tl.maximum(high_x, x), high_x)
        low_y, high_y = tl.where(exists, tl.minimum(low_y, y), low_y), tl.where(exists, tl.maximum(high_y, y), high_y)
        last_x, last_y = normal_x, normal_y
    return low_x, high_x, low_y, high_y


@triton.jit
def _project_convexes_forward_kernel(
    points,
    deltas,
    sigmas,
    opacities,
    viewmats,
    Ks,
    params,
    depths,
    radii,
    count,
    width,
    height,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PARAMS: tl.constexpr = 2 * ROOM + 5
    at, index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    exists = at < count
    camera = _load_camera(viewmats, Ks, index)
    sigma, opacity = tl.load(sigmas + at, mask=exists, other=0.0), tl.load(opacities + at, mask=exists, other=0.0)
    placed, _, relative_x, relative_y, center = _to_screen(points, at, exists, camera, K)
    hull, corners = _hull(relative_x, relative_y, K)
    x, y, depth = center
    delta = tl.load(deltas + at, mask=exists, other=0.0) * depth / camera[3]
    level = tl.log(tl.maximum(opacity * (1.0 / _ALPHA_MIN) - 1.0, 1.0))
    edges = _edges(hull, K)
    low_x, high_x, low_y, high_y = _reach(hull, edges[0], level / (sigma * delta), K)
    radius_x, radius_y = tl.maximum(-low_x, high_x), tl.maximum(-low_y, high_y)
    drawn = exists & (opacity > _ALPHA_MIN) & (corners > 2) & (edges[1] > edges[2] * edges[2] * _MIN_THICKNESS)
    for k in tl.static_range(K):
        drawn = drawn & (placed[k][2] > _NEAR)
    drawn = drawn & (x + high_x > 0) & (x + low_x < width) & (y + high_y > 0) & (y + low_y < height)
    # Phrased so that NaN fails them
    drawn = drawn & (tl.abs(x) + radius_x < _MAX_EXTENT) & (tl.abs(y) + radius_y < _MAX_EXTENT)
    drawn = drawn & (delta < 1e30) & (sigma < 1e30)
    seen = index * count + at
    row = params + seen * PARAMS
    tl.store(row, tl.where(drawn, x, 0.0), mask=exists)
    tl.store(row + 1, tl.where(drawn, y, 0.0), mask=exists)
    for slot in tl.static_range(ROOM):
        tl.store(row + 2 + 2 * slot, tl.where(drawn, hull[0][slot if slot < K else 0], 0.0), mask=exists)
        tl.store(row + 3 + 2 * slot, tl.where(drawn, hull[1][slot if slot < K else 0], 0.0), mask=exists)
    store3(row + PARAMS - 3, 0, keep(drawn, (delta, sigma, opacity)), exists)
    tl.store(radii + 2 * seen, tl.where(drawn, radius_x, 0.0), mask=exists)
    tl.store(radii + 2 * seen + 1, tl.where(drawn, radius_y, 0.0), mask=exists)
    tl.store(depths + seen, tl.where(drawn, depth, 0.0), mask=exists)


@triton.jit
def _to_screen_vjp(screen, v_pixels, v_center, v_mean_z, camera, drawn, K: tl.constexpr):
    """Gradients of the points, in the camera, from those of their pixels relative to the centre, of the centre and of mean z."""
    v_placed = ()
    for k in tl.static_range(K):
        place, inverse = screen[0][k], screen[1][k]
        v_x = (v_pixels[0][k] + v_center[0] * (1.0 / K)) * inverse * camera[1][0]
        v_y = (v_pixels[1][k] + v_center[1] * (1.0 / K)) * inverse * camera[1][1]
        v_z = v_mean_z * (1.0 / K) - (v_x * place[0] + v_y * place[1]) * inverse
        v_placed += (keep(drawn, (v_x, v_y, v_z)),)
    return v_placed


@triton.jit
def _store_pose_gradient(v_pose, points, at, drawn, v_placed, K: tl.constexpr):
    """Rows of the rotation's gradient, summed over the block, and the translation's."""
    point = load3(points, at * K, drawn)
    v_translation = v_placed[0]
    v_first, v_second, v_third = (
        scaled(point, v_placed[0][0]),
        scaled(point, v_placed[0][1]),
        scaled(point, v_placed[0][2]),
    )
    for k in tl.static_range(1, K):
        point = load3(points + 3 * k, at * K, drawn)
        v_translation = add(v_translation, v_placed[k])
        v_first = add(v_first, scaled(point, v_placed[k][0]))
        v_second = add(v_second, scaled(point, v_placed[k][1]))
        v_third = add(v_third, scaled(point, v_placed[k][2]))
    store_sums(v_pose, v_first)
    store_sums(v_pose + 3, v_second)
    store_sums(v_pose + 6, v_third)
    store_sums(v_pose + 9, v_translation)


@triton.jit
def _project_convexes_backward_kernel(
    points,
    deltas,
    viewmats,
    Ks,
    radii,
    v_params,
    v_depths,
    v_points,
    v_deltas,
    v_sigmas,
    v_opacities,
    v_poses,
    count,
    cameras,
    CAMERA_GRADIENT: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PARAMS: tl.constexpr = 2 * ROOM + 5
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    exists = at < count
    delta = tl.load(deltas + at, mask=exists, other=0.0)
    zero = tl.zeros([BLOCK], tl.float32)
    v_delta, v_sigma, v_opacity, v_world = zero, zero, zero, ()
    for _ in tl.static_range(K):
        v_world += ((zero, zero, zero),)
    seen = at  # where it is in what there is for each camera
    for index in range(cameras):
        drawn = tl.load(radii + 2 * seen, mask=exists, other=0.0) > 0
        camera = _load_camera(viewmats, Ks, index)
        screen = _to_screen(points, at, drawn, camera, K)
        v_row = v_params + seen * PARAMS
        v_pixels = _hull_vjp(screen[2], screen[3], v_row + 2, drawn, K, ROOM)
        # Corners are relative to the centre
        v_center_x = tl.load(v_row, mask=drawn, other=0.0) - v_pixels[2]
        v_center_y = tl.load(v_row + 1, mask=drawn, other=0.0) - v_pixels[3]
        v_rest = load3(v_row + PARAMS - 3, 0, drawn)
        v_delta += tl.where(drawn, v_rest[0] * screen[4][2] / camera[3], 0.0)
        v_sigma += v_rest[1]
        v_opacity += v_rest[2]
        v_mean_z = v_rest[0] * delta / camera[3] + tl.load(v_depths + seen, mask=drawn, other=0.0)
        v_placed = _to_screen_vjp(screen, v_pixels, (v_center_x, v_center_y), v_mean_z, camera, drawn, K)
        v_sum = ()
        for k in tl.static_range(K):
            v_sum += (add(v_world[k], transform_vjp(camera[0][0], v_placed[k])),)
        v_world = v_sum
        if CAMERA_GRADIENT:
            _store_pose_gradient(v_poses + 12 * (block * cameras + index), points, at, drawn, v_placed, K)
        seen += count
    for k in tl.static_range(K):
        store3(v_points + 3 * k, at * K, v_world[k], exists)
    tl.store(v_deltas + at, v_delta, mask=exists)
    tl.store(v_sigmas + at, v_sigma, mask=exists)
    tl.store(v_opacities + at, v_opacity, mask=exists)


def project_convexes_forward(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *outputs: Tensor,
) -> None:
    """As `project_convexes_forward` of the compiled kernels; `outputs` are params [C, N, 2 R + 5], depths [C, N] and radii
    [C, N, 2]."""
    grid = (cdiv(len(points), BLOCK), len(viewmats))
    tensors = (points, deltas, sigmas, opacities, viewmats, Ks, *outputs)
    options = {"K": points.shape[1], "ROOM": (outputs[0].shape[2] - 5) // 2, "BLOCK": BLOCK}
    launch(_project_convexes_forward_kernel, grid, *tensors, len(points), float(width), float(height), **options)


def project_convexes_backward(
    points: Tensor,
    deltas: Tensor,
    sigmas: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *upstream_and_gradients: Any,
) -> None:
    """As `project_convexes_backward` of the compiled kernels.

    `upstream_and_gradients` are radii, v_params, v_depths, whether the cameras' gradient is wanted, and what is filled: the
    gradients of points, deltas, sigmas, opacities and viewmats (the last one is added to).
    """
    radii, v_params, v_depths, camera_gradient, *outputs, v_viewmats = upstream_and_gradients
    blocks = cdiv(len(points), BLOCK)
    v_poses = points.new_empty(
        blocks if camera_gradient else 0, len(viewmats), 4, 3
    )  # the rotation's rows, translation
    tensors = (points, deltas, viewmats, Ks, radii, v_params, v_depths, *outputs, v_poses)
    options = {"K": points.shape[1], "ROOM": (v_params.shape[2] - 5) // 2, "BLOCK": BLOCK}
    options["CAMERA_GRADIENT"] = camera_gradient
    launch(_project_convexes_backward_kernel, (blocks,), *tensors, len(points), len(viewmats), **options)
    if camera_gradient:
        v_pose = v_poses.sum(0)
        v_viewmats[:, :3, :3] += v_pose[:, :3]
        v_viewmats[:, :3, 3] += v_pose[:, 3]
