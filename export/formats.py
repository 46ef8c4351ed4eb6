"""Which files each representation can become, and what a file can become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import Asset, ConvexAsset, SplatAsset
from prismfield.export.convex_ply import ELEMENT, convex_ply_bytes, read_convex_ply, write_convex_ply
from prismfield.export.mesh import write_glb, write_obj
from prismfield.export.pfz import read_pfz
from prismfield.export.ply import ply_bytes, read_ply, write_ply
from prismfield.export.ply_file import read_header
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.representations.convexes_from_gaussians import convexes_from_gaussians


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    about: str
    write: Callable[[Path, Any], str | None]
    """Write an asset, compare what comes back; what is in it, in words, where that is not the asset."""
    read: Callable[[Path], Asset] | None = None
    """The asset again; None if the file does not hold all of it."""
    size: Callable[[Any], int] | None = None
    """Bytes of the file of an asset, without writing it."""


ASSETS: dict[str, type[Asset]] = {asset.representation: asset for asset in (SplatAsset, ConvexAsset)}
"""What leaves a scene, by representation; those that are missing are of no use outside."""

FORMATS: dict[str, dict[str, Format]] = {
    "gaussians": {".ply": Format("the layout of 3D Gaussian Splatting (INRIA)", write_ply, read_ply, ply_bytes)},
    "convexes": {
        ".ply": Format("all of them, in a layout of our own", write_convex_ply, read_convex_ply, convex_ply_bytes),
        ".glb": Format("a mesh of their hulls", write_glb),
        ".obj": Format("a mesh of their hulls, without opacity", write_obj),
    },
}
"""By representation and suffix. Each can be read and written as .ply."""

CONVERSIONS: dict[tuple[str, str], Callable[[dict[str, Tensor], Any], dict[str, Tensor]]] = {
    ("gaussians", "convexes"): lambda tensors, config: convexes_from_gaussians(tensors, config.points)
}
"""From the tensors of one representation to those of another, with its config."""


def asset_of(scene: Representation, frame: SceneFrame) -> Asset:
    """The primitives of a scene, moved from its `frame` to the user's.

    Raises:
        ValueError: it is not made of any, or a value is not finite.
    """
    name = next((name for name, kind in REPRESENTATIONS.items() if type(scene) is kind), "")
    if name not in ASSETS:
        nouns = " or ".join(asset.noun for asset in ASSETS.values())
        raise ValueError(f"{type(scene).__name__} is not made of {nouns}")
    return ASSETS[name].from_scene(scene, frame)


def read_asset(path: Path) -> Asset:
    """Read a .ply; its header says of what.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    if path.suffix.lower() == ".pfz":
        return read_pfz(path)
    with path.open("rb") as file:
        try:
            names = {element.name for element in read_header(file).elements}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return read_convex_ply(path) if ELEMENT in names else read_ply(path)


def tensors_of(asset: Asset, representation: str, frame: SceneFrame, config: Any) -> dict[str, Tensor]:
    """What `from_tensors` of `representation` takes, in the frame of a scene; converted where it holds something else.

    Args:
        asset: what was read.
        representation: a name in `REPRESENTATIONS`.
        frame: of the scene to train.
        config: of the representation.

    Raises:
        ValueError: such a thing cannot become that representation.
    """
    held = asset.representation
    if held != representation and (held, representation) not in CONVERSIONS:
        able = [held, *(to for start, to in CONVERSIONS if start == held)]
        raise ValueError(f"expected --representation {' or '.join(able)}, got {representation}")
    tensors = asset.to_tensors(frame, sh_degree=config.sh_degree)
    return tensors if held == representation else CONVERSIONS[held, representation](tensors, config)
