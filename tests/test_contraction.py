"""Contraction of space: its closed form, its inverse, its gradient."""

from __future__ import annotations

import pytest
import torch

from prismfield.render.contraction import contract, uncontract


def positions(count: int = 500, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Of norm 1e-3 to 1e3, every way."""
    generator = torch.Generator().manual_seed(0)
    dirs = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=dtype), dim=-1)
    return dirs * 10 ** torch.linspace(-3, 3, count, dtype=dtype)[:, None]


@pytest.mark.parametrize(("norm", "contracted"), [(0.5, 0.5), (1.0, 1.0), (2.0, 1.5), (4.0, 1.75), (1e9, 2.0)])
def test_closed_form(norm: float, contracted: float) -> None:
    """Mip-NeRF 360, eq. 10."""
    direction = torch.tensor([2.0, -3.0, 6.0]) / 7
    torch.testing.assert_close(contract(norm * direction), contracted * direction)


def test_one_undoes_the_other() -> None:
    x = positions()
    assert contract(x).norm(dim=-1).max() < 2
    torch.testing.assert_close(uncontract(contract(x)), x)
    y = 1.99 * torch.rand(50, 2, dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(contract(uncontract(y)), y)


def test_beyond_the_ball_is_far_and_finite() -> None:
    y = torch.tensor([[2.0, 0, 0], [0, 3, 0]])
    assert (uncontract(y).norm(dim=-1) > 1e5).all()
    assert torch.isfinite(uncontract(y)).all()


def test_gradients() -> None:
    x = torch.cat([positions(10), torch.zeros(1, 3, dtype=torch.float64)]).requires_grad_()
    y = contract(x.detach())[
        x.detach().norm(dim=-1) < 20
    ].requires_grad_()  # beyond, differences have no correct digits
    assert len(y) > 6
    for f, at in ((contract, x), (uncontract, y)):
        assert torch.autograd.gradcheck(f, at)
        assert torch.autograd.gradgradcheck(f, at)


def test_nothing_is_lost_in_single_precision() -> None:
    x = torch.tensor([[1e-30, 0, 0], [0, 1e12, -1e12], [0, 0, 0]]).requires_grad_()
    y = contract(x)
    y.sum().backward()
    torch.testing.assert_close(y[1], torch.tensor([0, 2**0.5, -(2**0.5)]))
    assert torch.equal(y[0], x[0])
    assert x.grad is not None and torch.isfinite(x.grad).all()
