"""What every reader of captures returns: frames, points and the frame of reference that training works in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from prismfield.render.cameras import Cameras


@dataclass(frozen=True)
class Frame:
    """One image of a capture and the camera that took it; nothing is decoded yet."""

    name: str
    """File name relative to the image folder, unique in the capture, with forward slashes."""
    image_path: Path
    camera: Cameras
    """One camera with its pose in the scene frame, at the image file's own resolution, perhaps distorted."""
    mask_path: Path | None = None
    """Grey image of the same size; pixels brighter than half its maximum count."""
    time: float | None = None
    """Moment of a dynamic capture, as the file states it."""
    depth_path: Path | None = None
    """Ground-truth camera z of a pinhole camera: 16-bit PNG or float EXR, 0 where unknown."""
    depth_scale: float = 1.0
    """User units per unit of the depth file."""


@dataclass(frozen=True)
class Points:
    """A coloured point cloud."""

    xyz: Tensor
    """[P, 3] float32, scene frame."""
    rgb: Tensor
    """[P, 3] float32 in 0..1."""

    def __len__(self) -> int:
        return self.xyz.shape[0]


@dataclass(frozen=True)
class SceneFrame:
    """How scene coordinates relate to the user's: `x_scene = scale * (x_user - center)`.

    A translation and a uniform scale only, so that directions, and with them spherical harmonics, are the same in both.
    """

    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """User units."""
    scale: float = 1.0
    """Scene units per user unit."""
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Estimated unit vector against gravity."""

    def points_to_scene(self, xyz: Tensor) -> Tensor:
        """[..., 3] positions from user to scene units."""
        return (xyz - torch.tensor(self.center, dtype=xyz.dtype, device=xyz.device)) * self.scale

    def points_to_user(self, xyz: Tensor) -> Tensor:
        """[..., 3] positions from scene to user units."""
        return xyz / self.scale + torch.tensor(self.center, dtype=xyz.dtype, device=xyz.device)

    def cameras_to_scene(self, cameras: Cameras) -> Cameras:
        """Cameras from the user's frame to the scene's, in single precision. Differentiable."""
        viewmats = cameras.viewmats.double()
        rotations, shifts = viewmats[:, :3, :3], viewmats[:, :3, 3:]
        shifts = (shifts + rotations @ viewmats.new_tensor(self.center)[:, None]) * self.scale
        return _posed(cameras, rotations, shifts, torch.float32)

    def cameras_to_user(self, cameras: Cameras) -> Cameras:
        """Cameras from the scene's frame to the user's, in double precision: those may be far from their origin."""
        viewmats = cameras.viewmats.double()
        left, _, right = torch.linalg.svd(viewmats[:, :3, :3])
        rotations, shifts = left @ right, viewmats[:, :3, 3:]  # the rounding of single precision would show far out
        shifts = shifts / self.scale - rotations @ viewmats.new_tensor(self.center)[:, None]
        return _posed(cameras, rotations, shifts, torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"center": list(self.center), "scale": self.scale, "up": list(self.up)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        x, y, z = (float(v) for v in values["center"])
        up_x, up_y, up_z = (float(v) for v in values["up"])
        return cls((x, y, z), float(values["scale"]), (up_x, up_y, up_z))


def _posed(cameras: Cameras, rotations: Tensor, shifts: Tensor, dtype: torch.dtype) -> Cameras:
    """The cameras with other world-to-camera rotations [C, 3, 3] and translations [C, 3, 1]."""
    bottom = rotations.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(rotations), 1, 4)
    viewmats = torch.cat([torch.cat([rotations, shifts], 2), bottom], 1)
    distortion = None if cameras.distortion is None else cameras.distortion.to(dtype)
    return replace(cameras, viewmats=viewmats.to(dtype), Ks=cameras.Ks.to(dtype), distortion=distortion)


@dataclass(frozen=True)
class SceneData:
    """A capture, read, checked and moved to the scene frame."""

    name: str
    root: Path
    kind: Literal["blender", "transforms", "colmap"]
    train: list[Frame]
    test: list[Frame]
    points: Points | None
    """None: the capture has no point cloud."""
    frame: SceneFrame
    aabb: Tensor
    """[2, 3] bounds of the content in the scene frame: of the points, else of what the cameras look at."""
    background: Literal["white", "black"] | None
    """Colour behind images that are transparent in places; None: they are opaque."""
    split: str
    """Where the test views come from, in words: "the files' own", "every 8th", ..."""
    warnings: list[str] = field(default_factory=list)
    """Whatever the user should know about the capture, one sentence each."""
