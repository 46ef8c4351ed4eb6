"""A training step waits for nothing, images stay on the GPU, and what has no Triton or no GPU trains as before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prismfield.datasets.scenes import load_scene
from prismfield.datasets.views import Views
from prismfield.render import kernels
from prismfield.representations.config import FieldConfig
from prismfield.train.batches import Batches, PixelBatches
from prismfield.train.config import ExposureConfig, LossConfig, PoseConfig, TrainConfig, resolved
from prismfield.train.loop import training_step
from prismfield.train.session import Session, start_session
from prismfield.train.strategies import mcmc

from .commands import command
from .raster_fixtures import assert_rows_close
from .tiny_captures import transforms, write_image, write_transforms

WAITING_METHODS = [
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "is_nonzero",
    "unique",
]
WAITING_OPS = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("repeat_interleave", "bincount", "equal", "linalg_matrix_exp"),
    "lift_fresh",  # torch.tensor([...]): on a GPU, a copy that is waited for
}
COMPILED = kernels.kernels  # before a test puts Triton's in their place


class Watch(TorchDispatchMode):
    """Fails at what would make the host wait for a GPU, also inside of other functions of PyTorch."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        if name in WAITING_OPS or any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise AssertionError(f"a step waits: {op}")
        return op(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, nothing may wait."""

    def forbidden(name: str) -> Callable[..., None]:
        def method(*_: Any) -> None:
            raise AssertionError(f"a step waits: Tensor.{name}")

        return method

    with monkeypatch.context() as patch:
        for name in WAITING_METHODS:
            patch.setattr(torch.Tensor, name, forbidden(name), raising=False)
        with Watch():
            yield


def start(strategy: str = "adc", device: str = "cpu", **options: Any) -> Session:
    config = TrainConfig(scene="garden", downscale=8, steps=40, max_primitives=600, strategy=strategy, **options)  # type: ignore[arg-type]
    return start_session(resolved(config), torch.device(device))


def step(session: Session) -> None:
    session.clock.start_step()
    training_step(session)
    session.clock.end_step()


@pytest.mark.parametrize("strategy", ["adc", "mcmc", "fixed"])
def test_a_step_waits_for_nothing(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that can be switched on. The same code runs on a GPU, but for the kernels and for MCMC's noise."""
    monkeypatch.setattr(mcmc, "_all_at_once", lambda _device: True)
    corrections = {"exposure": ExposureConfig(enabled=True), "pose": PoseConfig(enabled=True)}
    session = start(strategy, loss=LossConfig(depth_weight=0.1, opacity_reg=0.01, scale_reg=0.01), **corrections)
    step(session)  # the epoch's order is drawn, on the CPU
    for growth in ("growth", "schedule"):
        if hasattr(session.strategy, growth):
            monkeypatch.setattr(getattr(session.strategy, growth), "due", lambda *_: False)  # these steps may wait
    for _ in range(3):
        with watched(monkeypatch):
            step(session)


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: t.sum().item(),
        lambda t: t[t > 0],
        lambda t: bool(t.sum() > 0),
        lambda t: (t > 0).nonzero(),
        lambda t: torch.matrix_exp(t),
        lambda t: t.new_tensor([1.0]),
        lambda t: torch.tensor([1.0]),
        lambda t: torch.isfinite(t).all() and None,
        lambda t: t.cpu(),
        lambda t: torch.unique(t),
    ],
)
def test_the_watch_sees_what_waits(waits: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 3)
    with pytest.raises(AssertionError, match=r"^a step waits"), watched(monkeypatch):
        waits(values)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_a_field_learns_the_same_from_either_kernels(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps by Triton's and by the compiled ones: the terms of the loss, the last gradients, and what the field is then."""
    sizes: dict[str, Any] = {"levels": 2, "log2_rows": 8, "coarsest": 4, "finest": 16, "width": 16, "steps": 12}
    config = FieldConfig(**sizes, occupancy=16, extent="box", sampler="occupancy", distortion=0.01)

    def two_steps(device: torch.device) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        session = start("occupancy", device.type, representation="hash", hash=config)
        terms = []
        for _ in range(2):
            assert isinstance(session.batches, PixelBatches)
            session.batches.rays = 16
            session.clock.start_step()
            terms.append({name: value.item() for name, value in training_step(session)[2].items()})
            session.clock.end_step()
        gradients = {f"v_{name}": p.grad for name, p in session.scene.named_parameters() if p.grad is not None}
        return terms, {name: value.cpu() for name, value in (session.scene.tensors() | gradients).items()}

    losses, found = two_steps(triton_device)
    monkeypatch.setattr(kernels, "kernels", COMPILED)
    wanted_losses, wanted = two_steps(torch.device("cpu"))
    for got, expected in zip(losses, wanted_losses, strict=True):
        assert set(got) == {"photometric", "distortion"} and got == pytest.approx(expected, rel=1e-4)
    assert set(found) == set(wanted) and {"v_encoding.table", "v_density_mlp.weights", "v_color_mlp.weights"} < set(
        wanted
    )
    for name, value in wanted.items():
        # Adam's first steps are as long whatever the gradient: where that is all but 0, rounding may turn one round
        assert_rows_close(found[name].flatten()[None], value.flatten()[None], 1e-3, name)


def make_views(folder: Path, count: int, channels: int = 3) -> Views:
    for index in range(count):
        write_image(folder / "images" / f"{index:03d}.png", index, channels=channels)
    return Views(load_scene(str(write_transforms(folder, transforms(count))), eval_every_nth=0).train)


def test_images_stay_on_the_device_within_the_budget(tmp_path: Path) -> None:
    """PyTorch's device without memory stands in for a GPU."""
    views, device = make_views(tmp_path, 5), torch.device("meta")
    size = views[0].nbytes
    batches = Batches(views, background=0.0, byte_budget=3 * size + size // 2, device=device)
    first = {batch.index: batch for batch in (batches.next(1) for _ in range(5))}
    for batch in first.values():
        tensors = (batch.rgb, batch.background, batch.cameras.viewmats, batch.cameras.Ks)
        assert {t.device.type for t in tensors} == {"meta"}
    second = {batch.index: batch for batch in (batches.next(1) for _ in range(5))}
    assert sum(second[index] is batch for index, batch in first.items()) == 3
    smaller = [batches.next(2) for _ in range(10)]  # a quarter of the pixels: now all fit, once the others have gone
    assert sorted({id(batch) for batch in smaller[:5]}) == sorted({id(batch) for batch in smaller[5:]})


def test_images_over_random_colours_are_new_each_time(tmp_path: Path) -> None:
    views = make_views(tmp_path, 2, channels=4)
    batches = Batches(views, background=0.0, random_background=True, device=torch.device("meta"))
    drawn = [batches.next(1) for _ in range(4)]
    assert len({id(batch) for batch in drawn}) == 4


def test_without_triton(tmp_path: Path) -> None:
    """An installation that lacks it trains on the CPU as before; and one that has it does not load it for that."""
    words = ["--scene", "garden", "--downscale", "8", "--steps", "12", "--log.tests", "0", "--out"]
    hidden = f"import sys; sys.modules['triton'] = None; sys.argv[1:] = {[*words, str(tmp_path / 'without')]}"
    seen = f"import sys; sys.argv[1:] = {[*words, str(tmp_path / 'with')]}"
    end = (
        "import atexit; atexit.register(lambda: print('loaded:', sorted(m for m in sys.modules if 'render.gpu' in m)))"
    )
    run = "from prismfield.train.cli import main; main()"
    losses = []
    for name, first in (("without", hidden), ("with", seen)):
        code = "; ".join([first, end, run])
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "computed by C++" in done.stderr or "computed by the slow reference" in done.stderr
        assert "loaded: []" in done.stdout
        losses.append(re.findall(r'"loss": ([\d.e-]+)', (tmp_path / name / "metrics.jsonl").read_text()))
    assert losses[0] == losses[1] and losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("strategy", ["adc", "mcmc"])
def test_it_learns_on_a_gpu(strategy: str, tmp_path: Path) -> None:
    words = ["--scene", "garden", "--downscale", 4, "--steps", 300, "--strategy", strategy, "--log.tests", 0]
    done = command("train.cli", *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert re.search(r"computed by Triton \S+ on ", done.stderr)
    found = re.search(r"test PSNR ([\d.]+) dB", done.stderr)
    assert found and float(found[1]) > 20.0


def benchmark(*words: object) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
    return subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True, timeout=300)


def test_the_benchmark_runs_from_end_to_end(tmp_path: Path) -> None:
    done = benchmark("--device", "cpu", "--tiny", "--reference", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["machine"]["versions"]["torch"] == torch.__version__
    scene = results["tiny_97x63"]
    for mode in ("plain", "absgrad"):
        assert set(scene[mode]) == {"prismfield", "reference"}
        for times in scene[mode].values():
            assert 0 < times["forward"] < times["total"] and 0 < times["backward"] < times["total"]
    work = scene["stages"].pop("work")
    assert work["primitives"] == 2000 and 1000 < work["drawn"] < work["entries"] and work["pixels"] == 97 * 63
    assert work["entries"] < work["pairs"] <= work["entries"] * 64**2
    assert len(scene["stages"]) == 7 and all(row["gigabytes_per_s"] > 0 for row in scene["stages"].values())


def test_the_benchmark_of_fields(tmp_path: Path) -> None:
    """Peers that are not here are named in one line each."""
    done = benchmark("--device", "cpu", "--tiny", "--fields", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["64_rays"]
    assert set(rows) == {"prismfield"}
    row = rows["prismfield"]
    assert 0 < row["forward"] < row["total"] and 0 < row["backward"] < row["total"] and row["samples"] > 64
    assert re.search(r"^without nerfacc: sampler nerfacc: needs a CUDA device", done.stderr, re.MULTILINE)
    assert re.search(r"^without tinycudann: networks tinycudann: ", done.stderr, re.MULTILINE)


def test_the_benchmark_trains(tmp_path: Path) -> None:
    done = benchmark("--device", "cpu", "--tiny", "--train", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "out.json").read_text())["garden_20"]
    assert run["steps"] == 20 and run["psnr"] > 14 and run["peak_memory_mib"] > 0 and run["primitives"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu() -> None:
    done = benchmark()
    assert done.returncode == 1
    assert re.fullmatch(r"error: --device cuda: PyTorch \S+ finds no CUDA device; .*\n", done.stderr)
