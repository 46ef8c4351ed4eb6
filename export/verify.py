"""Write a file so that whatever stands under its name afterwards has been read back and compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset


def write_verified(
    path: Path,
    asset: SplatAsset,
    write: Callable[[Path, SplatAsset], None],
    read: Callable[[Path], SplatAsset],
    tolerances: dict[str, float],
) -> None:
    """Write under a temporary name, read back, compare, rename. A file that was there stays until the new one is whole.

    Args:
        path: folders that are missing are made.
        asset: must not be empty.
        write: the codec's writer.
        read: the codec's reader.
        tolerances: largest difference by field name, as `differences` measures it; 0 asks for the same bits.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    if len(asset) == 0:
        raise ValueError(f"{path}: there is nothing to write, the scene has no Gaussians")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary, asset)
        with temporary.open("rb+") as file:
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
        temporary.unlink(missing_ok=True)


def differences(a: SplatAsset, b: SplatAsset) -> dict[str, float]:
    """Largest difference by field: absolute, for `scales` of their logarithms, for `quats` with the better sign.

    A field whose shapes or metadata differ counts as infinitely different.
    """
    if len(a) != len(b) or a.sh.shape != b.sh.shape:
        return dict.fromkeys(("means", "quats", "scales", "opacities", "sh", "up", "antialiased"), np.inf)
    signs = np.where((a.quats * b.quats).sum(1, keepdims=True) < 0, -1, 1).astype(np.float32)
    pairs: dict[str, tuple[NDArray, NDArray]] = {
        "means": (a.means, b.means),
        "quats": (a.quats, signs * b.quats),
        "scales": (a.log_scales, b.log_scales),
        "opacities": (a.opacities, b.opacities),
        "sh": (a.sh, b.sh),
    }
    found = {name: float(np.abs(x - y).max(initial=0.0)) for name, (x, y) in pairs.items()}
    if a.up is None or b.up is None:
        found["up"] = 0.0 if a.up is b.up else np.inf
    else:
        found["up"] = float(np.abs(np.subtract(a.up, b.up)).max())
    found["antialiased"] = 0.0 if a.antialiased == b.antialiased else np.inf
    return found
