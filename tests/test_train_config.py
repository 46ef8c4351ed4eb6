"""Options of a training: they survive files and command lines, and what makes no sense is named."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from prismfield.representations.base import REPRESENTATIONS
from prismfield.representations.config import TRAINED_BY
from prismfield.train.config import (
    TrainConfig,
    changed_options,
    check_config,
    check_resumed,
    command_line,
    from_json,
    parse_arguments,
    resolved,
    to_json,
)
from prismfield.train.strategies.base import STRATEGIES


def options(cls: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of every option there is."""
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from options(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_option(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_option(getattr(config, first), rest, value) if rest else value})


def another(hint: Any, value: Any) -> Any:
    """Some value of that type that is not `value`."""
    origin, parts = get_origin(hint), get_args(hint)
    if type(None) in parts:
        return another(parts[0], value)
    if origin is Literal:
        return next(choice for choice in reversed(parts) if choice != value)
    if origin is tuple:
        return (3, 2, 1) if int in parts else (0.125, 0.25, 0.5)
    if hint is bool:
        return not value
    return {int: 2 if value == 3 else 3, float: 0.0375, str: "another one", Path: Path("some folder/it's here")}[hint]


def everything_changed() -> TrainConfig:
    config = TrainConfig()
    for name, hint in options():
        config = with_option(config, name, another(hint, value_of(config, name)))
    return replace(config, strategy="occupancy")


def test_every_option_survives_its_file() -> None:
    changed = everything_changed()
    names = [name for name, _ in options()]
    assert len(names) > 60
    assert changed_options(TrainConfig(), changed) == names
    for config in (TrainConfig(), changed):
        assert from_json(to_json(config), "a file") == config
        json.loads(to_json(config), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_options_that_a_file_lacks_take_their_defaults() -> None:
    assert from_json('{"steps": 3, "minutes": 2, "adc": {"start": 7}}', "a file") == replace(
        TrainConfig(), steps=3, minutes=2.0, adc=replace(TrainConfig().adc, start=7)
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "Expecting property name"),
        ("3", "the file: expected options, got 3"),
        ('{"colour": 1}', "unknown option colour"),
        ('{"adc": {"colour": 1}}', r"unknown option adc\.colour"),
        ('{"data": null}', "data: expected options, got None"),
        ('{"steps": "200"}', "steps: expected int, got '200'"),
        ('{"steps": 2.5}', r"steps: expected int, got 2\.5"),
        ('{"viewer": 1}', "viewer: expected bool, got 1"),
        ('{"seed": true}', "seed: expected int, got True"),
        ('{"scene": null}', "scene: expected str, got None"),
        ('{"strategy": "magic"}', "strategy: expected adc or mcmc or split or fixed or occupancy, got 'magic'"),
        ('{"schedule": {"resolution": [0.5, "a"]}}', r"schedule\.resolution: expected float, got 'a'"),
        ('{"schedule": {"resolution": 0.5}}', r"schedule\.resolution: expected tuple, got 0\.5"),
    ],
)
def test_files_that_are_no_config(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^a/config\.json: not a training config of this version \({named}"):
        from_json(text, "a/config.json")


def test_a_reports_command_gives_the_same_training() -> None:
    """What does not belong to the training is left out of it: where it went, and how it was gone on with."""
    config = with_option(resolved(everything_changed()), "viewer", False)
    words = shlex.split(command_line(config))
    assert words[0] == "render-train"
    given = replace(config, out=None, resume=None, pause_at=None)
    assert resolved(parse_arguments(words[1:])) == given


@pytest.mark.parametrize("strategy", ["adc", "mcmc"])
@pytest.mark.parametrize("length", [{}, {"steps": 30}, {"minutes": 0.5}, {"steps": 30, "minutes": 0.5}])
def test_defaults_that_depend_on_others(strategy: Any, length: dict[str, Any]) -> None:
    config = resolved(TrainConfig(strategy=strategy, **length))
    assert config.loss.opacity_reg == config.loss.scale_reg == (0.01 if strategy == "mcmc" else 0.0)
    assert config.steps == length.get("steps", None if "minutes" in length else 4000)
    assert resolved(config) == config
    words = ["--strategy", strategy] if strategy != "adc" else []
    words += [word for name, value in length.items() for word in (f"--{name}", str(value))]
    assert command_line(config) == " ".join(["render-train", "--scene", "garden", *words])
    assert config.strategy == strategy
    own = resolved(with_option(TrainConfig(strategy=strategy), "loss.opacity_reg", 0.0))
    assert own.loss.opacity_reg == 0.0


@pytest.mark.parametrize("representation", TRAINED_BY)
def test_the_default_strategy_suits_the_representation(representation: Any) -> None:
    config = resolved(TrainConfig(representation=representation))
    check_config(config)
    assert config.strategy == TRAINED_BY[representation][0] and config.strategy in STRATEGIES
    words = ["--representation", representation] if representation != "gaussians" else []
    assert command_line(config) == " ".join(["render-train", "--scene", "garden", *words])
    assert set(TRAINED_BY) == set(REPRESENTATIONS)


@pytest.mark.parametrize(("representation", "strategy"), [("hash", "adc"), ("gaussians", "occupancy")])
def test_a_strategy_for_something_else(representation: Any, strategy: Any) -> None:
    expected = " or ".join(TRAINED_BY[representation])
    with pytest.raises(ValueError, match=rf"^--strategy {strategy}: expected {expected} for {representation}$"):
        check_config(TrainConfig(representation=representation, strategy=strategy))


def test_the_defaults_make_sense_and_so_does_every_other_value() -> None:
    check_config(TrainConfig())
    changed = everything_changed()  # of another representation too
    with pytest.raises(ValueError, match=r"^--compact\.prune: expected gaussians, got --representation hollow$"):
        check_config(resolved(changed))
    check_config(resolved(replace(changed, compact=TrainConfig().compact)))


@pytest.mark.parametrize("name", [name for name, hint in options() if float in (hint, *get_args(hint))])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_cannot_be_are_refused_by_name(name: str, value: float) -> None:
    given = (value,) if name == "schedule.resolution" else value
    with pytest.raises(ValueError, match=rf"^--{re.escape(name.replace('_', '-'))}: expected .*, got .*{value}"):
        check_config(with_option(TrainConfig(), name, given))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("steps", 1, None),
        ("downscale", 1, None),
        ("max_primitives", 1, None),
        ("data.initial_points", 1, None),
        ("log.every", 1, None),
        ("gaussians.sh_degree", 0, 3),
        ("convexes.points", 3, 12),
        ("split.stop", 0, 1),
        ("seed", 0, 2**32 - 1),
        ("threads", 0, 4096),
        ("viewer_port", 1, 65535),
        ("schedule.settle", 0, 1),
        ("schedule.samples", 1, None),
        ("occupancy.interval", 1, None),
        ("adc.stop", 0, 1),
        ("pause_at", 0, None),
    ],
)
def test_limits_are_where_they_should_be(name: str, low: float, high: float | None) -> None:
    flag = name.replace("_", "-")
    check_config(with_option(TrainConfig(), name, low))
    with pytest.raises(ValueError, match=rf"^--{flag}: expected"):
        check_config(with_option(TrainConfig(), name, low - 1))
    if high is not None:
        check_config(with_option(TrainConfig(), name, high))
        with pytest.raises(ValueError, match=rf"^--{flag}: expected {low} to {high}, got"):
            check_config(with_option(TrainConfig(), name, high + 1))


