"""All of space in a ball, for scenes without bounds."""

import torch
from torch import Tensor

import prismfield.render.first_calls  # noqa: F401


def contract(x: Tensor) -> Tensor:
    """Squash all of space into a ball of radius 2, leaving the unit ball alone.

    Mip-NeRF 360 (arXiv:2111.12077), eq. 10. Differentiable any number of times.

    Args:
        x: [..., D] positions, in units of the unit ball.

    Returns:
        [..., D] with norm < 2, or 2 where float32 knows no difference. The gradient is finite everywhere, including at 0.
    """
    norm = _norm(x)
    return torch.where(norm > 1, (2 - 1 / norm) / norm, 1) * x


def uncontract(y: Tensor) -> Tensor:
    """The inverse of `contract`.

    Args:
        y: [..., D] of norm < 2; those beyond are taken for 1e-6 within.

    Returns:
        [..., D] positions, in units of the unit ball.
    """
    norm = _norm(y)
    return torch.where(norm > 1, 1 / (norm * (2 - norm).clamp(min=1e-6)), 1) * y


def _norm(x: Tensor) -> Tensor:
    """[..., 1] at least 1: the gradient of the norm is NaN at 0, and nothing here depends on a smaller one."""
    return (x * x).sum(-1, keepdim=True).clamp(min=1).sqrt()
