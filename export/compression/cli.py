"""render-compress: Gaussians or a radiance field in a small file, with the loss measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from tyro.conf import Positional, arg

from prismfield.cli import run_cli

if TYPE_CHECKING:
    from rich.console import Console

    from prismfield.export.assets import SplatAsset
    from prismfield.export.compression.compress import Compressor, Likeness, Result

_ENDINGS = (".pfz", ".spz", ".sog", ".compressed.ply", ".splat")
_PLAIN_SECONDS = 10.0  # between lines where there is no terminal
_WORTH_TRAINING = 0.1  # decibels to the photographs that are worth a minute or two


@dataclass(frozen=True)
class CompressConfig:
    """Write Gaussians or a radiance field to a small file, draw what is read back, and say what was lost."""

    scene: Positional[Path]
    """A run's folder, or a file of splats or of a field."""
    to: Path
    """The file, replaced if it is there: .pfz, or .spz .sog .compressed.ply .splat, with fewer Gaussians and harmonics."""
    target_mb: float | None = None
    """Make it at most so large, in millions of bytes, and as like the original as can be."""
    target_psnr: float | None = None
    """Make it as small as can be, with at least so many decibels PSNR to the original's pictures."""
    steps: float | None = None
    """Without a target, of a .pfz: round everything to steps so many times as coarse as usual; default 0.5, before
    fine-tuning 0.6, of a field 1."""
    prune: float = 0.0
    """Leave out this share of the Gaussians, the least important ones, 0 to below 1; a target may leave out more. With
    `--finetune-steps` they go bit by bit, while the others learn to do without."""
    finetune_steps: int = 0
    """Of a .pfz: train what it will hold for so many steps (of 150,000 Gaussians 1000 take some minutes): a run against its
    photographs, a file of Gaussians against pictures of it; for `--target-psnr` both against pictures of the scene as it was."""
    finetune_rate: float = 0.005
    """What a bit of each Gaussian costs in that training, as a share of the loss before it; 0: only likeness counts."""
    seed: int = 0
    """Of that training: in which order it sees the photographs."""
    bits: Literal[4, 6, 8] | None = None
    """Of a field, without a target: so many for each number of its tables, the same in all levels, instead of by what each matters."""
    drop: bool = True
    """Of a field: write what is cheapest for numbers on which no picture depends."""
    sh_degree: int = 3
    """Harmonics of at most this degree, 0 to 3."""
    sweep: Path | None = None
    """Draw likeness over size, of many files that could be written, to this picture (.png or .jpg)."""
    json: Path | None = None
    """Write the numbers to this file too."""
    step: int | None = None
    """Of which checkpoint of a run; default the newest."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""


def main() -> NoReturn:
    """The command `render-compress`."""
    run_cli(_main)


def _main() -> None:
    import tyro

    compress(tyro.cli(Annotated[CompressConfig, arg(name="")], prog="render-compress"))


def compress(config: CompressConfig) -> dict[str, Any]:
    """Find the file that suits the targets, write it, and print how it compares.

    Returns:
        The numbers, as in the JSON file.

    Raises:
        FileNotFoundError: the scene is not there.
        ValueError: an option cannot be, the scene is not made of Gaussians, or a target is out of reach.
        OSError: a file could not be written, or came back different.
    """
    _check(config)
    import json

    from rich.console import Console

    from prismfield.export.assets import SplatAsset
    from prismfield.export.compression.compress import Compressor, Likeness, contributions, cut_harmonics, drawable
    from prismfield.export.compression.field_cli import compress_field
    from prismfield.export.compression.packing import PackingCompressor
    from prismfield.export.compression.pfz_grid import STEPS_TO_TRAIN, PfzSteps
    from prismfield.export.compression.pfz_write import write_encoded
    from prismfield.export.library import load
    from prismfield.export.ply import ply_bytes
    from prismfield.representations.fields import Field
    from prismfield.train.cli import use_threads
    from prismfield.train.folder import write_bytes, write_text

    use_threads(config.threads)
    scene = load(config.scene, step=config.step)
    if isinstance(scene.representation, Field):
        return compress_field(config, scene)
    if config.bits is not None or not config.drop:
        raise ValueError(f"--bits and --no-drop: {config.scene} is no field; Gaussians have --steps and --prune")
    original = scene.asset()
    if not isinstance(original, SplatAsset):
        raise ValueError(f"{config.scene}: is made of {original.noun}; render-compress takes Gaussians and fields")
    if len(original) == 0:
        raise ValueError(f"{config.scene}: there is nothing to write, the scene has no Gaussians")
    console = Console(highlight=False, soft_wrap=True)
    likeness = Likeness(scene)
    asset = cut_harmonics(drawable(original), config.sh_degree)
    importance = contributions(scene, asset)
    is_ours = _is_ours(config)
    compressor = (
        Compressor(asset, importance, likeness, STEPS_TO_TRAIN if config.finetune_steps else PfzSteps())
        if is_ours
        else PackingCompressor(asset, importance, likeness, config.to)
    )
    if config.sweep is not None:
        sweep(config.sweep, compressor, ply_bytes(original), console)
    found = find(config, compressor, console)
    untrained = None
    if config.finetune_steps > 0:
        untrained, found = found, _finetuned(config, compressor, found, console)
    if is_ours:
        write_encoded(config.to, found.data)
    else:
        config.to.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(config.to, found.data)  # read back already: `found.asset` is what was
    numbers = _numbers(found, original, likeness, untrained)
    _print(console, config.to, numbers)
    if is_ours and not config.finetune_steps and _lost(numbers) > _WORTH_TRAINING:
        console.print("--finetune-steps 1000 trains the file against that, in some minutes", markup=False)
    if config.json is not None:
        write_text(config.json, json.dumps(numbers, indent=1) + "\n")
    return numbers


def _is_ours(config: CompressConfig) -> bool:
    return config.to.name.lower().endswith(".pfz")


def _check(config: CompressConfig) -> None:
    if not config.to.name.lower().endswith(_ENDINGS):
        raise ValueError(
            f"--to {config.to}: unknown suffix {config.to.suffix!r}; expected {', '.join(_ENDINGS)} (render-export writes others)"
        )
    if not _is_ours(config) and (config.steps is not None or config.finetune_steps):
        name = "finetune-steps" if config.steps is None else "steps"
        raise ValueError(f"--{name}: is of use for .pfz only, got --to {config.to}")
    if config.to.is_dir():
        raise IsADirectoryError(f"--to {config.to}: is a folder")
    if config.target_mb is not None and config.target_psnr is not None:
        raise ValueError("--target-mb and --target-psnr: expected one of them, got both")
    if config.bits is not None and (config.target_mb is not None or config.target_psnr is not None):
        raise ValueError("--bits: expected no target beside it, which chooses the bits itself")
    positive = {"target-mb": config.target_mb, "target-psnr": config.target_psnr, "steps": config.steps}
    for name, value in positive.items():
        if value is not None and not 0 < value < 1e9:
            raise ValueError(f"--{name}: expected more than 0, got {value:g}")
    if not 0 <= config.prune < 1:
        raise ValueError(f"--prune: expected 0 to below 1, got {config.prune:g}")
    if config.finetune_steps < 0 or not 0 <= config.finetune_rate < 1:
        name, value = ("steps", config.finetune_steps) if config.finetune_steps < 0 else ("rate", config.finetune_rate)
        raise ValueError(f"--finetune-{name}: expected 0 or more, got {value:g}")
    if not 0 <= config.sh_degree <= 3:
        raise ValueError(f"--sh-degree: expected 0 to 3, got {config.sh_degree}")
    if config.sweep is not None:
        from prismfield.train.contact_sheet import check_picture

        check_picture(config.sweep)


def find(config: CompressConfig, compressor: Compressor, console: Console) -> Result:
    """The file that suits the targets."""

    def tell(result: Result) -> None:
        words = f"{len(result.data) / 1e6:.3f} MB, {result.psnr:.2f} dB"
        pruned = "tried" if compressor.shares == (0.0,) else f"{result.pruned:.0%} pruned"
        console.print(f"{pruned}: {words}", markup=False)

    # Untrained, a search would never leave out what training can do without.
    more = [] if config.finetune_steps else [share for share in compressor.shares if share > config.prune]
    shares = [config.prune, *more]
    if config.target_mb is not None:
        return compressor.to_size(int(config.target_mb * 1e6), tell, shares)
    if config.target_psnr is not None:
        return compressor.to_psnr(config.target_psnr, tell, shares)
    return compressor.result(config.steps or compressor.usual[config.finetune_steps > 0], config.prune)


def _finetuned(config: CompressConfig, compressor: Compressor, found: Result, console: Console) -> Result:
    """`found`, trained; as it was if that leads away from the target."""
    from prismfield.export.compression.compress import Compressor
    from prismfield.export.compression.pfz_grid import PfzSteps, importance_of

    tuned = _trained(config, compressor, found)
    if config.target_psnr is not None and tuned.psnr < min(config.target_psnr, found.psnr):
        console.print(f"fine-tuned: {tuned.psnr:.2f} dB, less than asked for; not kept", markup=False)
        return found
    if config.target_mb is not None and len(tuned.data) > config.target_mb * 1e6:
        again = Compressor(tuned.asset, importance_of(tuned.asset), compressor.likeness, PfzSteps())
        return again.to_size(int(config.target_mb * 1e6), lambda _: None, [0.0])
    return tuned


def _trained(config: CompressConfig, compressor: Compressor, found: Result) -> Result:
    """`found` after fine-tuning, with a bar for those who wait."""
    from prismfield.export.compression.finetune import Finetuning, finetune

    on_pictures = config.target_psnr is not None
    rest = (config.finetune_rate, config.seed, config.step, on_pictures)
    options = Finetuning(config.finetune_steps, found.pruned, *rest)
    assert found.steps is not None
    scene, importance = compressor.likeness.scene, compressor.importance
    began = time.perf_counter()
    with training_bar(options.steps) as show:

        def tell(step: int, psnr: float, count: int) -> None:
            show(step, f"PSNR {psnr:.2f}  {count:,} Gaussians")

        data = finetune(scene, compressor.asset, importance, found.steps, options, tell)
    return compressor.measured(data, found.steps, found.pruned, time.perf_counter() - began)


@contextmanager
def training_bar(steps: int) -> Iterator[Callable[[int, str], None]]:
    """A bar for those who wait for so many steps of fine-tuning, or lines where there is no terminal; called with a step and words."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("fine-tuning"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[words]}"))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"fine-tuning: {steps} steps", markup=False)
    spoken = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=steps, words="")

        def show(step: int, words: str) -> None:
            nonlocal spoken
            bar.update(task, completed=step, words=words)
            if not console.is_terminal and time.perf_counter() > spoken + _PLAIN_SECONDS:
                spoken = time.perf_counter()
                console.print(f"step {step}/{steps}  {words}", markup=False)

        yield show


