"""render-data poses: cameras against the true ones, photographs as phones write them, videos, what cannot work."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from prismfield.datasets import poses as module
from prismfield.datasets import video
from prismfield.datasets.poses import Project
from prismfield.datasets.scenes import load_scene

from .commands import command, refused
from .tiny_captures import write_image

pycolmap = pytest.importorskip("pycolmap")
GARDEN = Path(__file__).resolve().parents[1] / "datasets" / "garden"
COUNT = 16  # neighbours on the bundled scene's outer ring, 13 degrees apart


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs whose cameras are known; one lies on its side in the file, as a phone writes portraits."""
    folder = tmp_path_factory.mktemp("capture") / "photos"
    folder.mkdir()
    for i in range(COUNT):
        shutil.copy(GARDEN / "images" / f"{i:03d}.jpg", folder / f"{i:03d}.jpg")
    with Image.open(folder / "004.jpg") as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        image.rotate(90, expand=True).save(folder / "004.jpg", quality=97, exif=exif)
    return folder


@pytest.fixture(scope="module")
def project(photos: Path) -> Path:
    """What the command makes of them, where the photographs' folder is the working folder's child."""
    words = ["--max-features", "1500", "--out", "scene"]
    done = command("datasets.cli", "poses", "photos", *words, cwd=photos.parent)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} of {COUNT} images" in done.stdout
    assert "render-train --scene scene" in done.stdout
    for stage in ("Features", "Matching (exhaustive)", "Cameras"):
        assert stage in done.stderr  # the bars
    return photos.parent / "scene"


