"""Reading what others wrote: errors that name the file, and decompression that cannot fill the memory."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HONEST_RATIO, _ALWAYS_ALLOWED = 64, 1 << 24  # compression of splats that no file of real ones comes near; bytes


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever is wrong with the bytes of a file becomes a ValueError that begins with its path."""
    try:
        yield
    except (ValueError, zlib.error, struct.error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_ratio(size: int, packed: int) -> None:
    """Refuse to decompress `packed` bytes to `size` that no file of splats could hold.

    Raises:
        ValueError: it is out of proportion.
    """
    if size > max(_ALWAYS_ALLOWED, _HONEST_RATIO * packed):
        raise ValueError(f"it claims to hold {size:,} bytes in {packed:,}; it is damaged, or cut short")


def gunzip(data: bytes, head: int) -> tuple[bytes, zlib._Decompress]:
    """The first `head` bytes of gzipped `data`, and what goes on from there.

    Raises:
        ValueError: there are fewer.
    """
    stream = zlib.decompressobj(31)
    start = stream.decompress(data, head)
    if len(start) < head:
        raise ValueError("the file is cut short")
    return start, stream


def gunzip_rest(stream: zlib._Decompress, size: int, at_most_after: int) -> tuple[bytes, bytes]:
    """The next `size` bytes and what comes after them, of which there may be `at_most_after`.

    Raises:
        ValueError: there are fewer, more, or the checksum at their end is missing or wrong.
    """
    body = stream.decompress(stream.unconsumed_tail, size) if size else b""
    after = stream.decompress(stream.unconsumed_tail, at_most_after + 1)
    if len(body) < size or not stream.eof:
        raise ValueError(f"it goes on after {size:,} bytes" if len(after) > at_most_after else "the file is cut short")
    return body, after


def numbers(value: Any, count: int, what: str) -> list[float]:
    """`value` from JSON as `count` finite numbers.

    Raises:
        ValueError: it is something else.
    """
    is_list = isinstance(value, list) and len(value) == count
    if not is_list or not all(isinstance(x, int | float) and abs(x) < 1e30 for x in value):
        raise ValueError(f"{what}: expected {count} numbers")
    return [float(x) for x in value]


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The object in JSON text.

    Raises:
        ValueError: it is no JSON, nested out of measure, or no object.
    """
    try:
        value = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: expected an object, got {type(value).__name__}")
    return value
