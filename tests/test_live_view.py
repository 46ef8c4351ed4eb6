"""The live view: the maths of its pictures, its pace, and the whole of it over a real connection."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prismfield.datasets.base import SceneData
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import Views
from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.viewer import live, pace
from prismfield.viewer.charts import Charts
from prismfield.viewer.frames import (
    Drawn,
    Eye,
    Photo,
    Request,
    compare,
    compose,
    depth_colors,
    normal_colors,
    occluder,
    photo_on_canvas,
)
from prismfield.viewer.frusta import evenly, pose_of
from prismfield.viewer.live import LiveViewer, free_port
from prismfield.viewer.pace import BLOCK_SECONDS, STILL_SHARE, Pace

from .live_client import LiveClient
from .tiny_captures import CX, CY, FX, FY, HEIGHT, WIDTH, camtoworlds, transforms, write_transforms

PHOTO_K = np.array([[FX, 0, CX], [0, FY, CY], [0, 0, 1.0]])
BLACK = np.zeros(3, np.float32)


def slopes(K: np.ndarray, width: int, height: int) -> np.ndarray:
    """[H, W, 2] x / z and y / z of the rays through the pixel centres."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]], 2)


def ramp(K: np.ndarray, width: int, height: int) -> np.ndarray:
    """What a camera sees of a world whose colour is linear in the ray: [H, W, 3] in 0..255, not rounded."""
    rays = slopes(K, width, height)
    return np.stack([120 + 200 * rays[..., 0], 130 + 300 * rays[..., 1], 90 + 0 * rays[..., 0]], 2)


def ramp_photo() -> Photo:
    return Photo("ramp", np.eye(4), PHOTO_K, ramp(PHOTO_K, WIDTH, HEIGHT).round().astype(np.uint8), None)


@pytest.mark.parametrize("factor", [3.0, 1.0, 0.43])
def test_photo_lies_where_the_canvas_camera_would_see_it(factor: float) -> None:
    """Larger, equal and smaller pixels; the photo's principal point is off-centre and its pixels are not square."""
    width, height = round(90 * factor), round(60 * factor)
    K = np.array([[50 * factor, 0, width / 2], [0, 50 * factor, height / 2], [0, 0, 1]])
    truth, inside = photo_on_canvas(ramp_photo(), (0, 0, 0), K, (width, height))
    rays = slopes(K, width, height)
    # Exactly the rays that meet the photo's rectangle
    column, row = rays[..., 0] * FX + CX, rays[..., 1] * FY + CY
    assert np.array_equal(inside, (column >= 0) & (column < WIDTH) & (row >= 0) & (row < HEIGHT))
    core = (column > 2) & (column < WIDTH - 2) & (row > 2) & (row < HEIGHT - 2)  # not blended with the border
    assert core.mean() > 0.1
    # Half a photo's pixel to the side would be 2.3 levels off, half a canvas pixel at least 0.7
    assert np.abs(truth - ramp(K, width, height))[core].max() < 1.6
    assert abs((truth - ramp(K, width, height))[core].mean()) < 0.3


def test_photo_with_alpha_is_blended_over_the_background() -> None:
    rgb, alpha = np.full((2, 2, 3), 200, np.uint8), np.array([[0, 255], [51, 255]], np.uint8)
    over = Photo("a", np.eye(4), PHOTO_K, rgb, alpha).over((1.0, 0.5, 0.0))
    assert over[0, 0].tolist() == [255, 128, 0]
    assert over[0, 1].tolist() == [200, 200, 200]
    assert over[1, 0].tolist() == [244, 142, 40]


