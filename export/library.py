"""Trained scenes loaded and drawn in a few lines: what `import prismfield` offers."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.datasets.normalize import looks_inwards
from prismfield.datasets.views import Views
from prismfield.export.assets import EXPECTED_UP, Asset
from prismfield.export.compression.field_pfz import FieldAsset, decode_field, is_field_file
from prismfield.export.formats import asset_of, is_asset, read_asset
from prismfield.export.reading import naming
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.train.run import Run, load_run


@dataclass(frozen=True)
class Scene:
    """A trained scene. Whatever goes in and comes out is in the user's frame: the axes and units of the capture's files."""

    path: Path
    """The run's folder, or the file."""
    representation: Representation
    """What draws it, in a frame of its own; see `frame`."""
    frame: SceneFrame
    """How to get from the representation's frame to the user's."""
    background: float
    """Value behind the scene, of all three channels, unless `render` is told another."""
    run: Run | None
    """The run it was trained in; None for a file."""
    seen_from: tuple[Cameras, ...] = ()
    """Cameras that a file of a field keeps of its photographs."""
    inwards: bool = True
    """Whether those look at a common point."""

    @property
    def num_primitives(self) -> int:
        """How many primitives it is made of; 0 for a representation that has none."""
        return getattr(self.representation, "num_primitives", 0)

    @property
    def up(self) -> tuple[float, float, float]:
        """Unit vector against gravity, as estimated from the photographs."""
        return self.frame.up

    @property
    def name(self) -> str:
        """Of the capture, or of the file."""
        return self.path.stem if self.run is None else self.run.data.name

    @property
    def has_cameras(self) -> bool:
        """Whether `cameras("train")` may be asked for."""
        return self.run is not None or bool(self.seen_from)

    @property
    def looks_inwards(self) -> bool:
        """Whether its cameras look at a common point; True if there are none."""
        return self.inwards if self.run is None else looks_inwards(self.run.data.train)

    def cameras(self, split: Literal["train", "test"] = "test") -> list[Cameras]:
        """The cameras of the photographs, one at a time for sizes may differ, without lens distortion.

        The capture is looked up where the run found it; images are shrunk as they were for the training.

        Raises:
            FileNotFoundError: the capture is not there any more.
            ValueError: the scene was read from a file, which has no cameras; that of a field may have some, for "train".
        """
        if self.run is None and self.seen_from and split == "train":
            return list(self.seen_from)
        if self.run is None and self.seen_from:
            raise ValueError(f"{self.path}: a file has no photographs to test with; its cameras are those of 'train'")
        if self.run is None:
            raise ValueError(f"{self.path}: a file of splats has no cameras; make some with Cameras.from_camtoworlds")
        if split not in ("train", "test"):
            raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
        views = Views(getattr(self.run.data, split), downscale=self.run.config.downscale)
        return [self.frame.cameras_to_user(views.camera(index)) for index in range(len(views))]

    def asset(self) -> Asset:
        """Its primitives with activated values, in the user's frame.

        Raises:
            ValueError: it is not made of Gaussians or convexes, or a value is not finite.
        """
        try:
            return asset_of(self.representation, self.frame)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def load(path: str | os.PathLike[str], *, step: int | None = None, device: torch.device | str = "cpu") -> Scene:
    """Load a trained scene.

    Args:
        path: a run's folder, or a file in one of the formats of docs/formats.md: of Gaussians, from here or elsewhere, of
            convexes, or of a radiance field.
        step: of a run: the checkpoint of this step; None for the newest whole one.
        device: where to render.

    Returns:
        The scene, its parameters without gradients.

    Raises:
        FileNotFoundError: there is no such file, or the folder is not a run's.
        ValueError: one line saying what is wrong with it.
    """
    path = Path(path)
    if not is_asset(path):
        if path.is_file():
            raise ValueError(f"{path}: expected a run's folder or a file of splats, like .ply")
        run = load_run(path, device=device, step=step)
        return Scene(path, _frozen(run.scene), run.frame, run.background, run)
    if step is not None:
        raise ValueError(f"{path}: a file has no steps to choose from, got step {step}")
    if is_field_file(path):
        with naming(path):
            return scene_of(decode_field(path.read_bytes()), path, device=device)
    return scene_of(read_asset(path), path, device=device)


