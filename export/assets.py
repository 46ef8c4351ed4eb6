"""What every file format reads into and writes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from prismfield.export.rows import pieces
from prismfield.export.turn import harmonic_rotations

if TYPE_CHECKING:
    from torch import Tensor

    from prismfield.datasets.base import SceneFrame
    from prismfield.representations.config import ConvexesConfig, GaussiansConfig

Array = NDArray[np.float32]
Up = tuple[float, float, float]
EXPECTED_UP: Up = (0.0, -1.0, 0.0)
"""Of a file that does not say: OpenCV's axes, as COLMAP leaves them."""

# What float32 can hold of an opacity and still have a finite logit, and of a scale and still have a finite logarithm.
_OPACITY_MIN, _OPACITY_MAX, _SCALE_MIN = 1e-7, 1 - 2.0**-24, 1e-30
_KINDS = {"points": ("float32", "float64")}
_FAR = 100.0  # widths of the scene from which on the origin is so far that float32 would dent a convex


class _Asset:
    """What Gaussians and convexes share: N primitives with opacity and harmonic colour."""

    noun: ClassVar[str]
    """What messages call its primitives."""
    representation: ClassVar[str]
    """What draws them."""
    opacities: Array
    """[N] in 0..1."""
    sh: Array
    """[N, T, 3] harmonics, T = 1, 4, 9 or 16."""
    up: Up | None
    """Unit vector against gravity, None where nobody knows."""

    def __len__(self) -> int:
        return len(self.opacities)

    @property
    def sh_degree(self) -> int:
        """0 to 3."""
        return int(np.sqrt(self.sh.shape[1])) - 1

    @property
    def logits(self) -> NDArray[np.float64]:
        """[N] of the opacities; finite, so that an opacity of 1 comes back a little smaller."""
        clipped = self.opacities.astype(np.float64).clip(_OPACITY_MIN, _OPACITY_MAX)
        return np.log(clipped) - np.log1p(-clipped)

    def at_degree(self, sh_degree: int) -> Self:
        """With its harmonics padded with zeros, or cut, to this degree."""
        if sh_degree == self.sh_degree:
            return self
        stored = self._appearance(sh_degree)
        made: Any = self  # a dataclass, as every subclass is
        return replace(made, sh=np.concatenate([stored["sh0"], stored["shN"]], 1))

    def _turned_sh(self, rotation: NDArray) -> Array:
        """[N, T, 3] the harmonics in axes turned by `rotation` [3, 3]."""
        sh = np.empty_like(self.sh)
        for degree, matrix in enumerate(harmonic_rotations(rotation)[: self.sh_degree + 1]):
            band = slice(degree**2, (degree + 1) ** 2)
            for rows in pieces(len(self)):
                sh[rows, band] = matrix @ self.sh[rows, band]
        return sh

    def _turned_up(self, rotation: NDArray) -> Up | None:
        if self.up is None:
            return None
        x, y, z = (float(value) for value in rotation @ np.array(self.up))
        return x, y, z

    def _check(self, count: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise a ValueError if `shapes`, opacities or harmonics do not fit `count` rows, or something is not finite."""
        terms = self.sh.shape[1] if self.sh.ndim == 3 else 0
        if terms not in (1, 4, 9, 16):
            raise ValueError(f"sh: expected [{count}, 1 or 4 or 9 or 16, 3], got {list(self.sh.shape)}")
        for name, shape in (shapes | {"opacities": (), "sh": (terms, 3)}).items():
            values = getattr(self, name)
            kinds = _KINDS.get(name, ("float32",))
            if values.shape != (count, *shape) or str(values.dtype) not in kinds:
                expected = f"{' or '.join(kinds)} {[count, *shape]}"
                raise ValueError(f"{name}: expected {expected}, got {values.dtype} {list(values.shape)}")
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values).reshape(count, -1).all(1)).sum())
                raise ValueError(f"{name}: {bad} of {count} {self.noun} have a value that is not finite")
        if count and (self.opacities.min() < 0 or self.opacities.max() > 1):
            raise ValueError(f"opacities: expected 0..1, got {self.opacities.min()}..{self.opacities.max()}")

    def _appearance(self, sh_degree: int | None) -> dict[str, NDArray]:
        """Opacity and harmonics as they are stored, these padded with zeros or cut to `sh_degree`."""
        terms = self.sh.shape[1] if sh_degree is None else (sh_degree + 1) ** 2
        sh = np.zeros((len(self), terms, 3), np.float32)
        kept = min(terms, self.sh.shape[1])
        sh[:, :kept] = self.sh[:, :kept]
        return {"opacity_logits": self.logits, "sh0": sh[:, :1], "shN": sh[:, 1:]}

    def _appearance_differences(self, other: _Asset) -> dict[str, float]:
        pairs = (self.opacities, other.opacities), (self.sh, other.sh)
        found = {name: _largest(*pair) for name, pair in zip(("opacities", "sh"), pairs, strict=True)}
        if self.up is None or other.up is None:
            return found | {"up": 0.0 if self.up is other.up else np.inf}
        return found | {"up": float(np.abs(np.subtract(self.up, other.up)).max())}


@dataclass(frozen=True)
class SplatAsset(_Asset):
    """N Gaussians with activated values, float32.

    They are in the user's frame: the axes and units of the capture they were trained on.

    Raises:
        ValueError: a shape does not fit, a value is not finite, an opacity is outside 0..1, a scale is negative or
            a quaternion is not of unit length.
    """

    noun: ClassVar = "Gaussians"
    representation: ClassVar = "gaussians"

    means: Array
    """[N, 3] user units."""
    quats: Array
    """[N, 4] wxyz, unit length."""
    scales: Array
    """[N, 3] standard deviations, user units."""
    opacities: Array
    """[N] in 0..1."""
    sh: Array
    """[N, T, 3] harmonics, T = 1, 4, 9 or 16."""
    up: Up | None = None
    """Unit vector against gravity, None where nobody knows."""
    antialiased: bool = False
    """Drawn with opacity scaled against the screen-space blur (see `render.ops.project`)."""
    extra: Mapping[str, NDArray] = field(default_factory=dict)
    """[N] by name: what a .ply held beside these, passed on to the next."""

    def __post_init__(self) -> None:
        count = len(self.means)
        self._check(count, {"means": (3,), "quats": (4,), "scales": (3,)})
        if wrong := [name for name, values in self.extra.items() if values.shape != (count,)]:
            raise ValueError(f"extra: expected [{count}], got {list(self.extra[wrong[0]].shape)} for {wrong[0]!r}")
        if count and np.abs(np.linalg.norm(self.quats, axis=1) - 1).max() > 1e-3:
            raise ValueError("quats: expected unit length")
        if count and self.scales.min() < 0:
            raise ValueError(f"scales: expected none below 0, got {self.scales.min()}")

    @property
    def log_scales(self) -> NDArray[np.float64]:
        """[N, 3], finite."""
        return np.log(self.scales.astype(np.float64).clip(min=_SCALE_MIN))

    @classmethod
    def from_stored(
        cls,
        means: NDArray,
        quats: NDArray,
        log_scales: NDArray,
        opacity_logits: NDArray,
        sh: NDArray,
        *,
        up: Up | None = None,
        antialiased: bool = False,
    ) -> Self:
        """From values before activation; `quats` of any length, those of length zero become the identity."""
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused above
            scales = np.exp(log_scales.astype(np.float64))
            opacities = 1 / (1 + np.exp(-opacity_logits.astype(np.float64)))
        return cls.from_activated(means, quats, scales, opacities, sh, up=up, antialiased=antialiased)

    @classmethod
    def from_activated(
        cls,
        means: NDArray,
        quats: NDArray,
        scales: NDArray,
        opacities: NDArray,
        sh: NDArray,
        *,
        up: Up | None = None,
        antialiased: bool = False,
    ) -> Self:
        """From values as they are drawn, of any type; `quats` of any length, those of length zero become the identity."""
        quats = quats.astype(np.float64)
        lengths = np.linalg.norm(quats, axis=1, keepdims=True)
        quats = np.where(lengths > 0, quats / np.where(lengths > 0, lengths, 1), np.array([1.0, 0, 0, 0]))
        with np.errstate(over="ignore"):  # as above
            values = [np.asarray(x).astype(np.float32, copy=False) for x in (means, quats, scales, opacities, sh)]
        means, quats, scales, opacities, sh = values
        return cls(means, quats, scales, opacities, sh, up=up, antialiased=antialiased)

    def take(self, rows: NDArray) -> Self:
        """Those rows, in that order."""
        values = {name: getattr(self, name)[rows] for name in ("means", "quats", "scales", "opacities", "sh")}
        return replace(self, **values, extra={name: column[rows] for name, column in self.extra.items()})

    @classmethod
    def from_scene(cls, scene: Any, frame: SceneFrame) -> Self:
        """Those of a representation, moved from the scene's frame to the user's."""
        return cls.from_tensors(scene.tensors(), frame, antialiased=scene.config.antialiased)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], frame: SceneFrame, *, antialiased: bool = False) -> Self:
        """The Gaussians of a trained scene (`Representation.tensors()`), moved from the scene's frame to the user's."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        return cls.from_stored(
            arrays["means"].astype(np.float64) / frame.scale + np.array(frame.center),
            arrays["quats"],
            arrays["log_scales"].astype(np.float64) - np.log(frame.scale),
            arrays["opacity_logits"],
            np.concatenate([arrays["sh0"], arrays["shN"]], 1),
            up=frame.up,
            antialiased=antialiased,
        )

    def to_tensors(self, frame: SceneFrame, *, sh_degree: int | None = None) -> dict[str, Tensor]:
        """What `Representation.from_tensors` takes, moved from the user's frame to the scene's.

        Args:
            frame: of the scene to train or to draw in.
            sh_degree: pad the harmonics with zeros, or cut them, to this degree; None keeps them.
        """
        return _to_torch(
            {
                "means": (self.means - np.array(frame.center)) * frame.scale,
                "quats": self.quats,
                "log_scales": self.log_scales + np.log(frame.scale),
            }
            | self._appearance(sh_degree)
        )

    def moved(self, rotation: NDArray, translation: Sequence[float] = (0.0, 0.0, 0.0), scale: float = 1.0) -> Self:
        """In another frame, where a point p is at scale * rotation @ p + translation. It looks the same from cameras that moved along.

        Args:
            rotation: [3, 3].
            translation: in units of the new frame.
            scale: new units for one of the old.

        Raises:
            ValueError: that is no rotation, or the scale is not positive.
        """
        rotation = _checked_motion(rotation, scale)
        from scipy.spatial.transform import Rotation

        x, y, z, w = Rotation.from_matrix(rotation).as_quat()
        product = np.array([[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]])  # Hamilton's, from the left
        means = scale * (self.means.astype(np.float64) @ rotation.T) + np.asarray(translation, np.float64)
        return replace(
            self,
            means=means.astype(np.float32),
            quats=(self.quats.astype(np.float64) @ product.T).astype(np.float32),
            scales=(self.scales * np.float64(scale)).astype(np.float32),
            sh=self._turned_sh(rotation),
            up=self._turned_up(rotation),
        )

    def config(self) -> GaussiansConfig:
        """With which a representation draws them as they are."""
        from prismfield.representations.config import GaussiansConfig

        return GaussiansConfig(sh_degree=self.sh_degree, antialiased=self.antialiased)

    def differences(self, other: Self) -> dict[str, float]:
        """Largest difference by field: absolute, for `scales` of their logarithms, for `quats` with the better sign.

        A field whose shapes or metadata differ counts as infinitely different.
        """
        if len(self) != len(other) or self.sh.shape != other.sh.shape:
            return dict.fromkeys(("means", "quats", "scales", "opacities", "sh", "up", "antialiased"), np.inf)
        signs = np.where((self.quats * other.quats).sum(1, keepdims=True) < 0, -1, 1).astype(np.float32)
        return {
            "means": _largest(self.means, other.means),
            "quats": _largest(self.quats, signs * other.quats),
            "scales": _largest(self.log_scales, other.log_scales),
            "antialiased": 0.0 if self.antialiased == other.antialiased else np.inf,
        } | self._appearance_differences(other)


