"""`render-data download`: standard scenes from their published addresses, one scene out of an archive of many.

Of an archive on a server that answers HTTP Range requests only the bytes of the wanted scene are fetched: first the zip's
directory, then the stretches that hold the scene's files, into `NAME.part`. An interrupted run goes on from there.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from prismfield.datasets.http_file import HttpFile, SeekableFile

if TYPE_CHECKING:
    from rich.progress import Progress

Span = tuple[int, int]

_GAP = 1 << 20  # bytes between two wanted files that are fetched along rather than with a request of their own
_WHOLE = 0.8  # of an archive wanted: then it is fetched whole, so that a published checksum can be compared
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Source:
    """One place that a scene can be had from."""

    url: str
    folder: str
    """The scene's folder in the zip archive."""
    sha256: str | None = None
    """Of the archive, where somebody published it."""


@dataclass(frozen=True)
class RemoteScene:
    """A downloadable scene."""

    name: str
    sources: tuple[Source, ...]
    """Tried in turn."""
    about: str
    """Whose data it is, and the page that says so."""


def _catalogue() -> dict[str, RemoteScene]:
    scenes = []
    for names, archive in (
        (("bicycle", "bonsai", "counter", "garden", "kitchen", "room", "stump"), "360_v2.zip"),
        (("flowers", "treehill"), "360_extra_scenes.zip"),
    ):
        url = f"https://storage.googleapis.com/gresearch/refraw360/{archive}"
        about = "Mip-NeRF 360 (Barron et al. 2022), https://jonbarron.info/mipnerf360/"
        scenes += [RemoteScene(f"mipnerf360/{name}", (Source(url, name),), about) for name in names]
    for name in ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship"):
        mirror = f"https://huggingface.co/datasets/nerfbaselines/nerfbaselines-data/resolve/main/blender/{name}.zip"
        drive = "https://drive.usercontent.google.com/download?id=18JxhpWD-4ZmuFKLzKlAw-w5PpzZxXOcG&export=download&confirm=t"
        # the digest of the authors' archive is the one that NerfBaselines checks (nerfbaselines/datasets/blender.py at 010a6b61)
        digest = "f01fd1b4ab045b0d453917346f26f898657bb5bec4834b95fdad1f361826e45e"
        sources = (Source(mirror, name), Source(drive, f"nerf_synthetic/{name}", digest))
        about = (
            "NeRF-synthetic (Mildenhall et al. 2020), https://www.matthewtancik.com/nerf; copy kept by NerfBaselines"
        )
        scenes.append(RemoteScene(f"nerf-synthetic/{name}", sources, about))
    url = "https://repo-sam.inria.fr/fungraph/3d-gaussian-splatting/datasets/input/tandt_db.zip"
    page = "with the cameras of https://github.com/graphdeco-inria/gaussian-splatting"
    for name in ("train", "truck"):
        about = f"Tanks and Temples (Knapitsch et al. 2017) {page}"
        scenes.append(RemoteScene(f"tanks-and-temples/{name}", (Source(url, f"tandt/{name}"),), about))
    for name in ("drjohnson", "playroom"):
        scenes.append(
            RemoteScene(
                f"deep-blending/{name}", (Source(url, f"db/{name}"),), f"Deep Blending (Hedman et al. 2018) {page}"
            )
        )
    return {scene.name: scene for scene in scenes}


SCENES = _catalogue()
"""Name -> scene."""


def download(name: str, out: Path | None = None, archive: str | None = None, overwrite: bool = False) -> Path:
    """Fetch a standard scene.

    Args:
        name: a key of `SCENES`.
        out: folder under which `name` is made; None: `$PRISMFIELD_DATA`, else `data` in the current folder.
        archive: take the zip archive from this path or address instead.
        overwrite: replace the scene if it is there.

    Returns:
        The scene's folder.

    Raises:
        ValueError: the name is unknown, or what arrived is not what was promised.
        OSError: no connection, or no room on the disk. What has arrived is kept, the same call goes on.
    """
    if name not in SCENES:
        near = [known for known in SCENES if known.split("/")[1] == name.split("/")[-1]]
        raise ValueError(
            f"{name!r} is no downloadable scene{'; did you mean ' + ' or '.join(near) + '?' if near else ''} (render-data list shows all)"
        )
    root = out if out is not None else Path(os.environ.get("PRISMFIELD_DATA", "data")).expanduser()
    sources = (
        SCENES[name].sources
        if archive is None
        else tuple(Source(archive, source.folder) for source in SCENES[name].sources)
    )
    return fetch_scene(sources, root / name, overwrite=overwrite)


