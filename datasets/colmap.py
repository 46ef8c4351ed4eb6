"""COLMAP projects: `sparse/0` in binary or text, with `images/` beside it.

Layout of the files: https://colmap.github.io/format.html. Poses are world to camera in OpenCV axes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.capture import CameraSpec, Capture, Notes, image_infos, make_frame, name_some
from prismfield.datasets.images import EXTENSIONS
from prismfield.datasets.lens import LENSES, Lens

_SUBFOLDERS = ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", "")


@dataclass(frozen=True)
class _Model:
    """A camera model: its id in binary files, and what its parameters are."""

    number: int
    focals: int
    """1: one focal length for both axes. The principal point follows, then the lens."""
    lens: str
    """A name in `lens.LENSES` or "pinhole"."""
    coefficients: int
    """How many follow; the lens's remaining ones are zero."""

    @property
    def params(self) -> int:
        """Numbers stored for a camera."""
        return self.focals + 2 + self.coefficients


# ids as in COLMAP's src/colmap/sensor/models.h
_MODELS = {
    "SIMPLE_PINHOLE": _Model(0, 1, "pinhole", 0),
    "PINHOLE": _Model(1, 2, "pinhole", 0),
    "SIMPLE_RADIAL": _Model(2, 1, "opencv", 1),
    "RADIAL": _Model(3, 1, "opencv", 2),
    "OPENCV": _Model(4, 2, "opencv", 4),
    "OPENCV_FISHEYE": _Model(5, 2, "fisheye", 4),
    "FULL_OPENCV": _Model(6, 2, "opencv", 8),
    "FOV": _Model(7, 2, "fov", 1),
    "SIMPLE_RADIAL_FISHEYE": _Model(8, 1, "fisheye", 1),
    "RADIAL_FISHEYE": _Model(9, 1, "fisheye", 2),
    "THIN_PRISM_FISHEYE": _Model(10, 2, "thin_prism_fisheye", 8),
    "RAD_TAN_THIN_PRISM_FISHEYE": _Model(11, 2, "rad_tan_thin_prism_fisheye", 12),
    "SIMPLE_DIVISION": _Model(12, 1, "division", 1),
    "DIVISION": _Model(13, 2, "division", 1),
    "SIMPLE_FISHEYE": _Model(14, 1, "fisheye", 0),
    "FISHEYE": _Model(15, 2, "fisheye", 0),
    "EUCM": _Model(16, 2, "eucm", 2),
}
_BY_ID = {model.number: name for name, model in _MODELS.items()}


