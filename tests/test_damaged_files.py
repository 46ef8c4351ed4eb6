"""Files of every format, cut short, with bytes turned over, lying about their size: one ValueError, little time, little memory."""

from __future__ import annotations

import gzip
import io
import json
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from PIL import Image

from prismfield.export.convert import Source, write_checked
from prismfield.export.formats import FORMATS, WriteOptions, read_asset
from prismfield.export.library import scene_of
from prismfield.export.lods.streamed import write_streamed
from prismfield.export.sog import read_sog, write_sog
from prismfield.export.spz import read_spz

from .commands import refused
from .splat_assets import make_splats
from .test_ksplat import ksplat

NAMES = ["a.ply", "a.compressed.ply", "a.spz", "v4.spz", "a.sog", "a.glb", "a.ksplat", "a.splat", "a.pfz"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small file of each format."""
    folder = tmp_path_factory.mktemp("whole")
    asset = make_splats(60, degree=1)
    source = Source(folder, asset, scene_of(asset, folder))
    for name in NAMES:
        if name.endswith(".ksplat"):
            (folder / name).write_bytes(ksplat(2, (1,))[0])
            continue
        options = WriteOptions(spz_version=4) if name == "v4.spz" else WriteOptions()
        write_checked(source, folder / name, options, is_verified=False)
    return {name: (folder / name).read_bytes() for name in NAMES}


def outcome(path: Path) -> str:
    """What reading says, "" if it reads. Anything but a ValueError of one line that names the file goes through."""
    try:
        asset = read_asset(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error).strip(), error
        return str(error)
    assert 0 < len(asset) < 1000
    return ""


def test_every_format_that_reads_is_here() -> None:
    ends = {end for end, form in FORMATS["gaussians"].items() if form.read is not None}
    assert ends - {"_sog", "meta.json", "_lod", "lod-meta.json"} == {f".{name.split('.', 1)[1]}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_cut_short_at_every_64th(tmp_path: Path, whole: dict[str, bytes], name: str) -> None:
    data, path = whole[name], tmp_path / name
    for i in range(64):
        path.write_bytes(data[: len(data) * i // 64])
        is_whole_number = name == "a.splat" and i > 0 and len(data) * i // 64 % 32 == 0  # nothing tells it is shorter
        assert bool(outcome(path)) != is_whole_number, f"cut at {i}/64"
    path.write_bytes(data[:-1])
    assert outcome(path)
    path.write_bytes(data)
    assert outcome(path) == ""


@pytest.mark.parametrize("name", NAMES)
def test_bytes_turned_over(tmp_path: Path, whole: dict[str, bytes], name: str) -> None:
    rng, path = np.random.default_rng(0), tmp_path / name
    start, said = time.process_time(), 0
    for i in range(150):
        data = bytearray(whole[name])
        reach = len(data) if i % 2 else min(len(data), 400)  # every other time where the header is
        for place in rng.integers(0, reach, int(rng.integers(1, 9))):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        said += bool(outcome(path))
    assert said > 5 or name == "a.splat"
    assert time.process_time() - start < 30


@pytest.mark.parametrize("name", ["a.spz", "v4.spz"])
def test_bytes_turned_over_inside_the_compression(tmp_path: Path, whole: dict[str, bytes], name: str) -> None:
    rng, path = np.random.default_rng(1), tmp_path / name
    for _ in range(100):
        inner = bytearray(whole[name] if name == "v4.spz" else gzip.decompress(whole[name]))
        for place in rng.integers(0, 24, 3):
            inner[place] = rng.integers(256)
        path.write_bytes(bytes(inner) if name == "v4.spz" else gzip.compress(bytes(inner), 1))
        outcome(path)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lod-meta.json of a small streamed SOG. Put back what you change."""
    folder = tmp_path_factory.mktemp("streamed") / "a_lod"
    write_streamed(folder, make_splats(900, degree=1), 3, 256, 16)
    return folder / "lod-meta.json"


def test_a_streamed_one_cut_short_at_every_64th(streamed: Path) -> None:
    for path in (streamed, streamed.parent / "0_0" / "meta.json", streamed.parent / "0_1" / "quats.webp"):
        data = path.read_bytes()
        for i in range(64 if path == streamed else 16):
            path.write_bytes(data[: len(data) * i // 64])
            assert outcome(streamed), f"{path} cut at {i}/64"
        path.write_bytes(data)
    assert outcome(streamed) == outcome(streamed.parent) == ""


def test_bytes_of_a_streamed_one_turned_over(streamed: Path) -> None:
    rng, data, said = np.random.default_rng(0), streamed.read_bytes(), 0
    for _ in range(120):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
            changed[place] = rng.integers(256)
        streamed.write_bytes(changed)
        said += bool(outcome(streamed))
    streamed.write_bytes(data)
    assert said > 60


def huge(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Files that claim to hold 2^31 splats."""
    count = struct.pack("<I", 1 << 31)
    for name in ("a.ply", "a.compressed.ply"):
        yield name, whole[name].replace(b"element vertex 60", b"element vertex 2147483648")
    inner = gzip.decompress(whole["a.spz"])
    yield "a.spz", gzip.compress(inner[:8] + count + inner[12:])
    yield "v4.spz", whole["v4.spz"][:8] + count + whole["v4.spz"][12:]
    yield "a.ksplat", whole["a.ksplat"][:16] + count + whole["a.ksplat"][20:]
    sections = 4096 + np.array([0, 4])
    data = bytearray(whole["a.ksplat"])
    for place in sections:
        data[place : place + 4] = count
    yield "b.ksplat", bytes(data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole["a.sog"])) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            text = old.read(info)
            new.writestr(info.filename, text.replace(b'"count":60,"anti', b'"count":200000000,"anti'))
    yield "a.sog", out.getvalue()


def test_files_that_claim_too_much(tmp_path: Path, whole: dict[str, bytes]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in huge(whole):
        assert data != whole.get(name)
        (tmp_path / name).write_bytes(data)
        assert outcome(tmp_path / name), name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_bombs(tmp_path: Path) -> None:
    """A gigabyte or more of zeros, in a megabyte or less."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 1 << 26
    path = tmp_path / "a.spz"
    with gzip.open(path, "wb", 6) as file:
        file.write(struct.pack("<IIIBBBB", 0x5053474E, 3, count, 0, 12, 0, 0))
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert "claims to hold" in outcome(path)
    streams = [zstandard.compress(bytes(1000 * w)) for w in (9, 1, 3, 3, 4)]
    sizes = [1000 * w for w in (9, 1, 3, 3, 4)]
    for i, bomb in ((0, zstandard.compress(bytes(1 << 27))), (4, streams[4][:-3])):
        packed = [*streams[:i], bomb, *streams[i + 1 :]]
        table = b"".join(struct.pack("<QQ", len(p), s) for p, s in zip(packed, sizes, strict=True))
        head = struct.pack("<IIIBBBBI12x", 0x5053474E, 4, 1000, 0, 12, 0, 5, 32)
        path.write_bytes(head + table + b"".join(packed))
        assert "stream" in outcome(path)
    path = tmp_path / "a.sog"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("meta.json", "w") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    assert "claims to hold" in outcome(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sog(tmp_path / "a_sog", make_splats(60, degree=1), 16)
    return tmp_path / "a_sog"


def said_after(folder: Path, *keys: object, value: object) -> str:
    """What reading says with one value of meta.json replaced."""
    text = (folder / "meta.json").read_text()
    meta = json.loads(text)
    part = meta
    for key in keys[:-1]:
        part = part[key]  # type: ignore[index]
    part[keys[-1]] = value  # type: ignore[index]
    (folder / "meta.json").write_text(json.dumps(meta))
    said = outcome(folder)
    (folder / "meta.json").write_text(text)
    return said


def test_names_that_lead_elsewhere(folder: Path) -> None:
    shutil.copy(folder / "means_l.webp", folder.parent / "x.webp")
    for name in ("../x.webp", str(folder.parent / "x.webp"), "..\\x.webp", "", ".", "a\0b", "sub/x.webp"):
        said = said_after(folder, "means", "files", 0, value=name)
        assert "does not stay in its folder" in said or "is missing" in said or "directory" in said.lower(), name
    with zipfile.ZipFile(folder.parent / "b.sog", "w") as archive:
        for path in folder.iterdir():
            text = path.read_bytes()
            archive.writestr(path.name, text.replace(b"means_l.webp", b"../x.webp"))
        archive.writestr("../../evil.webp", b"evil")
    assert "../x.webp is missing" in outcome(folder.parent / "b.sog")
    assert not list(folder.parent.parent.glob("evil*"))


def test_pictures_of_the_wrong_size_or_kind(folder: Path) -> None:
    small = Image.new("RGBA", (4, 4))
    for name in ("means_u.webp", "quats.webp", "scales.webp", "sh0.webp", "shN_labels.webp", "shN_centroids.webp"):
        kept = (folder / name).read_bytes()
        small.save(folder / name, lossless=True)
        assert "pixels, expected" in outcome(folder)
        Image.new("RGBA", (8, 8)).save(folder / name, lossless=False)
        assert "no lossless WebP" in outcome(folder)
        small.save(folder / name, "PNG")
        assert "no lossless WebP" in outcome(folder)
        wide = bytearray(kept)
        wide[21:25] = b"\xff\xff\xff\x0f"  # 16384 x 16384
        (folder / name).write_bytes(wide)
        assert "pixels, expected" in outcome(folder)
        (folder / name).unlink()
        assert f"{name} is missing" in outcome(folder)
        (folder / name).write_bytes(kept)
    assert outcome(folder) == ""


def test_values_of_meta_json(folder: Path) -> None:
    for keys, value in (
        (("count",), -1),
        (("count",), 1.5),
        (("count",), True),
        (("count",), "60"),
        (("version",), 3),
        (("means",), []),
        (("means", "mins"), [0, 0]),
        (("means", "maxs"), [1e300, 0, 0]),
        (("means", "maxs"), [90.0, 0, 0]),
        (("means", "files"), [5, 6]),
        (("scales", "codebook"), [0.0] * 255),
        (("scales", "codebook"), [None] * 256),
        (("sh0", "codebook"), "x" * 256),
        (("shN", "count"), 1 << 31),
        (("shN", "count"), 3),
        (("shN", "bands"), 4),
        (("shN", "bands"), 2),
        (("shN", "files"), {}),
    ):
        assert said_after(folder, *keys, value=value), (keys, value)
    (folder / "meta.json").write_text("[" * 100_000)
    assert "meta.json" in outcome(folder)
    (folder / "meta.json").write_bytes(b"\xff\xfe")
    assert "is not JSON" in outcome(folder)


def test_the_command_says_it_in_one_line(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "a.spz").write_bytes(whole["a.spz"][:100])
    line = refused("export.convert_cli", tmp_path / "a.spz", tmp_path / "b.ply")
    assert "a.spz: the file is cut short" in line and not (tmp_path / "b.ply").exists()


def test_the_readers_themselves_name_the_file(tmp_path: Path) -> None:
    for read in (read_spz, read_sog):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere.spz")
