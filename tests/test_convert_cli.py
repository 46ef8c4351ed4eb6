"""render-convert, and render-export to other formats: what is printed, which options there are, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from prismfield.export.assets import SplatAsset
from prismfield.export.cli import ExportConfig, OutputOptions, export, write
from prismfield.export.formats import read_asset
from prismfield.export.ply import write_ply
from prismfield.export.spz import write_spz

from .commands import command
from .splat_assets import make_splats, matched


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    write_ply(tmp_path / "scene.ply", make_splats(400))
    return tmp_path / "scene.ply"


def test_what_is_printed(scene: Path) -> None:
    done = command("export.convert_cli", scene, scene.with_name("b.spz"), "--sh-degree", 2, "--spz-version", 4)
    assert done.returncode == 0, done.stderr
    size, before = (scene.with_name(name).stat().st_size for name in ("b.spz", "scene.ply"))
    assert f"b.spz: 400 Gaussians of degree 2, {size:,} bytes ({size / 400:.0f} each)" in done.stdout
    assert f"{before / size:.2f} times smaller than {scene} ({before:,} bytes)" in done.stdout
    found = re.search(r"read back and rendered: ([\d.]+) dB PSNR to the scene itself, 3 views", done.stdout)
    assert found and float(found[1]) > 36
    assert sorted(path.name for path in scene.parent.iterdir()) == ["b.spz", "scene.ply"]


@pytest.mark.parametrize("name", ["b.splat", "b.glb", "b_sog", "new/meta.json", "b.compressed.ply"])
def test_one_format_after_another(scene: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = scene.with_name("b.spz")
    write_spz(path, make_splats(400, degree=1))
    write(path, scene.parent / name, OutputOptions(verify=name != "b.glb"), None, 1)
    again, first = read_asset(scene.parent / name), read_asset(path)
    assert isinstance(first, SplatAsset) and isinstance(again, SplatAsset)
    assert abs(matched(first, again).means - first.means).max() < 4e-3
    said = capsys.readouterr().out
    assert ("read back and rendered" in said) == (name != "b.glb")
    assert ("to what the format can hold of the scene" in said) == (name == "b.splat")


def test_what_stands_on_its_head_is_turned(scene: Path) -> None:
    words = (scene, scene.with_name("b.ply"), "--turn", 180, 0, 0)
    done = command("export.convert_cli", *words)
    assert done.returncode == 0, done.stderr
    again, asset = read_asset(scene.with_name("b.ply")), read_asset(scene)
    np.testing.assert_allclose(again.means, asset.means * [1, -1, -1], atol=1e-6)
    assert isinstance(again, SplatAsset) and isinstance(asset, SplatAsset)
    signs = np.ones((16, 1))
    signs[
        [1, 2, 4, 7, 9, 11, 12, 14]
    ] = -1  # odd in y and z together: y, z, xy, xz, y (3x^2 - y^2), y^3, z^3, z (x^2 - y^2)
    np.testing.assert_allclose(again.sh, asset.sh * signs, atol=1e-6)
    with pytest.raises(ValueError, match="--turn: expected degrees"):
        write(scene, scene.with_name("c.ply"), OutputOptions(turn=(0, float("nan"), 0)), None, 1)


def test_what_is_refused(scene: Path) -> None:
    to = scene.with_name("b.splat")
    for config, options, message in (
        ((scene, to), OutputOptions(spz_version=4), "--spz-version is of no use for .splat"),
        ((scene, to), OutputOptions(sog_palette=9), "--sog-palette is of no use"),
        ((scene, scene.with_name("b.sog")), OutputOptions(sog_palette=1 << 20), "a palette of 1 to 65536"),
        ((scene, scene.with_name("b.spz")), OutputOptions(spz_sh_bits=(9, 1)), "1 to 8 bits"),
        ((scene, scene.with_name("b.ksplat")), OutputOptions(), "unknown suffix '.ksplat' for Gaussians"),
        ((scene, scene.with_name("b")), OutputOptions(), "unknown suffix"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            write(*config, options, None, 1)
    with pytest.raises(ValueError, match="no steps to choose from"):
        write(scene, to, OutputOptions(), 3, 1)
    with pytest.raises(IsADirectoryError):
        write(scene, scene.parent, OutputOptions(), None, 1)
    with pytest.raises(FileNotFoundError):
        write(scene.with_name("none.spz"), to, OutputOptions(), None, 1)
    assert [path.name for path in scene.parent.iterdir()] == ["scene.ply"]


def test_a_run_is_exported_in_other_formats(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.spz", "a.sog"):
        export(ExportConfig(tiny_run, tmp_path / name))
        said = capsys.readouterr().out
        assert re.search(r"read back and rendered: [3-9]\d\.\d dB PSNR to the scene itself, 3 views", said)
        assert "times smaller than the same as .ply" in said
