"""The .splat of antimatter15's viewer: 32 bytes for each Gaussian, and nothing else. Colour does not change with the view.

float32 position, float32 scale, 8-bit red, green, blue and opacity, 8-bit quaternion (wxyz, 128 is 0). There is no header:
any file whose size is a multiple of 32 is one. Axes are those of the .ply.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from prismfield.export.assets import SplatAsset
from prismfield.export.reading import naming
from prismfield.export.rows import pieces
from prismfield.export.verify import write_verified
from prismfield.render.ops.sh import C0

_RECORD = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])
# Rounding to multiples of 1/255 and 1/128; 127/128 is the largest component, and the unit length is restored.
_TOLERANCES = {"means": 0, "scales": 1e-5, "opacities": 0.51 / 255, "sh": 0.51 / 255 / C0, "quats": 2.1 / 128}


def write_splat(path: Path, asset: SplatAsset) -> None:
    """Write, read back and compare before it takes the name `path`; largest and most opaque first, as viewers load it.

    Harmonics above degree 0, `up` and `antialiased` are lost; colours are clipped to 0..1.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    order = np.argsort(-asset.scales.astype(np.float64).prod(1) * asset.opacities, kind="stable")
    held = replace(asset.take(order).at_degree(0), up=None, antialiased=False)
    held = replace(held, sh=held.sh.clip(-0.5 / C0, 0.5 / C0))
    write_verified(path, held, _write, read_splat, _TOLERANCES)


def read_splat(path: Path) -> SplatAsset:
    """Read a .splat.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    size = path.stat().st_size
    with naming(path):
        if size == 0 or size % _RECORD.itemsize:
            raise ValueError(f"not a .splat: expected records of {_RECORD.itemsize} bytes, the file has {size}")
        table = np.fromfile(path, _RECORD)
        return SplatAsset.from_activated(
            table["mean"],
            table["quat"].astype(np.float32) - 128,
            table["scale"],
            table["rgba"][:, 3] / 255,
            (table["rgba"][:, None, :3] / 255 - 0.5) / C0,
        )


def _write(path: Path, asset: SplatAsset) -> None:
    with path.open("wb") as file:
        for rows in pieces(len(asset)):
            table = np.empty(rows.stop - rows.start, _RECORD)
            table["mean"], table["scale"] = asset.means[rows], asset.scales[rows]
            rgb = 0.5 + C0 * asset.sh[rows, 0]
            table["rgba"] = np.rint(255 * np.concatenate([rgb, asset.opacities[rows, None]], 1)).clip(0, 255)
            # 1 itself would need 256: the sign that leaves the largest component negative reaches -128
            largest = np.take_along_axis(asset.quats[rows], np.abs(asset.quats[rows]).argmax(1)[:, None], 1)
            table["quat"] = np.rint(128 - 128 * asset.quats[rows] * np.where(largest < 0, -1, 1)).clip(0, 255)
            file.write(table.tobytes())
