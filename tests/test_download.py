"""render-data download against a server on this machine: resume, checksums, hostile archives, a full disk, no network."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import socket
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prismfield.cli import one_line
from prismfield.datasets import download as module
from prismfield.datasets import http_file
from prismfield.datasets.download import SCENES, Source, fetch_scene

from .commands import command, refused


def noise(seed: int, count: int = 400_000) -> bytes:
    """Bytes that do not compress."""
    return np.random.default_rng(seed).bytes(count)


FILES = {
    "other/a.bin": noise(0, 3_000_000),
    "garden/sparse/0/cameras.bin": noise(1),
    "garden/images/0.jpg": noise(2),
    "another/b.bin": noise(3, 3_000_000),
    "garden/images/1.jpg": b"0" * 100_000,
}
WANTED = {name.removeprefix("garden/"): data for name, data in FILES.items() if name.startswith("garden/")}


def archive(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


ARCHIVE = archive(FILES)


@dataclass
class Served:
    """What the server gives, and what it was asked."""

    content: bytes = ARCHIVE
    tag: str = '"one"'
    ranges: bool = True
    breaks_after: int | None = None
    """Bytes, over all answers, after which the connection breaks; then it answers nothing any more."""
    resets: bool = False
    """Whether a break is an error (reset) and not an early end."""
    linked_digest: str = ""
    """What Hugging Face's first answer says of the file that it redirects to."""
    sent: int = 0
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, served: Served, *rest: Any) -> None:
        self.served = served
        super().__init__(*rest)

    def log_message(self, *words: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.served
        if self.path == "/linked.zip":
            self.send_response(302)
            self.send_header("Location", "/scenes.zip")
            self.send_header("X-Linked-Etag", f'"{served.linked_digest}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.path != "/scenes.zip":
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        served.asked.append(wanted)
        start, end = 0, len(served.content)
        if wanted is not None and served.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), int(last) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(served.content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", served.tag)
        self.end_headers()
        breaks = served.breaks_after is not None and served.sent + end - start > served.breaks_after
        if served.breaks_after is not None:
            end = min(end, start + max(0, served.breaks_after - served.sent))
        served.sent += end - start
        self.wfile.write(served.content[start:end])
        if breaks and served.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(http_file, "time", SimpleNamespace(sleep=lambda seconds: None))
    served = Served()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, served))  # type: ignore[arg-type]
    server.handle_error = lambda *words: None  # type: ignore[method-assign]  # clients that hang up are expected
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/scenes.zip"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def source(served: Served, **values: Any) -> tuple[Source, ...]:
    return (Source(served.url, "garden", **values),)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_wanted_scene_is_fetched(served: Served, tmp_path: Path) -> None:
    target = fetch_scene(source(served), tmp_path / "garden")
    assert tree(target) == WANTED
    assert served.sent < 2_000_000 < len(ARCHIVE)  # neither of the other scenes' 3 MB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garden"]  # nothing left over


@pytest.mark.parametrize("stop", [300_000, 700_000])
def test_an_interrupted_download_goes_on_where_it_stopped(served: Served, tmp_path: Path, stop: int) -> None:
    target = tmp_path / "garden"
    directory = 1 + (1 << 18)  # asked for before the scene itself
    served.breaks_after = directory + stop
    with pytest.raises(ConnectionError, match=r"^127\.0\.0\.1:\d+: .*the same command goes on where it stopped$"):
        fetch_scene(source(served), target)
    assert not target.exists()
    kept = (tmp_path / "garden.part").stat().st_size
    assert 0.8 * stop < kept <= stop
    served.breaks_after, served.sent = None, 0
    assert tree(fetch_scene(source(served), target)) == WANTED
    assert served.sent <= 800_000 + directory + 20_000 - kept + (1 << 18)


@pytest.mark.parametrize("resets", [False, True])
def test_a_connection_that_breaks_once_is_taken_up_within_the_same_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resets: bool
) -> None:
    served.breaks_after, served.resets = 500_000, resets

    def repair(seconds: float) -> None:
        served.breaks_after = None

    monkeypatch.setattr(http_file, "time", SimpleNamespace(sleep=repair))
    assert tree(fetch_scene(source(served), tmp_path / "garden")) == WANTED


