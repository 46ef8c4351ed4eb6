"""`render-data check`: what a capture holds and what may be wrong with it, as a table and a picture of its cameras."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from prismfield.datasets.base import Frame, SceneData
from prismfield.datasets.camera_picture import CameraPlot, draw_cameras
from prismfield.datasets.capture import name_some
from prismfield.datasets.images import EXTENSIONS, decode_raw
from prismfield.datasets.matches import PairMatch, PairMatcher
from prismfield.datasets.normalize import depth_range, looks_inwards
from prismfield.datasets.scenes import load_scene
from prismfield.datasets.sharpness import blurred, grey, sharpness

if TYPE_CHECKING:
    from rich.console import Console

Array = NDArray[np.float64]

_THUMBNAIL = 32  # pixels a side, at which pictures are compared
_SAME = 0.8  # grey levels (rms of the thumbnails' difference): the same photograph, saved twice or taken twice
_MOST_MATCHED = 300  # views that are matched with a neighbour, spread evenly over larger captures
_ERROR_GOOD, _ERROR_BAD = 1.0, 3.0  # pixels, median epipolar error
_LONELY = 20  # points in view, below which a camera probably looks elsewhere


@dataclass(frozen=True)
class ImageStats:
    """What decoding one image told."""

    sharpness: float
    thumbnail: NDArray[np.float32]
    """[32, 32] brightness, 0..255."""
    digest: bytes


@dataclass
class SceneCheck:
    """Everything `check` found out."""

    data: SceneData
    stats: dict[str, ImageStats]
    unreadable: dict[str, str]
    """Image name -> what is wrong with the file."""
    pairs: list[PairMatch] | None
    """None: not looked at."""
    astray: list[str]
    """Images whose pose contradicts their neighbours."""
    near: float
    """User units."""
    far: float
    rows: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def check_scene(scene: str, *, out: Path | None, eval_every_nth: int | None, match_pairs: bool) -> int:
    """Run `render-data check`.

    Returns:
        The exit code: 1 if images cannot be decoded or the poses contradict them, else 0.

    Raises:
        ValueError, OSError: the capture cannot be read at all.
    """
    from rich.console import Console

    check = inspect_scene(
        load_scene(scene, eval_every_nth=eval_every_nth), match=match_pairs, console=Console(stderr=True)
    )
    _print(check, Console(soft_wrap=True, highlight=False))
    path = out if out is not None else Path(f"{check.data.name}_cameras.png")
    if path.is_dir():
        path = path / f"{check.data.name}_cameras.png"
    draw_cameras(camera_plot(check), path)
    print(f"cameras drawn: {path}")
    return 1 if check.errors else 0


def inspect_scene(data: SceneData, *, match: bool = True, console: Console | None = None) -> SceneCheck:
    """Decode every image, match a few pairs, and put together what is found.

    Args:
        data: the capture.
        match: compare some pairs of images with the poses.
        console: where progress goes; None: nowhere.
    """
    from rich.progress import Progress

    frames = sorted(data.train + data.test, key=lambda frame: frame.name)
    with Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("images", total=len(frames))
        stats, unreadable = image_stats(frames, lambda n: progress.advance(task, n))
        pairs: list[PairMatch] | None = None
        astray: list[str] = []
        if match:
            task = progress.add_task("poses", total=None)
            pairs, astray = match_poses(
                [f for f in frames if f.name in stats], lambda n, total: progress.update(task, advance=n, total=total)
            )
            progress.update(task, total=1, completed=1)
    xyz = _known_points(data, pairs or [])[0]
    near, far = depth_range(frames, data.aabb.double().numpy(), xyz if len(xyz) else None)
    check = SceneCheck(data, stats, unreadable, pairs, astray, near / data.frame.scale, far / data.frame.scale)
    _describe_images(check, frames)
    _describe_cameras(check, frames)
    _describe_content(check, frames)
    _describe_poses(check, frames)
    check.warnings += data.warnings
    return check


def image_stats(frames: list[Frame], advance: Callable[[int], None]) -> tuple[dict[str, ImageStats], dict[str, str]]:
    """Statistics of the images that can be decoded, and what is wrong with the others, by frame name."""

    def one(frame: Frame) -> ImageStats | str:
        try:
            content = frame.image_path.read_bytes()
            brightness = grey(_decoded(frame.image_path, content))
        except (ValueError, OSError) as error:
            return str(error)
        finally:
            advance(1)
        thumbnail = cv2.resize(brightness, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
        return ImageStats(sharpness(brightness), thumbnail, hashlib.blake2b(content, digest_size=16).digest())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip((frame.name for frame in frames), pool.map(one, frames), strict=True))
    return (
        {name: result for name, result in results.items() if isinstance(result, ImageStats)},
        {name: result for name, result in results.items() if isinstance(result, str)},
    )


def _decoded(path: Path, content: bytes) -> NDArray:
    from prismfield.datasets.images import decode

    if path.suffix.lower() == ".exr":  # OpenCV's usual build reads none
        return decode(path)[..., ::-1].copy()
    return decode_raw(path, content)


def match_poses(frames: list[Frame], advance: Callable[[int, int], None]) -> tuple[list[PairMatch], list[str]]:
    """Match views, in the order of their names, with the nearest other one and with the next.

    Args:
        frames: views that can be decoded.
        advance: told of steps done and of the number of steps.

    Returns:
        The pairs that could be judged, without those of images gone astray; and the names of the latter.
    """
    if len(frames) < 2:
        return [], []
    matcher = PairMatcher(frames)
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(_MOST_MATCHED, len(frames))).round().astype(int)).tolist()
    pairs = {pair for index in chosen for pair in matcher.neighbours(index, 1)} | {
        (i, i + 1) for i in chosen if i + 1 < len(frames)
    }
    steps = len(pairs) + len({index for pair in pairs for index in pair})
    matches = matcher.match(pairs, lambda n: advance(n, steps))
    astray = gone_astray(matches)
    return [match for match in matches if not set(match.names) & set(astray)], astray


def gone_astray(matches: list[PairMatch]) -> list[str]:
    """Images whose pose most of their matches contradict, while most matches of the capture agree.

    The worst is taken out with all of its matches, so that it does not tell against its neighbours, and so on.
    A few matches that agree prove nothing: a view placed by look-alike structure agrees with those views it was mistaken for.
    """
    rest, astray = list(matches), []
    if 2 * sum(m.count for m in rest if m.error >= _ERROR_BAD) >= sum(m.count for m in rest):
        return []
    while rest:
        against: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for match in rest:
            for name in match.names:
                total[name] += match.count
                against[name] += match.count * (match.error >= _ERROR_BAD)
        worst = max(sorted(total), key=lambda name: (against[name] / total[name], against[name]))
        if 2 * against[worst] <= total[worst]:
            break
        astray.append(worst)
        rest = [match for match in rest if worst not in match.names]
    return sorted(astray)


def duplicates(stats: dict[str, ImageStats]) -> list[tuple[str, str, str]]:
    """(earlier, later, "identical" | "alike") of images that show the same; each is named with the first it repeats."""
    names = sorted(stats)
    if len(names) < 2:
        return []
    flat = np.stack([stats[name].thumbnail.ravel() for name in names]).astype(np.float32)
    squares = (flat**2).sum(1)
    found = []
    for i, name in enumerate(names[1:], start=1):
        gap = np.sqrt(np.maximum(squares[:i] + squares[i] - 2 * flat[:i] @ flat[i], 0) / flat.shape[1])
        contrast = float(flat[i].std())
        alike = np.flatnonzero(gap < _SAME * min(1.0, contrast / 25.0))  # dim or plain pictures differ less
        same = [j for j in range(i) if stats[names[j]].digest == stats[name].digest] if i else []
        if same:
            found.append((names[same[0]], name, "identical"))
        elif len(alike):
            found.append((names[alike[0]], name, "alike"))
    return found


def unused_files(frames: list[Frame]) -> list[str]:
    """Image files beside the frames' that no frame uses; depth maps and the like (`NAME_depth.png`) do not count."""
    used = {frame.image_path.resolve() for frame in frames} | {
        f.mask_path.resolve() for f in frames if f.mask_path is not None
    }
    used |= {f.depth_path.resolve() for f in frames if f.depth_path is not None}
    stems: dict[Path, set[str]] = {}
    for path in used:
        stems.setdefault(path.parent, set()).add(path.stem)
    found = []
    for folder, known in stems.items():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() not in EXTENSIONS or path in used or path.name.startswith("."):
                continue
            parts = path.stem.split("_")
            if not any("_".join(parts[:k]) in known for k in range(1, len(parts))):
                found.append(path.name)
    return found


