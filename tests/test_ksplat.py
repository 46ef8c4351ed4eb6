"""The .ksplat, byte by byte as its sections describe themselves."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from prismfield.export.formats import read_asset
from prismfield.export.ksplat import read_ksplat
from prismfield.export.ply import read_ply
from prismfield.render.ops.sh import C0

from .other_programs import splat_transform
from .splat_assets import assert_same_look, make_splats, rms

TERMS = (0, 3, 8, 15)


def ksplat(
    level: int, degrees: tuple[int, ...], seed: int = 0
) -> tuple[bytes, list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """A file with a section for each of `degrees`, and its positions, scales and harmonics."""
    rng, heads, bodies = np.random.default_rng(seed), b"", b""
    means, scales, harmonics = [], [], []
    for degree in degrees:
        sizes = [4, 4, 3, 2]  # two full buckets, two that are not
        count, capacity, block, steps = sum(sizes), 4, 2.0, 32767
        centers = rng.uniform(-9, 9, (4, 3)).astype("<f4")
        words = rng.integers(0, 65536, (count, 3))
        place = (words - steps) * (block / 2 / steps) + np.repeat(centers, sizes, 0)
        scale, quat = rng.uniform(0.01, 0.3, (count, 3)), rng.normal(size=(count, 4))
        sh = rng.uniform(-1, 1, (count, TERMS[degree], 3))
        bands = [
            sh[:, d * d - 1 : (d + 1) ** 2 - 1].transpose(0, 2, 1).reshape(count, -1) for d in range(1, degree + 1)
        ]
        flat = np.concatenate([np.zeros((count, 0)), *bands], 1)
        other, number = ("<f4", "<f4") if level == 0 else ("<f2", "<u2")
        last = [flat.astype("<f4"), flat.astype("<f2"), np.rint((flat + 1.5) / 3 * 255).astype("u1")][level]
        rgba = np.tile(np.array([0, 128, 255, 51], "u1"), (count, 1))
        columns = [(place if level == 0 else words).astype(number), scale.astype(other), quat.astype(other), rgba, last]
        rows = b"".join(b"".join(part[i].tobytes() for part in columns) for i in range(count))
        spare = b"\0" * (len(rows) // count)  # room for one more
        head = struct.pack("<4IfH", count, count + 1, capacity, 4, block, 12) + b"\0\0" + struct.pack("<2I", steps, 0)
        head += struct.pack("<2IH", 2, 2, degree)
        heads += head + b"\0" * (1024 - len(head))
        bodies += struct.pack("<2I", *sizes[2:]) + centers.tobytes() + rows + spare
        means.append(place)
        scales.append(scale)
        harmonics.append(sh)
    start = bytearray(4096)
    start[1] = 1
    total = sum(len(part) for part in means)
    struct.pack_into("<4IH", start, 4, len(degrees), len(degrees), total, total, level)
    return bytes(start) + heads + bodies, means, scales, harmonics


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_and_degree(tmp_path: Path, level: int) -> None:
    data, means, scales, harmonics = ksplat(level, (0, 3, 1, 2))
    (tmp_path / "a.ksplat").write_bytes(data)
    asset = read_asset(tmp_path / "a.ksplat")
    assert asset.sh_degree == 3 and len(asset) == 52
    np.testing.assert_allclose(asset.means, np.concatenate(means), atol=1e-5)
    np.testing.assert_allclose(asset.scales, np.concatenate(scales), rtol=2e-3)  # type: ignore[union-attr]
    np.testing.assert_allclose(asset.opacities, 0.2, atol=1e-6)
    np.testing.assert_allclose(asset.sh[:, 0], np.tile([-0.5 / C0, 0.5 / 255 / C0, 0.5 / C0], (52, 1)), atol=1e-5)
    for i, sh in enumerate(harmonics):
        found = asset.sh[13 * i : 13 * (i + 1), 1:]
        np.testing.assert_allclose(found[:, : sh.shape[1]], sh, atol=[1e-6, 1e-3, 0.6 * 3 / 255][level])
        assert (found[:, sh.shape[1] :] == 0).all()
    assert rms(asset.sh[13:26, 9:]) > 0.4


def test_splat_transform_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.ksplat").write_bytes(ksplat(2, (2,))[0])
    splat_transform(tmp_path / "a.ksplat", tmp_path / "b.ply")
    assert_same_look(read_ksplat(tmp_path / "a.ksplat"), read_ply(tmp_path / "b.ply"))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = bytearray(ksplat(1, (1,))[0])
    cases = [(1, b"\0", "version 0.1 or later"), (20, b"\3", "of compression 3"), (16, b"\x0e", "have 13 splats")]
    cases += [
        (4, b"\xff\xff\xff\xff", "cut short"),
        (4096 + 4, b"\xff\xff\xff\xff", "cut short"),
        (4096 + 40, b"\4", "degree 4"),
    ]
    cases += [(4096 + 12, b"\3", "do not add up"), (4096 + 8, b"\1", "buckets hold")]
    for place, bytes_, message in cases:
        data = whole.copy()
        data[place : place + len(bytes_)] = bytes_
        (tmp_path / "a.ksplat").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_ksplat(tmp_path / "a.ksplat")


def test_it_is_not_written(tmp_path: Path) -> None:
    from prismfield.export.convert import format_for
    from prismfield.export.formats import WriteOptions

    with pytest.raises(ValueError, match="unknown suffix"):
        format_for(tmp_path / "a.ksplat", make_splats(5), WriteOptions())
