"""The .pfz container: what comes back is within its steps, prefixes are scenes, damage is told; the coder is lossless."""

from __future__ import annotations

import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from prismfield.export.assets import SplatAsset
from prismfield.export.compression.pfz import CHUNK, FIXED, MAX_CHUNK, decode_pfz, read_pfz, read_tables
from prismfield.export.compression.pfz_coder import Encoder, plane_of
from prismfield.export.compression.pfz_grid import PfzSteps, canonical, importance_of
from prismfield.export.compression.pfz_models import Decoder
from prismfield.export.compression.pfz_write import chunks_of, encode_pfz, ranks_of, write_pfz
from prismfield.export.ply import read_ply
from prismfield.render import kernels as kernels_module

FINE = replace(PfzSteps(), chunk_factor=1.0, dead=0.0, turn=0.2)


def splats(count: int, degree: int = 3, seed: int = 0) -> SplatAsset:
    """On a wavy sheet, flat ones and needles, some opaque, with harmonics that vary along few directions."""
    random = np.random.default_rng(seed)
    normal = random.normal
    u, v = random.uniform(-1, 1, (2, count))
    means = np.stack([u, v, 0.3 * np.sin(4 * u)], 1) * 3 + np.array([10, -4, 2])
    terms = (degree + 1) ** 2
    sh = np.zeros((count, terms, 3))
    sh[:, 0] = np.stack([np.sin(3 * u), np.cos(2 * v), u * v], 1) + 0.05 * normal(size=(count, 3))
    mix = normal(size=(3, 3 * (terms - 1)))
    sh[:, 1:] = ((normal(size=(count, 3)) * 0.1) @ mix).reshape(count, terms - 1, 3)
    return SplatAsset.from_stored(
        means,
        normal(size=(count, 4)),
        normal(size=(count, 3)) - 4,
        normal(size=count) * 2,
        sh,
        up=(0.0, 0.6, -0.8),
        antialiased=True,
    )


def covariances(asset: SplatAsset) -> NDArray[np.float64]:
    """[N, 3, 3], independent of how an ellipsoid is written."""
    w, x, y, z = asset.quats.astype(np.float64).T
    axes = np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], -1),
            np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], -1),
            np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        1,
    )
    return np.einsum("nik,nij,ni->nkj", axes, axes, asset.scales.astype(np.float64) ** 2)


def matched(asset: SplatAsset, back: SplatAsset) -> NDArray[np.int64]:
    """For each of `back`, which of `asset` it was: the nearest."""
    from scipy.spatial import cKDTree

    return cKDTree(asset.means).query(back.means)[1]


