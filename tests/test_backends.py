"""Who rasterizes: our ops or gsplat, and how each is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prismfield.render import backends
from prismfield.render import kernels as kernels_module
from prismfield.render.rasterize import rasterize_gaussians
from prismfield.render.samplers import OccupancyGrid
from prismfield.representations.config import FieldConfig
from prismfield.representations.fields import HashField
from prismfield.train.cli import choose_device, use_backend

from .raster_fixtures import make_cameras, make_gaussians


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    yield
    backends.choose("auto", torch.device("cpu"))


def test_gsplat_needs_cuda() -> None:
    with pytest.raises(ValueError) as error:
        backends.choose("gsplat", torch.device("cpu"))
    assert str(error.value) == "--backend gsplat: needs a CUDA device, and this training runs on cpu"
    assert backends.current() == "auto"


def test_gsplat_needs_gsplat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(ValueError, match=r"^--backend gsplat: gsplat cannot be imported \(.+\); pip install gsplat$"):
        backends.choose("gsplat", torch.device("cuda"))
    assert backends.current() == "auto"


def test_gsplat_needs_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot build them it imports all the same."""
    install(monkeypatch, lambda *_: None)
    backends.choose("gsplat", torch.device("cuda"))
    assert backends.current() == "gsplat"
    backends.choose("auto", torch.device("cuda"))
    install(monkeypatch, lambda *_: None, compiled=None)
    with pytest.raises(ValueError, match=r"^--backend gsplat: gsplat has no compiled kernels"):
        backends.choose("gsplat", torch.device("cuda"))
    assert backends.current() == "auto"


def install(monkeypatch: pytest.MonkeyPatch, rasterization: Any, compiled: Any = "kernels") -> None:
    """Put a gsplat in the place of whatever is installed."""
    packages = {
        "gsplat": SimpleNamespace(rasterization=rasterization),
        "gsplat.cuda._backend": SimpleNamespace(_C=compiled),
    }
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.skipif(kernels_module.kernels is None, reason="no compiled kernels")
def test_the_reference_on_request() -> None:
    tensor = torch.zeros(1)
    assert kernels_module.use_kernel(tensor)
    backends.choose("reference", torch.device("cpu"))
    assert backends.current() == "reference" and not kernels_module.use_kernel(tensor)
    backends.choose("auto", torch.device("cpu"))
    assert kernels_module.use_kernel(tensor)


def test_the_reference_without_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An installation that has no kernels draws the same picture and says so in one line."""
    cameras = make_cameras(1, 33, 21)
    g = make_gaussians(40, cameras)
    arguments = (g.means, g.quats, g.scales, g.opacities, (g.sh0, g.shN), cameras)
    wanted = rasterize_gaussians(*arguments, sh_degree=2).rgb
    monkeypatch.setattr(kernels_module, "kernels", None)
    monkeypatch.setattr(kernels_module, "told", False)
    monkeypatch.setattr(kernels_module.log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="prismfield"):
        got = rasterize_gaussians(*arguments, sh_degree=2).rgb
    assert len(caplog.messages) == 1
    assert (got - wanted).abs().mean() < 1e-5


class Adam:
    """Kernels of which `backends.gpu_kernels` runs one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def adam_step(self, *_: Any) -> None:
        if self.error is not None:
            raise self.error