def plane_depth(normal: np.ndarray, distance: float, K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] z of the plane normal . x = distance."""
    rays = slopes(K, *size)
    return (distance / (rays[..., 0] * normal[0] + rays[..., 1] * normal[1] + normal[2])).astype(np.float32)


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.48, -0.36, -0.8), (-0.6, 0.0, -0.8)])
def test_normals_of_a_plane(normal: tuple[float, float, float]) -> None:
    n = np.array(normal)
    depth = plane_depth(n, -2.0, PHOTO_K, (WIDTH, HEIGHT))
    colors = normal_colors(depth, np.ones_like(depth), PHOTO_K, BLACK)
    # Red to the right, green up (y is down in the camera), blue towards the viewer (z is away)
    assert np.abs(colors - (0.5 + 0.5 * n * [1, -1, -1])).max() < 2e-3


def test_normals_stay_sharp_at_a_silhouette() -> None:
    near, far = np.array([0.48, -0.36, -0.8]), np.array([-0.6, 0.0, -0.8])
    depth = plane_depth(near, -2.0, PHOTO_K, (WIDTH, HEIGHT))
    depth[:, 20:] = plane_depth(far, -9.0, PHOTO_K, (WIDTH, HEIGHT))[:, 20:]
    colors = normal_colors(depth, np.ones_like(depth), PHOTO_K, BLACK)
    assert np.abs(colors[:, :20] - (0.5 + 0.5 * near * [1, -1, -1])).max() < 5e-3
    assert np.abs(colors[:, 20:] - (0.5 + 0.5 * far * [1, -1, -1])).max() < 5e-3


def test_depth_colors_are_bright_near_and_background_where_nothing_is() -> None:
    depth = np.linspace(1, 5, 400, dtype=np.float32).reshape(20, 20)
    alpha = np.ones_like(depth)
    depth[-1], alpha[-1] = 0, 0
    background = np.array([0.2, 0.4, 0.6], np.float32)
    colors, (near, far) = depth_colors(depth, alpha, background)
    assert colors[0, 0].tolist() == pytest.approx([253 / 255, 231 / 255, 37 / 255], abs=0.01)  # viridis' ends
    assert colors[-2, -1].tolist() == pytest.approx([68 / 255, 1 / 255, 84 / 255], abs=0.01)
    assert np.abs(colors[-1] - background).max() < 1e-6
    assert near == pytest.approx(1.0, abs=0.1)
    assert far == pytest.approx(4.8, abs=0.2)
    empty, _ = depth_colors(np.zeros_like(depth), alpha, background)
    assert np.abs(empty - background).max() < 1e-6


def test_compare() -> None:
    picture, truth = np.full((8, 20, 3), 40, np.uint8), np.full((8, 20, 3), 200, np.uint8)
    inside = np.zeros((8, 20), bool)
    inside[2:6, 4:16] = True
    wipe = compare(picture, truth, inside, "wipe", 0.25)
    assert (wipe[2:6, 4:6] == 200).all()
    assert (wipe[:, 6:8] == 255).all()  # the edge, a quarter of the way over the photo
    assert (wipe[:, 8:] == 40).all()
    assert (wipe[:2, :6] == 40).all()
    assert (compare(picture, truth, inside, "wipe", 1.0)[inside] == 200).all()
    blend = compare(picture, truth, inside, "blend", 0.25)
    assert (blend[inside] == 80).all()
    assert (blend[~inside] == 40).all()
    same = compare(truth, truth, inside, "error", 0.5)
    assert same[inside].max() <= 4  # the dark end
    assert compare(picture, truth, inside, "error", 0.5)[inside].min() > 100  # the bright end
    assert (compare(picture, truth, inside, "off", 0.5) == 40).all()


def test_frusta_hide_behind_what_is_solid_and_all_beside_a_photo() -> None:
    depth = np.full((300, 480), 2.0, np.float32)
    alpha = np.ones_like(depth)
    alpha[:, :240] = 0.2
    solid = occluder(depth, alpha)
    assert solid.shape == (150, 240)
    assert (solid[:, 120:] == 2).all()
    assert solid[:, :120].min() > 100
    photo = ramp_photo()
    eye = Eye(np.eye(4), 0.5, 480, 300)
    drawn = Drawn(np.zeros((300, 480, 3), np.float32), alpha, depth, Request(eye).camera(480, 300).Ks[0].numpy(), True)
    seen = compose(drawn, Request(eye, photo=photo, compare="off"), with_depth=True)
    assert seen.depth is not None
    assert seen.depth.max() > 100
    beside = compose(drawn, Request(eye, photo=photo, compare="wipe"), with_depth=True)
    assert beside.depth is not None
    assert beside.depth.max() < 0.01
    assert beside.psnr is not None
    elsewhere = np.eye(4)
    elsewhere[0, 3] = 0.1
    moved = compose(drawn, Request(Eye(elsewhere, 0.5, 480, 300), photo=photo, compare="wipe"), with_depth=False)
    assert moved.psnr is None
    assert (moved.rgb == 0).all()  # no photo over a picture from another place


def test_psnr_compares_like_with_like() -> None:
    photo, eye = ramp_photo(), Eye(np.eye(4), 2 * math.atan(HEIGHT / 2 / FY), 400, 240)
    K = Request(eye).camera(400, 240).Ks[0].double().numpy()
    colors = (ramp(K, 400, 240) / 255).astype(np.float32)
    ones = np.ones((240, 400), np.float32)
    exact = compose(Drawn(colors, ones, None, K, True), Request(eye, photo=photo), with_depth=False).psnr
    off = compose(Drawn(colors + 0.1, ones, None, K, True), Request(eye, photo=photo), with_depth=False).psnr
    assert exact is not None
    assert exact > 45
    assert off == pytest.approx(20, abs=0.6)  # 0.1, some of it clipped


def test_a_client_without_a_window_has_no_eye() -> None:
    wxyz, position = np.array([2.0, 0, 0, 0]), np.zeros(3)
    eye = Eye.checked(wxyz, position, 0.8, 640, 480)
    assert eye is not None
    assert np.array_equal(eye.camtoworld, np.eye(4))  # quaternions are normalised
    assert Eye.checked(wxyz, position, 0.8, 0, 480) is None
    assert Eye.checked(wxyz * math.nan, position, 0.8, 640, 480) is None
    assert Eye.checked(wxyz * 0, position, 0.8, 640, 480) is None
    assert Eye.checked(wxyz, position + math.inf, 0.8, 640, 480) is None
    assert Eye.checked(wxyz, position, math.nan, 640, 480) is None


@pytest.mark.parametrize("aspect", [0.7, 2.2])
def test_pose_looks_through_the_camera(aspect: float) -> None:
    """As the page builds its camera from position, target and up; rolled cameras, off-centre, pixels not square."""
    K = torch.from_numpy(PHOTO_K)[None].float()
    for pose in camtoworlds(9, (0.0, 0.0, 0.0)):
        camera = Cameras(torch.from_numpy(np.linalg.inv(pose))[None].float(), K, WIDTH, HEIGHT)
        there = pose_of(camera, np.array([0.0, 0.0, 1.0]), aspect)
        forward = there.look_at - there.position
        right = np.cross(forward, there.up)
        forward, right = forward / np.linalg.norm(forward), right / np.linalg.norm(right)
        assert np.abs(there.position - pose[:3, 3]).max() < 1e-5
        assert np.abs(np.stack([right, np.cross(forward, right), forward], 1) - pose[:3, :3]).max() < 1e-5
        assert there.look_at @ forward == pytest.approx(0, abs=1e-5)  # nearest to the centre
        # The photo's corners on a canvas of half height 1: all on it, one at its edge
        half = math.tan(there.fov / 2)
        x, y = np.array([-CX, WIDTH - CX]) / FX / half / aspect, np.array([-CY, HEIGHT - CY]) / FY / half
        assert max(np.abs(x).max(), np.abs(y).max()) == pytest.approx(1, abs=1e-5)


def test_pose_of_a_camera_that_looks_straight_down() -> None:
    pose = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 2], [0, 0, 0, 1]])
    camera = Cameras(torch.from_numpy(np.linalg.inv(pose))[None].float(), torch.from_numpy(PHOTO_K)[None].float(), 9, 9)
    there = pose_of(camera, np.array([0.0, 0.0, 1.0]), 1.0)
    assert there.up.tolist() == pytest.approx([0, 1, 0])


def test_evenly() -> None:
    assert evenly(3, 10) == [0, 1, 2]
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(0, 4) == []


class Simulation:
    """A client at its pace beside training steps of 30 ms; a picture costs `fixed` and `rate` for each pixel."""

    def __init__(self, fixed: float, rate: float) -> None:
        self.fixed, self.rate, self.full = fixed, rate, 700_000
        self.pace, self.now = Pace(), 100.0
        self.drawn: list[tuple[int, float]] = []

    def run(self, seconds: float, *, moving: bool, clients: int = 1) -> list[tuple[int, float]]:
        """(pixels, seconds) of the pictures drawn meanwhile."""
        end, before = self.now + seconds, len(self.drawn)
        while self.now < end:
            self.now += 0.030
            if moving:
                self.pace.changed(self.now, jump=False)
            if self.pace.due(self.now, clients=clients):
                self.draw()
        return self.drawn[before:]

    def draw(self, disturbed: float = 0.0) -> None:
        pixels = self.pace.pixels(self.now, self.full)
        seconds = self.fixed + self.rate * pixels + disturbed
        self.now += seconds
        self.pace.drawn(self.now, pixels, seconds, complete=pixels >= self.full, encoding=0.004)
        self.drawn.append((pixels, seconds))


@pytest.mark.parametrize("fixed", [0.0, 0.004, 0.015, 0.030])
@pytest.mark.parametrize("rate", [2e-9, 3e-8, 3e-7])
def test_no_picture_blocks_for_longer_than_planned(fixed: float, rate: float) -> None:
    simulation = Simulation(fixed, rate)
    moving, still = simulation.run(5, moving=True), simulation.run(5, moving=False)
    assert len(moving) > 40
    assert len(still) > 10
    assert max(seconds for _, seconds in simulation.drawn) < BLOCK_SECONDS
    # Nor is the time wasted on pictures smaller than could be
    possible = min(simulation.full, (0.020 - fixed) / rate)
    assert moving[-1][0] >= 0.7 * possible
    assert still[-1][0] >= 0.7 * min(simulation.full, (0.035 - fixed) / rate)
    assert sum(seconds for _, seconds in still) / 5 < 1.2 * STILL_SHARE


def test_clients_share_the_time() -> None:
    simulation = Simulation(0.012, 3e-8)
    simulation.run(3, moving=False)
    alone, shared = simulation.run(10, moving=False), simulation.run(10, moving=False, clients=4)
    assert len(shared) < len(alone) / 2.5


def test_a_disturbance_does_not_leave_pictures_small() -> None:
    simulation = Simulation(0.012, 3e-8)
    usual = simulation.run(3, moving=True)[-1][0]
    simulation.draw(disturbed=0.15)
    after = simulation.run(1, moving=True)
    assert len(after) > 3
    assert after[-1][0] > 0.7 * usual


def test_a_costlier_place_is_approached_carefully() -> None:
    simulation = Simulation(0.005, 2e-9)
    assert simulation.run(3, moving=True)[-1][0] == simulation.full
    simulation.rate = 1e-6
    simulation.pace.changed(simulation.now, jump=True)
    assert all(seconds < BLOCK_SECONDS for _, seconds in simulation.run(3, moving=True))


def test_a_scene_too_large_for_any_picture_is_drawn_seldom() -> None:
    simulation = Simulation(0.080, 1e-8)
    simulation.run(3, moving=True)
    assert 3 <= len(simulation.run(10, moving=True)) <= 6
    simulation.fixed = 0.010  # it was another program's doing
    assert len(simulation.run(10, moving=True)) > 50


def test_while_paused_a_still_picture_is_whole_at_once() -> None:
    client = Pace()
    client.changed(1.0, jump=True)
    assert client.pixels(1.1, 700_000, paused=True) < 20_000  # while moving
    client.drawn(1.1, 10_000, 0.02, complete=False)
    assert not client.due(1.15, paused=True)
    assert client.due(1.5, paused=True)
    assert client.pixels(1.5, 700_000, paused=True) == 700_000
    client.drawn(1.9, 700_000, 0.4, complete=True)
    assert not client.due(9.0, paused=True)


class RayScene:
    """A world whose colour is the direction of the ray: shows at once where a picture was taken from and how it lies."""

    broken = False
    failures = 0

    def tensors(self) -> dict[str, Tensor]:
        return {"means": torch.zeros(1, 3)}

    def render(
        self, cameras: Cameras, pixels: object, background: Tensor, extras: Collection[str] = ()
    ) -> RenderOutput:
        assert threading.current_thread() is threading.main_thread(), "only the training thread draws"
        if self.broken:
            self.failures += 1
            raise RuntimeError("out of memory")
        rgb = torch.from_numpy(self.colors(cameras)).float()[None]
        ones = torch.ones(rgb.shape[:3])
        depth = 2 * ones if "depth" in extras else None
        return RenderOutput(rgb, alpha=0.5 * ones, depth=depth)

    @staticmethod
    def colors(cameras: Cameras) -> np.ndarray:
        x, y = np.meshgrid(np.arange(cameras.width), np.arange(cameras.height))
        pixels = torch.from_numpy(np.stack([0 * x.ravel(), x.ravel(), y.ravel()], 1))
        dirs = cameras.rays(pixels)[1].numpy()
        return (0.5 + 0.5 * dirs).reshape(cameras.height, cameras.width, 3)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> SceneData:
    root = write_transforms(tmp_path_factory.mktemp("capture"), transforms(9))
    return load_scene(str(root), eval_every_nth=3)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pictures however slow this machine is: the pace has tests of its own."""
    for name in ("BLOCK_SECONDS", "_MOST_SECONDS", "_MOVING_SECONDS", "_STILL_SECONDS"):
        monkeypatch.setattr(pace, name, 60.0)


