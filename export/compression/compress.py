"""Making Gaussians small: which ones matter, how the smaller file compares, and the search for a size or a likeness."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.datasets.views import Views
from prismfield.export.assets import SplatAsset
from prismfield.export.compression.field_pfz import FieldAsset
from prismfield.export.compression.pfz import decode_pfz
from prismfield.export.compression.pfz_grid import PfzSteps, importance_of
from prismfield.export.compression.pfz_write import encode_pfz
from prismfield.export.library import Scene, content_frame, render, scene_of
from prismfield.export.ply import ply_bytes
from prismfield.render.cameras import Cameras
from prismfield.render.ops.constants import ALPHA_MIN
from prismfield.representations.fields import Field
from prismfield.train.camera_path import orbit, ring
from prismfield.train.evaluate import evaluate_views, mean_scores
from prismfield.train.metrics import psnr, ssim

PRUNED = (0.0, 0.2, 0.4, 0.6)
"""Shares of the Gaussians, the least important ones, that a search tries to do without."""
_FINEST, _COARSEST = 1 / 8, 16.0  # factors on the steps that a search tries
_MOST_VIEWS, _MOST_MEASURED = 64, 12  # cameras that say what is important, and that a result is measured from
_UNSEEN = 0.02  # what opacity and area count beside what cameras see: another camera may come


@dataclass(frozen=True)
class Result:
    """A file that could be written, and how it compares."""

    data: bytes
    asset: Any
    """What is read back from it: a SplatAsset, or a FieldAsset."""
    psnr: float
    """Decibels to the original's pictures, over all pixels."""
    ssim: float
    steps: Any
    """How coarsely a .pfz was rounded: PfzSteps, or words; None of other formats."""
    pruned: float
    """Share of the Gaussians that was left out."""
    encode_seconds: float
    decode_seconds: float


class Likeness:
    """Pictures of a scene as it was, to compare others with."""

    def __init__(self, scene: Scene) -> None:
        """Draw it from its test cameras, or the training ones, or from all round; evenly chosen ones of many.

        Args:
            scene: what is to be made small.
        """
        self.scene = scene
        self.cameras, self.about = _measuring_cameras(scene)
        self.pictures = [self._draw(scene, camera) for camera in self.cameras]

    def compare(self, asset: SplatAsset | FieldAsset) -> tuple[float, float]:
        """PSNR over all pixels and mean SSIM of what `asset` looks like."""
        other = scene_of(asset, self.scene.path, frame=self.scene.frame)
        pictures = [self._draw(other, camera) for camera in self.cameras]
        ours, theirs = (torch.cat([p.reshape(-1, 3) for p in each]) for each in (pictures, self.pictures))
        similar = [ssim(a, b) for a, b in zip(pictures, self.pictures, strict=True)]
        return psnr(ours, theirs), sum(similar) / len(similar)

    def to_photographs(self, asset: SplatAsset | FieldAsset | None = None) -> dict[str, float]:
        """Mean `psnr` and `ssim` to the test photographs of a run, of the scene or of `asset`; empty without any."""
        run = self.scene.run
        if run is None:
            return {}
        try:
            frames = run.data.test
            views = Views(frames, downscale=run.config.downscale, byte_budget=256 << 20, scale=run.frame.scale)
        except OSError:
            return {}  # the capture was moved away
        shown = self.scene if asset is None else scene_of(asset, self.scene.path, frame=self.scene.frame)
        use_masks = run.config.data.masks
        return mean_scores(evaluate_views(shown.representation, views, self.scene.background, use_masks=use_masks))

    def _draw(self, scene: Scene, camera: Cameras) -> Tensor:
        with torch.no_grad():
            return render(scene, camera, self.scene.background).rgb.clamp(0, 1)


def contributions(scene: Scene, asset: SplatAsset) -> NDArray[np.float64]:
    """[N] how much each Gaussian adds to pictures: the sum of its blending weights over the pixels of the cameras.

    It is the gradient of the sum of all pixels to a colour. A little of opacity times area is added, for what no camera sees.

    Args:
        scene: says from where: the training cameras of a run, else cameras all round.
        asset: its Gaussians.
    """
    shown = scene_of(asset, scene.path, frame=scene.frame)
    color = shown.representation.sh0.requires_grad_(True)  # type: ignore[attr-defined]
    seen = blending_weights(lambda camera: render(shown, camera, scene.background).rgb, color, seeing_cameras(scene))
    color.requires_grad_(False)
    areas = importance_of(asset)
    # The areas of the largest say nothing: a sky is as wide as it is far.
    areas = np.minimum(areas, np.quantile(areas, 0.99) if len(areas) else 0)
    return seen / max(seen.mean(), 1e-30) + _UNSEEN * areas / max(areas.mean(), 1e-30)


