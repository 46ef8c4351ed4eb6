"""Radiance fields in a .pfz: what comes back is what was rounded, it looks like the field, and damage is told."""

from __future__ import annotations

import json
import re
import resource
import shutil
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from prismfield.datasets.base import SceneFrame
from prismfield.export.compression import field_compress
from prismfield.export.compression.cli import CompressConfig, compress
from prismfield.export.compression.compress import Likeness
from prismfield.export.compression.field_compress import FieldCompressor, single_bytes
from prismfield.export.compression.field_finetune import RoundedTable
from prismfield.export.compression.field_importance import grids_of, importance
from prismfield.export.compression.field_pfz import FIXED, FieldAsset, Level, decode_field, depth_of, parts_of
from prismfield.export.compression.field_pfz_write import Tables, encode_field, write_field
from prismfield.export.compression.field_quantise import MOST, Quantiser, asset_of_field, rounded, scale_for
from prismfield.export.formats import read_asset
from prismfield.export.library import load, render
from prismfield.representations.fields import Field
from prismfield.train.metrics import psnr

from .commands import command, refused, trained_once
from .test_fields import FIELDS, SMALL, make_camera, make_field, words_of


@pytest.fixture
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_compress, "PASSES", 8)


def run_of(kind: str, factory: pytest.TempPathFactory) -> Path:
    """A short training, which other tests use too."""
    return trained_once(factory, f"field_{kind}", *words_of(kind))


def any_asset(cells: NDArray[np.bool_], weights: int = 5) -> FieldAsset:
    """With nothing but empty space and networks, to which tables are added; not to be drawn."""
    random = np.random.default_rng(1)
    tensors = {"density_mlp.weights": random.normal(size=weights).astype(np.float16).astype(np.float32)}
    cameras = np.tile(np.arange(18, dtype=np.float32) + 1, (2, 1))
    box = np.array([[-1, -2, -3], [1, 2, 3.5]], np.float32)
    frame = SceneFrame((1.5, -2.0, 1e4), 0.25, (0.0, 0.6, -0.8))
    config = replace(SMALL, nests=1)
    return FieldAsset("hash", config, frame, 0.5, box, False, 0, cells, cameras, True, tensors)


def symbols_of(level: Level, kind: str, seed: int) -> NDArray[np.int16]:
    random, shape = np.random.default_rng(seed), (level.rows, len(level.steps))
    if kind == "zero":
        return np.zeros(shape, np.int16)
    if kind == "wide":
        return random.integers(-127, 128, shape).astype(np.int16)
    smooth = 9 * np.sin(np.arange(level.rows)[:, None] / 7 + np.arange(shape[1]))
    return np.round(smooth * (random.random(shape) < 0.6)).astype(np.int16)


