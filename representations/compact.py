"""Gaussians while they are trained to become a small file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.render.rasterize import rasterize_gaussians
from prismfield.render.sort_grid import grid_blur, grid_width
from prismfield.representations.config import CompactConfig, GaussiansConfig
from prismfield.representations.gaussians import Gaussians
from prismfield.representations.hash_color import HashColor

SMOOTHED_EVERY = 4
"""Steps from one with the term of smoothness, so many times as large, to the next: a blur of all takes as long as a picture."""
_RADIUS = 2  # of the blur, cells
_STEPS = {"log_scales": 0.22, "opacities": 0.04, "quats": 0.1, "sh0": 0.12, "shN": 0.07}
_FIRST_MASK = 1.0  # of the logits
_MASKED = 0.01  # sigmoid of the logit up to which a Gaussian is left out, epsilon in arXiv:2311.13681


class RemovalScores:
    """How much worse pictures would be without each Gaussian alone: squared errors, summed over pixels and channels.

    A pixel is linear in each Gaussian's alpha, so its derivative to a factor on the opacity is what the pixel loses without it.
    The sum of the squares of these derivatives (the score of Speedy-Splat, arXiv:2412.00578, eq. 12, which is to means and
    scales there) is estimated without bias by one backward pass a picture: the square of the gradient of the sum of all pixels
    with random signs (Hutchinson's estimator of a diagonal).
    """

    def __init__(self) -> None:
        self.is_on = False
        """Whether the next picture that something learns from is scored."""
        self.pictures = 0
        """Scored so far: the seed of the next signs."""
        self.values = torch.zeros(0)
        """[N]; of another length: none since rows were dropped."""

    def add(self, scene: Gaussians, cameras: Cameras) -> None:
        """Score one more picture, drawn once more for that."""
        opacities = scene.opacities.detach()
        factors = torch.ones_like(opacities, requires_grad=True)
        out = rasterize_gaussians(
            scene.means.detach(),
            scene.quats.detach(),
            scene.scales.detach(),
            opacities * factors,
            (scene.sh0.detach(), scene.harmonics[1].detach()),
            cameras,
            sh_degree=scene.active_sh_degree,
            antialiased=scene.config.antialiased,
        )
        generator = torch.Generator().manual_seed(self.pictures)
        signs = torch.randint(0, 2, out.rgb.shape, generator=generator).to(out.rgb) * 2 - 1
        (gradient,) = torch.autograd.grad(out.rgb, factors, signs)
        if len(self.values) != len(gradient):
            self.values = torch.zeros_like(gradient)
        self.values += gradient.square()
        self.pictures += 1


class CompactGaussians(Gaussians):
    """Gaussians with what `--compact` adds to them.

    `mask_logits` (Compact 3D Gaussian Splatting, arXiv:2311.13681, section 4.1): a Gaussian counts where the sigmoid of its
    logit is above 0.01, else it has neither opacity nor size; to the gradient opacity and scales are the sigmoid's times as large.
    """

    mask_logits: nn.Parameter
    """[N], with masks only."""
    grid_rows: int = 0
    """How many rows lie in the order of a grid `grid_width` wide; where that is not N, they do not."""
    is_smoothed: bool = False
    """Whether the next picture's loss has the term of smoothness."""

    def __init__(self, tensors: dict[str, Tensor], config: GaussiansConfig, compact: CompactConfig) -> None:
        self.compact = compact
        if compact.hash:
            tensors = tensors | {"shN": tensors["means"].new_zeros(len(tensors["means"]), 0, 3)}
        super().__init__(tensors, config)
        self.scores = RemovalScores()
        self.color = HashColor(config.sh_degree) if compact.hash else None
        if self.color is not None and (saved := {k: v for k, v in tensors.items() if k.startswith("color.")}):
            self.color.load_state_dict({name.removeprefix("color."): value for name, value in saved.items()})
        if compact.masks:
            logits = tensors.get("mask_logits", torch.full_like(self.opacity_logits, _FIRST_MASK))
            self.mask_logits = nn.Parameter(logits.detach().to(torch.float32, copy=True))

    @classmethod
    def made_of(cls, scene: Gaussians, compact: CompactConfig) -> Self:
        """A copy of `scene`, to be trained with these options."""
        made = cls(scene.tensors(), scene.config, compact)
        made.active_sh_degree = scene.active_sh_degree
        return made

    @property
    def sh_degree(self) -> int:
        """Harmonics there are."""
        return self.config.sh_degree if self.compact.hash else super().sh_degree

    @property
    def harmonics(self) -> tuple[Tensor, Tensor]:
        """See `Gaussians`; above degree 0 of the place, where there is a hash grid."""
        return (self.sh0, self.shN) if self.color is None else (self.sh0, self.color(self.means))

    @property
    def masks(self) -> Tensor:
        """[N] 0 or 1, with the gradient of the sigmoid (eq. 1's straight-through estimator)."""
        soft = self.mask_logits.sigmoid()
        return (soft > _MASKED).to(soft.dtype) + (soft - soft.detach())

    @property
    def kept(self) -> Tensor:
        """[N] bool, False for what the masks leave out."""
        if not self.compact.masks:
            return torch.ones_like(self.opacity_logits, dtype=torch.bool)
        return self.mask_logits.detach().sigmoid() > _MASKED

    @property
    def opacities(self) -> Tensor:
        """[N] in [0, 1), 0 for what is left out."""
        return super().opacities * self.masks if self.compact.masks else super().opacities

    @property
    def scales(self) -> Tensor:
        """[N, 3] standard deviations, scene units, 0 for what is left out."""
        return super().scales * self.masks[:, None] if self.compact.masks else super().scales

    def draw(self, cameras: Cameras, background: Tensor | None, extras: Collection[str]) -> RenderOutput:
        """The whole images; with what the options add to the loss, where something learns from it."""
        out = super().draw(cameras, background, extras)
        if not out.rgb.requires_grad:
            return out
        if self.scores.is_on:
            self.scores.add(self, cameras)
        return replace(out, penalties=self.penalties())

    def penalties(self) -> dict[str, Tensor]:
        """Terms of the loss, weighted: the mean of the masks' sigmoids (eq. 3), and how rough the grid is."""
        found: dict[str, Tensor] = {}
        if self.compact.masks:
            found["masks"] = self.compact.mask_weight * self.mask_logits.sigmoid().mean()
        if self.compact.sog and self.is_smoothed and self.grid_rows == self.num_primitives:
            found["sog"] = self.compact.sog_weight * SMOOTHED_EVERY * self.roughness()
        return found

    def grid_values(self) -> Tensor:
        """[N, C] what is to be smooth: scales, opacity, rotation, colour, each in steps that are hardly seen."""
        quats = nn.functional.normalize(self.quats, dim=-1)
        values = {
            "log_scales": self.log_scales,
            "opacities": self.opacity_logits.sigmoid()[:, None],
            "quats": torch.where(quats[:, :1] < 0, -quats, quats),
            "sh0": self.sh0.flatten(1),
            "shN": self.shN.flatten(1),
        }
        return torch.cat([value / _STEPS[name] for name, value in values.items()], 1)

    def roughness(self) -> Tensor:
        """Mean Huber distance of what the grid holds to the same blurred (arXiv:2312.13299, section 3.3).

        Departs from the paper: the blur is a box's, and carries no gradient.
        """
        values = self.grid_values()
        blurred = grid_blur(values.detach().cpu().numpy(), grid_width(len(values)), _RADIUS)
        return nn.functional.huber_loss(values, torch.from_numpy(blurred).to(values.device))

    def rates(self, name: str) -> dict[str, Any]:
        """See `Splats`."""
        if name.startswith("color."):
            return {"lr": self.compact.hash_lr, "sparse": False}
        # Not sparse: how much is lost with a Gaussian has to be held against how rarely it is seen.
        return {"lr": self.compact.mask_lr, "sparse": False} if name == "mask_logits" else super().rates(name)

    @torch.no_grad()
    def baked(self) -> Gaussians:
        """The same pictures as plain Gaussians, without those that are left out."""
        kept = self.kept
        tensors = {name: value[kept] for name, value in (self.rows() | {"shN": self.harmonics[1]}).items()}
        plain = Gaussians(tensors, self.config)
        plain.active_sh_degree = self.active_sh_degree
        return plain
