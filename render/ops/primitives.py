"""What the tile rasterizer asks of a primitive, in plain PyTorch. `csrc/primitives.h` says the same in C++.

Binning and compositing know a primitive only through a row of screen parameters (columns 0 and 1 are its centre in pixels), a
footprint, and its alpha at a pixel. A new primitive is one class here, one struct there, and one line in each table.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

import prismfield.render.first_calls  # noqa: F401
from prismfield.render.ops.constants import ALPHA_MIN


class Primitive(Protocol):
    """The three things a primitive supplies beside its projection."""

    num_params: int
    """P, the number of screen parameters."""

    def alpha(self, params: Tensor, px: Tensor, py: Tensor) -> Tensor:
        """Unclamped alpha of `params` [..., P] at pixel positions `px`, `py` (broadcast); differentiable in all three."""

    def row_span(self, params: Tensor, y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
        """Leftmost and rightmost x where alpha reaches ALPHA_MIN between the heights `y0` and `y1`; left > right if nowhere."""


class GaussianPrimitive:
    """A 2D Gaussian: params are (x, y, a, b, c, log_opacity), `(a, b, c)` the conic, all in pixels.

    alpha = exp(log_opacity - (a dx^2 + c dy^2) / 2 - b dx dy). 3D Gaussian Splatting (arXiv:2308.04079), eq. 4.
    """

    num_params = 6

    def alpha(self, params: Tensor, px: Tensor, py: Tensor) -> Tensor:
        x, y, a, b, c, log_opacity = params.unbind(-1)
        dx, dy = px - x, py - y
        return torch.exp(log_opacity - 0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)

    def row_span(self, params: Tensor, y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
        x, y, a, b, c, log_opacity = params.unbind(-1)
        level = 2.0 * (log_opacity - torch.log(torch.tensor(ALPHA_MIN, dtype=params.dtype)))
        det = a * c - b * b
        half_height = (level.clamp(min=0) * a / det).sqrt()
        d0, d1 = torch.maximum(y0 - y, -half_height), torch.minimum(y1 - y, half_height)
        peak = -b * (level.clamp(min=0) / (c * det)).sqrt()  # the height at which the ellipse is widest to the right
        edges = []
        for side in (1.0, -1.0):
            d = torch.minimum(torch.maximum(side * peak, d0), d1)
            half = ((level * a - det * d * d).clamp(min=0)).sqrt() / a
            edges.append(x - b / a * d + side * half)
        empty = (level <= 0) | (d0 > d1)
        return edges[1].masked_fill(empty, torch.inf), edges[0].masked_fill(empty, -torch.inf)


PRIMITIVES: dict[str, Primitive] = {"gaussian": GaussianPrimitive()}
