"""What a renderer returns: pictures, and what a strategy needs to know about each primitive."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RenderOutput:
    """Rendered channels of C cameras (`[C, H, W, ...]`) or of R rays (`[R, ...]`).

    Everything but `rgb` and `alpha` is None unless it was asked for or does not apply to the representation.
    """

    rgb: Tensor
    """[C, H, W, 3], display-referred, background already blended in; not clamped."""
    alpha: Tensor
    """[C, H, W], 1 - transmittance."""
    depth: Tensor | None = None
    """[C, H, W], expected camera z in world units: the alpha-weighted mean, 0 where alpha is 0."""
    median_depth: Tensor | None = None
    """[C, H, W], camera z of the primitive at which transmittance crosses one half, 0 where it never does; carries no gradient."""
    params: Tensor | None = None
    """[C, N, P] screen parameters of the primitives (columns 0:2 are `means2d`, pixels); keeps its gradient."""
    radii: Tensor | None = None
    """[C, N, 2] half-width and half-height of each footprint, pixels; 0 where a primitive was not drawn."""
    absgrad: Tensor | None = None
    """[C, N, 2] leaf of zeros whose `.grad` becomes the sum over pixels of |dL/d means2d| (AbsGS, arXiv:2404.10484)."""
    samples: int | None = None
    """How many samples along rays it was made of; None if it was not made of any."""
    penalties: dict[str, Tensor] = field(default_factory=dict)
    """Scalars [] by name, weighted: what the representation adds to the training loss."""
