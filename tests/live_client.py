"""A client of the live view for tests: speaks viser's protocol over a real connection, as the page in the browser does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import cv2
import msgspec
import numpy as np
import viser
import websockets.sync.client
import zstandard
from viser import _messages
from viser.transforms import SO3


class LiveClient:
    """Connected from the start; keeps the newest picture and what the panel shows."""

    def __init__(self, port: int, *, width: int = 120, height: int = 80, host: str = "127.0.0.1") -> None:
        self.width, self.height = width, height
        self.position, self.look_at = np.array([1.5, 0.0, 0.5]), np.zeros(3)
        self.up, self.fov, self.near = np.array([0.0, 0.0, 1.0]), 0.9, 0.01
        self.picture: np.ndarray | None = None
        """[H, W, 3] RGB."""
        self.depth: np.ndarray | None = None
        """[h, w] scene units: what the page hides frusta behind."""
        self.pictures = 0
        self.elements: dict[str, dict[str, Any]] = {}
        """Messages that made the panel's elements, by their id, with later changes applied."""
        self.nodes: dict[str, dict[str, Any]] = {}
        """Messages that made the scene's nodes, by name."""
        self._connection = websockets.sync.client.connect(
            f"ws://{host}:{port}", subprotocols=[f"viser-v{viser.__version__}"], max_size=None, compression=None
        )
        self._send_lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.look()

    def __enter__(self) -> LiveClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._thread.join(5)

    @property
    def texts(self) -> str:
        """All markdown of the panel."""
        return "\n".join(e["props"]["_markdown"] for e in self.elements.values() if e["type"] == "GuiMarkdownMessage")

    def look(self, **values: Any) -> None:
        """Report a camera: `position`, `look_at`, `up`, `fov`, `width`, `height`."""
        for name, value in values.items():
            setattr(self, name, value)
        forward = self.look_at - self.position
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, self.up)
        right /= np.linalg.norm(right)
        rotation = SO3.from_matrix(np.stack([right, np.cross(forward, right), forward], 1))
        self._send(
            _messages.ViewerCameraMessage(
                wxyz=tuple(rotation.wxyz.tolist()),
                position=tuple(map(float, self.position)),
                fov=self.fov,
                near=self.near,
                far=1000.0,
                image_height=self.height,
                image_width=self.width,
                look_at=tuple(map(float, self.look_at)),
                up_direction=tuple(map(float, self.up)),
            )
        )

    def orbit(self, radians: float) -> None:
        """Turn around the point looked at."""
        arm = self.position - self.look_at
        self.look(position=self.look_at + SO3.exp(radians * self.up / np.linalg.norm(self.up)).as_matrix() @ arm)

    def element(self, label: str) -> dict[str, Any]:
        """The panel's control with this label."""
        return next(e for e in self.elements.values() if "value" in e and e["props"].get("label") == label)

    def set(self, label: str, value: Any) -> None:
        """Use a control."""
        self._send(_messages.GuiUpdateMessage(self.element(label)["uuid"], {"value": value}))

    def click(self, name: str) -> None:
        """Click a node of the scene."""
        zero = (0.0, 0.0, 0.0)
        owner = self.nodes[name].get("owner", "")
        self._send(_messages.SceneNodeClickMessage(name, None, zero, zero, (0.5, 0.5), None, owner))

    def wait_for(self, what: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait until `what()` is true, or fail."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self._thread.is_alive(), "the connection ended"
            try:
                value = what()
            except (StopIteration, RuntimeError):  # not there yet, or changed while looked at
                value = None
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError("waited in vain")

    def _send(self, message: Any) -> None:
        with self._send_lock:
            self._connection.send(msgspec.msgpack.encode(message.as_serializable_dict()))

    def _read(self) -> None:
        try:
            for raw in self._connection:
                assert isinstance(raw, bytes)
                size = int.from_bytes(raw[8:16], "little")
                body = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(raw[16 : 16 + size]))
                moved = [self._take(message) for message in body["messages"]]
                if any(moved):
                    self.look()
        except websockets.ConnectionClosed:
            pass

    def _take(self, message: dict[str, Any]) -> bool:
        """Apply a message; whether it moved the camera."""
        kind = message["type"]
        if kind == "BackgroundImageMessage" and message["rgb_data"] is not None:
            self.picture, self.depth = _decode(message["rgb_data"]), None
            if message["depth_data"] is not None:
                # 24 bits in three channels, the lowest in blue, in units of 1e-5
                pixels = cv2.imdecode(np.frombuffer(message["depth_data"], np.uint8), cv2.IMREAD_COLOR)
                self.depth = pixels.astype(np.float64) @ [1.0, 256.0, 65536.0] / 1e5
            self.pictures += 1
        elif kind == "GuiUpdateMessage" and message["uuid"] in self.elements:
            element = self.elements[message["uuid"]]
            for name, value in message["updates"].items():
                (element if name == "value" else element["props"])[name] = value
        elif kind.startswith("Gui") and "props" in message:
            self.elements[message["uuid"]] = message
        elif kind == "CameraFrustumMessage":
            self.nodes[message["name"]] = message
        elif kind == "SceneNodeUpdateMessage" and message["name"] in self.nodes:
            self.nodes[message["name"]]["props"].update(message["updates"])
        elif kind.startswith("SetCamera"):
            name = kind.removeprefix("SetCamera").removesuffix("Message")
            fields = {"Position": "position", "LookAt": "look_at", "UpDirection": "up", "Fov": "fov", "Near": "near"}
            value = next(v for k, v in message.items() if k in ("position", "look_at", "fov", "near"))
            setattr(self, fields[name], np.array(value) if isinstance(value, (list, tuple)) else value)
            return True
        return False


def _decode(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
