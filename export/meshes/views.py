"""What the cameras of a scene see of it: depths and colours for its surface."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.export.meshes.fusion import View, points
from prismfield.render.cameras import Cameras

if TYPE_CHECKING:
    from prismfield.export.library import Scene

_BYTES = 1 << 30  # of pictures that are kept; beyond, they are rendered again
_REACH = 2.0  # scene units round what the cameras look at, whose mean distance from it is 1
_LEAST_ALPHA = 0.5
_OUTLIERS, _MARGIN = 0.5, 0.05  # percent of what is seen, on each side of each axis; share of the longest side
_ASSET_SIZE, _ASSET_FOV = (720, 480), 50.0  # pixels, vertical degrees: where there are no photographs to go by
_RINGS = ((5.0, 20), (30.0, 16), (60.0, 8))  # degrees above the horizon, cameras


class SceneViews:
    """Pictures and depths of a scene from each of its cameras, in the frame of its representation.

    They are rendered when first asked for, and kept as long as there is room.
    """

    def __init__(self, scene: Scene, depth: Literal["median", "expected"] = "median", most: int | None = None) -> None:
        """The cameras of the training's photographs, `most` of them, evenly chosen; of a scene without any, rings round it.

        Raises:
            FileNotFoundError: the capture is not there any more.
        """
        cameras = scene.cameras("train") if scene.has_cameras else rings_round(scene)
        if most is not None and most < len(cameras):
            cameras = [cameras[i] for i in np.linspace(0, len(cameras) - 1, most).round().astype(int)]
        self.scene, self.depth = scene, depth
        self.cameras = [scene.frame.cameras_to_scene(camera) for camera in cameras]
        self._kept: dict[int, View] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.cameras)

    def __iter__(self) -> Iterator[View]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> View:
        if index not in self._kept:
            view = render_view(self.scene, self.cameras[index], self.depth)
            size = 7 * view.depth.numel()
            if self._bytes + size > _BYTES:
                return view
            self._kept[index] = view
            self._bytes += size
        return self._kept[index]

    def box(self) -> NDArray[np.float64]:
        """[2, 3] round what they see, but for a few outliers, as far as twice the cameras' distance where these look at
        something; scene units.

        Raises:
            ValueError: they see nothing.
        """
        seen = torch.cat([points(view)[:: max(1, view.depth.numel() // 4000)] for view in self]).numpy()
        if self.looks_inwards:
            seen = seen[(np.abs(seen) <= _REACH).all(1)]
        if not len(seen):
            raise ValueError(f"{self.scene.path}: its cameras see no surface")
        low, high = np.percentile(seen, [_OUTLIERS, 100 - _OUTLIERS], axis=0)
        margin = _MARGIN * (high - low).max()
        box = np.stack([low - margin, high + margin])
        return box.clip(-_REACH, _REACH) if self.looks_inwards else box

    @property
    def looks_inwards(self) -> bool:
        """Whether the cameras look at a common point."""
        return self.scene.looks_inwards

    def footprint(self) -> float:
        """Scene units that a pixel covers, the median over what they see."""
        widths = []
        for view in self:
            seen = view.depth[::8, ::8]
            widths.append(seen[seen > 0] / float(view.camera.Ks[0, 0, 0]))
        return float(torch.cat(widths).median())


@torch.no_grad()
def render_view(scene: Scene, camera: Cameras, depth: Literal["median", "expected"]) -> View:
    """What one camera, in the frame of the representation, sees; depth is 0 where the scene is more clear than not."""
    device = next(iter(scene.representation.tensors().values())).device
    behind = torch.full((1, 3), scene.background, device=device)
    out = scene.representation.render(camera.to(device), background=behind, extras=("depth", "median_depth"))
    found = out.median_depth if depth == "median" else out.depth
    assert found is not None
    seen: Tensor = torch.where(out.alpha[0] > _LEAST_ALPHA, found[0], 0.0).cpu()
    return View(camera, seen, (255 * out.rgb[0].clamp(0, 1)).round().to(torch.uint8).cpu())


def rings_round(scene: Scene) -> list[Cameras]:
    """Cameras on rings round a scene that has none, looking at its middle, in the user's frame."""
    from prismfield.train.camera_path import Flight, ring

    center, up = np.array(scene.frame.center), np.array(scene.frame.up) / np.linalg.norm(scene.frame.up)
    poses = np.concatenate([ring(center, up, 2.5 / scene.frame.scale, e, count) for e, count in _RINGS])
    batch = Flight(poses, np.full(len(poses), math.radians(_ASSET_FOV))).cameras(*_ASSET_SIZE)
    return [batch[index] for index in range(len(batch))]
