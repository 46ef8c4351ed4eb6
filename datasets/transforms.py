"""`transforms.json` captures: Blender / NeRF-synthetic, instant-ngp and nerfstudio.

One reader for all three; they differ in which intrinsics they give and in how the split is told. Poses are camera to
world in OpenGL axes (x right, y up, looking along -z).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.base import Frame
from prismfield.datasets.capture import CameraSpec, Capture, Notes, image_infos, make_frame
from prismfield.datasets.clouds import read_cloud
from prismfield.datasets.images import ImageInfo, find_image
from prismfield.datasets.lens import Lens

_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
_CLOUDS = ("points3D.ply", "sparse_pc.ply")
# all are cases of OpenCV's rational model; what a file does not state is zero
_PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "FULL_OPENCV", "PERSPECTIVE")
_FISHEYE = ("OPENCV_FISHEYE", "FISHEYE", "SIMPLE_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")


def is_transforms(root: Path) -> bool:
    """Whether a folder holds a capture of this kind."""
    return (root / "transforms.json").is_file() or (root / "transforms_train.json").is_file()


def read_transforms(path: Path) -> Capture:
    """Read a folder, or one `transforms*.json`.

    `transforms_train.json` and `transforms_test.json` (else `_val`) beside `transforms.json` are the split; else
    nerfstudio's `train_filenames` and `test_filenames` (else `val_filenames`).

    Raises:
        FileNotFoundError: the file, or images that it names, are missing.
        ValueError: it is no valid JSON, a field is not usable, or a pose or size is wrong; names the frame.
    """
    root = path if path.is_dir() else path.parent
    main = path if path.is_file() else root / "transforms.json"
    named_by_user = path.is_file() and path.name not in ("transforms.json", "transforms_train.json")
    train_file = root / "transforms_train.json"
    if train_file.is_file() and not named_by_user:
        test_file = next(
            (root / f"transforms_{s}.json" for s in ("test", "val") if (root / f"transforms_{s}.json").is_file()), None
        )
        tables = [_load(train_file)] + ([_load(test_file)] if test_file else [])
        entries = [(table, entry) for table in tables for entry in _entries(table, root)]
        in_train = len(_entries(tables[0], root))
        keys = {_key(entry) for _, entry in entries[:in_train]}
        leaked = [_key(entry) for _, entry in entries[in_train:] if _key(entry) in keys]
        if leaked:
            raise ValueError(
                f"{root}: transforms_train.json and {test_file.name if test_file else ''} share {leaked[0]!r}"
            )
        return _read(root, main if main.is_file() else train_file, entries, in_train if test_file else None)
    table = _load(main)
    entries = [(table, entry) for entry in _entries(table, root)]
    if "train_filenames" in table:
        train, test = (
            set(table["train_filenames"]),
            set(table.get("test_filenames") or table.get("val_filenames") or []),
        )
        ordered = [e for e in entries if _key(e[1]) in train]
        count = len(ordered)
        ordered += [e for e in entries if _key(e[1]) in test - train]
        return _read(root, main, ordered, count)
    return _read(root, main, entries, None)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a JSON object with frames, got {type(table).__name__}")
    return table


def _entries(table: dict[str, Any], root: Path) -> list[dict[str, Any]]:
    frames = table.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{root}: expected a non-empty list 'frames' in transforms.json")
    if any(not isinstance(f, dict) or not isinstance(f.get("file_path"), str) for f in frames):
        raise ValueError(f"{root}: every entry of 'frames' needs a 'file_path'")
    return frames


def _key(entry: dict[str, Any]) -> str:
    return str(entry["file_path"])


def _read(
    root: Path, main: Path, entries: list[tuple[dict[str, Any], dict[str, Any]]], in_train: int | None
) -> Capture:
    notes = Notes()
    paths = {_key(entry): find_image(root / _key(entry)) for _, entry in entries}
    if len(paths) < len(entries):
        notes.say(
            f"{len(entries) - len(paths)} frames name an image that another frame has named; the first of each is kept"
        )
    infos = image_infos(paths, root)
    files = {key: path for key, path in paths.items() if path is not None}
    names = _short_names(files, root)
    frames: dict[str, Frame] = {}
    train_count = 0
    for index, (table, entry) in enumerate(entries):
        key = _key(entry)
        if key in frames:
            continue
        frames[key] = _frame(root, table, entry, names[key], (files[key], infos[key]), notes)
        train_count += in_train is None or index < in_train
    ordered = list(frames.values())
    table = entries[0][0]
    blender = "fl_x" not in table and "fl_x" not in entries[0][1] and not PurePosixPath(_key(entries[0][1])).suffix
    capture = Capture(
        kind="blender" if blender else "transforms",
        train=ordered[:train_count],
        test=ordered[train_count:],
        split=None if in_train is None else "the files' own",
        has_alpha=any(info.has_alpha for info in infos.values()),
        notes=notes,
    )
    cloud = _cloud_path(root, [_load(main), *(table for table, _ in entries)], notes)
    if cloud is not None:
        capture.xyz, capture.rgb = read_cloud(cloud)
    return capture


def _short_names(files: dict[str, Path], root: Path) -> dict[str, str]:
    """Paths relative to the deepest folder that holds all images."""
    relative = {
        key: PurePosixPath((path.relative_to(root) if path.is_relative_to(root) else path).as_posix())
        for key, path in files.items()
    }
    parents = [path.parent.parts for path in relative.values()]
    shared = 0
    while all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
        shared += 1
    return {key: "/".join(path.parts[shared:]) for key, path in relative.items()}


def _frame(
    root: Path,
    table: dict[str, Any],
    entry: dict[str, Any],
    name: str,
    image: tuple[Path, ImageInfo],
    notes: Notes,
) -> Frame:
    values = {**table, **{k: v for k, v in entry.items() if v is not None}}
    depth = None
    if values.get("depth_file_path"):
        depth = (root / str(values["depth_file_path"]), _number(name, values, "depth_scale", 1e-3))  # nerfstudio: mm
    return make_frame(
        name,
        image,
        _pose(name, entry.get("transform_matrix")),
        _spec(name, values, image[1]),
        notes,
        mask_path=root / str(values["mask_path"]) if values.get("mask_path") else None,
        time=_number(name, values, "time", None),
        depth=depth,
    )


def _pose(name: str, rows: Any) -> NDArray[np.float64]:
    try:
        matrix = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{name}: transform_matrix: expected 4 rows of 4 numbers, got shape {list(matrix.shape)}")
    return np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]]) @ _OPENGL_TO_OPENCV


def _number(name: str, values: Mapping[str, Any], key: str, default: float | None) -> Any:
    value = values.get(key, default)
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: {key}: expected a number, got {value!r}") from None


def _spec(name: str, values: Mapping[str, Any], info: ImageInfo) -> CameraSpec:
    """Intrinsics of a frame: its own entries first, then those that all share."""
    width, height = int(_number(name, values, "w", info.width)), int(_number(name, values, "h", info.height))
    if width < 1 or height < 1:
        raise ValueError(f"{name}: w, h: expected a size of at least 1x1, got {width}x{height}")
    fx = _focal(name, values, "x", width)
    fy = _focal(name, values, "y", height)
    if fx is None and fy is None:
        raise ValueError(f"{name}: expected fl_x or camera_angle_x in transforms.json, got neither")
    fx, fy = fx if fx is not None else fy, fy if fy is not None else fx
    assert fx is not None and fy is not None
    cx, cy = _number(name, values, "cx", width / 2), _number(name, values, "cy", height / 2)
    return CameraSpec(fx, fy, cx, cy, _lens(name, values), (width, height))


def _focal(name: str, values: Mapping[str, Any], axis: str, pixels: int) -> float | None:
    focal = _number(name, values, f"fl_{axis}", None)
    if focal is not None:
        return focal
    angle = _number(name, values, f"camera_angle_{axis}", None)
    if angle is None:
        return None
    if not 0 < angle < math.pi:
        raise ValueError(f"{name}: camera_angle_{axis}: expected radians between 0 and pi, got {angle}")
    return 0.5 * pixels / math.tan(0.5 * angle)


def _lens(name: str, values: Mapping[str, Any]) -> Lens:
    model = str(values.get("camera_model", "OPENCV_FISHEYE" if values.get("is_fisheye") else "OPENCV")).upper()
    names = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
    k1, k2, k3, k4, k5, k6, p1, p2 = (float(_number(name, values, key, 0.0)) for key in names)
    if model in _FISHEYE:
        if p1 or p2:
            return Lens("thin_prism_fisheye", (k1, k2, p1, p2, k3, k4, 0.0, 0.0))
        return Lens("fisheye", (k1, k2, k3, k4))
    if model == "THIN_PRISM_FISHEYE":
        sx1, sy1 = (float(_number(name, values, k, 0.0)) for k in ("sx1", "sy1"))
        return Lens(model.lower(), (k1, k2, p1, p2, k3, k4, sx1, sy1))
    if model not in _PERSPECTIVE:
        known = ", ".join([*_PERSPECTIVE, *_FISHEYE, "THIN_PRISM_FISHEYE"])
        raise ValueError(f"{name}: camera_model: expected one of {known}, got {model!r}")
    coefficients = (k1, k2, p1, p2, k3, k4, k5, k6)
    return Lens("opencv", coefficients) if any(coefficients) else Lens("pinhole")


def _cloud_path(root: Path, tables: list[dict[str, Any]], notes: Notes) -> Path | None:
    named = next((table["ply_file_path"] for table in tables if table.get("ply_file_path")), None)
    if named:
        if (root / str(named)).is_file():
            return root / str(named)
        notes.say(f"the point cloud {named} named by transforms.json is missing")
    return next((root / name for name in _CLOUDS if (root / name).is_file()), None)