@dataclass(frozen=True)
class ConvexAsset(_Asset):
    """N smooth convexes with activated values, in the user's frame: the axes and units of the capture they were trained on.

    Raises:
        ValueError: a shape does not fit, a value is not finite, an opacity is outside 0..1, or a delta or sigma is not positive.
    """

    noun: ClassVar = "convexes"
    representation: ClassVar = "convexes"

    points: NDArray[np.floating]
    """[N, K, 3] user units, K from 3 to 12; float32, or float64 where the origin is far away."""
    deltas: Array
    """[N] smoothness, per user unit."""
    sigmas: Array
    """[N] sharpness."""
    opacities: Array
    """[N] in 0..1."""
    sh: Array
    """[N, T, 3] harmonics, T = 1, 4, 9 or 16."""
    up: Up | None = None
    """Unit vector against gravity, None where nobody knows."""

    def __post_init__(self) -> None:
        count, points = len(self.points), self.points.shape[1] if self.points.ndim == 3 else 0
        if not 3 <= points <= 12:
            raise ValueError(f"points: expected [{count}, 3 to 12, 3], got {list(self.points.shape)}")
        self._check(count, {"points": (points, 3), "deltas": (), "sigmas": ()})
        for name in ("deltas", "sigmas"):
            if count and (least := getattr(self, name).min()) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {least}")

    @property
    def means(self) -> NDArray[np.floating]:
        """[N, 3] centres, user units."""
        return self.points.mean(1)

    @classmethod
    def from_scene(cls, scene: Any, frame: SceneFrame) -> Self:
        """Those of a representation, moved from the scene's frame to the user's."""
        return cls.from_tensors(scene.tensors(), frame)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], frame: SceneFrame) -> Self:
        """The convexes of a trained scene (`Representation.tensors()`), moved from the scene's frame to the user's."""
        arrays = {name: tensor.detach().cpu().double().numpy() for name, tensor in tensors.items()}
        is_far = np.linalg.norm(frame.center) * frame.scale > _FAR
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused above
            return cls(
                (arrays["points"] / frame.scale + np.array(frame.center)).astype(np.float64 if is_far else np.float32),
                np.exp(arrays["log_deltas"] + np.log(frame.scale)).astype(np.float32),
                np.exp(arrays["log_sigmas"]).astype(np.float32),
                (1 / (1 + np.exp(-arrays["opacity_logits"]))).astype(np.float32),
                np.concatenate([arrays["sh0"], arrays["shN"]], 1).astype(np.float32),
                up=frame.up,
            )

    def to_tensors(self, frame: SceneFrame, *, sh_degree: int | None = None) -> dict[str, Tensor]:
        """What `Representation.from_tensors` takes, moved from the user's frame to the scene's.

        Args:
            frame: of the scene to train or to draw in.
            sh_degree: pad the harmonics with zeros, or cut them, to this degree; None keeps them.
        """
        return _to_torch(
            {
                "points": (self.points - np.array(frame.center)) * frame.scale,
                "log_deltas": np.log(self.deltas.astype(np.float64)) - np.log(frame.scale),
                "log_sigmas": np.log(self.sigmas.astype(np.float64)),
            }
            | self._appearance(sh_degree)
        )

    def moved(self, rotation: NDArray, translation: Sequence[float] = (0.0, 0.0, 0.0), scale: float = 1.0) -> Self:
        """In another frame, as `SplatAsset.moved`."""
        rotation = _checked_motion(rotation, scale)
        points = scale * (self.points.astype(np.float64) @ rotation.T) + np.asarray(translation, np.float64)
        return replace(
            self,
            points=points.astype(self.points.dtype),
            deltas=(self.deltas / scale).astype(np.float32),
            sh=self._turned_sh(rotation),
            up=self._turned_up(rotation),
        )

    def config(self) -> ConvexesConfig:
        """With which a representation draws them as they are."""
        from prismfield.representations.config import ConvexesConfig

        return ConvexesConfig(points=self.points.shape[1], sh_degree=self.sh_degree)

    def differences(self, other: Self) -> dict[str, float]:
        """Largest absolute difference by field; where shapes differ, all are infinitely different."""
        if self.points.shape != other.points.shape or self.sh.shape != other.sh.shape:
            return dict.fromkeys(("points", "deltas", "sigmas", "opacities", "sh", "up"), np.inf)
        found = {name: _largest(getattr(self, name), getattr(other, name)) for name in ("points", "deltas", "sigmas")}
        return found | self._appearance_differences(other)


Asset = SplatAsset | ConvexAsset
"""What a file of primitives holds."""


def _checked_motion(rotation: NDArray, scale: float) -> NDArray[np.float64]:
    rotation = np.asarray(rotation, np.float64)
    if rotation.shape != (3, 3) or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-5):
        raise ValueError("rotation: expected an orthogonal matrix [3, 3]")
    if np.linalg.det(rotation) < 0 or not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"expected no mirroring and a positive scale, got a scale of {scale}")
    return rotation


def _largest(a: NDArray, b: NDArray) -> float:
    return max((float(np.abs(a[rows] - b[rows]).max(initial=0.0)) for rows in pieces(len(a))), default=0.0)


def _to_torch(arrays: dict[str, NDArray]) -> dict[str, Tensor]:
    import torch

    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
