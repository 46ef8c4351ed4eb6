"""The worked examples of CONTRIBUTING.md: each is real, and does what its section says."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismfield.export.assets import SplatAsset
from prismfield.export.verify import differences
from prismfield.render.ops.sh import C0
from prismfield.representations.base import Representation

from . import test_conformance as conformance
from .pages import marked_blocks, run_example

PAGE = "CONTRIBUTING.md"


def test_every_block_is_tried_here() -> None:
    assert marked_blocks(PAGE) == {("python", "representation"), ("python", "format")}


CONFORMANCE = [name for name in vars(conformance) if name.startswith("test_") and "export" not in name]


@pytest.mark.parametrize("name", CONFORMANCE)
def test_the_representation_conforms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = run_example(PAGE, "representation")
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
    example = run_example(PAGE, "representation")
    xyz, rgb, aabb = conformance.make_points()
    scene = example.Dots.from_points(xyz, rgb, aabb, example.DotsConfig())
    torch.testing.assert_close(scene.sh0[:, 0] * C0 + 0.5, rgb)


def test_the_format(tmp_path: Path) -> None:
    example = run_example(PAGE, "format")
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
