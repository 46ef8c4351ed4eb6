"""What representations made of primitives for the tile rasterizer have in common."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from prismfield.render.cameras import Cameras
from prismfield.render.checks import check_shapes
from prismfield.render.ops.sh import C0
from prismfield.render.output import RenderOutput

_NEIGHBOURS = 3


class Splats(nn.Module):
    """N primitives with opacity and harmonic colour; a subclass adds their shape and draws them.

    Every parameter but those of modules within has one row a primitive; `train/strategies/rows.py` adds and drops rows.
    """

    batching: ClassVar[Literal["image", "pixels"]] = "image"
    shape_patterns: ClassVar[dict[str, str]]
    """The parameters that give the shape, in order, with their shapes as `check_shapes` takes them."""

    opacity_logits: nn.Parameter
    """[N]."""
    sh0: nn.Parameter
    """[N, 1, 3]."""
    shN: nn.Parameter
    """[N, T-1, 3]."""
    active_sh_degree: int
    """Harmonics in use; strategies raise it while training."""

    def __init__(self, tensors: dict[str, Tensor], config: Any) -> None:
        super().__init__()
        patterns = self.shape_patterns | {"opacity_logits": "N", "sh0": "N 1 3", "shN": "N T 3"}
        if missing := [name for name in patterns if name not in tensors]:
            raise ValueError(f"tensors: expected {', '.join(patterns)}; {', '.join(missing)} missing")
        terms = check_shapes(**{name: (tensors[name], pattern) for name, pattern in patterns.items()})["T"] + 1
        if terms not in (1, 4, 9, 16):
            raise ValueError(f"shN: expected 0, 3, 8 or 15 terms (degree 0 to 3), got {terms - 1}")
        for name in patterns:
            value = tensors[name].detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            setattr(self, name, nn.Parameter(value))
        self.config = config
        self.active_sh_degree = self.sh_degree

    @classmethod
    def from_points(cls, xyz: Tensor, rgb: Tensor, aabb: Tensor, config: Any) -> Self:
        """Primitives at the points, as wide as the mean distance to the three nearest neighbours.

        Args:
            xyz: [P, 3] scene units, P >= 1.
            rgb: [P, 3] in 0..1.
            aabb: [2, 3] bounds of the content; sets the width of points that have no neighbour.
            config: `init_opacity`, `sh_degree` and what the shape takes are used here.

        Raises:
            ValueError: a shape does not fit, there is no point, or `init_opacity` is not inside (0, 1).
        """
        count = check_shapes(xyz=(xyz, "P 3"), rgb=(rgb, "P 3"), aabb=(aabb, "2 3"))["P"]
        if count == 0:
            raise ValueError("xyz: expected at least one point to start from, got none")
        if not 0 < config.init_opacity < 1:
            raise ValueError(f"init_opacity: expected a number between 0 and 1, got {config.init_opacity}")
        widths = config.init_scale * _neighbour_distances(xyz, float((aabb[1] - aabb[0]).norm()))
        tensors = cls.shapes_at(xyz, widths, config) | {
            "opacity_logits": xyz.new_full((count,), math.log(config.init_opacity / (1 - config.init_opacity))),
            "sh0": ((rgb - 0.5) / C0)[:, None],
            "shN": xyz.new_zeros(count, (config.sh_degree + 1) ** 2 - 1, 3),
        }
        scene = cls(tensors, config)
        scene.active_sh_degree = config.sh_degree_at(0.0)
        return scene

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], config: Any) -> Self:
        """The primitives whose `tensors()` these are; `shN` may hold another degree than `config.sh_degree`."""
        return cls(tensors, config)

    @classmethod
    def shapes_at(cls, xyz: Tensor, widths: Tensor, config: Any) -> dict[str, Tensor]:
        """Shape parameters of round primitives `widths` [P] wide at `xyz` [P, 3], scene units."""
        raise NotImplementedError

    def draw(self, cameras: Cameras, background: Tensor | None, extras: Collection[str]) -> RenderOutput:
        """The whole images; see `render`."""
        raise NotImplementedError

    @property
    def num_primitives(self) -> int:
        """N."""
        return len(self.opacity_logits)

    @property
    def sh_degree(self) -> int:
        """Harmonics stored."""
        return math.isqrt(self.shN.shape[1] + 1) - 1

    @property
    def opacities(self) -> Tensor:
        """[N] in (0, 1)."""
        return self.opacity_logits.sigmoid()

    def render(
        self,
        cameras: Cameras,
        pixels: Tensor | None = None,
        background: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> RenderOutput:
        """Draw the whole images; where `pixels` [R, 3] (camera, column, row) are given, return those alone.

        Args:
            cameras: C pinhole cameras.
            pixels: integers.
            background: [C, 3], black if None.
            extras: any of "depth", "median_depth", "absgrad" (see `RenderOutput`).
        """
        out = self.draw(cameras, background, extras)
        if pixels is None:
            return out
        camera, column, row = pixels.long().unbind(-1)
        images = {name: getattr(out, name) for name in ("rgb", "alpha", "depth", "median_depth")}
        return replace(out, **{name: x[camera, row, column] for name, x in images.items() if x is not None})

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter, with the rates of the config."""
        return [{"name": name, "params": [parameter]} | self.rates(name) for name, parameter in self.named_parameters()]

    def rates(self, name: str) -> dict[str, Any]:
        """What the config says of how a parameter learns: keys of its group beside `name` and `params`."""
        options = (("lr", f"{name}_lr"), ("lr_final", f"{name}_lr_final"), ("every", f"{name}_every"))
        return {key: getattr(self.config, option) for key, option in options if hasattr(self.config, option)}

    def rows(self) -> dict[str, Tensor]:
        """The parameters that have one row a primitive, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}

    def tensors(self) -> dict[str, Tensor]:
        """All parameters, detached and not copied."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def _neighbour_distances(xyz: Tensor, extent: float) -> Tensor:
    """[P] mean distance of each point to its nearest neighbours, never zero.

    Points that coincide take a tenth of the median, a lone point a hundredth of `extent`.
    """
    points = xyz.detach().cpu().double().numpy()
    neighbours = min(_NEIGHBOURS, len(points) - 1)
    if neighbours == 0:
        return xyz.new_full((1,), max(0.01 * extent, 1e-6))
    distances, _ = cKDTree(points).query(points, k=neighbours + 1, workers=-1)
    means = torch.from_numpy(distances[:, 1:].mean(1)).to(xyz)
    return means.clamp(min=max(0.1 * float(means.median()), 1e-6 * extent, 1e-12))
