"""Real spherical harmonics of directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prismfield.encodings.points import check_points
from prismfield.render.ops.sh import sh_basis

_C4 = (
    2.5033429417967046,
    -1.7701307697799304,
    0.9461746957575601,
    -0.6690465435572892,
    0.10578554691520431,
    -0.6690465435572892,
    0.47308734787878004,
    -1.7701307697799304,
    0.6258357354491761,
)


class SphericalHarmonics(nn.Module):
    """Directions as real spherical harmonics: the smooth functions on the sphere, coarse ones first.

    In the order and with the signs of 3D Gaussian Splatting (arXiv:2308.04079), as `sh_colors` has them: by degree, then by
    order from -degree to degree, with the Condon-Shortley phase.
    """

    in_dim: int
    """3."""
    out_dim: int
    """`(degree + 1)^2`."""

    def __init__(self, degree: int = 3) -> None:
        """No parameters.

        Args:
            degree: of the finest, 0 to 4.

        Raises:
            ValueError: `degree` is out of its range.
        """
        super().__init__()
        if not 0 <= degree <= 4:
            raise ValueError(f"degree: expected 0 to 4, got {degree}")
        self.degree, self.in_dim, self.out_dim = degree, 3, (degree + 1) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: [..., 3] directions of unit length; of another length, the polynomials go on. NaN gives NaN in its own row, and raises
                under `torch.autograd.set_detect_anomaly`.

        Returns:
            [..., out_dim]. Differentiable any number of times.

        Raises:
            ValueError: the last axis is not 3.
        """
        check_points(x, 3)
        basis = sh_basis(x, min(self.degree, 3))
        return torch.cat([basis, _degree_four(x)], -1) if self.degree == 4 else basis


def _degree_four(dirs: Tensor) -> Tensor:
    """[..., 9] harmonics of degree 4 of unit `dirs` [..., 3]."""
    x, y, z = dirs.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    polynomials = (
        x * y * (xx - yy),
        y * z * (3 * xx - yy),
        x * y * (7 * zz - 1),
        y * z * (7 * zz - 3),
        zz * (35 * zz - 30) + 3,
        x * z * (7 * zz - 3),
        (xx - yy) * (7 * zz - 1),
        x * z * (xx - 3 * yy),
        xx * (xx - 3 * yy) - yy * (3 * xx - yy),
    )
    return torch.stack([factor * term for factor, term in zip(_C4, polynomials, strict=True)], -1)
