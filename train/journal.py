"""The numbers of a run as they come: metrics.jsonl, and the same for TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import cv2
from torch import Tensor

from prismfield.train.folder import METRICS, write_text

log = logging.getLogger("prismfield")


class Journal:
    """Appends lines to metrics.jsonl and events to TensorBoard's file. Each line has `step` and `seconds` of training."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        """Go on after `step`: lines beyond it, of a run that was killed after its last checkpoint, are dropped.

        Raises:
            OSError: the files cannot be written.
        """
        path = folder / METRICS
        if path.exists():
            write_text(path, "".join(f"{line}\n" for line in _lines_until(path, step)))
        self._file = path.open("a", encoding="utf-8")
        self._board = _Board.open(folder, step) if tensorboard else None

    def write(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """One line of numbers; NaN, which JSON does not know, is left out."""
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self._file.write(json.dumps({"step": step, "seconds": round(seconds, 3)} | values) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.scalars(
                step, {name if "/" in name else f"train/{name}": value for name, value in values.items()}
            )

    def picture(self, step: int, name: str, rgb: Tensor) -> None:
        """An image [H, W, 3] in 0..1, for TensorBoard alone."""
        if self._board is not None:
            self._board.picture(step, name, rgb)

    def close(self) -> None:
        """Write out what is left."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that was cut off at the end is left out."""
    found: list[dict[str, Any]] = []
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _lines_until(path: Path, step: int) -> list[str]:
    return [json.dumps(values) for values in read_metrics(path.parent) if values.get("step", 0) <= step]


class _Board:
    """TensorBoard's event file: records of protocol buffers with checksums.

    Written here because `torch.utils.tensorboard` takes over a second to import, and its thread turns a full disk into a
    traceback.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._events, self._summaries = event_pb2, summary_pb2
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (folder / name).open("wb")
        self._record(file_version="brain.Event:2")
        if step > 0:  # so that points beyond it, in the file of a process that was killed, are not shown
            self._record(step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    @classmethod
    def open(cls, folder: Path, step: int) -> _Board | None:
        """None, with a line in the log, where TensorBoard is not installed."""
        try:
            return cls(folder, step)
        except ImportError as error:
            log.warning("no TensorBoard file (%s); pip install tensorboard", error)
            return None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        summary = self._summaries.Summary(
            value=[self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._record(step=step, summary=summary)

    def picture(self, step: int, name: str, rgb: Tensor) -> None:
        pixels = (rgb.clamp(0, 1) * 255).round().byte().numpy()
        data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[
            1
        ].tobytes()
        image = self._summaries.Summary.Image(
            height=rgb.shape[0], width=rgb.shape[1], colorspace=3, encoded_image_string=data
        )
        value = self._summaries.Summary.Value(tag=name, image=image)
        self._record(step=step, summary=self._summaries.Summary(value=[value]))

    def close(self) -> None:
        self._file.close()

    def _record(self, **fields: Any) -> None:
        data = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        self._file.flush()


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
    """Masked CRC-32C (Castagnoli), as the TFRecord format wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
