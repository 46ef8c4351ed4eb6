"""What one training step sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prismfield.datasets.views import View, Views
from prismfield.render.cameras import Cameras

COLORS = {"white": 1.0, "black": 0.0, None: 0.0}
"""Value of the background behind images with an alpha channel, by `SceneData.background`."""


@dataclass(frozen=True)
class Batch:
    """Images of one size and the cameras that took them."""

    cameras: Cameras
    rgb: Tensor
    """[C, H, W, 3] uint8, or float32 in 0..1."""
    mask: Tensor | None
    """[C, H, W] bool, True where a pixel counts; None where all do."""
    depth: Tensor | None
    """[C, H, W] camera z in scene units, 0 where unknown."""
    background: Tensor
    """[C, 3] behind the scene."""
    index: int
    """Place of the image among the training views."""
    pixels: Tensor | None = None
    """[R, 3] the pixels to draw; None for whole images."""


class Batches:
    """Training images in a new random order each epoch, at any resolution, decoded ahead."""

    def __init__(self, views: Views, *, background: float, random_background: bool, use_masks: bool, seed: int) -> None:
        self.views = views
        self.background = background
        self.random_background = random_background
        self.use_masks = use_masks
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self._shrunk: dict[tuple[int, int], Batch] = {}
        self._factor = 0

    def next(self, factor: int) -> Batch:
        """The next image, `factor` times smaller."""
        if not self.order:
            self.order = torch.randperm(len(self.views), generator=self.generator).tolist()
        index = self.order.pop()
        if factor != self._factor:
            self._shrunk.clear()
            self._factor = factor
        if not self.random_background and (index, factor) in self._shrunk:
            return self._shrunk[index, factor]
        if self.order:
            self.views.prefetch(self.order[-1])
        view = self.views[index]
        shade = torch.full((1, 3), self.background)
        if self.random_background and view.alpha is not None:
            shade = torch.rand(1, 3, generator=self.generator)
        batch = make_batch(view, index, shade, factor, self.use_masks)
        if factor > 1 and not self.random_background:
            self._shrunk[index, factor] = batch  # at most 1/4 of the pixels, so of the memory, of the whole set
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        """Enough to go on exactly."""
        return {"order": torch.tensor(self.order, dtype=torch.int64), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        self.order = state["order"].tolist()
        self.generator.set_state(state["generator"])


def make_batch(view: View, index: int, background: Tensor, factor: int = 1, use_masks: bool = True) -> Batch:
    """The view over `background` [1, 3], averaged over `factor` x `factor` pixels; it must have at least that many."""
    rgb = composited(view, background[0])
    mask = view.mask if use_masks else None
    depth = view.depth
    camera = view.camera
    if factor > 1:
        height, width = rgb.shape[0] // factor, rgb.shape[1] // factor
        rgb = _shrink(rgb, height, width, factor)
        # Trailing rows and columns that fill no block are cut off, so the intrinsics scale by the factor itself.
        scale = torch.tensor([1 / factor, 1 / factor, 1.0])[None, :, None]
        camera = replace(camera, Ks=camera.Ks * scale, width=width, height=height)
        mask = None if mask is None else _blocks(mask, height, width, factor).all(-1)
        depth = None if depth is None else depth[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
    return Batch(
        cameras=camera,
        rgb=rgb[None].contiguous(),
        mask=None if mask is None else mask[None].contiguous(),
        depth=None if depth is None else depth[None].contiguous(),
        background=background,
        index=index,
    )


def composited(view: View, background: Tensor) -> Tensor:
    """[H, W, 3] the view's colours, over `background` [3] where it has an alpha channel; uint8 stays uint8."""
    if view.alpha is None:
        return view.rgb
    top = view.rgb.dtype == torch.uint8
    rgb, alpha = (t.float() / 255 if top else t for t in (view.rgb, view.alpha))
    blended = rgb * alpha[..., None] + background * (1 - alpha[..., None])
    return (blended * 255).round().to(torch.uint8) if top else blended


def _blocks(image: Tensor, height: int, width: int, factor: int) -> Tensor:
    """[height, width, ..., factor^2] the pixels of each block."""
    cut = image[: height * factor, : width * factor]
    blocks = cut.unflatten(1, (width, factor)).unflatten(0, (height, factor)).movedim(1, -1).movedim(2, -1)
    return blocks.flatten(-2)


def _shrink(rgb: Tensor, height: int, width: int, factor: int) -> Tensor:
    mean = _blocks(rgb, height, width, factor).float().mean(-1)
    return mean.round().to(torch.uint8) if rgb.dtype == torch.uint8 else mean
