"""The worked example of docs/adding-a-primitive.md: put into the tables, compiled, drawn and trained as the page says."""

from __future__ import annotations

import inspect
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import kernels as kernels_module
from prismfield.render.cameras import Cameras
from prismfield.render.ops import primitives
from prismfield.render.ops.bin import Isects, bin_primitives, bin_reference
from prismfield.render.ops.composite import composite
from prismfield.render.ops.constants import ALPHA_MIN
from prismfield.render.ops.primitives import PRIMITIVES
from prismfield.render.rasterize import rasterize
from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.config import TRAINED_BY
from prismfield.train.config import TrainConfig, resolved
from prismfield.train.loop import loss_values, training_step
from prismfield.train.session import start_session

from . import test_conformance as conformance
from .pages import ROOT, blocks, marked_blocks, run_example
from .raster_fixtures import as_double, assert_rows_close, cotangents, fragile_pixels, make_cameras

PAGE = "docs/adding-a-primitive.md"
PROJECTION = "prismfield.render.ops.project_discs"
COUNTS, SIZE = [0, 1, 24], (37, 21)
COLUMNS = {"center": slice(0, 2), "radius": slice(2, 3), "opacity": slice(3, 4)}
CONFORMANCE = [name for name in vars(conformance) if name.startswith("test_") and "export" not in name]


def test_every_block_is_tried_here() -> None:
    tried = {("python", name) for name in ("primitive", "gpu", "projection", "representation")}
    assert marked_blocks(PAGE) == tried | {("cpp", "primitive"), ("cpp", "row")}


def run_inside(module: ModuleType, section: str) -> None:
    """Run a section as if the file of `module` ended with it."""
    exec(compile(blocks(PAGE, "python", section), str(ROOT / PAGE), "exec"), dict(vars(module)))


@pytest.fixture(autouse=True, scope="module")
def page() -> Iterator[ModuleType]:
    """The page's Python, in the tables while this file is tested. Returns the representation's."""
    with pytest.MonkeyPatch.context() as patch:
        tables: list[tuple[dict[str, Any], str]] = [
            (PRIMITIVES, "disc"),
            (REPRESENTATIONS, "discs"),
            (TRAINED_BY, "discs"),
        ]  # type: ignore[list-item]
        for table, name in tables:
            patch.setitem(table, name, None)  # taken out in the end
        run_inside(primitives, "primitive")
        patch.setitem(sys.modules, PROJECTION, run_example(PAGE, "projection"))
        yield run_example(PAGE, "representation")


def project_discs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The page's, which is there while tests run."""
    screen: tuple[Tensor, Tensor, Tensor] = vars(sys.modules[PROJECTION])["project_discs"](*arguments)
    return screen


