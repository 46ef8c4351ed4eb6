"""`render-data poses`: camera poses for a folder of photographs or a video, left as a COLMAP project.

`DIR/images/`, `DIR/database.db`, `DIR/sparse/0/*.bin` (the model with most images) and `DIR/poses.json` (settings and
report, by which an interrupted run goes on where it stopped). The work itself is pycolmap's, in `sfm_worker.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from rich.progress import Progress

_EXHAUSTIVE_UP_TO = 150
_FOREIGN = (".heic", ".heif", ".avif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
_UPRIGHT = (".jpg", ".jpeg", ".png")  # that cameras write with an EXIF rotation
_COLMAP_READS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class PosesConfig:
    """Find the cameras of a folder of photographs or of a video (structure from motion, with pycolmap)."""

    source: Positional[Path]
    """Folder of images, or a video file."""
    out: Path | None = None
    """Project to write. Default: the folder above, if the images lie in one named "images"; else NAME_scene here."""
    frames: int | None = None
    """Video: how many frames to take. Default: 2 a second, at least 60 and at most 300."""
    fps: float | None = None
    """Video: frames a second to take, instead of --frames."""
    camera_model: Literal[
        "auto", "SIMPLE_RADIAL", "OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "OPENCV_FISHEYE", "FULL_OPENCV"
    ] = "auto"
    """COLMAP camera model to fit; OPENCV_FISHEYE for very wide lenses. auto: SIMPLE_RADIAL, refined to OPENCV at the end
    for cameras of 15 images or more."""
    single_camera: bool | None = None
    """One lens and zoom for all images. Default: for each group of images of equal size and EXIF camera and focal length."""
    matching: Literal["auto", "exhaustive", "similar", "sequential"] = "auto"
    """Which pairs to compare: all; the most similar; neighbours and the most similar. auto: sequential for a video,
    exhaustive up to 150 images, similar beyond."""
    max_image_size: int = 1600
    """Longest side at which features are sought, pixels."""
    max_features: int = 8192
    """Features an image, at most."""
    overwrite: bool = False
    """Start anew instead of going on with what an earlier run left."""


@dataclass
class Project:
    """Where a run stands; saved as `poses.json` after every stage."""

    settings: dict[str, Any]
    images: list[str] = field(default_factory=list)
    """Names under `images/`; empty until all are there."""
    photos: list[str] = field(default_factory=list)
    """The photographs these were made of, by their names in the source folder; none for a video."""
    groups: list[list[str]] = field(default_factory=list)
    """Images that share a camera."""
    blurred: list[str] = field(default_factory=list)
    matched: bool = False
    models: list[dict[str, Any]] | None = None
    """One report for each reconstruction, the largest first; None: not reconstructed yet."""


def find_poses(config: PosesConfig) -> int:
    """Run `render-data poses`.

    Returns:
        The exit code: 0, also when few images were registered (the report says so).

    Raises:
        ValueError: pycolmap is not installed, the input is unusable, or no pair of images could be reconstructed.
        FileNotFoundError: there is no such folder or file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if importlib.util.find_spec("pycolmap") is None:
        raise ValueError("finding poses needs pycolmap, which is not installed: pip install 'prismfield[poses]'")
    source, is_video = _find_source(config.source)
    out = config.out if config.out is not None else _default_out(source, is_video)
    project = _open_project(out, config, source, is_video)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        _prepare_images(project, out, source, is_video, config, progress)
        if project.models is None:
            _reconstruct(project, out, progress)
    models = project.models
    if not models:
        raise ValueError(
            f"{out}: none of the {len(project.images)} images could be placed: they share too few recognisable points. "
            "Take more images with at least two thirds of each in common with the next, walking around the subject rather "
            "than turning on the spot; avoid blur, glass and bare walls"
        )
    _report(project, models, out)
    return 0


def _find_source(source: Path) -> tuple[Path, bool]:
    """The folder that holds the images, or the video, and whether it is one."""
    from prismfield.datasets import video

    source = source.expanduser()
    if source.is_file():
        if source.suffix.lower() not in video.EXTENSIONS:
            raise ValueError(f"{source}: expected a folder of images or a video ({', '.join(video.EXTENSIONS)})")
        return source, True
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder or video")
    if (source / "images").is_dir() and not any(_is_photo(path) for path in source.iterdir()):
        source = source / "images"
    return source, False


def _default_out(source: Path, is_video: bool) -> Path:
    full = source.resolve()
    return (
        full.parent if full.name == "images" and not is_video else Path(f"{full.stem if is_video else full.name}_scene")
    )


