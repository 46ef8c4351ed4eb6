"""Options of the representations. No torch here: the command line reads this before it parses its arguments."""

from __future__ import annotations

from dataclasses import dataclass


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