def scene_of(
    asset: Asset | FieldAsset, path: Path, *, frame: SceneFrame | None = None, device: torch.device | str = "cpu"
) -> Scene:
    """A scene made of the primitives in `asset`, drawn in `frame` (None: its own); `path` is the name it goes by.

    A field is always drawn in its own frame, and keeps its background.
    """
    if isinstance(asset, FieldAsset):
        field: Any = asset.field().to(device)
        cameras = tuple(asset.user_cameras())
        return Scene(path, _frozen(field), asset.frame, asset.background, None, cameras, asset.inwards)
    frame = frame or content_frame(asset)
    made = REPRESENTATIONS[asset.representation].from_tensors(asset.to_tensors(frame), asset.config())
    representation: Any = made  # a module
    return Scene(path, _frozen(representation.to(device)), frame, 0.0, None)


def content_frame(asset: Asset) -> SceneFrame:
    """A frame in which most of the primitives are within a unit of the origin: their units may be millimetres or miles.

    The centre is the median, weighted by opacity, and the unit the distance within which half of the opacity lies, twice.
    """
    weights = asset.opacities.astype(np.float64) + 1e-9
    means = asset.means
    center = [_weighted_median(means[:, axis], weights) for axis in range(3)]
    distances = np.linalg.norm(means - np.array(center), axis=1)
    reach = 2 * _weighted_median(distances, weights)
    return SceneFrame((center[0], center[1], center[2]), 1 / reach if reach > 0 else 1.0, asset.up or EXPECTED_UP)


def render(
    scene: Scene,
    cameras: Cameras,
    background: Tensor | float | None = None,
    *,
    extras: Collection[str] = (),
) -> RenderOutput:
    """Draw a scene as cameras see it.

    Args:
        scene: what `load` gave.
        cameras: C pinhole cameras in the user's frame (the axes and units of the capture's files), OpenCV axes. Gradients
            reach them; wrap in `torch.no_grad()` what needs none.
        background: behind the scene: one value, or [3] or [C, 3]; None for the scene's own.
        extras: what to compute beside colour and alpha: "depth", "median_depth".

    Returns:
        `rgb` [C, H, W, 3] (display-referred, not clamped), `alpha` [C, H, W], and `depth` in user units where asked for.

    Raises:
        ValueError: the cameras have lens distortion, or a shape does not fit.
    """
    if cameras.model != "pinhole":
        raise ValueError(f"cameras: expected pinhole cameras, got {cameras.model!r}; undistort them first")
    if len(cameras) == 0:
        raise ValueError("cameras: expected at least one, got none")
    device = next(iter(scene.representation.tensors().values())).device
    value = torch.as_tensor(scene.background if background is None else background, dtype=torch.float32, device=device)
    if value.shape not in ((), (3,), (len(cameras), 3)):
        raise ValueError(f"background: expected a number, [3] or [{len(cameras)}, 3], got {list(value.shape)}")
    behind = value.expand(len(cameras), 3).contiguous()
    moved = scene.frame.cameras_to_scene(cameras).to(device)
    out = scene.representation.render(moved, background=behind, extras=extras)
    depths: dict[str, Any] = {
        name: values / scene.frame.scale
        for name in ("depth", "median_depth")
        if (values := getattr(out, name)) is not None
    }
    return replace(out, **depths)


def _frozen(representation: Representation) -> Representation:
    for group in representation.param_groups():
        for parameter in group["params"]:
            parameter.requires_grad_(False)
    return representation


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(reached, reached[-1] / 2)]])
