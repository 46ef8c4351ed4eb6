"""What every encoding asks of its positions."""

from __future__ import annotations

import torch
from torch import Tensor


def check_points(x: Tensor, in_dim: int) -> None:
    """Refuse what has no code.

    Args:
        x: expected [..., in_dim]. Under `torch.autograd.set_detect_anomaly`, and only there as it costs a pass, also without NaN.
        in_dim: axes of a position.

    Raises:
        ValueError: the last axis is not `in_dim`, or there is a NaN.
    """
    if x.shape[-1:] != (in_dim,):
        raise ValueError(f"x: expected [..., {in_dim}], got {list(x.shape)}")
    if torch.is_anomaly_enabled() and bool(x.isnan().any()):
        row = int(x.detach().reshape(-1, in_dim).isnan().any(1).nonzero()[0, 0])
        raise ValueError(f"x: expected numbers, got NaN in row {row}")
