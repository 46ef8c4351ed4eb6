"""From rays and a field to colours: ask the field at each sample, blend."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from prismfield.render.checks import check_shapes
from prismfield.render.ops.constants import TRANS_MIN
from prismfield.render.ops.march import composite_samples
from prismfield.render.samplers import OccupancyGrid, Samples

Query = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Positions [S, 3] and directions [S, 3] to densities [S] per world unit and colours [S, 3], or more channels."""


@dataclass
class Marched:
    """Rendered channels of R rays."""

    rgb: Tensor
    """[R, 3], background blended in."""
    alpha: Tensor
    """[R], 1 - transmittance."""
    weights: Tensor | None
    """[S], share of each sample in its ray; None from `trace`."""
    depth: Tensor | None = None
    """[R], camera z, expected: the weighted mean, 0 where alpha is 0; None unless asked for."""
    median_depth: Tensor | None = None
    """[R], camera z where half of the light is left, 0 where more is; None unless asked for. Carries no gradient."""
    features: Tensor | None = None
    """[R, D], the query's channels beyond the colour, without background; None where there are none."""


def march(
    samples: Samples,
    origins: Tensor,
    dirs: Tensor,
    query: Query,
    background: Tensor | None = None,
    extras: Collection[str] = (),
    *,
    cosines: Tensor | None = None,
) -> Marched:
    """Blend what a field says at samples, with gradients to the field.

    Args:
        samples: from a sampler.
        origins: [R, 3] world units.
        dirs: [R, 3] of unit length.
        query: the field.
        background: [3] or [R, 3] behind the scene, black if None.
        extras: "depth" and "median_depth", in any order; others are ignored.
        cosines: [R] between the rays and their cameras' axes, for depths along the axis; along the ray if None.

    Raises:
        ValueError: a shape does not fit.
    """
    rays = check_shapes(origins=(origins, "R 3"), dirs=(dirs, "R 3"), packed_info=(samples.packed_info, "R 2"))["R"]
    cosines = _cosines(cosines, dirs)
    sigmas, channels = query(*samples.points(origins, dirs))
    if sigmas.shape != (len(samples),) or channels.dim() != 2 or len(channels) != len(samples) or channels.shape[1] < 3:
        raise ValueError(
            f"query: expected densities [{len(samples)}] and colours [{len(samples)}, 3 or more], "
            f"got {list(sigmas.shape)} and {list(channels.shape)}"
        )
    out = composite_samples(sigmas, channels, samples.t_starts, samples.t_ends, samples.packed_info)
    return Marched(
        rgb=_over(out.features[:, :3], out.alpha, background, rays),
        alpha=out.alpha,
        weights=out.weights,
        depth=out.distance * cosines if "depth" in extras else None,
        median_depth=out.median_distance * cosines if "median_depth" in extras else None,
        features=out.features[:, 3:] if channels.shape[1] > 3 else None,
    )


@torch.no_grad()
def trace(
    grid: OccupancyGrid,
    origins: Tensor,
    dirs: Tensor,
    query: Query,
    background: Tensor | None = None,
    extras: Collection[str] = (),
    *,
    near: float,
    far: float,
    step: float,
    cone: float = 0.0,
    cosines: Tensor | None = None,
) -> Marched:
    """The picture that `march` gives of all samples of an occupancy grid, without asking for those behind what is opaque.

    Rays go a few samples at a time; those whose light is gone, or that leave the grid, are dropped. No gradients.

    Args:
        grid: where the field is not empty.
        origins: [R, 3] world units.
        dirs: [R, 3] of unit length.
        query: the field.
        background: [3] or [R, 3] behind the scene, black if None.
        extras: "depth" and "median_depth", in any order; others are ignored.
        near: world units.
        far: world units.
        step: world units.
        cone: steps grow to this times the distance.
        cosines: [R] between the rays and their cameras' axes, for depths along the axis; along the ray if None.
    """
    rays = check_shapes(origins=(origins, "R 3"), dirs=(dirs, "R 3"))["R"]
    cosines = _cosines(cosines, dirs)
    light = origins.new_ones(rays)
    moment, median = torch.zeros_like(light), torch.zeros_like(light)
    color = origins.new_zeros(rays, 3)
    live = torch.arange(rays, device=origins.device)
    start = torch.full_like(light, near)
    reach = FIRST_SAMPLES
    while len(live):
        here, along = origins[live], dirs[live]
        samples = grid.sample(here, along, start, far, step, cone=cone, max_samples=reach)
        sigmas, channels = query(*samples.points(here, along))
        t = (samples.t_starts, samples.t_ends, samples.packed_info)
        out = composite_samples(sigmas, channels[:, :3], *t, light[live])
        left = light[live] - out.alpha
        light[live] = left
        color[live] += out.features
        moment[live] += out.alpha * out.distance
        median[live] += out.median_distance
        first, count = samples.packed_info.unbind(-1)
        going = (count == reach) & (left > TRANS_MIN)
        live, start = live[going], samples.t_ends[(first + count - 1)[going]]
        reach *= 2
    alpha = 1 - light
    return Marched(
        rgb=_over(color, alpha, background, rays),
        alpha=alpha,
        weights=None,
        depth=torch.where(alpha > 0, moment / alpha.clamp(min=1e-30), 0) * cosines if "depth" in extras else None,
        median_depth=median * cosines if "median_depth" in extras else None,
    )


FIRST_SAMPLES = 8
"""Samples of each ray that `trace` asks for at first, then twice as many each time."""


def _cosines(cosines: Tensor | None, dirs: Tensor) -> Tensor:
    if cosines is None:
        return dirs.new_ones(len(dirs))
    check_shapes(dirs=(dirs, "R 3"), cosines=(cosines, "R"))
    return cosines


def _over(color: Tensor, alpha: Tensor, background: Tensor | None, rays: int) -> Tensor:
    """`color` with `background` behind it."""
    if background is None:
        return color
    if background.shape not in ((3,), (rays, 3)):
        raise ValueError(f"background: expected [3] or [{rays}, 3], got {list(background.shape)}")
    return color + (1 - alpha)[:, None] * background
