"""The capture's cameras in the live view: frusta with thumbnails, and how to look through one."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from viser.transforms import SO3

from prismfield.datasets.views import Views
from prismfield.render.cameras import Cameras
from prismfield.viewer.frames import Photo

log = logging.getLogger("prismfield")

Split = Literal["train", "test"]
_COLORS: dict[Split, tuple[int, int, int]] = {"train": (70, 140, 255), "test": (255, 150, 40)}
_MOST_FRUSTA = {"train": 300, "test": 100}
_MOST_THUMBNAILS = 150
_THUMBNAIL_WIDTH = 96
_FARTHEST_NEAR = 0.9  # scene units; viser shows the picture at distance 1
_DUTY = 0.25  # most of one processor that decoding thumbnails takes


@dataclass(frozen=True)
class Pose:
    """How to place a client's camera to look through one of the capture's."""

    position: NDArray[np.float64]
    look_at: NDArray[np.float64]
    """On the optical axis, nearest to the centre of the scene, so that orbiting goes around the content."""
    up: NDArray[np.float64]
    """The scene's, turned as little as the camera's roll needs."""
    fov: float
    """Vertical, radians: the whole photo fits the canvas."""


def pose_of(camera: Cameras, scene_up: NDArray[np.float64], aspect: float) -> Pose:
    """The pose of a pinhole camera for a canvas of `aspect` = width / height."""
    camtoworld = np.linalg.inv(camera.viewmats[0].double().numpy())
    right, down, forward, position = camtoworld[:3, :4].T
    distance = -float(position @ forward)
    if distance < 0.1:  # scene units: cameras stand about 1 from the centre
        distance = 1.0
    up = scene_up - (scene_up @ right) * right
    if float(up @ -down) < 0.05:  # the camera hangs over, or looks along the scene's up
        up = -down
    fx, fy, cx, cy = (float(camera.Ks[0, i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    half = max(cy / fy, (camera.height - cy) / fy, max(cx, camera.width - cx) / fx / aspect)
    return Pose(position, position + distance * forward, up / np.linalg.norm(up), min(2 * math.atan(half), 2.8))


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices spread over `count`, the first among them."""
    return [i * count // min(count, most) for i in range(min(count, most))]


class Frusta:
    """Frusta of a server's scene; clicking one calls `on_click(client, split, index)`."""

    def __init__(
        self, server: Any, views: dict[Split, Views], on_click: Callable[[Any, Split, int], None], size: float
    ) -> None:
        self._views = views
        self._handles: dict[tuple[Split, int], Any] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._reach = 1.0  # of the longest frustum, in its size
        self._parents = {split: server.scene.add_frame(f"/{split}", show_axes=False) for split in views}
        for split, them in views.items():
            for index in evenly(len(them), _MOST_FRUSTA[split]):
                camera = them.camera(index)
                fx, fy = float(camera.Ks[0, 0, 0]), float(camera.Ks[0, 1, 1])
                # viser draws frusta of equal volume
                volume = camera.width * camera.height / (4 * fx * fy) / 3
                self._reach = max(self._reach, volume ** (-1 / 3))
                handle = server.scene.add_camera_frustum(
                    f"/{split}/{index:05d}",
                    fov=2 * math.atan(camera.height / (2 * fy)),
                    aspect=camera.width / fx * fy / camera.height,
                    scale=size,
                    thickness=1.5,
                    thickness_units="screen",
                    color=_COLORS[split],
                    cast_shadow=False,
                    receive_shadow=False,
                    wxyz=SO3.from_matrix(camera.viewmats[0, :3, :3].double().numpy().T).wxyz,
                    position=camera.centers[0].double().numpy(),
                )
                handle.on_click(lambda event, split=split, index=index: on_click(event.client, split, index))
                self._handles[split, index] = handle

    @property
    def shown(self) -> bool:
        """Whether any frustum is visible."""
        return any(parent.visible for parent in self._parents.values())

    def show(self, split: Split, visible: bool) -> None:
        """Show or hide the frusta of a split."""
        self._parents[split].visible = visible

    def near(self, size: float) -> float:
        """Distance from which on frusta of this size can be seen: none hides the view of who looks through its camera."""
        return min(1.02 * self._reach * size, _FARTHEST_NEAR)

    def resize(self, size: float) -> None:
        """Scale all frusta."""
        for handle in self._handles.values():
            handle.scale = size

    def start_thumbnails(self) -> None:
        """Decode thumbnails in the background, once."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._add_thumbnails, name="thumbnails", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop the background work."""
        with self._lock:
            self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _add_thumbnails(self) -> None:
        keys = list(self._handles)
        for key in (keys[i] for i in evenly(len(keys), _MOST_THUMBNAILS)):
            split, index = key
            began = time.perf_counter()
            try:
                photo = Photo.of("", self._views[split][index]).over((0.5, 0.5, 0.5))
                height = max(1, round(photo.shape[0] * _THUMBNAIL_WIDTH / photo.shape[1]))
                self._handles[key].image = cv2.resize(photo, (_THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
            except Exception as error:  # a damaged image is the training's to report
                log.debug("no thumbnail of %s view %d: %s", split, index, error)
            if self._stop.wait((time.perf_counter() - began) * (1 / _DUTY - 1)):
                return
