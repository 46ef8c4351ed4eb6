"""Image files: sizes from headers, pixels from JPEG, PNG, WebP, TIFF and EXR, and how they shrink."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".exr", ".tif", ".tiff", ".bmp")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file tells."""

    width: int
    height: int
    has_alpha: bool
    is_float: bool
    """16 bits a channel or floating point, not 8."""
    rotated: bool
    """EXIF asks viewers to rotate or flip the image."""


def find_image(path: Path) -> Path | None:
    """`path` if it is a file, else the file of that name with an image extension, else None."""
    if path.is_file():
        return path
    for extension in EXTENSIONS:
        for spelling in (extension, extension.upper()):
            candidate = path.with_name(path.name + spelling)
            if candidate.is_file():
                return candidate
    return None


def read_info(path: Path) -> ImageInfo:
    """Size and kind of an image from its header.

    Raises:
        ValueError: not an image that can be read here.
    """
    if path.suffix.lower() == ".exr":
        return _exr_info(path)
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow's limit on large images; they are decoded by OpenCV
            has_alpha = "A" in image.getbands() or "transparency" in image.info
            deep = image.mode.startswith(("I", "F")) or _png_depth(path) == 16
            rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
            return ImageInfo(image.width, image.height, has_alpha, deep, rotated)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({_first_line(error)})") from error


def _png_depth(path: Path) -> int:
    """Bits a channel of a PNG; Pillow reports 16-bit colour as 8."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[24] if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) > 24 else 8


def decode(path: Path, data: bytes | None = None) -> NDArray:
    """Pixels of an image file, as they are stored: EXIF rotation is ignored, as COLMAP ignores it.

    Args:
        path: the file; also names it in errors.
        data: its bytes, where they were read before.

    Returns:
        [H, W, 3] or, with straight alpha, [H, W, 4]; RGB order. uint8 for 8-bit files, float32 in 0..1 for 16-bit ones
        and EXR. EXR colours are linear in the file and sRGB-encoded here.

    Raises:
        ValueError: the file is truncated, damaged or of no known kind.
    """
    if path.suffix.lower() == ".exr":
        return _decode_exr(path)
    pixels = decode_raw(path, data)
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32) / 65535.0
    elif pixels.dtype != np.uint8:
        pixels = np.clip(pixels.astype(np.float32), 0.0, 1.0)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, 2)
    if pixels.shape[2] == 2:
        return np.ascontiguousarray(pixels[..., [0, 0, 0, 1]])
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def decode_raw(path: Path, data: bytes | None = None) -> NDArray:
    """Pixels just as OpenCV decodes them (BGR order, any depth), after a check that the file is whole."""
    if data is None:
        data = path.read_bytes()
    if problem := _damage(data):
        raise ValueError(f"{path}: {problem}")
    pixels = None
    if data:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise ValueError(f"{path}: cannot be decoded ({_first_line(error)})") from error
    if pixels is None:
        raise ValueError(f"{path}: cannot be decoded: damaged, or not an image")
    return pixels


def _damage(data: bytes) -> str | None:
    """What is wrong with an image file that OpenCV might decode in part without a word."""
    if not data:
        return "the file is empty"
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:]:
        return "truncated JPEG (no end marker)"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        if b"IEND" not in data[-4096:]:
            return "truncated PNG (no end chunk)"
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.verify()  # checksums of every chunk
        except (OSError, ValueError, SyntaxError) as error:
            return f"damaged PNG ({_first_line(error)})"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < int.from_bytes(data[4:8], "little") + 8:
        return "truncated WebP"
    return None


def read_mask(path: Path) -> NDArray[np.bool_]:
    """[H, W], True where the file is brighter than half its brightest value (so 0/255, 0/1 and soft masks all work)."""
    pixels = decode_raw(path)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(2) if pixels.shape[2] >= 3 else pixels[..., 0]
    return pixels > 0.5 * float(pixels.max(initial=0))


def read_depth(path: Path, scale: float) -> NDArray[np.float32]:
    """[H, W] camera z: the file's values times `scale`, 0 where unknown."""
    pixels = _exr_channels(path)[1] if path.suffix.lower() == ".exr" else decode_raw(path)
    depth = (pixels if pixels.ndim == 2 else pixels[..., 0]).astype(np.float32) * scale
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0.0).astype(np.float32)