@pytest.mark.parametrize("shares", [(0.5, 0.2), (0.1, 1.2)])
def test_resolutions_rise_within_the_training(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"--schedule\.resolution: expected rising shares"):
        check_config(with_option(TrainConfig(), "schedule.resolution", shares))


def test_only_what_shaped_a_run_must_stay() -> None:
    saved = resolved(TrainConfig(scene="here"))
    free = {"steps", "minutes", "resume", "pause_at", "viewer", "viewer_port", "threads", "data.cache_mb"}
    free |= {name for name, _ in options() if name.startswith("log.")}
    for name, hint in options():
        value = another(hint, value_of(saved, name))
        changed = replace(with_option(saved, name, value), resume=Path("run"))
        if name in free:
            check_resumed(changed, saved)
        else:
            with pytest.raises(ValueError, match=rf"^--resume run: .*--{re.escape(name.replace('_', '-'))} .*\(was "):
                check_resumed(changed, saved)


def test_a_resumed_command_takes_the_runs_options_but_not_its_pause(tmp_path: Path) -> None:
    saved = replace(resolved(TrainConfig(scene="here", downscale=4, steps=60)), pause_at=30, threads=2)
    (tmp_path / "config.json").write_text(to_json(saved))
    config = parse_arguments(["--steps", "90", "--resume", str(tmp_path)])
    assert config == replace(saved, steps=90, pause_at=None, resume=tmp_path)
    assert parse_arguments([f"--resume={tmp_path}"]).steps == 60