def small_field() -> tuple[bytes, FieldAsset]:
    """A file, and the field in it."""
    field = make_field()
    field.grid.set_occupied(torch.rand(field.grid.density.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    asset = asset_of(field)
    weights = {name: torch.ones_like(grid.table) for name, grid in grids_of(field).items()}
    return encode_field(asset, Quantiser(field, asset, weights).by_bits(6)), asset


def asset_of(field: Field) -> FieldAsset:
    """Of a field that was in no run."""
    from prismfield.export.library import Scene

    return asset_of_field(Scene(Path("field"), field, SceneFrame(), 1.0, None))


@pytest.mark.parametrize("kind", ["smooth", "wide", "zero"])
def test_the_tables_come_back_as_they_were(table: str, kind: str) -> None:
    """Odd sizes, lattices of one to six points a side, hashed levels, two and three axes, one to eight features."""
    if kind != "smooth" and table == "reference":
        pytest.skip("the kernels are enough for these, and faster")
    lattices = [(1, 2), (2, 3), (3, 3), (5, 3), (6, 3), (6, 2), (9, 2), (4, 2)]
    levels = [Level(side**dims, side, dims, (0.5, 2.0)) for side, dims in lattices]
    hashed = [Level(256, 0, 3, (0.25,)), Level(1, 0, 3, tuple(0.1 * np.arange(1, 9))), Level(1000, 0, 3, (0.5, 1.0))]
    levels += [replace(level, steps=tuple(np.float32(level.steps).tolist())) for level in hashed]
    levels.append(Level(10**3, 10, 3, (0.5, 0.5)))
    tables: Tables = {f"table{i}": [(level, symbols_of(level, kind, i))] for i, level in enumerate(levels)}
    tables["both"] = [(levels[3], symbols_of(levels[3], kind, 90)), (levels[4], symbols_of(levels[4], kind, 91))]
    cells = np.random.default_rng(0).random((2, 16, 16, 16)) < 0.03
    cells[1] = False
    asset = any_asset(cells)
    data = encode_field(asset, tables)
    back = decode_field(data)
    assert np.array_equal(back.occupied, cells) and np.array_equal(back.cameras, asset.cameras)
    assert (back.frame, back.background, back.config) == (asset.frame, asset.background, asset.config)
    for name, coded in tables.items():
        wanted = np.concatenate([symbols * np.float32(level.steps) for level, symbols in coded])
        np.testing.assert_array_equal(back.tensors[name], wanted)
    np.testing.assert_array_equal(back.tensors["density_mlp.weights"], asset.tensors["density_mlp.weights"])
    assert kind != "zero" or len(data) < 2_000  # nothing but the octree


@pytest.mark.parametrize(("side", "dims"), [(1, 2), (2, 2), (5, 2), (6, 3), (7, 3)])
def test_the_parts_of_a_lattice_are_its_rows_and_know_their_neighbours(side: int, dims: int) -> None:
    level = Level(side**dims, side, dims, (1.0,))
    coarse = Level(3**dims, 3, dims, (1.0,))
    parts = parts_of(level, (coarse, np.arange(coarse.rows)))
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(level.rows))
    coded: set[int] = set()
    for axis, part in zip([None, *range(1, dims)], parts, strict=True):
        if part.neighbours is not None and part.count:
            for rows in part.neighbours:
                assert set(rows.tolist()) <= coded
                steps = np.abs(rows - part.rows)
                assert (steps == side ** (axis or 0)).all()
        coded |= set(part.rows.tolist())
    nearest = {6: [0, 0, 1, 1, 2, 2], 7: [0, 0, 1, 1, 1, 2, 2]}.get(side)  # of the 3 points of the level above
    if nearest is not None:
        assert parts[0].above is not None
        places = np.array(nearest)[np.stack(np.unravel_index(parts[0].rows, (side,) * 3), 1)]
        np.testing.assert_array_equal(parts[0].above, places @ [9, 3, 1])


@pytest.mark.parametrize("cells", [16, 48])
def test_cells_are_an_octree(cells: int) -> None:
    assert 2 ** (depth_of(cells) - 1) < cells <= 2 ** depth_of(cells)
    for occupied in (
        np.zeros((1, cells, cells, cells), np.bool_),
        np.ones((1 + (cells < 20), cells, cells, cells), np.bool_),
    ):
        occupied[0, 3, 5, cells - 1] ^= True
        data = encode_field(any_asset(occupied), {})
        assert np.array_equal(decode_field(data).occupied, occupied) and len(data) < 1200


def test_rounding() -> None:
    random = np.random.default_rng(0)
    values = random.laplace(size=(5000, 2)).astype(np.float32)
    values[0] = 40  # one that is far out must not spoil the others
    weights = np.ones_like(values)
    for most in (7, 31, 127):
        steps = scale_for(values, weights, most)
        errors = [
            np.square(np.clip(np.round(values / s), -most, most) * s - values).sum(0)
            for s in (steps, np.abs(values).max(0) / most, 1.25 * steps, 0.8 * steps)
        ]
        assert all((errors[0] <= 1.001 * other).all() for other in errors[1:])
    steps = np.float32([0.3, 0.2])
    nearest = rounded(values, steps, weights, MOST, 0.0)
    np.testing.assert_array_equal(nearest, np.clip(np.round(values / steps), -127, 127))
    weights[2500:] = 1e-9
    cheap = rounded(values, steps, weights, MOST, 0.05)
    assert (cheap[2500:] == 0).all() and (np.abs(cheap - nearest)[:2500] <= np.maximum(np.abs(nearest[:2500]), 1)).all()
    assert (cheap[:2500] == nearest[:2500]).mean() > 0.8
    assert (np.abs(cheap) <= np.abs(nearest)).all()


def test_what_matters_is_what_pictures_change_with() -> None:
    """Against the pictures themselves: each of a few numbers moved a little."""
    field, camera = make_field(), make_camera(2.0)
    before = {name: value.clone() for name, value in field.state_dict().items()}
    found = importance(field, [camera], 24)["encoding.table"]
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in field.parameters())
    table, behind = field.encoding.table, torch.full((1, 3), 0.5)
    order = found[: int(field.encoding.starts[2]), 0].argsort()
    rows = torch.cat([order[:4], order[-12:]])
    measured = []
    with torch.no_grad():
        plain = field.render(camera, background=behind).rgb
        for row in rows.tolist():
            table[row, 0] += 0.02
            moved = field.render(camera, background=behind).rgb
            table[row, 0] -= 0.02
            measured.append(float((moved - plain).square().mean()) / 0.02**2)
    wanted, estimated = torch.tensor(measured), found[rows, 0]
    assert wanted[:4].max() < 0.02 * wanted[4:].min()
    assert abs(float((estimated[4:] / wanted[4:]).log().median())) < 0.7


