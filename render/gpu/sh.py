"""View-dependent colour from spherical harmonics on a GPU, forward and backward.

Bound by memory, as counted: 3 K floats a primitive, read and in the backward pass written once. All is computed in blocks [BLOCK, 4] of
(primitive, channel), the last channel idle: lanes that lie side by side then read the channels of one coefficient, which are side
by side in memory, and nothing but the gradient of the direction has to be added up across lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prismfield.render.gpu.launch import cdiv, launch
from prismfield.render.gpu.vectors import add, dot, load3, load_pose, scaled, store3, transform_vjp
from prismfield.render.ops.sh import C0, C1, C2, C3

BLOCK = 64
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in (C0, C1, C2, C3))


@triton.jit
def _basis(towards, DEGREE: tl.constexpr):
    """The harmonics of degree 1 to DEGREE of unit directions, a tuple."""
    x, y, z = towards
    terms = (y * -_C1, z * _C1, x * -_C1)
    xx, yy, zz = x * x, y * y, z * z
    if DEGREE >= 2:
        terms += (_C2[0] * x * y, _C2[1] * y * z, _C2[2] * (2 * zz - xx - yy), _C2[3] * x * z, _C2[4] * (xx - yy))
    if DEGREE >= 3:
        terms += (
            _C3[0] * y * (3 * xx - yy),
            _C3[1] * x * y * z,
            _C3[2] * y * (4 * zz - xx - yy),
            _C3[3] * z * (2 * zz - 3 * xx - 3 * yy),
            _C3[4] * x * (4 * zz - xx - yy),
            _C3[5] * z * (xx - yy),
            _C3[6] * x * (xx - 3 * yy),
        )
    return terms


@triton.jit
def _basis_vjp(towards, a, DEGREE: tl.constexpr):
    """Gradient of the directions from that of `_basis`, `a`."""
    x, y, z = towards
    dx, dy, dz = a[2] * -_C1, a[0] * -_C1, a[1] * _C1
    if DEGREE >= 2:
        dx += _C2[0] * y * a[3] - 2 * _C2[2] * x * a[5] + _C2[3] * z * a[6] + 2 * _C2[4] * x * a[7]
        dy += _C2[0] * x * a[3] + _C2[1] * z * a[4] - 2 * _C2[2] * y * a[5] - 2 * _C2[4] * y * a[7]
        dz += _C2[1] * y * a[4] + 4 * _C2[2] * z * a[5] + _C2[3] * x * a[6]
    if DEGREE >= 3:
        xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z
        dx += 6 * _C3[0] * xy * a[8] + _C3[1] * yz * a[9] - 2 * _C3[2] * xy * a[10] - 6 * _C3[3] * xz * a[11]
        dx += _C3[4] * (4 * zz - 3 * xx - yy) * a[12] + 2 * _C3[5] * xz * a[13] + 3 * _C3[6] * (xx - yy) * a[14]
        dy += 3 * _C3[0] * (xx - yy) * a[8] + _C3[1] * xz * a[9] + _C3[2] * (4 * zz - xx - 3 * yy) * a[10]
        dy += -6 * _C3[3] * yz * a[11] - 2 * _C3[4] * xy * a[12] - 2 * _C3[5] * yz * a[13] - 6 * _C3[6] * xy * a[14]
        dz += _C3[1] * xy * a[9] + 8 * _C3[2] * yz * a[10] + _C3[3] * (6 * zz - 3 * xx - 3 * yy) * a[11]
        dz += 8 * _C3[4] * xz * a[12] + _C3[5] * (xx - yy) * a[13]
    return dx, dy, dz


@triton.jit
def _direction(mean, viewmats, camera):
    """Unit directions to `mean` from a camera's centre, -R^T t, and 1 / distance."""
    rotation, translation = load_pose(viewmats, camera)
    offset = add(mean, transform_vjp(rotation, translation))
    inverse = 1.0 / tl.maximum(tl.sqrt(dot(offset, offset)), 1e-12)
    return scaled(offset, inverse), inverse


