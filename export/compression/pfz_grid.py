"""What a .pfz rounds Gaussians to, chosen for an asset, and the rounding itself, in torch: it is that of the file which is
written, and of every step of a training that prepares for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prismfield.datasets.base import SceneFrame
from prismfield.export.assets import SplatAsset
from prismfield.export.compression.pfz import COLOR, MAX_DEPTH

Values = dict[str, Tensor]
"""Of N Gaussians in canonical form, of one floating type: `means` [N, 3], `ln_scales` [N, 3] that fall, `turned` [N, 3] the x y z
of unit quaternions whose w is largest, `opacities` [N], `colors` [N, 3] (rows of `COLOR`), `coefficients` [N, R]."""
_SMALLEST = 1e-6  # standard deviation, in the extent


@dataclass(frozen=True)
class PfzSteps:
    """How coarsely each attribute is rounded. Twice the steps: about a bit less of each number."""

    position: float = 0.35
    """Side of the cell that a Gaussian is put into, in standard deviations (geometric mean of the two larger ones), at most."""
    scale: float = 0.22
    """Of the logarithm of a standard deviation."""
    flattest: float = 150.0
    """The largest standard deviation by the smallest is at most that."""
    opacity: float = 0.04
    turn: float = 0.4
    """Of a quaternion's component, of a Gaussian twice as long as wide; finer in proportion for longer ones."""
    color: float = 0.12
    """Of a harmonic of degree 0; 0.28 times that in a channel's value."""
    sh: float = 0.07
    """Of a coefficient of the higher ones."""
    dead: float = 0.05
    """What a coefficient of the higher harmonics is short of the middle between two steps and still goes down."""
    chunk_factor: float = 1.5
    """Steps of colour of each further class of importance, by those of the class before."""

    def times(self, factor: float) -> PfzSteps:
        """All of them coarser, or finer."""
        names = ("position", "scale", "opacity", "turn", "color", "sh")
        values = {name: getattr(self, name) * factor for name in names}
        return PfzSteps(**(vars(self) | values))


STEPS_TO_TRAIN = PfzSteps(position=0.28, scale=0.3, turn=0.6, sh=0.12)
"""Where Gaussians are trained afterwards: training makes up for coarser harmonics, rotations and sizes, not for positions."""


@dataclass(frozen=True)
class Grid:
    """What all Gaussians of a file are rounded to."""

    low: tuple[float, float, float]
    """Corner of the octree's cube."""
    extent: float
    scale_low: float
    scale_step: float
    opacity_step: float
    color_step: float
    sh_step: float
    steps: PfzSteps
    depths: NDArray[np.uint8]
    """As in the file's tables."""
    turns: NDArray[np.uint8]
    codes: NDArray[np.int8]
    """[R, terms] the basis of the higher harmonics as it is stored, -127..127."""
    norms: NDArray[np.float32]
    """[R] what 127 stands for."""

    @property
    def basis(self) -> NDArray[np.float64]:
        """[R, terms]."""
        return self.codes.astype(np.float64) * (self.norms / 127)[:, None]

    def moved(self, frame: SceneFrame) -> Grid:
        """For values in the scene's frame instead of the user's: their symbols are the same."""
        low = (np.array(self.low) - np.array(frame.center)) * frame.scale
        scale_low = self.scale_low + math.log(frame.scale)
        return replace(
            self,
            low=(float(low[0]), float(low[1]), float(low[2])),
            extent=self.extent * frame.scale,
            scale_low=scale_low,
        )

    def finer(self, rank: NDArray) -> NDArray[np.int64]:
        """Quarters of a power of two by which a class of importance has coarser steps of colour."""
        return np.round(4 * rank * float(np.log2(self.steps.chunk_factor))).astype(np.int64)


def importance_of(asset: SplatAsset) -> NDArray[np.float64]:
    """[N] opacity times the area of the ellipse of the two larger standard deviations."""
    scales = np.sort(asset.scales.astype(np.float64), 1)
    return asset.opacities * scales[:, 1] * scales[:, 2]


