"""Every option of a training. No torch here: the command line reads this before it parses its arguments."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from prismfield.representations.config import GaussiansConfig
from prismfield.train.strategies.config import AdcConfig, McmcConfig


@dataclass(frozen=True)
class DataConfig:
    """Images and the points to start from."""

    cache_mb: int = 2048
    """Decoded images kept in memory, megabytes; beyond it they are decoded again when needed."""
    points: Literal["auto", "cloud", "triangulate", "random"] = "auto"
    """Where to start: the capture's point cloud; points triangulated from matched features; random ones. "auto" takes
    the first that there is."""
    initial_points: int = 20_000
    """How many points to make where the capture has no cloud."""
    masks: bool = True
    """Leave masked pixels out of the loss and of the metrics."""
    random_background: bool = False
    """Blend images with an alpha channel over a new colour each step, instead of always over the same."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss."""

    ssim_weight: float = 0.2
    """Share of 1 - SSIM beside the mean absolute error."""
    opacity_reg: float | None = None
    """Weight of the mean opacity; default: 0.01 with mcmc, which lives on opacities that fall, else 0."""
    scale_reg: float | None = None
    """Weight of the mean standard deviation, scene units; default: 0.01 with mcmc, else 0."""
    depth_weight: float = 0.0
    """Weight of the error in inverse depth, where the capture has depth."""


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes while training, as shares of it."""

    resolution: tuple[float, ...] = (0.1, 0.3)
    """Images are drawn at 1/2^k of their size until the k-th number from the end: (0.1, 0.3) is a quarter until 10 % and a
    half until 30 %. Empty: full size throughout."""
    min_side: int = 64
    """No image is drawn with a shorter side than this, pixels."""
    sparse_adam: bool = True
    """Update only what the step's camera sees."""


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
    test_times: int = 4
    """How often a few test views are measured on the way."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; the last is always kept."""
    tensorboard: bool = True


@dataclass(frozen=True)
class TrainConfig:
    """Train a scene."""

    scene: str = "garden"
    """A folder with photographs and poses, a name under $PRISMFIELD_DATA, or a bundled scene."""
    representation: Literal["gaussians"] = "gaussians"
    strategy: Literal["adc", "mcmc", "fixed"] = "adc"
    """How primitives are added and dropped."""
    steps: int | None = None
    """Training steps; default 7000 unless `minutes` is given."""
    minutes: float | None = None
    """Time budget for the training alone; schedules fit themselves to it. With `steps`, whichever ends first."""
    out: Path | None = None
    """The run's folder; default runs/SCENE/TIME."""
    downscale: int = 1
    """Use images this many times smaller."""
    eval_every_nth: int | None = None
    """Keep every n-th image for testing (0: none); default: the capture's own split, or every 8th."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """Processor threads; 0 takes all."""
    backend: Literal["auto", "reference", "gsplat"] = "auto"
    """Who rasterizes: our kernels where there are any, plain PyTorch, or an installed gsplat on CUDA."""
    max_primitives: int = 200_000
    """Never more primitives than this."""
    init: Path | None = None
    """Start from the splats in this .ply instead of from points."""
    resume: Path | None = None
    """Go on with the run in this folder."""
    pause_at: int | None = None
    """Save and stop after this step, as Ctrl-C would; `resume` goes on from there."""
    viewer: bool = False
    """Open the live view in a browser."""
    data: DataConfig = field(default_factory=DataConfig)
    gaussians: GaussiansConfig = field(default_factory=GaussiansConfig)
    adc: AdcConfig = field(default_factory=AdcConfig)
    mcmc: McmcConfig = field(default_factory=McmcConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    pose: PoseConfig = field(default_factory=PoseConfig)
    log: LogConfig = field(default_factory=LogConfig)


FREE_ON_RESUME = ("steps", "minutes", "out", "resume", "pause_at", "viewer", "threads", "log", "init", "device")
"""Fields that a resumed run may change; all others shaped what the checkpoint holds."""


def check_config(config: TrainConfig) -> None:
    """Raise a ValueError naming the first option that makes no sense."""
    positive = {
        "steps": config.steps,
        "minutes": config.minutes,
        "downscale": config.downscale,
        "max_primitives": config.max_primitives,
        "data.cache_mb": config.data.cache_mb,
        "data.initial_points": config.data.initial_points,
        "log.every": config.log.every,
        "pause_at": config.pause_at,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    for name, number in {"threads": config.threads, "eval_every_nth": config.eval_every_nth or 0}.items():
        if number < 0:
            raise ValueError(f"{name}: expected 0 or more, got {number}")
    if not 0 <= config.loss.ssim_weight <= 1:
        raise ValueError(f"loss.ssim_weight: expected 0 to 1, got {config.loss.ssim_weight}")
    if not 0 <= config.gaussians.sh_degree <= 3:
        raise ValueError(f"gaussians.sh_degree: expected 0 to 3, got {config.gaussians.sh_degree}")
    if list(config.schedule.resolution) != sorted(config.schedule.resolution):
        raise ValueError(f"schedule.resolution: expected rising shares, got {config.schedule.resolution}")


def to_json(config: TrainConfig) -> str:
    """The config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=1, default=str)


def from_json(text: str, source: str) -> TrainConfig:
    """The config that `to_json` wrote; fields that it lacks take their defaults.

    Raises:
        ValueError: it is not JSON, or has a field that there is not; the message names `source`.
    """
    try:
        return _build(TrainConfig, json.loads(text))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{source}: not a training config of this version ({error})") from None


def _build(cls: type, values: dict[str, Any]) -> Any:
    hints = get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"unknown option {', '.join(sorted(unknown))}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            value = _build(hint, value)
        elif get_origin(hint) is tuple:
            value = tuple(value)
        elif value is not None and (hint is Path or Path in get_args(hint)):
            value = Path(value)
        built[name] = value
    return cls(**built)


def parse_arguments(args: list[str] | None = None) -> TrainConfig:
    """The config from the command line."""
    return tyro.cli(Annotated[TrainConfig, tyro.conf.arg(name="")], args=args, prog="render-train")
