"""What is learnt about each training image beside the scene: its exposure, and a better pose."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from prismfield.render.cameras import Cameras


class Exposure(nn.Module):
    """An affine map of the colours for each training image, as in Hierarchical 3D Gaussians (Kerbl et al. 2024).

    Departs from it in that the mean over the images stays the identity, so that what is rendered without a map, as test
    images are, has the exposure of an average image.
    """

    def __init__(self, images: int) -> None:
        super().__init__()
        self.deltas = nn.Parameter(torch.zeros(images, 3, 4))
        """[V, 3, 4] difference from the identity, before the mean over V is taken off."""

    def forward(self, rgb: Tensor, index: int | Tensor) -> Tensor:
        """Rendered [C, H, W, 3] as image `index` would have recorded it, or [R, 3] as the images `index` [R]."""
        # The mean is detached: else Adam, which scales gradients up, would move every image's map in every step.
        # Unlike that of deltas[index], the backward pass of index_select is the same in each run.
        own = self.deltas[index] if isinstance(index, int) else self.deltas.index_select(0, index)
        delta = own - self.deltas.detach().mean(0)
        affine = delta + torch.eye(3, 4, device=delta.device)
        if affine.ndim == 2:
            return rgb @ affine[:, :3].T + affine[:, 3]
        return (affine[..., :3] @ rgb[..., None]).squeeze(-1) + affine[..., 3]


class PoseDeltas(nn.Module):
    """A small motion of each training camera: a rotation vector and a translation, in the camera's frame."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.deltas = nn.Parameter(torch.zeros(images, 6))
        """[V, 6] rotation vector (radians), translation (scene units)."""

    def forward(self, cameras: Cameras, index: int | slice) -> Cameras:
        """`cameras` with their poses moved as learnt for image `index`, or for the images of a slice, one each."""
        rotation, translation = self.deltas[index, :3], self.deltas[index, 3:]
        viewmats = cameras.viewmats
        turned = rotation_of(rotation) @ viewmats[:, :3]
        moved = torch.cat([turned[..., :3], turned[..., 3:] + translation[..., None]], -1)
        return replace(cameras, viewmats=torch.cat([moved, viewmats[:, 3:]], 1))


def rotation_of(vector: Tensor) -> Tensor:
    """[..., 3, 3] rotation by |`vector`| radians about `vector` [..., 3] (Rodrigues). Differentiable, also at zero.

    Unlike torch.matrix_exp, which looks at its argument's norm, it lets nobody wait for a GPU.
    """
    square = vector.square().sum(-1)
    is_small = square < 1e-4
    angle = torch.where(is_small, 1.0, square).sqrt()
    sine = torch.where(is_small, 1 - square / 6 + square * square / 120, angle.sin() / angle)[..., None, None]
    versine = torch.where(is_small, 0.5 - square / 24 + square * square / 720, 2 * ((0.5 * angle).sin() / angle) ** 2)
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=vector.dtype, device=vector.device)
    return eye + sine * cross + versine[..., None, None] * (cross @ cross)
