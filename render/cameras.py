"""Cameras: a batch of poses and intrinsics that share one image size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

import prismfield.render.first_calls  # noqa: F401

CameraModel = Literal["pinhole", "opencv", "fisheye"]


@dataclass(frozen=True)
class Cameras:
    """C cameras in OpenCV axes (+x right, +y down, +z forward), pixel centres at +0.5.

    The rasterizer draws pinhole cameras only; lens models are removed from the images first (`datasets/undistort.py`).
    """

    viewmats: Tensor
    """[C, 4, 4] world to camera."""
    Ks: Tensor
    """[C, 3, 3] intrinsics in pixels."""
    width: int
    height: int
    model: CameraModel = "pinhole"
    distortion: Tensor | None = None
    """[C, 8] OpenCV (k1, k2, p1, p2, k3, k4, k5, k6) or [C, 4] fisheye (k1, k2, k3, k4); None for pinhole."""

    def __post_init__(self) -> None:
        count = self.viewmats.shape[0]
        if self.viewmats.shape != (count, 4, 4):
            raise ValueError(f"viewmats: expected [C, 4, 4], got {tuple(self.viewmats.shape)}")
        if self.Ks.shape != (count, 3, 3):
            raise ValueError(f"Ks: expected [{count}, 3, 3] like viewmats, got {tuple(self.Ks.shape)}")
        if self.width < 1 or self.height < 1:
            raise ValueError(f"image size: expected at least 1x1, got {self.width}x{self.height}")

    def __len__(self) -> int:
        return self.viewmats.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Self:
        """Cameras at `index`, always as a batch."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index >= 0 else slice(index, None if index == -1 else index + 1)
        distortion = None if self.distortion is None else self.distortion[index]
        return replace(self, viewmats=self.viewmats[index], Ks=self.Ks[index], distortion=distortion)

    @property
    def camtoworlds(self) -> Tensor:
        """[C, 4, 4] camera to world."""
        return torch.linalg.inv(self.viewmats)

    @property
    def centers(self) -> Tensor:
        """[C, 3] camera centres in world units."""
        return -(self.viewmats[:, :3, :3].mT @ self.viewmats[:, :3, 3:]).squeeze(-1)

    def to(self, device: torch.device | str) -> Self:
        """The same cameras on `device`."""
        distortion = None if self.distortion is None else self.distortion.to(device)
        return replace(self, viewmats=self.viewmats.to(device), Ks=self.Ks.to(device), distortion=distortion)

    def resized(self, width: int, height: int) -> Self:
        """The same view over `width` x `height` pixels; intrinsics scale by the exact ratio of each axis."""
        scale = torch.tensor(
            [width / self.width, height / self.height, 1.0], dtype=self.Ks.dtype, device=self.Ks.device
        )
        return replace(self, Ks=self.Ks * scale[None, :, None], width=width, height=height)

    def rays(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """World-space rays through pixel centres.

        Args:
            pixels: [R, 3] integers: camera, column, row.

        Returns:
            `origins` [R, 3] and unit-length `dirs` [R, 3].

        Raises:
            ValueError: the cameras have lens distortion, which must be removed first.
        """
        if self.model != "pinhole":
            raise ValueError(f"rays: expected pinhole cameras, got {self.model!r}; undistort the images first")
        camera, column, row = pixels.long().unbind(-1)
        Ks = self.Ks.index_select(0, camera)  # unlike that of Ks[camera], its backward pass is the same in each run
        x = (column + 0.5 - Ks[:, 0, 2]) / Ks[:, 0, 0]
        y = (row + 0.5 - Ks[:, 1, 2]) / Ks[:, 1, 1]
        dirs_cam = torch.stack([x, y, torch.ones_like(x)], -1)
        dirs = (self.viewmats.index_select(0, camera)[:, :3, :3].mT @ dirs_cam[..., None]).squeeze(-1)
        return self.centers.index_select(0, camera), torch.nn.functional.normalize(dirs, dim=-1)

    @classmethod
    def from_camtoworlds(cls, camtoworlds: Tensor, Ks: Tensor, width: int, height: int) -> Self:
        """Pinhole cameras from [C, 4, 4] camera-to-world matrices in OpenCV axes."""
        return cls(torch.linalg.inv(camtoworlds), Ks, width, height)

    @classmethod
    def stack(cls, cameras: list[Self]) -> Self:
        """One batch from cameras of equal size and model."""
        first = cameras[0]
        kinds = {(c.width, c.height, c.model, c.distortion is None) for c in cameras}
        if len(kinds) > 1:
            raise ValueError("cameras: expected one image size and one camera model in a batch")
        distortions = [c.distortion for c in cameras if c.distortion is not None]
        return replace(
            first,
            viewmats=torch.cat([c.viewmats for c in cameras]),
            Ks=torch.cat([c.Ks for c in cameras]),
            distortion=torch.cat(distortions) if distortions else None,
        )