@pytest.mark.parametrize(("count", "lanes"), [(1, 1), (5, 4), (3, 8), (64, 64), (1000, 16), (20000, 64)])
def test_the_coder_is_lossless(table: str, count: int, lanes: int) -> None:
    random = np.random.default_rng(count)
    drifting = np.round(random.normal(0, 6, count) + 10 * np.sin(np.arange(count) / 500)).astype(np.int64)
    given = random.integers(0, 3, count)
    wide = random.integers(-100, 156, count)
    sparse, same = random.integers(0, 2, count) * given, np.full(count, 7)
    models = [plane_of(drifting, 8), plane_of(sparse), plane_of(same, 4), plane_of(wide)]
    encoder = Encoder(lanes)
    encoder.plane(models[0], drifting, given, 3)
    encoder.plane(models[1], sparse, given, 3)
    encoder.plane(models[2], same)
    encoder.plane(models[3], wide)
    data = encoder.finish()
    decoder = Decoder(data, lanes)
    np.testing.assert_array_equal(decoder.plane(models[0], count, given, 3) + models[0].low, drifting)
    np.testing.assert_array_equal(decoder.plane(models[1], count, given, 3) + models[1].low, sparse)
    np.testing.assert_array_equal(decoder.plane(models[2], count) + models[2].low, same)
    np.testing.assert_array_equal(decoder.plane(models[3], count) + models[3].low, wide)
    decoder.finish()
    if count == 20000:  # what the numbers hold: a normal distribution, a coin where it is not certain, a byte
        least = np.log2(6 * np.sqrt(2 * np.pi * np.e)) + (2 / 3) + 8
        assert least - 0.05 < len(data) * 8 / count < least + 0.6
    with pytest.raises(ValueError, match="chunk"):
        cut = Decoder(data[: len(data) // 4 * 2], lanes)
        for model in models:
            cut.plane(model, count, given if model is not models[2] else None, 3)
        cut.finish()


def test_canonical_ellipsoids_are_the_same_ellipsoids() -> None:
    asset = splats(500)
    quats, scales = canonical(asset.quats.astype(np.float64), asset.scales.astype(np.float64))
    again = replace(asset, quats=quats.astype(np.float32), scales=scales.astype(np.float32))
    np.testing.assert_allclose(covariances(again), covariances(asset), atol=1e-6 * covariances(asset).max())
    assert (np.diff(scales, axis=1) <= 0).all()
    assert (quats[:, 0] >= np.abs(quats).max(1) - 1e-12).all()


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_what_comes_back_is_within_the_steps(table: str, degree: int) -> None:
    asset, steps = splats(600, degree), FINE.times(0.25)
    back = decode_pfz(encode_pfz(asset, steps))
    assert (len(back), back.sh_degree, back.antialiased) == (600, degree, True)
    assert back.up == pytest.approx(asset.up)
    of = matched(asset, back)
    assert len(set(of.tolist())) == 600
    ours, theirs = (np.sort(scales, 1)[:, ::-1] for scales in (back.scales, asset.scales[of]))
    sizes = np.sqrt(theirs[:, 0] * theirs[:, 1])
    assert (np.abs(back.means - asset.means[of]).max(1) < 0.6 * steps.position * sizes).all()
    kept = theirs > 1.1 * theirs[:, :1] / steps.flattest
    assert np.abs(np.log(ours / theirs))[kept].max() < 0.51 * steps.scale
    assert np.abs(back.opacities - asset.opacities[of]).max() < 1.01 * max(steps.opacity, 1 / 255)
    assert np.abs(back.sh[:, 0] - asset.sh[of, 0]).max() < steps.color
    assert np.abs(back.sh[:, 1:] - asset.sh[of, 1:]).max(initial=0) < 4 * steps.sh
    errors = np.abs(covariances(back) - covariances(asset)[of]).max((1, 2)) / np.abs(covariances(asset)[of]).max((1, 2))
    assert np.median(errors) < 0.05 and errors.max() < 0.25


def test_with_and_without_kernels_the_same_bits(table: str) -> None:
    data = encode_pfz(splats(700), PfzSteps())
    assert zlib.crc32(data) == zlib.crc32(encode_pfz(splats(700), PfzSteps()))
    found = decode_pfz(data)
    module, kernels_module.kernels = kernels_module.kernels, None
    try:
        wanted = decode_pfz(data)
    finally:
        kernels_module.kernels = module
    assert max(wanted.differences(found).values()) == 0


def test_any_prefix_is_a_coarser_scene() -> None:
    asset = splats(40000, 1)
    importance = importance_of(asset)
    data = encode_pfz(asset, PfzSteps(), importance)
    chunks = chunks_of(asset.means, ranks_of(importance))
    assert np.array_equal(np.sort(np.concatenate([rows for _, rows in chunks])), np.arange(40000))
    assert [rank for rank, _ in chunks] == [0, 1, 2, 3, 4]
    at, found = read_tables(data)[1], 0
    for _, rows in chunks[:-1]:
        at += CHUNK.size + CHUNK.unpack_from(data, at)[0]
        found += len(rows)
        for cut in (at, at + 5, at + CHUNK.size + 100):
            coarse = decode_pfz(data[:cut], partial=True)
            assert len(coarse) == found
        with pytest.raises(ValueError, match=f"cut short: .* of {len(chunks)} chunks"):
            decode_pfz(data[:at])
        if found < 10000:  # the large and opaque ones come first
            assert np.median(importance_of(coarse)) > np.quantile(importance, 0.8)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_few_splats(count: int) -> None:
    asset = splats(count)
    assert len(decode_pfz(encode_pfz(asset, PfzSteps()))) == count


def test_splats_in_the_same_place_and_of_no_size() -> None:
    asset = splats(700)
    same = replace(asset, means=np.full_like(asset.means, 2.5), scales=np.zeros_like(asset.scales))
    back = decode_pfz(encode_pfz(same, PfzSteps()))
    assert len(back) == 700 and np.abs(back.means - 2.5).max() < 1e-5
    assert back.scales.max() < 1e-6


def test_large_classes_are_cut_in_space() -> None:
    asset = splats(8, 0)
    many = SplatAsset(
        *(np.repeat(getattr(asset, n), 2**15, 0) for n in ("means", "quats", "scales", "opacities", "sh"))
    )
    many.means[:] += np.random.default_rng(0).normal(size=many.means.shape)
    chunks = chunks_of(many.means, ranks_of(np.random.default_rng(0).random(len(many))))
    assert max(len(rows) for _, rows in chunks) <= MAX_CHUNK
    last = [many.means[rows] for rank, rows in chunks if rank == chunks[-1][0]]
    assert len(last) >= 2 and all(np.ptp(part, 0).min() < np.ptp(many.means, 0).min() for part in last)


def test_the_file_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pfz"
    write_pfz(path, splats(50))
    assert [p.name for p in path.parent.iterdir()] == ["a.pfz"]
    assert len(read_pfz(path)) == 50
    with pytest.raises(ValueError, match="nothing to write"):
        write_pfz(path, splats(0))
    assert len(read_pfz(path)) == 50
    with pytest.raises(FileNotFoundError):
        read_pfz(tmp_path / "b.pfz")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.pfz: not a \.pfz"):
        read_pfz(path)


def test_damage_is_told() -> None:
    data = encode_pfz(splats(300, 2), PfzSteps())
    random = np.random.default_rng(0)
    for part in range(64):
        with pytest.raises(ValueError):
            decode_pfz(data[: len(data) * part // 64])
    for _ in range(200):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            damaged[place] ^= random.integers(1, 256)
        _decode_or_refuse(bytes(damaged))
    start = read_tables(data)[1]
    for _ in range(200):  # past the checksums
        damaged = bytearray(data)
        damaged[start + CHUNK.size + int(random.integers(CHUNK.unpack_from(data, start)[0]))] ^= int(
            random.integers(1, 256)
        )
        _decode_or_refuse(_with_checksum(damaged, start))
        tables = bytearray(zlib.decompress(data[FIXED.size : start]))
        tables[int(random.integers(len(tables)))] = int(random.integers(256))
        packed = zlib.compress(bytes(tables))
        fixed = list(FIXED.unpack_from(data))
        fixed[-2] = len(packed)
        _decode_or_refuse(FIXED.pack(*fixed) + packed + data[start:])


def test_headers_that_promise_too_much() -> None:
    data = encode_pfz(splats(300), PfzSteps())
    fixed = list(FIXED.unpack_from(data))
    for field, value in ((3, 2**31), (4, 2**31), (5, 9), (6, 200), (8, 2**31), (9, 2**31), (1, 7)):
        changed = [*fixed]
        changed[field] = value
        with pytest.raises(ValueError):
            decode_pfz(FIXED.pack(*changed) + data[FIXED.size :])
    bomb = zlib.compress(bytes(1 << 26))
    fixed[-2] = len(bomb)
    with pytest.raises(ValueError, match="another length"):
        decode_pfz(FIXED.pack(*fixed) + bomb)


def _with_checksum(data: bytearray, start: int) -> bytes:
    size, _, *rest = CHUNK.unpack_from(data, start)
    body = bytes(data[start + CHUNK.size : start + CHUNK.size + size])
    return bytes(data[:start]) + CHUNK.pack(size, zlib.crc32(body), *rest) + bytes(data[start + CHUNK.size :])


def _decode_or_refuse(data: bytes) -> None:
    with suppress(ValueError):
        decode_pfz(data)


def test_a_real_asset(shared_data: Path) -> None:
    asset = read_ply(shared_data / "splats" / "flowers_lod3_inria.ply")
    data = encode_pfz(asset, PfzSteps())
    assert len(asset) * 248 / len(data) > 15
    back = decode_pfz(data)
    assert len(back) == len(asset)
    assert (
        abs(
            np.average(back.sh[:, 0], 0, importance_of(back)) - np.average(asset.sh[:, 0], 0, importance_of(asset))
        ).max()
        < 0.02
    )
