"""Radiance fields: what their pictures show, what they refuse, and the commands that train and use them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render.cameras import Cameras
from prismfield.render.output import RenderOutput
from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.config import FieldConfig
from prismfield.representations.fields import Field, HashField, _TruncatedExp
from prismfield.train.strategies.config import OccupancyConfig
from prismfield.train.strategies.occupancy import Occupancy

from .checkpoints import content, same_content
from .commands import command, refused, trained_once

FIELDS = sorted(name for name, kind in REPRESENTATIONS.items() if kind.batching == "pixels")
SMALL = FieldConfig(
    levels=4, log2_rows=12, coarsest=4, finest=24, width=16, sampler="occupancy", occupancy=16, steps=64, nests=4
)
BOX = torch.tensor([[-1.0, -0.6, -0.8], [1.0, 0.8, 0.7]])
EMPTY = (torch.zeros(0, 3), torch.zeros(0, 3), BOX)


def make_camera(distance: float = 3.0) -> Cameras:
    """On the z axis, looking at the origin; oblong, off-centre, fx != fy."""
    viewmat = torch.eye(4)
    viewmat[2, 3] = distance
    K = torch.tensor([[40.0, 0, 21.0], [0, 36.0, 18.5], [0, 0, 1]])
    return Cameras(viewmat[None], K[None], 46, 33)


def make_field(extent: Any = "box", **options: Any) -> HashField:
    torch.manual_seed(0)
    field = HashField.from_points(*EMPTY, replace(SMALL, extent=extent, **options))
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return field


def show(monkeypatch: pytest.MonkeyPatch, field: Field, shape: Any, sigma: float = 200.0) -> None:
    """Let the field be a solid of the colour (0.2, 0.4, 0.6) where `shape` of [S, 3] says so."""

    def decode(xyz: Tensor) -> tuple[Tensor, Tensor]:
        return sigma * shape(xyz).float(), xyz

    monkeypatch.setattr(field, "_decode", decode)
    monkeypatch.setattr(
        field, "_query", lambda xyz, codes: (decode(xyz)[0], torch.tensor([0.2, 0.4, 0.6]).expand(len(xyz), 3))
    )


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("extent", ["box", "space"])
def test_a_wall_is_where_it_is(extent: str, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its depth is camera z, also away from the axis; colours do not mix with what is behind."""
    field = make_field(extent, steps=1024)
    show(monkeypatch, field, lambda xyz: (xyz[:, 2] > 0.1) & (xyz[:, 2] < 0.5))
    with torch.set_grad_enabled(recorded):
        out = field.render(make_camera(), background=torch.ones(1, 3), extras=("depth", "median_depth"))
    assert out.depth is not None and out.median_depth is not None
    inside = (slice(0, 1), slice(15, 20), slice(15, 27)) if extent == "box" else (slice(None),) * 3
    for depth in (out.depth[inside], out.median_depth[inside]):
        torch.testing.assert_close(depth, torch.full_like(depth, 3.1), atol=0.02, rtol=0)
    assert (out.alpha[inside] > 0.999).all()
    torch.testing.assert_close(
        out.rgb[inside], torch.tensor([0.2, 0.4, 0.6]).expand(out.rgb[inside].shape), atol=2e-3, rtol=0
    )
    assert (out.samples is not None) == recorded


def test_a_box_ends_and_space_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for extent, alpha in (("box", 0.0), ("space", 1.0)):
        field = make_field(extent)
        show(monkeypatch, field, lambda xyz: xyz[:, 2] > 2.5)
        with torch.no_grad():
            out = field.render(make_camera())
        torch.testing.assert_close(out.alpha, torch.full_like(out.alpha, alpha), atol=1e-3, rtol=0)


def test_space_is_contracted_into_the_unit_cube(monkeypatch: pytest.MonkeyPatch) -> None:
    field, seen = make_field("space"), []
    monkeypatch.setattr(field.encoding, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 8))
    center, far = BOX.mean(0), torch.tensor([1e6, 0.0, 0.0])
    field.density(torch.stack([center, center + torch.tensor([1.0, 0, 0]), center + far, center - far]))
    wanted = torch.tensor([[0.5, 0.5, 0.5], [0.75, 0.5, 0.5], [1.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(seen[0], wanted, atol=1e-5, rtol=0)
    field, seen = make_field("box"), []
    monkeypatch.setattr(field.encoding, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 8))
    field.density(torch.stack([center, BOX[0], BOX[1]]))
    # The longest side, 2, fills the cube; the others lie in its middle.
    wanted = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.15, 0.125], [1.0, 0.85, 0.875]])
    torch.testing.assert_close(seen[0], wanted, atol=1e-6, rtol=0)


