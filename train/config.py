"""Every option of a training. No torch here: the command line reads this before it parses its arguments."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prismfield.representations.config import (
    SIMPLEX,
    TRAINED_BY,
    TRIPLANE,
    CompactConfig,
    ConvexesConfig,
    FieldConfig,
    GaussiansConfig,
    HollowConfig,
    VoxelConfig,
)
from prismfield.train.strategies.config import AdcConfig, McmcConfig, OccupancyConfig, SplitConfig

DEFAULT_STEPS = 4000


@dataclass(frozen=True)
class DataConfig:
    """Images and the points to start from."""

    cache_mb: int = 2048
    """Memory for images, MiB, half of it on the GPU where one trains; those that do not fit are decoded again when needed."""
    points: Literal["auto", "cloud", "triangulate", "random"] = "auto"
    """Where to start: the capture's point cloud; points triangulated from matched features; random ones. "auto" takes
    the first that there is."""
    initial_points: int = 20_000
    """How many points to make where the capture has no cloud."""
    masks: bool = True
    """Leave masked pixels out of the loss and of the metrics."""
    cut_out: bool = False
    """Masks outline the object: train what they leave out to be empty. Else it is unknown, and with few views whatever
    suits them comes to float there."""
    random_background: bool = False
    """Blend images with an alpha channel over a new colour each step, instead of always over the same; radiance fields
    always do."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss."""

    ssim_weight: float = 0.2
    """Share of 1 - SSIM beside the mean absolute error; single pixels have no structure: theirs is the mean squared error."""
    opacity_reg: float | None = None
    """Weight of the mean opacity; default: 0.01 with mcmc, which lives on opacities that fall, else 0."""
    scale_reg: float | None = None
    """Weight of the mean standard deviation, scene units; default: 0.01 with mcmc, else 0."""
    depth_weight: float = 0.0
    """Weight of the error in inverse depth, where the capture has depth."""


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes while training, as shares of it."""

    resolution: tuple[float, ...] = (0.05, 0.15)
    """Images are drawn at 1/2^k of their size until the k-th number from the end: (0.05, 0.15) is a quarter until 5 % and
    a half until 15 %. Empty: full size throughout, as always where a step draws single pixels."""
    min_side: int = 64
    """No image is drawn with a shorter side than this, pixels."""
    settle: float = 0.2
    """Share at the end over which learning rates that do not decay already fall to a tenth."""
    sparse_adam: bool = True
    """Update only what the step's camera sees."""
    samples: int = 1 << 15
    """Along all rays of a step that draws single pixels; their number follows."""


@dataclass(frozen=True)
class ExposureConfig:
    """A brightness and colour correction for each training image."""

    enabled: bool = False
    lr: float = 1e-3
    """Decays to a tenth."""


