"""Each Triton kernel, in each form that a training step starts, compiles for NVIDIA's and AMD's GPUs and spills no registers."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prismfield.encodings.grid import Grid
from prismfield.encodings.mlp import Head, mlp
from prismfield.render import kernels as kernels_module
from prismfield.render.ops.adam import adam_step
from prismfield.render.ops.composite import MAX_CHANNELS
from prismfield.render.ops.march import composite_samples, distortion_loss, march_occupancy
from prismfield.render.ops.project import project
from prismfield.render.ops.ssim import photometric_loss
from prismfield.render.rasterize import rasterize, rasterize_convexes

from .gpu_compile import describe
from .raster_fixtures import make_cameras, make_gaussians
from .test_gpu_project_convexes import make_leaves

# The interpreter's: lanes that hold nothing compute nonsense that is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def run_adam(device: torch.device) -> None:
    state = [torch.rand(4, 3, device=device) for _ in range(4)]
    for rows in (None, torch.ones(4, dtype=torch.bool, device=device)):
        adam_step(*state, lr=0.1, betas=(0.9, 0.99), eps=1e-8, step=1, rows=rows)


def run_loss(device: torch.device) -> None:
    rgb, target = (torch.rand(1, 5, 7, 3, device=device) for _ in range(2))
    mask = torch.ones(1, 5, 7, dtype=torch.bool, device=device)
    for image, where in ((target, None), ((255 * target).to(torch.uint8), mask)):
        photometric_loss(rgb.clone().requires_grad_(), image, mask=where)[0].backward()


def run_rasterizer(device: torch.device) -> None:
    cameras = make_cameras(1, 19, 13)
    scene = make_gaussians(6, cameras, hard=False)
    cameras = cameras.to(device)
    # What lies between computes a part of what the last one does
    forms: list[tuple[bool, dict[str, Any]]] = [
        (False, {"sh_degree": 0}),
        (False, {"sh_degree": 3, "extras": ("absgrad",)}),
        (True, {"sh_degree": 3, "extras": ("depth", "median_depth", "absgrad"), "antialiased": True}),
    ]
    for camera_gradient, form in forms:
        viewmats = cameras.viewmats.clone().requires_grad_(camera_gradient)
        leaves = type(scene)(*(t.to(device).requires_grad_() for t in scene.tensors()))
        out = leaves.render(replace(cameras, viewmats=viewmats), **form)
        (out.rgb.sum() + (0 if out.depth is None else out.depth.sum())).backward()
    leaves = type(scene)(*(t.to(device).requires_grad_() for t in scene.tensors()))
    leaves.shN.requires_grad_(False)  # as in every other step of training
    leaves.render(cameras).rgb.sum().backward()
    size = (cameras.width, cameras.height)
    screen = [t.detach() for t in project(*leaves.tensors()[:4], cameras.viewmats, cameras.Ks, size)]
    for channels in (11, MAX_CHANNELS):
        features = torch.rand(1, 6, channels, device=device).requires_grad_()
        rasterize("gaussian", (screen[0], screen[1], screen[2]), features, cameras).rgb.sum().backward()


def run_convexes(device: torch.device) -> None:
    """Of 6 points, plainly and with everything, and of 12."""
    cameras = make_cameras(1, 19, 13)
    forms: list[tuple[int, tuple[str, ...]]] = [(6, ()), (6, ("depth", "median_depth", "absgrad")), (12, ())]
    for points, extras in forms:
        leaves = [t.to(device).requires_grad_() for t in make_leaves(2, points, cameras)]
        leaves[4].requires_grad_(bool(extras))
        sh = (torch.rand(2, 1, 3, device=device), torch.rand(2, 0, 3, device=device))
        seen = replace(cameras.to(device), viewmats=leaves[4])
        out = rasterize_convexes(*leaves[:4], sh, seen, sh_degree=0, extras=extras)
        (out.rgb.sum() + (0 if out.depth is None else out.depth.sum())).backward()


def run_grid(device: torch.device) -> None:
    sizes: dict[str, Any] = {"levels": 1, "log2_rows": 4, "coarsest": 2, "finest": 2}
    forms: list[tuple[int, dict[str, Any]]] = [
        (3, {"cells": "cubes", "features": 2, "half": True}),
        (3, {"cells": "cubes", "features": 8, "smooth": True}),
        (3, {"cells": "simplices", "features": 2}),
        (4, {"cells": "simplices", "features": 8}),
    ]
    for dims, form in forms:
        grid = Grid(dims, **sizes, **form)
        grid.to(device)(torch.rand(2, dims, device=device, requires_grad=True)).sum().backward()


def run_mlp(device: torch.device) -> None:
    """The networks of a field, 64 wide; wider and narrower ones take minutes more to compile, and are looked at by hand."""
    forms: list[tuple[list[int], Head]] = [([32, 64, 16], "none"), ([32, 64, 64, 3], "sigmoid")]
    for dims, head in forms:
        weights = torch.rand(sum(a * b for a, b in itertools.pairwise(dims)), device=device, requires_grad=True)
        x = torch.rand(2, dims[0], device=device, requires_grad=True)
        mlp(x, weights, dims, head).sum().backward()


def run_marcher(device: torch.device) -> None:
    """A bounded scene, and one of nested boxes in which steps grow."""
    rays = (torch.zeros(4, 3), torch.tensor([[0.0, 0.6, 0.8]]).repeat(4, 1), torch.tensor([[0.0, 9.0]]).repeat(4, 1))
    inputs = [t.to(device) for t in (*rays, torch.zeros(4))]
    box = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]], device=device)
    for levels, cone in ((1, 0.0), (5, 1 / 256)):
        bits = torch.full((levels, 4, 4, 4), -1, dtype=torch.int64, device=device)
        starts, ends, _, runs = march_occupancy(*inputs, bits, box, step=0.2, cone=cone, max_samples=4)
    sigmas = torch.ones_like(starts, requires_grad=True)
    distortion_loss(sigmas, starts, ends, runs).sum().backward()
    for channels in (0, 3, 19):
        features = torch.ones(len(starts), channels, device=device, requires_grad=True)
        out = composite_samples(sigmas, features, starts, ends, runs)
        (out.features.sum() + out.alpha.sum() + out.distance.sum()).backward()


RUNS: list[Callable[[torch.device], None]] = [
    run_adam,
    run_loss,
    run_rasterizer,
    run_convexes,
    run_grid,
    run_mlp,
    run_marcher,
]
"""What starts the kernels, as training and rendering do."""


@pytest.fixture(scope="module")
def specs() -> list[dict[str, Any]]:
    """The launches of all RUNS, each form once."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from prismfield.render.gpu import launch

    found: dict[str, dict[str, Any]] = {}

    def note(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        spec = describe(kernel, args, options)
        found[json.dumps(spec, sort_keys=True)] = spec

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "watch", note)
        if not torch.cuda.is_available():
            patch.setattr(kernels_module, "kernels", kernels_module.gpu_table())
        for run in RUNS:
            run(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return list(found.values())


def test_all_kernels_compile_without_spills(
    specs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    (tmp_path / "specs.json").write_text(json.dumps(specs))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))  # what did not change is there already
    script = Path(__file__).with_name("gpu_compile.py")
    command = [sys.executable, str(script), str(tmp_path / "specs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    with capsys.disabled():
        print()
        for row in rows:
            constants = " ".join(f"{name}={value}" for name, value in row["constants"].items())
            sizes = f"{row['registers']:4d} registers {row['spilled']:4d} spilled {row['shared']:6d} B shared"
            print(f"  {row['kernel']:28s} {row['target']:7s} {row['warps']:2d} warps {sizes}  {constants}")
    compiled = [(row["target"], row["kernel"]) for row in rows]
    assert len([target for target, _ in compiled if target == "sm_90"]) == len(specs) > 0
    for target in ("sm_80", "gfx942"):
        assert {kernel for where, kernel in compiled if where == target} == {spec["kernel"] for spec in specs}
    assert not [row for row in rows if row["spilled"]]


def test_every_kernel_is_among_them(specs: list[dict[str, Any]]) -> None:
    """A new kernel that no run starts would be compiled first on a user's machine."""
    tables = [Path(str(importlib.import_module(name).__file__)) for name in kernels_module.GPU_TABLES]
    defined = set()
    for path in (path for table in tables for path in table.parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        defined |= {
            line.removeprefix("def ").split("(")[0]
            for line in text.splitlines()
            if line.startswith("def _") and "_kernel(" in line
        }
    assert defined == {spec["kernel"] for spec in specs}


def test_the_table_has_what_the_compiled_module_has(triton_device: torch.device) -> None:
    module = kernels_module.load_kernels("")[0]
    if module is None:
        pytest.skip("no compiled kernels")
    of_the_cpu = {"num_threads", "set_num_threads", "cpu_level", "keep_freed_memory"}
    of_the_cpu |= {"pfz_plane", "grid_blur", "grid_exchange"}  # files are read and written there
    names = {name for name in dir(module) if not name.startswith("_")} - of_the_cpu
    constants = {name for name in names if not callable(getattr(module, name))} - {"tile_size"}
    assert names - constants <= set(vars(kernels_module.gpu_table()))