def grid_of(asset: SplatAsset, steps: PfzSteps, importance: NDArray) -> tuple[Values, Grid]:
    """The Gaussians in canonical form, float64, and what to round them to.

    Args:
        asset: must not be empty.
        steps: how coarsely.
        importance: [N] how much each counts where harmonics are approximated.
    """
    means = asset.means.astype(np.float64)
    low = means.min(0).astype(np.float32).astype(np.float64)
    extent = float(np.float32(max(float((means - low).max()) * 1.0001, 1e-12)))
    quats, scales = canonical(asset.quats.astype(np.float64), asset.scales.astype(np.float64))
    largest = np.maximum(scales[:, 0], extent * _SMALLEST)
    ln_scales = np.log(np.maximum(np.maximum(scales, largest[:, None] / steps.flattest), 1e-30))
    rest = asset.sh[:, 1:].reshape(len(asset), -1).astype(np.float64)
    codes, norms = _basis(rest, importance, steps.sh)
    colors = asset.sh[:, 0].astype(np.float64) @ COLOR.T
    coefficients = np.zeros((len(asset), 0))
    if len(codes):
        coefficients = rest @ np.linalg.pinv(codes * (norms / 127)[:, None].astype(np.float64))
    scale_step = max(steps.scale, float(np.ptp(ln_scales[:, 0])) / 250)
    numbers = {
        "scale_low": float(ln_scales[:, 0].min()),
        "scale_step": scale_step,
        "opacity_step": max(steps.opacity, 1 / 255),
        "color_step": max(steps.color, _range(colors) / 250),
        "sh_step": max(steps.sh, _range(coefficients) / 250),
    }
    largest_symbol = round((float(ln_scales[:, 0].max()) - numbers["scale_low"]) / scale_step)
    sizes = np.arange(2 * largest_symbol + 1) / 2 * scale_step + numbers["scale_low"]  # ln of what `position` refers to
    depths = np.clip(np.ceil(np.log2(extent / steps.position) - sizes / np.log(2)), 1, MAX_DEPTH)
    ratios = np.exp(np.arange(math.log(steps.flattest) / scale_step + 2) * scale_step)
    # Nothing is seen of how a sphere is turned; of a needle, its width is a share of its length.
    turns = np.clip(np.ceil(np.log2(np.maximum((ratios - 1 / ratios) / 1.5 / steps.turn, 1))) + 1, 1, 8)
    arrays = {
        "means": means,
        "ln_scales": ln_scales,
        "turned": quats[:, 1:],
        "opacities": asset.opacities.astype(np.float64),
        "colors": colors,
        "coefficients": coefficients,
    }
    tables: dict[str, Any] = {"depths": depths.astype(np.uint8), "turns": turns.astype(np.uint8)}
    tables |= {name: float(np.float32(value)) for name, value in numbers.items()}
    place = float(low[0]), float(low[1]), float(low[2])
    values = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return values, Grid(low=place, extent=extent, steps=steps, codes=codes, norms=norms, **tables)


