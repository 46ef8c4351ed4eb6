"""Write a file so that whatever stands under its name afterwards has been read back and compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol, Self, TypeVar


class Comparable(Protocol):
    """What can be told from what came back."""

    noun: ClassVar[str]
    """What messages call its parts."""

    def __len__(self) -> int:
        """How many there are of them."""
        ...

    def differences(self, other: Self) -> dict[str, float]:
        """Largest difference by field."""
        ...


C = TypeVar("C", bound=Comparable)


def write_verified(
    path: Path,
    asset: C,
    write: Callable[[Path, C], None],
    read: Callable[[Path], C],
    tolerances: dict[str, float],
) -> None:
    """Write under a temporary name, read back, compare, rename. A file that was there stays until the new one is whole.

    Args:
        path: folders that are missing are made. Where `write` makes a folder, there must be none of that name.
        asset: must not be empty.
        write: the codec's writer.
        read: the codec's reader.
        tolerances: largest difference by field name, as `differences` measures it; 0 asks for the same bits.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    if len(asset) == 0:
        raise ValueError(f"{path}: there is nothing to write, the scene has no {asset.noun}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary, asset)
        for part in sorted(temporary.iterdir()) if temporary.is_dir() else [temporary]:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        try:
            found = differences(asset, read(temporary))
        except ValueError as error:
            raise OSError(f"{path}: the file that was written cannot be read back ({error})") from error
        for field, tolerance in tolerances.items():
            if not found[field] <= tolerance:
                raise OSError(f"{path}: {field} came back off by {found[field]:.3g}, at most {tolerance:.3g} expected")
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def differences(a: C, b: C) -> dict[str, float]:
    """Largest difference by field, as `a.differences` measures it."""
    return a.differences(b)
