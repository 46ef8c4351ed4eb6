"""Exposures and poses learnt while training: they can be found through a render, and a step moves those of its image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prismfield.train.config import ExposureConfig, PoseConfig, TrainConfig, resolved
from prismfield.train.corrections import Exposure, PoseDeltas, rotation_of
from prismfield.train.loop import training_step
from prismfield.train.session import Session, start_session

from .raster_fixtures import make_cameras, make_gaussians


def test_poses_are_found_through_a_render() -> None:
    cameras = make_cameras(1, 60, 37)
    scene = make_gaussians(150, cameras, hard=False)
    truth = scene.render(cameras).rgb
    off = PoseDeltas(2)
    with torch.no_grad():
        off.deltas[0] = torch.tensor([0.02, -0.03, 0.04, 0.03, -0.02, 0.05])
    start = replace(cameras, viewmats=off(cameras, 0).viewmats.detach())
    poses = PoseDeltas(2)
    optimizer = torch.optim.Adam(poses.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for _ in range(180):
        optimizer.zero_grad()
        (scene.render(poses(start, 1)).rgb - truth).abs().mean().backward()
        optimizer.step()
        schedule.step()
    errors = (poses(start, 1).viewmats - cameras.viewmats).abs().max(), (start.viewmats - cameras.viewmats).abs().max()
    assert errors[0] < 1e-3 < 0.05 < errors[1]
    assert (poses.deltas[0] == 0).all()


@pytest.mark.parametrize("length", [0.0, 1e-4, 0.0099, 0.0101, 0.5, 3.1])
def test_rotations_are_matrix_exponentials(length: float) -> None:
    """On both sides of where the series takes over (1e-2), with a gradient at zero."""
    vector = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7 * length
    x, y, z = vector.tolist()
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rotation_of(vector), torch.matrix_exp(cross), rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation_of(vector.float()), torch.matrix_exp(cross).float(), rtol=0, atol=3e-7)
    assert torch.autograd.gradcheck(rotation_of, vector.requires_grad_())


def test_exposures_are_found_through_a_render() -> None:
    """Of two images, one brighter and one darker than the scene as an average image shows it."""
    cameras = make_cameras(1, 60, 37)
    rgb = make_gaussians(150, cameras, hard=False).render(cameras).rgb
    change = torch.tensor([[0.2, 0.05, 0.0, 0.03], [0.0, 0.1, 0.0, -0.04], [-0.05, 0.0, 0.3, 0.02]])
    maps = [torch.eye(3, 4) + sign * change for sign in (1, -1)]
    truths = [rgb @ one[:, :3].T + one[:, 3] for one in maps]
    exposure = Exposure(2)
    optimizer = torch.optim.Adam(exposure.parameters(), lr=0.02)
    for step in range(400):
        optimizer.zero_grad()
        (exposure(rgb, step % 2) - truths[step % 2]).square().mean().backward()
        optimizer.step()
    for index, truth in enumerate(truths):
        assert (rgb - truth).abs().mean() > 0.02
        assert (exposure(rgb, index) - truth).abs().mean() < 1e-3


def start(folder: Path | None = None) -> Session:
    config = TrainConfig(
        scene="garden",
        downscale=8,
        steps=20,
        max_primitives=500,
        exposure=ExposureConfig(enabled=True, lr=0.004),
        pose=PoseConfig(enabled=True, lr=0.002),
    )
    return start_session(resolved(config), torch.device("cpu"), folder)


def learnt(session: Session) -> dict[str, Tensor]:
    assert session.exposure is not None and session.poses is not None
    return {"exposure": session.exposure.deltas.detach(), "poses": session.poses.deltas.detach()}


def step(session: Session) -> int:
    session.clock.start_step()
    batch, _, _ = training_step(session)
    session.clock.end_step()
    return batch.index


def test_a_step_moves_the_corrections_of_its_image_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    session = start()
    seen = step(session)
    for name, rate in (("exposure", 0.004), ("poses", 0.002)):
        moved = learnt(session)[name].flatten(1)
        assert torch.nonzero(moved.any(1)).flatten().tolist() == [seen]
        # Adam's first step has the length of the rate.
        assert moved[seen].abs().tolist() == pytest.approx([rate] * moved.shape[1], rel=1e-3)
    for _ in range(3):
        step(session)
    session.save(tmp_path)
    resumed = start(tmp_path)
    assert all(torch.equal(learnt(resumed)[name], value) for name, value in learnt(session).items())
    for _ in range(3):
        assert step(session) == step(resumed)
    assert all(torch.equal(learnt(resumed)[name], value) for name, value in learnt(session).items())
    rates = {group["name"]: group["lr"] for group in session.optimizer.param_groups}
    done = 6 / 20  # when the last step began
    assert rates["exposure"] == pytest.approx(0.004 * 0.1**done)
    assert rates["poses"] == pytest.approx(0.002 * 0.01**done)
