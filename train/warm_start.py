"""A scene to start from, read from a file."""

from __future__ import annotations

import logging
from typing import Any

import torch

from prismfield.datasets.base import SceneData
from prismfield.datasets.views import Views
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.train.batches import COLORS
from prismfield.train.config import TrainConfig
from prismfield.train.evaluate import evaluate_views, mean_scores

log = logging.getLogger("prismfield")


def scene_from_file(config: TrainConfig, options: Any, data: SceneData, views: Views, device: torch.device) -> Any:
    """The scene in `config.init`, as `config.representation`; logs how well it does before any training.

    Args:
        config: `init`, `representation`, `max_primitives` and `data.masks` are used here.
        options: of the representation.
        data: the capture, in whose frame the scene will be.
        views: to measure on; there may be none.
        device: where to draw.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of primitives, has more than `max_primitives`, or cannot become that representation.
    """
    from prismfield.export.formats import ASSETS, read_asset, tensors_of  # not at the top: export builds on train

    path, name = config.init, config.representation
    assert path is not None
    if name not in ASSETS:
        raise ValueError(f"--init {path}: expected --representation {' or '.join(ASSETS)}, got {name}")
    asset = read_asset(path)
    if len(asset) > config.max_primitives:
        raise ValueError(f"{path}: {len(asset)} splats, more than --max-primitives {config.max_primitives}")
    try:
        tensors = tensors_of(asset, name, data.frame, options)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from error
    scene = REPRESENTATIONS[name].from_tensors(tensors, options)
    scores = [_psnr(scene, config, data, views, device)]
    about = f"{len(asset):,} {asset.noun}"
    if asset.representation != name:
        held = REPRESENTATIONS[asset.representation]
        as_they_are = held.from_tensors(asset.to_tensors(data.frame), asset.config())
        scores.append(_psnr(as_they_are, config, data, views, device))
        about += f", made into {name}"
    if len(views):
        before = f", {scores[1]} as they are in the file" if len(scores) > 1 else ""
        about += f"; test PSNR before any training {scores[0]}{before}"
    log.info("starting from %s: %s", path, about)
    return scene


def _psnr(scene: Representation, config: TrainConfig, data: SceneData, views: Views, device: torch.device) -> str:
    moved: Any = scene  # a module
    results = evaluate_views(
        moved.to(device), views, COLORS[data.background], use_masks=config.data.masks, device=device
    )
    scores = mean_scores(results)
    return f"{scores['psnr']:.2f} dB" if scores else "unknown"
