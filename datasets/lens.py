"""Lens models: from undistorted to distorted normalised image coordinates, and back.

Normalised coordinates are camera x / z and y / z. The formulas are those of COLMAP's documentation of camera models
(https://colmap.github.io/cameras.html) and of OpenCV's calibration module; each function maps arrays of points at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Distort = Callable[[Array, Array, Array], tuple[Array, Array]]


def _opencv(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Rational radial and tangential: k1, k2, p1, p2, k3, k4, k5, k6."""
    k1, k2, p1, p2, k3, k4, k5, k6 = c
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + 2 * p2 * x * y + p1 * (r2 + 2 * y * y),
    )


def _angles(x: Array, y: Array) -> tuple[Array, Array]:
    """The point moved along its radius so that its distance from the centre is the ray's angle to the axis."""
    r = np.hypot(x, y)
    scale = np.divide(np.arctan(r), r, out=np.ones_like(r), where=r > 1e-9)
    return x * scale, y * scale


def _fisheye(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Equidistant: k1, k2, k3, k4 on even powers of the angle."""
    k1, k2, k3, k4 = c
    u, v = _angles(x, y)
    t2 = u * u + v * v
    radial = 1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4)))
    return u * radial, v * radial


def _thin_prism_fisheye(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Equidistant with tangential and thin-prism terms: k1, k2, p1, p2, k3, k4, sx1, sy1."""
    k1, k2, p1, p2, k3, k4, sx1, sy1 = c
    u, v = _angles(x, y)
    t2 = u * u + v * v
    radial = 1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4)))
    return (
        u * radial + 2 * p1 * u * v + p2 * (t2 + 2 * u * u) + sx1 * t2,
        v * radial + 2 * p2 * u * v + p1 * (t2 + 2 * v * v) + sy1 * t2,
    )