def make_discs(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, radii and opacities in double precision; some fill the image, are smaller than a pixel, opaque, or hardly there."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.7 * torch.randn(count, 3, generator=generator)
    radii = 0.3 * torch.randn(count, generator=generator).exp()
    opacities = torch.rand(count, generator=generator)
    if count > 5:
        radii[:2], opacities[2], opacities[3:5] = torch.tensor([9.0, 0.02]), 1.0, torch.tensor([1.1, 0.9]) * ALPHA_MIN
    return means.double(), radii.double(), opacities.double()


def make_screen(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As two cameras see them, in numbers that single precision has, too."""
    params, depths, radii = (
        t.float().double() for t in project_discs(*make_discs(count), as_double(make_cameras(2, *SIZE)))
    )
    assert count < 5 or 12 < (radii[..., 0] > 0).sum() < 2 * count - 1
    return params, depths, radii


# The reference


def test_a_disc_is_as_large_as_it_looks() -> None:
    """The integral of (1 - q)^2 is a third of the disc's area."""
    camera = Cameras(
        torch.eye(4).double()[None], torch.tensor([[[100.0, 0, 31], [0, 81, 22], [0, 0, 1]]]).double(), 60, 50
    )
    discs = torch.tensor([[0.1, -0.05, 3.0]]), torch.tensor([0.5]), torch.tensor([0.8])
    out = rasterize("disc", project_discs(*(t.double() for t in discs), camera), torch.ones(1, 1, 3).double(), camera)
    assert out.alpha.sum().item() == pytest.approx(0.8 * math.pi * (100 * 81) * (0.5 / 3) ** 2 / 3, rel=3e-3)
    rows, columns = torch.arange(50) + 0.5, torch.arange(60) + 0.5
    center = [(out.alpha[0].sum(1 - axis) * at).sum() / out.alpha.sum() for axis, at in ((1, columns), (0, rows))]
    assert center == pytest.approx([31 + 100 * 0.1 / 3, 22 - 81 * 0.05 / 3], abs=1e-2)


def test_what_is_not_seen_is_not_drawn() -> None:
    camera = make_cameras(1, *SIZE)
    ahead = camera.camtoworlds[0, :3, 3] + 3 * camera.camtoworlds[0, :3, 2]
    behind, beside = ahead - 6 * camera.camtoworlds[0, :3, 2], ahead + 40 * camera.camtoworlds[0, :3, 0]
    means = torch.stack([ahead, behind, beside, ahead * math.nan, ahead, ahead])
    radii, opacities = torch.tensor([1.0, 1, 1, 1, 1e-6, 1]), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.9 * ALPHA_MIN])
    params, depths, extents = project_discs(means, radii, opacities, camera)
    assert depths[0, 0].item() == pytest.approx(3) and (extents[0, 0] > 0).all()
    assert all(not t[0, 1:].any() for t in (params, depths, extents))
    with pytest.raises(ValueError, match=r"radii: expected"):
        project_discs(means, radii[:3], opacities, camera)


def test_row_spans_hold_all_that_shows() -> None:
    params = make_screen(24)[0][:, :, None, None]
    x, y = (torch.arange(-5.0, 45.0, 0.05).double(), torch.linspace(0, 1, 21)[:, None].double())
    for y0 in (-3.0, 4.5, 9.5, 17.5):
        shown = PRIMITIVES["disc"].alpha(params, x, y0 + 3 * y) >= ALPHA_MIN
        left, right = PRIMITIVES["disc"].row_span(params[:, :, 0, 0], torch.tensor(y0), torch.tensor(y0 + 3))
        reached = shown.any(2)
        inside = (x >= left[..., None]) & (x <= right[..., None])
        assert reached.any() and not (reached & ~inside).any()
        assert (right - left <= 2 * params[:, :, 0, 0, 2]).all()


def test_gradients_of_the_reference() -> None:
    """Central differences through the whole renderer, over pixels that are not at a cutoff."""
    size, generator = (7, 5), torch.Generator().manual_seed(1)
    cameras, features = as_double(make_cameras(1, *size)), torch.rand(1, 5, 3, generator=generator).double()
    discs = make_discs(5, seed=3)
    screen = project_discs(*discs, cameras)
    fragile = fragile_pixels(*screen, size, 1e-4, "disc")
    assert fragile.float().mean() < 0.1 and (screen[2] > 0).all()

    def pictures(means: Tensor, radii: Tensor, opacities: Tensor, features: Tensor, viewmats: Tensor) -> list[Tensor]:
        seen = Cameras(viewmats, cameras.Ks, *size)
        out = rasterize("disc", project_discs(means, radii, opacities, seen), features, seen, extras=("depth",))
        assert out.depth is not None
        return [t[~fragile] for t in (out.rgb, out.alpha, out.depth)]

    inputs = [t.clone().requires_grad_() for t in (*discs, features, cameras.viewmats)]
    assert torch.autograd.gradcheck(pictures, inputs)


# The kernels


