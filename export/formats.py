"""Which files each representation can become, and what a file can become."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import Asset, ConvexAsset, SplatAsset
from prismfield.export.compressed_ply import MARK, read_compressed_ply, write_compressed_ply
from prismfield.export.compression.pfz import read_pfz
from prismfield.export.compression.pfz_write import write_pfz
from prismfield.export.convex_ply import ELEMENT, convex_ply_bytes, read_convex_ply, write_convex_ply
from prismfield.export.ksplat import read_ksplat
from prismfield.export.lods.streamed import LOD_META, write_streamed
from prismfield.export.lods.streamed_read import read_streamed
from prismfield.export.meshes.hulls import write_glb, write_obj
from prismfield.export.ply import ply_bytes, read_ply, write_ply
from prismfield.export.ply_file import read_header
from prismfield.export.reading import naming
from prismfield.export.sog import read_sog, write_sog
from prismfield.export.sog_files import META
from prismfield.export.splat import read_splat, write_splat
from prismfield.export.splat_glb import read_splat_glb, write_splat_glb
from prismfield.export.spz import read_spz, write_spz
from prismfield.representations.base import REPRESENTATIONS, Representation
from prismfield.representations.convexes_from_gaussians import convexes_from_gaussians


@dataclass(frozen=True)
class WriteOptions:
    """What a writer can be told beside the asset; None leaves it to the format. `Format.options` names those it heeds."""

    spz_version: Literal[3, 4] | None = None
    """Of an .spz: 3, which most programs read, or 4."""
    spz_sh_bits: tuple[int, int] | None = None
    """Of an .spz: bits of harmonics of degree 1, and of higher ones."""
    sog_palette: int | None = None
    """Of a .sog: how many sets of harmonics its Gaussians share, 65,536 at most; of a streamed one, in each chunk."""
    levels: int | None = None
    """Of a streamed SOG: how many levels of detail, the finest among them."""
    chunk_splats: int | None = None
    """Of a streamed SOG: how many Gaussians a chunk has at most."""


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    about: str
    write: Callable[[Path, Any, WriteOptions], str | None] | None = None
    """Write an asset, compare what comes back; what is in it, in words, where that is not the asset. None: only read."""
    read: Callable[[Path], Asset] | None = None
    """The asset again; None if the file does not hold all of it."""
    size: Callable[[Any], int] | None = None
    """Bytes of the file of an asset, without writing it."""
    floor: float = 50.0
    """PSNR, decibels: a file read back that looks less like what the format can hold of the asset is not kept."""
    max_degree: int = 3
    """Of the harmonics that it holds."""
    is_folder: bool = False
    """Whether `write` makes a folder; its files go where the name says."""
    holds_antialiased: bool = True
    """Whether it says how the splats are drawn."""
    options: tuple[str, ...] = ()
    """Fields of `WriteOptions` that it heeds."""


ASSETS: dict[str, type[Asset]] = {asset.representation: asset for asset in (SplatAsset, ConvexAsset)}
"""What leaves a scene, by representation; those that are missing are of no use outside."""

_DEFAULT_SPZ_VERSION: Literal[3] = 3
_DEFAULT_SPZ_BITS = (5, 4)


def _as_spz(path: Path, asset: SplatAsset, options: WriteOptions) -> None:
    write_spz(path, asset, options.spz_version or _DEFAULT_SPZ_VERSION, options.spz_sh_bits or _DEFAULT_SPZ_BITS)


def _plain(write: Callable[[Path, Any], str | None]) -> Callable[[Path, Any, WriteOptions], str | None]:
    """Of a writer that has no options."""
    return lambda path, asset, _: write(path, asset)


_SOG = Format(
    "PlayCanvas's, a picture for each property",
    lambda path, asset, options: write_sog(path, asset, options.sog_palette),
    read_sog,
    floor=30.0,
    options=("sog_palette",),
)

_STREAMED = Format(
    "PlayCanvas's streamed SOG: levels of detail in chunks",
    lambda path, asset, options: write_streamed(path, asset, options.levels, options.chunk_splats, options.sog_palette),
    read_streamed,
    floor=30.0,
    is_folder=True,
    options=("sog_palette", "levels", "chunk_splats"),
)

FORMATS: dict[str, dict[str, Format]] = {
    "gaussians": {
        ".ply": Format("the layout of 3D Gaussian Splatting (INRIA)", _plain(write_ply), read_ply, ply_bytes),
        ".compressed.ply": Format(
            "PlayCanvas's packed .ply", _plain(write_compressed_ply), read_compressed_ply, floor=35.0
        ),
        ".spz": Format("Niantic's", _as_spz, read_spz, floor=30.0, options=("spz_version", "spz_sh_bits")),
        ".sog": _SOG,
        "_sog": replace(_SOG, about="the files of a .sog in a folder NAME_sog", is_folder=True),
        "meta.json": replace(_SOG, about="the files of a .sog beside each other", is_folder=True),
        "_lod": replace(_STREAMED, about="a streamed SOG, levels of detail, in a folder NAME_lod"),
        "lod-meta.json": _STREAMED,
        ".glb": Format("glTF with KHR_gaussian_splatting, y up", _plain(write_splat_glb), read_splat_glb),
        ".ksplat": Format("GaussianSplats3D's", read=read_ksplat),
        ".pfz": Format("our smallest", _plain(write_pfz), read_pfz, floor=32.0),
        ".splat": Format(
            "32 bytes each, the same colour from everywhere",
            _plain(write_splat),
            read_splat,
            floor=35.0,
            max_degree=0,
            holds_antialiased=False,
        ),
    },
    "convexes": {
        ".ply": Format(
            "all of them, in a layout of our own", _plain(write_convex_ply), read_convex_ply, convex_ply_bytes
        ),
        ".glb": Format("a mesh of their hulls", _plain(write_glb)),
        ".obj": Format("a mesh of their hulls, without opacity", _plain(write_obj)),
    },
}
"""By representation and what the file's name ends with, of which the longest counts. Each can be read and written as .ply."""

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


