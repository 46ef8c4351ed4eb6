"""Vectors and matrices for Triton kernels: tuples of three blocks of any shape, one number a primitive in each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load3(rows, at, mask):
    """Rows `at` of an [N, 3] tensor as three blocks of the shape of `at`; 0 where masked."""
    first = rows + 3 * at
    x = tl.load(first, mask=mask, other=0.0)
    return x, tl.load(first + 1, mask=mask, other=0.0), tl.load(first + 2, mask=mask, other=0.0)


@triton.jit
def store3(rows, at, v, mask):
    """`load3` in the other direction."""
    first = rows + 3 * at
    tl.store(first, v[0], mask=mask)
    tl.store(first + 1, v[1], mask=mask)
    tl.store(first + 2, v[2], mask=mask)


@triton.jit
def store_sums(to, v):
    """The sums of three blocks, side by side."""
    tl.store(to, tl.sum(v[0]))
    tl.store(to + 1, tl.sum(v[1]))
    tl.store(to + 2, tl.sum(v[2]))


@triton.jit
def keep(wanted, v):
    """`v`, 0 where not `wanted`, even if they are NaN there."""
    return tl.where(wanted, v[0], 0.0), tl.where(wanted, v[1], 0.0), tl.where(wanted, v[2], 0.0)


@triton.jit
def add(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@triton.jit
def scaled(a, factor):
    return a[0] * factor, a[1] * factor, a[2] * factor


@triton.jit
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def transform(matrix, v):
    """matrix @ v, the matrix as its three rows."""
    return dot(matrix[0], v), dot(matrix[1], v), dot(matrix[2], v)


@triton.jit
def transform_vjp(matrix, v):
    """matrix^T @ v."""
    return (
        matrix[0][0] * v[0] + matrix[1][0] * v[1] + matrix[2][0] * v[2],
        matrix[0][1] * v[0] + matrix[1][1] * v[1] + matrix[2][1] * v[2],
        matrix[0][2] * v[0] + matrix[1][2] * v[1] + matrix[2][2] * v[2],
    )


@triton.jit
def load_pose(viewmats, camera):
    """World to camera: the rows of its rotation and its translation, all scalars, of viewmats [C, 4, 4]."""
    V = viewmats + 16 * camera
    rotation = (
        (tl.load(V), tl.load(V + 1), tl.load(V + 2)),
        (tl.load(V + 4), tl.load(V + 5), tl.load(V + 6)),
        (tl.load(V + 8), tl.load(V + 9), tl.load(V + 10)),
    )
    return rotation, (tl.load(V + 3), tl.load(V + 7), tl.load(V + 11))


@triton.jit
def times(a, b):
    """Element by element."""
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


@triton.jit
def transposed(matrix):
    return (
        (matrix[0][0], matrix[1][0], matrix[2][0]),
        (matrix[0][1], matrix[1][1], matrix[2][1]),
        (matrix[0][2], matrix[1][2], matrix[2][2]),
    )


@triton.jit
def product(a, b):
    """a @ b, all as tuples of rows."""
    return transform_vjp(b, a[0]), transform_vjp(b, a[1]), transform_vjp(b, a[2])