def blending_weights(
    draw: Callable[[Cameras], Tensor], colors: Tensor, cameras: Iterable[Cameras]
) -> NDArray[np.float64]:
    """[N] sums over the pixels of all cameras.

    Args:
        draw: the picture that a camera sees.
        colors: [N, ...] harmonics of degree 0 that it is made of, with a gradient.
        cameras: one at a time.
    """
    weights = torch.zeros(len(colors), dtype=torch.float64)
    for camera in cameras:
        (gradient,) = torch.autograd.grad(draw(camera).sum(), colors)
        weights += gradient.flatten(1).double().abs().mean(1)
    return weights.numpy()


def drawable(asset: SplatAsset) -> SplatAsset:
    """Without those too faint to be drawn at all; all of them if there were none left."""
    kept = asset.opacities >= ALPHA_MIN
    return taken(asset, np.flatnonzero(kept)) if kept.any() else asset


def taken(asset: SplatAsset, rows: NDArray[np.int64]) -> SplatAsset:
    """Those rows."""
    fields = {name: getattr(asset, name)[rows] for name in ("means", "quats", "scales", "opacities", "sh")}
    return replace(asset, **fields)


def cut_harmonics(asset: SplatAsset, degree: int) -> SplatAsset:
    """With harmonics of at most that degree."""
    return replace(asset, sh=asset.sh[:, : (degree + 1) ** 2]) if degree < asset.sh_degree else asset


def pruned_rows(importance: NDArray, share: float) -> NDArray[np.int64]:
    """The rows that stay, in order, when the least important `share` goes; at least one."""
    kept = max(1, round(len(importance) * (1 - share)))
    return np.sort(np.argsort(-importance, kind="stable")[:kept])


class Compressor:
    """An asset, what matters of it, and files made of it."""

    shares: tuple[float, ...] = PRUNED
    """That a search tries to prune."""
    usual: tuple[float, float] = (0.5, 0.6)
    """Factors of the steps without a target: plainly, and before fine-tuning."""

    def __init__(self, asset: SplatAsset, importance: NDArray, likeness: Likeness, steps: PfzSteps) -> None:
        """Nothing is encoded yet.

        Args:
            asset: the Gaussians.
            importance: [N] of each.
            likeness: to compare with.
            steps: which a search multiplies.
        """
        self.asset, self.importance, self.likeness, self.steps = asset, importance, likeness, steps

    def encode(self, factor: float, share: float) -> tuple[bytes, float]:
        """The file with steps times `factor`, without the least important `share`; and the seconds that took."""
        began = time.perf_counter()
        rows = pruned_rows(self.importance, share)
        data = encode_pfz(taken(self.asset, rows), self.steps.times(factor), self.importance[rows])
        return data, time.perf_counter() - began

    def result(self, factor: float, share: float) -> Result:
        """The file, read back and compared."""
        data, encoding = self.encode(factor, share)
        return self.measured(data, self.steps.times(factor), share, encoding)

    def decode(self, data: bytes) -> SplatAsset | FieldAsset:
        """What is read back."""
        return decode_pfz(data)

    def measured(self, data: bytes, steps: Any, share: float, seconds: float) -> Result:
        """A file that was made of the asset, read back and compared; `seconds` is what making it took."""
        began = time.perf_counter()
        asset = self.decode(data)
        decoding = time.perf_counter() - began
        return Result(data, asset, *self.likeness.compare(asset), steps, share, seconds, decoding)

    def to_size(self, limit: int, tell: Callable[[Result], None], shares: Sequence[float] = PRUNED) -> Result:
        """The likest file of at most `limit` bytes, without one of the `shares` of the Gaussians.

        Raises:
            ValueError: the smallest that was tried is larger.
        """
        best: Result | None = None
        smallest = 0.0
        for share in shares:
            factor, size = _search(lambda f, s=share: math.log(len(self.encode(f, s)[0])), math.log(limit), 0.02)  # type: ignore[misc]
            if size > math.log(limit):
                smallest = math.exp(size)
                continue
            found = self.result(factor, share)
            tell(found)
            if best is not None and found.psnr < best.psnr:
                break
            best = found
        if best is None:
            raise ValueError(
                f"--target-mb: {limit / 1e6:g} MB is too small, the smallest tried is {smallest / 1e6:.3f} MB"
            )
        return best

    def to_psnr(self, limit: float, tell: Callable[[Result], None], shares: Sequence[float] = PRUNED) -> Result:
        """The smallest file at least `limit` decibels like the original, without one of the `shares` of the Gaussians.

        Raises:
            ValueError: the finest that was tried is not.
        """
        best: Result | None = None
        nearest = 0.0
        for share in shares:
            if share > shares[0]:
                pruned = taken(self.asset, pruned_rows(self.importance, share))
                if self.likeness.compare(pruned)[0] < limit + 0.5:
                    break
            results: dict[float, Result] = {}

            def loss(factor: float, share: float = share, results: dict[float, Result] = results) -> float:
                results[factor] = self.result(factor, share)
                return -results[factor].psnr

            factor, found = _search(loss, -limit, 0.1)
            nearest = max(nearest, -found)
            if -found < limit:
                break
            tell(results[factor])
            if best is not None and len(results[factor].data) > len(best.data):
                break
            best = results[factor]
        if best is None:
            raise ValueError(f"--target-psnr: {limit:g} dB is out of reach, the finest tried has {nearest:.1f} dB")
        return best

    def sweep(self) -> Iterator[Result]:
        """From fine to coarse, with all Gaussians and with fewer."""
        for share in self.shares[:3]:
            for factor in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
                yield self.result(factor, share)