def aligned(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`found` [N, 3] moved onto `true` by the best similarity (Umeyama 1991), and its rotation."""
    a, b = found - found.mean(0), true - true.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    flip = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ flip @ vt
    scale = (s * flip.diagonal()).sum() / (a**2).sum()
    return scale * a @ rotation.T + true.mean(0), rotation


def test_cameras_come_out_where_they_were(project: Path) -> None:
    data = load_scene(str(project))
    found = {frame.name: frame.camera for frame in data.train + data.test}
    truth = load_scene(str(GARDEN))
    true = {frame.name: frame.camera for frame in truth.train + truth.test}
    names = sorted(found)
    assert len(names) == COUNT
    centers = [np.concatenate([side[n].centers.double().numpy() for n in names]) for side in (found, true)]
    moved, rotation = aligned(*centers)
    reach = np.linalg.norm(centers[1] - centers[1].mean(0), axis=1).mean()
    assert np.linalg.norm(moved - centers[1], axis=1).max() < 0.02 * reach
    for name in names:
        turn = rotation @ found[name].camtoworlds[0, :3, :3].double().numpy()
        error = turn.T @ true[name].camtoworlds[0, :3, :3].double().numpy()
        assert np.degrees(np.arccos(np.clip((np.trace(error) - 1) / 2, -1, 1))) < 1.0
        assert (found[name].width, found[name].height) == (480, 320)
    assert data.points is not None and len(data.points) > 300


def test_the_lens_comes_out_as_it_was(project: Path) -> None:
    """Refined from one focal length and one distortion to two and four; the true one has 412 px, and no distortion."""
    (camera,) = json.loads((project / "poses.json").read_text())["models"][0]["cameras"]
    assert camera["model"] == "OPENCV"
    assert camera["params"][:2] == pytest.approx([412, 412], rel=0.02)
    assert camera["params"][0] != camera["params"][1]
    assert np.abs(camera["params"][4:]).max() < 0.05


def test_a_photograph_on_its_side_is_turned_upright(photos: Path, project: Path) -> None:
    upright, true = (cv2.imread(str(root / "images" / "004.jpg")) for root in (project, GARDEN))
    assert upright.shape == true.shape
    assert np.abs(upright.astype(int) - true).mean() < 6  # saved twice more as JPEG
    with Image.open(project / "images" / "004.jpg") as image, Image.open(photos / "004.jpg") as original:
        assert image.getexif().get(0x0112, 1) == 1 and original.getexif()[0x0112] == 6
    assert (project / "images" / "003.jpg").read_bytes() == (photos / "003.jpg").read_bytes()


def test_the_same_command_goes_on_and_another_is_refused(photos: Path, project: Path) -> None:
    model = (project / "sparse" / "0" / "images.bin").stat().st_mtime_ns
    words = ["poses", photos, "--out", project]
    again = command("datasets.cli", *words, "--max-features", 1500)
    assert again.returncode == 0 and f"{COUNT} of {COUNT} images" in again.stdout
    assert (project / "sparse" / "0" / "images.bin").stat().st_mtime_ns == model
    line = refused("datasets.cli", *words, "--max-features", 3000)
    assert line.endswith(
        "an earlier run used another max_features; add --overwrite to start anew, or name another --out"
    )


def test_the_project_trains(project: Path, tmp_path: Path) -> None:
    words = [
        "--steps",
        "20",
        "--downscale",
        "4",
        "--max-primitives",
        "2000",
        "--log.tests",
        "0",
        "--log.no-tensorboard",
    ]
    done = command("train.cli", "--scene", project, *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.md").is_file()


def test_photographs_that_show_nothing_in_common(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / "photos" / f"{i}.png", i, (160, 120))
    line = refused("datasets.cli", "poses", tmp_path / "photos", "--out", tmp_path / "scene")
    assert "none of the 3 images could be placed" in line and "at least two thirds of each in common" in line


def test_what_cannot_be_used_is_one_line_before_pycolmap_starts(tmp_path: Path) -> None:
    def line(source: Path, **values: object) -> str:
        config = module.PosesConfig(source, out=tmp_path / "scene", **values)  # type: ignore[arg-type]
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            module.find_poses(config)
        return str(caught.value)

    assert line(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder or video"
    (tmp_path / "notes.txt").write_text("x")
    assert "expected a folder of images or a video (.mp4" in line(tmp_path / "notes.txt")
    (tmp_path / "fake.mp4").write_text("not a video")
    assert line(tmp_path / "fake.mp4") == f"{tmp_path / 'fake.mp4'}: ffmpeg reads no video in this file"
    phone = tmp_path / "phone"
    phone.mkdir()
    for i in range(5):
        (phone / f"IMG_{i}.HEIC").write_text("x")
    assert line(phone).endswith(f"5 HEIC, AVIF or raw files in {phone} cannot be read: convert them to JPEG first")
    for i, size in enumerate([(40, 24), (40, 24), (24, 40)]):
        write_image(tmp_path / "mixed" / f"{i}.jpg", i, size)
    assert "--single-camera: the images have 2 sizes (24x40, 40x24)" in line(tmp_path / "mixed", single_camera=True)
    shutil.rmtree(tmp_path / "scene")
    (tmp_path / "mixed" / "1.jpg").write_bytes((tmp_path / "mixed" / "1.jpg").read_bytes()[:-40])
    assert line(tmp_path / "mixed").startswith(f"{tmp_path / 'mixed' / '1.jpg'}: ")
    shutil.rmtree(tmp_path / "scene")
    (tmp_path / "scene" / "sparse").mkdir(parents=True)
    assert "holds a COLMAP project already; add --overwrite" in line(tmp_path / "mixed")


def test_cameras_are_shared_by_size_and_exif(tmp_path: Path) -> None:
    def photo(name: str, size: tuple[int, int], model: str, focal: float) -> None:
        exif = Image.Exif()
        exif[0x0110] = model
        exif.get_ifd(0x8769)[0x920A] = focal
        Image.new("RGB", size).save(tmp_path / name, exif=exif)

    photo("a.jpg", (40, 24), "phone", 4.0)
    photo("b.jpg", (40, 24), "phone", 4.0)
    photo("c.jpg", (40, 24), "phone", 9.0)
    photo("d.jpg", (24, 40), "phone", 4.0)
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert module._camera_groups(tmp_path, names, None) == [["a.jpg", "b.jpg"], ["c.jpg"], ["d.jpg"]]
    assert module._camera_groups(tmp_path, names[:3], True) == [names[:3]]
    assert module._camera_groups(tmp_path, names, False) == [[name] for name in names]


def test_the_report_is_plain_about_few_images(capsys: pytest.CaptureFixture[str]) -> None:
    model = {"points": 90, "error": 2.0, "track": 2.2, "cameras": []}
    names = [f"{i:02d}.jpg" for i in range(10)]
    doubts = module._doubts(Project({}, images=names, blurred=["07.jpg"]), [model | {"images": names[:4]}])
    assert doubts[0] == "not registered: 6 images (04.jpg, 05.jpg, 06.jpg, ...)"
    assert doubts[1].startswith("less than half of the images have a pose. What helps: ")
    assert "2.0 px is high" in doubts[2] and "more overlap" in doubts[3] and "07.jpg" in doubts[4]
    wide = {"model": "OPENCV", "params": [652.0, 594.0, 400, 266, 0, 0, 0, 0], "width": 800, "height": 533}
    odd = model | {"images": names, "cameras": [wide], "error": 0.9, "track": 5.0}
    assert "differ by more than 5 %" in module._doubts(Project({}, images=names), [odd])[0]
    good = {"points": 900, "error": 0.4, "track": 5.0, "cameras": [], "images": names}
    assert module._doubts(Project({}, images=names), [good]) == []
    assert "fell into 2 groups" in module._doubts(Project({}, images=names), [good, good])[0]


def write_video(path: Path, depth: str) -> list[int]:
    """A video of 32 frames, 64x48, one in four of them sharp; returns the brightness of the sharp ones' left half."""
    command = [video._imageio_ffmpeg().get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", "64x48", "-r", "10", "-i", "-", "-c:v", "libx264", "-crf", "1", "-pix_fmt", depth, str(path)]
    frames, levels = [], []
    checks = (np.indices((48, 64)).sum(0) % 2 * 60).astype(np.uint8)
    for i in range(32):
        frame = np.full((48, 64, 3), 20 + 4 * i, np.uint8)
        frame[:, 32:] = checks[:, 32:, None] if i % 4 == 2 else 30
        if i % 4 == 2:
            levels.append(20 + 4 * i)
        frames.append(frame)
    subprocess.run(command, input=b"".join(frame.tobytes() for frame in frames), check=True, capture_output=True)
    return levels


@pytest.mark.parametrize("depth", ["yuv420p", "yuv420p10le"])  # phones record 10 bits in their HDR mode
def test_of_a_video_the_sharpest_frames_are_taken(tmp_path: Path, depth: str) -> None:
    levels = write_video(tmp_path / "walk.mp4", depth)
    kept, total = video.frame_count(tmp_path / "walk.mp4", frames=8, fps=None)
    assert (kept, total) == (8, 32)
    told: list[int] = []
    names = video.extract_frames(tmp_path / "walk.mp4", tmp_path / "images", kept, total, told.append)
    assert names == [f"frame_{i:05d}.jpg" for i in range(1, 9)] and sum(told) == 8
    found = [cv2.imread(str(tmp_path / "images" / name))[8:40, 8:24].mean() for name in names]
    assert np.abs(np.array(found) - levels).max() < 6  # 16 from one to the next


@pytest.mark.parametrize(
    ("asked", "kept"),
    [({}, 32), ({"frames": 5}, 5), ({"fps": 5.0}, 16), ({"fps": 100.0}, 32)],
)
def test_how_many_frames_of_a_video(tmp_path: Path, asked: dict[str, float], kept: int) -> None:
    write_video(tmp_path / "walk.mp4", "yuv420p")  # 3.2 seconds
    wanted = {"frames": None, "fps": None} | asked
    assert video.frame_count(tmp_path / "walk.mp4", **wanted)[0] == kept  # type: ignore[arg-type]


def test_frames_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for wanted, words in (
        ({"frames": 2, "fps": None}, "--frames: expected at least 3, got 2"),
        ({"frames": None, "fps": 0.0}, "--fps: expected a positive number, got 0.0"),
        ({"frames": 9, "fps": 2.0}, "--frames and --fps: give one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            video.frame_count(tmp_path / "none.mp4", **wanted)  # type: ignore[arg-type]


def test_a_projects_state_survives_damage(tmp_path: Path) -> None:
    module._save(Project({"a": 1}, images=["x.jpg"]), tmp_path)
    assert module._load_project(tmp_path / "poses.json") == Project({"a": 1}, images=["x.jpg"])
    (tmp_path / "poses.json").write_text(json.dumps({"settings": {}})[:-3])
    assert module._load_project(tmp_path / "poses.json") is None
