"""render-data poses that is stopped or fails half-way: Ctrl-C, a damaged database, COLMAP killed; from a video."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import imageio.v2 as imageio
import pytest
from rich.progress import Progress

from prismfield.datasets import poses as module
from prismfield.datasets.scenes import load_scene

from .commands import command, refused

pytest.importorskip("pycolmap")
pytest.importorskip("imageio_ffmpeg")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")
GARDEN = Path(__file__).resolve().parents[1] / "datasets" / "garden"
COUNT = 10  # neighbours on the bundled scene's outer ring
WORDS = ("poses", "clip.mp4", "--frames", COUNT, "--max-features", 2000)


def features(project: Path) -> dict[int, bytes]:
    """Keypoints found so far, by the number of the image."""
    try:
        address = f"{(project / 'database.db').resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as database:
            return dict(database.execute("SELECT image_id, data FROM keypoints"))
    except sqlite3.Error:
        return {}  # not made yet, or being written


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video, and beside it what Ctrl-C left while the features of its frames were sought. Copy before use."""
    folder = tmp_path_factory.mktemp("capture")
    views = [cv2.imread(str(GARDEN / "images" / f"{i:03d}.jpg"))[..., ::-1] for i in range(COUNT)]
    imageio.mimwrite(folder / "clip.mp4", [view for view in views for _ in range(2)], fps=4, quality=9)
    arguments = [sys.executable, "-m", "prismfield.datasets.cli", *map(str, WORDS)]
    # in a group of its own, as a shell starts it: Ctrl-C goes to the workers too
    process = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    project, until = folder / "clip_scene", time.monotonic() + 60
    while not features(project) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "interrupted" and "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it goes on
    state = json.loads((project / "poses.json").read_text())
    assert len(state["images"]) == COUNT and not state["matched"] and state["models"] is None
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """The same again, to go on with: the video keeps its place, which the project's settings name."""
    shutil.copytree(stopped / "clip_scene", tmp_path / "scene")
    return tmp_path / "scene"


def words(stopped: Path, project: Path) -> list[object]:
    """Arguments that go on with a copy."""
    return ["poses", stopped / "clip.mp4", *WORDS[2:], "--out", project]


def test_the_same_command_goes_on_after_ctrl_c(stopped: Path, copy: Path) -> None:
    frames = {path.name: path.stat().st_mtime_ns for path in (copy / "images").iterdir()}
    before = features(copy)
    assert before
    done = command("datasets.cli", *words(stopped, copy))
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} of {COUNT} images" in done.stdout and "Matching (sequential)" in done.stderr
    assert frames == {path.name: path.stat().st_mtime_ns for path in (copy / "images").iterdir()}
    after = features(copy)
    assert len(after) == COUNT and before.items() <= after.items()
    data = load_scene(str(copy))
    assert len(data.train + data.test) == COUNT and data.points is not None and len(data.points) > 300


def test_a_damaged_database_is_named_and_how_to_start_anew(stopped: Path, copy: Path) -> None:
    for path in copy.glob("database.db*"):
        path.write_bytes(b"damaged" * 999)
    line = refused("datasets.cli", *words(stopped, copy))
    assert line.startswith(f"error: {copy}: COLMAP stopped at the stage 'extract': RuntimeError: ")
    assert str(copy / "colmap.log") in line and line.endswith(
        "should it stop there again, add --overwrite to start anew"
    )
    earlier = module._load_project(copy / "poses.json")
    assert earlier is not None and earlier.images  # nothing is lost


def test_photographs_that_came_or_went_are_not_passed_over(tmp_path: Path) -> None:
    """The same command would go on with the earlier ones, and its report say nothing of the new."""
    photos = shutil.copytree(GARDEN / "images", tmp_path / "photos", ignore=shutil.ignore_patterns("0[1-9]?.jpg"))
    names = sorted(path.name for path in photos.iterdir())
    config = module.PosesConfig(photos, out=tmp_path / "scene")
    with Progress(disable=True) as progress:
        project = module._open_project(tmp_path / "scene", config, photos, False)
        module._prepare_images(project, tmp_path / "scene", photos, False, config, progress)
    assert module._open_project(tmp_path / "scene", config, photos, False).images == names
    (photos / names[0]).rename(photos / "second.jpg")
    shutil.copy(photos / names[1], photos / "third.jpg")
    line = refused("datasets.cli", "poses", photos, "--out", tmp_path / "scene")
    assert line == (
        f"error: {photos}: 2 photographs are new and 1 gone since an earlier run; "
        "add --overwrite to start anew, or name another --out"
    )
    anew = module._open_project(tmp_path / "scene", replace(config, overwrite=True), photos, False)
    assert anew.images == [] and not (tmp_path / "scene" / "images").exists()


def worker_of(process: subprocess.Popen[str]) -> int:
    """The number of the process that runs COLMAP."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[1]) == process.pid:
                return int(entry.parent.name)
    return 0


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for nothing but being counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
@pytest.mark.parametrize("victim", ["worker", "command"])
def test_killed(tmp_path: Path, victim: str) -> None:
    """The worker's end is told in a line; that of the command ends its worker, or the next run would not be alone."""
    photos, project = GARDEN / "images", tmp_path / "scene"
    arguments = [sys.executable, "-m", "prismfield.datasets.cli", "poses", str(photos), "--out", str(project)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not features(project) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        worker = worker_of(process)
        assert worker and process.poll() is None
        os.kill(worker if victim == "worker" else process.pid, signal.SIGKILL)
        said = process.communicate(timeout=20)[1]
    if victim == "worker":
        assert process.returncode == 1 and "Traceback" not in said
        assert "COLMAP stopped at the stage 'extract': killed by signal 9 (out of memory?)" in said.splitlines()[-1]
    until = time.monotonic() + 20
    while not ended(worker) and time.monotonic() < until:
        time.sleep(0.01)
    assert ended(worker) and len(features(project)) < len(list(photos.iterdir())) // 2
