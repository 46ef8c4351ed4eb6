"""What every file format reads into and writes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from prismfield.datasets.base import SceneFrame

Array = NDArray[np.float32]

# What float32 can hold of an opacity and still have a finite logit, and of a scale and still have a finite logarithm.
_OPACITY_MIN, _OPACITY_MAX, _SCALE_MIN = 1e-7, 1 - 2.0**-24, 1e-30


@dataclass(frozen=True)
class SplatAsset:
    """N Gaussians with activated values, float32.

    They are in the user's frame: the axes and units of the capture they were trained on.

    Raises:
        ValueError: a shape does not fit, a value is not finite, an opacity is outside 0..1, a scale is negative or
            a quaternion is not of unit length.
    """

    means: Array
    """[N, 3] user units."""
    quats: Array
    """[N, 4] wxyz, unit length."""
    scales: Array
    """[N, 3] standard deviations, user units."""
    opacities: Array
    """[N] in 0..1."""
    sh: Array
    """[N, K, 3] harmonics, K = 1, 4, 9 or 16."""
    up: tuple[float, float, float] | None = None
    """Unit vector against gravity, None where nobody knows."""
    antialiased: bool = False
    """Drawn with opacity scaled against the screen-space blur (see `render.ops.project`)."""

    def __post_init__(self) -> None:
        count = len(self.means)
        terms = self.sh.shape[1] if self.sh.ndim == 3 else 0
        if terms not in (1, 4, 9, 16):
            raise ValueError(f"sh: expected [{count}, 1 or 4 or 9 or 16, 3], got {list(self.sh.shape)}")
        shapes = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "sh": (terms, 3)}
        for name, shape in shapes.items():
            values = getattr(self, name)
            if values.shape != (count, *shape) or values.dtype != np.float32:
                raise ValueError(f"{name}: expected float32 {[count, *shape]}, got {values.dtype} {list(values.shape)}")
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values).reshape(count, -1).all(1)).sum())
                raise ValueError(f"{name}: {bad} of {count} Gaussians have a value that is not finite")
        if count and (self.opacities.min() < 0 or self.opacities.max() > 1):
            raise ValueError(f"opacities: expected 0..1, got {self.opacities.min()}..{self.opacities.max()}")
        if count and np.abs(np.linalg.norm(self.quats, axis=1) - 1).max() > 1e-3:
            raise ValueError("quats: expected unit length")
        if count and self.scales.min() < 0:
            raise ValueError(f"scales: expected none below 0, got {self.scales.min()}")

    def __len__(self) -> int:
        return len(self.means)

    @property
    def sh_degree(self) -> int:
        """0 to 3."""
        return int(np.sqrt(self.sh.shape[1])) - 1

    @property
    def logits(self) -> NDArray[np.float64]:
        """[N] of the opacities; finite, so that an opacity of 1 comes back a little smaller."""
        clipped = self.opacities.astype(np.float64).clip(_OPACITY_MIN, _OPACITY_MAX)
        return np.log(clipped) - np.log1p(-clipped)

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
        up: tuple[float, float, float] | None = None,
        antialiased: bool = False,
    ) -> Self:
        """From values before activation; `quats` of any length, those of length zero become the identity."""
        quats = quats.astype(np.float64)
        lengths = np.linalg.norm(quats, axis=1, keepdims=True)
        quats = np.where(lengths > 0, quats / np.where(lengths > 0, lengths, 1), np.array([1.0, 0, 0, 0]))
        with np.errstate(over="ignore"):  # what overflows becomes infinite and is refused above
            scales = np.exp(log_scales.astype(np.float64)).astype(np.float32)
            opacities = 1 / (1 + np.exp(-opacity_logits.astype(np.float64)))
            means, sh = means.astype(np.float32), sh.astype(np.float32)
        return cls(
            means, quats.astype(np.float32), scales, opacities.astype(np.float32), sh, up=up, antialiased=antialiased
        )

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
        import torch

        terms = self.sh.shape[1] if sh_degree is None else (sh_degree + 1) ** 2
        sh = np.zeros((len(self), terms, 3), np.float32)
        kept = min(terms, self.sh.shape[1])
        sh[:, :kept] = self.sh[:, :kept]
        arrays = {
            "means": (self.means - np.array(frame.center)) * frame.scale,
            "quats": self.quats,
            "log_scales": self.log_scales + np.log(frame.scale),
            "opacity_logits": self.logits,
            "sh0": sh[:, :1],
            "shN": sh[:, 1:],
        }
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
