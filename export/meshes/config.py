"""How the surface of a scene is found: the options of `render-mesh`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Method = Literal["auto", "fusion", "density"]


@dataclass(frozen=True)
class SurfaceConfig:
    """How a surface is found. Lengths are in the user's units."""

    method: Method = "auto"
    """"fusion" of rendered depths, "density" for where a field's density passes a threshold; "auto": density for fields."""
    voxel: float | None = None
    """Distance of the samples; default the longest side of the box by --resolution, but not less than a pixel covers."""
    resolution: int = 512
    """Samples along the longest side of the box, where --voxel does not say."""
    box: tuple[float, float, float, float, float, float] | None = None
    """Least x y z, greatest x y z of what becomes a mesh; default what the cameras see, or the field's bounds."""
    depth: Literal["median", "expected"] = "median"
    """Fusion: which depth; the median lies nearer to surfaces, the expected one mixes what is before and behind."""
    truncation: float = 4.0
    """Fusion: how far round a surface distances count, in voxels."""
    least_views: int = 2
    """Fusion: how many views must have seen a place."""
    views: int | None = None
    """Fusion: at most so many, evenly chosen; default all the training had."""
    threshold: float | None = None
    """Density: per unit of length; default such that a two-hundredth of the box's diagonal would be half opaque."""
    smallest_part: float = 0.01
    """Parts with less than this share of the largest one's area are left out."""
    faces: int | None = None
    """Decimate to about so many; default as many as there are."""
    texture: int | None = None
    """Colours in a texture of so many texels squared, .glb only, instead of at the vertices; --faces is then 100000 unless given."""
    memory_mb: int = 4096
    """Most for the samples."""

    def check(self) -> None:
        """Raise a ValueError naming the first option that makes no sense."""
        limits: dict[str, tuple[float, float]] = {
            "resolution": (8, 8192),
            "truncation": (1, 64),
            "least_views": (1, 10000),
        }
        limits |= {"views": (1, 1_000_000), "smallest_part": (0, 1), "faces": (4, 1 << 30), "memory_mb": (1, 1 << 20)}
        limits |= {"texture": (64, 16384)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')}: expected {low:g} to {high:g}, got {value:g}")
        for name in ("voxel", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name}: expected more than 0, got {value:g}")
        if self.box is not None:
            pairs = zip(self.box[:3], self.box[3:], strict=True)
            if not all(-math.inf < low < high < math.inf for low, high in pairs):
                raise ValueError(
                    f"--box: expected the least x y z, then greater ones, got {' '.join(f'{v:g}' for v in self.box)}"
                )
