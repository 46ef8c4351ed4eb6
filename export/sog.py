"""The .sog of PlayCanvas: each property a picture of bytes, one pixel for each Gaussian, in a zip or a folder.

Versions 1 and 2 are read, 2 is written (developer.playcanvas.com, Spatially Ordered Gaussians; where page and files differ, as the
files of splat-transform 2.7.1 have it). Axes are those of the .ply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.export import smallest_three
from prismfield.export.assets import SplatAsset, Up
from prismfield.export.clusters import codebook, nearest, palette
from prismfield.export.reading import naming, numbers
from prismfield.export.rows import morton_order, pieces
from prismfield.export.sog_files import META, Files, open_files, read_meta, read_pixels, write_files
from prismfield.export.verify import write_verified
from prismfield.render.sort_grid import grid_width, neighbor_distance

_A_ROW = 64  # palette entries in a row of their picture
_MAX_PALETTE, _MAX_COUNT = 1 << 16, 1 << 28
_TERMS = (0, 3, 8, 15)  # harmonics above degree 0
_ALIKE = 0.3  # squared distance to neighbours in a grid, to that along a curve, from which on the grid's pictures are smaller
_QUAT_TAG = 252  # plus the index of the largest component


@dataclass(frozen=True)
class _Plan:
    """Everything in the file, before it is bytes."""

    asset: SplatAsset
    """In the order of the pixels, of the degree that is written."""
    scale_book: NDArray
    color_book: NDArray
    sh_book: NDArray
    entries: NDArray[np.int64]
    """[P, terms, 3] rows of `sh_book`: the palette."""
    labels: NDArray[np.int64]
    """[N] rows of `entries`."""

    def sh_off(self) -> float:
        """How far harmonics above degree 0 will be off when they come back, at most."""
        table, sh = self.sh_book[self.entries], self.asset.sh
        return max(
            float(np.abs(table[self.labels[rows]] - sh[rows, 1:]).max(initial=0)) for rows in pieces(len(self.labels))
        )


def default_palette(count: int) -> int:
    """How many sets of harmonics `count` Gaussians share: about one for two to four, a power of two, 65,536 at most."""
    return min(_MAX_PALETTE, max(1, 1 << max(0, count // 2).bit_length() - 1)) if count > 1024 else max(1, count)


def write_sog(path: Path, asset: SplatAsset, palette_size: int | None = None, *, is_ordered: bool = False) -> None:
    """Write along a Z-order curve, or in the order of a grid that they were trained in; read back and compare before it takes the name `path`.

    Harmonics above degree 0 are shared: each Gaussian has one of the palette's. Scales, colours and the palette's values each
    come from 256 numbers. Degrees in which all is 0 are left out.

    Args:
        path: a zip if it ends with .sog, else a folder, which must be new.
        asset: what to write.
        palette_size: at most 65,536; None: see `default_palette`.
        is_ordered: keep the order that the Gaussians have.

    Raises:
        ValueError: the asset is empty, or the palette's size out of range.
        OSError: the file could not be written, or came back different.
    """
    if palette_size is not None and not 1 <= palette_size <= _MAX_PALETTE:
        raise ValueError(f"expected a palette of 1 to {_MAX_PALETTE}, got {palette_size}")
    if len(asset) == 0:
        raise ValueError(f"{path}: there is nothing to write, the scene has no {asset.noun}")
    plan = _plan(asset, palette_size, is_ordered)
    held = plan.asset
    scales, dc = held.log_scales, held.sh[:, 0]
    steps = np.ptp(_log(held.means), 0) / 65535
    reach = 1 + np.abs(held.means).max(0).astype(np.float64)
    dc_off = float(np.abs(plan.color_book[nearest(dc, plan.color_book)] - dc).max())
    is_zip = path.suffix.lower() == ".sog"
    tolerances = {
        "means": float((0.51 * steps * reach + 1e-6 * reach).max()),
        "quats": smallest_three.rounding(2 * smallest_three.LARGEST / 255),
        "scales": float(np.abs(plan.scale_book[nearest(scales, plan.scale_book)] - scales).max()) + 1e-4,
        "opacities": 0.51 / 255,
        "sh": max(plan.sh_off(), dc_off) + 1e-5,
        "up": 1e-6,
        "antialiased": 0.0,
    }
    write_verified(path, held, lambda target, _: _write(target, plan, is_zip), read_sog, tolerances)


def read_sog(path: Path) -> SplatAsset:
    """Read a .sog, a folder with the files of one, or the meta.json in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    with naming(path):
        return sog_in(path.parent if path.name == META else path)


