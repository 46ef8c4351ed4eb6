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
        return _degree_at(self.sh_degree, self.sh_interval, progress)


@dataclass(frozen=True)
class CompactConfig:
    """Gaussians trained to become a small file (docs/compact.md); only with "gaussians"."""

    prune: float = 0.0
    """Share of the Gaussians to drop once none are added any more: those without which the pictures lose least."""
    masks: bool = False
    """Learn which Gaussians the pictures can do without, and drop them (Compact 3D Gaussian Splatting, arXiv:2311.13681)."""
    mask_weight: float = 5e-3
    """Weight of the mean of the masks in the loss: the more, the fewer Gaussians stay."""
    mask_lr: float = 5e-2
    """Learning rate of the masks."""
    sog: bool = False
    """Sort the Gaussians into a grid once none are added any more, and make neighbours alike (Self-Organizing Gaussian Grids,
    arXiv:2312.13299): pictures of their properties, as in a .sog, become smooth."""
    sog_weight: float = 3e-2
    """Weight in the loss of how much they differ."""
    hash: bool = False
    """Take harmonics above degree 0 from a small hash grid of positions instead of storing a set for each Gaussian; what leaves
    the training has them stored."""
    hash_lr: float = 5e-3
    """Learning rate of the hash grid and its network."""

    @property
    def asked(self) -> tuple[str, ...]:
        """The options that are on."""
        return tuple(name for name in ("prune", "masks", "sog", "hash") if getattr(self, name))


RATED_SIZE = 0.1
"""Distance of a convex's points from its centre, scene units, at which they have the learning rate of its config."""


@dataclass(frozen=True)
class ConvexesConfig:
    """Smooth convexes. Learning rates are Adam's, per step; that of `points` is in scene units, for a convex whose points lie
    0.1 from its centre, and in proportion to that distance for others."""

    points: int = 6
    """Of each convex, 3 to 12."""
    sh_degree: int = 3
    """Harmonics stored, 0 (one colour from everywhere) to 3."""
    sh_interval: float = 1 / 30
    """Share of the training after which one more degree of harmonics is used."""
    init_opacity: float = 0.3
    """Opacity of a convex made from a point, in (0, 1)."""
    init_scale: float = 1.2
    """Radius of a convex made from a point, in distances to its nearest neighbours."""
    init_delta: float = 5.0
    """Its smoothness, per radius."""
    init_sigma: float = 1.0
    """Its sharpness."""
    points_lr: float = 1e-2
    points_lr_final: float = 2e-4
    """What `points_lr` decays to, exponentially, over the training."""
    log_deltas_lr: float = 2e-2
    log_sigmas_lr: float = 2e-2
    opacity_logits_lr: float = 5e-2
    sh0_lr: float = 1e-2
    shN_lr: float = 2e-3
    shN_every: int = 2
    """Steps between updates of `shN`, by far the most memory of all that a step touches."""

    def sh_degree_at(self, progress: float) -> int:
        """Harmonics in use at `progress` in 0..1."""
        return _degree_at(self.sh_degree, self.sh_interval, progress)