@pytest.fixture
def viewer(capture: SceneData, unhurried: None) -> Iterator[LiveViewer]:
    views = Views(capture.train), Views(capture.test)
    with_scene = LiveViewer("tiny", RayScene(), capture, *views, port=free_port("127.0.0.1", 18080))  # type: ignore[arg-type]
    yield with_scene
    with_scene.close()


def drive(viewer: LiveViewer, until: Callable[[], Any], seconds: float = 90.0) -> None:
    """Train for nothing until something is true."""
    end = time.monotonic() + seconds
    step = 0
    while not until():
        assert time.monotonic() < end, "waited in vain"
        step += 1
        viewer.update(step, {"step": step, "psnr": 21.5, "loss": 0.125, "primitives": 1234})
        time.sleep(0.003)


def canvas(client: LiveClient) -> Cameras:
    """The camera that the client looks through."""
    forward = client.look_at - client.position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, client.up)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, client.position], 1)
    focal = client.height / 2 / math.tan(client.fov / 2)
    K = torch.tensor([[[focal, 0, client.width / 2], [0, focal, client.height / 2], [0, 0, 1]]])
    return Cameras(torch.from_numpy(np.linalg.inv(pose))[None].float(), K.float(), client.width, client.height)


def shows(client: LiveClient, wanted: np.ndarray, tolerance: float = 6.0) -> bool:
    """Whether the newest picture is this one, as far as JPEG lets it be."""
    picture = client.picture
    if picture is None or picture.shape != wanted.shape:
        return False
    return float(np.abs(picture.astype(float) - wanted).mean()) < tolerance