@pytest.mark.parametrize("kind", FIELDS)
def test_a_run_goes_through_the_command(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, few_passes: None
) -> None:
    """The file alone is enough to draw it; fewer bits are smaller and less like it."""
    run, path = run_of(kind, tmp_path_factory), tmp_path / "new" / "field.pfz"
    scene = load(run)
    cameras = scene.cameras("test")[:2]
    with torch.no_grad():
        wanted = torch.cat([render(scene, camera).rgb.clamp(0, 1) for camera in cameras])
    assert isinstance(scene.representation, Field)
    sizes, likenesses = [], []
    for bits in (8, 4):
        numbers = compress(CompressConfig(run, path, bits=bits))  # type: ignore[arg-type]
        assert [p.name for p in path.parent.iterdir()] == ["field.pfz"]
        again = load(path)
        with torch.no_grad():
            drawn = torch.cat([render(again, camera).rgb.clamp(0, 1) for camera in cameras])
        sizes.append(path.stat().st_size)
        likenesses.append(psnr(drawn, wanted))
        assert numbers["bytes"] == sizes[-1] and numbers["representation"] == kind
        assert abs(numbers["photographs_after"]["psnr"] - numbers["photographs_before"]["psnr"]) < 1
    assert single_bytes(asset_of_field(scene)) / sizes[0] > 4 and sizes[1] < 0.8 * sizes[0]
    assert likenesses[0] > 40 and likenesses[0] > likenesses[1] > 27
    assert (again.run, again.background) == (None, scene.background) and again.frame == scene.frame
    there = [camera.viewmats for camera in scene.cameras("train")]
    assert len(again.cameras("train")) == min(len(there), 32) and again.looks_inwards == scene.looks_inwards
    torch.testing.assert_close(again.cameras("train")[0].viewmats, there[0], atol=1e-4, rtol=1e-4)


def test_what_a_user_does_with_it(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, few_passes: None) -> None:
    """Without the run's folder: filmed, made smaller again, and refused where only splats will do."""
    run, path = tmp_path / "run", tmp_path / "field.pfz"
    shutil.copytree(run_of("voxel", tmp_path_factory), run)
    done = command("export.compression.cli", run, "--to", path, "--json", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run)
    size, numbers = path.stat().st_size, json.loads((tmp_path / "a.json").read_text())
    assert numbers["bytes"] == size and f"{size:,} bytes" in done.stdout
    assert numbers["ratio"] == pytest.approx(4 * numbers["numbers"] / size)
    assert re.search(r"times smaller than the numbers in single precision, [\d,]+ bytes", done.stdout)
    assert re.search(r"to photos .*\([-+][\d.]+ dB", done.stdout)
    done = command("train.video_cli", path, "--out", tmp_path / "a.mp4", "--seconds", 0.1, "--fps", 10, "--width", 32)
    assert done.returncode == 0 and (tmp_path / "a.mp4").stat().st_size > 500, done.stderr
    assert compress(CompressConfig(path, tmp_path / "b.pfz", steps=4.0))["bytes"] < size
    line = refused("export.cli", path, "--to", tmp_path / "a.ply")
    assert line.startswith(f"error: {path}: ") and "field" in line.removeprefix(f"error: {path}")
    with pytest.raises(ValueError, match=r"field\.pfz: it holds a radiance field"):
        read_asset(path)


