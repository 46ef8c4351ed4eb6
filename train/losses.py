"""The terms of the training loss, each already weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from prismfield.render.ops.ssim import photometric_loss
from prismfield.render.output import RenderOutput
from prismfield.train.batches import Batch
from prismfield.train.config import LossConfig


def loss_terms(out: RenderOutput, rgb: Tensor, batch: Batch, scene: object, config: LossConfig) -> dict[str, Tensor]:
    """What training minimises, term by term.

    Args:
        out: the render; its `depth` is used where the batch has depth.
        rgb: [C, H, W, 3] its colours after the exposure correction; [R, 3] for a batch of pixels.
        batch: what should have come out.
        scene: regularisers look at its `opacities` and `scales`, where it has them.
        config: the weights.

    Returns:
        Scalars by name; their sum is the loss.
    """
    if batch.pixels is None:
        terms = {"photometric": photometric_loss(rgb, batch.rgb, config.ssim_weight, batch.mask)[0]}
    else:  # single pixels have no structure
        terms = {"photometric": squared_error(rgb, batch.rgb_float, batch.mask)}
    if config.opacity_reg and hasattr(scene, "opacities"):
        terms["opacity"] = config.opacity_reg * scene.opacities.mean()
    if config.scale_reg and hasattr(scene, "scales"):
        terms["scale"] = config.scale_reg * scene.scales.mean()
    if config.depth_weight and batch.depth is not None and out.depth is not None:
        terms["depth"] = config.depth_weight * inverse_depth_error(out.depth, out.alpha, batch.depth, batch.mask)
    return terms | out.penalties


def squared_error(rgb: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the pixels [..., 3] where `mask` [...] is True, and over the channels; 0 where none is."""
    errors = (rgb - target).square()
    if mask is None:
        return errors.mean()
    return torch.where(mask[..., None], errors, 0.0).sum() / (errors.shape[-1] * mask.sum()).clamp(min=1)


def inverse_depth_error(depth: Tensor, alpha: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error of 1 / depth, 1 / scene units.

    Args:
        depth: [C, H, W] rendered camera z.
        alpha: [C, H, W]; pixels with less than one half are left out, as nothing is there to have a depth.
        target: [C, H, W] camera z, 0 where unknown.
        mask: [C, H, W] bool, True where a pixel counts.
    """
    known = (target > 0) & (alpha.detach() > 0.5)
    if mask is not None:
        known &= mask
    error = (1 / depth.clamp(min=1e-6) - 1 / target.clamp(min=1e-6)).abs()
    return torch.where(known, error, 0.0).sum() / known.sum().clamp(min=1)
