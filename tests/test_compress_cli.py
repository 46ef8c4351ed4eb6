"""render-compress on a run and on a real asset: what it prints is so, targets are met, bad input is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from prismfield.export.assets import SplatAsset
from prismfield.export.compression import compress as module
from prismfield.export.compression.chart import Curve, draw_chart
from prismfield.export.compression.cli import CompressConfig, compress
from prismfield.export.compression.compress import Likeness, contributions, drawable, pruned_rows, taken
from prismfield.export.compression.pfz import read_pfz
from prismfield.export.compression.pfz_grid import importance_of
from prismfield.export.library import load
from prismfield.export.ply import ply_bytes, write_ply

from .commands import command, refused


@pytest.fixture(scope="module")
def small(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .ply of the run's most important Gaussians, few enough for a search."""
    asset = load(tiny_run).asset()
    assert isinstance(asset, SplatAsset)
    path = tmp_path_factory.mktemp("small") / "small.ply"
    write_ply(path, taken(asset, pruned_rows(importance_of(asset), 0.95)))
    return path


def test_a_run(tiny_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "scene.pfz"
    done = command("export.compression.cli", tiny_run, "--to", path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["scene.pfz"]
    size, asset = path.stat().st_size, load(tiny_run).asset()
    assert f"{size:,} bytes" in done.stdout
    ratio = float(re.search(r"([\d.]+) times smaller", done.stdout)[1])  # type: ignore[index]
    assert ratio == pytest.approx(ply_bytes(asset) / size, abs=0.06)
    assert ratio > 14
    assert re.search(r"to original +(2[89]|[3-9]\d)\.\d\d dB PSNR, 0\.\d+ SSIM, 8 test cameras", done.stdout)
    change = float(re.search(r"to photos .*\(([-+][\d.]+) dB", done.stdout)[1])  # type: ignore[index]
    assert -1 < change < 0.5
    again = load(path)
    assert again.num_primitives == len(read_pfz(path)) <= len(asset)
    exported = command("export.cli", path, "--to", tmp_path / "back.ply")
    assert exported.returncode == 0, exported.stderr


def test_a_real_asset_at_a_size(shared_data: Path, tmp_path: Path) -> None:
    flowers = shared_data / "splats" / "flowers_lod3_inria.ply"
    words = (flowers, "--to", tmp_path / "a.pfz", "--target-mb", 0.2, "--json", tmp_path / "a.json")
    done = command("export.compression.cli", *words)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert 190_000 < numbers["bytes"] == (tmp_path / "a.pfz").stat().st_size <= 200_000
    assert numbers["psnr"] > 28
    assert "8 cameras around it" in done.stdout


def test_a_likeness(small: Path, tmp_path: Path) -> None:
    found = [compress(CompressConfig(small, tmp_path / "a.pfz", target_psnr=target)) for target in (33.0, 38.0)]
    for numbers, target in zip(found, (33, 38), strict=True):
        assert target <= numbers["psnr"] < target + 2.5  # few Gaussians: likeness goes in jumps
    assert found[0]["bytes"] < 0.8 * found[1]["bytes"]
    measured = Likeness(load(small)).compare(read_pfz(tmp_path / "a.pfz"))
    assert measured[0] == pytest.approx(found[1]["psnr"], abs=1e-6)


@pytest.mark.parametrize("end", [".spz", ".sog", ".compressed.ply", ".splat"])
def test_other_formats(small: Path, tmp_path: Path, end: str) -> None:
    path, count = tmp_path / "new" / f"a{end}", load(small).num_primitives
    found = compress(CompressConfig(small, path, prune=0.3, sh_degree=1))
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.stat().st_size == found["bytes"]
    back = load(path)
    assert back.num_primitives == found["gaussians_kept"] == pytest.approx(0.7 * count, abs=2)
    assert found["sh_degree"] == (0 if end == ".splat" else 1)
    assert Likeness(load(small)).compare(back.asset())[0] == pytest.approx(found["psnr"], abs=1e-3)  # type: ignore[arg-type]


def test_other_formats_meet_targets(small: Path, tmp_path: Path) -> None:
    whole = compress(CompressConfig(small, tmp_path / "whole.compressed.ply"))
    for share in (0.9, 0.4):
        path = tmp_path / "a.compressed.ply"
        compress(CompressConfig(small, path, target_mb=share * whole["bytes"] / 1e6))
        assert 0.6 * share * whole["bytes"] < path.stat().st_size <= share * whole["bytes"]
    found = compress(CompressConfig(small, tmp_path / "b.compressed.ply", target_psnr=whole["psnr"] - 6))
    assert whole["psnr"] - 6 <= found["psnr"] < whole["psnr"] and found["bytes"] < whole["bytes"]


def test_a_sweep(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compress(CompressConfig(small, tmp_path / "a.pfz", sweep=tmp_path / "a.png", sh_degree=1, prune=0.5))
    printed = capsys.readouterr().out
    rows = re.findall(r"(\d+)% pruned +([\d.]+) MB +[\d.]+ times smaller +([\d.]+) dB", printed)
    assert len(rows) == 21
    sizes, likenesses = ([float(row[i]) for row in rows if row[0] == "0"] for i in (1, 2))
    assert sizes == sorted(sizes, reverse=True) and likenesses == sorted(likenesses, reverse=True)
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape == (560, 900, 3) and (picture != 255).mean() > 0.02
    back = read_pfz(tmp_path / "a.pfz")
    assert back.sh_degree == 1 and len(back) == pytest.approx(load(small).num_primitives / 2, abs=2)


def test_what_contributes(small: Path) -> None:
    scene = load(small)
    asset = scene.asset()
    assert isinstance(asset, SplatAsset)
    weights = contributions(scene, asset)
    assert weights.shape == (len(asset),) and (weights >= 0).all()
    likeness = Likeness(scene)
    for share, least in ((0.1, 30), (0.3, 22)):
        rows = pruned_rows(weights, share)
        assert len(rows) == round(len(asset) * (1 - share)) and (np.diff(rows) > 0).all()
        kept = likeness.compare(taken(asset, rows))[0]
        other = np.sort(np.random.default_rng(0).permutation(len(asset))[: len(rows)])
        assert kept > least and kept > likeness.compare(taken(asset, other))[0] + 5
    faint = asset.opacities.copy()
    faint[:10] = 0.003
    object.__setattr__(asset, "opacities", faint)
    assert len(drawable(asset)) == len(asset) - 10
    assert likeness.compare(drawable(asset)) == pytest.approx(likeness.compare(asset), abs=1e-6)


def test_a_search_ends_at_the_limit() -> None:
    rising, falling = (lambda x: x**0.2 * 3 - 36), (lambda x: np.log(1000 / x + 5))
    factor, value = module._search(rising, -33, 0.1)
    assert -33.1 < value <= -33 and rising(factor) == value
    factor, value = module._search(falling, 5.7, 0.02)
    assert 5.68 < value <= 5.7 and falling(factor) == value
    assert module._search(falling, 1, 0.02) == (16.0, falling(16.0))
    assert module._search(falling, 99, 0.02) == (1 / 8, falling(1 / 8))


def test_a_chart_has_its_points_in_place() -> None:
    picture = draw_chart([Curve("one", [(1.0, 20.0), (10.0, 30.0)]), Curve("two", [(2.0, 25.0)])], "MB", "dB", "x")
    blue = np.argwhere(picture[..., 2] - picture[..., 0] > 0.3)[:, ::-1]
    left, right = blue[blue[:, 0].argmin()], blue[blue[:, 0].argmax()]
    assert left.tolist() == pytest.approx([67, 504], abs=4)
    assert blue[:, 1].min() == pytest.approx(41, abs=4) and right[0] > 800
    assert draw_chart([Curve("one", [(3.0, 7.0)])], "MB", "dB", "x").shape == (560, 900, 3)


def test_bad_input_is_refused_in_one_line(small: Path, tmp_path: Path) -> None:
    to = tmp_path / "a.pfz"
    assert "no such run" in refused("export.compression.cli", tmp_path / "nowhere", "--to", to)
    assert "is too small, the smallest tried" in refused(
        "export.compression.cli", small, "--to", to, "--target-mb", 0.0003
    )
    for options, message in (
        ({"to": tmp_path / "a.zip"}, r"unknown suffix '\.zip'; expected \.pfz, \.spz"),
        ({"to": tmp_path / "a.spz", "steps": 0.5}, r"--steps: is of use for \.pfz only"),
        ({"to": tmp_path / "a.sog", "finetune_steps": 5}, r"--finetune-steps: is of use for \.pfz only"),
        ({"to": tmp_path / "a.spz", "target_mb": 1e-5}, "is too small, the smallest tried is"),
        ({"to": tmp_path / "a.splat", "target_psnr": 99.0}, "99 dB is out of reach, the finest tried has"),
        ({"target_mb": 1.0, "target_psnr": 30.0}, "expected one of them, got both"),
        ({"target_mb": -1.0}, "--target-mb: expected more than 0, got -1"),
        ({"steps": 0.0}, "--steps: expected more than 0"),
        ({"prune": 1.0}, "--prune: expected 0 to below 1, got 1"),
        ({"sh_degree": 4}, "--sh-degree: expected 0 to 3, got 4"),
        ({"sweep": tmp_path / "a.txt"}, "expected a picture's name"),
        ({"target_psnr": 99.0}, "99 dB is out of reach, the finest tried has"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(CompressConfig(**({"scene": small, "to": to} | options)))  # type: ignore[arg-type]
    (tmp_path / "cut.pfz").write_bytes(b"PFZ1")
    assert "cut short" in refused("export.compression.cli", tmp_path / "cut.pfz", "--to", to)
    assert not to.exists()


def test_a_file_of_splats(small: Path, tmp_path: Path) -> None:
    asset = load(small).asset()
    assert isinstance(asset, SplatAsset)
    write_ply(tmp_path / "few.ply", taken(asset, np.arange(3)))
    assert compress(CompressConfig(tmp_path / "few.ply", tmp_path / "few.pfz"))["gaussians_kept"] == 3
