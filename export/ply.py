"""The .ply of 3D Gaussian Splatting ("INRIA layout"): one float32 property for each stored value.

Nothing in the layout says which way is up or how it was drawn; comments of ours do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.ply_file import (
    TYPE_NAMES,
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
from prismfield.export.rows import pieces
from prismfield.export.verify import write_verified

_LAYOUT = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity")
_SCALES = ("scale_0", "scale_1", "scale_2")
_QUATS = ("rot_0", "rot_1", "rot_2", "rot_3")
_ELEMENT, _WHAT = "vertex", "Gaussians"
_VALUES = "own values"  # with a space, which no property has in its name
# Only what float32 rounds in a logarithm, a logit or a unit quaternion may differ.
_TOLERANCES = {"means": 0, "quats": 1e-6, "scales": 1e-5, "opacities": 1e-6, "sh": 0, "up": 1e-6, "antialiased": 0}


def write_ply(path: Path, asset: SplatAsset) -> None:
    """Write a binary .ply, read it back and compare before it takes the name `path`.

    An opacity of 1 comes out as 1 - 6e-8, the largest whose logit is finite.

    Raises:
        ValueError: the asset is empty.
        OSError: the file could not be written, or came back different.
    """
    write_verified(path, asset, _write, read_ply, _TOLERANCES)


def read_ply(path: Path) -> SplatAsset:
    """Read a .ply in the INRIA layout, binary or ascii, degree 0 to 3.

    Properties that are none of its own come along as `extra`; other elements are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = read_header(file)
            _check_layout(header, size)
            return _to_asset(read_rows(file, header, _ELEMENT), header)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def ply_bytes(asset: SplatAsset) -> int:
    """Size of the file that `write_ply` makes of it."""
    return len(_header(asset)) + len(asset) * _dtype(asset).itemsize


def _property_names(terms: int) -> list[str]:
    return ["x", "y", "z", "nx", "ny", "nz", *harmonic_names(terms), "opacity", *_SCALES, *_QUATS]


def _dtype(asset: SplatAsset) -> np.dtype:
    own = [(_VALUES, "<f4", len(_property_names(asset.sh.shape[1])))]
    return np.dtype([*own, *((name, column.dtype.newbyteorder("<")) for name, column in asset.extra.items())])


def _header(asset: SplatAsset) -> bytes:
    notes = {"antialiased": str(int(asset.antialiased)), "sh_degree": str(asset.sh_degree)}
    properties = dict.fromkeys(_property_names(asset.sh.shape[1]), "float")
    properties |= {name: TYPE_NAMES[column.dtype.str[1:]] for name, column in asset.extra.items()}
    return write_header({_ELEMENT: (len(asset), properties)}, up_note(asset.up) | notes)


def _write(path: Path, asset: SplatAsset) -> None:
    logits, log_scales = asset.logits, asset.log_scales
    with path.open("wb") as file:
        file.write(_header(asset))
        for rows in pieces(len(asset)):
            means = asset.means[rows]
            parts: list[NDArray] = [means, np.zeros_like(means), harmonic_columns(asset.sh[rows])]
            parts += [logits[rows, None], log_scales[rows], asset.quats[rows]]
            table = np.empty(len(means), _dtype(asset))
            table[_VALUES] = np.concatenate(parts, 1)
            for name, column in asset.extra.items():
                table[name] = column[rows]
            file.write(table.tobytes())


def _check_layout(header: Header, size: int) -> None:
    """Everything that can be wrong with a header, before anything is allocated."""
    names = dict(header.find(_ELEMENT)[0].properties)
    if "packed_position" in names:
        raise ValueError("this is a compressed .ply (packed_position), not the INRIA layout")
    if missing := [name for name in (*_LAYOUT, *_SCALES, *_QUATS) if name not in names]:
        raise ValueError(f"not a .ply of Gaussians: {', '.join(missing)} missing")
    check_rows(header, _ELEMENT, _WHAT, size)


def _to_asset(table: NDArray, header: Header) -> SplatAsset:
    own = {
        "nx",
        "ny",
        "nz",
        *_LAYOUT,
        *_SCALES,
        *_QUATS,
        *(name for name in table.dtype.names or () if "f_rest_" in name),
    }
    values = [columns(table, *names) for names in (("x", "y", "z"), _QUATS, _SCALES)]
    values += [table["opacity"].copy(), harmonics(table)]
    extra = {name: table[name].copy() for name in table.dtype.names or () if name not in own}
    del table  # as large as the asset
    up, antialiased = parse_up(header.notes.get("up", "")), header.notes.get("antialiased") == "1"
    return replace(SplatAsset.from_stored(*values, up=up, antialiased=antialiased), extra=extra)
