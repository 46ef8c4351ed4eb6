"""Projection of 3D Gaussians on a GPU, forward and backward: a primitive a lane, the maths of `csrc/projection.h`.

Bound by memory, as counted: 44 bytes a primitive in and 36 a camera out, backward the other way round, against some 300
operations. The forward pass is a program a block and camera; the backward pass goes through the cameras inside the program, so
that the gradients of a primitive add up in registers; those of a camera are added up in the block, and over the blocks
afterwards. Numbers that lie side by side are stored as pairs: that halves the number of partly written sectors.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.gpu.vectors import (
    add,
    cross,
    dot,
    keep,
    load3,
    load_pose,
    product,
    scaled,
    store3,
    store_sums,
    times,
    transform,
    transform_vjp,
    transposed,
)
from prismfield.render.ops.constants import ALPHA_MIN, BLUR, NEAR, VIEW_MARGIN
from prismfield.render.ops.project import MAX_EXTENT

BLOCK = 128
_ALPHA_MIN, _LOG_ALPHA_MIN = tl.constexpr(ALPHA_MIN), tl.constexpr(math.log(ALPHA_MIN))
_BLUR, _NEAR, _VIEW_MARGIN = tl.constexpr(BLUR), tl.constexpr(NEAR), tl.constexpr(VIEW_MARGIN)
_MAX_EXTENT = tl.constexpr(MAX_EXTENT)


@triton.jit
def _load_camera(viewmats, Ks, camera, width, height):
    """Scalars: the pose, (fx, fy, cx, cy), and (low, high) tangents of x and of y beyond which nothing is linearised."""
    K = Ks + 9 * camera
    fx, fy, cx, cy = tl.load(K), tl.load(K + 4), tl.load(K + 2), tl.load(K + 5)
    margin_x, margin_y = width * _VIEW_MARGIN / fx, height * _VIEW_MARGIN / fy
    limits_x = (-cx / fx - margin_x, (width - cx) / fx + margin_x)
    limits_y = (-cy / fy - margin_y, (height - cy) / fy + margin_y)
    return load_pose(viewmats, camera), (fx, fy, cx, cy), limits_x, limits_y


@triton.jit
def _load_gaussian(means, quats, scales, opacities, at, mask):
    q = quats + 4 * at
    quat = (
        tl.load(q, mask=mask, other=0.0),
        tl.load(q + 1, mask=mask, other=0.0),
        tl.load(q + 2, mask=mask, other=0.0),
        tl.load(q + 3, mask=mask, other=0.0),
    )
    return load3(means, at, mask), quat, load3(scales, at, mask), tl.load(opacities + at, mask=mask, other=0.0)


@triton.jit
def _store2(rows, width, at, column, a, b, mask):
    """Two columns that lie side by side, of rows of `width` numbers."""
    tl.store(rows + (width * at + column)[:, None] + tl.arange(0, 2)[None, :], tl.join(a, b), mask=mask[:, None])


@triton.jit
def _rotation(quat):
    """Rows of the rotation of a quaternion of any length, and for `_rotation_vjp` the unit one and 1 / length."""
    inverse = 1.0 / tl.sqrt(quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3])
    w, x, y, z = quat[0] * inverse, quat[1] * inverse, quat[2] * inverse, quat[3] * inverse
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return rows, (w, x, y, z), inverse


@triton.jit
def _rotation_vjp(unit, inverse, v):
    """Gradient of the quaternion from that of the rows, `v`."""
    w, x, y, z = unit
    v_w = 2 * (x * (v[2][1] - v[1][2]) + y * (v[0][2] - v[2][0]) + z * (v[1][0] - v[0][1]))
    v_x = w * (v[2][1] - v[1][2]) + y * (v[0][1] + v[1][0]) + z * (v[0][2] + v[2][0]) - 2 * x * (v[1][1] + v[2][2])
    v_y = w * (v[0][2] - v[2][0]) + x * (v[0][1] + v[1][0]) + z * (v[1][2] + v[2][1]) - 2 * y * (v[0][0] + v[2][2])
    v_z = w * (v[1][0] - v[0][1]) + x * (v[0][2] + v[2][0]) + y * (v[1][2] + v[2][1]) - 2 * z * (v[0][0] + v[1][1])
    v_x, v_y, v_z = 2 * v_x, 2 * v_y, 2 * v_z
    along = v_w * w + v_x * x + v_y * y + v_z * z  # normalising takes the radial part out
    return (
        (v_w - along * w) * inverse,
        (v_x - along * x) * inverse,
        (v_y - along * y) * inverse,
        (v_z - along * z) * inverse,
    )


@triton.jit
def _linearize(position, camera):
    """Tangents, the same held inside the limits, the Jacobian's rows (jx, 0, jxz) and (0, jy, jyz), and 1 / z."""
    _, intrinsics, limits_x, limits_y = camera
    fx, fy, _, _ = intrinsics
    inverse = 1.0 / position[2]
    tan_x, tan_y = position[0] * inverse, position[1] * inverse
    held_x = tl.minimum(tl.maximum(tan_x, limits_x[0]), limits_x[1])
    held_y = tl.minimum(tl.maximum(tan_y, limits_y[0]), limits_y[1])
    jx, jy = fx * inverse, fy * inverse
    return (tan_x, tan_y), (held_x, held_y), (jx, -jx * held_x, jy, -jy * held_y), inverse


