"""Hash grids and perceptrons by an installed tiny-cuda-nn, on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prismfield.encodings.mlp import Head
from prismfield.render import backends

_OPTION = "networks tinycudann"
_SOURCE = "git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"
_HEADS = {"none": "None", "relu": "ReLU", "sigmoid": "Sigmoid", "softplus": "Softplus"}


class Tiny(nn.Module):
    """A module of tinycudann, which computes in half precision on most GPUs, behind our contract.

    Read against the Python of its bindings at commit 07bacc5; not yet run against an installed one.
    """

    out_dim: int

    def __init__(self, kind: str, in_dim: int, out_dim: int, *options: Any) -> None:
        """Its seed comes from torch's generator.

        Args:
            kind: name of the class there.
            in_dim: inputs.
            out_dim: outputs.
            options: what the class takes after the sizes.

        Raises:
            ValueError: tinycudann cannot be imported.
        """
        super().__init__()
        found = backends.load("tinycudann", _OPTION, f'"{_SOURCE}"')
        self.inner = getattr(found, kind)(in_dim, *options, seed=int(torch.randint(2**31, ())))
        self.out_dim = out_dim

    def forward(self, x: Tensor) -> Tensor:
        """[S, in_dim] to [S, out_dim] in single precision.

        Raises:
            ValueError: `x` is on no CUDA device.
        """
        backends.need_cuda(_OPTION, x.device)
        if not len(x):
            return x.new_zeros(0, self.out_dim)
        found: Tensor = self.inner(x)
        return found.float()


def tiny_grid(*, levels: int, features: int, log2_rows: int, coarsest: int, finest: int, **_: Any) -> Tiny:
    """`Grid` of cubes in space; there a level has one cell less along the unit interval, and tables are always of halves."""
    options = {
        "otype": "HashGrid",
        "n_levels": levels,
        "n_features_per_level": features,
        "log2_hashmap_size": log2_rows,
        "base_resolution": coarsest,
        "per_level_scale": (finest / coarsest) ** (1 / max(levels - 1, 1)),
    }
    return Tiny("Encoding", 3, levels * features, options)


def tiny_mlp(in_dim: int, out_dim: int, *, width: int = 64, hidden: int = 1, head: Head = "none") -> Tiny:
    """`Mlp`; fused there where its width is 16, 32, 64 or 128."""
    options = {
        "otype": "FullyFusedMLP" if width in (16, 32, 64, 128) else "CutlassMLP",
        "activation": "ReLU",
        "output_activation": _HEADS[head],
        "n_neurons": width,
        "n_hidden_layers": hidden,
    }
    return Tiny("Network", in_dim, out_dim, out_dim, options)
