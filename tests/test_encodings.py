"""One suite over the table of encodings, which a new row runs unasked; then what harmonics and planes are in particular."""

from __future__ import annotations

import copy
import io
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor, nn

from prismfield.encodings.base import ENCODINGS, Encoding, EncodingConfig, make_encoding
from prismfield.encodings.planes import Planes
from prismfield.encodings.sh import SphericalHarmonics

SMALL = EncodingConfig(levels=4, log2_rows=9, coarsest=3, finest=24, octaves=4)


def fitting(name: str, config: EncodingConfig = SMALL) -> list[Any]:
    """Encodings of that name, for each number of axes that there is one of; always the same."""
    found = []
    for dims in (2, 3, 4):
        torch.manual_seed(dims)
        try:
            found.append(make_encoding(name, dims, config))
        except ValueError as error:
            assert str(error).startswith("in_dim"), error
    assert found, f"{name}: no number of axes from 2 to 4 fits"
    return found


def make_points(encoding: Encoding, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In the unit cube, and of unit length if there are three axes: positions and directions."""
    generator = torch.Generator().manual_seed(sum(shape))
    points = 0.05 + 0.9 * torch.rand(*shape, encoding.in_dim, generator=generator, dtype=torch.float64)
    return (nn.functional.normalize(points, dim=-1) if encoding.in_dim == 3 else points).to(dtype)


@pytest.fixture(params=list(ENCODINGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shapes(name: str) -> None:
    for encoding in fitting(name):
        assert isinstance(encoding, Encoding) and isinstance(encoding, nn.Module)
        assert type(encoding).__doc__ and type(encoding).forward.__doc__
        for shape in ((), (1,), (5,), (2, 3), (0,), (0, 4)):
            out = encoding(make_points(encoding, *shape))
            assert out.shape == (*shape, encoding.out_dim) and out.dtype == torch.float32
            assert out.isfinite().all()


def test_each_point_has_its_code_whatever_is_around_it(name: str) -> None:
    for encoding in fitting(name):
        x = make_points(encoding, 37)
        out = encoding(x)
        torch.testing.assert_close(out, torch.stack([encoding(point) for point in x]), rtol=1e-6, atol=1e-7)
        assert torch.equal(encoding(x), out)
        turned = x.mT.contiguous().mT
        assert not turned.is_contiguous() and torch.equal(encoding(turned), out)
        assert torch.pdist(out).min() > 0


def test_outside_and_nan_stay_where_they_are(name: str) -> None:
    for encoding in fitting(name):
        x = make_points(encoding, 9)
        wanted = encoding(x)
        x[2], x[5, 0], x[7], x[8, 1] = -3.0, 7.5, math.nan, math.inf
        x.requires_grad_()
        out = encoding(x)
        keep = [0, 1, 3, 4, 6]
        assert torch.equal(out[keep], wanted[keep]) and out[[2, 5]].isfinite().all()
        out[:7].sum().backward()
        assert x.grad is not None and x.grad[:7].isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoding.parameters())


def test_outside_is_the_nearest_point_of_the_cube(name: str) -> None:
    """For whatever has features to learn: there are none outside."""
    for encoding in fitting(name):
        if not any(True for _ in encoding.parameters()):
            continue
        x = 4 * make_points(encoding, 60) - 1.5
        x[::10, 0], x[1::10, 1] = math.inf, -math.inf
        assert ((x < 0) | (x > 1)).any(-1).sum() > 20
        assert torch.equal(encoding(x), encoding(x.clamp(0, 1)))


def test_nan_is_found_where_one_looks_for_it(name: str) -> None:
    for encoding in fitting(name):
        x = make_points(encoding, 2, 4)
        with torch.autograd.set_detect_anomaly(True):
            encoding(x)
            x[1, 2, -1] = math.nan
            with pytest.raises(ValueError, match=r"^x: expected numbers, got NaN in row 6$"):
                encoding(x)
        encoding(x)


def test_borders_of_cells(name: str) -> None:
    """Lattices of 3, 6, 12 and 24 cells change cells at odd multiples of 1/6 to 1/48, simplices also where coordinates are equal."""
    for encoding in fitting(name):
        for parameter in encoding.parameters():
            nn.init.uniform_(parameter, -1, 1)
        steps = torch.arange(49) / 48
        generator = torch.Generator().manual_seed(0)
        corners = steps[torch.randint(0, 49, (200, encoding.in_dim), generator=generator)]
        faces = corners.clone()
        faces[:, 1] = torch.rand(200, generator=generator)
        diagonal = steps[:, None].expand(-1, encoding.in_dim)
        x = torch.cat([corners, faces, diagonal]).requires_grad_()
        out = encoding(x)
        wanted = copy.deepcopy(encoding).double()(x.detach().double())
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
        for side in (-1e-6, 1e-6):  # at most 24 cells and 8 cycles a unit: no step, whichever cell it is
            torch.testing.assert_close(encoding(x + side), out, rtol=1e-3, atol=1e-3)
        out.sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and float(x.grad.abs().max()) > 0


def test_gradients(name: str) -> None:
    """To the positions and every parameter, first and second, in double precision."""
    for encoding in fitting(name, replace(SMALL, levels=2, finest=6, log2_rows=7, octaves=2)):
        encoding.double()
        x = make_points(encoding, 3, dtype=torch.float64).requires_grad_()
        leaves = {key: value.detach().clone().requires_grad_() for key, value in encoding.named_parameters()}

        def encode(x: Tensor, *values: Tensor, encoding: Any = encoding, names: Any = tuple(leaves)) -> Tensor:
            return torch.func.functional_call(encoding, dict(zip(names, values, strict=True)), (x,))

        inputs = (x, *leaves.values())
        assert torch.autograd.gradcheck(encode, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(encode, inputs, fast_mode=True)


def test_kernel_and_reference_agree(name: str) -> None:
    for encoding in fitting(name):
        x = make_points(encoding, 50)
        wanted = copy.deepcopy(encoding).double()(x.double())
        scale = wanted.detach().abs().max().clamp(min=1e-3)
        torch.testing.assert_close(encoding(x).double() / scale, wanted / scale, rtol=1e-5, atol=1e-5)


def test_half_precision_is_an_option(name: str) -> None:
    for exact, half in zip(fitting(name), fitting(name, replace(SMALL, half=True)), strict=True):
        x = make_points(exact, 50)
        torch.testing.assert_close(half(x), exact(x), rtol=2e-3, atol=2e-7)
        assert all(p.dtype == torch.float32 for p in half.parameters())
        if any(True for _ in half.parameters()):
            assert not torch.equal(half(x), exact(x))


def test_saved_and_loaded(name: str) -> None:
    for encoding, other in zip(fitting(name), fitting(name), strict=True):
        for parameter in encoding.parameters():
            nn.init.normal_(parameter)
        x = make_points(encoding, 20)
        file = io.BytesIO()
        torch.save(encoding.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(x), encoding(x))
        assert torch.equal(copy.deepcopy(encoding)(x), encoding(x))


def test_a_linear_head_learns(name: str) -> None:
    """More than four fifths of the variance of a smooth function in 100 steps."""
    for encoding in fitting(name):
        x = make_points(encoding, 400)
        wanted = torch.sin(4 * x[:, 0]) + torch.cos(3 * x[:, 1])
        wanted = (wanted - wanted.mean()) / wanted.std()
        torch.manual_seed(0)
        head = nn.Linear(encoding.out_dim, 1)
        optimizer = torch.optim.Adam([*encoding.parameters(), *head.parameters()], lr=0.03, fused=True)
        for _ in range(100):
            loss = (head(encoding(x))[:, 0] - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.2


def test_bad_points_are_named(name: str) -> None:
    for encoding in fitting(name):
        for shape in ((4, encoding.in_dim + 1), (encoding.in_dim - 1,), (0,)):
            with pytest.raises(ValueError, match=rf"^x: expected \[\.\.\., {encoding.in_dim}\], got"):
                encoding(torch.zeros(shape))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^encoding: expected one of frequency, .*, got 'hsah'"):
        make_encoding("hsah", 3)
    with pytest.raises(ValueError, match=r"^in_dim: expected 3 for directions, got 2"):
        make_encoding("sh", 2)


def test_harmonics_are_those_of_scipy() -> None:
    """With the Condon-Shortley phase, by degree and order."""
    dirs = nn.functional.normalize(torch.randn(40, 3, dtype=torch.float64), dim=-1)
    x, y, z = dirs.numpy().T
    azimuth = np.arctan2(y, x)
    expected = []
    for degree in range(5):
        for signed in range(-degree, degree + 1):
            order = abs(signed)
            norm = (2 * degree + 1) / (4 * math.pi) * math.factorial(degree - order) / math.factorial(degree + order)
            wave = math.sqrt(2) * (np.cos if signed > 0 else np.sin)(order * azimuth) if signed else 1.0
            expected.append(math.sqrt(norm) * special.lpmv(order, degree, z) * wave)
    for degree in range(5):
        got = SphericalHarmonics(degree)(dirs)
        np.testing.assert_allclose(got, np.stack(expected[: (degree + 1) ** 2], -1), atol=1e-12)
    for degree in (-1, 5):
        with pytest.raises(ValueError, match=rf"^degree: expected 0 to 4, got {degree}"):
            SphericalHarmonics(degree)


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_planes_combine_the_projections(dims: int, combine: Any) -> None:
    """One plane for each two axes; a product of them is zero where one of them is."""
    torch.manual_seed(0)
    encoding = Planes(dims, combine=combine, levels=2, features=4, coarsest=4, finest=8)
    pairs = list(itertools.combinations(range(dims), 2))
    assert len(encoding.planes) == len(pairs)
    assert all(float(p.table.detach().min()) >= 0.1 for p in encoding.planes) == (combine == "product")
    x = torch.rand(30, dims)
    parts = [plane(x[:, list(pair)]) for plane, pair in zip(encoding.planes, pairs, strict=True)]
    stacked = torch.stack(parts)
    torch.testing.assert_close(encoding(x), stacked.prod(0) if combine == "product" else stacked.sum(0))
    nn.init.zeros_(encoding.planes[-1].table)
    assert bool((encoding(x) == 0).all()) == (combine == "product" or dims == 2)
    with pytest.raises(ValueError, match=r"^in_dim, combine: expected"):
        Planes(5)
    with pytest.raises(ValueError, match=r"^in_dim, combine: expected"):
        Planes(3, combine="mean")  # type: ignore[arg-type]


def test_total_variation_in_closed_form() -> None:
    """Of planes that rise by 0.5 a point along one axis and 0.2 along the other, and of flat ones; it flattens what it acts on."""
    encoding = Planes(3, levels=2, features=2, coarsest=4, finest=8)
    expected = []
    for number, plane in enumerate(encoding.planes):
        for start, end, side in zip(plane.starts[:-1], plane.starts[1:], plane.sides, strict=True):
            n = int(side)
            rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
            slope = 0.0 if number == 2 else 1.0
            with torch.no_grad():
                plane.table[start:end] = slope * (0.5 * rows + 0.2 * columns).flatten()[:, None].float()
            expected.append(2 * slope * n * (n - 1) * (0.25 + 0.04) / n**2)
    variation = encoding.total_variation()
    assert variation.item() == pytest.approx(float(np.mean(expected)), rel=1e-5)
    variation.backward()
    for plane, is_flat in zip(encoding.planes, (False, False, True), strict=True):
        assert plane.table.grad is not None and bool((plane.table.grad == 0).all()) == is_flat
    with pytest.raises(ValueError, match=r"^log2_rows: expected room"):
        Planes(3, levels=1, coarsest=64, finest=64, log2_rows=8).total_variation()
