"""The Triton Adam against its specification."""

from __future__ import annotations

import pytest
import torch

from prismfield.render.ops.adam import adam_step, adam_step_reference

OPTIONS = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "step": 3}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (37, 1, 3), (19, 4), (23, 15, 3), (2049,)])
def test_against_the_reference(shape: tuple[int, ...], sparse: bool, triton_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    state = [torch.randn(shape, generator=generator) for _ in range(3)] + [torch.rand(shape, generator=generator)]
    rows = torch.rand(shape[0], generator=generator) > 0.6 if sparse else None
    wanted = [t.double() for t in state]
    adam_step_reference(*wanted, OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"], OPTIONS["step"], rows)
    got = [t.to(triton_device) for t in state]
    adam_step(*got, **OPTIONS, rows=None if rows is None else rows.to(triton_device))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-6, atol=1e-7)
    if rows is not None:
        assert torch.equal(got[0].cpu()[~rows], state[0][~rows])