def _degree_at(stored: int, interval: float, progress: float) -> int:
    """Harmonics in use at `progress` in 0..1, one more after each `interval` of it, up to those `stored`."""
    # The small term keeps a multiple of the interval from rounding down.
    return stored if interval <= 0 else min(stored, int(progress / interval + 1e-9))


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
    width: int = 32
    """Of the networks' hidden layers."""
    sampler: Literal["auto", "occupancy", "proposals", "nerfacc"] = "auto"
    """Where samples lie along rays. "occupancy": in cells of a grid that are not empty. "nerfacc": the same by an installed
    nerfacc, on CUDA. "proposals": where small grids that learn with the field find something. "auto": occupancy with "box",
    proposals with "space"."""
    proposals: tuple[int, int, int] = (64, 48, 32)
    """Pieces of a ray that two proposals look at, one after the other, and samples of a training step, half of those of a
    picture; with proposals."""
    networks: Literal["auto", "tinycudann"] = "auto"
    """Who computes grid and networks: our own kernels, or an installed tiny-cuda-nn, on CUDA; only with "hash"."""
    extent: Literal["auto", "box", "space"] = "auto"
    """"box": nothing outside the capture's bounds. "space": everything; what is outside the bounds is contracted. "auto":
    a box where images are transparent around an object."""
    near: float = 0.1
    """Nothing is nearer to a camera than this, in distances of the camera from the centre; with "space"."""
    occupancy: int = 128
    """Cells along the longest side of the bounds, of the grid that says where there is something; a multiple of 16. This
    and the three below are for occupancy."""
    nests: int = 5
    """How many such grids around each other, each twice as large; with "space"."""
    steps: int = 512
    """Steps of a ray along the diagonal of the bounds."""
    cone: float = 1 / 256
    """Steps are at least this share of the distance from the camera; with "space"."""
    distortion: float = 0.01
    """Weight of the distortion loss, which gathers the light of a ray in one place (Mip-NeRF 360, arXiv:2111.12077)."""
    variation: float = 0.0
    """Weight of the total variation of features on planes; only with "triplane"."""
    lr: float = 2e-2
    lr_final: float = 1e-3
    """What `lr` decays to, exponentially, over the training."""


@dataclass(frozen=True)
class VoxelConfig(FieldConfig):
    """A radiance field stored in voxels, from coarse to fine (Direct Voxel Grid Optimization, arXiv:2111.11215)."""

    levels: int = 3
    """Grids that add up, from `coarsest` to `finest`."""
    features: int = 4
    """Numbers of a voxel, 2, 4 or 8: its density, and what its colour is made of."""
    log2_rows: int = 21
    """Room for the voxels of one grid."""
    coarsest: int = 30
    """Voxels along the longest side of the bounds, of the coarsest grid."""
    finest: int = 126
    """Of the finest."""
    lr: float = 0.1
    """Of the voxels; where fewer cameras see one of the coarsest grid, its share of that."""
    lr_final: float = 1e-2
    """What `lr` decays to, exponentially, over the training."""
    network_lr: float = 5e-3
    """Of the colour network; decays as `lr` does."""
    init_alpha: float = 1e-2
    """Opacity of a finest voxel at first, in (0, 1)."""
    growth: float = 0.15
    """Share of the training over which the finer grids come in one after the other; 0: all are there from the start."""
    entropy: float = 1e-3
    """Weight of the entropy of the pixels' opacities, which are nearly 0 or 1 then."""

    def levels_at(self, progress: float) -> int:
        """Grids in use at `progress` in 0..1."""
        if self.growth <= 0:
            return self.levels
        # The small term keeps a multiple of the interval from rounding down.
        return min(self.levels, 1 + int((self.levels - 1) * progress / self.growth + 1e-9))


@dataclass(frozen=True)
class HollowConfig(FieldConfig):
    """A hashed radiance field with a mask of what matters, thinned out by ADMM (HollowNeRF, arXiv:2308.10122)."""

    log2_rows: int = 16
    """Points of a grid that are stored; more of them share places by a hash. With the mask, a third of what "hash" stores."""
    saliency: int = 64
    """Cells of the mask along the longest side of the bounds."""
    saliency_lr: float = 2e-2
    """Of the mask; decays as `lr` does."""
    sparsity: float = 0.02
    """Weight of the mean of the mask in the loss."""
    rho: float = 0.2
    """Weight of the augmented Lagrangian; `sparsity` / `rho` is what a dual update takes off the mask where nothing holds it up."""
    dual_interval: int = 16
    """Steps between dual updates."""
    prune: float = 0.5
    """Share of the training after which what ADMM has set to 0 is cut off for good, and the rest trains freely."""


SIMPLEX = FieldConfig()
TRIPLANE = FieldConfig(levels=4, features=8, log2_rows=19, coarsest=64, finest=512)

TRAINED_BY: dict[str, tuple[str, ...]] = {
    "gaussians": ("adc", "mcmc", "fixed"),
    "convexes": ("split", "fixed"),
    "hash": ("occupancy",),
    "simplex": ("occupancy",),
    "triplane": ("occupancy",),
    "voxel": ("occupancy",),
    "hollow": ("occupancy",),
}
"""What may train each representation, the default first."""
