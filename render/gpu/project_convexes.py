"""Projection of smooth convexes on a GPU, forward and backward: a convex a lane, the maths of `csrc/hull.h` and
`csrc/project_convexes.cpp`.

Each lane sorts its K points and finds their hull in registers, without a branch: K^3 / 6 turns of three points. As in `project.py`,
the forward pass is a program a block and camera, and the backward pass goes through the cameras inside the program. It finds the
hull again to know which point each corner is: that is cheaper than to keep it.
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
def _sorted(x, y, K: tl.constexpr):
    """K points in order of x, those of one x in order of y, and which they were."""
    which = ()
    for k in tl.static_range(K):
        which += (tl.full(x[0].shape, k, tl.int32),)
    for end in tl.static_range(K - 1, 0, -1):
        # Carries the last of the first ones to place `end`
        sorted_x, sorted_y, sorted_which, last_x, last_y, last = (), (), (), x[0], y[0], which[0]
        for k in tl.static_range(1, end + 1):
            swap = (x[k] < last_x) | ((x[k] == last_x) & (y[k] < last_y))
            sorted_x += (tl.where(swap, x[k], last_x),)
            sorted_y += (tl.where(swap, y[k], last_y),)
            sorted_which += (tl.where(swap, which[k], last),)
            last_x, last_y, last = (
                tl.where(swap, last_x, x[k]),
                tl.where(swap, last_y, y[k]),
                tl.where(swap, last, which[k]),
            )
        x, y, which = (
            sorted_x + (last_x,) + x[end + 1 :],
            sorted_y + (last_y,) + y[end + 1 :],
            sorted_which + (last,) + which[end + 1 :],
        )
    return x, y, which


@triton.jit
def _chains(x, y, middle: tl.constexpr, K: tl.constexpr):
    """Whether a point among K sorted ones is a corner of the lower and of the upper chain."""
    lower, upper = x[0] == x[0], x[0] == x[0]
    for right in tl.static_range(middle + 1, K):
        # Of points that coincide the first counts, but of those at the right end the last. There the turn would be 0, but that fused
        # products round it to anything
        same = (x[middle] == x[right]) & (y[middle] == y[right])
        for left in tl.static_range(middle):
            turn = (x[right] - x[left]) * (y[middle] - y[left]) - (y[right] - y[left]) * (x[middle] - x[left])
            if right < K - 1:
                lower, upper = lower & ((turn < 0) | same), upper & ((turn > 0) | same)
            else:
                lower, upper = lower & (turn < 0) & ~same, upper & (turn > 0) & ~same
    return lower, upper


@triton.jit
def _place(hull, corners, chosen, x, y, which, K: tl.constexpr):
    """Appends a point to the hull where it is `chosen`."""
    hull_x, hull_y, hull_which = (), (), ()
    for slot in tl.static_range(K):
        here = chosen & (corners == slot)
        hull_x += (tl.where(here, x, hull[0][slot]),)
        hull_y += (tl.where(here, y, hull[1][slot]),)
        hull_which += (tl.where(here, which, hull[2][slot]),)
    return (hull_x, hull_y, hull_which), corners + tl.where(chosen, 1, 0)


@triton.jit
def _hull(x, y, K: tl.constexpr):
    """`hull_order` of ops/project_convexes.py: the corners of K points in order, then the first again, as tuples of x, of y and of
    which points they are; and how many there are."""
    x, y, which = _sorted(x, y, K)
    hull_x, hull_y, hull_which, lower, upper = (), (), (), (), ()
    for k in tl.static_range(K):
        hull_x += (x[0],)
        hull_y += (y[0],)
        hull_which += (which[0],)
        chains = _chains(x, y, k, K)
        lower += (chains[0],)
        upper += (chains[1],)
    hull, corners = (hull_x, hull_y, hull_which), tl.full(x[0].shape, 1, tl.int32)
    for k in tl.static_range(1, K):
        hull, corners = _place(hull, corners, lower[k], x[k], y[k], which[k], K)
    for k in tl.static_range(K - 2, 0, -1):
        hull, corners = _place(hull, corners, upper[k], x[k], y[k], which[k], K)
    return hull, corners


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
def _reach(hull, corners, margin, K: tl.constexpr):
    """Extent of the outline of `gpu/primitives.py` relative to the centre, low and high x and y, and whether the hull has an inside
    at all."""
    normals, area, perimeter = (), tl.zeros_like(margin), tl.zeros_like(margin)
    last_x, last_y = tl.zeros_like(margin), tl.zeros_like(margin)
    for i in tl.static_range(K):
        x, y, to_x, to_y = hull[0][i], hull[1][i], hull[0][(i + 1) % K], hull[1][(i + 1) % K]
        edge_x, edge_y = to_x - x, to_y - y
        squared = edge_x * edge_x + edge_y * edge_y
        exists = squared > 0
        length = tl.sqrt(squared)
        inverse = tl.where(exists, 1.0 / length, 0.0)
        normals += ((edge_y * inverse, -edge_x * inverse, exists),)
        last_x, last_y = tl.where(exists, normals[i][0], last_x), tl.where(exists, normals[i][1], last_y)
        area += (x * to_y - y * to_x) * 0.5
        perimeter += length
    solid = (corners > 2) & (area > perimeter * perimeter * _MIN_THICKNESS)
    low_x, low_y = tl.full(margin.shape, 1e30, tl.float32), tl.full(margin.shape, 1e30, tl.float32)
    high_x, high_y = tl.full(margin.shape, -1e30, tl.float32), tl.full(margin.shape, -1e30, tl.float32)
    for i in tl.static_range(K):
        exists = normals[i][2]
        shift = margin / tl.maximum(last_x * normals[i][0] + last_y * normals[i][1] + 1.0, 1e-12)
        x, y = hull[0][i] + shift * (last_x + normals[i][0]), hull[1][i] + shift * (last_y + normals[i][1])
        low_x, high_x = tl.where(exists, tl.minimum(low_x, x), low_x), tl.where(exists, tl.maximum(high_x, x), high_x)
        low_y, high_y = tl.where(exists, tl.minimum(low_y, y), low_y), tl.where(exists, tl.maximum(high_y, y), high_y)
        last_x, last_y = normals[i][0], normals[i][1]
    return low_x, high_x, low_y, high_y, solid


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
    low_x, high_x, low_y, high_y, solid = _reach(hull, corners, level / (sigma * delta), K)
    radius_x, radius_y = tl.maximum(-low_x, high_x), tl.maximum(-low_y, high_y)
    drawn = exists & solid & (opacity > _ALPHA_MIN)
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
def _load_corner_gradients(v_row, drawn, K: tl.constexpr, ROOM: tl.constexpr):
    """Tuples of x and of y of K corners, those of the slots beyond with the first, and what the centre gets from them."""
    v_x, v_y = (), ()
    for slot in tl.static_range(K):
        v_x += (tl.load(v_row + 2 * slot, mask=drawn, other=0.0),)
        v_y += (tl.load(v_row + 2 * slot + 1, mask=drawn, other=0.0),)
    more_x, more_y = tl.zeros_like(v_x[0]), tl.zeros_like(v_y[0])
    for slot in tl.static_range(K, ROOM):
        more_x += tl.load(v_row + 2 * slot, mask=drawn, other=0.0)
        more_y += tl.load(v_row + 2 * slot + 1, mask=drawn, other=0.0)
    v_x, v_y = (v_x[0] + more_x,) + v_x[1:], (v_y[0] + more_y,) + v_y[1:]
    v_center_x, v_center_y = -v_x[0], -v_y[0]
    for slot in tl.static_range(1, K):
        v_center_x -= v_x[slot]
        v_center_y -= v_y[slot]
    return v_x, v_y, v_center_x, v_center_y


@triton.jit
def _to_screen_vjp(screen, which, v_corners, v_center, v_mean_z, camera, drawn, K: tl.constexpr):
    """Gradients of the points, in the camera."""
    v_placed = ()
    for k in tl.static_range(K):
        v_x, v_y = v_center[0] * (1.0 / K), v_center[1] * (1.0 / K)
        for slot in tl.static_range(K):
            v_x += tl.where(which[slot] == k, v_corners[0][slot], 0.0)
            v_y += tl.where(which[slot] == k, v_corners[1][slot], 0.0)
        place, inverse = screen[0][k], screen[1][k]
        v_x, v_y = v_x * inverse * camera[1][0], v_y * inverse * camera[1][1]
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
        v_x, v_y, v_center_x, v_center_y = _load_corner_gradients(v_row + 2, drawn, K, ROOM)
        v_center_x += tl.load(v_row, mask=drawn, other=0.0)
        v_center_y += tl.load(v_row + 1, mask=drawn, other=0.0)
        v_rest = load3(v_row + PARAMS - 3, 0, drawn)
        v_delta += tl.where(drawn, v_rest[0] * screen[4][2] / camera[3], 0.0)
        v_sigma += v_rest[1]
        v_opacity += v_rest[2]
        v_mean_z = v_rest[0] * delta / camera[3] + tl.load(v_depths + seen, mask=drawn, other=0.0)
        hull = _hull(screen[2], screen[3], K)
        v_placed = _to_screen_vjp(screen, hull[0][2], (v_x, v_y), (v_center_x, v_center_y), v_mean_z, camera, drawn, K)
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