def fetch_scene(sources: tuple[Source, ...], target: Path, *, overwrite: bool = False) -> Path:
    """Fetch one folder of a zip archive into `target`, from the first source that can be reached."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    if target.exists() and not overwrite:
        raise ValueError(f"{target}: exists already; add --overwrite to fetch it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    failures: list[OSError] = []
    for source in sources:
        try:
            remote = HttpFile(source.url) if source.url.startswith(("http://", "https://")) else None
        except ConnectionError as error:
            failures.append(error)
            continue
        with Progress(*columns, console=console) as progress:
            checked = _fetch(remote, source, target, progress)
        console.print(f"{target}: {checked}", highlight=False, soft_wrap=True)
        return target
    raise failures[0]


def _fetch(remote: HttpFile | None, source: Source, target: Path, progress: Progress) -> str:
    """Download, check and unpack; returns what was checked, in words."""
    part = target.with_name(f"{target.name}.part")
    if remote is None:
        with Path(source.url).expanduser().open("rb") as local:
            return _unpack(_open_zip(local, source.url), source, target, progress)
    plan = _plan(remote, source)
    need = plan.missing(part) + plan.unpacked
    free = shutil.disk_usage(target.parent).free
    if need > free:
        raise OSError(f"{target.parent}: needs {_size(need)} for {target.name}, {_size(free)} are free")
    with _naming(part):
        _transfer(remote, plan, part, progress)
    try:
        digest = _verify(plan, part)
        with part.open("rb") as file:
            checked = _unpack(_open_zip(SpanFile(file, plan.spans, plan.size), source.url), source, target, progress)
    except ValueError as error:
        _discard(part)
        raise ValueError(f"{error}; what arrived was discarded, run the command again") from error
    _discard(part)
    return ", ".join(words for words in (digest, checked) if words)


@dataclass(frozen=True)
class Plan:
    """What to fetch of an archive."""

    url: str
    size: int
    """Bytes of the whole archive."""
    tag: str | None
    """The server's name for this version of it (ETag)."""
    spans: list[Span]
    """Byte ranges to fetch, in order."""
    unpacked: int
    """Bytes of the files that come out of it; 0: not known."""
    sha256: str | None
    """Of the archive, if it is fetched whole and anybody published it."""

    @property
    def length(self) -> int:
        """Bytes to fetch."""
        return sum(end - start for start, end in self.spans)

    def missing(self, part: Path) -> int:
        """Bytes still to fetch."""
        return self.length - (part.stat().st_size if part.exists() and _is_of(part, self) else 0)


def _plan(remote: HttpFile, source: Source) -> Plan:
    whole = [(0, remote.size)]
    digest = source.sha256 or remote.sha256
    if not remote.ranges:
        return Plan(source.url, remote.size, remote.tag, whole, 0, digest)
    archive = _open_zip(remote, source.url)
    members = _members(archive, source)
    wanted = {info.header_offset for info in members}
    directory = archive.start_dir
    starts = sorted({info.header_offset for info in archive.infolist()} | {directory})
    spans: list[Span] = []
    for start, end in zip(starts, starts[1:], strict=False):
        if start not in wanted:
            continue
        if spans and start - spans[-1][1] <= _GAP:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    spans.append((directory, remote.size))
    unpacked = sum(info.file_size for info in members)
    if digest is not None and sum(end - start for start, end in spans) >= _WHOLE * remote.size:
        return Plan(source.url, remote.size, remote.tag, whole, unpacked, digest)
    return Plan(source.url, remote.size, remote.tag, spans, unpacked, None)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say where there is no room, when the disk fills up on the way."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(errno.ENOSPC, "the disk is full; make room, and the same command goes on", str(path)) from error


def _is_of(part: Path, plan: Plan) -> bool:
    """Whether a partial file was begun with the same plan."""
    try:
        return json.loads(part.with_name(f"{part.name}.json").read_text()) == json.loads(json.dumps(asdict(plan)))
    except (OSError, ValueError):
        return False


def _transfer(remote: HttpFile, plan: Plan, part: Path, progress: Progress) -> None:
    """Append to `part` until it holds all spans, one after the other."""
    note = part.with_name(f"{part.name}.json")
    if not (part.exists() and _is_of(part, plan) and part.stat().st_size <= plan.length and remote.ranges):
        _discard(part)
        note.write_text(json.dumps(asdict(plan)))
    with part.open("ab") as file:
        done = file.tell()
        task = progress.add_task("download", total=plan.length, completed=done)
        for start, end in plan.spans:
            if done >= end - start:
                done -= end - start
                continue
            for block in remote.stream(start + done, end):
                file.write(block)
                progress.advance(task, len(block))
            done = 0


