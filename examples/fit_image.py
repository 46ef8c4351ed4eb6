"""Fit a picture by an encoding of its positions and a small network: `python fit_image.py [--image FILE] [--encoding hash]`.

Writes fit_image.png: the picture, and beside it the fit. Without arguments, a view of the bundled garden in some seconds.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from prismfield.datasets import images
from prismfield.encodings.base import ENCODINGS, EncodingConfig, make_encoding
from prismfield.encodings.mlp import Mlp
from prismfield.train.optimizer import FusedAdam

BUNDLED = Path(images.__file__).parent / "garden" / "images" / "009.jpg"


def read_picture(path: Path, downscale: int) -> Tensor:
    """[H, W, 3] in 0..1."""
    pixels = images.shrink(images.decode(path), downscale)[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1))


def colors_at(picture: Tensor, x: Tensor) -> Tensor:
    """[S, 3] of positions [S, 2] in units of the longer side, linear between the centres of pixels."""
    height, width = picture.shape[:2]
    at = x * (max(height, width) * 2 / torch.tensor([width, height])) - 1
    options = {"padding_mode": "border", "align_corners": False}
    return nn.functional.grid_sample(picture.permute(2, 0, 1)[None], at[None, None], **options)[0, :, 0].mT


def draw(model: nn.Module, height: int, width: int) -> Tensor:
    """[H, W, 3] at the centres of pixels."""
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = torch.stack([columns, rows], -1).view(-1, 2) / max(height, width)
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(2**16)]).view(height, width, 3)


def fit(picture: Tensor, encoding: str, config: EncodingConfig, steps: int, batch: int) -> nn.Module:
    """A network of positions that gives colours."""
    torch.manual_seed(0)
    code = make_encoding(encoding, 2, config)
    model = nn.Sequential(code, Mlp(code.out_dim, 3, width=64, hidden=2))
    rates = {"0": 1e-2, "1": 2e-3}  # features see fewer samples each than weights
    groups = [{"name": name, "params": [p], "lr": rates[name[0]]} for name, p in model.named_parameters()]
    highest = [group["lr"] for group in groups]
    optimizer = FusedAdam(groups, betas=(0.9, 0.99))
    height, width = picture.shape[:2]
    size = torch.tensor([width, height]) / max(height, width)
    began = time.perf_counter()
    for step in range(steps):
        x = torch.rand(batch, 2) * size
        loss = (model(x) - colors_at(picture, x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * 0.1 ** (step / steps)
        optimizer.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: {-10 * math.log10(loss.item()):.2f} dB in this batch, {seconds:.1f} s")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=BUNDLED, help="JPEG, PNG, WebP, TIFF or EXR")
    parser.add_argument("--encoding", choices=[name for name in ENCODINGS if name != "sh"], default="hash")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2**13, help="positions a step")
    parser.add_argument("--log2-rows", type=int, default=14, help="rows of the largest table, a power of two")
    parser.add_argument("--downscale", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("fit_image.png"))
    options = parser.parse_args()
    try:
        picture = read_picture(options.image, options.downscale)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    height, width = picture.shape[:2]
    finest = max(max(height, width) // 2, 16)  # two pixels a cell
    config = EncodingConfig(log2_rows=options.log2_rows, finest=finest, octaves=finest.bit_length() - 1)
    model = fit(picture, options.encoding, config, options.steps, options.batch)
    fitted = draw(model, height, width).clamp(0, 1)
    psnr = -10 * math.log10(float((fitted - picture).square().mean()))
    partial = options.out.with_name(options.out.name + ".partial")
    both = (torch.cat([picture, fitted], 1) * 255 + 0.5).byte().numpy()
    Image.fromarray(both).save(partial, "PNG")
    os.replace(partial, options.out)
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{options.encoding}: {psnr:.2f} dB, {numbers:,} parameters for {width}x{height} pixels; {options.out}")


if __name__ == "__main__":
    main()
