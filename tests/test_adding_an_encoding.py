"""The worked example of docs/adding-an-encoding.md: laid over the package, put into the table, tested and used as the page says."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import prismfield.encodings
from prismfield.encodings.base import ENCODINGS
from prismfield.representations.config import FieldConfig

from . import test_encodings as conformance
from .pages import ROOT, blocks, marked_blocks, run_example

PAGE = "docs/adding-an-encoding.md"
MODULE = "prismfield.encodings.fourier"
WITH_ROW = """
import runpy, sys
import prismfield.encodings
folder, script, *sys.argv[1:] = sys.argv[1:]
prismfield.encodings.__path__ = [*prismfield.encodings.__path__, folder]
exec(open(folder + "/row.py").read())
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script on a package that also has the page's module and row."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the page's module and row."""
    made = tmp_path_factory.mktemp("fourier")
    (made / "fourier.py").write_text(blocks(PAGE, "python", "encoding"), encoding="utf-8")
    (made / "row.py").write_text(blocks(PAGE, "python", "row"), encoding="utf-8")
    return made


@pytest.fixture(autouse=True)
def fourier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package has the module, and the table the row, during a test."""
    before = dict(ENCODINGS)
    monkeypatch.setattr(prismfield.encodings, "__path__", [*prismfield.encodings.__path__, str(folder)])
    importlib.import_module(MODULE)
    run_example(PAGE, "row")
    assert set(ENCODINGS) - set(before) == {"fourier"}
    yield
    del ENCODINGS["fourier"], sys.modules[MODULE]


def test_every_block_is_tried_here() -> None:
    assert marked_blocks(PAGE) == {("python", section) for section in ("encoding", "row", "test", "field")}


SUITE = [
    name
    for name, test in vars(conformance).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["name"]
]


@pytest.mark.parametrize("name", SUITE)
def test_it_conforms(name: str) -> None:
    getattr(conformance, name)("fourier")


def test_the_suite_is_that_of_the_table() -> None:
    assert {"test_shapes", "test_gradients", "test_borders_of_cells", "test_a_linear_head_learns"} <= set(SUITE)
    assert len(SUITE) >= 12


def test_the_page_s_own_tests() -> None:
    example = run_example(PAGE, "test")
    tests = {name: test for name, test in vars(example).items() if name.startswith("test_")}
    assert set(tests) == {"test_likeness_is_a_gaussian_of_the_distance", "test_bad_sizes_are_named"}
    (mark,) = example.test_likeness_is_a_gaussian_of_the_distance.pytestmark
    for distance in mark.args[1]:
        example.test_likeness_is_a_gaussian_of_the_distance(distance)
    example.test_bad_sizes_are_named()


def test_it_fits_a_picture(folder: Path, tmp_path: Path) -> None:
    """By the example as it is."""
    words = ["--encoding", "fourier", "--steps", "120", "--batch", "1024", "--downscale", "4", "--out", "fit.png"]
    command = [sys.executable, "-c", WITH_ROW, str(folder), str(ROOT / "examples" / "fit_image.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), timeout=120)
    assert done.returncode == 0, done.stderr
    name, psnr, *_ = done.stdout.splitlines()[-1].split()
    assert name == "fourier:" and float(psnr) > 16
    assert (tmp_path / "fit.png").is_file()


def test_a_field_learns_with_it() -> None:
    """To be dense in one half of its box and empty in the other."""
    torch.manual_seed(0)
    config = FieldConfig(width=16, occupancy=16)
    points = torch.rand(10, 3)
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    field = run_example(PAGE, "field").FourierField.from_points(points, points, box, config)
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    xyz = 2 * torch.rand(1000, 3) - 1

    def miss() -> Tensor:
        return (1 - torch.exp(-field.density(xyz)) - (xyz[:, 0] > 0).float()).square().mean()

    first = miss().item()
    for _ in range(60):
        loss = miss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert miss().item() < 0.2 * first