def _verify(plan: Plan, part: Path) -> str:
    """Compare a published checksum, where there is one; the words for what was done."""
    if plan.sha256 is None:
        return ""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != plan.sha256:
        raise ValueError(f"{plan.url}: wrong checksum: sha256 is {found}, expected {plan.sha256}")
    return f"sha256 of the archive agrees ({found[:12]}...)"


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)


class SpanFile(SeekableFile):
    """A file of which only some byte ranges are at hand, stored one after the other in another file."""

    def __init__(self, stored: io.BufferedReader, spans: list[Span], size: int) -> None:
        self._stored, self._spans, self.size = stored, spans, size

    def read(self, count: int = -1) -> bytes:
        """The bytes at hand from here on; fewer than asked for where a range ends."""
        before = 0
        for start, end in self._spans:
            if start <= self._at < end:
                self._stored.seek(before + self._at - start)
                data = self._stored.read(end - self._at if count < 0 else min(count, end - self._at))
                self._at += len(data)
                return data
            before += end - start
        return b""


def _open_zip(file: io.RawIOBase | io.BufferedReader | HttpFile, url: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)  # any object that reads and seeks will do
    except zipfile.BadZipFile as error:
        raise ValueError(f"{url}: not a zip archive, or a damaged one ({error})") from error


def _members(archive: zipfile.ZipFile, source: Source) -> list[zipfile.ZipInfo]:
    """The files of the wanted folder, at the top of the archive or one level down.

    Raises:
        ValueError: there are none.
    """
    wanted = PurePosixPath(source.folder).parts
    for depth in (0, 1):
        found = [
            info
            for info in archive.infolist()
            if not info.is_dir()
            and PurePosixPath(info.filename).parts[depth : depth + len(wanted)] == wanted
            and not info.filename.startswith("__MACOSX/")
            and not info.filename.endswith("/.DS_Store")
        ]
        if found:
            return found
    raise ValueError(f"{source.url}: the archive has no folder {source.folder!r}")


def _unpack(archive: zipfile.ZipFile, source: Source, target: Path, progress: Progress) -> str:
    """Write the wanted folder to `target`, all of it or nothing; every file's CRC-32 and size is checked.

    Raises:
        ValueError: a file is damaged, or would be written elsewhere.
        OSError: no room.
    """
    members = _members(archive, source)
    paths = _safe_paths(members, source)
    total = sum(info.file_size for info in members)
    free = shutil.disk_usage(target.parent).free
    if total > free:
        raise OSError(f"{target.parent}: needs {_size(total)} to unpack {target.name}, {_size(free)} are free")
    task = progress.add_task("unpack", total=total)
    work = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(work, ignore_errors=True)
    try:
        for info, path in zip(members, paths, strict=True):
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            with _naming(work / path), (work / path).open("wb") as file:
                for block in _blocks(archive, info, source.url):
                    file.write(block)
                    progress.advance(task, len(block))
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return f"CRC-32 of {len(members)} files agree ({_size(total)})"


def _blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo, url: str) -> Iterator[bytes]:
    try:
        with archive.open(info) as file:
            while block := file.read(_BLOCK):
                yield block
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{url}: {info.filename} is damaged ({error or 'cut short'})") from error
    except Exception as error:  # zlib.error and its like have no common base
        if type(error).__module__ in ("zlib", "lzma", "bz2"):
            raise ValueError(f"{url}: {info.filename} is damaged ({error})") from error
        raise


def _safe_paths(members: list[zipfile.ZipInfo], source: Source) -> list[PurePosixPath]:
    """Where each file goes, below the scene's folder.

    Raises:
        ValueError: a name leads out of it, is a link, or comes twice.
    """
    wanted = PurePosixPath(source.folder).parts
    paths: list[PurePosixPath] = []
    seen: set[str] = set()
    for info in members:
        parts = PurePosixPath(info.filename).parts
        depth = 0 if parts[: len(wanted)] == wanted else 1
        path = PurePosixPath(*parts[depth + len(wanted) :])
        kind: Literal["link", "path"] | None = "link" if stat.S_ISLNK(info.external_attr >> 16) else None
        if (
            info.filename.startswith("/")
            or ".." in parts
            or any(sign in info.filename for sign in ("\\", ":", "\0"))
            or not path.parts
        ):
            kind = "path"
        if kind is not None:
            raise ValueError(
                f"{source.url}: refuses to unpack {info.filename!r}: {'a link' if kind == 'link' else 'not a path inside the scene'}"
            )
        if str(path).lower() in seen:
            raise ValueError(f"{source.url}: refuses to unpack {info.filename!r}: the name comes twice")
        seen.add(str(path).lower())
        paths.append(path)
    return paths


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
