"""The worked example of docs/adding-an-op.md: laid over the package, compiled, run and tested as the page says."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import prismfield.render.gpu
import prismfield.render.ops
from prismfield.render import kernels as kernels_module

from .gpu_compile import OTHERS, describe
from .pages import ROOT, blocks, marked_blocks, run_example

PAGE = "docs/adding-an-op.md"
OP, GPU = "prismfield.render.ops.srgb", "prismfield.render.gpu.srgb"
COMPILE = """
import runpy, sys
import prismfield.render.gpu, prismfield.render.ops
folder, script, *sys.argv[1:] = sys.argv[1:]
prismfield.render.ops.__path__ = [*prismfield.render.ops.__path__, folder + "/ops"]
prismfield.render.gpu.__path__ = [*prismfield.render.gpu.__path__, folder + "/gpu"]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""
"""Runs a script on a package that also has the page's files."""


def test_every_block_is_tried_here() -> None:
    tried = {("python", "op"), ("cpp", "op"), ("python", "gpu"), ("python", "test"), ("python", "compile")}
    assert marked_blocks(PAGE) == tried


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's modules, in the folders `ops` and `gpu`."""
    folder = tmp_path_factory.mktemp("srgb")
    for section, path in (("op", "ops/srgb.py"), ("gpu", "gpu/srgb.py")):
        (folder / path).parent.mkdir()
        (folder / path).write_text(blocks(PAGE, "python", section), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for package in (prismfield.render.ops, prismfield.render.gpu):
            name = package.__name__.rpartition(".")[2]
            patch.setattr(package, "__path__", [*package.__path__, str(folder / name)])
        importlib.import_module(OP)  # once: an op's name is registered for good
    return folder


@pytest.fixture
def triton(files: Path, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the page's Triton kernels run, which the table of kernels now has."""
    monkeypatch.setattr(prismfield.render.gpu, "__path__", [*prismfield.render.gpu.__path__, str(files / "gpu")])
    module = importlib.import_module(GPU)
    table = kernels_module.kernels_of(torch.empty(0, device=triton_device))
    for name in ("srgb_forward", "srgb_backward"):
        monkeypatch.setattr(table, name, getattr(module, name), raising=False)
    return triton_device


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The page's C++, compiled by itself."""
    nanobind = pytest.importorskip("nanobind", reason="nanobind is not installed: pip install -e '.[dev]'")
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("compiles as on Linux, with c++")
    folder = tmp_path_factory.mktemp("srgb_kernel")
    declared = "#include <nanobind/nanobind.h>\nnamespace pf { void bind_srgb(nanobind::module_ &m); }\n"
    source = declared + blocks(PAGE, "cpp", "op") + "NB_MODULE(srgb_kernel, m) { pf::bind_srgb(m); }\n"
    (folder / "srgb.cpp").write_text(source)
    home = Path(nanobind.include_dir()).parent
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"]
    includes = [ROOT / "render" / "csrc", sysconfig.get_path("include")]
    system = [home / "include", home / "ext" / "robin_map" / "include"]
    command = [compiler, *flags, *(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)]
    command += [str(folder / "srgb.cpp"), str(home / "src" / "nb_combined.cpp"), "-o", str(folder / "srgb_kernel.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(folder))
    try:
        return __import__("srgb_kernel")
    finally:
        sys.path.remove(str(folder))


def test_reference(files: Path) -> None:
    example = run_example(PAGE, "test")
    example.test_gradients_of_the_reference()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"light: expected \[R, 3\]"):
        example.srgb(torch.rand(3))


def test_cpp(files: Path, compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "kernels", compiled)
    example = run_example(PAGE, "test")
    for count in example.COUNTS:
        example.test_cpp(count)
    example.test_registration()
    monkeypatch.setattr(kernels_module, "kernels", object())  # it is the kernel that ran above
    with pytest.raises(AttributeError):
        example.test_cpp(1)


def test_triton(triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    example = run_example(PAGE, "test")
    for count in example.COUNTS:
        example.test_triton(count, triton)
    spoilt = torch.tensor([[float("nan"), 0.5, -1.0]], device=triton)
    assert example.srgb(spoilt).isnan().tolist() == [[True, False, False]]


def test_the_page_has_no_test_that_is_not_run() -> None:
    tests = {name for name in vars(run_example(PAGE, "test")) if name.startswith("test_")}
    source = inspect.getsource(sys.modules[__name__])
    assert tests and all(f"example.{name}(" in source for name in tests)


def test_compile(files: Path, triton: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prismfield.render.gpu import launch

    specs: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "watch", lambda *start: specs.append(describe(*start)))
    run_example(PAGE, "compile").run_srgb(triton)
    assert [spec["kernel"] for spec in specs] == ["_srgb_forward_kernel", "_srgb_backward_kernel"]
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = Path(__file__).with_name("gpu_compile.py").as_posix()
    command = [sys.executable, "-c", COMPILE, str(files), script, str(tmp_path / "specs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (1 + len(OTHERS)) * len(specs) and not any(row["spilled"] for row in rows)
