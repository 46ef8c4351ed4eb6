"""render-video: paths that go where they should, files that play or are not there at all."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from prismfield.export.library import load, render
from prismfield.render.cameras import Cameras
from prismfield.train.camera_path import (
    Keyframes,
    along_photographs,
    orbit,
    read_keyframes,
    ring,
    through,
    vertical_fov,
)
from prismfield.train.video import even_size, write_video

from .commands import command, refused

UP = np.array([0.36, -0.48, 0.8])
CENTER = np.array([3.0, -1.0, 2.0])


def read_video(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What the file says of itself, and its frames [F, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def photographed(degrees: np.ndarray, radius: float = 5.0, height: float = 2.0) -> np.ndarray:
    """Poses at these angles round CENTER, looking at it, above it along UP."""
    poses = ring(CENTER, UP, 1.0)[:1].repeat(len(degrees), 0)
    base = poses[0, :3, 3] - CENTER
    base -= UP * (base @ UP)
    base /= np.linalg.norm(base)
    for pose, angle in zip(poses, np.radians(degrees), strict=True):
        pose[:3, 3] = CENTER + radius * Rotation.from_rotvec(angle * UP).apply(base) + height * UP
        forward = (CENTER - pose[:3, 3]) / np.linalg.norm(CENTER - pose[:3, 3])
        right = np.cross(forward, UP)
        right /= np.linalg.norm(right)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    return poses


def turns(poses: np.ndarray) -> np.ndarray:
    """Angles round UP through CENTER, radians, unwrapped."""
    reference = photographed(np.array([0.0, 90.0]), 1.0, 0.0)[:, :3, 3] - CENTER
    offsets = poses[:, :3, 3] - CENTER
    return np.unwrap(np.arctan2(offsets @ reference[1], offsets @ reference[0]))


def test_an_orbit_keeps_to_the_ring_of_the_photographs() -> None:
    flight = orbit(photographed(np.arange(0, 360, 10.0)), CENTER, UP, 0.8, 48)
    offsets = flight.camtoworlds[:, :3, 3] - CENTER
    heights = offsets @ UP
    np.testing.assert_allclose(heights, 2.0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(offsets - heights[:, None] * UP, axis=1), 5.0, atol=1e-6)
    looked = np.einsum("fij,fj->fi", flight.camtoworlds[:, :3, :3].transpose(0, 2, 1), -offsets)
    np.testing.assert_allclose(looked[:, :2], 0, atol=1e-9)  # the centre is straight ahead
    assert (looked[:, 2] > 0).all()
    np.testing.assert_allclose(flight.camtoworlds[:, :3, 0] @ UP, 0, atol=1e-9)  # level
    assert (flight.camtoworlds[:, :3, 1] @ UP < 0).all()  # and upright: +y is down
    np.testing.assert_allclose(np.linalg.det(flight.camtoworlds[:, :3, :3]), 1)
    np.testing.assert_allclose(np.diff(turns(flight.camtoworlds)), 2 * math.pi / 48)  # once round, evenly


def test_an_orbit_of_what_was_seen_from_one_side_stays_there() -> None:
    flight = orbit(photographed(np.linspace(170, 290, 20)), CENTER, UP, 0.8, 60)
    angles = np.degrees(turns(flight.camtoworlds)) % 360
    assert angles.min() == pytest.approx(170 + 0.05 * 120, abs=0.5)
    assert angles.max() == pytest.approx(290 - 0.05 * 120, abs=0.5)
    assert abs(angles[0] - angles[-1]) < 3  # it comes back


def test_an_orbit_follows_a_ring_that_is_no_circle() -> None:
    degrees = np.arange(0, 360, 5.0)
    poses = photographed(degrees)
    poses[:, :3, 3] += (poses[:, :3, 3] - CENTER) * np.where(abs(degrees - 180) < 60, 0.5, 0.0)[:, None]
    flight = orbit(poses, CENTER, UP, 0.8, 36)
    radii = np.linalg.norm(flight.camtoworlds[:, :3, 3] - CENTER, axis=1)
    far = np.argmin(abs(np.degrees(turns(flight.camtoworlds)) % 360 - 180))
    near = np.argmax(abs(np.degrees(turns(flight.camtoworlds)) % 360 - 180))
    assert radii[far] > 1.4 * radii[near]


def test_a_flight_along_photographs_by_name_and_shuffled() -> None:
    poses = photographed(np.arange(0, 300, 10.0))
    flown = along_photographs(poses, 0.8, 100, 20.0).camtoworlds
    np.testing.assert_allclose(flown[[0, -1]], poses[[0, -1]], atol=1e-9)
    shuffled = along_photographs(poses[np.random.default_rng(1).permutation(len(poses))], 0.8, 100, 20.0).camtoworlds
    for path in (flown, shuffled):
        steps = np.linalg.norm(np.diff(path[:, :3, 3], axis=0), axis=1)
        assert steps.sum() < 1.25 * math.radians(290) * 5  # no going back and forth
        assert steps.max() < 3 * np.median(steps)  # at even speed
        assert np.linalg.norm(path[:, :3, 3] - CENTER, axis=1).min() > 0.9 * math.hypot(5, 2)  # not through the middle
    few = along_photographs(poses, 0.8, 50, 1.0).camtoworlds
    assert np.linalg.norm(few[:, :3, 3] - CENTER, axis=1).min() > 0.9 * math.hypot(5, 2)


def test_a_path_goes_through_its_keyframes_on_time() -> None:
    poses, fovs = photographed(np.array([0.0, 50.0, 80.0, 200.0])), np.radians([30.0, 60, 40, 50])
    flight = through(Keyframes(poses, fovs, np.array([0.0, 1.0, 3.0, 4.0]), loop=False), 41)  # ten a second
    np.testing.assert_allclose(flight.camtoworlds[[0, 10, 30, 40]], poses, atol=1e-9)
    np.testing.assert_allclose(flight.fovs[[0, 5, 10, 20, 30, 40]], np.radians([30, 45, 60, 50, 40, 50]))
    velocities = np.diff(
        through(Keyframes(poses, fovs, np.array([0.0, 1, 3, 4]), loop=False), 4001).camtoworlds, axis=0
    )
    np.testing.assert_allclose(velocities[999, :3, 3], velocities[1000, :3, 3], atol=2e-5)  # no jerk at a key
    assert np.linalg.norm(velocities[1000, :3, 3]) > 1e-3
    looped = through(Keyframes(poses, fovs, np.array([0.0, 1, 2, 3]), loop=True), 40)
    np.testing.assert_allclose(looped.camtoworlds[[0, 10, 20, 30]], poses, atol=1e-9)
    end = np.linalg.norm(looped.camtoworlds[-1, :3, 3] - poses[0, :3, 3])
    assert 0 < end < 2.0  # nearly back


def test_uneven_times_bend_no_parabola() -> None:
    times = np.array([0.0, 1.0, 3.0, 4.0])
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, 0, 3], poses[:, 1, 3] = times, times**2
    flown = through(Keyframes(poses, np.full(4, 0.5), times, loop=False), 401).camtoworlds[100:301, :3, 3]
    moments = np.linspace(1, 3, 201)
    np.testing.assert_allclose(flown, np.stack([moments, moments**2, 0 * moments], 1), atol=1e-9)


def test_a_path_over_two_keyframes_turns_at_even_speed() -> None:
    poses = photographed(np.array([0.0, 90.0]))
    flight = through(Keyframes(poses, np.array([0.5, 0.5]), None, loop=False), 5)
    relative = Rotation.from_matrix(flight.camtoworlds[:-1, :3, :3].transpose(0, 2, 1) @ flight.camtoworlds[1:, :3, :3])
    np.testing.assert_allclose(relative.magnitude(), relative.magnitude()[0])
    still = Keyframes(poses[[0, 0]], np.array([0.5, 0.5]), None, loop=False)
    with pytest.raises(ValueError, match="fewer than two different places"):
        through(still, 5)


def test_the_cameras_of_a_flight_have_its_field_of_view() -> None:
    cameras = orbit(photographed(np.arange(0, 360, 30.0)), CENTER, UP, math.radians(40), 3).cameras(64, 36)
    assert vertical_fov([cameras]) == pytest.approx(math.radians(40))
    torch.testing.assert_close(cameras.Ks[:, 0, 0], cameras.Ks[:, 1, 1])
    torch.testing.assert_close(cameras.Ks[0, :2, 2], torch.tensor([32.0, 18.0], dtype=torch.float64))


def keyframe_file(folder: Path, content: Any) -> Path:
    path = folder / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def key(**changes: Any) -> dict[str, Any]:
    return {"camtoworld": np.eye(4).tolist()} | changes


def test_keyframes_are_read_as_documented(tmp_path: Path) -> None:
    pose = photographed(np.array([20.0]))[0]
    opengl = pose.copy()
    opengl[:3, 1:3] *= -1
    entries = [key(camtoworld=pose[:3].tolist(), time=2), key(fov=90, time=3.5)]
    keys = read_keyframes(keyframe_file(tmp_path, {"keyframes": entries}), 0.7)
    np.testing.assert_allclose(keys.camtoworlds[0], pose)
    np.testing.assert_allclose(keys.fovs, [0.7, math.pi / 2])
    assert keys.times is not None
    np.testing.assert_allclose(keys.times, [0, 1.5])
    assert keys.duration == 1.5
    flipped = {"axes": "opengl", "loop": True, "keyframes": [key(camtoworld=opengl.tolist()), key()]}
    keys = read_keyframes(keyframe_file(tmp_path, flipped), 0.7)
    np.testing.assert_allclose(keys.camtoworlds[0], pose)
    assert keys.loop
    assert keys.times is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], 'expected {"keyframes"'),
        ({"keyframes": [key()]}, "expected at least two"),
        ({"keyframes": [key(), key(camtoworld=[[1, 2], [3]])]}, "keyframe 1: camtoworld: expected 4x4"),
        ({"keyframes": [key(), {}]}, "keyframe 1: camtoworld: expected 4x4"),
        ({"keyframes": [key(), key(camtoworld=(2 * np.eye(4)).tolist())]}, "keyframe 1: .* no rotation"),
        ({"keyframes": [key(), key(camtoworld=np.diag([1.0, 1, -1, 1]).tolist())]}, "keyframe 1: .* no rotation"),
        ('{"keyframes": [{"camtoworld": [[NaN,0,0,0],[0,1,0,0],[0,0,1,0]]}, 1]}', "keyframe 0: .* finite"),
        ({"keyframes": [key(), key(fov=0)]}, "keyframe 1: fov: expected 1 to 170 degrees, got 0"),
        ({"keyframes": [key(), key(fov="wide")]}, "keyframe 1: fov: expected a number, got 'wide'"),
        ({"keyframes": [key(time=0), key()]}, "keyframe 1 has no time"),
        ({"keyframes": [key(time=1), key(time=1)]}, "keyframe 1: time is not after"),
        ({"keyframes": [key(), key(focal=3)]}, "keyframe 1: unknown entry focal"),
        ({"keyframes": [key(), key()], "axes": "blender"}, "axes: expected opencv or opengl"),
        ({"keyframes": [key(), key()], "loop": 1}, "loop: expected true or false"),
    ],
)
def test_keyframes_that_make_no_sense_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"keys\.json: {message}"):
        read_keyframes(keyframe_file(tmp_path, content), 0.7)


def test_a_video_of_keyframes_shows_what_the_library_renders(tiny_run: Path, tmp_path: Path) -> None:
    scene = load(tiny_run)
    cameras = Cameras.stack(scene.cameras("train")[:2])
    fov = vertical_fov([cameras])
    poses = cameras.camtoworlds.tolist()
    entries = [
        {"camtoworld": pose, "fov": math.degrees(fov), "time": t} for pose, t in zip(poses, (0, 0.5), strict=True)
    ]
    keys = keyframe_file(tmp_path, {"keyframes": entries})
    out = tmp_path / "flight.mp4"
    done = command("train.video_cli", tiny_run, "--path", keys, "--fps", 12, "--out", out, "--quality", 4)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".json"] == ["flight.mp4"]
    about, frames = read_video(out)
    assert about["size"] == (120, 80)
    assert about["fps"] == 12
    assert about["codec"] == "h264"
    assert "yuv420p" in about["pix_fmt"]
    assert len(frames) == 6
    for index, frame in ((0, frames[0]), (1, frames[-1])):
        camera = cameras[index]
        camera.Ks[0, 0, 0] = camera.Ks[0, 1, 1]  # the video has square pixels and looks straight ahead
        camera.Ks[0, :2, 2] = torch.tensor([60.0, 40.0])
        expected = (render(scene, camera).rgb[0].clamp(0, 1) * 255).numpy()
        assert np.abs(frame - expected).mean() < 3


def test_an_orbit_of_a_run_in_another_size(tiny_run: Path, tmp_path: Path) -> None:
    words = ["--seconds", 0.5, "--fps", 10, "--width", 91, "--out", tmp_path / "a.mp4"]
    done = command("train.video_cli", tiny_run, *words)
    assert done.returncode == 0, done.stderr
    about, frames = read_video(tmp_path / "a.mp4")
    assert about["size"] == (92, 60) == even_size(91, 61)
    assert len(frames) == 5
    assert all(np.abs(frames[i].astype(int) - frames[i + 1]).mean() > 3 for i in range(4))  # it moves
    assert "92x60, 5 frames" in done.stdout


def test_ctrl_c_leaves_the_video_that_was_there(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    out.write_bytes(b"older")
    arguments = [sys.executable, "-m", "prismfield.train.video_cli", tiny_run, "--seconds", "600", "--out", out]
    process = subprocess.Popen([str(word) for word in arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".a.mp4.*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.glob(".a.mp4.*.part"))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().endswith("interrupted")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert out.read_bytes() == b"older"


def test_colors_come_back_as_they_went_in(tmp_path: Path) -> None:
    frame = np.zeros((32, 96, 3), np.uint8)
    frame[:, :32], frame[:, 32:64], frame[:, 64:] = (220, 30, 30), (20, 200, 40), (90, 100, 230)
    write_video(tmp_path / "a.mp4", [frame] * 5, (96, 32), 10, 4)
    about, frames = read_video(tmp_path / "a.mp4")
    assert "bt709" in about["pix_fmt"]
    assert "unknown" not in about["pix_fmt"]
    assert np.abs(frames[0][16, [16, 48, 80]].astype(int) - frame[16, [16, 48, 80]]).max() <= 4


def test_what_ffmpeg_cannot_write_is_one_line(tmp_path: Path) -> None:
    frames = iter([np.zeros((4, 6, 3), np.uint8)] * 200)
    with pytest.raises(OSError, match=r"a\.mp4: ffmpeg could not write the video \(.+\)$"):
        write_video(tmp_path / "no folder" / "a.mp4", frames, (6, 4), 10, 18)


def test_a_frame_of_another_size_leaves_no_file(tmp_path: Path) -> None:
    frames = iter([np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"frames: expected uint8 \[4, 6, 3\], got \[6, 4, 3\]"):
        write_video(tmp_path / "a.mp4", frames, (6, 4), 10, 18)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    assert "expected orbit, train or a .json" in refused("train.video_cli", tiny_run, "--path", "spiral")
    assert "--fps: expected 1 to 240" in refused("train.video_cli", tiny_run, "--fps", 0)
    assert "no such run" in refused("train.video_cli", tmp_path / "nowhere", "--out", tmp_path / "a.mp4")
    assert "name ending in .mp4" in refused("train.video_cli", tiny_run, "--out", tmp_path / "a.avi")
    keys = keyframe_file(tmp_path, {"keyframes": []})
    assert "at least two keyframes" in refused("train.video_cli", tiny_run, "--path", keys, "--out", tmp_path / "a.mp4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]