def test_nothing_is_nearer_than_the_near_plane_in_space(monkeypatch: pytest.MonkeyPatch) -> None:
    field = make_field("space", near=0.4)
    show(monkeypatch, field, lambda xyz: torch.ones(len(xyz), dtype=torch.bool), sigma=1e4)
    with torch.no_grad():
        depth = field.render(make_camera(0.0), torch.tensor([[0, 21, 18]]), extras=("median_depth",)).median_depth
    assert depth is not None and float(depth) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("extent", ["box", "space"])
def test_with_and_without_gradients_it_is_the_same_picture(extent: str) -> None:
    field, extras = make_field(extent), ("depth", "median_depth")
    camera, background = make_camera(2.0), torch.tensor([[1.0, 0.5, 0.25]])
    recorded = field.render(camera, background=background, extras=extras)
    with torch.no_grad():
        traced = field.render(camera, background=background, extras=extras)
    assert recorded.rgb.requires_grad and recorded.alpha.max() > 0.5
    seen = recorded.alpha > 0.01  # of less, no depth can be told
    for name in ("rgb", "alpha", "depth", "median_depth"):
        torch.testing.assert_close(getattr(traced, name)[seen], getattr(recorded, name)[seen], atol=2e-3, rtol=1e-3)
    assert seen.float().mean() > 0.3


def test_what_no_light_reaches_is_left_out_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    field, camera = make_field("space"), make_camera(2.0)
    with torch.no_grad():
        field.density_mlp.weights.view(-1)[-16 * field.config.width :] *= 6  # dense in places
    found = []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(field, "_lit", lambda samples, origins, dirs: samples)
        out = field.render(camera, extras=("depth",))
        assert out.depth is not None and out.samples is not None
        field.zero_grad()
        (out.rgb.square().sum() + out.depth.sum()).backward()
        found.append((out.samples, out.rgb, [p.grad for p in field.parameters() if p.grad is not None]))
    (samples, rgb, gradients), (all_samples, all_rgb, all_gradients) = found
    assert samples < 0.95 * all_samples and torch.equal(rgb, all_rgb)
    for some, every in zip(gradients, all_gradients, strict=True):
        assert (some - every).abs().max() <= 1e-6 * every.abs().max()


def test_samples_are_shifted_only_where_gradients_are_recorded() -> None:
    field = make_field()
    camera, pixels = make_camera(), torch.tensor([[0, 20, 15], [0, 25, 18]])
    plain = field.render(camera, pixels)
    assert torch.equal(field.render(camera, pixels).rgb, plain.rgb)
    with torch.no_grad():
        traced = field.render(camera, pixels).rgb
    field.jitter = torch.Generator().manual_seed(3)
    first, second = field.render(camera, pixels), field.render(camera, pixels)
    assert not torch.equal(first.rgb, second.rgb)
    torch.testing.assert_close(first.rgb, plain.rgb, atol=0.05, rtol=0)
    field.jitter.manual_seed(3)
    assert torch.equal(field.render(camera, pixels).rgb, first.rgb)
    with torch.no_grad():
        assert torch.equal(field.render(camera, pixels).rgb, traced)


def test_gradients_reach_the_camera() -> None:
    field, camera = make_field(), make_camera()
    viewmats = camera.viewmats.clone().requires_grad_()
    for parameter in field.parameters():
        parameter.requires_grad_(False)
    field.render(replace(camera, viewmats=viewmats)).rgb.square().sum().backward()
    assert viewmats.grad is not None and torch.isfinite(viewmats.grad).all() and viewmats.grad[0, :3].abs().min() > 0


def test_the_exponential_never_overflows() -> None:
    x = torch.tensor([-200.0, 0.0, 2.0, 15.0, 200.0], requires_grad=True)
    y: Tensor = _TruncatedExp.apply(x)  # type: ignore[no-untyped-call]
    y.sum().backward()
    wanted = torch.tensor([0.0, 1.0, math.exp(2), math.exp(15), math.exp(15)])
    torch.testing.assert_close(y.detach(), wanted)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted)


