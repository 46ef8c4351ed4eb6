"""Options of the representations. No torch here: the command line reads this before it parses its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GaussiansConfig:
    """3D Gaussians. Learning rates are Adam's, per step; those of `means` are in scene units.

    All rates but that of opacities are above those of 3D Gaussian Splatting, which trains for 30,000 steps: 3000 steps on
    bonsai at a quarter of its size gain 3 dB by that and by `schedule.settle` (docs/results.md).
    """

    sh_degree: int = 3
    """Harmonics stored, 0 (one colour from everywhere) to 3."""
    sh_interval: float = 1 / 30
    """Share of the training after which one more degree of harmonics is used."""
    antialiased: bool = False
    """Scale opacity so that the screen-space blur adds no mass; kept in exports."""
    init_opacity: float = 0.1
    """Opacity of a Gaussian made from a point, in (0, 1)."""
    init_scale: float = 1.0
    """Standard deviation of a Gaussian made from a point, in distances to its nearest neighbours."""
    means_lr: float = 6.4e-4
    means_lr_final: float = 1.9e-5
    """What `means_lr` decays to, exponentially, over the training."""
    quats_lr: float = 4e-3
    log_scales_lr: float = 2e-2
    opacity_logits_lr: float = 5e-2
    sh0_lr: float = 1e-2
    shN_lr: float = 2e-3
    shN_every: int = 2
    """Steps between updates of `shN`, by far the most memory of all that a step touches."""

    def sh_degree_at(self, progress: float) -> int:
        """Harmonics in use at `progress` in 0..1."""
        if self.sh_interval <= 0:
            return self.sh_degree
        # The small term keeps a multiple of the interval from rounding down.
        return min(self.sh_degree, int(progress / self.sh_interval + 1e-9))


@dataclass(frozen=True)
class FieldConfig:
    """A radiance field: an encoding of positions, small networks, and an occupancy grid that says where to look.

    Learning rates are Adam's, per step.
    """

    levels: int = 16
    """Grids of the encoding, from `coarsest` to `finest`."""
    features: int = 2
    """Numbers stored at each of their points: 1, 2, 4 or 8."""
    log2_rows: int = 18
    """Points of a grid that are stored; more of them share places by a hash."""
    coarsest: int = 16
    """Cells along the longest side of the bounds, of the coarsest grid."""
    finest: int = 2048
    """Of the finest."""
    half: bool = False
    """Features are read in half precision; they are stored and updated in single precision."""
    width: int = 64
    """Of the networks' hidden layers."""
    extent: Literal["auto", "box", "space"] = "auto"
    """"box": nothing outside the capture's bounds. "space": everything; what is outside the bounds is contracted. "auto":
    a box where images are transparent around an object."""
    near: float = 0.1
    """Nothing is nearer to a camera than this, in distances of the camera from the centre; with "space"."""
    occupancy: int = 128
    """Cells along the longest side of the bounds, of the grid that says where there is something; a multiple of 16."""
    nests: int = 5
    """How many such grids around each other, each twice as large; with "space"."""
    steps: int = 512
    """Steps of a ray along the diagonal of the bounds."""
    cone: float = 1 / 256
    """Steps are at least this share of the distance from the camera; with "space"."""
    distortion: float = 0.0
    """Weight of the distortion loss, which gathers the light of a ray in one place (Mip-NeRF 360, arXiv:2111.12077)."""
    variation: float = 0.0
    """Weight of the total variation of features on planes; only with "triplane"."""
    lr: float = 1e-2
    lr_final: float = 5e-4
    """What `lr` decays to, exponentially, over the training."""


SIMPLEX = FieldConfig()
TRIPLANE = FieldConfig(levels=4, features=8, log2_rows=19, coarsest=64, finest=512)
VOXEL = FieldConfig(levels=4, features=4, log2_rows=21, coarsest=16, finest=126, lr=5e-2, lr_final=5e-3)

TRAINED_BY: dict[str, tuple[str, ...]] = {
    "gaussians": ("adc", "mcmc", "fixed"),
    "hash": ("occupancy",),
    "simplex": ("occupancy",),
    "triplane": ("occupancy",),
    "voxel": ("occupancy",),
}
"""What may train each representation, the default first."""