def _describe_images(check: SceneCheck, frames: list[Frame]) -> None:
    data = check.data
    check.rows.append(("images", f"{len(frames)}: {len(data.train)} train, {len(data.test)} test ({data.split})"))
    sizes = Counter(f"{frame.camera.width}x{frame.camera.height}" for frame in frames)
    check.rows.append(
        ("size", ", ".join(size if len(sizes) == 1 else f"{size} ({n})" for size, n in sizes.most_common(4)))
    )
    if check.unreadable:
        first = next(iter(check.unreadable.values()))
        check.errors.append(f"cannot be decoded: {name_some(sorted(check.unreadable))}; {first}")
    masks, times = sum(f.mask_path is not None for f in frames), sum(f.time is not None for f in frames)
    extras = [words for words in (f"{masks} masks" if masks else "", f"times for {times}" if times else "") if words]
    if data.background is not None:
        extras.append(f"alpha channel, shown on {data.background}")
    if extras:
        check.rows.append(("with them", ", ".join(extras)))
    repeats = duplicates(check.stats)
    tests = {frame.name for frame in data.test}
    check.rows.append(("duplicates", "none" if not repeats else _some([f"{b} = {a}" for a, b, _ in repeats])))
    if repeats:
        leaks = [b for a, b, _ in repeats if (a in tests) != (b in tests)]
        what = "is the same file as" if all(kind == "identical" for _, _, kind in repeats) else "looks the same as"
        leak = f"; {len(leaks)} of a train and a test view, which flatters the test scores" if leaks else ""
        check.warnings.append(f"an image {what} another: {_some([f'{b} = {a}' for a, b, _ in repeats])}{leak}")
    unused = unused_files(frames)
    check.rows.append(
        ("unregistered", "none" if not unused else f"{len(unused)} files without a camera: {_some(unused)}")
    )
    values = {name: stats.sharpness for name, stats in check.stats.items()}
    soft = blurred(values)
    worst = sorted(values, key=lambda name: values[name])[:3]
    if values:
        listed = ", ".join(f"{name} {values[name]:.0f}" for name in worst)
        check.rows.append(("sharpness", f"median {np.median(list(values.values())):.0f}; least: {listed}"))
    if soft:
        check.warnings.append(f"much less sharp than the others (blurred, or plain): {name_some(soft)}")


