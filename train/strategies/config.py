"""Options of the strategies. No torch here: the command line reads this before it parses its arguments.

Step counts are those of a 30,000-step training. A shorter one shrinks them in proportion, none below `min_interval`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdcConfig:
    """Adaptive density control: clone, split, prune, reset (3D Gaussian Splatting, arXiv:2308.04079)."""

    growth: Literal["threshold", "budget"] = "budget"
    """"threshold": every Gaussian whose screen gradient is above `grad_threshold` grows. "budget": the count follows a
    quadratic curve up to the most primitives allowed, and those with the largest gradients grow (Taming 3DGS,
    arXiv:2406.15643)."""
    absgrad: bool = True
    """Judge by the sum of absolute per-pixel gradients, which do not cancel inside a large Gaussian (AbsGS,
    arXiv:2404.10484)."""
    grad_threshold: float = 0.0
    """Mean screen gradient, per half image, above which a Gaussian grows; 0 takes 0.0002, or 0.0008 with `absgrad`."""
    split_extent: float = 0.01
    """Standard deviation above which a growing Gaussian is split rather than cloned, scene units."""
    min_opacity: float = 0.005
    """Fainter Gaussians are dropped."""
    max_extent: float = 0.1
    """Standard deviation above which a Gaussian is dropped once opacities have been reset, scene units; 0 keeps all."""
    max_screen: float = 0.0
    """Radius above which a Gaussian is dropped once opacities have been reset, in image widths; 0 keeps all."""
    start: int = 500
    """First step that grows."""
    interval: int = 100
    """Steps from one growth to the next."""
    min_interval: int = 50
    """Fewest steps between growths in a short training: every Gaussian should have been seen from several cameras."""
    stop: float = 0.5
    """Share of the training after which nothing grows, is dropped or reset."""
    reset_interval: int = 0
    """Steps from one reset of all opacities to the next, 3000 in the original; 0 never resets: a short training does not
    recover from one."""
    reset_opacity: float = 0.01
    """Opacities are cut to this at a reset."""


@dataclass(frozen=True)
class SplitConfig:
    """Density control of convexes: split into as many as there are points, prune (3D Convex Splatting, arXiv:2411.14974)."""

    growth: Literal["threshold", "budget"] = "budget"
    """As `adc.growth`."""
    absgrad: bool = True
    """Judge by the screen gradient of the position, as `adc.absgrad`; else by the gradient of the sharpness, as the paper."""
    grad_threshold: float = 0.0
    """Mean gradient above which a convex is split; 0 takes 0.0008, or 2.5e-5 for the sharpness."""
    into: Literal["points", "halves"] = "points"
    """What a convex is split into: smaller ones around each of its points, as in the paper, or two along its longest axis."""
    shrink: float = 0.63
    """Size of the parts, in that of the whole; of halves, along their longest axis: 0.5 and a little."""
    part_opacity: float = 0.5
    """Opacity of a part, in that of the whole."""
    part_delta: float = 1.0
    """Smoothness of a part, in that of the whole."""
    part_sigma: float = 1.0
    """Sharpness of a part, in that of the whole."""
    min_opacity: float = 0.03
    """Fainter convexes are dropped."""
    max_extent: float = 0.0
    """Standard deviation of its points above which a convex is dropped once opacities have been reset, scene units; 0 keeps all."""
    max_screen: float = 0.0
    """Radius above which a convex is dropped once opacities have been reset, in image widths; 0 keeps all."""
    start: int = 500
    """First step that splits."""
    interval: int = 200
    """Steps from one splitting to the next."""
    min_interval: int = 50
    """Fewest steps between splittings in a short training."""
    stop: float = 0.5
    """Share of the training after which nothing is split, dropped or reset."""
    reset_interval: int = 0
    """Steps from one reset of all opacities to the next; 0 never resets."""
    reset_opacity: float = 0.2
    """Opacities are cut to this at a reset."""


@dataclass(frozen=True)
class McmcConfig:
    """3D Gaussian Splatting as Markov chain Monte Carlo (arXiv:2404.09591): relocate, grow to a cap, add noise.

    Meant to go with the opacity and scale regularisers, which let unneeded Gaussians die.
    """

    growth: float = 0.05
    """Share of the Gaussians added at each growth, until the most primitives allowed."""
    min_opacity: float = 0.005
    """Fainter Gaussians are dead and are moved onto live ones."""
    noise: float = 5e5
    """Strength of the noise on `means`: multiplies their learning rate and the covariance; 0 switches it off."""
    start: int = 500
    """First step that relocates and grows."""
    interval: int = 100
    """Steps from one relocation to the next."""
    min_interval: int = 50
    """Fewest steps between relocations in a short training."""
    stop: float = 0.83
    """Share of the training after which nothing is relocated or added."""


@dataclass(frozen=True)
class OccupancyConfig:
    """Keep track of where a field is empty (Instant NGP, arXiv:2201.05989, appendix E). Counts are not shrunk."""

    interval: int = 16
    """Steps from one look at the field to the next."""
    decay: float = 0.95
    """What is left of the largest density seen in a cell at each look."""
    threshold: float = 0.01
    """Optical depth of one step above which a cell is occupied."""