def test_pictures_follow_the_camera_and_the_window(viewer: LiveViewer) -> None:
    with LiveClient(viewer.port) as client:
        drive(viewer, lambda: shows(client, 255 * RayScene.colors(canvas(client)), 2))
        before = client.picture
        client.orbit(0.8)
        drive(viewer, lambda: shows(client, 255 * RayScene.colors(canvas(client)), 2))
        assert not shows(client, before)
        client.look(up=np.array([0.3, 0.2, -1.0]), width=60, height=100, fov=1.4)
        drive(viewer, lambda: shows(client, 255 * RayScene.colors(canvas(client)), 2))
        assert client.depth is not None
        assert np.median(client.depth) > 100  # an alpha of 0.5 hides no frustum


def test_modes(viewer: LiveViewer) -> None:
    with LiveClient(viewer.port) as client:
        drive(viewer, lambda: client.pictures and "Show" in str(client.elements))
        client.set("Show", "Alpha")
        drive(viewer, lambda: shows(client, np.full((80, 120, 3), 128.0), 2))
        client.set("Background", (0, 0, 200))
        client.set("Show", "Normal")  # of a wall: towards the viewer, half of it, half of the background
        drive(viewer, lambda: shows(client, np.full((80, 120, 3), [64, 64, 228.0]), 4))
        client.set("Show", "Depth")
        drive(viewer, lambda: "depth" in client.texts)
        client.set("Show", "Color")
        client.set("Resolution", 0.5)
        drive(viewer, lambda: client.picture is not None and client.picture.shape[:2] == (40, 60))


