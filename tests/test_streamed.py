"""Streamed SOG: what is written comes back level by level, the tree says where it is, and lies are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismfield.export import convert
from prismfield.export.assets import SplatAsset
from prismfield.export.cli import OutputOptions, write
from prismfield.export.convert import Source, write_checked
from prismfield.export.formats import WriteOptions, read_asset
from prismfield.export.library import scene_of
from prismfield.export.lods.likeness import relative_errors
from prismfield.export.lods.merge import build_levels
from prismfield.export.lods.streamed import default_levels, write_streamed
from prismfield.export.lods.streamed_read import read_manifest, read_streamed
from prismfield.export.ply import read_ply, write_ply
from prismfield.export.sog import read_sog, write_sog

from .commands import command, refused
from .other_programs import splat_transform
from .splat_assets import assert_same_look, make_splats, matched, without_up

COUNTS = [3000, 750, 188]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SplatAsset, Path]:
    """Three levels in leaves of 512 and what they were made from. Not to be changed."""
    asset, folder = make_splats(3000, degree=1), tmp_path_factory.mktemp("streamed") / "a_lod"
    said = write_streamed(folder, asset, 3, 512)
    assert said == "3,000 Gaussians of degree 1, coarser levels of 750, 188, in 8 boxes and 11 chunks"
    return asset, folder


def meta_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lod-meta.json").read_text())
    return found


def leaves(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "children" not in node:
        yield node
    for child in node.get("children", []):
        for side, sign in (("min", 1), ("max", -1)):
            assert all(sign * (a - b) >= 0 for a, b in zip(child["bound"][side], node["bound"][side], strict=True))
        yield from leaves(child)


def test_each_level_comes_back(made: tuple[SplatAsset, Path]) -> None:
    asset, folder = made
    for k, level in enumerate(build_levels(asset, 3)):
        again = read_streamed(folder, k)
        assert len(again) == COUNTS[k] and again.sh_degree == 1
        found = matched(level.asset, again)
        assert np.abs(found.means - level.asset.means).max() < 2e-3
        assert np.abs(found.opacities - level.asset.opacities).max() < 0.003
        assert np.median(np.abs(found.log_scales - level.asset.log_scales)) < 0.02
        assert np.abs(found.sh[:, 0] - level.asset.sh[:, 0]).mean() < 0.003
    with pytest.raises(ValueError, match="a_lod: there is no level 3, only 0 to 2"):
        read_streamed(folder, 3)


def test_the_tree_says_where_everything_is(made: tuple[SplatAsset, Path]) -> None:
    _, folder = made
    meta = meta_of(folder)
    assert meta["version"] == 1 and meta["counts"] == COUNTS and meta["lodLevels"] == 3 and meta["count"] == sum(COUNTS)
    chunks = {name: read_sog(folder / name) for name in meta["filenames"]}
    assert all(len(chunk) <= 512 for chunk in chunks.values())
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(name.split("/")[0] for name in chunks), "lod-meta.json"]
    )
    ends = dict.fromkeys(chunks, 0)
    for leaf in leaves(meta["tree"]):
        assert leaf["lods"]["0"]["count"] <= 512
        low, high = (np.array(leaf["bound"][side]) for side in ("min", "max"))
        for run in leaf["lods"].values():
            name = meta["filenames"][run["file"]]
            assert run["offset"] == ends[name], "runs of neighbours follow each other"
            ends[name] += run["count"]
            places = chunks[name].means[run["offset"] : ends[name]]
            assert (places >= low - 2e-3).all() and (places <= high + 2e-3).all()
        errors, distances = leaf["errors"], leaf["distances"]
        assert errors[0] == distances[0] == 0 and 0 < errors[1] <= errors[2] < 1 and 0 < distances[1] < distances[2]
    assert ends == {name: len(chunk) for name, chunk in chunks.items()}


def test_errors_are_shares_of_what_is_shown() -> None:
    asset = make_splats(100, degree=1)
    low, high = asset.means.min(0), asset.means.max(0)
    gone = replace(asset, opacities=np.zeros_like(asset.opacities))
    assert relative_errors([asset, asset, gone, asset], low, high) == pytest.approx([0, 0, 1, 1])
    assert relative_errors([None, asset, None], low, high) == [0, 0, 0]
    assert relative_errors([gone, asset], low, high) == [0, 1]
    dim = replace(asset, opacities=asset.opacities * np.float32(0.9))
    found = relative_errors([asset, dim], low, high)[1]
    far = (
        replace(asset, means=asset.means * 1000, scales=asset.scales * 1000),
        replace(dim, means=dim.means * 1000, scales=dim.scales * 1000),
    )
    assert 0.001 < found < 0.02
    assert relative_errors(far, low * 1000, high * 1000)[1] == pytest.approx(found, rel=1e-2)


def test_how_many_levels() -> None:
    assert [default_levels(n) for n in (1, 10_000, 10_001, 40_000, 40_001, 1_000_000)] == [1, 1, 2, 2, 3, 5]


def test_environment_and_what_older_files_leave_out(made: tuple[SplatAsset, Path], tmp_path: Path) -> None:
    folder = tmp_path / "a_lod"
    shutil.copytree(made[1], folder)
    write_sog(folder / "env", make_splats(40, degree=2, seed=5))
    meta = meta_of(folder) | {"environment": "env/meta.json"}
    del meta["version"], meta["counts"], meta["count"]
    (folder / "lod-meta.json").write_text(json.dumps(meta))
    again = read_asset(folder)
    assert len(again) == 3040 and again.sh_degree == 2 and not again.sh[:3000, 4:].any() and again.sh[3000:, 4:].any()


def test_a_level_on_the_command_line(made: tuple[SplatAsset, Path], tmp_path: Path) -> None:
    done = command("export.convert_cli", made[1] / "lod-meta.json", tmp_path / "b.ply", "--level", 2)
    assert done.returncode == 0, done.stderr
    assert "b.ply: 188 Gaussians of degree 1" in done.stdout and "read back and rendered: 100 dB" in done.stdout
    assert "there is no level 7, only 0 to 2" in refused(
        "export.convert_cli", made[1], tmp_path / "c.ply", "--level", 7
    )


def test_levels_are_made_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = tmp_path / "a.ply"
    write_ply(scene, make_splats(700))
    write(scene, tmp_path / "b.ply", OutputOptions(level=2), None, 1)
    assert len(read_ply(tmp_path / "b.ply")) == 44
    write(scene, tmp_path / "new" / "lod-meta.json", OutputOptions(levels=2, chunk_splats=300), None, 1)
    assert re.search(r"700 Gaussians .* levels of 175, in 4 boxes and 5 chunks", capsys.readouterr().out)
    assert len(read_asset(tmp_path / "new" / "lod-meta.json")) == 700
    for options, to, message in (
        (OutputOptions(level=9), "c.ply", "a.ply: there is no level 9, level 5 has 1 left"),
        (OutputOptions(level=-1), "c.ply", "--level: expected 0 or more, got -1"),
        (OutputOptions(levels=2), "c.ply", "--levels is of no use for .ply"),
        (OutputOptions(chunk_splats=5), "c_lod", "expected chunks of at least 256 Gaussians, got 5"),
        (OutputOptions(levels=17), "c_lod", "expected 1 to 16 levels, got 17"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            write(scene, tmp_path / to, options, None, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ply", "b.ply", "new"]


def test_a_run_at_a_level(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tiny_run, tmp_path / "a.ply", OutputOptions(level=1), None, 1)
    whole = len(convert.open_source(tiny_run).asset)
    said = capsys.readouterr().out
    assert f"a.ply: {-(-whole // 4):,} Gaussians" in said
    found = re.search(rf"level 1 of {whole:,} Gaussians: ([\d.]+) dB PSNR to all of them at 1/2 of the size", said)
    assert found and 20 < float(found[1]) < 60


def test_another_takes_its_place_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = tmp_path / "a_lod", WriteOptions(levels=2, chunk_splats=256)
    for count in (900, 600):
        asset = make_splats(count, degree=0)
        written = write_checked(Source(tmp_path, asset, scene_of(asset, tmp_path)), folder, options, is_verified=False)
        assert len(read_asset(folder)) == count
    assert written.bytes <= sum(path.stat().st_size for path in folder.rglob("*.*"))
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(convert, "verify", lambda *_: (12.0, 3))
    asset = make_splats(700, degree=0)
    with pytest.raises(OSError, match="does not look like the scene"):
        write_checked(Source(tmp_path, asset, scene_of(asset, tmp_path)), folder, options)
    assert len(read_asset(folder)) == 600 and (folder / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a_lod"]


def test_what_is_refused(made: tuple[SplatAsset, Path], tmp_path: Path) -> None:
    folder = tmp_path / "b_lod"
    shutil.copytree(made[1], folder)
    shutil.copytree(folder / "0_0", tmp_path / "0_0")
    (folder / "link").symlink_to(tmp_path / "0_0")
    text = (folder / "lod-meta.json").read_text()

    def said(*keys: Any, value: Any) -> str:
        meta = json.loads(text)
        part: Any = meta
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        (folder / "lod-meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError) as caught:
            read_asset(folder)
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("../0_0/meta.json", f"{tmp_path}/0_0/meta.json", "..\\0_0", "link/meta.json", "", "c:/x", "a/./b"):
        assert "does not stay in its folder" in said("filenames", 3, value=name)
    assert "0_9/meta.json is missing" in said("filenames", 3, value="0_9/meta.json")
    first = ("tree", "children", 0, "children", 0, "children", 0, "lods", "0")
    run = json.loads(text)["tree"]["children"][0]["children"][0]["children"][0]["lods"]["0"]
    assert "'counts' says" in said(*first, "count", value=run["count"] - 1)
    assert "a run ends at" in said(*first, "offset", value=run["offset"] + 1)
    assert "two runs share" in said(
        "tree", "children", 0, "children", 0, "children", 1, "lods", "0", "file", value=run["file"]
    )
    for key, value in (("file", 11), ("file", -1), ("offset", 0.5), ("count", True), ("count", 1 << 50)):
        assert "expected 0 to" in said(*first, key, value=value)
    deep: dict[str, Any] = {"lods": {}}
    for _ in range(100):
        deep = {"children": [deep]}
    assert "more than 64 in each other" in said("tree", value=deep)
    assert "more than 1,048,576 boxes" in said("tree", value={"children": [{}] * (1 << 20)})
    for key, value in (("version", 2), ("lodLevels", 65), ("lodLevels", None), ("filenames", [1]), ("environment", 5)):
        assert "lod-meta.json: " in said(key, value=value)
    for value in (None, [], {"children": 3}, {"lods": []}, {"lods": {"3": {}}}, {"lods": {"0": 1}}):
        assert "lod-meta.json: " in said("tree", value=value)
    assert "does not stay in its folder" in said("environment", value="../0_0/meta.json")


def test_splat_transform_reads_it(made: tuple[SplatAsset, Path], tmp_path: Path) -> None:
    _, folder = made
    splat_transform("--select-lod", 1, folder / "lod-meta.json", tmp_path / "seen.ply")
    ours = read_streamed(folder, 1)
    assert_same_look(matched(ours, read_ply(tmp_path / "seen.ply")), without_up(ours))
    said = splat_transform(folder / "lod-meta.json", "--info", "null")
    assert re.search(r"lod counts: 3000, 750, 188", said)


def test_what_splat_transform_writes_is_read(tmp_path: Path) -> None:
    assets = [make_splats(count, degree=0, seed=count) for count in (600, 150, 20)]
    words: list[object] = []
    for k, asset in enumerate(assets):
        write_ply(tmp_path / f"{k}.ply", asset)
        words += [tmp_path / f"{k}.ply", "-l", (0, 1, -1)[k]]
    splat_transform(*words, tmp_path / "out" / "lod-meta.json")
    for level, asset in enumerate(assets[:2]):
        again = read_streamed(tmp_path / "out" / "lod-meta.json", level)
        assert len(again) == len(asset) + 20, "the environment comes along"
        places = np.concatenate([asset.means, assets[2].means])
        distances = np.abs(again.means[:, None] - places).max(2).min(0)
        assert distances.max() < 2e-3
    assert read_manifest(tmp_path / "out" / "lod-meta.json").environment == "env/meta.json"
