"""Smooth convexes that look like given Gaussians."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prismfield.render.checks import check_shapes
from prismfield.render.ops.project import rotation_matrices
from prismfield.representations.convexes import fibonacci_sphere

FIT = {
    3: (2.06, 3.5, 1.73),
    4: (2.03, 3.2, 0.88),
    5: (1.77, 4.9, 0.54),
    6: (1.67, 5.5, 0.49),
    7: (1.56, 9.4, 0.28),
    8: (1.51, 11.8, 0.22),
    9: (1.50, 7.4, 0.35),
    10: (1.44, 16.7, 0.15),
    11: (1.44, 11.1, 0.23),
    12: (1.42, 16.9, 0.15),
}
"""By the number of points: their distance from the centre in standard deviations, delta times the standard deviation, sigma."""
_EXPONENTS = (1 / 8, 1 / 2, 3 / 8)
_EXPONENTS_FLAT = (1 / 2, 1 / 2, 0.0)
_MIN_SHARE = 1e-3  # of the largest standard deviation that the others are at least: a hull without volume is not drawn


def convexes_from_gaussians(tensors: dict[str, Tensor], points: int) -> dict[str, Tensor]:
    """Convexes in the place of Gaussians, one each, with the same opacity and harmonics.

    The points lie evenly spread on an ellipsoid of the Gaussian's shape: six at the ends of its axes, three in the plane of
    its longer two, else a Fibonacci sphere's. How large it is, delta and sigma (`FIT`) make the sum over pixels of
    (alpha - exp(-d^2 / 2))^2 smallest for a round Gaussian, d its distance in standard deviations up to 3.6, over 12
    directions of view; for six points that is 2.5 % of the Gaussian's own sum of squares, 4.0 % if the hull's mean
    silhouette were that of the ellipsoid of 1.5 standard deviations. What is fitted is smaller, for alpha is half at the
    border of a hull, and at 1.18 standard deviations of a Gaussian.

    Where the standard deviations s1 >= s2 >= s3 differ, delta is that of a round one of s1^(1/8) s2^(1/2) s3^(3/8): the
    exponents of the best deltas of discs and needles down to a tenth as thick, which leave 10 % and 2.4 %. A triangle's is that
    of (s1 s2)^(1/2); it was fitted to a flat Gaussian and leaves 17 %.

    Args:
        tensors: of `Gaussians`: `means` [N, 3], `quats` [N, 4], `log_scales` [N, 3], and what is kept.
        points: K of each convex, 3 to 12.

    Returns:
        Of `Convexes`: `points` [N, K, 3], `log_deltas` [N], `log_sigmas` [N], `opacity_logits`, `sh0`, `shN`.

    Raises:
        ValueError: a shape does not fit, or no convex has so many points.
    """
    means, quats, log_scales = (tensors[name] for name in ("means", "quats", "log_scales"))
    count = check_shapes(means=(means, "N 3"), quats=(quats, "N 4"), log_scales=(log_scales, "N 3"))["N"]
    if points not in FIT:
        raise ValueError(f"points: expected {min(FIT)} to {max(FIT)} a convex, got {points}")
    distance, delta, sigma = FIT[points]
    log_scales = torch.maximum(log_scales, log_scales.amax(-1, keepdim=True) + math.log(_MIN_SHARE))
    sorted_scales, order = log_scales.sort(-1, descending=True)
    # Columns: the Gaussian's axes, longest first
    axes = rotation_matrices(quats).gather(-1, order[:, None].expand(count, 3, 3))
    local = distance * _directions(points).to(means) * sorted_scales.exp()[:, None]
    exponents = sorted_scales.new_tensor(_EXPONENTS_FLAT if points == 3 else _EXPONENTS)
    log_width = (sorted_scales * exponents).sum(-1)
    return {
        "points": means[:, None] + torch.einsum("nij,nkj->nki", axes, local),
        "log_deltas": math.log(delta) - log_width,
        "log_sigmas": means.new_full((count,), math.log(sigma)),
    } | {name: tensors[name] for name in ("opacity_logits", "sh0", "shN")}


def _directions(points: int) -> Tensor:
    """[K, 3] unit vectors."""
    if points == 3:
        angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
        return torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], -1)
    if points == 6:
        axes = torch.eye(3, dtype=torch.float64)
        return torch.cat([axes, -axes])
    return fibonacci_sphere(points)
