"""What one training step sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from prismfield.cli import one_line
from prismfield.datasets.views import View, Views
from prismfield.render.cameras import Cameras

_PIXEL_BYTES = 8  # of colour, alpha and mask, kept in memory
_FIRST_SAMPLES = 256  # along a ray, before the first step has told
_FEWEST_RAYS, _MOST_RAYS = 64, 1 << 16

COLORS = {"white": 1.0, "black": 0.0, None: 0.0}
"""Value of the background behind images with an alpha channel, by `SceneData.background`."""


class ImageError(ValueError):
    """A training image cannot be read."""


@dataclass(frozen=True)
class Batch:
    """Images of one size and the cameras that took them, or pixels out of many images, [R] instead of [C, H, W]."""

    cameras: Cameras
    """For pixels, those of all training views."""
    rgb: Tensor
    """[C, H, W, 3] uint8, or float32 in 0..1."""
    mask: Tensor | None
    """[C, H, W] bool, True where a pixel counts; None where all do."""
    depth: Tensor | None
    """[C, H, W] camera z in scene units, 0 where unknown."""
    background: Tensor
    """[C, 3] behind the scene."""
    index: int | Tensor
    """Place of the image among the training views; of each pixel's image, [R], for pixels."""
    pixels: Tensor | None = None
    """[R, 3] the pixels to draw: camera, column, row; None for whole images."""

    @property
    def camera_views(self) -> int | slice:
        """Places of the cameras among the training views."""
        return self.index if isinstance(self.index, int) else slice(None)

    @property
    def rgb_float(self) -> Tensor:
        """`rgb` in 0..1."""
        return self.rgb.float() / 255 if self.rgb.dtype == torch.uint8 else self.rgb

    @property
    def nbytes(self) -> int:
        """Memory of the pixels."""
        tensors = (self.rgb, self.mask, self.depth)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`; nobody waits for copies to a GPU, which come before what is computed there next."""
        if device.type == "cpu" == self.rgb.device.type:
            return self

        def move(tensor: Tensor) -> Tensor:
            is_upload = device.type == "cuda" and tensor.device.type == "cpu"
            return (tensor.pin_memory() if is_upload else tensor).to(device, non_blocking=is_upload)

        kept = {key: getattr(self, key) for key in ("rgb", "mask", "depth", "background", "pixels")}
        moved: dict[str, Any] = {key: move(value) for key, value in kept.items() if value is not None}
        cameras = replace(self.cameras, viewmats=move(self.cameras.viewmats), Ks=move(self.cameras.Ks))
        return replace(self, cameras=cameras, **moved)


class Batches:
    """Training images in a new random order each epoch, at any resolution, decoded ahead, on the device that trains.

    On a GPU, an image and its camera stay there from the first time on while the byte budget lasts; the others are uploaded
    each time, while the GPU still computes the step before.
    """

    def __init__(
        self,
        views: Views,
        *,
        background: float,
        random_background: bool = False,
        use_masks: bool = True,
        cut_out: bool = False,
        seed: int = 0,
        byte_budget: int = 512 << 20,
        device: torch.device | None = None,
    ) -> None:
        """Nothing is decoded yet.

        Args:
            views: the training views.
            background: value behind images with an alpha channel, of all three channels.
            random_background: draw a new colour behind them each step instead.
            use_masks: leave masked pixels out.
            cut_out: what the masks leave out is transparent instead.
            seed: of the order and of the colours.
            byte_budget: memory for images that were blended or shrunk, beside what `views` keep; on a GPU, for all.
            device: where the batches go; the CPU if None.
        """
        self.views = views
        self.background = background
        self.random_background = random_background
        self.use_masks, self.cut_out = use_masks, cut_out
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        """Views still to come in this epoch, the next one last."""
        self.byte_budget = byte_budget
        self.device = torch.device("cpu") if device is None else device
        self._made: dict[int, Batch] = {}
        self._made_bytes = 0
        self._factor = 0

    def next(self, factor: int) -> Batch:
        """The next image, `factor` times smaller.

        Raises:
            ImageError: its file is damaged or gone; it stays the next.
        """
        if not self.order:
            self.order = torch.randperm(len(self.views), generator=self.generator).tolist()
        index = self.order.pop()
        if factor != self._factor:
            self._made.clear()
            self._made_bytes, self._factor = 0, factor
        if self.order and self.order[-1] not in self._made:
            self.views.prefetch(self.order[-1])
        if index in self._made:
            return self._made[index]
        try:
            view = self.views[index]
        except (ValueError, OSError) as error:
            self.order.append(index)  # it is still to come
            raise ImageError(one_line(error)) from error
        if self.cut_out:
            view = cut_out(view)
        is_blended = view.alpha is not None
        shade = torch.full((1, 3), self.background)
        if self.random_background and is_blended:
            shade = torch.rand(1, 3, generator=self.generator)
        batch = make_batch(view, index, shade, factor, self.use_masks).to(self.device)
        is_new = factor > 1 or is_blended or self.device.type != "cpu"  # otherwise the pixels are the view's own
        is_lasting = is_new and not (self.random_background and is_blended)
        if is_lasting and self._made_bytes + batch.nbytes <= self.byte_budget:
            self._made[index] = batch
            self._made_bytes += batch.nbytes
        return batch

    def adapt(self, samples: int | None) -> None:
        """Take note of how many samples along rays the step took: an image is drawn whole, whatever that costs."""

    def state_dict(self) -> dict[str, Tensor]:
        """Enough to go on exactly."""
        return {"order": torch.tensor(self.order, dtype=torch.int64), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        self.order = state["order"].tolist()
        self.generator.set_state(state["generator"])


class PixelBatches:
    """Random pixels of random training images, as many as make the number of samples along their rays what is wanted.

    The images of a step are those that fit into the byte budget. Where not all do, each step one of them makes room for
    the next of a random order.
    """

    def __init__(
        self,
        views: Views,
        *,
        background: float,
        samples: int,
        random_background: bool = False,
        use_masks: bool = True,
        cut_out: bool = False,
        with_depth: bool = False,
        seed: int = 0,
        byte_budget: int = 512 << 20,
        device: torch.device | None = None,
    ) -> None:
        """Nothing is decoded yet.

        Args:
            views: the training views, of any sizes.
            background: value behind images with an alpha channel, of all three channels.
            samples: along all rays of a step.
            random_background: draw a new colour behind each image in each step instead.
            use_masks: leave masked pixels out.
            cut_out: what the masks leave out is transparent instead.
            with_depth: give the pixels' depth too, where the capture has it.
            seed: of whatever is drawn.
            byte_budget: memory for decoded pixels, at least one image.
            device: where the pixels are and the batches go; the CPU if None.
        """
        self.views, self.background, self.samples = views, background, samples
        self.random_background, self.use_masks, self.cut_out = random_background, use_masks, cut_out
        self.with_depth = with_depth
        self.generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu") if device is None else device
        sizes = [views.size(index) for index in range(len(views))]
        self._sizes = torch.tensor(sizes).reshape(-1, 2)
        self._room = max((width * height for width, height in sizes), default=1)
        """Pixels that the place of an image has."""
        cameras = [replace(views.camera(i), width=1, height=1) for i in range(len(views))]  # sizes may differ
        self._cameras = Cameras.stack(cameras).to(self.device) if cameras else None
        places = min(len(views), max(1, byte_budget // (_PIXEL_BYTES * self._room)))
        order = torch.randperm(len(views), generator=self.generator).tolist()
        self.held: list[int] = order[:places]
        """The view in each place."""
        self.order: list[int] = order[places:][::-1]
        """Views still to come in this epoch, the next one last."""
        self.rays = max(_FEWEST_RAYS, samples // _FIRST_SAMPLES)
        """Pixels of the next batch."""
        self._loaded: list[int | None] = [None] * places
        self._pixels: dict[str, Tensor] = {}
        """What is known about the pixels of each place, one after the other."""

    def next(self, factor: int = 1) -> Batch:
        """Pixels of full-size images, whatever `factor` says.

        Raises:
            ImageError: the file of an image that was to be decoded is damaged or gone; it is asked for again the next time.
        """
        assert self._cameras is not None
        for place, index in enumerate(self.held):
            if self._loaded[place] != index:
                self._load(place, index)
        places = torch.randint(len(self.held), (self.rays,), generator=self.generator)
        view = torch.tensor(self.held)[places]
        width, height = self._sizes[view].unbind(-1)
        share = torch.rand(self.rays, generator=self.generator, dtype=torch.float64)
        pixel = (share * (width * height)).long()
        at = (places * self._room + pixel).to(self.device)
        behind = torch.full((len(self.views), 3), self.background)
        if self.random_background:
            behind = torch.rand(len(self.views), 3, generator=self.generator)
        pixels = torch.stack([view, pixel % width, pixel // width], -1).to(self.device)
        behind, chosen = (
            behind.to(self.device),
            {name: values.index_select(0, at) for name, values in self._pixels.items()},
        )
        rgb, alpha = chosen["rgb"], chosen.get("alpha")
        if alpha is not None:
            colors = rgb.float() / 255 if rgb.dtype == torch.uint8 else rgb
            rgb = torch.lerp(behind[pixels[:, 0]], colors, alpha[:, None])
        if len(self.held) < len(self.views):
            self._exchange()
        return Batch(
            cameras=self._cameras,
            rgb=rgb,
            mask=chosen.get("mask"),
            depth=chosen.get("depth"),
            background=behind,
            index=pixels[:, 0],
            pixels=pixels,
        )

    def adapt(self, samples: int | None) -> None:
        """Draw as many pixels next as would have made the wanted number of samples, given how many this batch made."""
        if samples is not None:
            wanted = self.rays * self.samples // max(samples, 1)
            self.rays = max(_FEWEST_RAYS, min(wanted, 2 * self.rays, _MOST_RAYS))

    def state_dict(self) -> dict[str, Tensor]:
        """Enough to go on exactly."""
        numbers = {"order": self.order, "held": self.held, "rays": [self.rays]}
        tensors = {name: torch.tensor(values, dtype=torch.int64) for name, values in numbers.items()}
        return tensors | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: as many images do not fit into the byte budget as did.
        """
        if len(state["held"]) != len(self.held):
            raise ValueError(
                f"--data.cache-mb: expected memory for {len(state['held'])} images, as the run had, got {len(self.held)}"
            )
        self.order, self.held = state["order"].tolist(), state["held"].tolist()
        (self.rays,) = state["rays"].tolist()
        self.generator.set_state(state["generator"])

    def _exchange(self) -> None:
        """The next view takes the place of one that is drawn at random."""
        if not self.order:
            rest = sorted(set(range(len(self.views))) - set(self.held))
            shuffled = torch.randperm(len(rest), generator=self.generator).tolist()
            self.order = [rest[i] for i in shuffled]
        place = int(torch.randint(len(self.held), (1,), generator=self.generator))
        self.held[place] = self.order.pop()
        self.views.prefetch(self.held[place])

    def _load(self, place: int, index: int) -> None:
        try:
            view = self.views[index]
        except (ValueError, OSError) as error:
            raise ImageError(one_line(error)) from error
        if self.cut_out:
            view = cut_out(view)
        self._put("rgb", place, view.rgb, 0)
        opaque = 255 if view.rgb.dtype == torch.uint8 else 1
        self._put("alpha", place, None if view.alpha is None else view.alpha.float() / opaque, 1)
        self._put("mask", place, view.mask if self.use_masks else None, True)
        self._put("depth", place, view.depth if self.with_depth else None, 0)
        self._loaded[place] = index

    def _put(self, name: str, place: int, values: Tensor | None, missing: float) -> None:
        """Keep [H, W, ...] values of the image in a place; `missing` stands where an image has none and others do."""
        if name not in self._pixels:
            if values is None:
                return
            size = (len(self.held) * self._room, *values.shape[2:])
            self._pixels[name] = torch.full(size, missing, dtype=values.dtype, device=self.device)
        kept = self._pixels[name]
        part = kept[place * self._room : (place + 1) * self._room]
        if values is None:
            part.fill_(missing)
            return
        if kept.dtype != values.dtype:  # files of 8 and of 16 bits in one capture
            values = (values * 255).round() if kept.dtype == torch.uint8 else values.float() / 255
        part[: values.shape[0] * values.shape[1]] = values.flatten(0, 1).to(part)


def cut_out(view: View) -> View:
    """The view with what its mask leaves out made transparent."""
    if view.mask is None:
        return view
    opaque = 255 if view.rgb.dtype == torch.uint8 else 1
    alpha = torch.full_like(view.rgb[..., 0], opaque) if view.alpha is None else view.alpha
    return replace(view, alpha=torch.where(view.mask, alpha, torch.zeros_like(alpha)), mask=None)


def make_batch(view: View, index: int, background: Tensor, factor: int = 1, use_masks: bool = True) -> Batch:
    """The view over `background` [1, 3], averaged over `factor` x `factor` pixels; it must have at least that many."""
    rgb = composited(view, background[0])
    mask = view.mask if use_masks else None
    depth, camera = view.depth, view.camera
    if factor > 1:
        height, width = rgb.shape[0] // factor, rgb.shape[1] // factor
        # Trailing rows and columns that fill no block are cut off, so the intrinsics scale by the factor itself.
        scale = torch.tensor([1 / factor, 1 / factor, 1.0])[None, :, None]
        camera = replace(camera, Ks=camera.Ks * scale, width=width, height=height)
        rgb = _block_means(rgb, height, width, factor)
        # Those with a masked pixel in them do not count.
        mask = None if mask is None else _block_means(mask.to(torch.uint8) * 255, height, width, factor) == 255
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
    is_bytes = view.rgb.dtype == torch.uint8
    rgb, alpha = (values.float() / 255 if is_bytes else values for values in (view.rgb, view.alpha))
    blended = torch.lerp(background.expand_as(rgb), rgb, alpha[..., None])
    return (blended * 255).round().to(torch.uint8) if is_bytes else blended


def _block_means(image: Tensor, height: int, width: int, factor: int) -> Tensor:
    """[height, width, ...] mean of each block of `factor` x `factor` pixels."""
    cut = np.ascontiguousarray(image.numpy()[: height * factor, : width * factor])
    return torch.from_numpy(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA))
