"""PSNR, SSIM, FLIP and LPIPS: closed forms, other people's programs, and what their definitions imply."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor, nn

from prismfield.train import lpips as lpips_module
from prismfield.train.lpips import Lpips, Network, load_lpips
from prismfield.train.metrics import flip, flip_map, psnr, ssim

HEIGHT, WIDTH = 40, 60


def waves() -> tuple[Tensor, Tensor]:
    """Two pictures [1, H, W, 3]: stripes shifted in red, weaker in green, and a patch that only the second one has."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    blue = 0.5 + 0.5 * np.sin((x + 2 * y) / 9)
    a = np.stack([0.5 + 0.5 * np.sin(x / 5), 0.5 + 0.5 * np.cos(y / 7), blue], -1)
    b = np.stack([0.5 + 0.5 * np.sin((x + 2) / 5), 0.5 + 0.4 * np.cos(y / 7), blue], -1)
    b[10:20, 30:45] = (0.9, 0.1, 0.2)
    return torch.from_numpy(a)[None].float(), torch.from_numpy(b)[None].float()


def left_half() -> Tensor:
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    mask[:, :, : WIDTH // 2] = True
    return mask


def flat(*rgb: float) -> Tensor:
    return torch.tensor(rgb).expand(1, 12, 16, 3).contiguous()


def test_psnr_of_a_constant_error() -> None:
    truth = torch.rand(1, 5, 7, 3, generator=torch.Generator().manual_seed(0)) * 0.5
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-4)
    assert psnr(truth - 0.01, truth) == pytest.approx(40.0, abs=1e-3)
    assert psnr(truth, truth) == 100.0
    error = torch.zeros(2, 5, 7, 3)
    error[1, 2, 3, 0] = 1.0  # one value of 210, over all images together
    assert psnr(error, torch.zeros_like(error)) == pytest.approx(10 * math.log10(210))


def test_psnr_of_what_counts() -> None:
    rgb, truth, mask = *waves(), left_half()
    expected = -10 * np.log10(np.mean((rgb - truth).numpy()[:, :, : WIDTH // 2].astype(np.float64) ** 2))
    assert psnr(rgb, truth, mask) == pytest.approx(expected)
    assert math.isnan(psnr(rgb, truth, torch.zeros_like(mask)))


def ssim_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 in doubles, from moments by scipy's filters, zeros beyond the border."""
    window = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, 0, mode="constant"), window, 1, mode="constant")

    maps = []
    for x, y in zip(np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0), strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        maps.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(maps))


def test_ssim_against_scipy() -> None:
    rgb, truth = waves()
    expected = ssim_by_scipy(rgb[0].double().numpy(), truth[0].double().numpy())
    assert 0.2 < expected < 0.95
    assert ssim(rgb, truth) == pytest.approx(expected, abs=1e-6)
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-6)
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1))
    spoilt = torch.where(left_half()[..., None], rgb, noise)
    assert ssim(spoilt, truth, left_half()) == pytest.approx(ssim(rgb, truth, left_half()), abs=1e-7)
    assert math.isnan(ssim(rgb, truth, torch.zeros_like(left_half())))


# Of the authors' own program: flip_evaluator.evaluate(waves[0], waves[1], "LDR", applyMagma=False) of flip-evaluator 1.7.
_FLIP = {
    None: (0.4249914, {(0, 0): 0.6791142, (15, 37): 0.9649220, (12, 31): 0.8063965, (30, 20): 0.2149814}),
    30.0: (0.4161832, {(0, 0): 0.6583167, (15, 37): 0.9649762, (12, 31): 0.8331552, (30, 20): 0.1988891}),
}


@pytest.mark.parametrize("pixels_per_degree", list(_FLIP))
def test_flip_against_its_authors_program(pixels_per_degree: float | None) -> None:
    mean, places = _FLIP[pixels_per_degree]
    options = {} if pixels_per_degree is None else {"pixels_per_degree": pixels_per_degree}
    assert flip(*waves(), **options) == pytest.approx(mean, abs=5e-5)
    errors = flip_map(*waves(), **options)
    assert errors.shape == (1, HEIGHT, WIDTH)
    for (row, column), expected in places.items():
        assert float(errors[0, row, column]) == pytest.approx(expected, abs=1e-4)