@dataclass(frozen=True)
class PoseConfig:
    """Refinement of the training cameras' poses."""

    enabled: bool = False
    lr: float = 1e-4
    """Radians and scene units; decays to a hundredth."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 50
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tests: int = 4
    """How often the test views are measured on the way, at equal shares of the training."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; 0: only at the end. The newest two are kept."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0: by the clock alone."""
    tensorboard: bool = True
    """Write TensorBoard's event file beside metrics.jsonl."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a scene from photographs with known cameras."""

    scene: str = "garden"
    """A folder with photographs and poses, a name under $PRISMFIELD_DATA, or a bundled scene."""
    representation: Literal["gaussians", "convexes", "hash", "simplex", "triplane", "voxel", "hollow"] = "gaussians"
    """What to make: splats (Gaussians or smooth convexes), or a radiance field on a grid of cubes or of simplices, on planes, on voxels, or on a small grid
    of cubes with a mask of what matters."""
    strategy: Literal["adc", "mcmc", "split", "fixed", "occupancy"] | None = None
    """How primitives are added and dropped, default adc, for convexes split; radiance fields: how empty space is found, occupancy."""
    steps: int | None = None
    """Training steps; default 4000 unless `minutes` is given."""
    minutes: float | None = None
    """Time budget, may be a fraction; schedules fit themselves to it. Counts the time in training steps alone: reading, tests
    and checkpoints come on top. With `steps`, whichever ends first."""
    out: Path | None = None
    """The run's folder, new or empty; default runs/SCENE/TIME."""
    downscale: int = 1
    """Use images this many times smaller."""
    eval_every_nth: int | None = None
    """Keep every n-th image for testing (0: none); default: the capture's own split, or every 8th."""
    seed: int = 0
    """Of everything that is drawn at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto" takes CUDA where a rasterizer for it is at hand, else the CPU."""
    threads: int = 0
    """CPU threads; 0 takes every processor that this process may use."""
    backend: Literal["auto", "reference", "gsplat"] = "auto"
    """Who rasterizes: our kernels where there are any, plain PyTorch, or an installed gsplat on CUDA."""
    max_primitives: int = 150_000
    """Never more primitives than this."""
    init: Path | None = None
    """Start from the splats in this file (docs/formats.md) instead of from points."""
    resume: Path | None = None
    """Go on with the run in this folder, with its options; only when it ends and what is logged may be changed."""
    pause_at: int | None = None
    """Save and stop after this step, as Ctrl-C would; `resume` goes on from there."""
    viewer: bool = False
    """Serve a live view of the training to the browser."""
    viewer_port: int = 8080
    """Of the live view, on this machine."""
    data: DataConfig = field(default_factory=DataConfig)
    gaussians: GaussiansConfig = field(default_factory=GaussiansConfig)
    compact: CompactConfig = field(default_factory=CompactConfig)
    convexes: ConvexesConfig = field(default_factory=ConvexesConfig)
    hash: FieldConfig = field(default_factory=FieldConfig)
    simplex: FieldConfig = SIMPLEX
    triplane: FieldConfig = TRIPLANE
    voxel: VoxelConfig = field(default_factory=VoxelConfig)
    hollow: HollowConfig = field(default_factory=HollowConfig)
    adc: AdcConfig = field(default_factory=AdcConfig)
    mcmc: McmcConfig = field(default_factory=McmcConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    log: LogConfig = field(default_factory=LogConfig)


FREE_ON_RESUME = ("steps", "minutes", "resume", "pause_at", "viewer", "viewer_port", "threads", "log", "data.cache_mb")
"""Options that may differ when a run goes on; all others shaped what its checkpoints hold."""


def check_config(config: TrainConfig) -> None:
    """Raise a ValueError naming the first option that makes no sense."""
    infinity, least = float("inf"), 1e-12
    positive = ("steps", "minutes", "downscale", "max_primitives", "data.cache_mb", "data.initial_points", "log.every")
    made = ("gaussians.init_scale", "convexes.init_scale", "convexes.init_delta", "convexes.init_sigma")
    limits = dict.fromkeys((*positive, *made, "split.shrink"), (least, infinity))
    limits |= dict.fromkeys(("schedule.samples", "occupancy.interval"), (1, infinity))
    limits |= dict.fromkeys(
        ("loss.ssim_weight", "schedule.settle", "compact.prune", "adc.stop", "mcmc.stop", "split.stop"), (0, 1)
    )
    limits |= dict.fromkeys(("gaussians.init_opacity", "convexes.init_opacity"), (0, 1))
    limits |= {
        "seed": (0, 2**32 - 1),
        "threads": (0, 4096),
        "gaussians.sh_degree": (0, 3),
        "convexes.sh_degree": (0, 3),
        "convexes.points": (3, 12),
        "viewer_port": (1, 65535),
    }
    for name, value in _options(config):
        if isinstance(value, float) and not abs(value) < infinity:
            raise ValueError(f"--{_flag(name)}: expected a finite number, got {value}")
        low, high = limits.get(name, (0, infinity))
        if isinstance(value, int | float) and not low <= value <= high:
            expected = f"{low} to {high}" if high < infinity else "a positive number" if low == least else "0 or more"
            raise ValueError(f"--{_flag(name)}: expected {expected}, got {value}")
    if config.strategy not in (None, *(strategies := TRAINED_BY[config.representation])):
        raise ValueError(
            f"--strategy {config.strategy}: expected {' or '.join(strategies)} for {config.representation}"
        )
    if config.compact.asked and config.representation != "gaussians":
        raise ValueError(
            f"--compact.{config.compact.asked[0]}: expected gaussians, got --representation {config.representation}"
        )
    if config.compact.hash and (config.gaussians.sh_degree == 0 or config.init is not None):
        with_what = "--init, whose harmonics would be lost" if config.init is not None else "--gaussians.sh-degree 0"
        raise ValueError(f"--compact.hash: there is no sense in it with {with_what}")
    sizes = config.schedule.resolution
    if list(sizes) != sorted(sizes) or any(not 0 <= share <= 1 for share in sizes):
        raise ValueError(f"--schedule.resolution: expected rising shares between 0 and 1, got {sizes}")


def resolved(config: TrainConfig) -> TrainConfig:
    """The same training with every default that depends on another option spelled out."""
    strategy: Any = config.strategy or TRAINED_BY[config.representation][0]
    reg = 0.01 if strategy == "mcmc" else 0.0
    loss = config.loss
    loss = replace(
        loss,
        opacity_reg=reg if loss.opacity_reg is None else loss.opacity_reg,
        scale_reg=reg if loss.scale_reg is None else loss.scale_reg,
    )
    steps = DEFAULT_STEPS if config.steps is None and config.minutes is None else config.steps
    return replace(config, steps=steps, loss=loss, strategy=strategy)


def changed_options(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Dotted names of the options that differ."""
    before = dict(_options(old))
    return [name for name, value in _options(new) if before[name] != value]


def check_resumed(config: TrainConfig, saved: TrainConfig) -> None:
    """Raise a ValueError naming the options of `config` that must be as they were in the `saved` run and are not."""
    free = tuple(f"{name}." for name in FREE_ON_RESUME)
    if changed := [name for name in changed_options(saved, config) if not f"{name}.".startswith(free)]:
        before, now = dict(_options(saved)), dict(_options(config))
        details = ", ".join(f"--{_flag(name)} {now[name]} (was {before[name]})" for name in changed)
        raise ValueError(f"--resume {config.resume}: cannot go on with {details}; leave that out or start a new run")


def command_line(config: TrainConfig) -> str:
    """The command that trains with this (resolved) config."""
    first = TrainConfig()
    # What else is by default depends on these three.
    plain = replace(first, representation=config.representation, minutes=config.minutes)
    defaults = dict(_options(resolved(replace(plain, strategy=config.strategy))))
    defaults |= {"scene": None, "representation": first.representation, "minutes": first.minutes}
    defaults |= {"strategy": resolved(plain).strategy}
    words = ["render-train"]
    for name, value in _options(config):
        if value == defaults[name] or name in ("out", "resume", "pause_at"):
            continue
        if isinstance(value, bool):
            *group, last = _flag(name).split(".")
            words.append(f"--{'.'.join([*group, last if value else f'no-{last}'])}")
        else:
            words += [f"--{_flag(name)}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def to_json(config: TrainConfig) -> str:
    """The config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)


def from_json(text: str, source: str) -> TrainConfig:
    """The config that `to_json` wrote; options that it lacks take their defaults.

    Raises:
        ValueError: it is not JSON, or has an option that there is not; the message names `source`.
    """
    try:
        return _build(TrainConfig, json.loads(text))
    except ValueError as error:
        raise ValueError(f"{source}: not a training config of this version ({error})") from None


def _build(cls: type, values: Any, prefix: str = "") -> Any:
    """The config from JSON's objects, each option of its type."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the file'}: expected options, got {values!r}")
    hints = get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"unknown option {', '.join(prefix + name for name in sorted(unknown))}")
    return cls(**{name: _value(hints[name], value, prefix + name) for name, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """What JSON has for the option `name`, as the type that `hint` says."""
    origin, parts = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, f"{name}.")
    if type(None) in parts:
        return None if value is None else _value(parts[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(parts[0], item, name) for item in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint or (origin is Literal and value in parts):
        return value
    expected = " or ".join(parts) if origin is Literal else getattr(hint, "__name__", hint)
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every option, groups opened up."""
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{part.name}.")
        else:
            yield f"{prefix}{part.name}", value


def _flag(name: str) -> str:
    """An option as the command line spells it."""
    return name.replace("_", "-")


def parse_arguments(args: list[str] | None = None) -> TrainConfig:
    """The config from the command line; with `--resume`, what is not mentioned is as the run has it.

    Raises:
        ValueError: the run to go on with cannot be, or not with these options.
    """
    import argparse

    import tyro

    first = argparse.ArgumentParser("render-train", add_help=False, allow_abbrev=False)
    first.add_argument("--resume", type=Path)
    folder = first.parse_known_args(args)[0].resume
    if folder is None:
        return tyro.cli(TrainConfig, args=args, prog="render-train")
    from prismfield.train.folder import read_config

    saved = read_config(folder)
    # A pause belongs to the command that asked for it.
    config = tyro.cli(TrainConfig, args=args, prog="render-train", default=replace(saved, pause_at=None, resume=folder))
    check_resumed(config, saved)
    return config
