"""Synthetic scenes for the benchmarks: Gaussians spread over the view with the sizes and opacities of trained scenes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prismfield.render.cameras import Cameras

SIZES = {"100k": (100_000, 800, 600), "1M": (1_000_000, 1280, 720)}
"""Name to (Gaussians, width, height), those of the prototype's measurements in DESIGN.md."""


@dataclass(frozen=True)
class SyntheticScene:
    """N Gaussians before one camera; activated values."""

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    sh0: Tensor
    shN: Tensor
    cameras: Cameras
    background: Tensor


def make_scene(count: int, width: int, height: int, *, seed: int = 0) -> SyntheticScene:
    """Depths are log-uniform over a factor of 20; standard deviations log-normal about 1.35 pixels (0.95 past 300k)."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    focal = 0.9 * width
    u, v = ((uniform(count) * 1.1 - 0.05) * side for side in (width, height))
    z = torch.exp(uniform(count) * math.log(20.0))
    in_camera = torch.stack([(u - width / 2) / focal * z, (v - height / 2) / focal * z, z], -1)
    axis = torch.tensor([[0.0, -0.2, -0.5], [0.2, 0.0, -0.3], [0.5, 0.3, 0.0]])
    rotation, translation = torch.matrix_exp(axis), torch.tensor([0.1, -0.2, 0.5])
    sigma = 1.35 if count <= 300_000 else 0.95
    base = sigma * torch.exp(0.75 * normal(count)) * z / focal
    viewmat = torch.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = rotation, translation
    K = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    return SyntheticScene(
        means=(in_camera - translation) @ rotation,
        quats=normal(count, 4),
        scales=base[:, None] * torch.exp(0.6 * normal(count, 3) - 0.2),
        # Beta(0.7, 1) by inversion: most splats of a trained scene are faint.
        opacities=(uniform(count) ** (1 / 0.7)).clamp(1e-4, 1 - 1e-4),
        sh0=(uniform(count, 1, 3) - 0.4) / 0.28209479,
        shN=0.1 * normal(count, 15, 3),
        cameras=Cameras(viewmat[None], K[None], width, height),
        background=torch.tensor([[0.1, 0.2, 0.3]]),
    )