def _rad_tan_thin_prism_fisheye(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Project Aria's: k0..k5 radial on the angle, then p0, p1 tangential and s0..s3 thin prism on the result."""
    p0, p1, s0, s1, s2, s3 = c[6:]
    u, v = _angles(x, y)
    t2 = u * u + v * v
    radial = 1 + t2 * (c[0] + t2 * (c[1] + t2 * (c[2] + t2 * (c[3] + t2 * (c[4] + t2 * c[5])))))
    u, v = u * radial, v * radial
    r2 = u * u + v * v
    lean = 2 * (u * p0 + v * p1)
    return (
        u + u * lean + r2 * p0 + r2 * (s0 + r2 * s1),
        v + v * lean + r2 * p1 + r2 * (s2 + r2 * s3),
    )


def _fov(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Devernay and Faugeras: omega, the field of view of an ideal fisheye, radians."""
    (omega,) = c
    if abs(omega) < 1e-8:
        return x, y
    r = np.hypot(x, y)
    slope = 2 * np.tan(omega / 2)
    scale = np.divide(np.arctan(r * slope), r * omega, out=np.full_like(r, slope / omega), where=r > 1e-9)
    return x * scale, y * scale


def _division(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Fitzgibbon: k, where undistorted = distorted / (1 + k r^2) with r of the distorted point."""
    (k,) = c
    root = 1 - 4 * k * (x * x + y * y)
    scale = 2 / (1 + np.sqrt(np.where(root >= 0, root, np.nan)))
    return x * scale, y * scale


def _eucm(x: Array, y: Array, c: Array) -> tuple[Array, Array]:
    """Enhanced unified camera model: alpha, beta."""
    alpha, beta = c
    depth = alpha * np.sqrt(beta * (x * x + y * y) + 1) + (1 - alpha)
    return x / depth, y / depth


LENSES: dict[str, tuple[int, Distort]] = {
    "opencv": (8, _opencv),
    "fisheye": (4, _fisheye),
    "thin_prism_fisheye": (8, _thin_prism_fisheye),
    "rad_tan_thin_prism_fisheye": (12, _rad_tan_thin_prism_fisheye),
    "fov": (1, _fov),
    "division": (1, _division),
    "eucm": (2, _eucm),
}
"""Name of a lens model -> number of coefficients, function of (x, y, coefficients)."""


@dataclass(frozen=True)
class Lens:
    """A lens model with its coefficients."""

    model: str
    """A name in `LENSES`, or "pinhole"."""
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.model == "pinhole" and not self.coefficients:
            return
        if self.model not in LENSES:
            raise ValueError(f"lens model: expected pinhole or one of {', '.join(LENSES)}, got {self.model!r}")
        if len(self.coefficients) != LENSES[self.model][0]:
            raise ValueError(
                f"{self.model}: expected {LENSES[self.model][0]} coefficients, got {len(self.coefficients)}"
            )
        if not np.isfinite(self.coefficients).all():
            raise ValueError(f"{self.model}: expected finite coefficients, got {self.coefficients}")

    def distort(self, xy: Array) -> Array:
        """[..., 2] undistorted to distorted normalised coordinates; NaN where the model has no image of the ray."""
        if self.model == "pinhole":
            return xy
        with np.errstate(all="ignore"):
            x, y = LENSES[self.model][1](xy[..., 0], xy[..., 1], np.asarray(self.coefficients))
        return np.stack([x, y], -1)

    def max_radius(self, limit: float) -> float:
        """Undistorted radius (tangent of the angle to the axis) up to which the model is one to one, at most `limit`.

        Polynomials turn back beyond the corners that they were fitted to; rays out there would land inside the image.
        """
        if self.model == "pinhole":
            return limit
        angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
        radii = np.tan(np.linspace(0, np.arctan(limit), 513))
        rays = np.stack([np.cos(angles), np.sin(angles)], -1)
        images = self.distort(radii[:, None, None] * rays)
        with np.errstate(invalid="ignore"):
            outward = (np.diff((images * rays).sum(-1), axis=0) > 0).all(1)
        return limit if outward.all() else float(radii[int(np.argmin(outward))])

    def undistort(self, xy: Array, limit: float = 60.0) -> Array:
        """[..., 2] distorted to undistorted normalised coordinates, the inverse of `distort`.

        Newton's method, started by bisection along the radius; NaN where no ray within `max_radius(limit)`
        lands on the point.
        """
        if self.model == "pinhole":
            return xy.copy()
        bound = self.max_radius(limit)
        guess = self._radial_guess(xy, bound)
        for _ in range(20):
            error = self.distort(guess) - xy
            step = 1e-6 * (1 + np.abs(guess))
            along_x, along_y = guess + step * (1, 0), guess + step * (0, 1)
            a, c = np.moveaxis((self.distort(along_x) - xy - error) / step[..., :1], -1, 0)
            b, d = np.moveaxis((self.distort(along_y) - xy - error) / step[..., 1:], -1, 0)
            with np.errstate(all="ignore"):
                determinant = a * d - b * c
                update = np.stack([d * error[..., 0] - b * error[..., 1], a * error[..., 1] - c * error[..., 0]], -1)
                update = update / determinant[..., None]
            longest = 0.2 * (1 + np.linalg.norm(guess, axis=-1, keepdims=True))
            length = np.linalg.norm(update, axis=-1, keepdims=True)
            guess = guess - update * np.minimum(1, longest / np.maximum(length, 1e-30))
            if not (length > 1e-13).any():
                break
        with np.errstate(invalid="ignore"):
            good = np.linalg.norm(self.distort(guess) - xy, axis=-1) < 1e-7 * (1 + np.linalg.norm(xy, axis=-1))
            good &= np.linalg.norm(guess, axis=-1) <= bound * 1.001
        return np.where(good[..., None], guess, np.nan)

    def _radial_guess(self, xy: Array, bound: float) -> Array:
        """The point along the same direction whose distorted radius fits, found by bisection."""
        radius = np.linalg.norm(xy, axis=-1)
        direction = xy / np.maximum(radius, 1e-12)[..., None]
        low, high = np.zeros_like(radius), np.full_like(radius, np.arctan(bound))
        for _ in range(30):
            middle = (low + high) / 2
            reached = np.linalg.norm(self.distort(np.tan(middle)[..., None] * direction), axis=-1) < radius
            low, high = np.where(reached, middle, low), np.where(reached, high, middle)
        return np.tan(low)[..., None] * direction