def sweep(path: Path, compressor: Compressor, whole: int, console: Console) -> None:
    """Try many files, print how they compare, and draw the curves; `whole`: bytes of what they are made from."""
    import torch

    from prismfield.export.compression.chart import Curve, draw_chart
    from prismfield.train.evaluate import write_image

    points: dict[float, list[tuple[float, float]]] = {}
    for result in compressor.sweep():
        size = len(result.data)
        points.setdefault(result.pruned, []).append((size / 1e6, result.psnr))
        words = f"{size / 1e6:8.3f} MB  {whole / size:5.1f} times smaller  {result.psnr:6.2f} dB"
        pruned = "" if compressor.shares == (0.0,) else f"{result.pruned:4.0%} pruned  "
        console.print(pruned + words, markup=False)
    everything = "the whole field" if compressor.shares == (0.0,) else "all Gaussians"
    curves = [Curve(everything if share == 0 else f"{share:.0%} pruned", each) for share, each in points.items()]
    chart = draw_chart(curves, "MB", "dB PSNR to the original", compressor.likeness.scene.name)
    write_image(path, torch.from_numpy(chart))
    console.print(f"{path}: likeness over size", markup=False)


def _numbers(
    found: Result, original: SplatAsset, likeness: Likeness, untrained: Result | None = None
) -> dict[str, Any]:
    from prismfield.export.compression.compress import ratio
    from prismfield.export.ply import ply_bytes
    from prismfield.train.report import peak_memory

    before, after = likeness.to_photographs(), likeness.to_photographs(found.asset)
    return {
        "gaussians": len(original),
        "gaussians_kept": len(found.asset),
        "sh_degree": found.asset.sh_degree,
        "bytes": len(found.data),
        "bytes_ply": ply_bytes(original),
        "ratio": ratio(original, len(found.data)),
        "bits_each": 8 * len(found.data) / len(found.asset),
        "psnr": found.psnr,
        "ssim": found.ssim,
        "measured": likeness.about,
        **({"photographs_before": before, "photographs_after": after} if before and after else {}),
        "encode_seconds": found.encode_seconds,
        "decode_seconds": found.decode_seconds,
        "peak_memory_mib": peak_memory() / 2**20,
        "pruned": found.pruned,
        **({} if found.steps is None else {"steps": vars(found.steps)}),
        **({} if untrained is None else {"untrained": _of_untrained(untrained, likeness)}),
    }


