"""What every scene representation offers, and the table of those there are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from torch import Tensor

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.representations.convexes import Convexes
from prismfield.representations.fields import HashField, SimplexField, TriplaneField
from prismfield.representations.gaussians import Gaussians
from prismfield.representations.hollow import HollowField
from prismfield.representations.voxels import VoxelField


@runtime_checkable
class Representation(Protocol):
    """A trainable scene. Classes are `nn.Module`s; positions are in the scene frame."""

    batching: ClassVar[Literal["image", "pixels"]]
    """What one training step draws: whole images, or rays through chosen pixels."""

    @classmethod
    def from_points(cls, xyz: Tensor, rgb: Tensor, aabb: Tensor, config: Any) -> Self:
        """A scene to start training from: `xyz` and `rgb` (0..1) are [P, 3], `aabb` [2, 3] bounds the content."""
        ...

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], config: Any) -> Self:
        """The scene whose `tensors()` these are, with any number of primitives."""
        ...

    def render(
        self,
        cameras: Cameras,
        pixels: Tensor | None = None,
        background: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> RenderOutput:
        """Draw whole images, or only `pixels` [R, 3] (camera, column, row).

        Args:
            background: [C, 3], black if None.
            extras: what to compute beside colour and alpha; names in `render.rasterize.EXTRAS`. One that means nothing
                to the representation is ignored.
        """
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter: `name`, `params`, `lr`; `lr_final` where the rate decays over the training, `every` where
        the parameter is updated only each so many steps."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be saved, detached, under glossary names."""
        ...


REPRESENTATIONS: dict[str, type[Representation]] = {
    "gaussians": Gaussians,
    "convexes": Convexes,
    "hash": HashField,
    "simplex": SimplexField,
    "triplane": TriplaneField,
    "voxel": VoxelField,
    "hollow": HollowField,
}
"""3D Gaussians and smooth convexes with harmonic colour; radiance fields on hashed grids of cubes and of simplices, on planes, on voxels, and on
a hashed grid that a mask hollows out."""


def size_of(scene: Representation) -> tuple[str, int]:
    """What a scene is made of and how many: "primitives", or "parameters" where it has none."""
    if (primitives := getattr(scene, "num_primitives", None)) is not None:
        return "primitives", int(primitives)
    return "parameters", sum(p.numel() for group in scene.param_groups() for p in group["params"])