@dataclass(frozen=True)
class ColmapCamera:
    """One entry of `cameras.bin`."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass(frozen=True)
class ColmapImage:
    """One registered image of `images.bin`."""

    name: str
    camera_id: int
    quat: tuple[float, float, float, float]
    """wxyz, world to camera."""
    translation: tuple[float, float, float]


@dataclass(frozen=True)
class ColmapModel:
    """A reconstruction, without its tracks."""

    cameras: dict[int, ColmapCamera]
    images: list[ColmapImage]
    xyz: NDArray[np.float64]
    """[P, 3]."""
    rgb: NDArray[np.uint8]
    """[P, 3]."""


def find_model(root: Path) -> Path | None:
    """The folder of the reconstruction in a project (the one with most images if there are several), or None."""
    for subfolder in _SUBFOLDERS:
        folder = root / subfolder
        if _is_model(folder):
            siblings = (
                [f for f in folder.parent.iterdir() if f.name.isdigit() and _is_model(f)] if folder.name == "0" else []
            )
            return max(siblings, key=lambda f: (_image_count(f), f.name == "0"), default=folder)
    return None


def _is_model(folder: Path) -> bool:
    return any((folder / f"cameras{s}").is_file() and (folder / f"images{s}").is_file() for s in (".bin", ".txt"))


def _image_count(folder: Path) -> int:
    if (folder / "images.bin").is_file():
        with (folder / "images.bin").open("rb") as file:
            return int.from_bytes(file.read(8), "little")
    return len(_text_images(folder / "images.txt"))


def read_colmap(root: Path) -> Capture:
    """Read a COLMAP project.

    Masks lie in `masks/` as `<image name>.png` (COLMAP's convention) or under the image's own name with `.png`.

    Raises:
        FileNotFoundError: no reconstruction, or registered images are missing.
        ValueError: a file is damaged, a camera model unknown, or a pose, focal length or size wrong; names the culprit.
    """
    folder = find_model(root)
    if folder is None:
        raise FileNotFoundError(f"{root}: no COLMAP reconstruction (expected cameras.bin and images.bin in sparse/0)")
    model = read_model(folder)
    if not model.images:
        raise ValueError(f"{folder}: the reconstruction has no registered images")
    notes = Notes()
    others = [
        f.name
        for f in folder.parent.iterdir()
        if folder.name.isdigit() and f.name.isdigit() and f != folder and _is_model(f)
    ]
    if others:
        notes.say(
            f"the project has {len(others) + 1} reconstructions; {folder.name} with {len(model.images)} images is used"
        )
    images = root / "images" if (root / "images").is_dir() else root
    infos = image_infos({image.name: images / image.name for image in model.images}, images)
    specs = {number: _spec(number, camera) for number, camera in model.cameras.items()}
    frames = []
    for image in sorted(model.images, key=lambda image: image.name):
        if image.camera_id not in specs:
            raise ValueError(f"{image.name}: its camera {image.camera_id} is not in {folder / 'cameras'}.*")
        source = (images / image.name, infos[image.name])
        mask = _mask(root / "masks", image.name)
        frames.append(make_frame(image.name, source, _camtoworld(image), specs[image.camera_id], notes, mask_path=mask))
    registered = {image.name for image in model.images}
    if images != root:
        files = (p for p in images.rglob("*") if p.suffix.lower() in EXTENSIONS)
        unregistered = sorted(n for p in files if (n := p.relative_to(images).as_posix()) not in registered)
        if unregistered:
            notes.say(f"not registered by COLMAP, so not used: {name_some(unregistered)}")
    has_alpha = any(info.has_alpha for info in infos.values())
    return Capture("colmap", frames, [], None, has_alpha, model.xyz, model.rgb, notes)


def _mask(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.png", (folder / name).with_suffix(".png"))
    return next((path for path in candidates if path.is_file()), None)


def _camtoworld(image: ColmapImage) -> NDArray[np.float64]:
    quat = np.asarray(image.quat)
    norm = float(np.linalg.norm(quat))
    if not (np.isfinite(norm) and abs(norm - 1) < 1e-2 and np.isfinite(image.translation).all()):
        raise ValueError(
            f"{image.name}: pose: expected a unit quaternion and a finite translation, "
            f"got {image.quat}, {image.translation}"
        )
    w, x, y, z = quat / norm
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ np.asarray(image.translation)
    return pose


def _spec(number: int, camera: ColmapCamera) -> CameraSpec:
    """Intrinsics of a camera."""
    model, params = _MODELS[camera.model], camera.params
    if not np.isfinite(params).all():
        raise ValueError(f"camera {number} ({camera.model}): expected finite parameters, got {params}")
    if model.lens == "pinhole" or (model.lens == "opencv" and not any(params[model.focals + 2 :])):
        lens = Lens("pinhole")
    else:
        padding = (0.0,) * (LENSES[model.lens][0] - model.coefficients)
        lens = Lens(model.lens, params[model.focals + 2 :] + padding)
    cx, cy = params[model.focals : model.focals + 2]
    return CameraSpec(params[0], params[model.focals - 1], cx, cy, lens, (camera.width, camera.height))


def read_model(folder: Path) -> ColmapModel:
    """Cameras, registered images and points of a reconstruction, binary files before text ones.

    Raises:
        ValueError: a file is truncated or not in COLMAP's format. Counts are checked against the file's size
            before anything is allocated.
    """
    binary = (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file()
    if binary:
        cameras, images = _binary_cameras(folder / "cameras.bin"), _binary_images(folder / "images.bin")
    else:
        cameras, images = _text_cameras(folder / "cameras.txt"), _text_images(folder / "images.txt")
    if (folder / "points3D.bin").is_file():
        xyz, rgb = _binary_points(folder / "points3D.bin")
    elif (folder / "points3D.txt").is_file():
        xyz, rgb = _text_points(folder / "points3D.txt")
    else:
        xyz, rgb = np.empty((0, 3)), np.empty((0, 3), np.uint8)
    return ColmapModel(cameras, images, xyz, rgb)


class _Reader:
    """Little-endian values from a file in memory; running out of bytes is an error that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, layout: struct.Struct) -> tuple:
        try:
            values = layout.unpack_from(self.data, self.at)
        except struct.error:
            raise self.truncated() from None
        self.at += layout.size
        return values

    def count(self, least: int) -> int:
        """A number of records of at least `least` bytes each, checked against what is left of the file."""
        (number,) = self.take(_U64)
        if number * least > len(self.data) - self.at:
            raise self.truncated()
        return number

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise self.truncated()
        self.at += size

    def truncated(self) -> ValueError:
        return ValueError(
            f"{self.path}: truncated or damaged: {len(self.data)} bytes are fewer than its counts ask for"
        )


