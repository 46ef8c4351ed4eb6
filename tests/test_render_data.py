"""render-data as a command: what is at hand, help without waiting, mistakes in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prismfield.datasets import cli
from prismfield.datasets.download import SCENES

from .commands import command, refused
from .tiny_captures import write_colmap, write_transforms


def test_list_names_what_is_bundled_at_hand_and_downloadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_transforms(tmp_path / "statue")
    write_colmap(tmp_path / "courtyard", binary=True, count=3)
    (tmp_path / "no_capture").mkdir()
    monkeypatch.setenv("PRISMFIELD_DATA", str(tmp_path))
    assert cli.list_scenes() == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert lines["bundled"].split() == ["bundled", "garden"]
    assert "courtyard, statue " in lines["at hand"] and str(tmp_path) in lines["at hand"]
    assert "no_capture" not in said
    for name in SCENES:
        group, scene = name.split("/")
        assert any(line.strip().startswith(f"{group}/") and f" {scene}" in line for line in said.splitlines()), name


def test_list_without_a_data_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PRISMFIELD_DATA", raising=False)
    cli.list_scenes()
    assert "none  ($PRISMFIELD_DATA: not set)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["check"], ["poses"], ["download"]])
def test_help_names_every_option_and_loads_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys\nfrom prismfield.datasets import cli\n"
        f"sys.argv = ['render-data', *{words!r}, '--help']\n"
        "try:\n    cli.main()\nfinally:\n"
        "    print([m for m in ('torch', 'cv2', 'numpy', 'pycolmap') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    expected = {
        "": ["list", "check", "poses", "download"],
        "check": ["--out", "--eval-every-nth", "--no-poses"],
        "poses": ["--out", "--frames", "--fps", "--camera-model", "--matching", "--overwrite"],
        "download": ["--out", "--archive", "--overwrite"],
    }
    assert all(word in done.stdout for word in expected[" ".join(words)])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused("datasets.cli", "check", tmp_path / "empty")
    assert line.startswith(f"error: {tmp_path / 'empty'}: no capture: expected transforms.json")
    assert line.endswith("the folder is empty")
    wrong = command("datasets.cli", "chekc")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