def _search(value: Callable[[float], float], limit: float, close: float) -> tuple[float, float]:
    """The largest (or smallest: what falls with it) factor for which `value` is at most `limit`, nearly, and its value.

    Values of a size fall with the factor, and the smallest factor is wanted that fits; a loss rises, and the largest is.
    Ends once `value` is within `close` of the limit; quickly, where it goes in proportion to the factor's logarithm.
    """
    low, high = _FINEST, _COARSEST
    ends = value(low), value(high)
    falls = ends[1] < ends[0]
    good, bad = (high, low) if falls else (low, high)
    good_value, bad_value = (ends[1], ends[0]) if falls else ends
    if good_value > limit:
        return good, good_value
    if bad_value <= limit:
        return bad, bad_value
    for turn in range(6):
        # Half by the line through both ends, which may stick to one of them, half by the middle.
        share = (limit - good_value) / (bad_value - good_value) if turn % 3 != 2 else 0.5
        share = min(max(share * 0.98, 0.05), 0.95)
        factor = math.exp(math.log(good) + share * (math.log(bad) - math.log(good)))
        found = value(factor)
        if found <= limit:
            good, good_value = factor, found
            if limit - found < close:
                break
        else:
            bad, bad_value = factor, found
    return good, good_value


def ratio(asset: SplatAsset, size: int) -> float:
    """How many times larger the .ply of 3D Gaussian Splatting is."""
    return ply_bytes(asset) / size


def _some(cameras: list[Cameras], most: int) -> list[Cameras]:
    return [cameras[int(i)] for i in np.linspace(0, len(cameras) - 1, min(len(cameras), most)).round()]


def _photographs(scene: Scene, first: Literal["test", "train"]) -> tuple[list[Cameras], str]:
    """Cameras of the split `first`, or the other's, and which; none if the capture is not there."""
    if not scene.has_cameras:
        return [], ""
    splits: tuple[Literal["test", "train"], ...] = ("test", "train") if first == "test" else ("train", "test")
    if scene.run is None:
        splits = ("train",)
    try:
        for split in splits:
            if cameras := scene.cameras(split):
                return cameras, split
    except OSError:
        pass  # moved away: the scene itself tells where to look from
    return [], ""


def _measuring_cameras(scene: Scene) -> tuple[list[Cameras], str]:
    cameras, split = _photographs(scene, "test")
    chosen = _some(cameras, _MOST_MEASURED) if cameras else _around(scene, (0.1, 0.75), 4, 0.13)
    return chosen, f"{len(chosen)} {split} cameras" if split else f"{len(chosen)} cameras around it"


def seeing_cameras(scene: Scene) -> list[Cameras]:
    """Those that say what is important: the training ones of a run, evenly chosen ones of many, or some all round."""
    cameras, _ = _photographs(scene, "train")
    return _some(cameras, _MOST_VIEWS) if cameras else _around(scene, (-0.3, 0.2, 0.7, 1.2), 8, 0.0)


def _around(scene: Scene, heights: tuple[float, ...], count: int, turn: float) -> list[Cameras]:
    """`count` cameras at each height above the content's centre (in units of half its reach), `turn` radians on."""
    frame = scene.frame if isinstance(scene.representation, Field) else content_frame(scene.asset())
    center, up = np.array(frame.center), np.array(frame.up) / np.linalg.norm(frame.up)
    found: list[Cameras] = []
    for height in heights:
        poses = ring(center, up, 2.5 / frame.scale)
        poses[:, :3, 3] += (height - 2.5 * math.sin(math.radians(20))) / frame.scale * up
        skipped = max(1, round(36 * turn / (2 * math.pi))) if turn else 0
        flight = orbit(np.roll(poses, skipped, 0), center, up, math.radians(50), 2 * count)
        batch = flight.cameras(640, 360)
        found += [batch[2 * i + (1 if turn else 0)] for i in range(count)]
    return found