def test_a_click_on_a_test_camera_shows_its_photo(viewer: LiveViewer, capture: SceneData) -> None:
    view = Views(capture.test)[1]
    with LiveClient(viewer.port, width=200, height=100) as client:
        drive(viewer, lambda: "Show" in str(client.elements) and "/test/00001" in client.nodes)
        client.click("/test/00001")
        drive(viewer, lambda: re.search(rf"`{capture.test[1].name}`: \d+\.\d dB", client.texts))
        assert np.abs(client.position - view.camera.centers[0].numpy()).max() < 1e-4
        client.set("Compare", "Blend")
        client.set("Photo", 1.0)
        wanted, inside = photo_on_canvas(
            Photo.of("", view), (0, 0, 0), canvas(client).Ks[0].double().numpy(), (200, 100)
        )
        render = 255 * RayScene.colors(canvas(client))
        drive(viewer, lambda: shows(client, np.where(inside[..., None], wanted, render), 4))
        assert 0.3 < inside.mean() < 1
        client.set(" ", "Next")
        following = Views(capture.test).camera(2).centers[0].numpy()
        drive(viewer, lambda: np.abs(client.position - following).max() < 1e-4)


def test_frusta_stand_where_the_cameras_are(viewer: LiveViewer, capture: SceneData) -> None:
    with LiveClient(viewer.port) as client:
        names = [f"/train/{i:05d}" for i in range(6)] + [f"/test/{i:05d}" for i in range(3)]
        drive(viewer, lambda: sorted(client.nodes) == sorted(names))
        tangent = math.tan(client.nodes["/train/00000"]["props"]["fov"] / 2)
        assert tangent == pytest.approx(HEIGHT / 2 / FY, rel=1e-5)
        aspect = client.nodes["/train/00000"]["props"]["aspect"]
        assert aspect * tangent == pytest.approx(WIDTH / 2 / FX, rel=1e-5)
        assert client.near > 0.03  # beyond the frustum through which one looks
        drive(viewer, lambda: all("_image_data" in client.nodes[n]["props"] for n in names))


