"""Each format of Gaussians: written, read back within its quantisation, alike in pictures, and as other programs see it."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from prismfield.export.assets import SplatAsset
from prismfield.export.compressed_ply import read_compressed_ply
from prismfield.export.convert import Source, write_checked
from prismfield.export.formats import FORMATS, WriteOptions, ending, read_asset
from prismfield.export.library import load, scene_of
from prismfield.export.ply import read_ply
from prismfield.export.rows import ROWS_AT_ONCE
from prismfield.export.smallest_three import LARGEST
from prismfield.export.sog import read_sog
from prismfield.export.sog_files import webp
from prismfield.export.splat import read_splat
from prismfield.export.spz import read_spz, write_spz
from prismfield.render.ops.sh import C0

from .splat_assets import (
    angles,
    assert_same_look,
    covariances,
    make_splats,
    matched,
    rms,
    write_spz_by_hand,
)

NO_OPTIONS = WriteOptions()


@dataclass(frozen=True)
class Cell:
    """A format as written, and by how much its values may be off: from the layout, not from the code."""

    name: str
    mean: float
    """User units."""
    degrees: float
    log_scale: float
    opacity: float
    dc: float
    """Of f_dc."""
    sh: float
    """Of harmonics above degree 0."""
    psnr: float
    """Least, decibels, of the splats of `make_splats`."""
    options: WriteOptions = NO_OPTIONS
    keeps_antialiased: bool = True
    max_degree: int = 3


# compressed.ply: ranges of 256 splats are at most the whole: 7 units in 2^10 steps, 3.5 in ln scale
CELLS = [
    Cell("a.ply", 0, 1e-3, 1e-5, 1e-6, 0, 0, 99),
    Cell("a.compressed.ply", 3.5e-3, 0.25, 1.8e-3, 0.5 / 255, 3 / 510, 1 / 64, 43),
    Cell("a.spz", 1 / 8192, 0.25, 1 / 32, 0.5 / 255, 0.5 / 255 / 0.15, 8.5 / 128, 36),
    Cell("b.spz", 1 / 8192, 0.25, 1 / 32, 0.5 / 255, 0.5 / 255 / 0.15, 8.5 / 128, 36, WriteOptions(spz_version=4)),
    Cell("c.spz", 1 / 8192, 0.25, 1 / 32, 0.5 / 255, 0.5 / 255 / 0.15, 1 / 128, 42, WriteOptions(spz_sh_bits=(8, 8))),
    # Steps of 16 bits in ln(1 + |x|) up to 6; codebooks and palette have no bound but that of what they were made for
    Cell("a.sog", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.9, 33),
    Cell("d.sog", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.08, 40, WriteOptions(sog_palette=1 << 16)),
    Cell("a_sog", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.9, 33),
    Cell("meta.json", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.9, 33),
    Cell("a_lod", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.9, 33, WriteOptions(levels=2, chunk_splats=256)),
    Cell("lod-meta.json", 3e-4, 0.9, 0.25, 0.5 / 255, 0.05, 0.9, 33),
    Cell("a.glb", 4e-6, 1e-3, 1e-5, 0, 1e-5, 1e-5, 99),
    Cell("a.splat", 0, 1.0, 1e-5, 0.5 / 255, 0.5 / 255 / C0, 0, 40, keeps_antialiased=False, max_degree=0),
]


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_what_is_written_comes_back_within_its_quantisation(tmp_path: Path, cell: Cell, degree: int) -> None:
    asset = make_splats(degree=degree, antialiased=degree == 2)
    path = tmp_path / "new" / cell.name
    source = Source(tmp_path, asset, scene_of(asset, tmp_path))
    written = write_checked(source, path, cell.options, is_verified=degree == 3)
    names = [entry.name for entry in path.parent.iterdir()]
    assert path.name in names and all(name.endswith((".webp", "0_0", path.name)) for name in names)
    if degree == 3:
        found = written.psnr if written.psnr_held is None else written.psnr_held
        assert found is not None and found >= cell.psnr
    again = read_asset(path)
    assert isinstance(again, SplatAsset)
    assert again.antialiased == (asset.antialiased and cell.keeps_antialiased)
    assert again.sh_degree == min(degree, cell.max_degree)
    again, slack = matched(asset, again), 1.02
    assert np.abs(again.means - asset.means).max() <= cell.mean * slack + 1e-6
    assert angles(asset, again).max() <= cell.degrees
    assert np.abs(again.log_scales - asset.log_scales).max() <= cell.log_scale * slack
    assert rms(again.log_scales - asset.log_scales) <= 0.02 and rms(again.sh[:, 0] - asset.sh[:, 0]) <= 0.008
    assert np.abs(again.opacities - asset.opacities).max() <= cell.opacity * slack
    terms = again.sh.shape[1]
    assert np.abs(again.sh[:, 0] - asset.sh[:, 0]).max() <= cell.dc * slack + 1e-6
    assert np.abs(again.sh[:, 1:] - asset.sh[:, 1:terms]).max(initial=0) <= cell.sh * slack + 1e-6
    assert again.opacities[:2].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_every_format_is_in_the_tests() -> None:
    tested = {ending(Path(cell.name), FORMATS["gaussians"]) for cell in CELLS}
    tested.add(".pfz")  # which turns axes about: tests/test_pfz.py
    assert tested == {end for end, form in FORMATS["gaussians"].items() if form.write is not None}


def test_the_longest_ending_wins() -> None:
    assert ending(Path("a.b.COMPRESSED.ply"), FORMATS["gaussians"]) == ".compressed.ply"
    assert ending(Path("compressed.ply"), FORMATS["gaussians"]) == ".ply"
    assert ending(Path("a.jpg"), FORMATS["gaussians"]) is None


def test_a_compressed_ply_is_known_by_its_header(tmp_path: Path) -> None:
    asset = make_splats(300)
    write_checked(Source(tmp_path, asset, scene_of(asset, tmp_path)), tmp_path / "a.compressed.ply", WriteOptions())
    (tmp_path / "a.compressed.ply").rename(tmp_path / "b.ply")
    assert len(read_asset(tmp_path / "b.ply")) == 300


def test_a_ply_passes_on_what_it_does_not_know(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    extra = {"values": rng.integers(0, 9, 50).astype(np.uint8), "time": rng.normal(size=50), "mask": np.ones(50, "f4")}
    asset = replace(make_splats(50, degree=1), extra=extra)
    source = Source(tmp_path, asset, scene_of(asset, tmp_path))
    write_checked(source, tmp_path / "a.ply", WriteOptions(), is_verified=False)
    again = read_asset(tmp_path / "a.ply")
    assert isinstance(again, SplatAsset) and list(again.extra) == list(extra)
    for name, column in extra.items():
        assert again.extra[name].dtype == column.dtype
        np.testing.assert_array_equal(again.extra[name], column)


def test_a_file_that_looks_different_is_not_kept(tmp_path: Path) -> None:
    asset = make_splats()
    (tmp_path / "a.spz").write_text("old")
    source = Source(tmp_path, asset, scene_of(replace(asset, sh=asset.sh + np.float32(0.5)), tmp_path))
    with pytest.raises(OSError, match="does not look like the scene when read back"):
        write_checked(source, tmp_path / "a.spz", WriteOptions())
    assert (tmp_path / "a.spz").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_spz_holds_what_is_far_away_and_what_is_tiny(tmp_path: Path) -> None:
    asset = make_splats(300)
    for factor, step in ((1e5, 1.0), (1e-3, 2.0**-18)):
        moved = asset.moved(np.eye(3), scale=factor)
        write_spz(tmp_path / "a.spz", moved)
        again = read_spz(tmp_path / "a.spz")
        assert np.abs(np.sort(again.means, 0) - np.sort(moved.means, 0)).max() <= step
    with pytest.raises(ValueError, match="from the origin, the format reaches"):
        write_spz(tmp_path / "b.spz", asset.moved(np.eye(3), (2e7, 0, 0)))


@pytest.mark.parametrize(("version", "degree"), [(1, 0), (2, 4), (3, 1)])
def test_spz_of_older_versions_and_higher_degree(tmp_path: Path, version: int, degree: int) -> None:
    """Two splats, byte by byte as the format's description has them."""
    terms = (degree + 1) ** 2 - 1
    positions = {1: struct.pack("<6e", 1, 2, 3, -4, 5, 6.5)}.get(version)
    if positions is None:
        fixed = [round(x * 4096) for x in (1, 2, 3, -4, 5, 6.5)]
        positions = b"".join(struct.pack("<i", x)[:3] for x in fixed)
    body = positions + bytes([51, 255]) + bytes([0, 128, 255] * 2) + bytes([160, 144, 176] * 2)
    # w = 0.8, x = 0.6; and half a turn about -z
    body += (
        bytes([204, 128, 128, 128, 128, 0])
        if version < 3
        else struct.pack("<2I", 3 << 30 | 434 << 20, 2 << 30 | 1 << 29)
    )
    body += bytes(range(3 * terms)) * 2
    write_spz_by_hand(tmp_path / "a.spz", struct.pack("<IIIBBBB", 0x5053474E, version, 2, degree, 12, 1, 0), body)
    asset = read_spz(tmp_path / "a.spz")
    assert asset.antialiased and asset.sh_degree == min(degree, 3)
    # Right, up, back become right, down, forward
    np.testing.assert_array_equal(asset.means, [[1, -2, -3], [-4, -5, -6.5]])
    np.testing.assert_allclose(asset.opacities, [0.2, 1], atol=1e-6)
    np.testing.assert_allclose(asset.log_scales, [[0, -1, 1]] * 2, atol=1e-6)
    np.testing.assert_allclose(asset.sh[0, 0], [-0.5 / 0.15, 0.5 / 255 / 0.15, 0.5 / 0.15], atol=1e-4)
    # The long axis (z, e^1) and the short one (y, e^-1) of the first, turned about x by 2 acos 0.8, seen from below
    s, c = 0.96, 0.28
    expected = np.array([1.0, (c * np.exp(-1)) ** 2 + (s * np.e) ** 2, (s * np.exp(-1)) ** 2 + (c * np.e) ** 2])
    np.testing.assert_allclose(np.diagonal(covariances(asset)[0]), expected, rtol=0.03)
    if degree:  # Y_1: y, z, x; the half turn about x makes the first two negative
        values = (np.array(range(9), float).reshape(3, 3) - 128) / 128
        np.testing.assert_allclose(asset.sh[0, 1:4], values * [[-1], [-1], [1]], atol=1e-5)


