"""Decoded views of a capture, ready for the rasterizer: undistorted, shrunk, cached within a byte budget."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.datasets.base import Frame
from prismfield.datasets.images import decode, read_depth, read_info, read_mask, shrink
from prismfield.datasets.undistort import Undistortion, pinhole_target, undistortion
from prismfield.render.cameras import Cameras

_COMPRESSED_SHARE = 0.5  # of the byte budget, for files kept in memory while their decoded images do not all fit
_MAPS = 4  # undistortion maps kept; one is larger than the image it serves


@dataclass(frozen=True)
class View:
    """One decoded image with the pinhole camera that would have taken it."""

    camera: Cameras
    """One pinhole camera of the size of `rgb`."""
    rgb: Tensor
    """[H, W, 3], display-referred: uint8 of 8-bit files, float32 in 0..1 of 16-bit ones and EXR."""
    alpha: Tensor | None
    """[H, W] of the same kind, straight; None: the file has no alpha."""
    mask: Tensor | None
    """[H, W] bool, True where the pixel counts; None: everywhere."""
    depth: Tensor | None
    """[H, W] float32 camera z in scene units, 0 where unknown."""

    @property
    def nbytes(self) -> int:
        """Memory of the pixels."""
        tensors = (self.rgb, self.alpha, self.mask, self.depth)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Views(Sequence[View]):
    """Views decoded when they are first asked for. Safe to use from several threads.

    Decoded views stay in memory up to `byte_budget`, the least recently used leave first. When not all fit, half of the
    budget keeps image files as they are on disk, so that decoding again does not read again.
    """

    def __init__(
        self, frames: list[Frame], *, downscale: int = 1, byte_budget: int = 2 << 30, scale: float = 1.0
    ) -> None:
        """Nothing is decoded yet.

        Args:
            frames: what to show.
            downscale: shrink by this factor: take `images_<N>/` beside the image folder where it has the file at that
                size, else average N x N pixels.
            byte_budget: memory for decoded and compressed images together.
            scale: scene units per user unit (`SceneFrame.scale`), applied to depth files.

        Raises:
            ValueError: downscale is not positive, or larger than an image.
        """
        if downscale < 1:
            raise ValueError(f"downscale: expected at least 1, got {downscale}")
        self._frames = list(frames)
        self._scale = scale
        self._sources = [_source(frame, downscale) for frame in frames]
        self._targets = [_target(source) for source in self._sources]
        self._undistortions: OrderedDict[tuple, Undistortion] = OrderedDict()
        self._lock = threading.Lock()
        self._decoded: OrderedDict[int, View] = OrderedDict()
        self._decoding: dict[int, Future[View]] = {}
        self._files: dict[int, bytes] = {}
        self._decoded_bytes = self._file_bytes = 0
        expected = sum(camera.width * camera.height * 4 for camera in self._targets)
        self._file_budget = 0 if expected <= byte_budget else int(byte_budget * _COMPRESSED_SHARE)
        self._decoded_budget = byte_budget - self._file_budget
        self._worker: ThreadPoolExecutor | None = None
        self.downscale = downscale
        self.source = _describe(self._sources, downscale)
        """Which files the pixels come from, in words."""

    def __len__(self) -> int:
        return len(self._frames)

    @overload
    def __getitem__(self, index: int) -> View: ...
    @overload
    def __getitem__(self, index: slice) -> list[View]: ...
    def __getitem__(self, index: int | slice) -> View | list[View]:
        """The view, from memory or decoded now.

        Raises:
            ValueError: the image, mask or depth file is damaged or has another size than its header said.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = self._index(index)
        with self._lock:
            if index in self._decoded:
                self._decoded.move_to_end(index)
                return self._decoded[index]
            pending = self._decoding.get(index)
            if pending is None:
                mine: Future[View] = Future()
                self._decoding[index] = mine
        if pending is not None:
            return pending.result()
        try:
            view = self._decode(index)
        except BaseException as error:
            with self._lock:
                del self._decoding[index]
            mine.set_exception(error)
            raise
        with self._lock:
            self._keep(index, view)
            del self._decoding[index]
        mine.set_result(view)
        return view

    def prefetch(self, index: int) -> None:
        """Start decoding a view in the background; errors wait for `views[index]`."""
        index = self._index(index)
        with self._lock:
            if index in self._decoded or index in self._decoding:
                return
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._worker.submit(self.__getitem__, index)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) of a view, without decoding it."""
        camera = self.camera(index)
        return camera.width, camera.height

    def camera(self, index: int) -> Cameras:
        """The pinhole camera of a view, without decoding it."""
        return self._targets[self._index(index)]

    def frame(self, index: int) -> Frame:
        """The frame that a view was made from."""
        return self._frames[self._index(index)]

    @property
    def nbytes(self) -> int:
        """Memory in use by decoded views and compressed files."""
        return self._decoded_bytes + self._file_bytes

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"view {index} of {len(self)}")
        return index % len(self)

    def _keep(self, index: int, view: View) -> None:
        """Cache a view, dropping the least recently used ones. The lock is held."""
        if view.nbytes > self._decoded_budget:
            return
        self._decoded[index] = view
        self._decoded_bytes += view.nbytes
        while self._decoded_bytes > self._decoded_budget:
            _, dropped = self._decoded.popitem(last=False)
            self._decoded_bytes -= dropped.nbytes

    def _data(self, index: int) -> bytes | None:
        """The image file's bytes, if compressed files are kept at all."""
        path = self._sources[index].path
        if self._file_budget == 0 or path.suffix.lower() == ".exr":
            return None
        with self._lock:
            if index in self._files:
                return self._files[index]
        data = path.read_bytes()
        with self._lock:
            if index not in self._files and self._file_bytes + len(data) <= self._file_budget:
                self._files[index] = data
                self._file_bytes += len(data)
        return data

    def _decode(self, index: int) -> View:
        frame, source, target = self._frames[index], self._sources[index], self._targets[index]
        pixels = decode(source.path, self._data(index))
        _check_size(source.path, pixels, (source.camera.width, source.camera.height))
        factor = source.factor
        full_size = (frame.camera.width, frame.camera.height)
        mask = depth = None
        if frame.mask_path is not None:
            mask = read_mask(frame.mask_path)
            _check_size(frame.mask_path, mask, full_size)
            mask = _shrink_mask(mask, (source.camera.width, source.camera.height))
        if frame.depth_path is not None:
            depth = read_depth(frame.depth_path, frame.depth_scale * self._scale)
            _check_size(frame.depth_path, depth, full_size)
        if source.camera.model != "pinhole":
            warp = self._undistortion(source.camera)
            pixels = warp.apply(pixels)
            if mask is not None:
                mask = warp.apply_mask(mask)
            if warp.mask is not None:
                mask = warp.mask if mask is None else mask & warp.mask
            depth = None  # camera z at the pixels of a distorted image is not defined by any format read here
        pixels = shrink(pixels, factor)
        if mask is not None:
            mask = shrink(mask.astype(np.uint8) * 255, factor) == 255
        if depth is not None:
            depth = _shrink_depth(depth, (target.width, target.height))
        return View(
            camera=target,
            rgb=torch.from_numpy(np.ascontiguousarray(pixels[..., :3])),
            alpha=torch.from_numpy(np.ascontiguousarray(pixels[..., 3])) if pixels.shape[2] == 4 else None,
            mask=None if mask is None else torch.from_numpy(np.ascontiguousarray(mask)),
            depth=None if depth is None else torch.from_numpy(depth),
        )

    def _undistortion(self, camera: Cameras) -> Undistortion:
        """The resampling for a camera, computed once for all frames with its intrinsics (the last few of them)."""
        assert camera.distortion is not None
        intrinsics = torch.cat([camera.Ks.flatten(), camera.distortion.flatten()]).tolist()
        key = (camera.model, camera.width, camera.height, *intrinsics)
        with self._lock:
            known = self._undistortions.get(key)
        if known is None:
            known = undistortion(camera)
        with self._lock:
            self._undistortions[key] = known
            self._undistortions.move_to_end(key)
            if len(self._undistortions) > _MAPS:
                self._undistortions.popitem(last=False)
        return known