def ending(path: Path, known: Iterable[str]) -> str | None:
    """The longest of the `known` endings of names that `path` has, whatever its case; None if it has none.

    One that begins with neither a dot nor an underscore is a whole name.
    """
    name = path.name.lower()
    found = (end for end in known if (name.endswith(end) if end[0] in "._" else name == end))
    return max(found, key=len, default=None)


def is_asset(path: Path) -> bool:
    """Whether `path` is something for `read_asset`: a name that it knows, or a folder with the files of a .sog, not of a run."""
    if path.is_dir():
        return _in_folder(path) is not None and not (path / "config.json").exists()
    return ending(path, _readers()) is not None


def is_streamed(path: Path) -> bool:
    """Whether `path` is a streamed SOG, which has levels of detail of its own."""
    return (_in_folder(path) if path.is_dir() else path.name.lower()) == LOD_META


def _in_folder(path: Path) -> str | None:
    return next((name for name in (LOD_META, META) if (path / name).is_file()), None)


def read_asset(path: Path) -> Asset:
    """Read a file of primitives. Its name says of which format; of which kind a .ply is, its header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line saying what is wrong with it.
    """
    readers = _readers()
    end = (_in_folder(path) or META) if path.is_dir() else ending(path, readers)
    if end is None:
        raise ValueError(f"{path}: expected a file whose name ends with {', '.join(readers)}")
    if not end.endswith(".ply"):
        return readers[end](path)
    with path.open("rb") as file, naming(path):
        elements = {element.name: element for element in read_header(file).elements}
    if ELEMENT in elements:
        return read_convex_ply(path)
    is_packed = "vertex" in elements and MARK in dict(elements["vertex"].properties)
    return read_compressed_ply(path) if is_packed else read_ply(path)


def _readers() -> dict[str, Callable[[Path], Asset]]:
    """By ending."""
    return {end: form.read for formats in FORMATS.values() for end, form in formats.items() if form.read is not None}


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