TRITON = "Triton 3.9.0"
NO_TRITON = "slow reference instead of the Triton kernels: triton is not installed; pip install triton"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU, as far as these modules see; what is made on it is made on the CPU."""
    zeros, empty = torch.zeros, torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    monkeypatch.setattr(kernels_module.gpu_kernels, "loaded", (Adam(), TRITON))
    monkeypatch.setattr(kernels_module, "told", False)
    return monkeypatch


def test_a_gpu_is_taken_where_its_kernels_run(card: pytest.MonkeyPatch) -> None:
    device = choose_device("auto")
    assert device.type == "cuda"
    assert use_backend("auto", device) == "Triton 3.9.0 on NVIDIA H200"
    assert use_backend("reference", device) == "the PyTorch reference on NVIDIA H200, as --backend asks"
    assert choose_device("auto", "reference").type == "cpu"
    install(card, lambda *_: None)
    card.setattr("importlib.metadata.version", {"gsplat": "1.5.3"}.__getitem__)
    assert choose_device("auto", "gsplat").type == "cuda"
    assert use_backend("gsplat", device) == "gsplat 1.5.3 on NVIDIA H200"


@pytest.mark.parametrize("broken", ["missing", "no compiler"])
def test_without_triton_the_cpu_trains_and_says_why(broken: str, card: pytest.MonkeyPatch) -> None:
    if broken == "missing":
        reason, loaded = NO_TRITON, (None, NO_TRITON)
    else:
        reason = "slow reference instead of the Triton kernels: they do not run (Failed to find C compiler.)"
        loaded = (Adam(RuntimeError("Failed to find C compiler.\nPlease specify one")), TRITON)
    card.setattr(kernels_module.gpu_kernels, "loaded", loaded)
    device = choose_device("auto")
    assert device.type == "cpu"
    assert use_backend("auto", device).endswith(f"; NVIDIA H200 is left alone: {reason}")
    assert "NVIDIA" not in use_backend("auto", device, "cpu")  # as asked for
    cuda = choose_device("cuda")
    assert cuda.type == "cuda" and not kernels_module.told
    assert use_backend("auto", cuda, "cuda") == f"the {reason} on NVIDIA H200"
    assert kernels_module.told
    assert kernels_module.kernels_of(SimpleNamespace(device=cuda)) is None  # nothing else starts them


def test_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == choose_device("auto", "gsplat").type == "cpu"
    with pytest.raises(ValueError, match=r"^--device cuda: PyTorch .* finds no CUDA device; --device cpu trains"):
        choose_device("cuda")


class FakeGsplat:
    """Answers like `gsplat.rasterization` with recognisable numbers and remembers what it was asked."""

    def __init__(self, radii_axes: int = 3) -> None:
        self.radii_axes = radii_axes

    def rasterization(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.args, self.options = args, options
        means, viewmats, (width, height) = args[0], args[5], args[7:9]
        channels = 4 if options["render_mode"] == "RGB+ED" else 3
        self.means2d = means[None, :, :2].repeat(len(viewmats), 1, 1)
        image = self.means2d.sum() + torch.arange(float(channels)).expand(len(viewmats), height, width, channels)
        radii = torch.full((len(viewmats), len(means), 2), 5, dtype=torch.int32)
        meta = {"means2d": self.means2d, "radii": radii if self.radii_axes == 3 else radii[..., 0]}
        return image, torch.full((len(viewmats), height, width, 1), 0.5), meta


@pytest.mark.parametrize("extras", [(), ("depth",), ("depth", "absgrad")])
@pytest.mark.parametrize("radii_axes", [2, 3])
def test_what_gsplat_is_asked_and_what_becomes_of_its_answer(
    extras: tuple[str, ...], radii_axes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGsplat(radii_axes)
    install(monkeypatch, fake.rasterization)
    monkeypatch.setattr(backends, "_current", "gsplat")
    cameras = make_cameras(2, 33, 21)
    g = make_gaussians(9, cameras).leaves()
    background = torch.rand(2, 3)
    arguments = (g.means, g.quats, g.scales, g.opacities, (g.sh0, g.shN), cameras, background)
    out = rasterize_gaussians(*arguments, sh_degree=2, antialiased=True, extras=extras)
    assert [tuple(t.shape) for t in fake.args[:7]] == [(9, 3), (9, 4), (9, 3), (9,), (9, 16, 3), (2, 4, 4), (2, 3, 3)]
    assert fake.args[7:] == (33, 21)
    assert fake.options["sh_degree"] == 2 and fake.options["rasterize_mode"] == "antialiased"
    assert fake.options["backgrounds"] is background and fake.options["absgrad"] == ("absgrad" in extras)
    assert out.rgb.shape == (2, 21, 33, 3) and out.alpha.shape == (2, 21, 33)
    assert (out.depth is None) == ("depth" not in extras)
    if out.depth is not None:
        torch.testing.assert_close(out.depth, out.rgb[..., 0] + 3)
    assert out.radii.shape == (2, 9, 2) and out.radii.dtype == torch.float32
    out.rgb.sum().backward()
    assert torch.equal(out.params.grad, fake.means2d.grad)  # a strategy finds the gradient of the centres
    assert (out.absgrad is None) == ("absgrad" not in extras)
    if out.absgrad is not None:
        assert out.absgrad.grad is None
        fake.means2d.absgrad = torch.ones(2, 9, 2)
        assert out.absgrad.grad is fake.means2d.absgrad


def test_gsplat_has_no_median_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeGsplat().rasterization)
    monkeypatch.setattr(backends, "_current", "gsplat")
    cameras = make_cameras(1, 33, 21)
    with pytest.raises(ValueError, match=r"^extras: expected no median_depth with --backend gsplat"):
        make_gaussians(9, cameras).render(cameras, extras=("median_depth",))


def test_gsplat_gets_no_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the picture of a lens for that of a pinhole."""
    monkeypatch.setattr(backends, "_current", "gsplat")
    cameras = make_cameras(1, 33, 21)
    object.__setattr__(cameras, "model", "fisheye")
    g = make_gaussians(9, cameras)
    with pytest.raises(ValueError, match=r"^cameras: expected pinhole, got 'fisheye'"):
        rasterize_gaussians(g.means, g.quats, g.scales, g.opacities, (g.sh0, g.shN), cameras, sh_degree=0)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What needs CUDA is let run on the CPU, for packages that are only acted."""
    monkeypatch.setattr(backends, "need_cuda", lambda _option, _device: None)
    return monkeypatch


def test_nerfacc_and_tinycudann_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    box, nothing = torch.tensor([[-1.0] * 3, [1.0] * 3]), torch.zeros(1, 3)
    grid = OccupancyGrid(box, 16)
    grid.sampler = "nerfacc"
    with pytest.raises(ValueError) as error:
        grid.sample(nothing, nothing + 1, 0.0, 1.0, 0.1, max_samples=3)
    assert str(error.value) == "sampler nerfacc: needs a CUDA device, and this training runs on cpu"
    monkeypatch.setattr(backends, "need_cuda", lambda _option, _device: None)
    for name in ("nerfacc", "nerfacc.grid", "tinycudann"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=r"^sampler nerfacc: nerfacc.grid cannot be imported \(.+\); pip install nerfacc$"
    ):
        grid.sample(nothing, nothing + 1, 0.0, 1.0, 0.1, max_samples=3)
    refused = r"^networks tinycudann: tinycudann cannot be imported \(.+\); pip install \"git\+https://.+\"$"
    with pytest.raises(ValueError, match=refused):
        HashField(box, False, FieldConfig(networks="tinycudann"))


class FakeNerfacc:
    """Answers like `nerfacc.grid.traverse_grids` with five samples on the first ray, none on the second, two on the third."""

    def traverse_grids(self, *args: Any, **options: Any) -> tuple[Any, Any, None]:
        self.args, self.options = args, options
        owners = torch.tensor([0] * 5 + [2] * 2)
        edges = torch.arange(14.0)  # each sample's own start and end, as where gaps are between all
        left = torch.arange(14) % 2 == 0
        return SimpleNamespace(vals=edges, is_left=left, is_right=~left), SimpleNamespace(ray_indices=owners), None


def test_what_nerfacc_is_asked_and_what_becomes_of_its_answer(anywhere: pytest.MonkeyPatch) -> None:
    fake = FakeNerfacc()
    anywhere.setitem(sys.modules, "nerfacc.grid", fake)
    grid = OccupancyGrid(torch.tensor([[0.0, 1.0, 2.0], [2.0, 5.0, 8.0]]), 16, 2)
    grid.sampler = "nerfacc"
    origins, dirs = torch.rand(3, 3), torch.nn.functional.normalize(torch.rand(3, 3), dim=-1)
    jitter = torch.tensor([0.0, 0.5, 1.0])
    samples = grid.sample(origins, dirs, 0.2, 9.0, 0.1, max_samples=3, cone=0.01, jitter=jitter)
    assert fake.args[0] is origins and fake.args[1] is dirs
    assert torch.equal(fake.args[2], grid.occupied)
    assert fake.args[3].tolist() == [[0, 1, 2, 2, 5, 8], [-1, -1, -1, 3, 7, 11]]
    torch.testing.assert_close(fake.options["near_planes"], torch.tensor([0.2, 0.25, 0.3]))
    assert fake.options["far_planes"].tolist() == [9.0, 9.0, 9.0]
    assert (fake.options["step_size"], fake.options["cone_angle"]) == (0.1, 0.01)
    assert samples.t_starts.tolist() == [0, 2, 4, 10, 12]  # the nearest three of the first ray's
    assert samples.t_ends.tolist() == [1, 3, 5, 11, 13]
    assert samples.ray_indices.tolist() == [0, 0, 0, 2, 2]
    assert samples.packed_info.tolist() == [[0, 3], [3, 0], [3, 2]]


class FakeTiny(torch.nn.Module):
    """One matrix, in half precision, in the place of all that tinycudann has; remembers what it was asked for."""

    def __init__(self, in_dim: int, *options: Any, seed: int) -> None:
        super().__init__()
        self.options, out_dim = options, options[0] if len(options) == 2 else 4
        generator = torch.Generator().manual_seed(seed)
        self.params = torch.nn.Parameter(torch.randn(out_dim, in_dim, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        assert len(x)  # it refuses none
        return (x @ self.params.mT).half()


def test_a_field_on_tinycudann(anywhere: pytest.MonkeyPatch) -> None:
    """Asks for what the options say; draws, learns and comes back from its tensors."""
    anywhere.setitem(sys.modules, "tinycudann", SimpleNamespace(Encoding=FakeTiny, Network=FakeTiny))
    sizes = {"levels": 2, "features": 2, "log2_rows": 5, "coarsest": 4, "finest": 12, "occupancy": 16, "steps": 32}
    config = FieldConfig(networks="tinycudann", width=48, **sizes)
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    field = HashField(box, False, config)
    grid = {"n_levels": 2, "n_features_per_level": 2, "log2_hashmap_size": 5, "base_resolution": 4}
    assert field.encoding.inner.options == ({"otype": "HashGrid", "per_level_scale": 3.0} | grid,)
    network = {"otype": "CutlassMLP", "activation": "ReLU", "output_activation": "Sigmoid"}
    assert field.color_mlp.inner.options == (3, network | {"n_neurons": 48, "n_hidden_layers": 2})
    cameras = make_cameras(1, 9, 7)
    out = field.render(cameras)
    assert out.rgb.shape == (1, 7, 9, 3) and out.rgb.dtype == torch.float32
    out.rgb.sum().backward()
    for parameter in field.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    again = HashField.from_tensors(field.tensors(), config)
    assert torch.equal(again.render(cameras).rgb, out.rgb)
    assert field.density(torch.zeros(0, 3)).shape == (0,)