def test_a_search(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, few_passes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = run_of("voxel", tmp_path_factory), tmp_path / "a.pfz"
    small = compress(CompressConfig(run, path, target_psnr=33.0))
    assert 33 <= small["psnr"] < 34.5
    likeness = Likeness(load(run))
    assert likeness.compare(decode_field(path.read_bytes()))[0] == pytest.approx(small["psnr"], abs=1e-6)
    limit = 1.3 * small["bytes"] / 1e6
    large = compress(CompressConfig(run, path, target_mb=limit))
    assert 0.7 * limit * 1e6 < large["bytes"] <= limit * 1e6 and large["psnr"] > small["psnr"] + 0.5
    monkeypatch.setattr(FieldCompressor, "sweep", lambda self: iter([self.result(factor) for factor in (0.7, 2.0)]))
    picked = compress(CompressConfig(run, path, sweep=tmp_path / "a.png", drop=False))
    assert picked["bytes"] > 0 and (tmp_path / "a.png").stat().st_size > 2000


def test_options_that_make_no_sense(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run, to = run_of("hash", tmp_path_factory), tmp_path / "a.pfz"
    for options, message in (
        ({"prune": 0.5}, "is a field, not Gaussians"),
        ({"sh_degree": 1}, "is a field, not Gaussians"),
        ({"bits": 4, "target_mb": 1.0}, "--bits: expected no target beside it"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(CompressConfig(run, to, **options))  # type: ignore[arg-type]
    assert not to.exists()
    data, _ = small_field()
    to.write_bytes(data[:100])
    line = refused("train.video_cli", to, "--out", tmp_path / "a.mp4")
    assert line.startswith(f"error: {to}: it claims") and not (tmp_path / "a.mp4").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = small_field()
    path = tmp_path / "a.pfz"
    path.write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_field(path, data)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    write_field(path, data)
    assert path.read_bytes() == data


def test_damage_is_told() -> None:
    data, _ = small_field()
    random = np.random.default_rng(0)
    decode_field(data).field()
    for part in range(64):
        with pytest.raises(ValueError, match=r"cut short|does not begin"):
            decode_field(data[: len(data) * part // 64])
    began = time.process_time()
    for i in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 4)):
            damaged[place] ^= random.integers(1, 256)
        with pytest.raises(ValueError) if damaged[8:] != data[8:] else suppress(ValueError):
            decode_field(bytes(damaged))
        head, text, stream = parts_in(data)
        part = bytearray((head, text, stream)[i % 3])  # past the checksum
        part[int(random.integers(len(part)))] = int(random.integers(256))
        parts: list[bytes] = [head, text, stream]
        parts[i % 3] = bytes(part)
        with suppress(ValueError):
            decode_field(joined(*parts)).field()
    assert time.process_time() - began < 30


def test_headers_that_promise_too_much() -> None:
    data, _ = small_field()
    head, text, stream = parts_in(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refuse(change: Any, message: str) -> None:
        content = json.loads(head)
        change(content)
        with pytest.raises(ValueError, match=message):
            decode_field(joined(json.dumps(content).encode(), text, stream)).field()

    levels = lambda c: c["tables"]["encoding.table"]  # noqa: E731
    refuse(lambda c: levels(c)[-1].__setitem__(slice(0, 2), [2**31 - 1, 0]), "claims to hold")
    refuse(lambda c: levels(c)[-1].__setitem__(0, 2**31), "expected a whole number")
    refuse(lambda c: levels(c)[0].__setitem__(1, 1000), "a level in it cannot be")
    refuse(lambda c: levels(c)[0].__setitem__(3, -1.0), "a level in it cannot be")
    refuse(lambda c: c.update(cells=1 << 20), "claims to hold")
    refuse(lambda c: c.update(cameras=1 << 20), "cannot be that of a field")
    refuse(lambda c: c["config"].update(log2_rows=26, levels=64, finest=100000), "its options ask for")
    refuse(lambda c: c["config"].update(finest=10**9), "finest: expected")
    refuse(lambda c: c["config"].update(occupancy=1024), "its options ask for|occupancy")
    refuse(lambda c: c["config"].update(steps=0), "steps: expected")
    refuse(lambda c: c["config"].update(width=64), "expected")
    refuse(lambda c: c["config"].update(unknown=1), "unknown option")
    refuse(lambda c: c.update(representation="gaussians"), "there is no field 'gaussians'")
    refuse(lambda c: c.update(representation=["hash"]), "there is no field")
    refuse(lambda c: c.update(lanes=0), "cannot be that of a field")
    refuse(lambda c: c.update(scale=float("inf")), "expected 2 numbers|not JSON")
    refuse(lambda c: c.pop("frame", c.pop("center")), "cannot be that of a field")
    fixed = list(FIXED.unpack_from(data))
    bomb = zlib.compress(bytes(1 << 27))
    fixed[3:5] = len(bomb), 1 << 18
    body = bomb + data[FIXED.size + FIXED.unpack_from(data)[3] :]
    fixed[-1] = zlib.crc32(body)
    with pytest.raises(ValueError, match="another length"):
        decode_field(FIXED.pack(*fixed) + body)
    for place in range(8, 28, 4):
        with pytest.raises(ValueError):
            decode_field(data[:place] + struct.pack("<I", 1 << 31) + data[place + 4 :])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def parts_in(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header and tables unpacked, and the stream."""
    _, _, _, head, _, packed, _, _, _ = FIXED.unpack_from(data)
    at = FIXED.size
    return (
        zlib.decompress(data[at : at + head]),
        zlib.decompress(data[at + head : at + head + packed]),
        data[at + head + packed :],
    )


def joined(head: bytes, text: bytes, stream: bytes) -> bytes:
    """A file of these, with sizes and checksum that fit."""
    packed = zlib.compress(head), zlib.compress(text)
    body = packed[0] + packed[1] + stream
    sizes = len(packed[0]), len(head), len(packed[1]), len(text), len(stream)
    return FIXED.pack(b"PFZF", 1, 0, *sizes, zlib.crc32(body)) + body


def test_rounded_tables_learn_straight_through() -> None:
    """Symbols move where the gradient points, steps grow where the clipped ones want to be larger, and both are what is stored."""
    field = make_field()
    grid = field.encoding
    levels, features = len(grid.sides), grid.table.shape[1]
    first = torch.full((levels, features), 0.1)
    places = 2.5 * torch.randn(grid.table.shape, generator=torch.Generator().manual_seed(0))
    table = RoundedTable(grid, nn.Parameter(places.clone()), nn.Parameter(torch.zeros(levels, features)), first, 3)
    table.show()
    torch.testing.assert_close(grid.table.detach(), 0.1 * places.round().clamp(-3, 3))
    grid.table.grad = torch.ones_like(grid.table)
    table.pull()
    inside = places.abs() <= 3
    torch.testing.assert_close(table.places.grad, 0.1 * inside)
    symbols = places.round().clamp(-3, 3)
    each = 0.1 * torch.where(inside, symbols - places, symbols)
    starts = grid.starts.tolist()
    wanted = torch.stack([each[a:b].sum(0) for a, b in zip(starts, starts[1:], strict=False)])
    torch.testing.assert_close(table.logs.grad, wanted, atol=1e-4, rtol=1e-4)
    assert inside.any() and not inside.all()
    with torch.no_grad():
        table.logs += 0.3
    table.show()
    for level, (steps, found) in enumerate(table.rounded()):
        rows = slice(*grid.starts.tolist()[level : level + 2])
        torch.testing.assert_close(found * torch.tensor(steps), grid.table[rows].detach())


def test_training_what_the_file_holds_wins_back_what_rounding_lost(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, few_passes: None
) -> None:
    run, path = run_of("voxel", tmp_path_factory), tmp_path / "a.pfz"
    numbers = compress(CompressConfig(run, path, bits=4, finetune_steps=40))
    loss = [
        numbers["photographs_before"]["psnr"] - each["psnr"]
        for each in (numbers["untrained"]["photographs_after"], numbers["photographs_after"])
    ]
    assert loss[1] < 0.5 * max(loss[0], 0)
    assert numbers["bytes"] == path.stat().st_size < 1.3 * numbers["untrained"]["bytes"]
    again = Likeness(load(run)).compare(decode_field(path.read_bytes()))
    assert again[0] == pytest.approx(numbers["psnr"], abs=1e-6)
    with pytest.raises(ValueError, match="has no photographs"):
        compress(CompressConfig(path, tmp_path / "b.pfz", finetune_steps=3))
