"""COLMAP projects: both encodings, real and made, good and bad."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prismfield.datasets.colmap import find_model, read_colmap, read_model
from prismfield.datasets.scenes import load_scene

from .tiny_captures import CX, CY, FX, FY, HEIGHT, WIDTH, camtoworlds, write_colmap, write_image


@pytest.mark.parametrize("binary", [True, False])
def test_project_is_read(tmp_path: Path, binary: bool) -> None:
    capture = read_colmap(write_colmap(tmp_path, binary=binary))
    assert [f.name for f in capture.train] == [f"{i:03d}.png" for i in range(9)]
    for frame, expected in zip(capture.train, camtoworlds(), strict=True):
        np.testing.assert_allclose(frame.camera.camtoworlds[0], expected, atol=1e-9)
        np.testing.assert_allclose(frame.camera.Ks[0], [[FX, 0, CX], [0, FY, CY], [0, 0, 1]])
    assert capture.xyz is not None and capture.xyz.shape == (20, 3)
    assert np.abs(capture.xyz - [3, -2, 5]).max() < 2
    assert capture.notes.sentences() == []


def test_text_and_binary_agree(tmp_path: Path) -> None:
    text, binary = (write_colmap(tmp_path / str(b), binary=b) / "sparse" / "0" for b in (False, True))
    one, other = read_model(text), read_model(binary)
    assert (one.cameras, one.images) == (other.cameras, other.images)
    np.testing.assert_array_equal(one.xyz, other.xyz)
    np.testing.assert_array_equal(one.rgb, other.rgb)


def test_real_project_agrees_with_pycolmap(shared_data: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is the oracle")
    folder = shared_data / "bonsai" / "sparse" / "0"
    expected = pycolmap.Reconstruction(str(folder))
    model = read_model(folder)
    assert len(model.images) == expected.num_reg_images() == 292
    by_name = {image.name: image for image in expected.images.values()}
    for image in model.images:
        rotation = by_name[image.name].cam_from_world().rotation.quat  # xyzw
        np.testing.assert_allclose(np.roll(rotation, 1), image.quat, atol=1e-12)
        np.testing.assert_allclose(by_name[image.name].cam_from_world().translation, image.translation)
    points = np.array([p.xyz for p in expected.points3D.values()])
    np.testing.assert_array_equal(np.sort(points, 0), np.sort(model.xyz, 0))
    colors = np.array([p.color for p in expected.points3D.values()])
    np.testing.assert_array_equal(np.sort(colors, 0), np.sort(model.rgb, 0))


def test_observed_points_project_onto_their_pixels(shared_data: Path) -> None:
    """The axes' convention: COLMAP's points land where COLMAP saw them, through the cameras of the scene frame."""
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap knows which image saw which point")
    model = pycolmap.Reconstruction(str(shared_data / "bonsai" / "sparse" / "0"))
    data = load_scene(str(shared_data / "bonsai"))
    frames = {f.name: f for f in data.train + data.test}
    errors = []
    for image in list(model.images.values())[::30]:
        seen = [(p.xy, model.points3D[p.point3D_id].xyz) for p in image.points2D if p.has_point3D()]
        xy, xyz = (np.array(values) for values in zip(*seen, strict=True))
        camera = frames[image.name].camera
        scene = (xyz - data.frame.center) * data.frame.scale
        viewmat = camera.viewmats[0].numpy()
        local = scene @ viewmat[:3, :3].T + viewmat[:3, 3]
        assert (local[:, 2] > 0).all()
        pixels = local @ camera.Ks[0].numpy().T
        errors.append(np.linalg.norm(pixels[:, :2] / pixels[:, 2:] - xy, axis=1))
    assert np.concatenate(errors).mean() < 1.0


def test_transforms_json_of_the_same_capture_gives_the_same_cameras(shared_data: Path) -> None:
    colmap = load_scene(str(shared_data / "bonsai"))
    other = load_scene(str(shared_data / "bonsai" / "transforms.json"))
    assert (colmap.kind, other.kind) == ("colmap", "transforms")
    for ours, theirs in ((colmap.train, other.train), (colmap.test, other.test)):
        assert [f.name for f in ours] == [f.name for f in theirs]
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.camera.viewmats, two.camera.viewmats, atol=1e-4)
            np.testing.assert_allclose(one.camera.Ks, two.camera.Ks, rtol=1e-5)
    assert colmap.points is not None and other.points is None


@pytest.mark.parametrize(
    ("model", "lens", "coefficients"),
    [
        (("SIMPLE_PINHOLE", 0, (50.0, CX, CY)), "pinhole", None),
        (("SIMPLE_RADIAL", 2, (50.0, CX, CY, 0.1)), "opencv", [0.1, 0, 0, 0, 0, 0, 0, 0]),
        (("SIMPLE_RADIAL", 2, (50.0, CX, CY, 0.0)), "pinhole", None),
        (("OPENCV", 4, (50.0, 50.0, CX, CY, 1.0, 2.0, 3.0, 4.0)), "opencv", [1, 2, 3, 4, 0, 0, 0, 0]),
        (("SIMPLE_FISHEYE", 14, (50.0, CX, CY)), "fisheye", [0, 0, 0, 0]),
        (("FOV", 7, (50.0, 50.0, CX, CY, 0.9)), "fov", [0.9]),
    ],
)
@pytest.mark.parametrize("binary", [True, False])
def test_camera_models(
    tmp_path: Path,
    model: tuple[str, int, tuple[float, ...]],
    lens: str,
    coefficients: list[float] | None,
    binary: bool,
) -> None:
    camera = read_colmap(write_colmap(tmp_path, binary=binary, model=model, count=2)).train[0].camera
    assert camera.model == lens and float(camera.Ks[0, 0, 0]) == 50.0
    assert (None if camera.distortion is None else camera.distortion[0].tolist()) == coefficients


@pytest.mark.parametrize("binary", [True, False])
def test_unknown_camera_model_is_refused(tmp_path: Path, binary: bool) -> None:
    root = write_colmap(tmp_path, binary=binary, model=("EQUIRECTANGULAR", 17, (40.0, 24.0)))
    with pytest.raises(
        ValueError, match=r"cameras\.(bin|txt): camera 7: camera model (17|EQUIRECTANGULAR) is not supp"
    ):
        load_scene(str(root))


@pytest.mark.parametrize(
    ("focal", "said"), [(0.0, "fx: .*got 0"), (-5.0, "fx: .*got -5"), (float("nan"), "finite parame")]
)
def test_unusable_focal_length_is_refused(tmp_path: Path, focal: float, said: str) -> None:
    root = write_colmap(tmp_path, binary=True, model=("PINHOLE", 1, (focal, FY, CX, CY)))
    with pytest.raises(ValueError, match=said):
        load_scene(str(root))


def _edit(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "sparse" / "0" / file
        path.write_bytes(edit(path.read_bytes()))

    return apply


NAN = struct.pack("<d", float("nan"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("points3D.bin", lambda b: b[:200]), r"points3D\.bin: truncated"),
        (_edit("points3D.bin", lambda b: struct.pack("<Q", 1 << 60) + b[8:]), r"points3D\.bin: truncated"),
        (_edit("images.bin", lambda b: b[:-20]), r"images\.bin: truncated"),
        (_edit("images.bin", lambda b: struct.pack("<Q", 1 << 62) + b[8:]), r"images\.bin: truncated"),
        (_edit("images.bin", lambda b: b""), r"images\.bin: truncated"),
        (_edit("cameras.bin", lambda b: b[:40]), r"cameras\.bin: truncated"),
        (_edit("cameras.bin", lambda b: b[:16] + struct.pack("<QQ", 1 << 40, 24) + b[32:]), "unusable image size"),
        (_edit("images.bin", lambda b: b[:12] + NAN + b[20:]), r"000\.png: pose"),
        (_edit("images.bin", lambda b: b[:44] + NAN + b[52:]), r"000\.png: pose"),
        (_edit("images.bin", lambda b: b[:68] + struct.pack("<i", 3) + b[72:]), r"000\.png: its camera 3"),
        (_edit("images.bin", lambda b: struct.pack("<Q", 0)), "no registered images"),
    ],
)
def test_damaged_binary_files_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    root = write_colmap(tmp_path, binary=True)
    damage(root)
    with pytest.raises(ValueError, match=message):
        load_scene(str(root))


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("cameras.txt", "7 PINHOLE 40 24 1 2 3", "PINHOLE has 4 parameters, got 3"),
        ("cameras.txt", "7 PINHOLE forty 24 1 2 3 4", r"cameras\.txt: not a camera"),
        ("images.txt", "1 1 0 0 0 here 0 0 7 000.png", r"images\.txt: not an image"),
        ("points3D.txt", "1 0 0 0 255", r"points3D\.txt: not a point"),
    ],
)
def test_damaged_text_files_are_refused(tmp_path: Path, file: str, line: str, message: str) -> None:
    root = write_colmap(tmp_path, binary=False)
    (root / "sparse" / "0" / file).write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_scene(str(root))


def test_registered_images_that_are_missing_are_an_error(tmp_path: Path, shared_data: Path) -> None:
    root = write_colmap(tmp_path, binary=True)
    (root / "images" / "004.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 9 images are missing: 004\.png"):
        load_scene(str(root))
    with pytest.raises(FileNotFoundError, match="3 of 3 images are missing"):
        load_scene(str(shared_data / "garden_points"))


def test_unregistered_images_are_a_warning(tmp_path: Path) -> None:
    root = write_colmap(tmp_path, binary=True)
    write_image(root / "images" / "extra.png", 3)
    assert load_scene(str(root)).warnings == ["not registered by COLMAP, so not used: 1 image (extra.png)"]


@pytest.mark.parametrize("binary", [True, False])
def test_a_cloud_without_points_is_no_cloud(tmp_path: Path, binary: bool) -> None:
    data = load_scene(str(write_colmap(tmp_path, binary=binary, points=0)))
    assert data.points is None and data.warnings == ["the point cloud has no usable points"]


def test_points_that_are_not_finite_or_repeated_are_dropped_with_a_warning(tmp_path: Path) -> None:
    root = write_colmap(tmp_path, binary=False)
    path = root / "sparse" / "0" / "points3D.txt"
    first = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + "90 nan 0 0 1 2 3 0.5\n91 1 inf 0 1 2 3 0.5\n" + first + "\n")
    data = load_scene(str(root))
    assert data.points is not None and len(data.points) == 20
    assert data.warnings[0].startswith("2 of 23 points are not finite") and "repeat a position" in data.warnings[1]


def test_largest_of_several_reconstructions_is_used(tmp_path: Path) -> None:
    root = write_colmap(tmp_path, binary=True, count=9)
    write_colmap(tmp_path / "small", binary=True, count=3)
    shutil.move(root / "sparse" / "0", root / "sparse" / "1")
    shutil.move(tmp_path / "small" / "sparse" / "0", root / "sparse" / "0")
    assert find_model(root) == root / "sparse" / "1"
    data = load_scene(str(root))
    assert len(data.train) + len(data.test) == 9
    assert data.warnings == ["the project has 2 reconstructions; 1 with 9 images is used"]


def test_masks_in_both_spellings(tmp_path: Path) -> None:
    root = write_colmap(tmp_path, binary=True)
    write_image(root / "masks" / "001.png.png", 0)
    write_image(root / "masks" / "002.png", 0)
    masks = {f.name: f.mask_path for f in load_scene(str(root)).train}
    assert masks["001.png"] == root / "masks" / "001.png.png" and masks["002.png"] == root / "masks" / "002.png"
    assert masks["003.png"] is None
    write_image(root / "masks" / "003.png", 0, size=(HEIGHT, WIDTH))
    with pytest.raises(ValueError, match=r"mask of 24x40, but 003\.png is 40x24"):
        load_scene(str(root))