def test_pause_holds_the_training_and_goes_on_drawing(viewer: LiveViewer) -> None:
    with LiveClient(viewer.port) as client:
        drive(viewer, lambda: client.pictures and "Pause training" in str(client.elements))
        client.set("Pause training", True)
        client.wait_for(lambda: viewer.paused)
        client.wait_for(lambda: client.element("Resume training"))
        client.orbit(1.0)
        for _ in range(100):
            viewer.wait()
            if shows(client, 255 * RayScene.colors(canvas(client)), 2):
                break
        assert shows(client, 255 * RayScene.colors(canvas(client)), 2)
        client.set("Resume training", True)
        client.wait_for(lambda: not viewer.paused)


def test_numbers_and_curves_reach_the_panel(viewer: LiveViewer) -> None:
    with LiveClient(viewer.port) as client:
        drive(viewer, lambda: "21.50 dB" in client.texts and "1,234" in client.texts and "0.1250" in client.texts)


def test_long_curves_are_thinned() -> None:
    class Element:
        content = ""
        data: tuple[np.ndarray, ...] = ()

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    class Gui:
        def add_folder(self, *_: object, **__: object) -> Element:
            return Element()

        def add_uplot(self, *_: object, **__: object) -> Element:
            charts.append(Element())
            return charts[-1]

    charts: list[Element] = []
    panel = Charts(Gui(), Element())
    for step in range(1, 5001):
        panel.record(step, {"step": step, "loss": 1 / step, "psnr": float(step)})
    panel.show(force=True)
    steps, values = charts[1].data
    assert 150 <= len(steps) <= 400
    assert steps[0] == 1
    assert steps[-1] > 4900
    assert np.array_equal(steps, values)
    assert np.diff(steps).max() < 40