def test_an_spz_that_names_its_axes(tmp_path: Path) -> None:
    asset = make_splats(50, degree=1)
    write_spz(tmp_path / "a.spz", asset, version=4)
    data = bytearray((tmp_path / "a.spz").read_bytes())
    in_file = read_spz(tmp_path / "a.spz").moved(np.diag([1.0, -1, -1]))  # the values as they are stored
    data[14] |= 2
    data[16:20] = struct.pack("<I", 44)
    for number, matrix in ((6, np.eye(3)), (4, np.diag([1.0, -1, -1])), (12, [[1, 0, 0], [0, 0, -1], [0, 1, 0]])):
        record = struct.pack("<III", 0xADBE0003, 4, number)
        (tmp_path / "b.spz").write_bytes(bytes(data[:32]) + record + bytes(data[32:]))
        assert_same_look(read_spz(tmp_path / "b.spz"), in_file.moved(np.array(matrix, float)))
    (tmp_path / "b.spz").write_bytes(bytes(data[:32]) + struct.pack("<III", 0xADBE0003, 4, 3) + bytes(data[32:]))
    with pytest.raises(ValueError, match="mirrored"):
        read_spz(tmp_path / "b.spz")


def test_flowers_in_every_format_are_the_same(shared_data: Path) -> None:
    folder = shared_data / "splats"
    ply = read_ply(folder / "flowers_lod3_inria.ply")
    spz, splat = read_spz(folder / "flowers_lod3_v3.spz"), read_splat(folder / "flowers_lod3.splat")
    # In the order of the .ply: +y points down in both, which the .spz stores turned
    assert np.abs(spz.means - ply.means).max() < 1.3e-4
    visible = ply.scales.min(1) > np.exp(-9.9)
    assert visible.mean() > 0.2
    assert np.median(angles(ply, spz)) < 0.1 and angles(ply, spz).max() < 0.25
    assert np.abs(spz.log_scales - ply.log_scales)[visible].max() < 0.52 / 16
    assert np.abs(spz.opacities - ply.opacities).max() < 1e-6
    assert rms(spz.sh[:, 1:9] - ply.sh[:, 1:9]) < 0.032 < 0.5 * rms(ply.sh[:, 1:9])
    places = [x.means[np.lexsort(x.means.T)] for x in (ply, splat)]
    np.testing.assert_allclose(*places, atol=1e-6)
    ordered = [x.take(np.lexsort(x.means.T)) for x in (ply, splat)]
    visible = ordered[0].opacities > 0.1
    assert np.median(angles(*ordered)) < 1 and (angles(*ordered)[visible] < 1.5).mean() > 0.99
    clipped = ordered[0].sh[:, 0].clip(-0.5 / C0, 0.5 / C0)
    assert (np.abs(ordered[1].sh[:, 0] - clipped).max(1) < 1.1 / 255 / C0).mean() > 0.99


