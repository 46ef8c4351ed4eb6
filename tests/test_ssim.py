"""SSIM and the photometric loss: kernels against the specification, the specification against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import Tensor

from prismfield.render.kernels import kernels
from prismfield.render.ops.ssim import photometric_loss, photometric_loss_reference, ssim, ssim_map

needs_kernels = pytest.mark.skipif(kernels is None, reason="no compiled kernels")
# (C, H, W, D): one pixel, smaller than the window, its size, several blocks each way, a column, other channel counts
SIZES = [(1, 1, 1, 3), (2, 7, 5, 3), (1, 11, 11, 1), (2, 33, 65, 3), (1, 18, 400, 3), (1, 40, 1, 3), (1, 21, 300, 4)]


def make_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=generator)
    return a, (a + 0.15 * torch.randn(shape, generator=generator)).clamp(0, 1)


def make_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape[:3], generator=torch.Generator().manual_seed(9)) > 0.3
    mask[0, 0, 0] = True
    return mask


def with_gradient(loss, rgb: Tensor, *args: object, cotangent: float = 1.0) -> tuple[Tensor, Tensor]:
    """[3] values and the gradient."""
    rgb = rgb.clone().requires_grad_()
    values = loss(rgb, *args)
    (values[0] * cotangent).backward()
    assert rgb.grad is not None
    return torch.stack([v.detach() for v in values]), rgb.grad


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_kernel_against_reference(level: str, shape: tuple[int, ...], as_bytes: bool, masked: bool) -> None:
    rgb, target = make_pair(shape)
    target = (target * 255).round().byte() if as_bytes else target
    mask = make_mask(shape) if masked else None
    exact = target if as_bytes else target.double()
    values, gradient = with_gradient(photometric_loss, rgb, target, 0.3, mask, cotangent=-1.7)
    expected, wanted = with_gradient(photometric_loss_reference, rgb.double(), exact, 0.3, mask, cotangent=-1.7)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@needs_kernels
def test_bright_flat_areas_keep_their_digits(level: str) -> None:
    """Variances of 1e-6 beside squares of 1: the textbook formula in float32 is wrong by 1.5e-4 here."""
    generator = torch.Generator().manual_seed(3)
    a, b = (0.95 + 1e-3 * torch.randn(1, 48, 64, 3, generator=generator) for _ in range(2))
    _, gradient = with_gradient(photometric_loss, a, b, 1.0)
    _, wanted = with_gradient(photometric_loss_reference, a.double(), b.double(), 1.0, None)
    assert (gradient - wanted).norm() < 4e-5 * wanted.norm()


@needs_kernels
def test_same_bits_on_any_number_of_threads() -> None:
    rgb, target = make_pair((1, 70, 210, 3))
    before = kernels.num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            kernels.set_num_threads(threads)
            results.append(with_gradient(photometric_loss, rgb, target, 0.2, make_mask(rgb.shape)))
    finally:
        kernels.set_num_threads(before)
    for values, gradient in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_masked_does_not_matter(dtype: torch.dtype) -> None:
    rgb, target = (t.to(dtype) for t in make_pair((1, 23, 31, 3)))
    mask = make_mask(rgb.shape)
    values, gradient = with_gradient(photometric_loss, rgb, target, 0.2, mask)
    rgb[~mask], target[~mask] = float("nan"), 7.0
    other_values, other_gradient = with_gradient(photometric_loss, rgb, target, 0.2, mask)
    assert torch.equal(values, other_values) and torch.equal(gradient, other_gradient)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_counts(dtype: torch.dtype) -> None:
    rgb, target = (t.to(dtype) for t in make_pair((1, 13, 9, 3)))
    values, gradient = with_gradient(photometric_loss, rgb, target, 0.2, torch.zeros(1, 13, 9, dtype=torch.bool))
    assert values.tolist() == [0, 0, 1]
    assert (gradient == 0).all()


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (1, 0, 5, 3), (2, 4, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    values, gradient = with_gradient(photometric_loss, torch.rand(shape), torch.rand(shape), 0.2)
    assert values.tolist() == [0, 0, 1] and gradient.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_images(dtype: torch.dtype) -> None:
    image = make_pair((1, 21, 34, 3))[0].to(dtype)
    values, gradient = with_gradient(photometric_loss, image, image, 0.5)
    torch.testing.assert_close(values, torch.tensor([0.0, 0.0, 1.0], dtype=dtype), rtol=0, atol=1e-6)
    assert gradient.abs().max() < 1e-8


def test_strided_inputs() -> None:
    rgb, target = make_pair((2, 19, 26, 3))
    planes = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (rgb, target)]
    mask = make_mask(rgb.shape)
    expected = with_gradient(photometric_loss, rgb, target, 0.2, mask)
    values = with_gradient(photometric_loss, *planes, 0.2, mask.mT.contiguous().mT)
    assert torch.equal(values[0], expected[0]) and torch.equal(values[1], expected[1])


def test_values_are_detached_and_target_has_no_gradient() -> None:
    rgb, target = (t.requires_grad_() for t in make_pair((1, 12, 12, 3)))
    loss, l1, similarity = photometric_loss(rgb, target, 0.2)
    assert loss.requires_grad and not l1.requires_grad and not similarity.requires_grad
    loss.backward()
    assert target.grad is None
    torch.testing.assert_close(loss, 0.8 * l1 + 0.2 * (1 - similarity))


def test_gradients_of_the_reference() -> None:
    rgb, target = (t.double() for t in make_pair((1, 4, 6, 2)))
    mask = make_mask(rgb.shape)
    rgb.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return photometric_loss_reference(x, target, 0.6, mask)[0]

    assert torch.autograd.gradcheck(loss, rgb)
    assert torch.autograd.gradgradcheck(loss, rgb)


@needs_kernels
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    rgb, target = make_pair((1, 13, 17, 3))
    mask = make_mask(rgb.shape) if masked else None
    torch.library.opcheck(torch.ops.prismfield.photometric_loss, (rgb.requires_grad_(), target, 0.2, mask))


def test_map_against_scipy() -> None:
    a, b = (t[0, ..., 0].double() for t in make_pair((1, 24, 31, 1)))
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x**2) / 4.5)
    window /= window.sum()

    def blur(image: Tensor) -> np.ndarray:
        return convolve2d(image.numpy(), window, mode="same")

    mean_a, mean_b = blur(a), blur(b)
    covariance = blur(a * b) - mean_a * mean_b
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    expected = luminance * (2 * covariance + 9e-4) / (variances + 9e-4)
    images = a[None, ..., None], b[None, ..., None]
    np.testing.assert_allclose(ssim_map(*images)[0, ..., 0], expected, atol=1e-12)
    assert float(ssim(*images)) == pytest.approx(expected.mean())
    assert float(ssim(*images, border="valid")) == pytest.approx(expected[5:-5, 5:-5].mean())


def test_valid_border_of_constant_images() -> None:
    """Without variance only the luminance term is left, and no window sees the border."""
    a, b = torch.full((1, 15, 22, 3), 0.3), torch.full((1, 15, 22, 3), 0.6)
    assert float(ssim(a, b, border="valid")) == pytest.approx((2 * 0.18 + 1e-4) / (0.45 + 1e-4), rel=1e-5)
    assert float(ssim(a, b)) < float(ssim(a, b, border="valid"))


def test_bad_shapes() -> None:
    rgb = torch.rand(1, 12, 13, 3)
    with pytest.raises(ValueError, match="target"):
        photometric_loss(rgb, rgb[:, :-1])
    with pytest.raises(ValueError, match="mask"):
        photometric_loss(rgb, rgb, 0.2, torch.ones(1, 13, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(rgb[:, :10], rgb[:, :10], border="valid")