def shrink(pixels: NDArray, factor: int) -> NDArray:
    """Mean of each `factor` x `factor` block; rows and columns left over at the end are dropped.

    A fourth channel is straight alpha: colours are weighted by it.
    """
    if factor == 1:
        return pixels
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    if width < 1 or height < 1:
        raise ValueError(
            f"downscale {factor}: nothing would be left of an image of {pixels.shape[1]}x{pixels.shape[0]}"
        )
    pixels = pixels[: height * factor, : width * factor]
    if pixels.ndim == 2 or pixels.shape[2] != 4:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return map_straight_alpha(pixels, lambda x: cv2.resize(x, (width, height), interpolation=cv2.INTER_AREA))


def map_straight_alpha(pixels: NDArray, resample: Callable[[NDArray], NDArray]) -> NDArray:
    """Apply `resample` to [H, W, 4] straight-alpha pixels with their colours weighted by alpha."""
    peak = 255.0 if pixels.dtype == np.uint8 else 1.0
    full = pixels.astype(np.float32)
    full[..., :3] *= full[..., 3:] / peak
    full = resample(full)
    alpha = full[..., 3:]
    full[..., :3] *= np.divide(peak, alpha, out=np.zeros_like(alpha), where=alpha > 0)
    return (np.clip(full, 0, 255) + 0.5).astype(np.uint8) if pixels.dtype == np.uint8 else np.clip(full, 0.0, 1.0)


def srgb_encode(linear: NDArray) -> NDArray:
    """sRGB transfer function (IEC 61966-2-1) of values clipped to 0..1."""
    x = np.clip(linear, 0.0, 1.0)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def _exr_info(path: Path) -> ImageInfo:
    names, pixels = _exr_channels(path, header_only=True)
    return ImageInfo(pixels.shape[1], pixels.shape[0], "A" in names, True, False)


def _decode_exr(path: Path) -> NDArray[np.float32]:
    names, channels = _exr_channels(path)
    by_name = dict(zip(names, np.moveaxis(channels, 2, 0), strict=True))
    luma = by_name.get("Y", next(iter(by_name.values())))
    rgb = np.stack([by_name.get(c, luma) for c in "RGB"], -1)
    if not np.isfinite(rgb).all():
        raise ValueError(f"{path}: has pixels that are not finite")
    alpha = by_name.get("A")
    if alpha is None:
        return srgb_encode(rgb).astype(np.float32)
    alpha = np.clip(alpha, 0.0, 1.0)
    straight = rgb / np.maximum(alpha, 1e-6)[..., None]  # OpenEXR stores premultiplied colours
    return np.concatenate([srgb_encode(np.where(alpha[..., None] > 0, straight, 0.0)), alpha[..., None]], -1).astype(
        np.float32
    )


def _exr_channels(path: Path, *, header_only: bool = False) -> tuple[list[str], NDArray[np.float32]]:
    """Channel names and [H, W, channels] values of the first part of an OpenEXR file."""
    try:
        import OpenEXR
    except ImportError as error:
        raise ValueError(f"{path}: reading EXR needs the OpenEXR package (pip install OpenEXR)") from error
    try:
        with OpenEXR.File(os.fspath(path), separate_channels=True, header_only=header_only) as file:
            if header_only:
                low, high = (np.asarray(corner) for corner in file.header()["dataWindow"])
                names = [channel.name for channel in file.header()["channels"]]
                size = (high - low + 1).tolist()
                return names, np.broadcast_to(np.float32(0), (size[1], size[0], len(names)))
            channels = {name: channel.pixels for name, channel in file.channels().items()}
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable EXR ({_first_line(error)})") from error
    return list(channels), np.stack([np.asarray(c, np.float32) for c in channels.values()], -1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
