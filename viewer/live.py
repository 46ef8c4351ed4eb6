"""The live view of a training: a page in the browser to fly through the scene while it is optimized.

Only the training thread draws, between two steps, so that no picture shows half an update; everything else happens on
the server's threads and on one worker that colours, encodes and sends.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import rich
import torch
import viser

from prismfield.datasets.base import SceneData
from prismfield.datasets.views import Views
from prismfield.representations.base import Representation
from prismfield.viewer.charts import Charts
from prismfield.viewer.frames import Drawn, Request, compose
from prismfield.viewer.frusta import Frusta, Split, pose_of
from prismfield.viewer.panel import Panel, Viewport

log = logging.getLogger("prismfield")

_PORTS_TRIED = 100
_WAIT_SECONDS = 0.1  # most that `wait` blocks, so that Ctrl-C is noticed
_FRUSTUM_SIZE = 0.03  # scene units; cameras stand about 1 from the centre
_BACK_OFF_SECONDS = 2.0  # for a client whose picture failed
_JUMP_RADIANS, _JUMP_DISTANCE = 0.2, 0.2  # moves after which drawing may cost something else


class LiveViewer:
    """Serves the live view until it is closed.

    The loop calls `update` after every step and, while `paused`, `wait` instead of a step.
    """

    def __init__(
        self,
        run_name: str,
        scene: Representation,
        data: SceneData,
        train_views: Views,
        test_views: Views,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
    ) -> None:
        """Start serving on `port`, or on the next one that is free.

        Args:
            run_name: what the page is titled.
            scene: what to draw, always the same object while it trains.
            data: the capture; its up axis and its background.
            train_views: views as they are trained on.
            test_views: views held out.
            host: "0.0.0.0" opens the view to the network, to anyone.
            port: first one to try.

        Raises:
            ValueError: the host is not an address of this machine, or no port is free.
        """
        self._scene, self._data = scene, data
        self._device = next(iter(scene.tensors().values())).device
        self._background = (1.0, 1.0, 1.0) if data.background == "white" else (0.0, 0.0, 0.0)
        self._views: dict[Split, Views] = {"train": train_views, "test": test_views}
        self._panels: dict[int, Panel] = {}
        """By client; replaced as a whole, so that the training thread can go through it at any time."""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._paused = self._waiting = self._closed = self._failed = self._finished = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="live-view")
        # A client may leave while its panel is built.
        warnings.filterwarnings("ignore", r"Queued a \w+ on a closed connection", UserWarning)
        self.port = free_port(host, port)
        with _quiet():
            self._server = viser.ViserServer(host, self.port, label=f"Prismfield: {run_name}", verbose=False)
        self.port = self._server.get_port()  # another program may have been faster
        self.url = f"http://{'localhost' if host == '0.0.0.0' else host}:{self.port}"
        self._build()
        busy = "" if self.port == port else f" (port {port} is in use)"
        log.info("live view: %s%s", self.url, busy)

    @property
    def paused(self) -> bool:
        """Whether a client asked the training to wait."""
        return self._paused and not self._closed

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """A step is done; draws at most one picture, if one is due. Never raises."""
        self._waiting = False
        try:
            self._charts.record(step, metrics)
            if self._panels and not self._closed:
                self._draw_next(paused=False)
                self._charts.show()
        except Exception as error:
            self._complain(error)

    def wait(self) -> None:
        """Instead of a step, while paused or finished: serve pictures at full quality; returns after a moment."""
        try:
            if not self._waiting:  # show the scene as it stays
                self._waiting = True
                self._charts.show(force=True)
                for panel in self._panels.values():
                    panel.viewport.pace.changed(time.perf_counter(), jump=False)
            self._wake.wait(_WAIT_SECONDS)
            self._wake.clear()
            while (self.paused or self._finished) and not self._wake.is_set() and self._draw_next(paused=True):
                pass
        except Exception as error:
            self._complain(error)

    def finish(self) -> None:
        """The training is over: from now on there is nothing to pause, and `wait` alone draws."""
        self._finished, self._waiting = True, False
        self._pause.visible = False

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._frusta.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        with _quiet():
            self._server.stop()

    def _build(self) -> None:
        """Everything that all clients share."""
        server, gui = self._server, self._server.gui
        gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, brand_color=(70, 140, 255))
        gui.main_panel.dock_right()
        up = np.array(self._data.frame.up)
        server.scene.set_up_direction(up)
        first = next((views.camera(0) for views in self._views.values() if len(views)), None)
        if first is not None:
            pose = pose_of(first, up, first.width / first.height)
            camera = server.initial_camera
            camera.position, camera.look_at, camera.up, camera.fov = pose.position, pose.look_at, pose.up, pose.fov
        with gui.add_folder(None, order=0):
            self._pause = gui.add_button("Pause training", order=2)
            self._pause.on_click(lambda _: self._toggle_pause())
            text = gui.add_markdown("")
        self._charts = Charts(gui, text)
        self._frusta = Frusta(server, self._views, self._look_through, _FRUSTUM_SIZE)
        server.initial_camera.near = self._frusta.near(_FRUSTUM_SIZE)
        with gui.add_folder("Cameras", order=3):
            for split in self._views:
                box = gui.add_checkbox({"train": "Training", "test": "Test"}[split], True)
                box.on_update(partial(self._show_frusta, split))
            size = gui.add_slider("Size", 0.01, 0.15, 0.005, _FRUSTUM_SIZE)
            size.on_update(lambda event: self._resize_frusta(event.target.value))
        server.on_client_connect(self._connect)
        server.on_client_disconnect(self._disconnect)

    def _connect(self, client: viser.ClientHandle) -> None:
        panel = Panel(client, self._views, self._data.frame, self._background, self._wake.set)
        with self._lock:
            if client.client_id in self._server.get_clients():  # else gone already
                self._panels = {**self._panels, client.client_id: panel}
        self._frusta.start_thumbnails()
        self._wake.set()

    def _disconnect(self, client: viser.ClientHandle) -> None:
        with self._lock:
            self._panels = {key: panel for key, panel in self._panels.items() if key != client.client_id}

    def _look_through(self, client: viser.ClientHandle, split: Split, index: int) -> None:
        panel = self._panels.get(client.client_id)
        if panel is not None:
            panel.look_through(split, index)

    def _show_frusta(self, split: Split, event: viser.GuiEvent) -> None:
        self._frusta.show(split, event.target.value)
        for panel in self._panels.values():  # with or without what hides them
            panel.viewport.change()

    def _resize_frusta(self, size: float) -> None:
        self._frusta.resize(size)
        self._server.initial_camera.near = self._frusta.near(size)
        for client in self._server.get_clients().values():
            client.camera.near = self._frusta.near(size)

    def _toggle_pause(self) -> None:
        self._paused = not self._paused
        self._pause.label = "Resume training" if self._paused else "Pause training"
        log.info("training %s from the live view", "paused" if self._paused else "resumed")
        self._wake.set()

    def _draw_next(self, *, paused: bool) -> bool:
        """Draw one picture for the client that has waited longest, if one is due; whether one was."""
        now, panels = time.perf_counter(), self._panels
        due = []
        for panel in panels.values():
            view, request = panel.viewport, panel.viewport.request
            if request is not view.seen:
                view.pace.changed(now, jump=_jumps(view.seen, request))
                view.seen = request
            ready = request.eye is not None and not view.busy and now >= view.retry_at
            if ready and view.pace.due(now, paused=paused, clients=len(panels)):
                due.append(view)
        if not due:
            return False
        view = min(due, key=lambda view: view.pace.drawn_at)
        try:
            self._draw(view, now, paused)
        except Exception as error:
            view.retry_at, view.busy = time.perf_counter() + _BACK_OFF_SECONDS, False
            self._complain(error)
        return True

    @torch.no_grad()
    def _draw(self, view: Viewport, now: float, paused: bool) -> None:
        """Draw a client's picture and hand it to the worker."""
        request = view.seen
        assert request is not None
        full = request.full_pixels()
        pixels = view.pace.pixels(now, full, paused=paused)
        camera = request.camera(*request.size(pixels)).to(self._device)
        with_depth = self._frusta.shown
        extras = ("depth",) if with_depth or request.mode in ("depth", "normal") else ()
        background = torch.tensor([request.background], device=self._device)
        out = self._scene.render(camera, None, background, extras)
        depth = None if out.depth is None else out.depth[0].cpu().numpy()
        complete = pixels >= full
        drawn = Drawn(
            out.rgb[0].cpu().numpy(), out.alpha[0].cpu().numpy(), depth, camera.Ks[0].double().cpu().numpy(), complete
        )
        ended = time.perf_counter()
        view.pace.drawn(ended, camera.width * camera.height, ended - now, complete=complete, encoding=view.encoding)
        view.busy = True
        self._worker.submit(self._deliver, view, drawn, request, with_depth)

    def _deliver(self, view: Viewport, drawn: Drawn, request: Request, with_depth: bool) -> None:
        """Colour, encode and send a picture; the worker's."""
        began = time.perf_counter()
        try:
            view.send(compose(drawn, request, with_depth=with_depth), request)
        except Exception as error:
            view.retry_at = time.perf_counter() + _BACK_OFF_SECONDS
            if not self._closed:
                self._complain(error)
        finally:
            view.encoding = time.perf_counter() - began
            view.busy = False
            self._wake.set()

    def _complain(self, error: Exception) -> None:
        """The view must not end a training: the first error is told, the rest are not."""
        level = logging.DEBUG if self._failed else logging.WARNING
        log.log(level, "live view: a picture failed, training goes on: %s: %s", type(error).__name__, error)
        self._failed = True


def _jumps(before: Request | None, after: Request) -> bool:
    """Whether what the next picture costs cannot be told from the last one."""
    if before is None or before.eye is None or after.eye is None or before.mode != after.mode:
        return True
    zoomed = abs(math.log(math.tan(after.eye.fov / 2) / math.tan(before.eye.fov / 2))) > _JUMP_RADIANS
    return zoomed or not after.eye.near(before.eye.camtoworld, radians=_JUMP_RADIANS, distance=_JUMP_DISTANCE)


def free_port(host: str, first: int) -> int:
    """The first port of `host`, counting from `first`, that nobody listens on.

    Raises:
        ValueError: the host is not an address of this machine, or none of the ports tried is free.
    """
    last = min(first + _PORTS_TRIED, 1 << 16) - 1
    for port in range(first, last + 1):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # elsewhere it would let two servers share a port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return port
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"live view: {host} is not an address of this machine") from None
    raise ValueError(f"live view: none of the ports {first} to {last} can be used on {host}; try another first one")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what viser prints about itself; our log says where the view is."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
