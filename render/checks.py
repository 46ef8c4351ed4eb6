"""Checks of the arguments of public functions: each dimension is named once and must agree everywhere."""

from __future__ import annotations

from torch import Tensor

import prismfield.render.first_calls  # noqa: F401


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


def check_alike(**arguments: Tensor) -> None:
    """Raise a ValueError naming the argument whose dtype or device is not the first one's, or if that holds no real numbers."""
    first, *others = arguments.items()
    if not first[1].is_floating_point():
        raise ValueError(f"{first[0]}: expected a floating-point tensor, got {first[1].dtype}")
    for name, tensor in others:
        for what in ("dtype", "device"):
            wanted, got = getattr(first[1], what), getattr(tensor, what)
            if wanted != got:
                raise ValueError(f"{name}: expected {what} {wanted} like {first[0]}, got {got}")