def test_a_file_that_changed_on_the_server_is_begun_anew(served: Served, tmp_path: Path) -> None:
    served.breaks_after = 700_000
    with pytest.raises(ConnectionError):
        fetch_scene(source(served), tmp_path / "garden")
    files = FILES | {"garden/images/0.jpg": noise(9)}
    served.content, served.tag, served.breaks_after = archive(files), '"two"', None
    assert tree(fetch_scene(source(served), tmp_path / "garden"))["images/0.jpg"] == files["garden/images/0.jpg"]


def test_a_server_without_ranges_sends_the_whole_archive(served: Served, tmp_path: Path) -> None:
    served.ranges = False
    assert tree(fetch_scene(source(served), tmp_path / "garden")) == WANTED


def test_published_checksums(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served.content = archive({name: data for name, data in FILES.items() if name.startswith("garden/")})
    digest = hashlib.sha256(served.content).hexdigest()
    fetch_scene(source(served, sha256=digest), tmp_path / "right")
    assert f"sha256 of the archive agrees ({digest[:12]}...)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"wrong checksum: sha256 is {digest}, expected {'0' * 64}"):
        fetch_scene(source(served, sha256="0" * 64), tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right"]


def test_the_checksum_that_hugging_face_states_is_compared(served: Served, tmp_path: Path) -> None:
    served.content = archive({name: data for name, data in FILES.items() if name.startswith("garden/")})
    served.url = served.url.replace("scenes.zip", "linked.zip")
    served.linked_digest = hashlib.sha256(served.content).hexdigest()
    fetch_scene(source(served), tmp_path / "right")
    served.linked_digest = "0" * 64
    with pytest.raises(ValueError, match="wrong checksum"):
        fetch_scene(source(served), tmp_path / "wrong")


def test_bytes_damaged_on_the_way_are_found_without_a_published_checksum(served: Served, tmp_path: Path) -> None:
    at = ARCHIVE.index(FILES["garden/images/0.jpg"][:64])  # noise is stored as it is, even by deflate
    served.content = ARCHIVE[: at + 1000] + bytes([ARCHIVE[at + 1000] ^ 1]) + ARCHIVE[at + 1001 :]
    with pytest.raises(ValueError, match=r"garden/images/0\.jpg is damaged .*run the command again$"):
        fetch_scene(source(served), tmp_path / "garden")
    assert not list(tmp_path.iterdir())


def hostile(name: str, link: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("garden/good.txt", b"good")
        info = zipfile.ZipInfo("x")
        info.filename = name
        if link:
            info.external_attr = 0o120777 << 16
        file.writestr(info, b"/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (hostile("garden/../../evil.txt"), "not a path inside the scene"),
        (hostile("top/garden/../../../evil.txt"), None),
        (hostile("/garden/evil.txt"), None),
        (hostile("garden/..\\..\\evil.txt"), "not a path inside the scene"),
        (hostile("garden/c:evil.txt"), "not a path inside the scene"),
        (hostile("garden/evil.txt", link=True), "a link"),
        (hostile("garden/GOOD.txt"), "the name comes twice"),
    ],
    ids=["parent", "parent-elsewhere", "absolute", "backslash", "drive", "link", "twice"],
)
def test_nothing_is_written_outside_the_scene(
    served: Served, tmp_path: Path, content: bytes, reason: str | None
) -> None:
    served.content = content
    target = tmp_path / "deep" / "er" / "garden"
    if reason is None:  # not in the wanted folder at all
        assert tree(fetch_scene(source(served), target)) == {"good.txt": b"good"}
    else:
        with pytest.raises(ValueError, match=f"refuses to unpack .*{reason}"):
            fetch_scene(source(served), target)
        assert not list(target.parent.iterdir())
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name.lower()]


def test_no_room_is_said_before_anything_is_fetched(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(OSError, match=r"needs 1\.7 MB for garden, 1\.0 MB are free"):
        fetch_scene(source(served), tmp_path / "garden")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["download", "unpack"])
def test_a_disk_that_fills_up_on_the_way_keeps_what_arrived(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As another program's doing, after the check of free space; a small tmpfs needs rights that tests do not have."""
    real = {"download": http_file.HttpFile.stream, "unpack": module._blocks}[where]

    def full_in_the_middle(*words: Any) -> Iterator[bytes]:
        for count, block in enumerate(real(*words)):
            if count == 1 and (where == "unpack" or served.sent > 600_000):
                raise OSError(errno.ENOSPC, "No space left on device")
            yield block

    with monkeypatch.context() as patch:
        if where == "download":
            patch.setattr(http_file.HttpFile, "stream", full_in_the_middle)
        else:
            patch.setattr(module, "_blocks", full_in_the_middle)
        with pytest.raises(OSError) as caught:
            fetch_scene(source(served), tmp_path / "garden")
    assert one_line(caught.value).endswith(": the disk is full; make room, and the same command goes on")
    assert str(tmp_path / "garden.") in one_line(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garden.part", "garden.part.json"]
    assert tree(fetch_scene(source(served), tmp_path / "garden")) == WANTED


def test_the_second_address_serves_when_the_first_does_not(served: Served, tmp_path: Path) -> None:
    gone = Source(served.url.replace("scenes", "gone"), "garden")
    assert tree(fetch_scene((gone, *source(served)), tmp_path / "garden")) == WANTED


def test_what_is_no_archive_and_what_lacks_the_scene(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the archive has no folder 'bicycle'"):
        fetch_scene((Source(served.url, "bicycle"),), tmp_path / "bicycle")
    served.content = b"<html>please sign in</html>" * 100
    with pytest.raises(ValueError, match="not a zip archive"):
        fetch_scene(source(served), tmp_path / "garden")


def test_the_command(served: Served, tmp_path: Path) -> None:
    done = command("datasets.cli", "download", "mipnerf360/garden", "--archive", served.url, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mipnerf360" / "garden"
    assert tree(folder) == WANTED
    assert f"render-train --scene {folder}" in done.stdout
    assert "CRC-32 of 3 files agree" in done.stderr
    line = refused("datasets.cli", "download", "mipnerf360/garden", "--archive", served.url, "--out", tmp_path)
    assert line == f"error: {folder}: exists already; add --overwrite to fetch it again"


def test_an_archive_fetched_by_hand(tmp_path: Path) -> None:
    (tmp_path / "by_hand.zip").write_bytes(ARCHIVE)
    folder = module.download("mipnerf360/garden", tmp_path / "data", str(tmp_path / "by_hand.zip"))
    assert tree(folder) == WANTED


def test_without_a_network_one_line_says_so_and_what_to_do(tmp_path: Path) -> None:
    url = "http://scenes.invalid/scenes.zip"  # a name that no resolver knows (RFC 2606)
    line = refused("datasets.cli", "download", "mipnerf360/garden", "--archive", url, "--out", tmp_path)
    assert line.startswith("error: no connection to scenes.invalid (")
    assert line.endswith(f"): this machine seems to have no network; elsewhere fetch {url}, then give --archive PATH")


def test_an_unknown_name_is_answered_with_the_known_ones_like_it() -> None:
    with pytest.raises(ValueError, match=r"'nerf/lego' is no downloadable scene; did you mean nerf-synthetic/lego\?"):
        module.download("nerf/lego")


def test_the_catalogue_is_in_order() -> None:
    assert {
        "mipnerf360/garden",
        "nerf-synthetic/lego",
        "tanks-and-temples/truck",
        "deep-blending/playroom",
    } <= SCENES.keys()
    for name, scene in SCENES.items():
        assert scene.name == name and scene.sources and "https://" in scene.about
        for where in scene.sources:
            assert where.url.startswith("https://") and where.folder.split("/")[-1] == name.split("/")[1]
            assert where.sha256 is None or (len(where.sha256) == 64 and int(where.sha256, 16) >= 0)