def _lost(numbers: dict[str, Any]) -> float:
    """Decibels to the photographs; 0 without any."""
    if "photographs_before" not in numbers:
        return 0.0
    return float(numbers["photographs_before"]["psnr"] - numbers["photographs_after"]["psnr"])


def _of_untrained(found: Result, likeness: Likeness) -> dict[str, Any]:
    """The numbers of the same file without fine-tuning."""
    photographs = likeness.to_photographs(found.asset)
    words = {"photographs_after": photographs} if photographs else {}
    return {"bytes": len(found.data), "psnr": found.psnr, "ssim": found.ssim, **words}


def _print(console: Console, path: Path, numbers: dict[str, Any]) -> None:
    kept = f"{numbers['gaussians_kept']:,} of {numbers['gaussians']:,} Gaussians of degree {numbers['sh_degree']}"
    lines = [
        f"{path}: {kept}, {numbers['bytes']:,} bytes ({numbers['bits_each']:.1f} bits each)",
        f"size          {numbers['ratio']:.1f} times smaller than the .ply of {numbers['bytes_ply']:,} bytes",
        f"to original   {numbers['psnr']:.2f} dB PSNR, {numbers['ssim']:.4f} SSIM, {numbers['measured']}",
    ]
    print_comparison(console, numbers, lines)


