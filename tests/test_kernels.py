"""Which build of the kernels is chosen, and that all of them draw the same picture."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prismfield.render import kernels as module

CPUINFO = Path("/proc/cpuinfo")


class Installation:
    """Stands in for the import system: which builds there are, and what the processor says."""

    def __init__(self, built: tuple[str, ...], level: int) -> None:
        self.built, self.level = built, level
        self.imported: list[str] = []

    def find_spec(self, name: str) -> Any:
        if name == "prismfield":
            return SimpleNamespace(submodule_search_locations=[])
        return object() if name.removeprefix("prismfield._kernels").removeprefix("_") in self.built else None

    def import_module(self, name: str) -> Any:
        level = name.removeprefix("prismfield._kernels").removeprefix("_")
        assert level == self.built[-1] or int(level[1:]) <= self.level, f"imported {name} on a processor that lacks it"
        self.imported.append(level)
        return SimpleNamespace(name=level, cpu_level=lambda: self.level, keep_freed_memory=lambda: None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(*built: str, level: int) -> Installation:
        installation = Installation(built, level)
        monkeypatch.setattr(module, "find_spec", installation.find_spec)
        monkeypatch.setattr(module, "importlib", installation)
        return installation

    return pretend


@pytest.mark.parametrize(("level", "chosen"), [(4, "v4"), (3, "v3"), (2, "v2")])
def test_the_best_that_the_processor_runs(installed: Any, level: int, chosen: str) -> None:
    installed("v4", "v3", "v2", level=level)
    kernels, description = module.load_kernels("")
    assert kernels.name == chosen
    assert description == f"C++ x86-64-{chosen}"


def test_a_missing_build_is_passed_over(installed: Any) -> None:
    installed("v4", "v2", level=3)
    assert module.load_kernels("")[0].name == "v2"


def test_an_older_processor_gets_the_reference(installed: Any) -> None:
    installed("v4", "v3", "v2", level=1)
    kernels, description = module.load_kernels("")
    assert kernels is None
    assert "older than x86-64-v2" in description


def test_the_portable_build_elsewhere(installed: Any) -> None:
    installed("", level=0)
    kernels, description = module.load_kernels("")
    assert kernels.name == ""
    assert description == "C++ portable"


def test_the_environment_chooses(installed: Any) -> None:
    installed("v4", "v3", "v2", level=3)
    assert module.load_kernels("v2")[0].name == "v2"
    assert module.load_kernels("reference") == (None, "reference (PRISMFIELD_KERNELS=reference)")
    with pytest.raises(ValueError, match=r"PRISMFIELD_KERNELS=v4: the processor supports x86-64-v3; usable: .*v3, v2"):
        module.load_kernels("v4")
    with pytest.raises(ValueError, match="PRISMFIELD_KERNELS=avx: expected reference or one of v4, v3, v2"):
        module.load_kernels("avx")
    installed("v2", level=4)
    with pytest.raises(ValueError, match="PRISMFIELD_KERNELS=v3: this installation has no such build"):
        module.load_kernels("v3")


def test_a_build_that_does_not_load_is_no_crash(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"{name}: wrong libstdc++")

    monkeypatch.setattr(installed("v2", level=4), "import_module", refuse)
    kernels, description = module.load_kernels("")
    assert kernels is None
    assert "cannot be loaded (prismfield._kernels_v2: wrong libstdc++)" in description


def test_what_the_build_wrote_down_is_told(installed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installation = installed(level=0)
    assert "install with pip, with a C++20 compiler" in module.load_kernels("")[1]
    (tmp_path / "_kernels_missing.txt").write_text("no compiler was found\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "empty"), str(tmp_path)])
    monkeypatch.setattr(
        module, "find_spec", lambda name: spec if name == "prismfield" else installation.find_spec(name)
    )
    assert "instead of the C++ kernels: no compiler was found; then repeat pip install" in module.load_kernels("")[1]


def test_the_reference_says_once_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "kernels", None)
    monkeypatch.setattr(module, "description", "slow reference")
    monkeypatch.setattr(module, "told", False)
    monkeypatch.setattr(module.log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="prismfield"):
        assert not module.use_kernel(torch.zeros(1, dtype=torch.float64))
        assert not caplog.messages  # no kernel takes doubles: nothing is missing
        assert not module.use_kernel(torch.zeros(1))
        assert not module.use_kernel(torch.zeros(1))
    assert caplog.messages == ["slow reference"]


@pytest.mark.skipif(module.kernels is None, reason="no compiled kernels")
@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.exists(), reason="reads the flags of an x86-64 Linux")
def test_cpu_level_agrees_with_the_operating_system() -> None:
    flags = set(CPUINFO.read_text().partition("flags")[2].partition("\n")[0].split())
    levels = {
        2: {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
        3: {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
        4: {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    }
    expected = 1
    for level, needed in levels.items():
        if not needed <= flags:
            break
        expected = level
    assert module.kernels.cpu_level() == expected


DRAW = """
import sys, torch
from prismfield.render.cameras import Cameras
from prismfield.render.rasterize import rasterize_gaussians
torch.manual_seed(0)
means = (torch.randn(300, 3) * 0.6).requires_grad_()
quats = torch.randn(300, 4).requires_grad_()
scales = (torch.rand(300, 3) * 0.2 + 0.01).requires_grad_()
opacities = torch.rand(300).requires_grad_()
sh0, shN = (torch.randn(300, 1, 3) * 0.3).requires_grad_(), (torch.randn(300, 8, 3) * 0.3).requires_grad_()
viewmats = torch.eye(4)[None].clone()
viewmats[0, 2, 3] = 3.0
Ks = torch.tensor([[[61.0, 0, 33.5], [0, 55.0, 17.25], [0, 0, 1]]])
cameras = Cameras(viewmats, Ks, 71, 43)
out = rasterize_gaussians(means, quats, scales, opacities, (sh0, shN), cameras, sh_degree=2, extras=("depth",))
(out.rgb.square().sum() + out.alpha.sum() + out.depth.sum()).backward()
leaves = (means, quats, scales, opacities, sh0, shN)
torch.save([out.rgb.detach(), out.alpha.detach(), *(leaf.grad for leaf in leaves)], sys.argv[1])
"""


@pytest.mark.skipif(module.kernels is None, reason="no compiled kernels")
def test_every_build_draws_what_the_reference_draws(tmp_path: Path) -> None:
    """The other tests run only the build that this machine prefers."""
    results = {}
    for name in ("reference", *module.LEVELS):
        try:
            module.load_kernels(name)
        except ValueError:  # not on this machine
            continue
        env = os.environ | {"PRISMFIELD_KERNELS": name}
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / name)], check=True, env=env)
        results[name] = torch.load(tmp_path / name)
    expected = results.pop("reference")
    assert expected[1].max() > 0.9
    assert platform.machine() != "x86_64" or results
    for name, result in results.items():
        for got, wanted in zip(result, expected, strict=True):
            tolerance = 1e-4 * wanted.abs().max().item()
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=tolerance, msg=lambda text: f"{name}: {text}")  # noqa: B023