def _describe_cameras(check: SceneCheck, frames: list[Frame]) -> None:
    kinds: dict[tuple, int] = {}
    for frame in frames:
        K = frame.camera.Ks[0].double().numpy()
        lens = () if frame.camera.distortion is None else tuple(f"{v:.4g}" for v in frame.camera.distortion[0].tolist())
        size = (frame.camera.width, frame.camera.height)
        key = (frame.camera.model, *size, *(f"{v:.6g}" for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])), lens)
        kinds[key] = kinds.get(key, 0) + 1
    common = sorted(kinds, key=lambda key: -kinds[key])
    check.rows.append(
        (
            "camera model",
            f"{', '.join(sorted({k[0] for k in kinds}))}; {len(kinds)} camera{'s' if len(kinds) > 1 else ''}",
        )
    )
    for model, width, height, fx, fy, cx, cy, lens in common[:2]:
        view = [2 * np.degrees(np.arctan(side / 2 / float(f))) for side, f in ((width, fx), (height, fy))]
        many = f" ({kinds[(model, width, height, fx, fy, cx, cy, lens)]} images)" if len(kinds) > 1 else ""
        angles = (
            f"{view[0]:.0f} x {view[1]:.0f} degrees"
            if model == "pinhole"
            else f"about {view[0]:.0f} x {view[1]:.0f} degrees"
        )
        check.rows.append(("intrinsics", f"fx {fx}  fy {fy}  cx {cx}  cy {cy} px, {angles}{many}"))
        if lens:
            check.rows.append(("distortion", ", ".join(lens)))
        if abs(float(cx) / width - 0.5) > 0.2 or abs(float(cy) / height - 0.5) > 0.2:
            check.warnings.append(
                f"the principal point ({cx}, {cy}) is far from the middle of a {width}x{height} image; cropped images, or wrong intrinsics?"
            )
        if max(float(fx) / float(fy), float(fy) / float(fx)) > 1.05:
            check.warnings.append(
                f"fx {fx} and fy {fy} differ by more than 5 %, which real cameras do not show; stretched images, or wrong intrinsics?"
            )


