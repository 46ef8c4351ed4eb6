"""What one client of the live view sees and sets: its controls, its camera, the picture behind its scene."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from prismfield.datasets.views import Views
from prismfield.viewer.frames import Eye, Photo, Picture, Request
from prismfield.viewer.frusta import Split, pose_of
from prismfield.viewer.pace import Pace

if TYPE_CHECKING:
    import viser

    from prismfield.datasets.base import SceneFrame

log = logging.getLogger("prismfield")

_MODES = {"Color": "color", "Depth": "depth", "Alpha": "alpha", "Normal": "normal"}
_COMPARISONS = {"Off": "off", "Wipe": "wipe", "Blend": "blend", "Error": "error"}
_PANEL_WIDTH = 360  # of the photo in the panel, pixels


class Viewport:
    """One client, as the training thread knows it."""

    def __init__(
        self, send: Callable[[Picture, Request], None], background: tuple[float, float, float], wake: Callable
    ) -> None:
        """`send` delivers a picture, off the training thread; `wake` is called after every change."""
        self.send = send
        self.request = Request(background=background)
        """What to draw; replaced as a whole, so that whoever reads it once has it consistent."""
        self.pace = Pace()
        """The training thread's alone."""
        self.seen: Request | None = None
        """The request that `pace` knows of; the training thread's alone."""
        self.busy = False
        """A picture is being encoded."""
        self.encoding = 0.0
        """Seconds that encoding the last picture took."""
        self.retry_at = float("-inf")
        """When to try again, after a picture failed."""
        self._wake = wake
        self._lock = threading.Lock()

    def change(self, **values: Any) -> None:
        """Ask for something else; the names are those of `Request`."""
        with self._lock:
            self.request = replace(self.request, **values)
        self._wake()

    def look(self, camera: Any) -> None:
        """Take over the camera that a client reports."""
        eye = Eye.checked(camera.wxyz, camera.position, camera.fov, camera.image_width, camera.image_height)
        self.change(eye=eye)


class Panel:
    """The controls of one client. Its methods run on viser's threads."""

    def __init__(
        self,
        client: viser.ClientHandle,
        views: dict[Split, Views],
        frame: SceneFrame,
        background: tuple[float, float, float],
        wake: Callable[[], None],
    ) -> None:
        self.viewport = Viewport(self._send, background, wake)
        self._client, self._frame = client, frame
        self._views = {split: them for split, them in views.items() if len(them)}
        self._selected: tuple[Split, int] | None = None
        self._sent: tuple[str, str] = ("", "")
        gui: Any = client.gui  # handles take values that viser's types call read-only
        with gui.add_folder("View", order=1):
            self._mode = gui.add_dropdown("Show", list(_MODES))
            self._background = gui.add_rgb("Background", tuple(round(255 * c) for c in background))
            self._resolution = gui.add_slider(
                "Resolution", 0.1, 1.0, 0.05, 1.0, hint="Most of the window's width and height that is drawn"
            )
            self._status = gui.add_markdown("")
        with gui.add_folder("Photo", order=2):
            sources: list[str] = [*self._views]
            self._split = gui.add_dropdown("From", sources or ["none"], hint="Training or test views")
            self._index = gui.add_slider("View", 0, max(1, self._last_index()), 1, 0)
            self._step = gui.add_button_group(" ", ["Previous", "Look", "Next"])
            self._compare = gui.add_dropdown("Compare", list(_COMPARISONS), hint="Render and photo in one picture")
            self._amount = gui.add_slider("Photo", 0.0, 1.0, 0.01, 0.5, hint="Share of the photo in wipe and blend")
            self._caption = gui.add_markdown("Click a camera, or **Look** through one, to see its photo.")
            self._image = gui.add_image(np.zeros((2, 2, 3), np.uint8), format="jpeg", visible=False)
        self._connect()

    def _connect(self) -> None:
        """Tie the controls to the request."""
        change = self.viewport.change

        @self._client.camera.on_update
        async def _(camera: viser.CameraHandle) -> None:  # async: runs in order, on viser's loop
            self.viewport.look(camera)

        self._mode.on_update(lambda _: change(mode=_MODES[self._mode.value]))
        self._background.on_update(lambda _: change(background=tuple(c / 255 for c in self._background.value)))
        self._resolution.on_update(lambda _: change(resolution=float(self._resolution.value)))
        self._compare.on_update(lambda _: self._compare_photo())
        self._amount.on_update(lambda _: change(split=float(self._amount.value)))
        self._split.on_update(lambda _: self._choose_split())
        self._step.on_click(lambda _: self._move({"Previous": -1, "Look": 0, "Next": 1}[self._step.value]))
        self._index.on_update(lambda event: None if event.client is None else self._move(0))
        self.viewport.look(self._client.camera)

    def look_through(self, split: Split, index: int) -> None:
        """Move the client to a view of the capture and show its photo."""
        if split not in self._views:
            return
        self._selected = split, index
        self._split.value = split
        self._index.value = index
        try:
            camera = self._client.camera
            pose = pose_of(self._views[split].camera(index), np.array(self._frame.up), camera.aspect)
            with self._client.atomic():
                camera.position = pose.position
                camera.look_at = pose.look_at
                camera.up_direction = pose.up
                camera.fov = pose.fov
            name = self._views[split].frame(index).name
            photo = Photo.of(name, self._views[split][index])
        except Exception as error:  # a window without height, a camera of NaNs, a damaged image: nothing to look at
            log.debug("live view: %s view %d: %s", split, index, error)
            self._caption.content = f"This view cannot be shown: {error}"
            return
        if self._selected != (split, index):  # another was chosen meanwhile
            return
        height, width = photo.rgb.shape[:2]
        shrink = min(1.0, _PANEL_WIDTH / width)
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        self._image.image = cv2.resize(photo.over((0.5, 0.5, 0.5)), size, interpolation=cv2.INTER_AREA)
        self._image.visible = True
        self._caption.content = f"`{name}`"
        self.viewport.change(photo=photo)

    def _compare_photo(self) -> None:
        how = _COMPARISONS[self._compare.value]
        if how != "off" and self.viewport.request.photo_in_place is None:
            self._move(0)
        self.viewport.change(compare=how)

    def _choose_split(self) -> None:
        self._index.max = max(1, self._last_index())
        self._index.value = min(self._index.value, self._last_index())

    def _last_index(self) -> int:
        return len(self._views[self._split.value]) - 1 if self._views else 0

    def _move(self, by: int) -> None:
        if self._views:
            index = min(int(self._index.value), self._last_index())
            self.look_through(self._split.value, (index + by) % (self._last_index() + 1))

    def _send(self, picture: Picture, request: Request) -> None:
        """Deliver a picture."""
        quality = 90 if picture.complete else 75
        self._client.scene.set_background_image(picture.rgb, "jpeg", jpeg_quality=quality, depth=picture.depth)
        self._client.flush()
        height, width = picture.rgb.shape[:2]
        status = f"{width} × {height}"
        if picture.depth_range is not None:
            near, far = (value / self._frame.scale for value in picture.depth_range)
            status += f", depth {near:.3g} to {far:.3g}"
        elif picture.lacks_depth:
            status += ": this representation renders no depth"
        caption = ""
        if request.photo is not None:
            caption = f"`{request.photo.name}`"
            caption += f": {picture.psnr:.1f} dB at this resolution" if picture.psnr is not None else ""
        if (status, caption) != self._sent:
            self._sent = status, caption
            self._status.content = status
            if caption:
                self._caption.content = caption
