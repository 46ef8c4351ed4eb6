"""The .ply of smooth convexes, a layout of our own: element `convex`, one row each, with the values as they are drawn.

Properties: x_0 y_0 z_0 to x_{K-1} y_{K-1} z_{K-1} (user units), delta (per user unit), sigma, opacity (0 to 1), and f_dc and
f_rest as Gaussians have them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import ConvexAsset
from prismfield.export.ply_file import (
    Header,
    check_rows,
    columns,
    harmonic_columns,
    harmonic_names,
    harmonics,
    parse_up,
    read_header,
    read_rows,
    up_note,
    write_header,
)
from prismfield.export.verify import write_verified

ELEMENT = "convex"
_SHAPE = ("delta", "sigma", "opacity")
_NEEDED = (*_SHAPE, "f_dc_0", "f_dc_1", "f_dc_2")
_MIN_POINTS, _MAX_POINTS = 3, 12
_TOLERANCES = {"points": 0, "deltas": 0, "sigmas": 0, "opacities": 0, "sh": 0, "up": 1e-6}


def write_convex_ply(path: Path, asset: ConvexAsset) -> None:
    """Write a binary .ply, read it back and compare before it takes the name `path`.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    write_verified(path, asset, _write, read_convex_ply, _TOLERANCES)


def read_convex_ply(path: Path) -> ConvexAsset:
    """Read a .ply of convexes, binary or ascii, degree 0 to 3. Other elements and properties are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = read_header(file)
            points = _check_layout(header, size)
            return _to_asset(read_rows(file, header, ELEMENT), points, header)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def convex_ply_bytes(asset: ConvexAsset) -> int:
    """Size of the file that `write_convex_ply` makes of it."""
    return len(_header(asset)) + len(asset) * _dtype(asset).itemsize


def _point_names(points: int) -> list[str]:
    return [f"{axis}_{i}" for i in range(points) for axis in "xyz"]


def _properties(asset: ConvexAsset) -> dict[str, str]:
    kind = "double" if asset.points.dtype == np.float64 else "float"
    rest = (*_SHAPE, *harmonic_names(asset.sh.shape[1]))
    return dict.fromkeys(_point_names(asset.points.shape[1]), kind) | dict.fromkeys(rest, "float")


def _dtype(asset: ConvexAsset) -> np.dtype:
    shape = asset.points.shape[1:]
    fields = [("points", asset.points.dtype.newbyteorder("<"), shape), *((name, "<f4") for name in _SHAPE)]
    return np.dtype([*fields, ("sh", "<f4", 3 * asset.sh.shape[1])])


def _header(asset: ConvexAsset) -> bytes:
    notes = up_note(asset.up) | {"sh_degree": str(asset.sh_degree)}
    return write_header({ELEMENT: (len(asset), _properties(asset))}, notes)


def _write(path: Path, asset: ConvexAsset) -> None:
    table = np.empty(len(asset), _dtype(asset))
    table["points"], table["delta"], table["sigma"] = asset.points, asset.deltas, asset.sigmas
    table["opacity"], table["sh"] = asset.opacities, harmonic_columns(asset.sh)
    with path.open("wb") as file:
        file.write(_header(asset))
        file.write(table.tobytes())


def _check_layout(header: Header, size: int) -> int:
    """Everything that can be wrong with a header, before anything is allocated; how many points a convex has."""
    names = dict(header.find(ELEMENT)[0].properties)
    points = sum(name.startswith("x_") and name[2:].isdecimal() for name in names)
    if missing := [name for name in (*_point_names(points), *_NEEDED) if name not in names]:
        raise ValueError(f"not a .ply of convexes: {', '.join(missing)} missing")
    if not _MIN_POINTS <= points <= _MAX_POINTS:
        raise ValueError(f"expected x_0 onwards, {_MIN_POINTS} to {_MAX_POINTS} of them, got {points}")
    check_rows(header, ELEMENT, ConvexAsset.noun, size)
    return points


def _to_asset(table: NDArray, points: int, header: Header) -> ConvexAsset:
    corners = columns(table, *_point_names(points))
    is_double = dict(header.find(ELEMENT)[0].properties)["x_0"] == "f8"
    with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused
        return ConvexAsset(
            corners.reshape(-1, points, 3).astype(np.float64 if is_double else np.float32),
            table["delta"].astype(np.float32),
            table["sigma"].astype(np.float32),
            table["opacity"].astype(np.float32),
            harmonics(table).astype(np.float32),
            up=parse_up(header.notes.get("up", "")),
        )