def _describe_content(check: SceneCheck, frames: list[Frame]) -> None:
    data = check.data
    if data.points is None:
        own = (
            "random ones inside the outlines" if data.background is not None else "matches between neighbouring images"
        )
        check.rows.append(("points", f"none; training makes its own, from {own}"))
    else:
        seen = _points_in_view(frames, data.points.xyz.double().numpy())
        check.rows.append(
            (
                "points",
                f"{len(data.points):,}; in view of a camera: {int(np.median(seen)):,} (median), {int(seen.min()):,} (least)",
            )
        )
        if lonely := [
            frame.name for frame, n in zip(frames, seen, strict=True) if n < min(_LONELY, 0.01 * len(data.points))
        ]:
            check.warnings.append(
                f"hardly any point in view of {name_some(lonely)}: a wrong pose, or points missing there"
            )
    source = (
        "from the points"
        if data.points is not None
        else "from matches"
        if check.pairs and any(len(p.xyz) for p in check.pairs)
        else "estimated"
    )
    check.rows.append(("near, far", f"{check.near:.3g}, {check.far:.3g} ({source})"))
    low, high = (data.frame.points_to_user(corner.double()).tolist() for corner in data.aabb)
    check.rows.append(("bounds", f"({_vector(low)}) to ({_vector(high)})"))
    looking = "looking inwards, around" if looks_inwards(frames) else "not looking at one point, around"
    check.rows.append(("cameras", f"{looking} ({_vector(data.frame.center)}), {1 / data.frame.scale:.3g} away (mean)"))
    ups = np.concatenate([-frame.camera.viewmats[:, 1, :3].double().numpy() for frame in frames])
    tilt = np.degrees(np.arccos(np.clip(ups @ np.asarray(data.frame.up), -1, 1)))
    check.rows.append(
        ("up", f"({_vector(data.frame.up)}); images tilted against it by {np.median(tilt):.0f} degrees (median)")
    )
    turned = [frame.name for frame, angle in zip(frames, tilt, strict=True) if angle > 120]
    if turned:
        check.warnings.append(f"upside down: {name_some(turned)}")


def _describe_poses(check: SceneCheck, frames: list[Frame]) -> None:
    """Cameras in one place, cameras far off, and the test by matches."""
    viewmats = np.concatenate([frame.camera.viewmats.double().numpy() for frame in frames])
    centers = np.concatenate([frame.camera.centers.double().numpy() for frame in frames])
    rounded: dict[bytes, list[str]] = {}
    for frame, viewmat in zip(frames, viewmats, strict=True):
        rounded.setdefault((np.round(viewmat, 5) + 0.0).tobytes(), []).append(frame.name)
    shared = [names for names in rounded.values() if len(names) > 1]
    if shared and len(frames) > 1:
        check.warnings.append(
            f"several images have the same pose: {_some([' = '.join(names[:3]) for names in shared])}"
        )
    distance = np.linalg.norm(centers - np.median(centers, axis=0), axis=1)
    typical = float(np.median(distance))
    if typical < 1e-4 and len(frames) > 2:
        check.warnings.append("all cameras stand in one place: depth cannot be found from turning on the spot")
    elif astray := [frame.name for frame, d in zip(frames, distance, strict=True) if d > 10 * typical]:
        check.warnings.append(f"more than ten times farther off than the others: {name_some(astray)}")
    if check.pairs is None:
        return
    if not check.pairs:
        check.rows.append(("pose check", "no two neighbouring images had enough matches to judge by"))
        return
    error = float(np.median([pair.error for pair in check.pairs]))
    verdict = "good" if error < _ERROR_GOOD else "loose" if error < _ERROR_BAD else "wrong"
    check.rows.append(("pose check", f"{verdict}: matches lie {error:.2f} px off (median of {len(check.pairs)} pairs)"))
    if error >= _ERROR_BAD:
        check.errors.append(
            f"the poses contradict the images: matches lie {error:.1f} px off where they should be. "
            "Wrong axes convention, wrong focal length, images in another order, or lens distortion left out?"
        )
    elif error >= _ERROR_GOOD:
        check.warnings.append(
            f"the poses fit the images loosely ({error:.1f} px): expect soft detail; refining poses while training may help"
        )
    if check.astray:
        check.warnings.append(
            f"poses that contradict what the neighbours see: {name_some(check.astray)}; such images are better left out"
        )