@triton.jit
def _linearize_vjp(linear, v_x, v_y, v_jacobian):
    """Gradient of the position from those of the pixel and of the Jacobian. A held tangent carries none."""
    tangents, held, jacobian, inverse = linear
    tan_x, tan_y = tangents
    held_x, held_y = held
    jx, jxz, jy, jyz = jacobian
    v_jx, v_jxz, v_jy, v_jyz = v_jacobian
    inside_x, inside_y = tl.where(held_x == tan_x, 1.0, 0.0), tl.where(held_y == tan_y, 1.0, 0.0)
    v_px = jx * v_x - jx * inverse * inside_x * v_jxz
    v_py = jy * v_y - jy * inverse * inside_y * v_jyz
    v_pz = -jx * tan_x * v_x - jy * tan_y * v_y - jx * inverse * v_jx - jy * inverse * v_jy
    v_pz -= jxz * inverse * (1 + inside_x) * v_jxz + jyz * inverse * (1 + inside_y) * v_jyz
    return v_px, v_py, v_pz


@triton.jit
def _footprint(u, v):
    """Of projected axes: u x v, (var_x, covar, var_y), and of the determinant what is sharp, what the blur adds, and both.

    The square of u x v is the determinant without the blur, with no difference of large products.
    """
    normal = cross(u, v)
    a, c, sharp = dot(u, u), dot(v, v), dot(normal, normal)
    added = (a + c) * _BLUR + _BLUR * _BLUR
    return normal, (a + _BLUR, dot(u, v), c + _BLUR), (sharp, added, sharp + added)


@triton.jit
def _footprint_vjp(u, v, footprint, v_conic, v_log_mass, ANTIALIASED: tl.constexpr):
    """Gradients of u and v from those of the conic (a, b, c) and of log sqrt(sharp / det).

    d(inverse) = -inverse d inverse, with inverse @ (u, v) in a form that does not cancel for needles.
    """
    normal, variances, dets = footprint
    var_x, covar, var_y = variances
    sharp, added, det = dets
    inv_det = 1.0 / det
    a, b, c, half = var_y * inv_det, -covar * inv_det, var_x * inv_det, 0.5 * v_conic[1]
    across_u, across_v = cross(v, normal), cross(normal, u)  # half the gradients of sharp to u and v
    p, q = scaled(add(across_u, scaled(u, _BLUR)), inv_det), scaled(add(across_v, scaled(v, _BLUR)), inv_det)
    v_p = add(scaled(p, -2 * v_conic[0]), scaled(q, -2 * half))
    v_q = add(scaled(p, -2 * half), scaled(q, -2 * v_conic[2]))
    v_u, v_v = add(scaled(v_p, a), scaled(v_q, b)), add(scaled(v_p, b), scaled(v_q, c))
    if ANTIALIASED:
        per_det = tl.where(sharp > det * 1e-12, v_log_mass * inv_det, 0.0)
        v_sharp, v_added = per_det * added / tl.maximum(sharp, 1e-30), -per_det * _BLUR
        v_u = add(v_u, add(scaled(across_u, v_sharp), scaled(u, v_added)))
        v_v = add(v_v, add(scaled(across_v, v_sharp), scaled(v, v_added)))
    return v_u, v_v


@triton.jit
def _to_screen(mean, axes, camera):
    """The centre in the camera, `_linearize` there, the axes in the camera, projected to u and v, and `_footprint`."""
    rotation, translation = camera[0]
    position = add(transform(rotation, mean), translation)
    linear = _linearize(position, camera)
    view = product(rotation, axes)
    jx, jxz, jy, jyz = linear[2]
    u, v = add(scaled(view[0], jx), scaled(view[2], jxz)), add(scaled(view[1], jy), scaled(view[2], jyz))
    return position, linear, view, u, v, _footprint(u, v)