def test_no_pixels_and_no_background() -> None:
    out = make_field().render(make_camera(), torch.zeros(0, 3, dtype=torch.int64))
    assert out.rgb.shape == (0, 3) and out.alpha.shape == (0,) and out.samples == 0


def test_tensors_that_do_not_fit_are_named() -> None:
    field = make_field()
    tensors = field.tensors()
    with pytest.raises(ValueError, match=r"^encoding.table: expected \[\d+, 4\], got \[\d+, 2\]$"):
        HashField.from_tensors(tensors, replace(SMALL, features=4))
    with pytest.raises(ValueError, match=r"^tensors: expected those of a field; grid.aabb, unbounded missing$"):
        HashField.from_tensors({"means": torch.zeros(3, 3)}, SMALL)
    with pytest.raises(ValueError, match=r"^color_mlp.weights: expected \[\d+\], got none$"):
        HashField.from_tensors({k: v for k, v in tensors.items() if k != "color_mlp.weights"}, SMALL)


def test_space_stays_space() -> None:
    field = make_field("space")
    again = HashField.from_tensors(field.tensors(), replace(SMALL, extent="box"))
    assert len(again.grid.density) == 4 and torch.equal(
        again.render(make_camera()).rgb, field.render(make_camera()).rgb
    )


def ball(xyz: Tensor) -> Tensor:
    return 50 * (xyz.norm(dim=-1) < 0.5).float()


def run_strategy(field: Field, strategy: Occupancy, steps: range) -> None:
    out = RenderOutput(torch.zeros(0, 3), torch.zeros(0))
    for step in steps:
        strategy.after_step(step, 0.1, field, torch.optim.SGD(field.parameters()), out)


def test_the_strategy_finds_what_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    field = make_field()
    monkeypatch.setattr(field, "density", ball)
    strategy = Occupancy(OccupancyConfig(interval=16), field, max_primitives=1, seed=0)
    run_strategy(field, strategy, range(15))
    assert field.grid.occupied.all()  # nothing is known before the first look
    run_strategy(field, strategy, range(15, 64))
    distance = field.grid.centers().norm(dim=-1)
    assert field.grid.occupied[distance < 0.4].all() and not field.grid.occupied[distance > 0.62].any()
    field.render(make_camera(), torch.tensor([[0, 20, 15]]))
    assert field.jitter is strategy.jitter


def test_the_strategy_goes_on_where_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [make_field(), make_field()]
    for field in fields:
        monkeypatch.setattr(field, "density", lambda xyz: (9 * xyz).sin().sum(-1).abs())
    first, second = (
        Occupancy(OccupancyConfig(), field, max_primitives=1, seed=seed) for seed, field in enumerate(fields)
    )
    run_strategy(fields[0], first, range(80))
    state: dict[str, Any] = {name: value.clone() for name, value in first.state_dict().items()}  # type: ignore[union-attr]
    fields[1].grid.load_state_dict(fields[0].grid.state_dict())
    second.load_state_dict(state, fields[1])
    for field, strategy in zip(fields, (first, second), strict=True):
        run_strategy(field, strategy, range(80, 120))
        field.render(make_camera(), torch.tensor([[0, 20, 15]]))
    assert torch.equal(fields[0].grid.density, fields[1].grid.density)
    assert torch.equal(first.jitter.get_state(), second.jitter.get_state())


_COMMON = "--scene garden --downscale 8 --eval-every-nth 40 --steps 40 --threads 2 --occupancy.interval 8 --schedule.samples 16384"
_COMMON += " --log.tests 0 --log.every 1 --log.no-tensorboard --log.checkpoint-steps 20"
_SIZES = "--{0}.levels 3 --{0}.coarsest 8 --{0}.finest 16 --{0}.log2-rows 13 --{0}.width 16 --{0}.occupancy 16 --{0}.steps 64"
_MORE = {
    "hash": "--hash.sampler occupancy --exposure.enabled --pose.enabled --data.cache-mb 1",
    "voxel": "--voxel.growth 0.6",
    "hollow": "--hollow.saliency 8 --hollow.dual-interval 6 --hollow.prune 0.7 --hollow.saliency-lr 0.3 --hollow.lr-final 0.01"
    " --hollow.sparsity 0.02 --hollow.rho 0.05",
}


def words_of(kind: str) -> list[str]:
    return f"{_COMMON} --representation {kind} {_SIZES.format(kind)} {_MORE.get(kind, '')}".split()


