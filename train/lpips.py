"""LPIPS, the perceptual distance of deep features. Its weights are not ours to ship: they are looked for on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

from prismfield.render.checks import check_shapes

Network = Literal["alex", "vgg"]

# Convolutions as (place in torchvision's `features`, channels in, out, kernel, stride, padding), "pool" between them. A
# feature is taken after each stage's last convolution.
_Stage = tuple[tuple[int, int, int, int, int, int], ...]
_STAGES: dict[Network, tuple[_Stage, ...]] = {
    "alex": (
        ((0, 3, 64, 11, 4, 2),),
        ((3, 64, 192, 5, 1, 2),),
        ((6, 192, 384, 3, 1, 1),),
        ((8, 384, 256, 3, 1, 1),),
        ((10, 256, 256, 3, 1, 1),),
    ),
    "vgg": (
        ((0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1)),
        ((5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1)),
        ((10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1)),
        ((17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1)),
        ((24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1)),
    ),
}
_POOLED: dict[Network, tuple[int, tuple[int, ...]]] = {"alex": (3, (1, 2)), "vgg": (2, (1, 2, 3, 4))}
"""Size of the pooling window (stride 2), and the stages it stands before."""
_TRUNKS: dict[Network, str] = {"alex": "alexnet-*.pth", "vgg": "vgg16-*.pth"}
_MIN_SIDE: dict[Network, int] = {"alex": 31, "vgg": 16}
# Mean and deviation of ImageNet's pixels, in -1..1.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Learned perceptual image patch similarity, version 0.1 (Zhang et al. 2018, arXiv:1801.03924, eq. 1)."""

    def __init__(self, network: Network, trunk: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        """A network with given weights.

        Args:
            network: which trunk.
            trunk: torchvision's ImageNet weights ("features.0.weight", ...).
            heads: the weights of the channels ("lin0.model.1.weight" [1, channels, 1, 1], ...), as the lpips package has them.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        super().__init__()
        self.network: Network = network
        for place, width, out, kernel, *_ in (layer for stage in _STAGES[network] for layer in stage):
            self.register_buffer(
                f"weight{place}", _take(trunk, f"features.{place}.weight", (out, width, kernel, kernel))
            )
            self.register_buffer(f"bias{place}", _take(trunk, f"features.{place}.bias", (out,)))
        for i, stage in enumerate(_STAGES[network]):
            self.register_buffer(f"head{i}", _take(heads, f"lin{i}.model.1.weight", (1, stage[-1][2], 1, 1)))

    @torch.no_grad()
    def forward(self, rgb: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean distance of [C, H, W, 3] images in 0..1, lower is better.

        Args:
            rgb: the render.
            truth: the same shape.
            mask: [C, H, W] bool; where it is False the truth stands in for the render. The mean is over all pixels.

        Raises:
            ValueError: the images are too small for the network, or shapes do not fit.
        """
        check_shapes(rgb=(rgb, "C H W 3"), truth=(truth, "C H W 3"))
        if min(rgb.shape[1:3]) < _MIN_SIDE[self.network]:
            raise ValueError(
                f"rgb: expected at least {_MIN_SIDE[self.network]} pixels a side for LPIPS, got {list(rgb.shape)}"
            )
        if mask is not None:
            rgb = torch.where(mask[..., None], rgb, truth)
        total = rgb.new_zeros(rgb.shape[0])
        for i, (ours, theirs) in enumerate(zip(self._features(rgb), self._features(truth), strict=True)):
            difference = (_unit(ours) - _unit(theirs)).square()
            total += conv2d(difference, getattr(self, f"head{i}")).mean((1, 2, 3))
        return total.mean()

    def _features(self, image: Tensor) -> Iterator[Tensor]:
        x = ((2 * image - 1) - image.new_tensor(_SHIFT)) / image.new_tensor(_SCALE)
        x = x.permute(0, 3, 1, 2)
        window, pooled = _POOLED[self.network]
        for i, stage in enumerate(_STAGES[self.network]):
            if i in pooled:
                x = max_pool2d(x, window, stride=2)
            for place, _, _, _, stride, padding in stage:
                x = conv2d(x, getattr(self, f"weight{place}"), getattr(self, f"bias{place}"), stride, padding).relu()
            yield x


def load_lpips(network: Network) -> tuple[Lpips | None, str]:
    """LPIPS with the weights found on this machine.

    Looked for in the folder $PRISMFIELD_LPIPS and in torch hub's cache (trunk: alexnet-*.pth, vgg16-*.pth, as torchvision
    publishes them), and in an installed lpips or torchmetrics package (heads: alex.pth, vgg.pth).

    Returns:
        The network and the files it was read from, or None and one line that says what is missing.

    Raises:
        ValueError: `network` is neither "alex" nor "vgg".
    """
    if network not in get_args(Network):
        raise ValueError(f"network: expected one of {', '.join(get_args(Network))}, got {network!r}")
    trunks = [path for folder in _trunk_folders() for path in sorted(folder.glob(_TRUNKS[network]))]
    heads = [path for folder in _head_folders() if (path := folder / f"{network}.pth").is_file()]
    if not trunks or not heads:
        missing = [name for name, found in ((_TRUNKS[network], trunks), (f"{network}.pth", heads)) if not found]
        return (
            None,
            f"LPIPS ({network}) left out: no {' and no '.join(missing)}; put them into a folder and set PRISMFIELD_LPIPS to it",
        )
    try:
        return Lpips(network, _read(trunks[0]), _read(heads[0])), f"{trunks[0]}, {heads[0]}"
    except (ValueError, OSError) as error:
        return None, f"LPIPS ({network}) left out: {error}"


def _trunk_folders() -> list[Path]:
    return [*_own_folder(), Path(torch.hub.get_dir()) / "checkpoints"]


def _head_folders() -> Iterator[Path]:
    yield from _own_folder()
    for package, folder in (("lpips", "weights/v0.1"), ("torchmetrics", "functional/image/lpips_models")):
        spec = find_spec(package)
        for place in spec.submodule_search_locations or () if spec is not None else ():
            yield Path(place) / folder


def _own_folder() -> list[Path]:
    folder = os.environ.get("PRISMFIELD_LPIPS")
    return [Path(folder)] if folder else []


def _read(path: Path) -> dict[str, Any]:
    """The tensors of a file, nothing else in it being run."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} cannot be read ({type(error).__name__})") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds no table of tensors")
    return tensors


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        found = list(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
        raise ValueError(f"{name}: expected {list(shape)}, got {found}")
    return tensor.detach().float()


def _unit(features: Tensor) -> Tensor:
    """[C, D, H, W] with unit length across D."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