def test_flip_of_flat_colours() -> None:
    black, white, green, blue = flat(0, 0, 0), flat(1, 1, 1), flat(0, 1, 0), flat(0, 0, 1)
    assert flip(black, white) == pytest.approx(0.9673906, abs=5e-5)  # by the same program
    assert flip(green, blue) == pytest.approx(1.0, abs=1e-5)  # the farthest apart
    assert flip(white, white) == 0
    assert flip(2 * white, white) == 0  # clamped
    near, far = (flip(flat(0.5, 0.5, 0.5 + step), flat(0.5, 0.5, 0.5)) for step in (0.02, 0.2))
    assert 0 < near < far < 1


def test_flip_is_symmetric_and_sees_only_what_counts() -> None:
    rgb, truth = waves()
    torch.testing.assert_close(flip_map(rgb, truth), flip_map(truth, rgb), rtol=0, atol=1e-5)
    rgb[:, :, WIDTH // 2 :] = 0.3
    mask = left_half()
    spoilt = rgb.clone()
    spoilt[:, :, WIDTH // 2 :] = 1.0
    assert flip(spoilt, truth, mask) == flip(rgb, truth, mask) > 0.1
    patched = torch.where(mask[..., None], truth, rgb)
    assert flip(patched, truth, mask) == 0  # nothing spreads in from beside
    assert math.isnan(flip(rgb, truth, torch.zeros_like(mask)))


def test_flip_of_a_batch_is_that_of_its_images() -> None:
    rgb, truth = waves()
    both = flip_map(torch.cat([rgb, truth]), torch.cat([truth, truth]))
    torch.testing.assert_close(both[:1], flip_map(rgb, truth))
    assert float(both[1].max()) == 0


@pytest.mark.parametrize("metric", [flip, flip_map, ssim])
def test_other_shapes_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"truth|target"):
        metric(torch.rand(1, 12, 16, 3), torch.rand(1, 12, 17, 3))


# torchvision's `features` of each trunk: convolutions as (in, out, kernel, stride, padding), "R" a ReLU, "F" a ReLU whose
# output is a feature of LPIPS, a number a pooling window.
_LAYERS: dict[Network, list] = {
    "alex": [
        (3, 64, 11, 4, 2), "F", 3, (64, 192, 5, 1, 2), "F", 3, (192, 384, 3, 1, 1), "F", (384, 256, 3, 1, 1), "F",
        (256, 256, 3, 1, 1), "F",
    ],
    "vgg": [
        (3, 64, 3, 1, 1), "R", (64, 64, 3, 1, 1), "F", 2, (64, 128, 3, 1, 1), "R", (128, 128, 3, 1, 1), "F", 2,
        (128, 256, 3, 1, 1), "R", (256, 256, 3, 1, 1), "R", (256, 256, 3, 1, 1), "F", 2,
        (256, 512, 3, 1, 1), "R", (512, 512, 3, 1, 1), "R", (512, 512, 3, 1, 1), "F", 2,
        (512, 512, 3, 1, 1), "R", (512, 512, 3, 1, 1), "R", (512, 512, 3, 1, 1), "F",
    ],
}  # fmt: skip


def make_trunk(network: Network) -> nn.Sequential:
    torch.manual_seed(0)
    makers = {str: lambda _: nn.ReLU(), int: lambda size: nn.MaxPool2d(size, 2), tuple: lambda args: nn.Conv2d(*args)}
    trunk = nn.Sequential(*(makers[type(layer)](layer) for layer in _LAYERS[network]))
    for layer in trunk:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    return trunk


def weights(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random ones, under the names that torchvision and the lpips package give them."""
    trunk = {f"features.{name}": value.detach() for name, value in make_trunk(network).named_parameters()}
    widths = [64, 192, 384, 256, 256] if network == "alex" else [64, 128, 256, 512, 512]
    generator = torch.Generator().manual_seed(5)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for i, width in enumerate(widths)
    }
    return trunk, heads


@torch.no_grad()
def lpips_layer_by_layer(network: Network, rgb: Tensor, truth: Tensor) -> float:
    """Zhang et al. 2018, eq. 1, one picture at a time."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = [((2 * image[0] - 1 - shift) / scale).permute(2, 0, 1) for image in (rgb, truth)]
    heads, total, found = list(weights(network)[1].values()), 0.0, 0
    for layer, kind in zip(make_trunk(network), _LAYERS[network], strict=True):
        pair = [layer(image) for image in pair]
        if kind == "F":
            ours, theirs = (image / image.norm(dim=0) for image in pair)
            columns = ((ours - theirs) ** 2 * heads[found][0]).nan_to_num().sum(0)
            total += float(columns.mean())
            found += 1
    assert found == 5
    return total


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_lpips_against_the_layers_of_its_networks(network: Network) -> None:
    rgb, truth = waves()
    measure = Lpips(network, *weights(network))
    expected = lpips_layer_by_layer(network, rgb, truth)
    assert expected > 0.01
    assert float(measure(rgb, truth)) == pytest.approx(expected, rel=1e-4)
    assert float(measure(truth, truth)) == 0
    assert float(measure(torch.cat([rgb, truth]), torch.cat([truth, truth]))) == pytest.approx(expected / 2, rel=1e-4)
    assert float(measure(torch.where(left_half()[..., None], truth, rgb), truth, left_half())) == 0
    with pytest.raises(ValueError, match=r"at least \d+ pixels a side for LPIPS"):
        measure(rgb[:, :15], truth[:, :15])


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, but for this folder."""
    monkeypatch.setenv("PRISMFIELD_LPIPS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "no hub"))
    monkeypatch.setattr(lpips_module, "find_spec", lambda _: None)
    return tmp_path


def test_lpips_without_weights_says_what_is_missing(nowhere: Path) -> None:
    network, reason = load_lpips("vgg")
    assert network is None
    assert reason.startswith("LPIPS (vgg) left out: no vgg16-*.pth and no vgg.pth; ")
    assert "PRISMFIELD_LPIPS" in reason
    torch.save(weights("alex")[1], nowhere / "alex.pth")
    assert load_lpips("alex")[1].startswith("LPIPS (alex) left out: no alexnet-*.pth; ")
    with pytest.raises(ValueError, match="expected one of alex, vgg, got 'squeeze'"):
        load_lpips("squeeze")  # type: ignore[arg-type]


def test_lpips_with_weights(nowhere: Path) -> None:
    trunk, heads = weights("alex")
    torch.save(heads, nowhere / "alex.pth")
    torch.save(trunk | {"classifier.1.weight": torch.zeros(2, 2)}, nowhere / "alexnet-owt-7be5be79.pth")
    network, files = load_lpips("alex")
    assert network is not None
    assert files == f"{nowhere}/alexnet-owt-7be5be79.pth, {nowhere}/alex.pth"
    assert float(network(*waves())) == pytest.approx(lpips_layer_by_layer("alex", *waves()), rel=1e-4)


def test_lpips_with_weights_that_cannot_be_used(nowhere: Path) -> None:
    trunk, heads = weights("alex")
    torch.save(heads, nowhere / "alex.pth")
    file = nowhere / "alexnet-1.pth"
    file.write_bytes(b"not a pickle")
    assert load_lpips("alex") == (None, f"LPIPS (alex) left out: {file} cannot be read (UnpicklingError)")
    torch.save([1, 2], file)
    assert load_lpips("alex") == (None, f"LPIPS (alex) left out: {file} holds no table of tensors")
    torch.save({name: value for name, value in trunk.items() if name != "features.8.bias"}, file)
    assert load_lpips("alex") == (None, "LPIPS (alex) left out: features.8.bias: expected [256], got nothing")
    torch.save(trunk | {"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    said = "LPIPS (alex) left out: features.0.weight: expected [64, 3, 11, 11], got [64, 3, 3, 3]"
    assert load_lpips("alex") == (None, said)
