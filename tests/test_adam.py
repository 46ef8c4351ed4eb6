"""Adam: the kernel and its specification against torch's, sparse rows, and the optimizer around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prismfield.render.kernels import kernels
from prismfield.render.ops.adam import adam_step, adam_step_reference
from prismfield.train.optimizer import FusedAdam
from prismfield.train.strategies.rows import append_rows, keep_rows

needs_kernels = pytest.mark.skipif(kernels is None, reason="no compiled kernels")
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8}
# Empty, one value, narrower and wider rows than a vector, more than one chunk
SHAPES = [(0, 3), (1,), (37,), (37, 1, 3), (19, 4), (23, 15, 3), (9, 16), (3000, 15, 3), (20001,)]


def make_state(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameter, gradient and moments."""
    generator = torch.Generator().manual_seed(seed)
    param, grad, mean = (torch.randn(shape, generator=generator) for _ in range(3))
    return param, grad, 0.1 * mean, 0.01 * torch.rand(shape, generator=generator)


def make_rows(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(4)) > 0.6


@needs_kernels
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(level: str, shape: tuple[int, ...], sparse: bool) -> None:
    ours, rows = make_state(shape), make_rows(shape[0]) if sparse else None
    before = [t.clone() for t in ours]
    exact = [t.double() for t in ours]
    adam_step(*ours, **OPTIONS, step=3, rows=rows)
    adam_step_reference(*exact, OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"], 3, rows)
    for mine, reference, old in zip(ours, exact, before, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)
        if rows is not None:
            assert torch.equal(mine[~rows], old[~rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_torch(dtype: torch.dtype) -> None:
    start, gradients = make_state((11, 5, 3))[0].to(dtype), [make_state((11, 5, 3), s)[1].to(dtype) for s in range(4)]
    theirs, ours = nn.Parameter(start.clone()), start.clone()
    optimizer = torch.optim.Adam([theirs], **OPTIONS)
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    for step, gradient in enumerate(gradients, 1):
        theirs.grad = gradient.clone()
        optimizer.step()
        adam_step(ours, gradient, *moments, **OPTIONS, step=step)
    torch.testing.assert_close(ours, theirs.detach())


@needs_kernels
def test_first_step_has_the_length_of_the_rate() -> None:
    """Whatever the gradient's size: bias corrections in double, though 1 - 0.999 is not exact in float32."""
    param, grad = torch.zeros(40), torch.logspace(-6, 6, 40)
    adam_step(param, grad, torch.zeros(40), torch.zeros(40), lr=0.5, betas=(0.9, 0.999), eps=1e-15, step=1)
    torch.testing.assert_close(param, torch.full((40,), -0.5), rtol=2e-7, atol=0)


@needs_kernels
@pytest.mark.parametrize("shape", [(3001, 15, 3), (50001, 3), (50001,)], ids=str)
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...]) -> None:
    """Neither do they depend on which other rows are updated."""
    rows, everyone = make_rows(shape[0]), torch.ones(shape[0], dtype=torch.bool)
    before = kernels.num_threads()
    try:
        results = []
        for threads, mask in ((1, None), (2, None), (3, everyone), (1, rows), (2, rows)):
            kernels.set_num_threads(threads)
            state = make_state(shape)
            adam_step(*state, **OPTIONS, step=2, rows=mask)
            results.append(state)
    finally:
        kernels.set_num_threads(before)
    for i, state in enumerate(results):
        where = rows if i >= 3 else everyone
        assert all(torch.equal(a[where], b[where]) for a, b in zip(state, results[0], strict=True))


@needs_kernels
def test_all_rows_hidden_and_nan_gradients_of_hidden_rows() -> None:
    for shape in ((30, 3), (30, 45)):
        state = make_state(shape)
        before = [t.clone() for t in state]
        state[1][5] = float("nan")
        rows = torch.zeros(30, dtype=torch.bool)
        adam_step(*state, **OPTIONS, step=1, rows=rows)
        assert all(torch.equal(state[i], before[i]) for i in (0, 2, 3))
        rows[4] = rows[6] = True
        adam_step(*state, **OPTIONS, step=1, rows=rows)
        assert all(state[i].isfinite().all() for i in (0, 2, 3))


def test_strided_gradient() -> None:
    state = make_state((7, 4))
    expected = [t.clone() for t in state]
    adam_step(*expected, **OPTIONS, step=1)
    adam_step(state[0], state[1].T.contiguous().T, *state[2:], **OPTIONS, step=1)
    assert torch.equal(state[0], expected[0])


def test_bad_input() -> None:
    param, grad, mean, square = make_state((7, 4))
    with pytest.raises(ValueError, match="grad: expected"):
        adam_step(param, grad[:3], mean, square, **OPTIONS, step=1)
    with pytest.raises(ValueError, match="rows: expected"):
        adam_step(param, grad, mean, square, **OPTIONS, step=1, rows=make_rows(6))
    with pytest.raises(ValueError, match="contiguous"):
        adam_step(param, grad, mean.T.contiguous().T, square, **OPTIONS, step=1)


class TestFusedAdam:
    def test_follows_torch(self) -> None:
        ours, theirs = make_scene(), make_scene()
        optimizers = (
            FusedAdam(groups(ours), betas=(0.9, 0.99)),
            torch.optim.Adam(groups(theirs), betas=(0.9, 0.99), eps=1e-15),
        )
        for _ in range(5):
            for scene, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad(set_to_none=True)
                error(scene).backward()
                optimizer.step()
        for name, value in ours.named_parameters():
            torch.testing.assert_close(value, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)

    def test_rows(self) -> None:
        """Only seen rows move, in the parameters that have one a primitive; a group may opt out."""
        scene = make_scene()
        scene.extra = nn.Parameter(torch.ones(6, 2))
        optimizer = FusedAdam(
            [*groups(scene)[:2], {"name": "extra", "params": [scene.extra], "lr": 0.1, "sparse": False}]
        )
        before = {name: value.detach().clone() for name, value in scene.named_parameters()}
        (error(scene) + scene.extra.sum()).backward()
        rows = torch.tensor([True, False, True, False, False, True])
        optimizer.step(rows=rows)
        for name in ("means", "shN"):
            changed = (scene.get_parameter(name) != before[name]).flatten(1).any(1)
            assert torch.equal(changed, rows)
        assert (scene.extra != before["extra"]).all()

    def test_rates_of_rows(self) -> None:
        """Each row's step is so many times that of the group's rate; hidden rows do not move."""
        plain, rated = make_scene(), make_scene()
        rates = torch.tensor([0.0, 0.5, 1.0, 2.0, 10.0, 1e-3])
        rows = torch.tensor([True, True, True, True, True, False])
        start = {name: value.detach().clone() for name, value in plain.named_parameters()}
        for scene, options in ((plain, {}), (rated, {"row_rates": lambda: rates})):
            optimizer = FusedAdam([group | options for group in groups(scene)])
            error(scene).backward()
            optimizer.step(rows=rows)
        for name, value in rated.named_parameters():
            steps = (plain.get_parameter(name) - start[name]) * rates.view(-1, *[1] * (value.dim() - 1))
            torch.testing.assert_close(value, start[name] + steps, rtol=1e-6, atol=1e-7)
            assert (steps[:5].flatten(1).abs().amax(1) > 0).sum() == 4 and torch.equal(value[5], start[name][5])

    def test_parameter_without_gradient_is_left_alone(self) -> None:
        scene = make_scene()
        optimizer = FusedAdam(groups(scene))
        scene.means.square().sum().backward()
        optimizer.step()
        assert optimizer.counts() == {"means": 1, "shN": 0}
        assert set(optimizer.tensors()) == {"means.exp_avg", "means.exp_avg_sq"}

    def test_goes_on_exactly_after_restore(self) -> None:
        scene = make_scene()
        optimizer = FusedAdam(groups(scene))
        train(scene, optimizer, 3)
        copy = make_scene()
        copy.load_state_dict(scene.state_dict())
        resumed = FusedAdam(groups(copy))
        resumed.restore({name: t.clone() for name, t in optimizer.tensors().items()}, optimizer.counts())
        train(scene, optimizer, 3)
        train(copy, resumed, 3)
        assert resumed.counts() == {"means": 6, "shN": 6}
        assert all(torch.equal(value, copy.get_parameter(name)) for name, value in scene.named_parameters())

    def test_restore_says_what_does_not_fit(self) -> None:
        scene = make_scene()
        optimizer = FusedAdam(groups(scene))
        train(scene, optimizer, 1)
        tensors = optimizer.tensors() | {"shN.exp_avg": torch.zeros(5, 3, 3)}
        with pytest.raises(ValueError, match=r"shN.exp_avg: expected \[6, 3, 3\], got \[5, 3, 3\]"):
            FusedAdam(groups(make_scene())).restore(tensors, optimizer.counts())

    def test_rows_come_and_go(self) -> None:
        scene = make_scene()
        optimizer = FusedAdam(groups(scene))
        train(scene, optimizer, 2)
        old = optimizer.state[scene.means]["exp_avg"].clone()
        keep_rows(scene, optimizer, torch.tensor([True, True, True, True, False, True]))
        append_rows(scene, optimizer, {"means": torch.ones(3, 3), "shN": torch.ones(3, 3, 3)})
        moments = optimizer.state[scene.means]["exp_avg"]
        assert torch.equal(moments[:4], old[:4]) and torch.equal(moments[5:], torch.zeros(3, 3))
        before = scene.means.detach().clone()
        train(scene, optimizer, 1)
        assert optimizer.counts() == {"means": 3, "shN": 3}
        assert len(scene.means) == 8 and (scene.means != before).all()

    def test_closure_is_refused(self) -> None:
        with pytest.raises(ValueError, match="closure"):
            FusedAdam(groups(make_scene())).step(lambda: 0.0)


def make_scene() -> nn.Module:
    scene = nn.Module()
    scene.means = nn.Parameter(make_state((6, 3), 1)[0])
    scene.shN = nn.Parameter(make_state((6, 3, 3), 2)[0])
    return scene


def groups(scene: nn.Module) -> list[dict]:
    return [
        {"name": name, "params": [value], "lr": 0.1 / (i + 1)}
        for i, (name, value) in enumerate(scene.named_parameters())
    ]


def error(scene: nn.Module) -> Tensor:
    return (scene.means - 0.3).square().sum() + (scene.shN * scene.means[:, None]).sin().sum()


def train(scene: nn.Module, optimizer: FusedAdam, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        error(scene).backward()
        optimizer.step()