def pairs(isects: Isects) -> set[tuple[int, int]]:
    """(tile, primitive) of each intersection."""
    counts = isects.tile_ranges.diff().long().cpu()
    tiles = torch.arange(len(counts)).repeat_interleave(counts)
    return set(zip(tiles.tolist(), isects.ids.tolist(), strict=True))


def compare_with_the_reference(count: int, device: torch.device) -> None:
    """Lists, pictures and gradients of the kernels against the reference in double precision."""
    params, depths, radii = make_screen(count)
    fragile = fragile_pixels(params, depths, radii, SIZE, 3e-4, "disc")
    assert fragile.float().mean() < 0.1
    features, background = cotangents(params[..., :3], params[:, 0, :3] if count else torch.zeros(2, 3).double())
    results, lists, tile_sizes = [], [], []
    for dtype, where in ((torch.float32, device), (torch.float64, torch.device("cpu"))):
        inputs = (params, features, depths, background, torch.zeros(2, count, 2))
        leaves = [t.to(where, dtype, copy=True).requires_grad_() for t in inputs]
        screen = (leaves[0], leaves[2], radii.to(where, dtype))
        isects = bin_primitives("disc", *screen, SIZE)
        options: dict[str, Any] = {"depth": True, "median_depth": True, "absgrad": leaves[4]}
        out = composite("disc", *leaves[:3], isects, SIZE, leaves[3], **options)
        assert out.depth is not None and out.median_depth is not None
        images = torch.cat([out.features, out.alpha[..., None], out.depth[..., None]], -1)
        weights = cotangents(images.detach().cpu().double())[0].masked_fill(fragile[..., None], 0)
        (images * weights.to(images)).sum().backward()
        shown = torch.cat([images.detach(), out.median_depth[..., None]], -1).cpu()[~fragile]
        results.append([shown, *(torch.zeros_like(t) if t.grad is None else t.grad.cpu() for t in leaves)])
        lists.append(pairs(isects))
        tile_sizes.append(isects.tile_size)
    wanted = bin_reference("disc", params, depths, radii, *SIZE, tile_sizes[0])
    listed = pairs(Isects(*wanted, tile_sizes[0]))
    large = (params[..., 2].flatten() >= 1).tolist()  # smaller ones may lie between pixels, where kernels drop them
    assert {pair for pair in listed if large[pair[1]]} <= lists[0] and len(lists[0]) <= 1.1 * len(listed) + 2
    (picture, *grads), (wanted_picture, *wanted_grads) = results
    assert_rows_close(picture, wanted_picture, 1e-5, "pictures", floor=5e-6)
    for name, columns in COLUMNS.items():
        ours, theirs = grads[0][..., columns], wanted_grads[0][..., columns]
        assert_rows_close(ours, theirs, 1e-4, f"gradient of {name}", floor=1e-5)
    for name, a, b in zip(("features", "depths", "background", "absgrad"), grads[1:], wanted_grads[1:], strict=True):
        a, b = (t[..., None] if name == "depths" else t for t in (a, b))
        assert_rows_close(a, b, 1e-4, f"gradient of {name}", floor=1e-5)
    assert count < 5 or all(theirs.abs().max() > 0.01 for theirs in wanted_grads)