@dataclass(frozen=True)
class _Source:
    """The file that a view's pixels come from."""

    path: Path
    camera: Cameras
    """The camera of that file's pixels, perhaps distorted."""
    factor: int
    """How much is left to shrink after undistortion."""


def _source(frame: Frame, downscale: int) -> _Source:
    """The image itself, or its copy in `images_<downscale>/` if that has the expected size."""
    if downscale > 1:
        copy = _shrunk_copy(frame, downscale)
        if copy is not None:
            info = read_info(copy)
            exact = (frame.camera.width / downscale, frame.camera.height / downscale)
            if abs(info.width - exact[0]) < 1 and abs(info.height - exact[1]) < 1:
                return _Source(copy, frame.camera.resized(info.width, info.height), 1)
    return _Source(frame.image_path, frame.camera, downscale)


def _shrunk_copy(frame: Frame, downscale: int) -> Path | None:
    path = frame.image_path
    depth = len(Path(frame.name).parts)
    if depth > len(path.parents) or not path.parents[depth - 1].name:
        return None
    folder = path.parents[depth - 1]
    copy = folder.with_name(f"{folder.name}_{downscale}") / path.relative_to(folder)
    return copy if copy.is_file() else None


def _target(source: _Source) -> Cameras:
    """The pinhole camera after undistortion and shrinking; leftover rows and columns are cut, K scales by 1/N."""
    camera = pinhole_target(source.camera)
    width, height = camera.width // source.factor, camera.height // source.factor
    if width < 1 or height < 1:
        raise ValueError(
            f"downscale {source.factor}: nothing would be left of {source.path.name} ({camera.width}x{camera.height})"
        )
    scale = torch.tensor([1 / source.factor, 1 / source.factor, 1.0], dtype=camera.Ks.dtype)
    return replace(camera, Ks=camera.Ks * scale[:, None], width=width, height=height)


def _describe(sources: list[_Source], downscale: int) -> str:
    if downscale == 1:
        return "images as they are"
    copies = sum(source.factor == 1 for source in sources)
    if copies == len(sources):
        return f"the capture's own images_{downscale}"
    averaged = f"images averaged over {downscale}x{downscale} pixels"
    return averaged if copies == 0 else f"{averaged}, {copies} of {len(sources)} from images_{downscale}"


def _check_size(path: Path, pixels: NDArray, size: tuple[int, int]) -> None:
    if (pixels.shape[1], pixels.shape[0]) != size:
        raise ValueError(f"{path}: image of {pixels.shape[1]}x{pixels.shape[0]}, expected {size[0]}x{size[1]}")


def _shrink_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask at the size of a smaller copy of the image; a pixel counts if all that it covers do."""
    if (mask.shape[1], mask.shape[0]) == size:
        return mask
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.999


def _shrink_depth(depth: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Mean of the known depths that each pixel covers."""
    if (depth.shape[1], depth.shape[0]) == size:
        return depth
    factor = depth.shape[1] // size[0], depth.shape[0] // size[1]
    depth = depth[: size[1] * factor[1], : size[0] * factor[0]]
    known = cv2.resize((depth > 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(depth, size, interpolation=cv2.INTER_AREA)
    return np.divide(total, known, out=np.zeros_like(total), where=known > 0)