def print_comparison(console: Console, numbers: dict[str, Any], lines: list[str]) -> None:
    """Print `lines`, then how the file compares to the photographs, and what it took."""
    if "photographs_before" in numbers:
        before, after = numbers["photographs_before"], numbers["photographs_after"]
        change = f"{after['psnr'] - before['psnr']:+.2f} dB, {after['ssim'] - before['ssim']:+.4f}"
        lines.append(
            f"to photos     {after['psnr']:.2f} dB PSNR, {after['ssim']:.4f} SSIM ({change} to the original's)"
        )
    if "untrained" in numbers:
        before = numbers["untrained"]
        words = f"{before['bytes']:,} bytes, {before['psnr']:.2f} dB to the original"
        if "photographs_after" in before:
            lost = before["photographs_after"]["psnr"] - numbers["photographs_before"]["psnr"]
            words += f", {before['photographs_after']['psnr']:.2f} dB to photos ({lost:+.2f} dB)"
        lines.append(f"untrained     {words}")
    times = f"encoded in {numbers['encode_seconds']:.2f} s, decoded in {numbers['decode_seconds']:.2f} s"
    lines.append(f"time          {times}, peak memory {numbers['peak_memory_mib']:.0f} MiB")
    for line in lines:
        console.print(line, markup=False)


if __name__ == "__main__":
    main()
