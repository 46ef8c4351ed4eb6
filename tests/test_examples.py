"""The examples of signals in two and three dimensions, as a user starts them, with each encoding that they take."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .pages import ROOT

trimesh = pytest.importorskip("trimesh")
ENCODINGS = ("hash", "simplex", "triplane", "dense", "frequency")


def run(name: str, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fit_image(encoding: str, tmp_path: Path) -> None:
    """A coloured wave, and beside it one that looks like it."""
    rows, columns = np.mgrid[0:40, 0:64] / 64
    waves = [np.sin(9 * columns), np.cos(7 * rows), np.sin(6 * (rows + columns))]
    picture = (127 + 120 * np.stack(waves, -1)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "waves.png")
    words = ("--image", "waves.png", "--encoding", encoding, "--steps", 150, "--batch", 1024, "--out", "fit.png")
    done = run("fit_image.py", tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.png", "waves.png"]
    both = np.asarray(Image.open(tmp_path / "fit.png")).astype(float)
    assert both.shape == (40, 128, 3) and np.array_equal(both[:, :64], picture)
    psnr = 20 * np.log10(255 / np.sqrt(np.square(both[:, 64:] - picture).mean()))
    assert psnr > (14 if encoding == "frequency" else 25)  # sines learn slowly; one colour alone has 9.5
    assert done.stdout.splitlines()[-1].startswith(f"{encoding}: ")
    assert float(done.stdout.splitlines()[-1].split()[1]) == pytest.approx(psnr, abs=0.4)  # the file has 8 bits


@pytest.mark.parametrize("encoding", ["hash", "simplex"])
def test_fit_sdf(encoding: str, tmp_path: Path) -> None:
    """A box with a corner pulled in: the learned surface is where the mesh is."""
    mesh = trimesh.creation.box((1.0, 0.8, 0.5))
    mesh.vertices[7] *= 0.7
    mesh.export(tmp_path / "box.obj")
    words = ("--mesh", "box.obj", "--encoding", encoding, "--steps", 120, "--batch", 2048, "--samples", 16384)
    done = run("fit_sdf.py", tmp_path, *words, "--resolution", 32, "--size", 64, "--out", "fit")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["box.obj", "fit.ply", "fit.png"]
    found = trimesh.load(tmp_path / "fit.ply")
    assert found.is_winding_consistent
    wanted = mesh.volume * 0.8**3  # the longest side becomes 0.8
    largest = max(found.split(only_watertight=False), key=lambda part: len(part.faces))  # crumbs may lie about
    assert largest.is_watertight and largest.volume == pytest.approx(wanted, rel=0.05)
    off = float(done.stdout.splitlines()[-1].split()[3])
    assert done.stdout.splitlines()[-1].startswith(f"{encoding}: on average ") and off < 3
    picture = np.asarray(Image.open(tmp_path / "fit.png"))
    assert picture.shape == (64, 64, 3) and 0.1 < (picture.min(-1) < 255).mean() < 0.6


def test_distance_to_a_mesh() -> None:
    """In closed form for a box, whose nearest features are faces, edges and corners."""
    example = runpy.run_path(str(ROOT / "examples" / "fit_sdf.py"))
    points = np.random.default_rng(0).uniform(-1, 1, (3000, 3))
    beyond = np.abs(points) - np.array([0.5, 0.4, 0.25])
    wanted = np.linalg.norm(beyond.clip(0), axis=1) + np.minimum(beyond.max(1), 0)
    found = example["Distance"](trimesh.creation.box((1.0, 0.8, 0.5)))(points)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (wanted < 0).sum() > 20


def test_surface_of_a_distance() -> None:
    """Closed, facing outwards, each point of it on the sphere."""
    example = runpy.run_path(str(ROOT / "examples" / "fit_sdf.py"))
    sphere = example["extract"](lambda x: (x - 0.47).norm(dim=-1, keepdim=True) - 0.31, 40)
    assert sphere.is_watertight and sphere.is_winding_consistent
    assert sphere.volume == pytest.approx(4 / 3 * np.pi * 0.31**3, rel=0.01)
    np.testing.assert_allclose(
        np.linalg.norm(sphere.vertices - 0.47, axis=1), 0.31, atol=8e-4
    )  # a chord of a tetrahedron's longest edge
    assert sphere.euler_number == 2


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "points.obj").write_text("v 0 0 0\nv 1 0 0\n")
    for name, words in (
        ("fit_image.py", ("--image", "broken.png")),
        ("fit_sdf.py", ("--mesh", "points.obj")),
    ):
        done = run(name, tmp_path, *words)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ") and words[1] in done.stderr