@pytest.fixture
def trained(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training without a break."""
    return trained_once(tmp_path_factory, f"field_{kind}", *words_of(kind))


@pytest.mark.parametrize("kind", FIELDS)
def test_a_training_learns_and_reports(kind: str, trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    decibels = [line["psnr"] for line in lines if "loss" in line]  # losses have terms that appear on the way
    assert sum(decibels[-2:]) > sum(decibels[:2]) + 0.5
    report = (trained / "report.md").read_text()
    assert f": {kind}, occupancy, 40 steps" in report and "| parameters | " in report and "| test PSNR | " in report
    tensors, _ = content(trained, 40)
    assert {"scene.grid.bits", "optimizer.color_mlp.weights.exp_avg"} <= tensors.keys()
    assert any(name.startswith("scene.encoding.") and name.endswith("table") for name in tensors)


@pytest.mark.parametrize("kind", ["hash"])
def test_a_run_in_two_parts_is_the_run_in_one(kind: str, trained: Path, tmp_path: Path) -> None:
    """Stopped between two looks at the occupancy, with images that take turns in memory."""
    run = tmp_path / "run"
    done = command("train.cli", *words_of(kind), "--pause-at", 13, "--out", run)
    assert done.returncode == 0, done.stderr
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert "going on at step 13" in done.stderr
    tensors, _ = same_content(run, trained, 40)
    assert {"exposure.deltas", "poses.deltas", "strategy.jitter", "batches.held"} <= tensors.keys()
    assert len(tensors["batches.held"]) < len(tensors["exposure.deltas"])
    assert tensors["exposure.deltas"].abs().max() > 0 and tensors["poses.deltas"].abs().max() > 0


@pytest.mark.parametrize("kind", [kind for kind in FIELDS if kind != "hash"])
def test_what_goes_on_from_a_checkpoint_is_the_run_in_one(kind: str, trained: Path, tmp_path: Path) -> None:
    """With proposals; `voxel` while a grid is still to come, `hollow` between two dual updates."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints/step_00000040")
    first, _ = content(run, 20)
    done = command("train.cli", "--resume", run)
    assert done.returncode == 0 and "going on at step 20" in done.stderr, done.stderr
    tensors, state = same_content(run, trained, 40)
    assert float(first["scene.proposals.progress"]) == 0.5 and float(tensors["scene.proposals.progress"]) == 1
    if kind == "voxel":
        assert int(first["scene.encoding.active"]) == 2 and int(tensors["scene.encoding.active"]) == 3
        assert "optimizer.encoding.grids.2.table.exp_avg" not in first
        assert state["updates"]["encoding.grids.2.table"] < 40
        assert tensors["scene.encoding.shares"].unique().numel() > 2  # the session has shown it the cameras
    if kind == "hollow":
        assert first["scene.encoding.dual"].abs().max() > 0 and not first["scene.encoding.cut"]
        assert int(tensors["scene.encoding.steps"]) == 30
        kept = tensors["scene.encoding.kept"]
        assert tensors["scene.encoding.cut"] and 0 < int(kept.sum()) < len(kept)


@pytest.mark.parametrize("kind", ["hash"])
def test_a_field_is_measured_and_filmed_but_is_no_file_of_splats(kind: str, trained: Path, tmp_path: Path) -> None:
    run = trained
    done = command("train.eval_cli", run, "--json", tmp_path / "eval.json", "--sheet", tmp_path / "eval.png")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "eval.json").read_text())
    assert numbers["psnr"] > 5 and numbers["num_parameters"] * 4 < numbers["bytes"] and "num_primitives" not in numbers
    assert f"{numbers['num_parameters']:,} parameters, {numbers['bytes']:,} bytes as stored" in done.stdout
    words = ["--seconds", 0.2, "--fps", 10, "--width", 32, "--out", tmp_path / "video.mp4"]
    done = command("train.video_cli", run, *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "video.mp4").stat().st_size > 500
    said = refused("export.cli", run, "--to", tmp_path / "scene.ply")
    assert said == f"error: {run}: HashField is not made of Gaussians or convexes"
    assert not (tmp_path / "scene.ply").exists()


def test_a_field_cannot_start_from_splats(tmp_path: Path) -> None:
    said = refused("train.cli", *words_of("hash"), "--init", tmp_path / "scene.ply", "--out", tmp_path / "run")
    assert said == f"error: --init {tmp_path}/scene.ply: expected --representation gaussians or convexes, got hash"