def test_an_error_while_drawing_is_told_once_and_ends_nothing(
    viewer: LiveViewer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_BACK_OFF_SECONDS", 0.05)
    scene = viewer._scene
    scene.broken = True  # type: ignore[attr-defined]
    with LiveClient(viewer.port) as client, caplog.at_level(logging.WARNING, "prismfield"):
        end = time.monotonic() + 5
        drive(viewer, lambda: caplog.records or time.monotonic() > end)
        end = time.monotonic() + 0.3
        drive(viewer, lambda: time.monotonic() > end)
        assert [r.getMessage() for r in caplog.records] == [
            "live view: a picture failed, training goes on: RuntimeError: out of memory"
        ]
        assert scene.failures < 20  # type: ignore[attr-defined]  # not after each of a hundred steps
        scene.broken = False  # type: ignore[attr-defined]
        drive(viewer, lambda: client.pictures)


def test_a_port_in_use_is_passed_over(capture: SceneData, caplog: pytest.LogCaptureFixture) -> None:
    views = Views(capture.train), Views(capture.test)
    with socket.socket() as taken, caplog.at_level(logging.INFO, "prismfield"):
        first = free_port("127.0.0.1", 18200)
        taken.bind(("127.0.0.1", first))
        taken.listen()
        viewer = LiveViewer("tiny", RayScene(), capture, *views, port=first)  # type: ignore[arg-type]
        assert viewer.port > first
        assert f"{viewer.url} (port {first} is in use)" in caplog.text
        with LiveClient(viewer.port) as client:
            drive(viewer, lambda: client.pictures)
        viewer.close()
        viewer.close()
        viewer.update(1, {"step": 1})  # after the end: nothing happens
        assert not viewer.paused
        with pytest.raises(OSError, match="refused"):
            LiveClient(viewer.port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"live view: 192\.0\.2\.1 is not an address of this machine"):
        free_port("192.0.2.1", 8080)


def test_a_capture_without_test_views(capture: SceneData) -> None:
    views = Views(capture.train), Views([])
    viewer = LiveViewer("tiny", RayScene(), capture, *views, port=free_port("127.0.0.1", 18300))  # type: ignore[arg-type]
    with LiveClient(viewer.port) as client:
        drive(viewer, lambda: client.pictures)
        assert client.element("From")["props"]["options"] == ["train"]
    viewer.close()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_training_with_the_view_stays_open_until_ctrl_c(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 18400)
    words = ["--scene", "garden", "--downscale", "4", "--steps", "40", "--log.tests", "0", "--viewer", "--viewer-port"]
    command = [sys.executable, "-m", "prismfield.train.cli", *words, str(port), "--out", str(tmp_path / "run")]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert training.stderr is not None
        lines: list[str] = []
        for line in training.stderr:
            lines.append(line)
            if "Ctrl-C ends it" in line:
                break
        assert f"live view: http://127.0.0.1:{port}\n" in lines
        assert (tmp_path / "run" / "report.md").exists()  # finished before
        with LiveClient(port, width=240, height=160) as client:
            client.wait_for(lambda: client.picture is not None and len(client.picture) == 160)
            picture = client.picture
            assert picture is not None
            # What a new client sees is the first training view, if blurred yet, and upright
            photo = Photo.of("", Views(load_scene("garden").train, downscale=4)[0])
            truth, inside = photo_on_canvas(photo, (0, 0, 0), canvas(client).Ks[0].double().numpy(), (240, 160))
            error = np.abs(picture.astype(float) - truth)[inside].mean()
            assert error < 0.75 * np.abs(picture[::-1].astype(float) - truth)[inside].mean()
            assert error < 0.75 * np.abs(picture[:, ::-1].astype(float) - truth)[inside].mean()
        training.send_signal(signal.SIGINT)
        out, _ = training.communicate(timeout=20)
        assert training.returncode == 0
        assert out == ""  # viser's own words stay away
    finally:
        training.kill()
        training.wait()