def build_kernels(folder: Path, compiler: str, nanobind: ModuleType) -> None:
    """Binning and compositing with the page's C++ among the primitives, as a module of their own in `folder`."""
    shutil.copytree(ROOT / "render" / "csrc", folder, dirs_exist_ok=True)
    (folder / "disc.h").write_text(blocks(PAGE, "cpp", "primitive").lstrip("\n"))
    table, last = (folder / "primitives.h").read_text(), "  else\n    throw"
    assert table.count(last) == 1 and table.count('#include "gaussian.h"\n') == 1
    table = table.replace(last, blocks(PAGE, "cpp", "row").lstrip("\n") + last)
    table = table.replace('#include "gaussian.h"\n', '#include "disc.h"\n#include "gaussian.h"\n')
    (folder / "primitives.h").write_text(table)
    binds = "{ pf::bind_bin(m); pf::bind_composite(m); }"
    (folder / "disc_kernels.cpp").write_text(f'#include "bindings.h"\nNB_MODULE(disc_kernels, m) {binds}\n')
    home = Path(nanobind.include_dir()).parent
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
    flags += ["-Werror", "-Wno-psabi", "-Wno-missing-field-initializers"]
    includes = [home / "include", home / "ext" / "robin_map" / "include", Path(sysconfig.get_path("include"))]
    sources = [
        *(folder / f"{name}.cpp" for name in ("disc_kernels", "bin", "composite")),
        home / "src" / "nb_combined.cpp",
    ]
    command = [compiler, *flags, f"-I{folder}", *(f"-isystem{path}" for path in includes), *map(str, sources)]
    done = subprocess.run([*command, "-o", str(folder / "disc_kernels.so")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The page's kernels, which one of the processes that run tests compiles for all."""
    nanobind = pytest.importorskip("nanobind", reason="nanobind is not installed: pip install -e '.[dev]'")
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("compiles as on Linux, with c++")
    import fcntl

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "disc_kernels"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not (folder / "disc_kernels.so").exists():
            build_kernels(folder, compiler, nanobind)
    sys.path.insert(0, str(folder))
    try:
        return __import__("disc_kernels")
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize("count", COUNTS)
def test_cpp(count: int, compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "kernels", compiled)
    compare_with_the_reference(count, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("count", COUNTS)
def test_triton(count: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from prismfield.render.gpu import primitives as on_gpu

    monkeypatch.setitem(on_gpu.PRIMITIVES, "disc", None)
    run_inside(on_gpu, "gpu")
    compare_with_the_reference(count, triton_device)


# The representation


@pytest.fixture
def all_kernels(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's kernels beside the others; the references where there are none."""
    if kernels_module.kernels is not None:
        table = {**vars(kernels_module.kernels), **vars(compiled)}
        monkeypatch.setattr(kernels_module, "kernels", SimpleNamespace(**table))


@pytest.mark.parametrize("name", CONFORMANCE)
def test_the_representation_conforms(name: str, page: Any, all_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = page.DiscsConfig(init_opacity=0.7)
    monkeypatch.setitem(conformance.CONFIGS, "discs", config)
    monkeypatch.setattr(conformance, "SPLATS", conformance.SPLATS | {"discs"})
    torch.manual_seed(0)
    scene = page.Discs.from_points(*conformance.make_points(), config)
    for tensor in scene.tensors().values():
        tensor += 0.05 * torch.randn(tensor.shape)
    values: dict[str, Any] = {"kind": "discs", "scene": scene, "device": torch.device("cpu")}
    test = getattr(conformance, name)
    test(**{parameter: values[parameter] for parameter in inspect.signature(test).parameters})


def test_it_trains_and_goes_on(page: Any, all_kernels: None, tmp_path: Path) -> None:
    """With the session, the loss, the optimizer, the strategy and the checkpoints of every training."""

    @dataclass(frozen=True)
    class Config(TrainConfig):
        discs: Any = field(default_factory=page.DiscsConfig)

    options: dict[str, Any] = {"representation": "discs", "scene": "garden", "downscale": 4, "steps": 60}
    config = resolved(Config(max_primitives=1500, **options))
    session = start_session(config, torch.device("cpu"))
    losses = []
    while not session.clock.done:
        session.clock.start_step()
        losses.append(sum(loss_values(training_step(session)[2], session.clock.step).values()))
        session.clock.end_step()
    assert config.strategy == "fixed" and session.scene.num_primitives == 1500
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), losses
    session.save(tmp_path)
    again, camera = start_session(config, torch.device("cpu"), tmp_path), session.train_views.camera(0)
    assert again.clock.step == 60 and torch.equal(again.scene.render(camera).rgb, session.scene.render(camera).rgb)
