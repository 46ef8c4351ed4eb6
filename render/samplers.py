"""Where along its ray a field is asked: packed samples, from an occupancy grid, from proposals, or evenly spaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prismfield.render import backends
from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.ops.march import BLOCK, clip_to_box, composite_samples, march_occupancy

Spacing = Literal["linear", "disparity"]
"""Samples evenly spaced in the distance, or in its inverse (Mip-NeRF 360, arXiv:2111.12077, eq. 11 with g(t) = 1/t)."""
CHUNK = 2**18
"""Positions that a field is asked for at once where nothing is differentiated."""


@dataclass(frozen=True)
class Samples:
    """S pieces of R rays, sorted by ray, then by distance. Nothing here carries a gradient."""

    t_starts: Tensor
    """[S] distance along the ray, world units."""
    t_ends: Tensor
    """[S]."""
    ray_indices: Tensor
    """[S] int64."""
    packed_info: Tensor
    """[R, 2] int64, first sample and number of samples of each ray."""

    def __len__(self) -> int:
        return len(self.t_starts)

    @property
    def mids(self) -> Tensor:
        """[S] distance of the midpoints."""
        return 0.5 * (self.t_starts + self.t_ends)

    def points(self, origins: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        """Midpoints [S, 3] and directions [S, 3] of the samples of rays [R, 3]."""
        # Unlike that of dirs[...], the backward pass of index_select is the same in each run
        along = dirs.index_select(0, self.ray_indices)
        return torch.addcmul(origins.index_select(0, self.ray_indices), along, self.mids[:, None]), along


@dataclass(frozen=True)
class Histogram:
    """Weights of K pieces of each of R rays, as a proposal sees them; the pieces lie end to end."""

    edges: Tensor
    """[R, K + 1] distances along the ray, world units."""
    weights: Tensor
    """[R, K], with the gradient to the proposal."""


class OccupancyGrid(nn.Module):
    """Cells of nested boxes, each known to be empty or not.

    Instant NGP (arXiv:2201.05989), appendix E: a decayed running maximum of the density decides. Both buffers belong to checkpoints.
    """

    aabb: Tensor
    """[2, 3] box of level 0, world units; the box of level l is 2^l times as large about the same centre."""
    density: Tensor
    """[levels, res, res, res] along x, y, z: decayed maximum of what was seen, per world unit; -1 where a cell is ruled out."""
    bits: Tensor
    """[levels, res / 4, res / 4, res / 4] int64, one bit a cell as `march_occupancy` takes them."""

    sampler: Literal["auto", "nerfacc"] = "auto"
    """Who finds the samples: ours, or nerfacc, which must be installed and on CUDA."""

    def __init__(self, aabb: Tensor, resolution: int = 128, levels: int = 1) -> None:
        """All cells are occupied at first.

        Args:
            aabb: [2, 3].
            resolution: cells along each axis of a level, a multiple of 16.
            levels: how many boxes.
        """
        super().__init__()
        check_shapes(aabb=(aabb, "2 3"))
        if not bool((aabb[1] > aabb[0]).all()):
            raise ValueError(f"aabb: expected a box with a length along each axis, got {aabb.tolist()}")
        if resolution < 16 or resolution % 16 or levels < 1:
            raise ValueError(
                f"resolution, levels: expected a multiple of 16 and 1 or more, got {resolution} and {levels}"
            )
        blocks = resolution // BLOCK
        self.register_buffer("aabb", aabb.detach().float().clone())
        self.register_buffer("density", torch.zeros(levels, resolution, resolution, resolution))
        self.register_buffer("bits", torch.full((levels, blocks, blocks, blocks), -1, dtype=torch.int64))

    @property
    def occupied(self) -> Tensor:
        """[levels, res, res, res] bool."""
        levels, blocks = self.bits.shape[:2]
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        cells = (self.bits.view(torch.uint8)[..., None] >> shifts & 1).bool()
        cells = cells.view(levels, blocks, blocks, blocks, BLOCK, BLOCK, BLOCK)
        side = blocks * BLOCK
        return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(levels, side, side, side)

    @torch.no_grad()
    def set_occupied(self, occupied: Tensor) -> None:
        """Take [levels, res, res, res] bool for what is occupied."""
        if occupied.shape != self.density.shape or occupied.dtype != torch.bool:
            raise ValueError(
                f"occupied: expected bool {list(self.density.shape)}, got {occupied.dtype} {list(occupied.shape)}"
            )
        levels, blocks = self.bits.shape[:2]
        cells = occupied.view(levels, blocks, BLOCK, blocks, BLOCK, blocks, BLOCK).permute(0, 1, 3, 5, 2, 4, 6)
        powers = 1 << torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        eights = cells.reshape(*self.bits.shape, 8, 8).view(torch.uint8) * powers
        self.bits.copy_(eights.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1))

    @torch.no_grad()
    def sample(
        self,
        origins: Tensor,
        dirs: Tensor,
        near: float | Tensor,
        far: float | Tensor,
        step: float,
        *,
        max_samples: int,
        jitter: Tensor | None = None,
        cone: float = 0.0,
    ) -> Samples:
        """Steps along each ray that lie in occupied cells.

        Args:
            origins: [R, 3] world units.
            dirs: [R, 3] of unit length.
            near: float or [R], world units.
            far: float or [R].
            step: length of a step, world units.
            max_samples: of one ray, those nearest to its origin.
            jitter: [R] in [0, 1), share by which the first step is shorter; None for 0.
            cone: steps grow to this times the distance, 0 to 0.1; for more than one level.
        """
        t_range = _range(near, far, origins)
        jitter = t_range.new_zeros(len(origins)) if jitter is None else jitter
        if self.sampler == "nerfacc":
            # Its first step is never shorter: it begins later instead
            t_range = torch.stack([t_range[:, 0] + step * jitter, t_range[:, 1]], -1)
            sizes: dict[str, Any] = {"step": step, "cone": cone, "max_samples": max_samples}
            return Samples(*backends.sample_with_nerfacc((origins, dirs), t_range, self.occupied, self.aabb, **sizes))
        return Samples(
            *march_occupancy(
                origins, dirs, t_range, jitter, self.bits, self.aabb, step=step, cone=cone, max_samples=max_samples
            )
        )

    @torch.no_grad()
    def update(
        self,
        density: Callable[[Tensor], Tensor],
        *,
        decay: float = 0.95,
        threshold: float,
        generator: torch.Generator | None = None,
        cells: int | None = None,
    ) -> None:
        """Look at cells, each at one random position, and decide anew which are occupied: those above `threshold`, or above the mean
        where that is less, as it is before a field has learned anything.

        Departs from the paper where only some cells are looked at: the others do not decay, or those that chance passes over
        would empty themselves.

        Args:
            density: positions [P, 3] in world units to densities [P] per world unit.
            decay: what the old maximum of a cell that is looked at is multiplied by.
            threshold: per world unit.
            generator: of the random numbers; torch's own if None.
            cells: look at so many, half of them anywhere and half of them occupied ones; at all if None.
        """
        flat = self.density.view(-1)
        chosen = self._choose(cells, generator)
        for part in chosen.split(CHUNK):
            seen = density(self._positions(part, generator)).reshape(-1).to(flat)
            old = flat[part]
            # A cell that was chosen twice takes the larger of what was seen in it
            flat.scatter_reduce_(0, part, torch.where(old < 0, old, old * decay), "amin")
            flat.scatter_reduce_(0, part, torch.where(old < 0, old, seen), "amax")
        mean = flat.clamp(min=0).sum() / (flat >= 0).sum().clamp(min=1)
        self.set_occupied(self.density > mean.clamp(max=threshold))

    @torch.no_grad()
    def rule_out(self, cells: Tensor) -> None:
        """Empty [levels, res, res, res] bool for good, such as what no camera sees."""
        self.density.masked_fill_(cells, -1.0)
        self.set_occupied(self.occupied & ~cells)

    def centers(self) -> Tensor:
        """[levels, res, res, res, 3] middles of the cells, world units."""
        cells = torch.arange(self.density.numel(), device=self.density.device)
        return self._corners(cells, torch.full((len(cells), 3), 0.5, device=cells.device)).view(*self.density.shape, 3)

    def _choose(self, count: int | None, generator: torch.Generator | None) -> Tensor:
        """Indices of cells to look at."""
        total, device = self.density.numel(), self.density.device
        if count is None or count >= total:
            return torch.arange(total, device=device)
        anywhere = torch.randint(total, (count - count // 2,), generator=generator, device=device)
        occupied = self.occupied.view(-1).nonzero()[:, 0]
        if not len(occupied):
            return anywhere
        picked = torch.randint(len(occupied), (count // 2,), generator=generator, device=device)
        return torch.cat([anywhere, occupied[picked]])

    def _positions(self, cells: Tensor, generator: torch.Generator | None) -> Tensor:
        """[P, 3] a random position in each cell."""
        return self._corners(cells, torch.rand(len(cells), 3, generator=generator, device=cells.device))

    def _corners(self, cells: Tensor, within: Tensor) -> Tensor:
        """[P, 3] world positions `within` (0..1) the cells of these indices."""
        res = self.density.shape[1]
        axes = torch.stack([cells // (res * res) % res, cells // res % res, cells % res], -1)
        scale = 2.0 ** (cells // res**3).to(within.dtype)
        unit = (axes + within) / res * 2 - 1
        return self.aabb.mean(0) + 0.5 * (self.aabb[1] - self.aabb[0]) * scale[:, None] * unit


def uniform_samples(
    origins: Tensor,
    dirs: Tensor,
    near: float | Tensor,
    far: float | Tensor,
    count: int,
    *,
    jitter: Tensor | None = None,
    spacing: Spacing = "linear",
    aabb: Tensor | None = None,
) -> Samples:
    """`count` pieces of each ray between near and far, end to end.

    Args:
        origins: [R, 3] world units.
        dirs: [R, 3] of unit length.
        near: float or [R], world units, above 0 for "disparity".
        far: float or [R].
        count: K.
        jitter: [R, K + 1] in [0, 1): each inner edge moves to this place of the two half pieces around it (NeRF, arXiv:2003.08934,
            eq. 2); None leaves them.
        spacing: evenly in what.
        aabb: [2, 3] shorten rays to this box; one that misses it gets pieces without length.
    """
    check_shapes(origins=(origins, "R 3"), dirs=(dirs, "R 3"))
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    with torch.no_grad():
        t_range = _range(near, far, origins)
        t_range = t_range if aabb is None else clip_to_box(origins, dirs, aabb, t_range)
        edges = torch.linspace(0, 1, count + 1, device=origins.device, dtype=origins.dtype)
        edges = edges.expand(len(origins), -1) if jitter is None else _stratify(edges, jitter)
        return _pack(_distances(edges, t_range, spacing))


def proposal_samples(
    origins: Tensor,
    dirs: Tensor,
    near: float | Tensor,
    far: float | Tensor,
    proposals: Sequence[Callable[[Tensor], Tensor]],
    counts: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    spacing: Spacing = "disparity",
    unit: float = 0.0,
    anneal: float = 1.0,
) -> tuple[Samples, list[Histogram]]:
    """Pieces of each ray where proposals found weight, finer from one to the next.

    Mip-NeRF 360 (arXiv:2111.12077), sections 3 and 5: the first proposal sees pieces of equal size, each next one, and the field at
    the end, the pieces that the weights before it ask for. Pieces carry no gradient; the histograms do, to the proposals.

    Args:
        origins: [R, 3] world units.
        dirs: [R, 3] of unit length.
        near: float or [R], world units; above 0 for "disparity" unless `unit` is.
        far: float or [R].
        proposals: positions [P, 3] to densities [P] per world unit.
        counts: pieces for each proposal, and for the field.
        generator: moves the edges at random; None leaves them.
        spacing: evenly in what the first pieces are, and in what an edge's place is measured.
        unit: world units that are added to distances before their inverse is taken: nearer than this, "disparity" is nearly linear.
        anneal: power of the weights, from 0 (none counts) at the start of the training to 1 (supplement, section A).

    Returns:
        The pieces for the field, and what `interlevel_loss` takes.

    Raises:
        ValueError: a shape does not fit, or `counts` is not one longer than `proposals`.
    """
    check_shapes(origins=(origins, "R 3"), dirs=(dirs, "R 3"))
    if len(counts) != len(proposals) + 1 or min(counts) < 1:
        raise ValueError(f"counts: expected {len(proposals) + 1} numbers of 1 or more, got {list(counts)}")
    t_range = _range(near, far, origins)
    edges = torch.linspace(0, 1, counts[0] + 1, device=origins.device, dtype=origins.dtype)
    shift = _random(len(origins), counts[0] + 1, generator, origins)
    edges = edges.expand(len(origins), -1) if shift is None else _stratify(edges, shift)
    histograms = []
    for proposal, count in zip(proposals, counts[1:], strict=True):
        t = _distances(edges, t_range, spacing, unit)
        pieces = _pack(t)
        sigmas = proposal(pieces.points(origins, dirs)[0]).reshape(-1)
        nothing = sigmas.new_empty(len(sigmas), 0)
        blended = composite_samples(sigmas, nothing, pieces.t_starts, pieces.t_ends, pieces.packed_info)
        weights = blended.weights.view(len(origins), -1)
        histograms.append(Histogram(t, weights))
        shift = _random(len(origins), count + 1, generator, origins)
        edges = resample(edges, weights.detach() ** anneal, count, shift)
    return _pack(_distances(edges, t_range, spacing, unit)), histograms


@torch.no_grad()
def resample(edges: Tensor, weights: Tensor, count: int, jitter: Tensor | None = None) -> Tensor:
    """Edges of `count` pieces that hold equal shares of a piecewise-constant density.

    Mip-NeRF 360 (arXiv:2111.12077), section 3: by the inverse of the density's integral. Each ray keeps its first and last edge. A
    hundredth of the weight is spread evenly, so that what a proposal is blind to is still looked at, and so that a ray
    without any weight gets pieces of equal size.

    Args:
        edges: [R, K + 1] ascending.
        weights: [R, K], not negative.
        count: pieces to make.
        jitter: [R, count + 1] in [0, 1), as for `uniform_samples`; None leaves the edges.

    Returns:
        [R, count + 1] ascending.
    """
    bound = check_shapes(weights=(weights, "R K"))
    check_shapes(edges=(edges, f"{bound['R']} {bound['K'] + 1}"))
    check_alike(edges=edges, weights=weights)
    lengths = edges.diff(dim=-1)
    floor = lengths / lengths.sum(-1, keepdim=True).clamp(min=1e-30)
    total = weights.sum(-1, keepdim=True)
    density = torch.where(total > 0, 0.99 * weights / total.clamp(min=1e-30) + 0.01 * floor, floor)
    integral = torch.cat([torch.zeros_like(total), density.cumsum(-1)], -1)
    integral = integral / integral[:, -1:].clamp(min=1e-30)
    shares = torch.linspace(0, 1, count + 1, device=edges.device, dtype=edges.dtype)
    shares = shares.expand(len(edges), -1) if jitter is None else _stratify(shares, jitter)
    piece = (torch.searchsorted(integral, shares.contiguous(), right=True) - 1).clamp(0, bound["K"] - 1)
    start, end = integral.gather(-1, piece), integral.gather(-1, piece + 1)
    place = ((shares - start) / (end - start).clamp(min=1e-30)).clamp(0, 1)
    inner = edges.gather(-1, piece) + place * lengths.gather(-1, piece)
    inner = torch.cat([edges[:, :1], inner[:, 1:-1], edges[:, -1:]], -1)
    return inner.cummax(-1).values.minimum(edges[:, -1:])  # rounding must not change the order


def interlevel_loss(histograms: Sequence[Histogram], samples: Samples, weights: Tensor) -> Tensor:
    """How much weight of the field lies where the proposals see too little: what trains the proposals.

    Mip-NeRF 360 (arXiv:2111.12077), eq. 12 and 13: sum_i max(0, w_i - bound_i)^2 / w_i, where bound_i is the weight of all pieces
    of a proposal that touch the field's piece i. The mean over rays, summed over the proposals; without a gradient to `weights`.

    Args:
        histograms: from `proposal_samples`.
        samples: from the same call.
        weights: [S] of the field in these.

    Returns:
        A number.
    """
    rays = len(samples.packed_info)
    check_shapes(weights=(weights, str(len(samples))))
    weights = weights.detach().view(rays, -1)
    starts, ends = (t.view(rays, -1) for t in (samples.t_starts, samples.t_ends))
    loss = weights.new_zeros(())
    for proposal in histograms:
        before = torch.cat([torch.zeros_like(proposal.weights[:, :1]), proposal.weights.cumsum(-1)], -1)
        last = proposal.weights.shape[1]
        first = torch.searchsorted(proposal.edges, starts, right=True) - 1
        end = torch.searchsorted(proposal.edges, ends)
        most = before.gather(-1, end.clamp(0, last)) - before.gather(-1, first.clamp(0, last))
        lacking = (weights - most).clamp(min=0)
        loss = loss + (lacking * lacking / weights.clamp(min=1e-7)).sum()
    return loss / max(rays, 1)


def _range(near: float | Tensor, far: float | Tensor, origins: Tensor) -> Tensor:
    """[R, 2] near and far of each ray."""
    rays = len(origins)
    limits = []
    for name, limit in (("near", near), ("far", far)):
        limit = torch.as_tensor(limit, dtype=origins.dtype, device=origins.device)
        if limit.dim() and limit.shape != (rays,):
            raise ValueError(f"{name}: expected a number or [{rays}], got {list(limit.shape)}")
        limits.append(limit.expand(rays))
    return torch.stack(limits, -1)


def _random(rays: int, count: int, generator: torch.Generator | None, like: Tensor) -> Tensor | None:
    if generator is None:
        return None
    return torch.rand(rays, count, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _stratify(edges: Tensor, jitter: Tensor) -> Tensor:
    """[R, K + 1] the inner ones of `edges` [K + 1] moved between the middles of the pieces beside them."""
    if jitter.dim() != 2 or jitter.shape[1] != len(edges):
        raise ValueError(f"jitter: expected [R, {len(edges)}], got {list(jitter.shape)}")
    moved = edges + (jitter - 0.5) * (edges[1] - edges[0])
    return torch.cat([edges[:1].expand(len(jitter), 1), moved[:, 1:-1], edges[-1:].expand(len(jitter), 1)], -1)


def _distances(edges: Tensor, t_range: Tensor, spacing: Spacing, unit: float = 0.0) -> Tensor:
    """World distances of `edges` [R, K + 1] in 0..1; near and far themselves at the ends. No ray runs backwards."""
    near, far = t_range[:, :1], t_range[:, 1:].maximum(t_range[:, :1])
    if spacing == "linear":
        return torch.lerp(near, far, edges)
    if spacing != "disparity":
        raise ValueError(f"spacing: expected linear or disparity, got {spacing!r}")
    if bool((near + unit <= 0).any()):
        raise ValueError(
            f"near: expected more than 0 for samples evenly spaced in disparity, got {near.min().item():.3g}"
        )
    between = 1 / torch.lerp(1 / (near + unit), 1 / (far + unit), edges) - unit
    return torch.cat([near, between[:, 1:-1], far], -1)


def _pack(t: Tensor) -> Samples:
    """Pieces between edges [R, K + 1]."""
    rays, count = len(t), t.shape[1] - 1
    starts = torch.arange(rays, device=t.device)
    return Samples(
        t[:, :-1].reshape(-1),
        t[:, 1:].reshape(-1),
        starts.repeat_interleave(count),
        torch.stack([starts * count, torch.full_like(starts, count)], -1),
    )
