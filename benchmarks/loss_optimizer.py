"""Milliseconds of the photometric loss and of Adam, beside plain PyTorch in the same run.

    python benchmarks/loss_optimizer.py [--runs 21] [--threads N] [--out results/loss_optimizer.json]

The contenders alternate, so that a machine whose speed drifts slows all of them. Loss: forward and backward of
0.8 L1 + 0.2 (1 - SSIM) against an 8-bit photograph. Adam: all parameters of N Gaussians with harmonics of degree 3, 59 floats
each; "seen 50%" updates every second row, in runs of random length as a camera leaves them. The last table asks what it would
save to update the harmonics (45 of the 59 floats) only each 16th step, with their gradients summed in between.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import measure
from torch import Tensor

from prismfield.render.kernels import description, kernels
from prismfield.render.ops.adam import adam_step
from prismfield.render.ops.ssim import photometric_loss, photometric_loss_reference

IMAGES = ((266, 400), (533, 800), (1080, 1920))
COUNTS = {"100k": 100_000, "1M": 1_000_000}
WIDTHS = {"means": 3, "quats": 4, "log_scales": 3, "opacity_logits": 1, "sh0": 3, "shN": 45}
STREAMS = 7  # of memory: parameter, moments and gradient read; all but the gradient written
INTERVAL = 16


def time_loss(height: int, width: int, runs: int) -> dict[str, float]:
    """Forward and backward of the loss."""
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(1, height, width, 3, generator=generator).requires_grad_()
    noise = 0.1 * torch.randn(rgb.shape, generator=generator)
    target = ((rgb.detach() + noise).clamp(0, 1) * 255).byte()
    mask = torch.ones(1, height, width, dtype=torch.bool)
    mask[:, : height // 3, : width // 2] = False

    def step(loss: Callable[..., tuple[Tensor, Tensor, Tensor]], where: Tensor | None) -> None:
        rgb.grad = None
        loss(rgb, target, 0.2, where)[0].backward()

    return measure(
        {
            "kernel": lambda: step(photometric_loss, None),
            "kernel, masked": lambda: step(photometric_loss, mask),
            "PyTorch": lambda: step(photometric_loss_reference, None),
        },
        runs,
    )


def seen_rows(count: int) -> Tensor:
    """[count] bool, half of them true, in runs of 1 to 16."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 17, (count // 4 + 2,), generator=generator)
    values = torch.arange(len(lengths)) % 2 == 0
    return values.repeat_interleave(lengths)[:count].contiguous()


class State:
    """Parameters of N Gaussians with gradients and moments."""

    def __init__(self, count: int) -> None:
        self.parameters = [torch.nn.Parameter(torch.randn(count, width)) for width in WIDTHS.values()]
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def step(self, rows: Tensor | None, names: tuple[str, ...] = tuple(WIDTHS)) -> None:
        """One update of the named parameters with our kernel."""
        for name, parameter, moments in zip(WIDTHS, self.parameters, self.moments, strict=True):
            if name in names and parameter.grad is not None:
                adam_step(
                    parameter, parameter.grad, *moments, lr=1e-3, betas=(0.9, 0.999), eps=1e-15, step=9, rows=rows
                )


def time_adam(count: int, runs: int) -> dict[str, float]:
    """One step over everything."""
    state, rows = State(count), seen_rows(count)
    peers = {
        "PyTorch fused": torch.optim.Adam(state.parameters, fused=True),
        "PyTorch foreach": torch.optim.Adam(state.parameters, foreach=True),
    }
    ours: dict[str, Callable[[], Any]] = {"all rows": lambda: state.step(None), "seen 50%": lambda: state.step(rows)}
    return measure(ours | {name: peer.step for name, peer in peers.items()}, runs)


def time_intervals(count: int, runs: int) -> dict[str, float]:
    """Average cost of a step's share of the harmonics' update."""
    state, rows = State(count), seen_rows(count)
    harmonics = state.parameters[-1]
    gradient, total = torch.randn_like(harmonics), torch.zeros_like(harmonics)
    times = measure(
        {
            "each step, seen 50%": lambda: state.step(rows, ("shN",)),
            "each step, all rows": lambda: state.step(None, ("shN",)),
            "sum of gradients": lambda: total.add_(gradient),
        },
        runs,
    )
    summed = times["sum of gradients"] + times["each step, all rows"] / INTERVAL
    return times | {f"summed, each {INTERVAL}th": round(summed, 3)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if kernels is None:
        raise SystemExit(f"error: {description}")
    kernels.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    print(f"{description}, {options.threads} threads; median of {options.runs}, ms")
    results: dict[str, Any] = {"kernels": description, "threads": options.threads}
    for height, width in IMAGES:
        times = results[f"loss {width}x{height}"] = time_loss(height, width, options.runs)
        gigaflops = 2 * 7 * 22 * height * width * 3 / times["kernel"] * 1e-6  # seven blurs of 2 x 11 multiply-adds
        show(f"loss {width}x{height}", times, f"{gigaflops:.0f} GFLOP/s in blurs")
    for name, count in COUNTS.items():
        times = results[f"adam {name}"] = time_adam(count, options.runs)
        traffic = STREAMS * 4 * sum(WIDTHS.values()) * count * 1e-6  # MB
        rates = [f"{share * traffic / times[row]:.0f}" for row, share in (("all rows", 1.0), ("seen 50%", 0.5))]
        show(f"adam {name}", times, f"{traffic:.0f} MB a full step; {rates[0]} and {rates[1]} GB/s")
    for name, count in COUNTS.items():
        times = results[f"harmonics {name}"] = time_intervals(count, options.runs)
        show(f"harmonics {name}", times, "")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def show(title: str, times: dict[str, float], note: str) -> None:
    """One line of the table."""
    print(f"{title:16s} " + "  ".join(f"{name} {value:.2f}" for name, value in times.items()) + f"  {note}".rstrip())


if __name__ == "__main__":
    main()
