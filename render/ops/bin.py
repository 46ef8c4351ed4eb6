"""Sort primitives into the image tiles that their footprints touch, nearest first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import DEVICES, kernels_of, use_kernel
from prismfield.render.ops.primitives import PRIMITIVES


@dataclass(frozen=True)
class Isects:
    """Tile/primitive intersections of C cameras with N primitives. Tiles are numbered camera by camera, row by row."""

    ids: Tensor
    """[I] int32, camera * N + primitive, grouped by tile and sorted by depth within a tile."""
    rows: Tensor
    """[I] int32, where the intersection stands when they are grouped by primitive instead; a permutation of 0..I-1."""
    tile_ranges: Tensor
    """[C * tiles + 1] int32: tile t holds intersections tile_ranges[t] up to tile_ranges[t + 1]."""
    row_starts: Tensor
    """[C * N + 1] int32: the primitive's intersections have rows row_starts[i] up to row_starts[i + 1]."""
    tile_size: int
    """Pixels along a tile's side."""


def bin_primitives(
    primitive: str, params: Tensor, depths: Tensor, radii: Tensor, size: tuple[int, int], tile_size: int | None = None
) -> Isects:
    """List, for each tile of each camera, the primitives that reach it, in order of depth. Not differentiable.

    A primitive is listed in the tiles of each tile row between the leftmost and rightmost x that its alpha of 1/255 reaches
    there (`Primitive.row_span`), which for slanted ellipses is far fewer than its bounding box holds.

    Args:
        primitive: a name in `PRIMITIVES`.
        params: [C, N, P] screen parameters.
        depths: [C, N] camera z; ties keep the order of the primitives.
        radii: [C, N, 2] half-extents in pixels, 0 for primitives that are not drawn.
        size: (width, height) in pixels.
        tile_size: pixels; default: what the compiled kernels use, 16 without them.

    Raises:
        ValueError: a shape, dtype or device does not fit, the name is unknown, or there are 2^31 intersections or more.
    """
    check_shapes(params=(params, f"C N {num_params(primitive)}"), depths=(depths, "C N"), radii=(radii, "C N 2"))
    check_alike(params=params, depths=depths, radii=radii)
    on_kernel = use_kernel(params)
    tile_size = tile_size or (kernels_of(params).tile_size if on_kernel else 16)
    function = _bin if on_kernel else bin_reference
    ids, rows, tile_ranges, row_starts = function(primitive, params, depths, radii, size[0], size[1], tile_size)
    return Isects(ids, rows, tile_ranges, row_starts, tile_size)


def num_params(primitive: str) -> int:
    """P of the primitive called `primitive`."""
    if primitive not in PRIMITIVES:
        raise ValueError(f"primitive: expected one of {', '.join(PRIMITIVES)}, got {primitive!r}")
    return PRIMITIVES[primitive].num_params


@torch.no_grad()
def bin_reference(
    primitive: str, params: Tensor, depths: Tensor, radii: Tensor, width: int, height: int, tile_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bin_primitives` in plain PyTorch: the specification."""
    cameras, count = depths.shape
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    device = params.device
    listed = []
    for row in range(rows):
        y0 = torch.tensor(row * tile_size + 0.5, dtype=params.dtype, device=device)
        y1 = torch.tensor(min((row + 1) * tile_size, height) - 0.5, dtype=params.dtype, device=device)
        left, right = PRIMITIVES[primitive].row_span(params, y0, y1)
        first = ((left - 0.5).ceil().clamp(min=0) / tile_size).floor()
        last = ((right - 0.5).floor().clamp(max=width - 1) / tile_size).floor()
        touched = (
            (radii[..., 0] > 0) & ((right - 0.5).floor() >= (left - 0.5).ceil()) & (right >= 0.5) & (left <= width)
        )
        tiles = torch.arange(columns, device=device)
        inside = touched[..., None] & (tiles >= first[..., None]) & (tiles <= last[..., None])
        camera, primitive_id, column = inside.nonzero().unbind(-1)
        listed.append(torch.stack([(camera * rows + row) * columns + column, camera * count + primitive_id], -1))
    tile, ids = torch.cat(listed).unbind(-1) if listed else torch.zeros(2, 0, dtype=torch.long, device=device)
    by_primitive = torch.argsort(ids * (cameras * rows * columns) + tile)
    tile, ids = tile[by_primitive], ids[by_primitive]
    by_depth = torch.argsort(depths.reshape(-1)[ids], stable=True)
    order = by_depth[torch.argsort(tile[by_depth], stable=True)]
    tile_ranges = torch.zeros(cameras * rows * columns + 1, dtype=torch.long, device=device)
    tile_ranges[1:] = torch.bincount(tile, minlength=cameras * rows * columns).cumsum(0)
    row_starts = torch.zeros(cameras * count + 1, dtype=torch.long, device=device)
    row_starts[1:] = torch.bincount(ids, minlength=cameras * count).cumsum(0)
    return ids[order].int(), order.int(), tile_ranges.int(), row_starts.int()


@torch.library.custom_op("prismfield::bin", mutates_args=())
def _bin(
    primitive: str, params: Tensor, depths: Tensor, radii: Tensor, width: int, height: int, tile_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return bin_reference(primitive, params, depths, radii, width, height, tile_size)


@_bin.register_fake
def _(primitive, params, depths, radii, width, height, tile_size):
    tiles = depths.shape[0] * -(-width // tile_size) * -(-height // tile_size)
    isects = torch.library.get_ctx().new_dynamic_size()
    lengths = (isects, isects, tiles + 1, depths.numel() + 1)
    return tuple(params.new_empty(length, dtype=torch.int32) for length in lengths)


@_bin.register_kernel(DEVICES)
def _(primitive, params, depths, radii, width, height, tile_size):
    tiles = depths.shape[0] * -(-width // tile_size) * -(-height // tile_size)
    tile_ranges = params.new_empty(tiles + 1, dtype=torch.int32)
    row_starts = params.new_empty(depths.numel() + 1, dtype=torch.int32)
    inputs = [t.detach().contiguous() for t in (params, depths, radii)]
    arguments = (primitive, *inputs, width, height, tile_size, tile_ranges, row_starts)
    count = kernels_of(params).bin_count(*arguments)
    ids, rows = (params.new_empty(count, dtype=torch.int32) for _ in range(2))
    kernels_of(params).bin_sort(*arguments, ids, rows)
    return ids, rows, tile_ranges, row_starts
