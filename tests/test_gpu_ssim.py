"""The Triton photometric loss against its specification in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prismfield.render.ops.ssim import photometric_loss, photometric_loss_reference

from .test_ssim import make_mask, make_pair, with_gradient

# (C, H, W, D), bytes, masked
CASES = [
    ((1, 1, 1, 3), False, False),
    ((2, 7, 5, 3), True, True),  # smaller than the window
    ((1, 11, 11, 1), False, True),
    ((1, 3, 45, 3), False, False),  # more than a block along x
    ((1, 33, 2, 4), True, False),  # along y
    ((1, 35, 47, 3), True, True),  # both
]


def run(rgb: Tensor, target: Tensor, weight: float, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3] values and the gradient of -1.7 times the loss, on the CPU."""
    inputs = [None if t is None else t.to(device) for t in (rgb, target, mask)]
    values, gradient = with_gradient(photometric_loss, *inputs[:2], weight, inputs[2], cotangent=-1.7)
    return values.cpu(), gradient.cpu()


@pytest.mark.parametrize(("shape", "as_bytes", "masked"), CASES, ids=str)
def test_against_the_reference(
    shape: tuple[int, ...], as_bytes: bool, masked: bool, triton_device: torch.device
) -> None:
    rgb, target = make_pair(shape)
    target = (target * 255).round().byte() if as_bytes else target
    mask = make_mask(shape) if masked else None
    exact = target if as_bytes else target.double()
    expected, wanted = with_gradient(photometric_loss_reference, rgb.double(), exact, 0.3, mask, cotangent=-1.7)
    values, gradient = run(rgb, target, 0.3, mask, triton_device)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_bright_flat_areas_keep_their_digits(triton_device: torch.device) -> None:
    """Variances of 1e-6 beside squares of 1: the textbook formula in float32 is wrong by 1.5e-4 here."""
    generator = torch.Generator().manual_seed(3)
    a, b = (0.95 + 1e-3 * torch.randn(1, 20, 42, 3, generator=generator) for _ in range(2))
    _, wanted = with_gradient(photometric_loss_reference, a.double(), b.double(), 1.0, None, cotangent=-1.7)
    _, gradient = run(a, b, 1.0, None, triton_device)
    assert (gradient - wanted).norm() < 4e-5 * wanted.norm()


def test_what_is_masked_is_not_read(triton_device: torch.device) -> None:
    rgb, target = make_pair((1, 13, 9, 3))
    mask = make_mask(rgb.shape)
    values, gradient = run(rgb, target, 0.2, mask, triton_device)
    rgb[~mask], target[~mask] = float("nan"), 7.0
    other_values, other_gradient = run(rgb, target, 0.2, mask, triton_device)
    assert torch.equal(values, other_values) and torch.equal(gradient, other_gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


def test_nothing_counts(triton_device: torch.device) -> None:
    values, gradient = run(*make_pair((1, 4, 3, 3)), 0.2, torch.zeros(1, 4, 3, dtype=torch.bool), triton_device)
    assert values.tolist() == [0, 0, 1] and (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (1, 0, 5, 3), (2, 4, 0, 3)])
def test_empty(shape: tuple[int, ...], triton_device: torch.device) -> None:
    values, gradient = run(torch.rand(shape), torch.rand(shape), 0.2, None, triton_device)
    assert values.tolist() == [0, 0, 1] and gradient.shape == shape


def test_equal_images(triton_device: torch.device) -> None:
    image = make_pair((1, 9, 14, 3))[0]
    values, gradient = run(image, image, 0.5, None, triton_device)
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 1.0]), rtol=0, atol=1e-6)
    assert gradient.abs().max() < 1e-8