@triton.jit
def _to_screen_vjp(screen, v_params, v_depth, ANTIALIASED: tl.constexpr):
    """Gradients of the centre and of the axes, both in the camera."""
    _, linear, view, u, v, footprint = screen
    v_u, v_v = _footprint_vjp(u, v, footprint, (v_params[2], v_params[3], v_params[4]), v_params[5], ANTIALIASED)
    v_jacobian = dot(view[0], v_u), dot(view[2], v_u), dot(view[1], v_v), dot(view[2], v_v)
    v_position = _linearize_vjp(linear, v_params[0], v_params[1], v_jacobian)
    jx, jxz, jy, jyz = linear[2]
    v_view = scaled(v_u, jx), scaled(v_v, jy), add(scaled(v_u, jxz), scaled(v_v, jyz))
    return (v_position[0], v_position[1], v_position[2] + v_depth), v_view


@triton.jit
def _axes(rotation, scale):
    """Rows of the matrix whose columns are the principal axes in the world, scaled."""
    return times(rotation[0], scale), times(rotation[1], scale), times(rotation[2], scale)


@triton.jit
def _project_forward_kernel(
    means,
    quats,
    scales,
    opacities,
    viewmats,
    Ks,
    params,
    depths,
    radii,
    count,
    width,
    height,
    ANTIALIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    exists = at < count
    camera = _load_camera(viewmats, Ks, index, width, height)
    mean, quat, scale, mass = _load_gaussian(means, quats, scales, opacities, at, exists)
    position, linear, _, _, _, footprint = _to_screen(mean, _axes(_rotation(quat)[0], scale), camera)
    _, intrinsics, _, _ = camera
    fx, fy, cx, cy = intrinsics
    _, variances, dets = footprint
    var_x, covar, var_y = variances
    sharp, _, det = dets
    if ANTIALIASED:
        mass *= tl.sqrt(tl.maximum(sharp / det, 1e-12))
    x, y, depth = fx * linear[0][0] + cx, fy * linear[0][1] + cy, position[2]
    solid = (mass > _ALPHA_MIN) & (depth > _NEAR) & (det > 0)
    log_mass = tl.log(tl.where(solid, mass, 1.0))
    level = 2 * (log_mass - _LOG_ALPHA_MIN)
    radius_x, radius_y = tl.sqrt(level * var_x), tl.sqrt(level * var_y)
    # Phrased so that NaN fails; an infinite variance fails the last
    drawn = solid & (level > 0) & (x + radius_x > 0) & (x - radius_x < width)
    drawn = drawn & (y + radius_y > 0) & (y - radius_y < height)
    drawn = drawn & (var_x + var_y < _MAX_EXTENT) & (tl.abs(x) + tl.abs(y) < _MAX_EXTENT)
    inv_det, seen = 1.0 / det, index * count + at
    x, y, a = keep(drawn, (x, y, var_y * inv_det))
    b, c, log_mass = keep(drawn, (-covar * inv_det, var_x * inv_det, log_mass))
    radius_x, radius_y, depth = keep(drawn, (radius_x, radius_y, depth))
    _store2(params, 6, seen, 0, x, y, exists)
    _store2(params, 6, seen, 2, a, b, exists)
    _store2(params, 6, seen, 4, c, log_mass, exists)
    _store2(radii, 2, seen, 0, radius_x, radius_y, exists)
    tl.store(depths + seen, depth, mask=exists)


@triton.jit
def _project_backward_kernel(
    means,
    quats,
    scales,
    opacities,
    viewmats,
    Ks,
    radii,
    v_params,
    v_depths,
    v_means,
    v_quats,
    v_scales,
    v_opacities,
    v_poses,
    count,
    cameras,
    width,
    height,
    ANTIALIASED: tl.constexpr,
    CAMERA_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    exists = at < count
    mean, quat, scale, opacity = _load_gaussian(means, quats, scales, opacities, at, exists)
    rotation, unit, inverse = _rotation(quat)
    axes = _axes(rotation, scale)
    zero = tl.zeros([BLOCK], tl.float32)
    v_mean, v_axes, v_opacity = (zero, zero, zero), ((zero, zero, zero), (zero, zero, zero), (zero, zero, zero)), zero
    seen, ever = at, at < 0  # where it is in what there is for each camera, and whether any draws it
    for index in range(cameras):
        drawn = tl.load(radii + 2 * seen, mask=exists, other=0.0) > 0
        ever |= drawn
        camera = _load_camera(viewmats, Ks, index, width, height)
        from_world, to_world = camera[0][0], transposed(camera[0][0])
        v_xya, v_bcm = load3(v_params, 2 * seen, drawn), load3(v_params, 2 * seen + 1, drawn)
        v_screen = (v_xya[0], v_xya[1], v_xya[2], v_bcm[0], v_bcm[1], v_bcm[2])
        v_depth = tl.load(v_depths + seen, mask=drawn, other=0.0)
        v_position, v_view = _to_screen_vjp(_to_screen(mean, axes, camera), v_screen, v_depth, ANTIALIASED)
        v_position = keep(drawn, v_position)
        v_view = keep(drawn, v_view[0]), keep(drawn, v_view[1]), keep(drawn, v_view[2])
        v_mean = add(v_mean, transform_vjp(from_world, v_position))
        v_more = product(to_world, v_view)
        v_axes = add(v_axes[0], v_more[0]), add(v_axes[1], v_more[1]), add(v_axes[2], v_more[2])
        v_opacity += tl.where(drawn, v_bcm[2] / opacity, 0.0)
        if CAMERA_GRADIENT:
            v_pose = v_poses + 12 * (block * cameras + index)
            here, around = keep(drawn, mean), (keep(drawn, axes[0]), keep(drawn, axes[1]), keep(drawn, axes[2]))
            store_sums(v_pose, add(scaled(here, v_position[0]), transform(around, v_view[0])))
            store_sums(v_pose + 3, add(scaled(here, v_position[1]), transform(around, v_view[1])))
            store_sums(v_pose + 6, add(scaled(here, v_position[2]), transform(around, v_view[2])))
            store_sums(v_pose + 9, v_position)
        seen += count
    # What is never drawn may be NaN, and 0 times that is not 0
    v_scale = add(times(rotation[0], v_axes[0]), add(times(rotation[1], v_axes[1]), times(rotation[2], v_axes[2])))
    v_w, v_x, v_y, v_z = _rotation_vjp(unit, inverse, _axes(v_axes, scale))
    v_w = tl.where(ever, v_w, 0.0)
    v_x, v_y, v_z = keep(ever, (v_x, v_y, v_z))
    store3(v_means, at, v_mean, exists)
    store3(v_scales, at, keep(ever, v_scale), exists)
    _store2(v_quats, 4, at, 0, v_w, v_x, exists)
    _store2(v_quats, 4, at, 2, v_y, v_z, exists)
    tl.store(v_opacities + at, v_opacity, mask=exists)


def project_forward(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    antialiased: bool,
    *outputs: Tensor,
) -> None:
    """As `project_forward` of the compiled kernels; `outputs` are params [C, N, 6], depths [C, N] and radii [C, N, 2]."""
    grid = (cdiv(len(means), BLOCK), len(viewmats))
    tensors = (means, quats, scales, opacities, viewmats, Ks, *outputs)
    sizes = (len(means), float(width), float(height))
    launch(_project_forward_kernel, grid, *tensors, *sizes, ANTIALIASED=antialiased, BLOCK=BLOCK)


def project_backward(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    antialiased: bool,
    *upstream_and_gradients: Any,
) -> None:
    """As `project_backward` of the compiled kernels.

    `upstream_and_gradients` are radii, v_params, v_depths, whether the cameras' gradient is wanted, and what is filled: the
    gradients of means, quats, scales, opacities and viewmats (the last one is added to).
    """
    radii, v_params, v_depths, camera_gradient, *outputs, v_viewmats = upstream_and_gradients
    blocks = cdiv(len(means), BLOCK)
    v_poses = means.new_empty(blocks if camera_gradient else 0, len(viewmats), 4, 3)  # the rotation's rows, translation
    tensors = (means, quats, scales, opacities, viewmats, Ks, radii, v_params, v_depths, *outputs, v_poses)
    sizes = (len(means), len(viewmats), float(width), float(height))
    options = {"ANTIALIASED": antialiased, "CAMERA_GRADIENT": camera_gradient, "BLOCK": BLOCK}
    launch(_project_backward_kernel, (blocks,), *tensors, *sizes, **options)
    if camera_gradient:
        v_pose = v_poses.sum(0)
        v_viewmats[:, :3, :3] += v_pose[:, :3]
        v_viewmats[:, :3, 3] += v_pose[:, 3]