def test_flowers_as_sog_are_the_ply_that_was_made_of_them(shared_data: Path) -> None:
    ply = read_ply(shared_data / "splats" / "flowers_lod3_inria.ply")
    for path in ("flowers_lod3_sog", "flowers_lod3_sog/meta.json"):
        sog = load(shared_data / "splats" / path).asset()
        assert sog.sh_degree == 2
        sog = read_sog(shared_data / "splats" / path)
        assert max(ply.at_degree(2).differences(sog).values()) < 1e-6


@pytest.mark.parametrize(("name", "count"), [("angel", 71_359), ("trumpet", 89_292)])
def test_statues_in_a_zip(shared_data: Path, name: str, count: int) -> None:
    asset = read_asset(shared_data / "splats" / f"{name}.sog")
    assert isinstance(asset, SplatAsset) and len(asset) == count and asset.sh_degree == 0
    assert 1 < np.ptp(asset.means, 0).max() < 10 and 0.3 < asset.opacities.mean() < 1


def test_a_sog_of_version_1(tmp_path: Path) -> None:
    """Four splats, picture by picture."""
    quats = np.array([[128, 128, 128, 252], [255, 128, 128, 253], [128, 128, 128, 255], [9, 9, 9, 0]])
    flat = np.tile([0, 128, 255, 255], (4, 1))
    labels = np.array([[0, 0, 0, 255], [1, 0, 0, 255], [65, 0, 0, 255], [1, 0, 0, 255]])
    sheet = np.zeros((2, 64 * 3, 4))
    sheet[0, 3:6, :3] = [[255, 0, 51], [102, 0, 0], [0, 0, 255]]  # of entry 1: terms 1 to 3
    sheet[1, 3:6, :3] = 255  # of entry 65
    pictures = {"l": np.tile([255, 0, 0, 255], (4, 1)), "u": np.tile([127, 0, 255, 255], (4, 1)), "q": quats}
    pictures |= {"s": flat, "c": flat, "n": labels}
    folder = tmp_path / "old_sog"
    folder.mkdir()
    for key, values in pictures.items():
        (folder / key).write_bytes(webp(values.reshape(2, 2, 4).astype(np.uint8)))
    (folder / "p").write_bytes(webp(sheet.astype(np.uint8)))
    means = {"shape": [4, 3], "mins": [-1, -2, 0], "maxs": [1, 2, 65535 / 65280], "files": ["l", "u"]}
    scales = {"mins": [-3, -2, -1], "maxs": [0, 0, 1], "files": ["s"]}
    sh0 = {"mins": [-1, -1, -1, 0], "maxs": [1, 1, 1, 2], "files": ["c"]}
    meta = {"means": means, "scales": scales, "quats": {"files": ["q"]}, "sh0": sh0}
    meta["shN"] = {"mins": -1, "maxs": 1, "files": ["p", "n"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    asset = read_sog(folder)
    np.testing.assert_allclose(asset.means[0], [1 - np.exp(2 / 65535 / 2), 1 - np.exp(2), np.e - 1], atol=1e-4)
    np.testing.assert_allclose(asset.log_scales[2], [-3, -2 + 2 * 128 / 255, 1], atol=1e-5)
    np.testing.assert_allclose(asset.sh[0, 0], [-1, 1 / 255, 1], atol=1e-5)
    np.testing.assert_allclose(asset.opacities, 1 / (1 + np.exp(-2)), atol=1e-5)
    np.testing.assert_allclose(np.abs(asset.quats).argmax(1), [0, 0, 3, 0])
    np.testing.assert_allclose(np.abs(asset.quats[1]), [LARGEST, LARGEST, 0, 0], atol=0.01)
    np.testing.assert_allclose(asset.sh[1, 1:], [[1, -1, -0.6], [-0.2, -1, -1], [-1, -1, 1]], atol=1e-5)
    np.testing.assert_allclose(asset.sh[2, 1:], 1, atol=1e-5)


def test_a_folder_is_replaced_and_a_file_in_its_place_is_not(tmp_path: Path) -> None:
    asset = make_splats(50, degree=0)
    source = Source(tmp_path, asset, scene_of(asset, tmp_path))
    for _ in range(2):
        write_checked(source, tmp_path / "a_sog", WriteOptions(), is_verified=False)
        assert len(read_asset(tmp_path / "a_sog")) == 50 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "b_sog").write_text("a file")
    with pytest.raises(NotADirectoryError, match="b_sog"):
        write_checked(source, tmp_path / "b_sog", WriteOptions())


def test_guitar_in_every_format_is_the_same(shared_data: Path) -> None:
    ply = read_compressed_ply(shared_data / "splats" / "guitar.compressed.ply")
    spz = read_spz(shared_data / "splats" / "guitar_v3.spz")
    assert len(ply) == 90_854 and ply.sh_degree == spz.sh_degree == 0
    assert np.abs(spz.means - ply.means).max() < 1.3e-4
    assert np.median(angles(ply, spz)) < 0.1
    assert np.abs(spz.opacities - ply.opacities).max() < 1e-6
    assert np.median(np.abs(spz.log_scales - ply.log_scales)) < 0.5 / 16
    assert np.percentile(np.abs(spz.sh - ply.sh), 99) < 0.51 / 255 / 0.15
    assert load(shared_data / "splats" / "guitar_v3.spz").num_primitives == 90_854


@pytest.mark.parametrize("name", ["a.ply", "a.compressed.ply", "a.spz", "a.sog", "a.glb", "a.splat"])
def test_writing_takes_a_few_times_the_memory_of_the_splats(tmp_path: Path, name: str) -> None:
    """Reading back for comparison included."""
    asset = make_splats(3 * ROWS_AT_ONCE)  # what is done in pieces is small beside it
    size = sum(values.nbytes for values in (asset.means, asset.quats, asset.scales, asset.opacities, asset.sh))
    form = FORMATS["gaussians"][name[1:]]
    assert form.write is not None
    options = WriteOptions(sog_palette=256) if name == "a.sog" else WriteOptions()
    tracemalloc.start()
    try:
        form.write(tmp_path / name, asset, options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4.5 * size
