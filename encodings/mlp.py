"""Small multilayer perceptrons, all layers fused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from prismfield.render.checks import check_alike, check_shapes
from prismfield.render.kernels import kernels_of, use_kernel

Head = Literal["none", "relu", "sigmoid", "softplus"]
_HEADS = {"none": lambda x: x, "relu": torch.relu, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}


class Mlp(nn.Module):
    """ReLU layers without biases, as in Instant NGP (arXiv:2201.05989), section 5.3, and a head of choice."""

    out_dim: int

    def __init__(self, in_dim: int, out_dim: int, *, width: int = 64, hidden: int = 1, head: Head = "none") -> None:
        """Weights uniform as in He et al. 2015, from torch's generator.

        Args:
            in_dim: inputs.
            out_dim: outputs.
            width: of the hidden layers.
            hidden: how many of these.
            head: what the outputs go through.
        """
        super().__init__()
        if min(in_dim, out_dim, width) < 1 or hidden < 0:
            raise ValueError(
                f"in_dim, out_dim, width, hidden: expected 1 or more (hidden 0), got {in_dim}, {out_dim}, {width}, {hidden}"
            )
        self.dims = [in_dim, *[width] * hidden, out_dim]
        self.out_dim, self.head = out_dim, head
        layers = [torch.empty(b, a) for a, b in itertools.pairwise(self.dims)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer, nonlinearity="relu")
        self.weights = nn.Parameter(torch.cat([layer.flatten() for layer in layers]))
        """All layers' [out, in], one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_dim] to [..., out_dim]."""
        return mlp(x.reshape(-1, self.dims[0]), self.weights, self.dims, self.head).view(*x.shape[:-1], self.out_dim)


def mlp(x: Tensor, weights: Tensor, dims: Sequence[int], head: Head = "none") -> Tensor:
    """Apply ReLU layers and a head.

    Differentiable once in the kernel, twice in the reference, to `x` and `weights`.

    Args:
        x: [S, dims[0]].
        weights: [P] each layer's [out, in], one after the other.
        dims: widths of inputs, hidden layers and outputs.
        head: what the outputs go through.

    Returns:
        [S, dims[-1]].

    Raises:
        ValueError: a shape, dtype or device does not fit, or there is no such head.
    """
    total = sum(a * b for a, b in itertools.pairwise(dims))
    if len(dims) < 2:
        raise ValueError(f"dims: expected two or more widths, got {list(dims)}")
    check_shapes(x=(x, f"S {dims[0]}"), weights=(weights, f"{total}"))
    check_alike(x=x, weights=weights)
    if head not in _HEADS:
        raise ValueError(f"head: expected one of {', '.join(_HEADS)}, got {head!r}")
    if x.device.type == "cpu" and use_kernel(x):  # on a GPU PyTorch's own matrix products run
        return _mlp(x, weights, list(dims), head)
    return mlp_reference(x, weights, dims, head)


def mlp_reference(x: Tensor, weights: Tensor, dims: Sequence[int], head: str) -> Tensor:
    """`mlp` in plain PyTorch: the specification."""
    layers = weights.split([a * b for a, b in itertools.pairwise(dims)])
    for number, (layer, (a, b)) in enumerate(zip(layers, itertools.pairwise(dims), strict=True)):
        x = x @ layer.view(b, a).mT
        x = torch.relu(x) if number + 2 < len(dims) else _HEADS[head](x)
    return x


@torch.library.custom_op("prismfield::mlp", mutates_args=())
def _mlp(x: Tensor, weights: Tensor, dims: Sequence[int], head: str) -> Tensor:
    return mlp_reference(x, weights, dims, head)


@_mlp.register_fake
def _(x, weights, dims, head):
    return x.new_empty(x.shape[0], dims[-1])


@_mlp.register_kernel("cpu")
def _(x, weights, dims, head):
    out = x.new_empty(x.shape[0], dims[-1])
    kernels_of(x).mlp_forward(x.contiguous(), weights.contiguous(), dims, head, out)
    return out


@torch.library.custom_op("prismfield::mlp_backward", mutates_args=(), device_types="cpu")
def _mlp_backward(
    x: Tensor, weights: Tensor, dims: Sequence[int], head: str, v_out: Tensor, input_gradient: bool
) -> tuple[Tensor, Tensor]:
    v_x = torch.empty_like(x, memory_format=torch.contiguous_format) if input_gradient else x.new_empty(0)
    v_weights = torch.empty_like(weights)
    inputs = (x.contiguous(), weights.contiguous(), dims, head, v_out.contiguous())
    kernels_of(x).mlp_backward(*inputs, v_x, v_weights)
    return v_x, v_weights


@_mlp_backward.register_fake
def _(x, weights, dims, head, v_out, input_gradient):
    return torch.empty_like(x) if input_gradient else x.new_empty(0), torch.empty_like(weights)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.shape = inputs[2:]


def _backward(ctx, v_out):
    x, weights = ctx.saved_tensors
    v_x, v_weights = _mlp_backward(x, weights, *ctx.shape, v_out, ctx.needs_input_grad[0])
    return v_x if ctx.needs_input_grad[0] else None, v_weights, None, None


_mlp.register_autograd(_backward, setup_context=_save)