@triton.jit
def _direction_vjp(towards, inverse, v_dir):
    """Gradient of `mean`, and minus that of the centre."""
    return scaled(add(v_dir, scaled(towards, -dot(v_dir, towards))), inverse)


@triton.jit
def _load_rest(first, mask, DEGREE: tl.constexpr):
    """The coefficients of the higher terms, a tuple; `first` points to that of the first one."""
    terms = (tl.load(first, mask=mask, other=0.0),)
    for k in tl.static_range(1, (DEGREE + 1) * (DEGREE + 1) - 1):
        terms += (tl.load(first + 3 * k, mask=mask, other=0.0),)
    return terms


@triton.jit
def _products(terms, factor):
    scaled_terms = (terms[0] * factor,)
    for k in tl.static_range(1, len(terms)):
        scaled_terms += (terms[k] * factor,)
    return scaled_terms


@triton.jit
def _with_products(sums, basis, factor):
    """sums + basis * factor, term by term."""
    total = (sums[0] + basis[0] * factor,)
    for k in tl.static_range(1, len(basis)):
        total += (sums[k] + basis[k] * factor,)
    return total


@triton.jit
def _sh_forward_kernel(sh0, shN, means, viewmats, radii, rgbs, count, terms, DEGREE: tl.constexpr, BLOCK: tl.constexpr):
    camera, channel = tl.program_id(1).to(tl.int64), tl.arange(0, 4)[None, :]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None] + 0 * channel
    wanted = (at < count) & (channel < 3)
    seen = camera * count + at
    drawn = wanted & (tl.load(radii + 2 * seen, mask=wanted, other=0.0) > 0)
    color = tl.load(sh0 + 3 * at + channel, mask=drawn, other=0.0) * _C0 + 0.5
    if DEGREE > 0:
        towards, _ = _direction(load3(means, at, drawn), viewmats, camera)
        basis = _basis(towards, DEGREE)
        rest = _load_rest(shN + 3 * terms * at + channel, drawn, DEGREE)
        for k in tl.static_range((DEGREE + 1) * (DEGREE + 1) - 1):
            color += basis[k] * rest[k]
    tl.store(rgbs + 3 * seen + channel, tl.where(drawn, tl.maximum(color, 0.0), 0.0), mask=wanted)