class Rounding:
    """A grid's tables as tensors, and what they make of values."""

    def __init__(self, grid: Grid, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.grid = grid
        self._low = torch.tensor(grid.low, dtype=dtype, device=device)
        self._depths = torch.from_numpy(grid.depths).to(device, dtype)
        self._turns = torch.from_numpy(grid.turns).to(device, dtype)
        self._flattest = math.log(grid.steps.flattest) / grid.scale_step

    def symbols(self, values: Values, coarser: Tensor) -> Values:
        """Whole numbers of the same type: `scale` `flat` `thin` `depth` `bits` `opacity` [N], `turned` `colors` [N, 3],
        `coefficients` [N, R]; and `place` [N, 3], in 0 to below 1 of the cube.

        Args:
            values: whatever they are, the symbols are such that a file can hold.
            coarser: [N] factor on the steps of colour.
        """
        grid = self.grid
        units = (values["ln_scales"] - grid.scale_low) / grid.scale_step
        largest = units[:, 0]
        scale = largest.round().clamp(0, 255)
        middle, least = (torch.maximum(units[:, i], largest - self._flattest).round() for i in (1, 2))
        flat = (scale - middle).clamp(min=0)
        thin = (scale - flat - least).clamp(min=0)
        at_least = 2 * scale - flat
        depth = self._depths[at_least.clamp(0, len(self._depths) - 1).long()]
        bits = self._turns[(flat + thin).clamp(0, len(self._turns) - 1).long()]
        most = (2 ** (bits - 1) - 1)[:, None]
        turned = (values["turned"] * (math.sqrt(2) * most)).round()
        place = (values["means"] - self._low) / grid.extent
        # By far the most numbers: in place, as few passes as will do.
        coefficients = values["coefficients"] / (grid.sh_step * coarser)[:, None]
        coefficients += torch.copysign(coefficients.new_tensor(0.5 - grid.steps.dead), coefficients)
        return {
            "scale": scale,
            "flat": flat,
            "thin": thin,
            "depth": depth,
            "bits": bits,
            "opacity": (values["opacities"] / grid.opacity_step).round().clamp(min=1),
            "turned": torch.minimum(torch.maximum(turned, -most), most),
            "colors": (values["colors"] / (grid.color_step * coarser)[:, None]).round().clamp(-127, 127),
            "coefficients": coefficients.trunc_().clamp_(-127, 127),
            "place": place.clamp(0, 1 - 2.0**-MAX_DEPTH),
        }

    def values(self, symbols: Values, coarser: Tensor, level: Tensor) -> Values:
        """What a reader makes of symbols, in the form that they were made of.

        Args:
            symbols: as `symbols` gives them.
            coarser: [N] factor on the steps of colour.
            level: [N] octree level of the cells of a Gaussian's chunk: it lies at least so deep.
        """
        grid = self.grid
        cells = 2 ** torch.maximum(symbols["depth"], level)[:, None]
        first, second = symbols["scale"] - symbols["flat"], symbols["scale"] - symbols["flat"] - symbols["thin"]
        most = (2 ** (symbols["bits"] - 1) - 1).clamp(min=1)[:, None]
        return {
            "means": self._low + ((symbols["place"] * cells).floor() + 0.5) * (grid.extent / cells),
            "ln_scales": grid.scale_low + grid.scale_step * torch.stack([symbols["scale"], first, second], 1),
            "turned": symbols["turned"] / (math.sqrt(2) * most),
            "opacities": (symbols["opacity"] * grid.opacity_step).clamp(0, 1),
            "colors": symbols["colors"] * (grid.color_step * coarser)[:, None],
            "coefficients": symbols["coefficients"] * (grid.sh_step * coarser)[:, None],
        }


def _range(values: NDArray) -> float:
    """Of all but the farthest 1 in 10,000 of each column, the widest."""
    if values.size == 0:
        return 0.0
    low, high = np.quantile(values, [1e-4, 1 - 1e-4], axis=0)
    return float((high - low).max())


def canonical(quats: NDArray, scales: NDArray) -> tuple[NDArray, NDArray]:
    """The same ellipsoids with scales that fall and w the largest component of the quaternion: of 24 ways to write one, this."""
    order = np.argsort(-scales, 1, kind="stable")
    matrix = np.take_along_axis(_matrices(quats), order[:, None], 2)
    matrix[:, :, 2] *= np.sign(np.linalg.det(matrix))[:, None]
    found = _quaternions(matrix)
    w, x, y, z = found.T
    turned = np.stack([found, np.stack([x, -w, -z, y], 1), np.stack([y, z, -w, -x], 1), np.stack([z, -y, x, -w], 1)], 1)
    best = np.abs(found).argmax(1)
    found = turned[np.arange(len(found)), best]
    return found * np.where(found[:, :1] < 0, -1, 1), np.take_along_axis(scales, order, 1)


def _matrices(quats: NDArray) -> NDArray:
    w, x, y, z = quats.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _quaternions(m: NDArray) -> NDArray:
    """[N, 4] of rotation matrices: the row of q q^T with the largest diagonal, for accuracy."""
    trace = m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2]
    diagonal = np.stack([1 + trace, *(1 - trace + 2 * m[:, i, i] for i in range(3))], 1)
    a, b, c = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    d, e, f = m[:, 0, 1] + m[:, 1, 0], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 2] + m[:, 2, 1]
    g = diagonal.T
    rows = np.stack(
        [np.stack(row, 1) for row in ((g[0], a, b, c), (a, g[1], d, e), (b, d, g[2], f), (c, e, f, g[3]))], 1
    )
    found = rows[np.arange(len(m)), diagonal.argmax(1)]
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _basis(rest: NDArray, importance: NDArray, step: float) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The directions along which harmonics vary most, and that a step resolves: ([rank, terms] of -127..127, [rank] of 127)."""
    if rest.shape[1] == 0 or not rest.any():
        return np.zeros((0, rest.shape[1]), np.int8), np.zeros(0, np.float32)
    weights = np.sqrt(importance.astype(np.float64) + 1e-12 * importance.max(initial=0) + 1e-300)
    covariance = (rest * (weights / weights.sum())[:, None]).T @ rest
    variances, directions = np.linalg.eigh(covariance)
    kept = np.flatnonzero(variances > (0.2 * step) ** 2)[::-1]
    directions = directions[:, kept].T
    norms = np.abs(directions).max(1, initial=1e-12).astype(np.float32)
    return np.round(directions / norms[:, None] * 127).astype(np.int8), norms