def sog_in(path: Path) -> SplatAsset:
    """What a zip or a folder holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is wrong with it, without its name.
    """
    with open_files(path) as files:
        return _Reader(files, read_meta(files)).asset()


def _log(values: NDArray) -> NDArray[np.float64]:
    return np.sign(values) * np.log1p(np.abs(values.astype(np.float64)))


def _exp(values: NDArray) -> NDArray[np.float64]:
    return np.sign(values) * np.expm1(np.abs(values))


def _plan(asset: SplatAsset, palette_size: int | None, is_ordered: bool) -> _Plan:
    degree = next((d for d in range(asset.sh_degree, 0, -1) if asset.sh[:, d**2 : (d + 1) ** 2].any()), 0)
    asset = replace(asset.at_degree(degree), extra={})
    if not is_ordered:
        asset = asset.take(_order(asset))
    rest = asset.sh[:, 1:]
    if degree:
        vectors = np.ascontiguousarray(rest.reshape(len(asset), -1))
        table, labels = palette(vectors, palette_size or default_palette(len(asset)))
        book = codebook(table)
        entries = nearest(table, book).reshape(len(table), *rest.shape[1:])
    else:
        book, entries = np.zeros(0, np.float32), np.zeros((1, 0, 3), np.int64)
        labels = np.zeros(len(asset), np.int64)
    return _Plan(asset, codebook(asset.log_scales), codebook(asset.sh[:, 0]), book, entries, labels)


def _order(asset: SplatAsset) -> NDArray[np.int64]:
    """Along a Z-order curve; or as they come, where that is the order of a grid in which neighbours are more alike.

    Scenes trained with `--compact.sog` come so. Of all that is written, only positions compress better along the curve.
    """
    along = morton_order(asset.means)
    values = np.concatenate([asset.log_scales, asset.sh[:, 0], asset.opacities[:, None]], 1)
    values = values / np.maximum(values.std(0), 1e-12)
    width = grid_width(len(asset))
    as_they_come = neighbor_distance(values, width)
    return along if as_they_come > _ALIKE * neighbor_distance(values[along], width) else np.arange(len(asset))