@triton.jit
def _sh_backward_kernel(
    shN,
    means,
    viewmats,
    radii,
    rgbs,
    v_rgbs,
    v_sh0,
    v_shN,
    v_means,
    v_centers,
    count,
    terms,
    cameras,
    DEGREE: tl.constexpr,
    REST_GRADIENT: tl.constexpr,
    CAMERA_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TERMS: tl.constexpr = (DEGREE + 1) * (DEGREE + 1) - 1
    block, channel = tl.program_id(0).to(tl.int64), tl.arange(0, 4)[None, :]
    at = block * BLOCK + tl.arange(0, BLOCK)[:, None] + 0 * channel
    wanted = (at < count) & (channel < 3)
    zero = tl.zeros([BLOCK, 4], tl.float32)
    v_color_sum, v_mean_sum = zero, (zero, zero, zero)
    v_rest_sum = (zero,)
    for _ in tl.static_range(1, TERMS if REST_GRADIENT else 1):
        v_rest_sum += (zero,)
    seen = at  # where it is in what there is for each camera
    for camera in range(cameras):
        drawn = wanted & (tl.load(radii + 2 * seen, mask=wanted, other=0.0) > 0)
        color = tl.load(rgbs + 3 * seen + channel, mask=drawn, other=0.0)
        v_color = tl.load(v_rgbs + 3 * seen + channel, mask=drawn & (color > 0), other=0.0)
        v_color_sum += v_color
        if DEGREE > 0:
            # Not hidden behind others; NaN counts as lit
            lit = wanted & (tl.sum(tl.abs(v_color), axis=1, keep_dims=True) != 0)
            towards, inverse = _direction(load3(means, at, lit), viewmats, camera)
            if REST_GRADIENT:
                v_rest_sum = _with_products(v_rest_sum, _basis(towards, DEGREE), v_color)
            rest = _load_rest(shN + 3 * terms * at + channel, lit, DEGREE)
            v_towards = _basis_vjp(towards, _products(rest, v_color), DEGREE)
            v_mean = _direction_vjp(towards, inverse, v_towards)  # 0 where all that was loaded is
            v_mean_sum = add(v_mean_sum, v_mean)
            if CAMERA_GRADIENT:
                v_center = v_centers + 3 * (block * cameras + camera)
                tl.store(v_center, -tl.sum(v_mean[0]))
                tl.store(v_center + 1, -tl.sum(v_mean[1]))
                tl.store(v_center + 2, -tl.sum(v_mean[2]))
        seen += count
    tl.store(v_sh0 + 3 * at + channel, v_color_sum * _C0, mask=wanted)
    row = block * BLOCK + tl.arange(0, BLOCK)
    v_mean = (tl.sum(v_mean_sum[0], axis=1), tl.sum(v_mean_sum[1], axis=1), tl.sum(v_mean_sum[2], axis=1))
    store3(v_means, row, v_mean, row < count)
    if REST_GRADIENT:
        for k in tl.static_range(TERMS):
            tl.store(v_shN + 3 * terms * at + channel + 3 * k, v_rest_sum[k], mask=wanted)


def sh_forward(
    sh0: Tensor, shN: Tensor, means: Tensor, viewmats: Tensor, radii: Tensor, degree: int, rgbs: Tensor
) -> None:
    """As `sh_forward` of the compiled kernels: `rgbs` [C, N, 3] from what `sh_colors` takes."""
    grid = (cdiv(len(means), BLOCK), len(viewmats))
    tensors = (sh0, shN, means, viewmats, radii, rgbs)
    options = {"DEGREE": degree, "BLOCK": BLOCK}
    launch(_sh_forward_kernel, grid, *tensors, len(means), shN.shape[1], **options)


def sh_backward(
    sh0: Tensor,
    shN: Tensor,
    means: Tensor,
    viewmats: Tensor,
    radii: Tensor,
    degree: int,
    rgbs: Tensor,
    v_rgbs: Tensor,
    camera_gradient: bool,
    *gradients: Tensor,
) -> None:
    """As `sh_backward` of the compiled kernels.

    `gradients` are filled: those of sh0, shN (empty where it is not wanted), means and viewmats (the last one is added to).
    """
    v_sh0, v_shN, v_means, v_viewmats = gradients
    count, terms = shN.shape[:2]
    blocks, used = cdiv(count, BLOCK), (degree + 1) ** 2 - 1
    camera_gradient = camera_gradient and degree > 0  # constant colours do not depend on where anything is
    wants_rest = v_shN.numel() > 0
    v_centers = means.new_empty(blocks if camera_gradient else 0, len(viewmats), 3)
    tensors = (shN, means, viewmats, radii, rgbs, v_rgbs, v_sh0, v_shN, v_means, v_centers)
    options = {"REST_GRADIENT": wants_rest and degree > 0, "CAMERA_GRADIENT": camera_gradient, "BLOCK": BLOCK}
    sizes = (count, terms, len(viewmats))
    launch(_sh_backward_kernel, (blocks,), *tensors, *sizes, DEGREE=degree, **options)
    if wants_rest and used < terms:
        v_shN[:, used:] = 0.0
    if camera_gradient:
        v_center, rotation, translation = v_centers.sum(0), viewmats[:, :3, :3], viewmats[:, :3, 3]
        v_viewmats[:, :3, :3] -= translation[:, :, None] * v_center[:, None, :]
        v_viewmats[:, :3, 3] -= (rotation * v_center[:, None, :]).sum(-1)  # not a matrix product: those may use TF32