def _points_in_view(frames: list[Frame], xyz: Array) -> NDArray[np.int64]:
    """[F] points that project into each image, lens distortion aside; counted on up to 20,000 of them."""
    some = xyz[:: max(1, len(xyz) // 20000)]
    counts = []
    for frame in frames:
        viewmat, K = frame.camera.viewmats[0].double().numpy(), frame.camera.Ks[0].double().numpy()
        local = some @ viewmat[:3, :3].T + viewmat[:3, 3]
        local = local[local[:, 2] > 1e-9]
        uv = local[:, :2] / local[:, 2:] * np.array([K[0, 0], K[1, 1]]) + K[:2, 2]
        counts.append(np.count_nonzero(((uv >= 0) & (uv < (frame.camera.width, frame.camera.height))).all(1)))
    return np.array(counts) * len(xyz) // max(1, len(some))


def _known_points(data: SceneData, pairs: list[PairMatch]) -> tuple[Array, NDArray[np.uint8]]:
    """Positions in the scene frame and colours: the capture's points, else the triangulated matches."""
    if data.points is not None:
        return data.points.xyz.double().numpy(), (data.points.rgb.numpy() * 255 + 0.5).astype(np.uint8)
    xyz = np.concatenate([np.zeros((0, 3)), *(pair.xyz for pair in pairs)])
    return xyz, np.concatenate([np.zeros((0, 3), np.uint8), *(pair.rgb for pair in pairs)])


def camera_plot(check: SceneCheck) -> CameraPlot:
    """What the picture shows, in the user's frame."""
    import torch

    data = check.data
    frames = data.train + data.test
    poses = np.concatenate([frame.camera.camtoworlds.double().numpy() for frame in frames])
    poses[:, :3, 3] = data.frame.points_to_user(torch.from_numpy(poses[:, :3, 3])).numpy()
    tangents = []
    for frame in frames:
        K = frame.camera.Ks[0].double().numpy()
        left, top = -K[0, 2] / K[0, 0], -K[1, 2] / K[1, 1]
        tangents.append((left, top, left + frame.camera.width / K[0, 0], top + frame.camera.height / K[1, 1]))
    xyz, rgb = _known_points(data, check.pairs or [])
    label = (
        ""
        if not len(xyz)
        else f"{len(xyz):,} points"
        if data.points is not None
        else f"{len(xyz):,} points from matches of {len(check.pairs or [])} pairs"
    )
    facts = dict(check.rows)
    details = (
        f"{facts['size']}   {facts['camera model']}   near, far {facts['near, far']}   up ({_vector(data.frame.up)})"
    )
    return CameraPlot(
        camtoworlds=poses,
        tangents=np.array(tangents),
        is_test=np.arange(len(frames)) >= len(data.train),
        is_wrong=np.array([frame.name in check.astray for frame in frames]),
        xyz=data.frame.points_to_user(torch.from_numpy(xyz)).numpy(),
        rgb=rgb,
        aabb=data.frame.points_to_user(data.aabb.double()).numpy(),
        up=np.asarray(data.frame.up),
        title=f"{data.name}: {len(frames)} cameras",
        details=details,
        points_label=label,
    )


def _print(check: SceneCheck, console: Console) -> None:
    from rich.table import Table

    table = Table(
        title=f"{check.data.name} ({check.data.kind}, {check.data.root})", title_justify="left", show_header=False
    )
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in check.rows:
        table.add_row(name, value)
    console.print(table)
    for text in check.errors:
        console.print(f"[bold red]wrong[/]: {text}")
    for text in check.warnings:
        console.print(f"[yellow]note[/]: {text}")
    if not check.errors and not check.warnings:
        console.print("[green]nothing to complain about[/]")


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f", ... ({len(items)})" if len(items) > 3 else "")


def _vector(values: tuple[float, ...] | list[float]) -> str:
    size = max(abs(value) for value in values) or 1.0
    return ", ".join(f"{0.0 if abs(value) < 1e-4 * size else value:.3g}" for value in values)
