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


class ConvexPrimitive:
    """A smooth convex polygon: params are (x, y, v_1x, v_1y, .. v_Rx, v_Ry, delta, sigma, opacity), all in pixels.

    The corners v_i are relative to (x, y) and in order, so that the inside is to the left of each edge in axes with y up; a
    polygon of fewer than `room` = R corners repeats the first. With L_j a pixel's signed distance to edge j, positive outside,
    phi = log sum_j exp(delta L_j) and alpha = opacity / (1 + exp(sigma phi)). 3D Convex Splatting (arXiv:2411.14974), eq. 2-4.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_params = 2 * room + 5

    def alpha(self, params: Tensor, px: Tensor, py: Tensor) -> Tensor:
        corners, edges, lengths = self._edges(params)
        delta, sigma, opacity = params[..., -3:].unbind(-1)
        dx, dy = px - params[..., 0], py - params[..., 1]
        to_x, to_y = dx[..., None] - corners[..., 0], dy[..., None] - corners[..., 1]
        distances = (edges[..., 1] * to_x - edges[..., 0] * to_y) / torch.where(lengths > 0, lengths, 1)
        exponents = torch.where(lengths > 0, delta[..., None] * distances, _NO_EDGE)
        return opacity * torch.sigmoid(-sigma * torch.logsumexp(exponents, -1))

    def row_span(self, params: Tensor, y0: Tensor, y1: Tensor) -> tuple[Tensor, Tensor]:
        center_y, starts = params[..., 1, None], self.outline(params)
        ends = starts.roll(-1, -2)
        low, high = (torch.stack([starts[..., 1], ends[..., 1]]) + center_y).aminmax(dim=0)
        crossed = (low <= y1) & (high >= y0)
        rise = ends[..., 1] - starts[..., 1]
        slope = (ends[..., 0] - starts[..., 0]) / torch.where(rise == 0, 1, rise)
        inside = [torch.minimum(torch.maximum(low, y0), high), torch.maximum(torch.minimum(high, y1), low)]
        reached = [starts[..., 0] + slope * (y - center_y - starts[..., 1]) for y in inside]
        left, right = torch.minimum(*reached), torch.maximum(*reached)
        empty = params[..., -1, None] <= ALPHA_MIN
        left = left.masked_fill(empty | ~crossed, torch.inf).amin(-1)
        right = right.masked_fill(empty | ~crossed, -torch.inf).amax(-1)
        return params[..., 0] + left, params[..., 0] + right

    def outline(self, params: Tensor) -> Tensor:
        """[..., R, 2] corners, relative to the centre, of a polygon outside of which alpha stays below ALPHA_MIN.

        Since phi > delta max_j L_j, that is the polygon with its edges moved outwards, to where delta L = phi for ALPHA_MIN.
        """
        corners, edges, lengths = self._edges(params)
        delta, sigma, opacity = params[..., -3:].unbind(-1)
        # Never inwards: edges would vanish.
        margin = (torch.log((opacity / ALPHA_MIN - 1).clamp(min=1)) / (sigma * delta))[..., None, None]
        normals = torch.stack([edges[..., 1], -edges[..., 0]], -1) / torch.where(lengths > 0, lengths, 1)[..., None]
        last = (lengths > 0).sum(-1, keepdim=True).clamp(min=1) - 1  # of the edges that there are
        before = normals.roll(1, -2)
        before[..., 0, :] = normals.gather(-2, last[..., None].expand(*last.shape, 2)).squeeze(-2)
        moved = corners + margin * (before + normals) / (1 + (before * normals).sum(-1, keepdim=True)).clamp(min=1e-12)
        return torch.where(lengths[..., None] > 0, moved, moved[..., :1, :])

    def _edges(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Corners [..., R, 2], the edges that start there, [..., R, 2], and their lengths [..., R]; 0 where there is none."""
        corners = params[..., 2:-3].unflatten(-1, (self.room, 2))
        edges = corners.roll(-1, -2) - corners
        exists = (edges != 0).any(-1)
        lengths = torch.where(exists[..., None], edges, 1).square().sum(-1).sqrt() * exists
        return corners, edges, lengths


_NO_EDGE = -1e9  # an exponent that adds nothing, and whose gradient is finite

CONVEX_ROOMS = (6, 12)
"""Corners that there is room for in the primitives "convex6" and "convex12"."""

PRIMITIVES: dict[str, Primitive] = {"gaussian": GaussianPrimitive()} | {
    f"convex{room}": ConvexPrimitive(room) for room in CONVEX_ROOMS
}
