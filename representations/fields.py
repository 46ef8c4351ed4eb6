"""Radiance fields: density and colour at every position, drawn by marching along rays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from prismfield.encodings.grid import Grid
from prismfield.encodings.mlp import Mlp
from prismfield.encodings.planes import Planes
from prismfield.encodings.tiny import Tiny, tiny_grid, tiny_mlp
from prismfield.render.cameras import Cameras
from prismfield.render.checks import check_shapes
from prismfield.render.contraction import contract
from prismfield.render.march import Marched, march, trace
from prismfield.render.ops.march import BLOCK, composite_samples, distortion_loss
from prismfield.render.ops.sh import sh_basis
from prismfield.render.output import RenderOutput
from prismfield.render.samplers import CHUNK, Histogram, OccupancyGrid, Samples, interlevel_loss
from prismfield.representations.config import FieldConfig
from prismfield.representations.proposals import Proposals

_FEATURES = 16  # that the density network hands to the colour network, Instant NGP, section 5.3
_SH_DEGREE = 3  # of the direction's code, 16 values
_MOST_SAMPLES = 1024  # of a ray, Instant NGP, appendix E.1
_RAYS = 8192  # drawn at once
_FAR = 1e5  # scene units
_MOST_EXPONENT = 15.0  # beyond which gradients do not grow


class Field(nn.Module, ABC):
    """Density and colour from an encoding of the position (Instant NGP, arXiv:2201.05989, section 5.3).

    A density network turns the encoding into 16 values, of which the exponential of the first is the density; a colour
    network turns these and harmonics of the direction into a colour. Subclasses choose the encoding.
    """

    batching: ClassVar[Literal["image", "pixels"]] = "pixels"

    unbounded: Tensor
    """[] bool: space outside the bounds is contracted instead of empty."""
    jitter: torch.Generator | None
    """Shifts the samples of each ray by a random part of a step wherever gradients are recorded; None leaves them."""

    def __init__(self, aabb: Tensor, unbounded: bool, config: FieldConfig) -> None:
        """Random networks and nearly zero features, from torch's generator; everything may be occupied.

        Args:
            aabb: [2, 3] bounds of the content, scene units.
            unbounded: whether there is anything outside of them.
            config: sizes and rates.

        Raises:
            ValueError: the bounds or an option make no sense.
        """
        super().__init__()
        self.config, self.jitter = config, None
        sampler = config.sampler if config.sampler != "auto" else "proposals" if unbounded else "occupancy"
        proposes = sampler == "proposals"
        self.grid = OccupancyGrid(aabb, BLOCK * 4 if proposes else config.occupancy, config.nests if unbounded else 1)
        self.grid.sampler = "nerfacc" if sampler == "nerfacc" else "auto"
        self.proposals = Proposals(len(config.proposals) - 1) if proposes else None
        self.is_unbounded = unbounded
        self.register_buffer("unbounded", torch.tensor(unbounded))
        size = self.grid.aabb[1] - self.grid.aabb[0]
        self.radius = 0.5 * float(size.max())
        """Half of the longest side of the bounds, scene units."""
        self.step = float(size.norm()) / config.steps
        """Of a ray, scene units."""
        self.encoding = self.make_encoding(config)
        self.density_mlp, channels = self.make_density_mlp(config)
        self.color_mlp = self.make_network(channels + (_SH_DEGREE + 1) ** 2, 3, config, hidden=2, head="sigmoid")

    @abstractmethod
    def make_encoding(self, config: FieldConfig) -> Any:
        """What turns positions [S, 3] in the unit cube into features [S, out_dim]."""

    def make_density_mlp(self, config: FieldConfig) -> tuple[Mlp | None, int]:
        """The density network, and how many values the colour network gets beside the direction."""
        return self.make_network(self.encoding.out_dim, _FEATURES, config), _FEATURES

    def make_network(self, in_dim: int, out_dim: int, config: FieldConfig, **options: Any) -> Any:
        """A perceptron; options as for `Mlp`."""
        return Mlp(in_dim, out_dim, width=config.width, **options)

    def penalties(self, marched: Marched, samples: Samples) -> dict[str, Tensor]:
        """Terms of the training loss beside the pictures' error, weighted, for what a step drew."""
        if not self.config.distortion:
            return {}
        assert marched.weights is not None
        t = (samples.t_starts / self.radius, samples.t_ends / self.radius)
        if self.is_unbounded:  # far things count for less, as in the paper's normalized distances
            t = (t[0] / (t[0] + 1), t[1] / (t[1] + 1))
        return {"distortion": self.config.distortion * distortion_loss(marched.weights, *t, samples.packed_info).mean()}

    def advance(self, progress: float) -> None:
        """Take note of the share of the training that is done, 0 to 1; called after each step."""
        if self.proposals is not None:
            self.proposals.progress.fill_(progress)

    @classmethod
    def from_points(cls, xyz: Tensor, rgb: Tensor, aabb: Tensor, config: FieldConfig) -> Self:
        """A field that knows nothing yet; of the points it takes the device. `extent` "auto" means a box here."""
        check_shapes(xyz=(xyz, "P 3"), rgb=(rgb, "P 3"), aabb=(aabb, "2 3"))
        return cls(aabb, config.extent == "space", config).to(xyz.device)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], config: FieldConfig) -> Self:
        """The field whose `tensors()` these are.

        Raises:
            ValueError: a tensor is missing or is not of the size that `config` says.
        """
        if missing := [name for name in ("grid.aabb", "unbounded") if name not in tensors]:
            raise ValueError(f"tensors: expected those of a field; {', '.join(missing)} missing")
        field = cls(tensors["grid.aabb"].cpu(), bool(tensors["unbounded"]), config)
        for name, value in field.state_dict().items():
            if name not in tensors or tensors[name].shape != value.shape:
                got = list(tensors[name].shape) if name in tensors else "none"
                raise ValueError(f"{name}: expected {list(value.shape)}, got {got}")
        field.load_state_dict({name: tensors[name] for name in field.state_dict()})
        return field.to(tensors["grid.aabb"].device)

    def param_groups(self) -> list[dict[str, Any]]:
        """One group a parameter."""
        rates = {"lr": self.config.lr, "lr_final": self.config.lr_final}
        return [{"name": name, "params": [parameter]} | rates for name, parameter in self.named_parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, and what is known about empty space, detached and not copied."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def density(self, xyz: Tensor) -> Tensor:
        """[S] per scene unit at `xyz` [S, 3]."""
        return self._decode(xyz)[0]

    def query(self, xyz: Tensor, dirs: Tensor) -> tuple[Tensor, Tensor]:
        """Densities [S] per scene unit and colours [S, 3] at `xyz` [S, 3], seen along unit `dirs` [S, 3]."""
        if torch.is_grad_enabled() or len(xyz) <= CHUNK:
            return self._query(xyz, sh_basis(dirs, _SH_DEGREE))
        parts = zip(xyz.split(CHUNK), dirs.split(CHUNK), strict=True)
        sigmas, rgbs = zip(*(self._query(x, sh_basis(d, _SH_DEGREE)) for x, d in parts), strict=True)
        return torch.cat(sigmas), torch.cat(rgbs)

    def render(
        self,
        cameras: Cameras,
        pixels: Tensor | None = None,
        background: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> RenderOutput:
        """Draw whole images, or only `pixels` [R, 3] (camera, column, row).

        Args:
            cameras: C pinhole cameras.
            pixels: integers.
            background: [C, 3], black if None.
            extras: any of "depth", "median_depth" (see `RenderOutput`).
        """
        wanted = _all_pixels(cameras) if pixels is None else pixels.long()
        learns = any(parameter.requires_grad for parameter in self.parameters())
        learns = torch.is_grad_enabled() and (learns or cameras.viewmats.requires_grad)
        origins, dirs = cameras.rays(wanted)
        cosines = (cameras.viewmats[:, 2, :3].index_select(0, wanted[:, 0]) * dirs).sum(-1)
        behind = background[wanted[:, 0]] if background is not None else None
        parts, samples = [], 0
        penalties: dict[str, Tensor] = {}
        # A step's pixels come at once, as their number suits it.
        size = _RAYS if pixels is None or not learns else max(len(wanted), 1)
        for start in range(0, max(len(wanted), 1), size):
            part = slice(start, start + size)
            rays = (origins[part], dirs[part], None if behind is None else behind[part], extras, cosines[part])
            if learns:
                marched, drawn, penalties = self._march(*rays)
                samples += len(drawn)
            else:
                marched = self._trace(*rays)
            parts.append(marched)
        shape = (len(cameras), cameras.height, cameras.width) if pixels is None else (len(wanted),)
        channels: dict[str, Any] = {"rgb": None, "alpha": None} | {
            name: None for name in ("depth", "median_depth") if name in extras
        }
        for name in channels:
            values = torch.cat([getattr(part, name) for part in parts])
            channels[name] = values.view(*shape, *values.shape[1:])
        return RenderOutput(**channels, samples=samples if learns else None, penalties=penalties)

    def _march(
        self, origins: Tensor, dirs: Tensor, background: Tensor | None, extras: Collection[str], cosines: Tensor
    ) -> tuple[Marched, Samples, dict[str, Tensor]]:
        """With gradients, of all samples that light reaches; these, and the penalties for them."""
        samples, histograms = self._find(origins.detach(), dirs.detach())
        codes = sh_basis(dirs, _SH_DEGREE)  # of rays: they are fewer than the samples

        def query(xyz: Tensor, _dirs: Tensor) -> tuple[Tensor, Tensor]:
            return self._query(xyz, codes.index_select(0, samples.ray_indices))

        marched = march(samples, origins, dirs, query, background, extras, cosines=cosines)
        penalties = self.penalties(marched, samples)
        if histograms:
            assert marched.weights is not None
            penalties["proposals"] = interlevel_loss(histograms, samples, marched.weights)
        return marched, samples, penalties

    def _find(self, origins: Tensor, dirs: Tensor) -> tuple[Samples, list[Histogram]]:
        """A step's samples; and what the proposals saw, if these were asked."""
        if self.proposals is not None:
            return self._propose(origins, dirs, self.jitter, self.config.proposals)
        shift = None if self.jitter is None else torch.rand(len(origins), generator=self.jitter).to(origins)
        near, step, cone = self._steps()
        samples = self.grid.sample(origins, dirs, near, _FAR, step, max_samples=_MOST_SAMPLES, jitter=shift, cone=cone)
        return self._lit(samples, origins, dirs), []

    def _propose(
        self, origins: Tensor, dirs: Tensor, generator: torch.Generator | None, counts: tuple[int, ...]
    ) -> tuple[Samples, list[Histogram]]:
        assert self.proposals is not None
        far = (
            _FAR
            if self.is_unbounded
            else float((origins - self.grid.aabb.mean(0)).norm(dim=-1).max()) + 2 * self.radius
        )
        return self.proposals.sample(
            origins,
            dirs,
            self._proposed,
            near=self.config.near if self.is_unbounded else 0.0,
            far=far,
            counts=counts,
            unit=self.radius,
            generator=generator,
        )

    @torch.no_grad()
    def _lit(self, samples: Samples, origins: Tensor, dirs: Tensor) -> Samples:
        """Those in front of what is opaque: the others have no share in the picture, and no gradient."""
        xyz, _ = samples.points(origins, dirs)
        sigmas = torch.cat([self.density(part) for part in xyz.split(CHUNK)]) if len(xyz) else xyz.new_empty(0)
        t = (samples.t_starts, samples.t_ends, samples.packed_info)
        kept = (composite_samples(sigmas, sigmas.new_empty(len(sigmas), 0), *t).weights > 0).nonzero()[:, 0]
        rays = samples.ray_indices.index_select(0, kept)
        counts = torch.bincount(rays, minlength=len(origins))
        packed_info = torch.stack([counts.cumsum(0) - counts, counts], -1)
        t_starts, t_ends = (t.index_select(0, kept) for t in (samples.t_starts, samples.t_ends))
        return Samples(t_starts, t_ends, rays, packed_info)

    def _trace(
        self, origins: Tensor, dirs: Tensor, background: Tensor | None, extras: Collection[str], cosines: Tensor
    ) -> Marched:
        """The same picture without gradients, of no more samples than it takes."""
        if self.proposals is not None:
            # Twice as many as in training: 0.2 dB on the bundled garden, for half as much time again
            *pieces, count = self.config.proposals
            samples, _ = self._propose(origins, dirs, None, (*pieces, 2 * count))
            return march(samples, origins, dirs, self.query, background, extras, cosines=cosines)
        near, step, cone = self._steps()
        options: dict[str, Any] = {"near": near, "far": _FAR, "step": step, "cone": cone, "cosines": cosines}
        return trace(self.grid, origins, dirs, self.query, background, extras, **options)

    def _steps(self) -> tuple[float, float, float]:
        """Near plane, least step and growth of the steps."""
        if self.is_unbounded:
            return self.config.near, self.step, self.config.cone
        return 0.0, self.step, 0.0

    def _query(self, xyz: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        sigmas, features = self._decode(xyz)
        return sigmas, self.color_mlp(torch.cat([features, codes], -1))

    def _decode(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Densities [S] and what the colour network gets."""
        sigmas, features = self._split(self.encoding(self._unit(xyz)))
        return sigmas / self.radius, features

    def _proposed(self, grid: nn.Module, xyz: Tensor) -> Tensor:
        """Densities [S] as a proposal's grid has them."""
        return exponential(grid(self._unit(xyz)).sum(-1)) / self.radius

    def _unit(self, xyz: Tensor) -> Tensor:
        """`xyz` [S, 3] in the unit cube that is encoded."""
        # In units of half the longest side, from -1 to 1, or contracted from -2 to 2; then from 0 to 1
        offset = self.grid.aabb.mean(0) / -self.radius
        if self.is_unbounded:
            return 0.25 * contract(torch.add(offset, xyz, alpha=1 / self.radius)) + 0.5
        return torch.add(0.5 * offset + 0.5, xyz, alpha=0.5 / self.radius)

    def _split(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Densities [S], per `radius`, and what the colour network gets."""
        assert self.density_mlp is not None
        features = self.density_mlp(encoded)
        return exponential(features[:, 0]), features


def exponential(raw: Tensor) -> Tensor:
    """Densities from their logarithms, without overflow in either pass."""
    found: Tensor = _TruncatedExp.apply(raw)  # type: ignore[no-untyped-call]
    return found


class HashField(Field):
    """Features in hash tables on grids of cubes (Instant NGP, arXiv:2201.05989)."""

    def make_encoding(self, config: FieldConfig) -> Grid | Tiny:
        """See `Field`."""
        sizes = grid_sizes(config)
        return tiny_grid(**sizes) if config.networks == "tinycudann" else Grid(3, cells="cubes", **sizes)

    def make_network(self, in_dim: int, out_dim: int, config: FieldConfig, **options: Any) -> Mlp | Tiny:
        """See `Field`."""
        make = tiny_mlp if config.networks == "tinycudann" else Mlp
        return make(in_dim, out_dim, width=config.width, **options)


class SimplexField(Field):
    """Features in hash tables on grids of simplices (arXiv:2311.15439): four corners are read instead of eight."""

    def make_encoding(self, config: FieldConfig) -> Grid:
        """See `Field`."""
        return Grid(3, cells="simplices", **grid_sizes(config))


class TriplaneField(Field):
    """Features on three planes, multiplied (K-Planes, arXiv:2301.10241, eq. 1, for a scene that does not move)."""

    def make_encoding(self, config: FieldConfig) -> Planes:
        """See `Field`."""
        return Planes(3, **grid_sizes(config))

    def penalties(self, marched: Marched, samples: Samples) -> dict[str, Tensor]:
        """See `Field`; neighbours on a plane differ little."""
        found = super().penalties(marched, samples)
        if self.config.variation:
            found["variation"] = self.config.variation * self.encoding.total_variation()
        return found


class _TruncatedExp(torch.autograd.Function):
    """The exponential, whose gradient does not grow any more where it would overflow (Instant NGP's output activation)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clamp(max=_MOST_EXPONENT).exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *v_out: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return v_out[0] * out


def grid_sizes(config: FieldConfig) -> dict[str, Any]:
    """What the options say about the grids of an encoding."""
    return {name: getattr(config, name) for name in ("levels", "features", "log2_rows", "coarsest", "finest", "half")}


def _all_pixels(cameras: Cameras) -> Tensor:
    """[C H W, 3] camera, column and row of every pixel, row by row."""
    device = cameras.viewmats.device
    sizes = (len(cameras), cameras.height, cameras.width)
    camera, row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")
    return torch.stack([camera, column, row], -1).view(-1, 3)