def _is_photo(path: Path) -> bool:
    from prismfield.datasets.images import EXTENSIONS

    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _files(source: Path, folder: Path) -> list[Path]:
    """Everything under the source but what this program put into `folder`, the project's images."""
    in_place = source.resolve() == folder.resolve()
    return [path for path in source.rglob("*") if in_place or not path.resolve().is_relative_to(folder.resolve())]


def _find_photos(source: Path, folder: Path) -> list[Path]:
    """The photographs of a source folder, in the order of their names."""
    return sorted(path for path in _files(source, folder) if _is_photo(path))


def _open_project(out: Path, config: PosesConfig, source: Path, is_video: bool) -> Project:
    """The state an earlier run left in `out`, or a new one.

    Raises:
        ValueError: `out` holds a reconstruction of other settings or another origin, and `--overwrite` was not given.
    """
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items() if k not in ("overwrite", "out")
    }
    settings["source"] = str(source.resolve())
    state = out / "poses.json"
    if config.overwrite:
        earlier = _load_project(state)
        in_place = not is_video and source.resolve() == (out / "images").resolve()
        if earlier is not None and not in_place:
            shutil.rmtree(out / "images", ignore_errors=True)
        for name in ("sparse", "sparse.part"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("database.db", "database.db-shm", "database.db-wal", "poses.json"):
            (out / name).unlink(missing_ok=True)
    elif (earlier := _load_project(state)) is not None:
        changed = sorted(k for k in settings if settings[k] != earlier.settings.get(k))
        if changed:
            raise ValueError(
                f"{out}: an earlier run used another {', '.join(changed)}; add --overwrite to start anew, or name another --out"
            )
        photos = (
            [] if is_video else [path.relative_to(source).as_posix() for path in _find_photos(source, out / "images")]
        )
        if photos != earlier.photos:
            new, gone = len(set(photos) - set(earlier.photos)), len(set(earlier.photos) - set(photos))
            raise ValueError(
                f"{source}: {new} photographs are new and {gone} gone since an earlier run; add --overwrite to start anew, "
                "or name another --out"
            )
        if earlier.models is not None and not (out / "sparse" / "0").is_dir():
            earlier.models = None
        return earlier
    elif (out / "sparse").exists() or (out / "database.db").exists():
        raise ValueError(
            f"{out}: holds a COLMAP project already; add --overwrite to replace its poses, or name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    return Project(settings)


def _load_project(path: Path) -> Project | None:
    try:
        return Project(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _save(project: Project, out: Path) -> None:
    part = out / "poses.json.part"
    part.write_text(json.dumps(asdict(project), indent=1))
    os.replace(part, out / "poses.json")


def _prepare_images(
    project: Project, out: Path, source: Path, is_video: bool, config: PosesConfig, progress: Progress
) -> None:
    """Fill `images/`: frames of the video, or links to the photographs, each decoded once to find damaged and blurred ones."""
    from prismfield.datasets import video
    from prismfield.datasets.sharpness import blurred

    folder = out / "images"
    if project.images and all((folder / name).is_file() for name in project.images):
        return
    if is_video:
        kept, total = video.frame_count(source, frames=config.frames, fps=config.fps)
        task = progress.add_task("Frames of the video", total=kept)
        project.images = video.extract_frames(source, folder, kept, total, lambda n: progress.advance(task, n))
        progress.update(task, total=len(project.images))
        project.groups = [project.images]
    else:
        values = _link_photos(source, folder, progress)
        project.photos = [path.relative_to(source).as_posix() for path in _find_photos(source, folder)]
        project.images = sorted(values)
        project.blurred = blurred(values)
        project.groups = _camera_groups(folder, project.images, config.single_camera)
    _save(project, out)


def _link_photos(source: Path, folder: Path, progress: Progress) -> dict[str, float]:
    """Hard links (or copies, turned upright) of the photographs under `folder`; returns the sharpness of each by its name there.

    Raises:
        ValueError: fewer than 3 images, or some that cannot be used; names them.
    """
    from prismfield.datasets.images import decode_raw, read_info
    from prismfield.datasets.sharpness import grey, sharpness

    in_place = source.resolve() == folder.resolve()
    paths = _find_photos(source, folder)
    readable_stems = {path.with_suffix("") for path in paths}  # cameras write raw files beside the JPEG
    others = [path for path in _files(source, folder) if path.suffix.lower() in _FOREIGN]
    foreign = sum(path.with_suffix("") not in readable_stems for path in others)
    convert = f"{foreign} HEIC, AVIF or raw files in {source} cannot be read: convert them to JPEG" if foreign else ""
    if len(paths) < 3:
        raise ValueError(
            f"{source}: found {len(paths)} images (PNG, JPEG, WebP, TIFF, BMP), poses need at least 3"
            + (f"; {convert} first" if foreign else "")
        )
    if foreign:
        progress.console.print(f"[yellow]warning[/]: {convert} if they belong to the scene")
    values: dict[str, float] = {}
    for path in progress.track(paths, description="Images"):
        pixels = decode_raw(path)
        name = path.relative_to(source).as_posix()
        readable = path.suffix.lower() in _COLMAP_READS and " " not in name
        if in_place and not readable:
            raise ValueError(
                f"{path}: COLMAP reads no {path.suffix} files and no names with spaces; name another --out, which gets copies"
            )
        target = folder / name.replace(" ", "_")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not in_place and read_info(path).rotated and path.suffix.lower() in _UPRIGHT:
            _turn_upright(path, target)
        elif path.suffix.lower() not in _COLMAP_READS:
            target = _converted(target, pixels)
        elif not in_place:
            _link(path, target)
        name = target.relative_to(folder).as_posix()
        if name in values:
            raise ValueError(
                f"{path}: another image has this name too once spaces and extensions are made readable to COLMAP"
            )
        values[name] = sharpness(grey(pixels))
    return values


def _turn_upright(path: Path, target: Path) -> None:
    """Save a photograph with its pixels turned the way EXIF asks for, which COLMAP and the training ignore.

    Phones write portraits lying on their side; up would then point sideways.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        exif = upright.getexif()
        exif.get_ifd(0x8769)  # read now, or the focal length is not written
        target.unlink(missing_ok=True)
        # quality 97 without chroma subsampling: hardly any loss
        options: dict[str, Any] = {"quality": 97, "subsampling": 0} if image.format == "JPEG" else {}
        upright.save(target, image.format, exif=exif, **options)


def _converted(target: Path, pixels: Any) -> Path:
    """Save WebP or EXR pixels as PNG, which COLMAP reads."""
    import cv2

    target = target.with_suffix(".png")
    target.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return target


def _link(path: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, target)


def _camera_groups(folder: Path, names: list[str], single: bool | None) -> list[list[str]]:
    """Images that one camera took, as far as sizes and EXIF tell.

    Raises:
        ValueError: one camera was asked for, but the sizes differ.
    """
    from PIL import Image

    groups: dict[tuple, list[str]] = {}
    for name in names:
        with Image.open(folder / name) as image:
            exif = image.getexif()
            lens = exif.get_ifd(0x8769)  # the Exif sub-directory: focal length, and the same for 35 mm film
            taken_by = tuple(
                str(value) for value in (exif.get(0x010F), exif.get(0x0110), lens.get(0x920A), lens.get(0xA405))
            )
            key = (image.size, *(() if single else taken_by))
        groups.setdefault(key if single is not False else (name,), []).append(name)
    if single and len(groups) > 1:
        sizes = sorted({f"{size[0]}x{size[1]}" for size, *_ in groups})
        raise ValueError(f"--single-camera: the images have {len(groups)} sizes ({', '.join(sizes[:3])})")
    return list(groups.values())


def _reconstruct(project: Project, out: Path, progress: Progress) -> None:
    """Features, matches, mapping; each stage is recorded when it is done."""
    database, count = out / "database.db", len(project.images)
    settings = project.settings
    matching = settings["matching"]
    if matching == "auto":
        is_video = Path(settings["source"]).is_file()
        matching = "sequential" if is_video else "exhaustive" if count <= _EXHAUSTIVE_UP_TO else "similar"
    job = {"database": str(database), "images": str(out / "images"), "sparse": str(out / "sparse")}
    if not project.matched:
        task = progress.add_task("Features", total=count)
        wanted = {key: settings[key] for key in ("max_image_size", "max_features")}
        wanted["camera_model"] = "SIMPLE_RADIAL" if settings["camera_model"] == "auto" else settings["camera_model"]
        for _ in _stage(
            out,
            job | wanted | {"stage": "extract", "groups": project.groups},
            poll=_rows(database, "keypoints", progress, task),
        ):
            pass
        progress.update(task, completed=count)
        task = progress.add_task(f"Matching ({matching})", total=None)
        for message in _stage(
            out,
            job | {"stage": "match", "matching": matching},
            poll=_rows(database, "two_view_geometries", progress, task),
        ):
            progress.update(task, total=message["pairs"])
        progress.update(task, completed=progress.tasks[task].total or 0)
        project.matched = True
        _save(project, out)
    task = progress.add_task("Cameras", total=count)
    models: list[dict[str, Any]] = []
    for message in _stage(out, job | {"stage": "map", "refine": settings["camera_model"] == "auto"}):
        models = message.get("models", models)
        progress.update(task, completed=message.get("registered", 0))
    progress.update(task, completed=len(models[0]["images"]) if models else 0)
    project.models = models
    _save(project, out)


def _rows(database: Path, table: str, progress: Progress, task: Any) -> Callable[[], None]:
    """Moves a bar to the number of rows that another process has written to a table so far."""

    def poll() -> None:
        try:
            with closing(
                sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=0.2)
            ) as connection:
                progress.update(task, completed=connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])
        except sqlite3.Error:
            pass  # not created yet, or busy: the next poll will do

    return poll


def _stage(out: Path, job: dict[str, Any], poll: Callable[[], None] = lambda: None) -> Iterator[dict[str, Any]]:
    """Run one stage of `sfm_worker.py`; yields what it prints, and calls `poll` five times a second meanwhile.

    Raises:
        ValueError: the process failed; gives its last words.
    """
    worker = Path(__file__).with_name("sfm_worker.py")
    with (out / "colmap.log").open("ab") as log:
        start = log.tell()
        with subprocess.Popen(
            [sys.executable, "-P", str(worker), json.dumps(job)],
            stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                with _called_regularly(poll):
                    for line in process.stdout:
                        if line.startswith("{"):
                            yield json.loads(line)
                code = process.wait()
            finally:
                process.kill()
    if code:
        with (out / "colmap.log").open("rb") as log:
            log.seek(start)
            words = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        reason = (
            f"killed by signal {-code} (out of memory?)" if code < 0 else (words[-1] if words else f"exit code {code}")
        )
        raise ValueError(
            f"{out}: COLMAP stopped at the stage {job['stage']!r}: {reason}; details in {out / 'colmap.log'}. "
            "The same command goes on; should it stop there again, add --overwrite to start anew"
        )


@contextmanager
def _called_regularly(poll: Callable[[], None]) -> Iterator[None]:
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.2):
            poll()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _report(project: Project, models: list[dict[str, Any]], out: Path) -> None:
    """Print what was found, what is doubtful, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    best, count = models[0], len(project.images)
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("registered", f"{len(best['images'])} of {count} images")
    table.add_row("reprojection error", f"{best['error']:.2f} px (mean)")
    table.add_row("points", f"{best['points']:,}, seen by {best['track']:.1f} images each (mean)")
    for camera in best["cameras"][:3]:
        values = ", ".join(f"{value:.5g}" for value in camera["params"])
        table.add_row("camera", f"{camera['model']} {camera['width']}x{camera['height']}: {values}")
    if len(best["cameras"]) > 3:
        table.add_row("", f"... {len(best['cameras'])} cameras in all")
    console.print(table)
    for warning in _doubts(project, models):
        console.print(f"[yellow]warning[/]: {warning}", highlight=False)
    console.print(
        f"\nCOLMAP project: {out}\nnext: render-data check {out}\n      render-train --scene {out}", highlight=False
    )


def _doubts(project: Project, models: list[dict[str, Any]]) -> list[str]:
    """What the user should know about a reconstruction, in plain words."""
    best, count = models[0], len(project.images)
    missing = sorted(set(project.images) - set(best["images"]))
    doubts = []
    if missing:
        doubts.append(f"not registered: {_some(missing)}")
    if len(best["images"]) < count / 2:
        doubts.append(
            "less than half of the images have a pose. What helps: images that share two thirds with the next, taken while walking around "
            "rather than turning on the spot; sharp ones with texture (no glass, bare walls, sky); --matching exhaustive"
        )
    if len(models) > 1:
        sizes = ", ".join(str(len(model["images"])) for model in models)
        doubts.append(
            f"the images fell into {len(models)} groups without a firm link ({sizes} images); the first is used. Images in between would join them"
        )
    if any(_stretched(camera) for camera in best["cameras"]):
        doubts.append(
            "the two focal lengths found differ by more than 5 %, which real lenses do not show: leave --camera-model at auto"
        )
    if best["error"] > 1.5:
        doubts.append(
            f"a mean reprojection error of {best['error']:.1f} px is high (below 1 is usual): blur, a moving subject or a rolling shutter"
        )
    if best["track"] < 3:
        doubts.append("points are seen by few images each; more overlap would make the poses firmer")
    if project.blurred:
        doubts.append(f"much less sharp than the others: {_some(project.blurred)}")
    return doubts


def _stretched(camera: dict[str, Any]) -> bool:
    """Whether a camera of a model with two focal lengths has them far apart."""
    if camera["model"] not in ("PINHOLE", "OPENCV", "OPENCV_FISHEYE", "FULL_OPENCV"):
        return False
    fx, fy = camera["params"][:2]
    return bool(max(fx / fy, fy / fx) > 1.05)


def _some(names: list[str]) -> str:
    return f"{len(names)} image{'s' if len(names) != 1 else ''} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
