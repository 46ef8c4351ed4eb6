"""The files of a .sog: in a zip or a folder, pictures of bytes in lossless WebP and one meta.json."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export.reading import check_ratio

META = "meta.json"
_MAX_META = 1 << 24
Files = Callable[[str], bytes]
"""The bytes of a file by name; raises a ValueError that names it."""


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """Of a folder, or of a zip. Nothing is unpacked to the disk, so that names in it lead nowhere.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no zip.
    """
    if path.is_dir():
        yield lambda name: _from_folder(path, name)
        return
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OverflowError, OSError) as error:
            raise ValueError(f"not a zip, or cut short ({error})") from error
        with archive:
            yield lambda name: _from_zip(archive, name)


def _from_folder(folder: Path, name: str) -> bytes:
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise ValueError(f"the name {name!r} does not stay in its folder")
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing") from error


def _from_zip(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError as error:
        raise ValueError(f"{name} is missing") from error
    check_ratio(info.file_size, info.compress_size)
    try:
        with archive.open(info) as file:
            data = file.read(info.file_size)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{name} cannot be read ({error})") from error
    if len(data) != info.file_size:
        raise ValueError(f"{name} is cut short")
    return data


def read_meta(files: Files) -> dict[str, Any]:
    """The object in meta.json.

    Raises:
        ValueError: it is missing, too long, or no JSON.
    """
    from prismfield.export.reading import json_object

    data = files(META)
    if len(data) > _MAX_META:
        raise ValueError(f"{META} has {len(data):,} bytes")
    return json_object(data, META)


def read_pixels(files: Files, name: str, least: int, most: int | None = None) -> NDArray[np.uint8]:
    """[H, W, 4] of a picture with `least` pixels or a few more, or with up to `most`.

    Raises:
        ValueError: it is no lossless WebP, or of another size.
    """
    from PIL import Image

    data = files(name)
    width, height = _webp_size(data, name)
    if not least <= width * height <= (most or 2 * least + (1 << 16)):
        raise ValueError(f"{name}: {width} x {height} pixels, expected {least:,} or a few more")
    check_ratio(4 * width * height, len(data))
    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
            pixels = np.asarray(picture.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, MemoryError, EOFError) as error:
        raise ValueError(f"{name} cannot be decoded ({error})") from error
    if pixels.shape != (height, width, 4):
        raise ValueError(f"{name}: {list(pixels.shape)}, its header says {width} x {height}")
    return pixels


def _webp_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height in the header of a WebP: a decoder allocates by them."""
    if len(data) >= 30 and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if data[12:16] == b"VP8L" and data[20] == 0x2F:
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if data[12:16] == b"VP8X" and _has_chunk(data, b"VP8L"):
            wide = int.from_bytes(data[24:27], "little"), int.from_bytes(data[27:30], "little")
            return wide[0] + 1, wide[1] + 1
    raise ValueError(f"{name} is no lossless WebP, or cut short")


def _has_chunk(data: bytes, kind: bytes) -> bool:
    at = 12
    while at + 8 <= len(data):
        if data[at : at + 4] == kind:
            return True
        at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
    return False


def webp(pixels: NDArray[np.uint8]) -> bytes:
    """A lossless WebP of [H, W, 4] that keeps the colours of transparent pixels."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "WEBP", lossless=True, exact=True, quality=80, method=4)
    return out.getvalue()


def write_files(path: Path, pictures: dict[str, NDArray[np.uint8]], meta: dict[str, Any], *, is_zip: bool) -> None:
    """Write pictures [H, W, 4] and meta.json, as a zip or as a folder."""
    text = json.dumps(meta, separators=(",", ":")).encode()
    if not is_zip:
        path.mkdir()
        for name, pixels in pictures.items():
            (path / name).write_bytes(webp(pixels))
        (path / META).write_bytes(text)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # Readers that stream want to know first what comes
        archive.writestr(zipfile.ZipInfo(META), text)
        for name, pixels in pictures.items():
            archive.writestr(zipfile.ZipInfo(name), webp(pixels))
