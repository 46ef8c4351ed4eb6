"""Small captures written to disk for the tests of the readers: oblong images, fx != fy, off-centre, rolled cameras."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 24
FX, FY, CX, CY = 44.0, 47.0, 18.5, 13.25


def camtoworlds(count: int = 9, target: tuple[float, float, float] = (3.0, -2.0, 5.0)) -> np.ndarray:
    """[count, 4, 4] OpenCV poses on a ring around `target`, z up, each rolled a little differently."""
    poses = []
    for i in range(count):
        angle = 2 * np.pi * i / count
        offset = np.array([4 * np.cos(angle), 4 * np.sin(angle), 1.0 + 0.3 * (i % 3)])
        forward = -offset / np.linalg.norm(offset)
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        roll = 0.2 * np.sin(3 * i)
        pose = np.eye(4)
        pose[:3, 0] = np.cos(roll) * right + np.sin(roll) * down
        pose[:3, 1] = np.cos(roll) * down - np.sin(roll) * right
        pose[:3, 2] = forward
        pose[:3, 3] = np.array(target) + offset
        poses.append(pose)
    return np.stack(poses)


def write_image(path: Path, seed: int, size: tuple[int, int] = (WIDTH, HEIGHT), channels: int = 3) -> np.ndarray:
    """A smooth random picture; returns what a lossless file of it decodes to, RGB(A)."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    pixels = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.COLOR_RGBA2BGRA if channels == 4 else cv2.COLOR_RGB2BGR
    assert cv2.imwrite(str(path), cv2.cvtColor(pixels, code))
    return pixels


def transforms(count: int = 9, **shared: Any) -> dict[str, Any]:
    """The JSON object of a capture with `count` frames; images are `images/000.png`, ..."""
    opengl = camtoworlds(count) @ np.diag([1.0, -1.0, -1.0, 1.0])
    table: dict[str, Any] = {"w": WIDTH, "h": HEIGHT, "fl_x": FX, "fl_y": FY, "cx": CX, "cy": CY, **shared}
    table["frames"] = [
        {"file_path": f"images/{i:03d}.png", "transform_matrix": m.tolist()} for i, m in enumerate(opengl)
    ]
    return table


def write_transforms(root: Path, table: dict[str, Any] | None = None, name: str = "transforms.json") -> Path:
    """Write the JSON (default: `transforms()`) and an image for each frame that has none yet."""
    table = transforms() if table is None else table
    root.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(table["frames"]):
        path = root / frame["file_path"]
        if path.suffix and not path.exists():
            write_image(path, i)
    (root / name).write_text(json.dumps(table))
    return root


def quat_of(rotation: np.ndarray) -> np.ndarray:
    """wxyz of a rotation matrix."""
    w = np.sqrt(max(0.0, 1 + np.trace(rotation))) / 2
    if w > 1e-6:
        skew = rotation - rotation.T
        return np.array([w, skew[2, 1] / (4 * w), skew[0, 2] / (4 * w), skew[1, 0] / (4 * w)])
    values, vectors = np.linalg.eigh(rotation + rotation.T)
    return np.concatenate([[0.0], vectors[:, np.argmax(values)]])


def write_colmap(
    root: Path,
    *,
    binary: bool,
    model: tuple[str, int, tuple[float, ...]] = ("PINHOLE", 1, (FX, FY, CX, CY)),
    count: int = 9,
    points: int = 20,
) -> Path:
    """A COLMAP project with `count` images `000.png`, ... and a cloud around the ring's centre.

    Args:
        root: the project.
        binary: .bin, else .txt.
        model: name, number and parameters of the one camera.
        count: images.
        points: points, each with a track of two observations.
    """
    sparse = root / "sparse" / "0"
    sparse.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    xyz = np.array([3.0, -2.0, 5.0]) + random.normal(size=(points, 3)) * 0.3
    rgb = random.integers(0, 256, (points, 3))
    worldtocams = np.linalg.inv(camtoworlds(count))
    poses = [(*quat_of(m[:3, :3]), *m[:3, 3]) for m in worldtocams]
    names = [f"{i:03d}.png" for i in range(count)]
    for i, name in enumerate(names):
        write_image(root / "images" / name, i)
    label, number, params = model
    if binary:
        camera = struct.pack(f"<QiiQQ{len(params)}d", 1, 7, number, WIDTH, HEIGHT, *params)
        (sparse / "cameras.bin").write_bytes(camera)
        body = struct.pack("<Q", count)
        for i, (pose, name) in enumerate(zip(poses, names, strict=True)):
            body += struct.pack("<i7di", i + 1, *pose, 7) + name.encode() + b"\0"
            body += struct.pack("<Q", 1) + struct.pack("<2dq", 3.0, 4.0, -1)
        (sparse / "images.bin").write_bytes(body)
        body = struct.pack("<Q", points)
        for i in range(points):
            body += struct.pack("<Q3d3Bd", i, *xyz[i], *rgb[i].tolist(), 0.5) + struct.pack("<Q4i", 2, 1, 0, 2, 0)
        (sparse / "points3D.bin").write_bytes(body)
        return root
    numbers = " ".join(repr(float(p)) for p in params)
    (sparse / "cameras.txt").write_text(f"# Camera list\n7 {label} {WIDTH} {HEIGHT} {numbers}\n")
    lines = ["# Image list"]
    for i, (pose, name) in enumerate(zip(poses, names, strict=True)):
        lines += [f"{i + 1} {' '.join(repr(float(p)) for p in pose)} 7 {name}", "3.0 4.0 -1" if i % 2 else ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [
        f"{i} {' '.join(repr(float(v)) for v in xyz[i])} {' '.join(map(str, rgb[i]))} 0.5 1 0 2 0"
        for i in range(points)
    ]
    (sparse / "points3D.txt").write_text("# 3D point list\n" + "\n".join(rows) + "\n")
    return root
