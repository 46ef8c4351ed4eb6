"""Shape checks for public functions: each dimension is named once and must agree everywhere."""

from __future__ import annotations

from torch import Tensor


def check_shapes(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Raise a ValueError naming the argument whose shape does not fit.

    Args:
        arguments: name = (tensor, "N 3"): one word per axis, a number for a fixed length, a letter for one that all
            arguments share.

    Returns:
        The length bound to each letter.
    """
    bound: dict[str, int] = {}
    for name, (tensor, pattern) in arguments.items():
        axes = pattern.split()
        shape = tuple(tensor.shape)
        fits = len(shape) == len(axes) and all(
            length == (int(axis) if axis.isdigit() else bound.setdefault(axis, length))
            for axis, length in zip(axes, shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{axis}={length}" for axis, length in bound.items())
            raise ValueError(
                f"{name}: expected [{', '.join(axes)}]{f' with {known}' if known else ''}, got {list(shape)}"
            )
    return bound