_U64 = struct.Struct("<Q")
_CAMERA = struct.Struct("<iiQQ")
_IMAGE = struct.Struct("<i4d3di")
_POINT = struct.Struct("<Q3d3BdQ")
_OBSERVATION_BYTES = 24
_TRACK_BYTES = 8


def _binary_cameras(path: Path) -> dict[int, ColmapCamera]:
    reader = _Reader(path)
    cameras = {}
    for _ in range(reader.count(_CAMERA.size)):
        number, model_id, width, height = reader.take(_CAMERA)
        if model_id not in _BY_ID:
            raise ValueError(
                f"{path}: camera {number}: camera model {model_id} is not supported (known: {', '.join(_MODELS)})"
            )
        model = _BY_ID[model_id]
        params = reader.take(struct.Struct(f"<{_MODELS[model].params}d"))
        cameras[number] = _camera(path, number, ColmapCamera(model, width, height, params))
    return cameras


def _camera(path: Path, number: int, camera: ColmapCamera) -> ColmapCamera:
    if not (0 < camera.width < 1 << 20 and 0 < camera.height < 1 << 20):
        raise ValueError(f"{path}: camera {number}: unusable image size {camera.width}x{camera.height}")
    return camera


def _binary_images(path: Path) -> list[ColmapImage]:
    reader = _Reader(path)
    images = []
    for _ in range(reader.count(_IMAGE.size + 1 + _U64.size)):
        _, qw, qx, qy, qz, tx, ty, tz, camera_id = reader.take(_IMAGE)
        end = reader.data.find(b"\0", reader.at)
        if end < 0:
            raise reader.truncated()
        name = reader.data[reader.at : end].decode("utf-8", "replace")
        reader.at = end + 1
        reader.skip(reader.count(_OBSERVATION_BYTES) * _OBSERVATION_BYTES)
        images.append(ColmapImage(name, camera_id, (qw, qx, qy, qz), (tx, ty, tz)))
    return images


def _binary_points(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    reader = _Reader(path)
    count = reader.count(_POINT.size)
    xyz, rgb = np.empty((count, 3)), np.empty((count, 3), np.uint8)
    for i in range(count):
        _, x, y, z, r, g, b, _, track = reader.take(_POINT)
        reader.skip(track * _TRACK_BYTES)
        xyz[i] = x, y, z
        rgb[i] = r, g, b
    return xyz, rgb


def _text_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _text_cameras(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for line in filter(str.strip, _text_lines(path)):
        words = line.split()
        if len(words) < 5:
            raise ValueError(f"{path}: not a camera: {line[:60]!r}")
        number, model = words[0], words[1]
        if model not in _MODELS:
            raise ValueError(
                f"{path}: camera {number}: camera model {model} is not supported (known: {', '.join(_MODELS)})"
            )
        try:
            params = tuple(float(word) for word in words[4:])
            camera = ColmapCamera(model, int(words[2]), int(words[3]), params)
        except ValueError:
            raise ValueError(f"{path}: not a camera: {line[:60]!r}") from None
        if len(params) != _MODELS[model].params:
            raise ValueError(
                f"{path}: camera {number}: {model} has {_MODELS[model].params} parameters, got {len(params)}"
            )
        cameras[int(number)] = _camera(path, int(number), camera)
    return cameras


def _text_images(path: Path) -> list[ColmapImage]:
    lines = _text_lines(path)
    while lines and not lines[0].strip():
        lines.pop(0)
    images = []
    for line in lines[::2]:  # each second line holds observations and may be empty
        if not line.strip():
            continue
        words = line.split(maxsplit=9)
        try:
            _, qw, qx, qy, qz, tx, ty, tz = (float(word) for word in words[:8])
            images.append(ColmapImage(words[9].strip(), int(words[8]), (qw, qx, qy, qz), (tx, ty, tz)))
        except (ValueError, IndexError):
            raise ValueError(f"{path}: not an image: {line[:60]!r}") from None
    return images


def _text_points(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    rows = []
    for line in filter(str.strip, _text_lines(path)):
        try:
            rows.append([float(word) for word in line.split(maxsplit=7)[1:7]])
        except ValueError:
            raise ValueError(f"{path}: not a point: {line[:60]!r}") from None
        if len(rows[-1]) != 6:
            raise ValueError(f"{path}: not a point: {line[:60]!r}")
    table = np.array(rows, np.float64).reshape(-1, 6)
    return table[:, :3], table[:, 3:].clip(0, 255).astype(np.uint8)
