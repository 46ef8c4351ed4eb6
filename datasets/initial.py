"""The points that training starts from."""

from __future__ import annotations

from typing import Literal

import torch

from prismfield.datasets.base import Points, SceneData

Method = Literal["auto", "cloud", "random"]


def initial_points(data: SceneData, count: int, seed: int, method: Method = "auto") -> Points:
    """The capture's cloud, or random points."""
    if data.points is not None and method != "random":
        return data.points
    generator = torch.Generator().manual_seed(seed)
    xyz = data.aabb[0] + torch.rand(count, 3, generator=generator) * (data.aabb[1] - data.aabb[0])
    return Points(xyz, torch.full((count, 3), 0.5))
