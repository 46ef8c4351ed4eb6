"""How unlike levels of detail look, measured on small pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import EXPECTED_UP, SplatAsset
from prismfield.render.cameras import Cameras
from prismfield.representations.gaussians import Gaussians

_SIZE = 128  # pixels across
_DISTANCE, _MARGIN = 200.0, 1.05  # in radii of what is seen: so far away that all rays are nearly parallel


def relative_errors(levels: Sequence[SplatAsset | None], low: NDArray, high: NDArray) -> list[float]:
    """How much each level's pictures differ from the finest's: squared differences of colour and coverage over squares.

    What streamed SOG calls an error (`errors` in lod-meta.json): six views from all round, over black, antialiased. Without a
    unit, so that boxes of any size compare; never less than that of a finer level.

    Args:
        levels: from fine to coarse; None where a level has nothing here. The finest that there is has the error 0.
        low: [3] corner of the box to look at.
        high: [3] the other one.
    """
    there = [k for k, level in enumerate(levels) if level is not None]
    errors = [0.0] * len(levels)
    if len(there) < 2:
        return errors
    center, radius = (low + high) / 2, max(float(np.linalg.norm(high - low)) / 2, 1e-9)
    frame = SceneFrame((float(center[0]), float(center[1]), float(center[2])), 1 / radius, EXPECTED_UP)
    pictures = {k: _pictures(level, frame) for k in there if (level := levels[k]) is not None}
    finest = pictures[there[0]]
    shown = float(finest.square().sum())
    worst = 0.0
    for k in there[1:]:
        lost = float((pictures[k] - finest).square().sum())
        worst = errors[k] = max(worst, lost / shown if shown > 0 else float(lost > 0))
    return errors


def _pictures(asset: SplatAsset, frame: SceneFrame) -> Tensor:
    """[6, H, W, 4] premultiplied colour and alpha."""
    drawn = replace(asset, antialiased=True)
    with torch.no_grad():
        out = Gaussians.from_tensors(drawn.to_tensors(frame), drawn.config()).render(_cameras())
    return torch.cat([out.rgb, out.alpha[..., None]], -1)


@cache
def _cameras() -> Cameras:
    """Along both directions of three axes that are none of the harmonics', where some of these are 0."""
    turn = Rotation.from_rotvec([0.5, 0.9, -0.4]).as_matrix()
    poses = np.tile(np.eye(4), (6, 1, 1))
    for k in range(6):
        right, down = np.roll(turn, k % 3, 1)[:, :2].T * (1, -1)[k // 3]
        if k >= 3:
            down = -down
        forward = np.cross(right, down)
        poses[k, :3, :3] = np.stack([right, down, forward], 1)
        poses[k, :3, 3] = -_DISTANCE * forward
    focal = _DISTANCE * _SIZE / (2 * _MARGIN)
    intrinsics = np.array([[focal, 0, _SIZE / 2], [0, focal, _SIZE / 2], [0, 0, 1]])
    matrices = torch.from_numpy(poses).float(), torch.from_numpy(np.tile(intrinsics, (6, 1, 1))).float()
    return Cameras.from_camtoworlds(*matrices, _SIZE, _SIZE)
