"""Prismfield: train, look at and ship neural scene representations.

    import prismfield as pf

    scene = pf.load("runs/garden/2026-01-31_120000")  # or pf.load("scene.ply")
    for camera in scene.cameras("test"):
        rgb = pf.render(scene, camera).rgb[0]  # [H, W, 3], 0..1

`load`, `render`, `Scene`: trained scenes, drawn; `Cameras`, `RenderOutput`: what goes in and comes out, in the user's
frame: the axes and units of the capture's files. `load_scene`: photographs with poses. `TrainConfig`, `train_run`: what
`render-train` does. Nothing heavy is imported before it is used. docs/evaluate-export.md has more.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = [
    "Cameras",
    "RenderOutput",
    "Scene",
    "TrainConfig",
    "__version__",
    "load",
    "load_scene",
    "render",
    "train_run",
]

_HOMES = {
    "Cameras": "render.cameras",
    "RenderOutput": "render.output",
    "Scene": "export.library",
    "TrainConfig": "train.config",
    "load": "export.library",
    "load_scene": "datasets.scenes",
    "train_run": "train.cli",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("prismfield")
        except metadata.PackageNotFoundError:
            return "0+source"
    if name in _HOMES:
        value = getattr(importlib.import_module(f"prismfield.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'prismfield' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RenderPackage(ModuleType):
    """`prismfield.render` is a folder of modules, and the function that draws a scene: see `export/library.py`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from prismfield.export.library import render

        return render(*args, **kwargs)


importlib.import_module("prismfield.render")
sys.modules["prismfield.render"].__class__ = _RenderPackage
sys.modules["prismfield.render"].__doc__ = "`render(scene, cameras)` draws a scene; in it, the modules that do."
