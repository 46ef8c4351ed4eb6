"""The worked examples of CONTRIBUTING.md: each is real, and does what its section says."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from prismfield.export.assets import SplatAsset
from prismfield.export.verify import differences
from prismfield.render import kernels as kernels_module
from prismfield.render.ops.sh import C0
from prismfield.representations.base import Representation

from . import test_conformance as conformance

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(python|cpp) (\w+)\n(.*?)^```$", re.M | re.S)


def blocks(language: str, section: str) -> str:
    """The code of a section, each line where the document has it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = [match for match in BLOCK.finditer(text) if match[1] == language and match[2] == section]
    assert found, f"no {language} block of {section}"
    code = ""
    for match in found:
        code += "\n" * (text.count("\n", 0, match.start(3)) - code.count("\n")) + match[3]
    return code


def run_example(section: str) -> ModuleType:
    """A section's Python as a module."""
    module = ModuleType(f"example_{section}")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(blocks("python", section), str(ROOT / "CONTRIBUTING.md"), "exec"), module.__dict__)
    return module


def test_every_block_is_tried_here() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tried = {
        ("python", "representation"),
        ("python", "encoding"),
        ("python", "op"),
        ("cpp", "op"),
        ("python", "format"),
    }
    assert set(re.findall(r"^```(\w+) ?(\w*)$", text, re.M)) == tried


CONFORMANCE = [name for name in vars(conformance) if name.startswith("test_") and "export" not in name]


@pytest.mark.parametrize("name", CONFORMANCE)
def test_the_representation_conforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = run_example("representation")
    config = example.DotsConfig()
    monkeypatch.setitem(conformance.REPRESENTATIONS, "dots", example.Dots)
    monkeypatch.setitem(conformance.CONFIGS, "dots", config)
    monkeypatch.setattr(conformance, "SPLATS", conformance.SPLATS | {"dots"})
    torch.manual_seed(0)
    scene: Representation = example.Dots.from_points(*conformance.make_points(), config)
    with torch.no_grad():
        for tensor in scene.tensors().values():
            tensor += 0.05 * torch.randn(tensor.shape)
        scene.tensors()["opacity_logits"] += 1
    values: dict[str, Any] = {"kind": "dots", "scene": scene, "device": torch.device("cpu")}
    test = getattr(conformance, name)
    test(**{parameter: values[parameter] for parameter in inspect.signature(test).parameters})


def test_the_representation_starts_with_the_colours_of_the_points() -> None:
    example = run_example("representation")
    xyz, rgb, aabb = conformance.make_points()
    scene = example.Dots.from_points(xyz, rgb, aabb, example.DotsConfig())
    torch.testing.assert_close(scene.sh0[:, 0] * C0 + 0.5, rgb)


def test_the_encoding() -> None:
    """The mean product of two codes is a Gaussian of the distance: what the random waves are for."""
    torch.manual_seed(0)
    encoding = run_example("encoding").Fourier(3, 20_000, 0.5)
    x, y = torch.tensor([[0.3, 0.1, 0.7]]), torch.tensor([[0.5, 0.2, 0.4]])
    assert encoding(x).shape == (1, encoding.out_dim)
    likeness = (encoding(x) * encoding(y)).sum() / 20_000
    wanted = np.exp(-0.5 * (2 * np.pi * 0.5) ** 2 * 0.14)  # the squared distance is 0.14
    assert float(likeness) == pytest.approx(wanted, abs=0.02)


@pytest.fixture(scope="module")
def tone_kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The C++ of the section, compiled by itself."""
    nanobind = pytest.importorskip("nanobind", reason="nanobind is not installed: pip install -e '.[dev]'")
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("compiles as on Linux, with c++")
    folder = tmp_path_factory.mktemp("tone")
    declared = "namespace pf { void bind_tone(nanobind::module_ &m); }\n"
    source = declared + blocks("cpp", "op") + "NB_MODULE(tone_kernel, m) { pf::bind_tone(m); }\n"
    (folder / "tone.cpp").write_text("#include <nanobind/nanobind.h>\n" + source)
    home = Path(nanobind.include_dir()).parent
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"]
    includes = [ROOT / "render" / "csrc", sysconfig.get_path("include")]
    system = [home / "include", home / "ext" / "robin_map" / "include"]
    command = [compiler, *flags, *(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)]
    command += [str(folder / "tone.cpp"), str(home / "src" / "nb_combined.cpp"), "-o", str(folder / "tone_kernel.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(folder))
    try:
        return __import__("tone_kernel")
    finally:
        sys.path.remove(str(folder))


def test_the_op(tone_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "kernels", tone_kernel)
    example = run_example("op")
    example.test_tone_map_against_the_reference()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"rgb: expected \[R, 3\]"):
        example.tone_map(torch.rand(3))
    monkeypatch.setattr(example, "kernels_of", lambda tensor: None)  # it is the kernel that ran above
    with pytest.raises(AttributeError):
        example.tone_map(torch.rand(1, 3))


def test_the_format(tmp_path: Path) -> None:
    example = run_example("format")
    random = np.random.default_rng(0)
    quats = random.normal(size=(7, 4)).astype(np.float32)
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    shapes = {"means": (7, 3), "scales": (7, 3), "opacities": (7,), "sh": (7, 4, 3)}
    asset = SplatAsset(quats=quats, **{name: random.random(shape, np.float32) for name, shape in shapes.items()})
    path = tmp_path / "scene.npz"
    example.write_npz(path, asset)
    assert set(differences(asset, example.read_npz(path)).values()) == {0.0}
    whole = path.read_bytes()
    for content in (b"", b"ply\n", whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"scene\.npz: not a \.npz of Gaussians"):
            example.read_npz(path)
    np.savez(path, means=asset.means)
    with pytest.raises(ValueError, match="quats"):
        example.read_npz(path)
    with pytest.raises(FileNotFoundError):
        example.read_npz(tmp_path / "none.npz")