def _picture(values: NDArray) -> NDArray[np.uint8]:
    """[H, W, 4] with `values` [N, 3 or 4] as its first pixels, opaque where they have no fourth."""
    width = grid_width(len(values))
    height = -(-len(values) // (4 * width)) * 4
    pixels = np.zeros((height * width, 4), np.uint8)
    pixels[:, 3] = 255
    pixels[: len(values), : values.shape[1]] = values
    return pixels.reshape(height, width, 4)


def _write(path: Path, plan: _Plan, is_zip: bool) -> None:
    asset = plan.asset
    logs = _log(asset.means)
    low, high = logs.min(0), logs.max(0)
    words = np.rint((logs - low) / np.where(high > low, high - low, 1) * 65535).astype(np.uint16)
    index, three = smallest_three.split(asset.quats)
    turn = np.rint((three / (2 * smallest_three.LARGEST) + 0.5) * 255).clip(0, 255)
    colors = nearest(asset.sh[:, 0], plan.color_book)
    pictures = {
        "means_l.webp": _picture(words & 255),
        "means_u.webp": _picture(words >> 8),
        "scales.webp": _picture(nearest(asset.log_scales, plan.scale_book)),
        "quats.webp": _picture(np.concatenate([turn, index[:, None] + _QUAT_TAG], 1)),
        "sh0.webp": _picture(np.concatenate([colors, np.rint(255 * asset.opacities[:, None])], 1)),
    }
    about: dict[str, Any] = {"generator": "prismfield"}
    if asset.up is not None:
        about["up"] = list(asset.up)
    meta: dict[str, Any] = {
        "version": 2,
        "asset": about,
        "count": len(asset),
        "antialias": asset.antialiased,
        "means": {"mins": low.tolist(), "maxs": high.tolist(), "files": ["means_l.webp", "means_u.webp"]},
        "scales": {"codebook": plan.scale_book.tolist(), "files": ["scales.webp"]},
        "quats": {"files": ["quats.webp"]},
        "sh0": {"codebook": plan.color_book.tolist(), "files": ["sh0.webp"]},
    }
    if asset.sh_degree:
        size, terms = plan.entries.shape[:2]
        sheet = np.full((-(-size // _A_ROW), _A_ROW * terms, 4), 255, np.uint8)
        flat = np.zeros((sheet.shape[0] * _A_ROW, terms, 3), np.uint8)
        flat[:size] = plan.entries
        sheet[..., :3] = flat.reshape(sheet.shape[0], -1, 3)
        pictures["shN_centroids.webp"] = sheet
        pictures["shN_labels.webp"] = _picture(np.stack([plan.labels & 255, plan.labels >> 8, 0 * plan.labels], 1))
        book, names = plan.sh_book.tolist(), ["shN_centroids.webp", "shN_labels.webp"]
        meta["shN"] = {"count": size, "bands": asset.sh_degree, "codebook": book, "files": names}
    write_files(path, pictures, meta, is_zip=is_zip)


@dataclass(frozen=True)
class _Reader:
    files: Files
    meta: dict[str, Any]

    def asset(self) -> SplatAsset:
        if "lod" in self.meta or "means" not in self.meta:
            raise ValueError(f"{META} is not that of a .sog: it says nothing of means")
        version = self.meta.get("version")
        if version not in (None, 2):
            raise ValueError(f"{META}: expected version 2, or none as in version 1, got {str(version)[:20]}")
        is_first = version is None
        shape = self._part("means").get("shape")
        count = self.meta.get("count") if not is_first else shape[0] if isinstance(shape, list) and shape else None
        if type(count) is not int or not 1 <= count <= _MAX_COUNT:
            raise ValueError(f"{META}: expected how many Gaussians, 1 to {_MAX_COUNT:,}, got {str(count)[:20]}")
        sh0 = self._pixels("sh0", 0, count)
        if is_first:
            low, high = self._ends("sh0", 4)
            values = low + (high - low) * (sh0 / 255)
            with np.errstate(over="ignore"):
                colors, opacities = values[:, :3], 1 / (1 + np.exp(-values[:, 3]))
        else:
            colors, opacities = self._book("sh0")[sh0[:, :3]], sh0[:, 3] / 255
        table, labels = self._harmonics(count, is_first)
        sh = np.empty((count, 1 + table.shape[1], 3), np.float32)
        with np.errstate(over="ignore"):
            scales = np.exp(self._log_scales(count, is_first))
            sh[:, 0] = colors
            for some in pieces(count):
                sh[some, 1:] = table[labels[some]]
        return SplatAsset.from_activated(
            self._means(count),
            self._quats(count),
            scales,
            opacities,
            sh,
            up=self._up(),
            antialiased=self.meta.get("antialias") is True,
        )

    def _part(self, key: str) -> dict[str, Any]:
        part = self.meta.get(key)
        if not isinstance(part, dict):
            raise ValueError(f"{META}: expected an object {key!r}")
        return part

    def _pixels(self, key: str, which: int, least: int) -> NDArray[np.uint8]:
        """[least, 4] of one of the pictures."""
        names = self._part(key).get("files")
        if not isinstance(names, list) or len(names) <= which or not isinstance(names[which], str):
            raise ValueError(f"{META}: expected file names in {key!r}")
        return read_pixels(self.files, names[which], least).reshape(-1, 4)[:least]

    def _book(self, key: str) -> NDArray[np.float64]:
        return np.array(numbers(self._part(key).get("codebook"), 256, f"{META}: codebook of {key!r}"))

    def _ends(self, key: str, count: int) -> tuple[NDArray, NDArray]:
        part = self._part(key)
        low, high = (numbers(part.get(end), count, f"{META}: {end} of {key!r}") for end in ("mins", "maxs"))
        return np.array(low), np.array(high)

    def _means(self, count: int) -> NDArray:
        low, high = self._ends("means", 3)
        if max(np.abs(low).max(), np.abs(high).max()) > 80:
            raise ValueError(f"{META}: positions reach exp(80)")
        lower, upper = (self._pixels("means", which, count)[:, :3].astype(np.float64) for which in (0, 1))
        return _exp(low + (high - low) * ((lower + 256 * upper) / 65535))

    def _quats(self, count: int) -> NDArray:
        pixels = self._pixels("quats", 0, count)
        tags = pixels[:, 3].astype(np.int64) - _QUAT_TAG
        quats = smallest_three.join(tags.clip(0), (pixels[:, :3] / 255 - 0.5) * (2 * smallest_three.LARGEST))
        return np.where(tags[:, None] < 0, [1.0, 0, 0, 0], quats)

    def _log_scales(self, count: int, is_first: bool) -> NDArray:
        pixels = self._pixels("scales", 0, count)[:, :3]
        if not is_first:
            return self._book("scales")[pixels]
        low, high = self._ends("scales", 3)
        return low + (high - low) * (pixels / 255)

    def _harmonics(self, count: int, is_first: bool) -> tuple[NDArray, NDArray[np.int64]]:
        """The palette [P, terms, 3] of what is above degree 0, and the row of it that each Gaussian has."""
        if self.meta.get("shN") is None:
            return np.zeros((1, 0, 3)), np.zeros(count, np.int64)
        part = self._part("shN")
        labels = self._pixels("shN", 1, count).astype(np.int64)
        rows = labels[:, 0] + 256 * labels[:, 1]
        size: Any
        bands: Any
        if is_first:  # it does not say of which degree they are, the picture's width does
            size, bands = int(rows.max()) + 1, None
        else:
            size, bands = part.get("count"), part.get("bands")
            if type(size) is not int or not 1 <= size <= _MAX_PALETTE or bands not in (1, 2, 3):
                raise ValueError(f"{META}: expected a palette of at most {_MAX_PALETTE} with 1 to 3 bands in 'shN'")
        if rows.max() >= size:
            raise ValueError(f"harmonics: a label is {rows.max()}, the palette has {size}")
        sheet = self._sheet(part, size, bands)
        terms = sheet.shape[1] // _A_ROW
        table = sheet[..., :3].reshape(-1, terms, 3)
        if not is_first:
            return self._book("shN")[table], rows
        low, high = (numbers([part.get(end)], 1, f"{META}: {end} of 'shN'")[0] for end in ("mins", "maxs"))
        return low + (high - low) * (table / 255), rows

    def _sheet(self, part: dict[str, Any], size: int, bands: int | None) -> NDArray[np.uint8]:
        names = part.get("files")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ValueError(f"{META}: expected file names in 'shN'")
        lines = -(-size // _A_ROW)
        terms = _TERMS[-1 if bands is None else bands]
        least = lines * _A_ROW * (terms if bands is not None else _TERMS[1])
        most = _MAX_PALETTE * terms if bands is None else None
        sheet = read_pixels(self.files, names[0], least, most)
        widths = [_A_ROW * t for t in _TERMS[1:]] if bands is None else [_A_ROW * terms]
        if sheet.shape[1] not in widths or sheet.shape[0] < lines:
            wide = " or ".join(map(str, widths))
            raise ValueError(f"{names[0]}: {sheet.shape[1]} x {sheet.shape[0]} pixels, expected {wide} x {lines}")
        return sheet

    def _up(self) -> Up | None:
        about = self.meta.get("asset")
        try:
            x, y, z = numbers(about.get("up") if isinstance(about, dict) else None, 3, "up")
        except ValueError:
            return None
        return (x, y, z) if (x, y, z) != (0, 0, 0) else None
