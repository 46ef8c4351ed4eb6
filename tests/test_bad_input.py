"""render-train with what cannot work: one line that names what and where, exit 1, and nothing written or lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prismfield.train.checkpoint import load_checkpoint

from .commands import command, refused, small_disk
from .tiny_captures import FX, FY, HEIGHT, WIDTH, transforms, write_colmap, write_image, write_transforms

SHORT = ["--steps", "12", "--data.initial-points", "200", "--log.tests", "0", "--log.no-tensorboard"]
SMALL = ["--scene", "garden", "--downscale", "8", "--max-primitives", "1000", "--log.tests", "0"]


def refused_scene(scene: object, out: Path) -> str:
    """The line with which a training of `scene` is refused, before anything is written."""
    line = refused("train.cli", "--scene", scene, *SHORT, "--out", out)
    assert not out.exists()
    return line


def cut(path: Path) -> None:
    """The file without its end; its header still tells the size."""
    os.truncate(path, path.stat().st_size - 20)


def jpeg_capture(root: Path) -> Path:
    table = transforms()
    for frame in table["frames"]:
        frame["file_path"] = frame["file_path"].replace(".png", ".jpg")
    return write_transforms(root, table)


def damaged_table(**values: Any) -> Callable[[Path], Path]:
    """Writes a capture whose fourth frame has these values."""

    def write(root: Path) -> Path:
        table = transforms()
        table["frames"][3] |= values
        return write_transforms(root, table)

    return write


def nan_pose(root: Path) -> Path:
    table = transforms()
    table["frames"][3]["transform_matrix"][0][3] = float("nan")
    return write_transforms(root, table)


def missing_images(root: Path) -> Path:
    write_transforms(root)
    for name in ("002", "005"):
        (root / f"images/{name}.png").unlink()
    return root


def truncated_jpeg(root: Path) -> Path:
    jpeg_capture(root)
    cut(root / "images/003.jpg")
    return root


def other_size(root: Path) -> Path:
    write_image(root / "images/003.png", 3, size=(HEIGHT, WIDTH))
    return write_transforms(root)


def empty_folder(root: Path) -> Path:
    root.mkdir()
    return root


def unknown_model(root: Path) -> Path:
    return write_colmap(root, binary=True, model=("EQUIRECTANGULAR", 99, (FX, FY)))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (missing_images, ("2 of 9 images are missing", "images/002.png", "images/005.png")),
        (truncated_jpeg, ("images/003.jpg", "truncated JPEG (no end marker)")),
        (nan_pose, ("003.png", "pose", "NaN")),
        (damaged_table(fl_x=0.0), ("003.png", "focal length fx", "got 0")),
        (damaged_table(fl_y=1e-42), ("003.png", "focal length fy", "got 1e-42")),
        (damaged_table(cx=1e30), ("003.png", "principal point", "1e+30")),
        (empty_folder, ("no capture", "expected transforms.json")),
        (other_size, ("003.png", f"{HEIGHT}x{WIDTH}", f"{WIDTH}x{HEIGHT}")),
        (unknown_model, ("cameras.bin", "99")),
    ],
)
def test_captures_that_cannot_be_used(write: Callable[[Path], Path], named: tuple[str, ...], tmp_path: Path) -> None:
    line = refused_scene(write(tmp_path / "capture"), tmp_path / "run")
    for words in named:
        assert words in line


def test_no_scene_of_that_name(tmp_path: Path) -> None:
    line = refused_scene("gardem", tmp_path / "run")
    assert "scene 'gardem': no such path or name" in line
    assert "garden" in line


def test_a_cloud_without_points_starts_from_made_ones(tmp_path: Path) -> None:
    scene = write_colmap(tmp_path / "capture", binary=True, points=0)
    done = command("train.cli", "--scene", scene, *SHORT, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "the point cloud has no usable points" in done.stderr
    assert "starting from random ones" in done.stderr
    assert "starting from 200 points" in done.stderr
    tensors, _ = load_checkpoint(tmp_path / "run/checkpoints")
    assert len(tensors["scene.means"]) > 0
    line = refused("train.cli", "--scene", scene, *SHORT, "--data.points", "cloud", "--out", tmp_path / "other")
    assert "needs a point cloud" in line


def test_an_image_that_fails_while_training_costs_nothing(tmp_path: Path) -> None:
    """With a cloud to start from, training images are first decoded when their turn comes."""
    scene = write_colmap(tmp_path / "capture", binary=True)
    whole = (scene / "images/003.png").read_bytes()
    cut(scene / "images/003.png")
    run = tmp_path / "run"
    done = command("train.cli", "--scene", scene, *SHORT, "--out", run)
    assert done.returncode == 1, done.stderr
    last, line = done.stderr.splitlines()[-2:]
    assert line.startswith("error: ")
    assert "images/003.png" in line
    assert last.endswith(f"go on with: render-train --resume {run}")
    assert "Traceback" not in done.stderr
    step = load_checkpoint(run / "checkpoints")[1]["step"]
    (scene / "images/003.png").write_bytes(whole)
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert f"going on at step {step}" in done.stderr
    assert load_checkpoint(run / "checkpoints")[1]["step"] == 12


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
        (["--minutes", "nan"], "--minutes: expected a finite number, got nan"),
        (["--steps", "-1"], "--steps: expected a positive number, got -1"),
        (["--downscale", "0"], "--downscale: expected a positive number, got 0"),
        (["--loss.ssim-weight", "nan"], "--loss.ssim-weight: expected a finite number, got nan"),
        (["--pose.lr", "inf"], "--pose.lr: expected a finite number, got inf"),
    ],
)
def test_options_that_make_no_sense(words: list[str], line: str, tmp_path: Path) -> None:
    assert refused("train.cli", "--scene", "garden", *words, "--out", tmp_path / "run") == f"error: {line}"
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = refused("train.cli", *SMALL, "--out", tmp_path / "file" / "run")
    assert f"--out {tmp_path}/file/run: {tmp_path}/file is not a folder" in line
    line = refused("train.cli", *SMALL, "--out", tmp_path / "file")
    assert f"--out {tmp_path}/file: already exists and is not empty" in line
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    line = refused("train.cli", *SMALL, "--out", tmp_path / "full")
    assert f"--out {tmp_path}/full: already exists and is not empty" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    assert f"{tmp_path} cannot be written to" in refused("train.cli", *SMALL, "--out", tmp_path / "run")


def test_a_finished_run_is_not_written_over(tiny_run: Path) -> None:
    line = refused("train.cli", *SMALL, "--out", tiny_run)
    assert line.endswith(f"--out {tiny_run}: already exists and is not empty; go on with it by --resume {tiny_run}")


def test_splats_to_start_from(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = refused("train.cli", *SMALL, "--init", tmp_path / "none.ply", "--out", out)
    assert f"{tmp_path}/none.ply: No such file" in line
    (tmp_path / "garbage.ply").write_bytes(bytes(range(256)) * 40)
    line = refused("train.cli", *SMALL, "--init", tmp_path / "garbage.ply", "--out", out)
    assert f"{tmp_path}/garbage.ply: not a .ply file" in line
    assert command("export.cli", tiny_run, "--to", tmp_path / "many.ply").returncode == 0
    line = refused("train.cli", *SMALL, "--init", tmp_path / "many.ply", "--out", out)
    assert f"{tmp_path}/many.ply: 17820 splats, more than --max-primitives 1000" in line
    assert not out.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


def test_a_full_disk_ends_the_run_and_more_room_lets_it_go_on(disk: Path) -> None:
    run = disk / "run"
    words = [*SMALL, "--steps", "40", "--log.checkpoint-steps", "10", "--log.every", "10"]
    done = command("train.cli", *words, "--out", run)
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {run}")
    assert "No space left on device" in line
    assert "Traceback" not in done.stderr
    assert not list(run.rglob("*.part"))
    step = load_checkpoint(run / "checkpoints")[1]["step"]
    assert 10 <= step < 40
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert f"going on at step {step}" in done.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 10, 20, 30, 40]


def test_a_disk_full_from_the_first_byte(disk: Path) -> None:
    with (disk / "filler").open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1 << 14))
            file.flush()
    line = refused("train.cli", *SMALL, "--steps", "40", "--out", disk / "run")
    assert "No space left on device" in line
    assert str(disk / "run") in line
