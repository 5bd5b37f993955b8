"""Which trainings a study compares: sweeps such as `optimizer=sgd weight_decay=0,5e-5`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxfi.training import NUMBERS, TrainConfig

_PARSE: dict[str, Any] = {
    "optimizer": str,
    "schedule": str,
    "batch_size": int,
    "weight_decay": float,
    "learning_rate": float,
    "alpha": float,
    "epochs": int,
    "seed": int,
}
_LETTERS = {"learning_rate": "lr", "alpha": "a", "epochs": "e", "seed": "s"}


class Strategy(NamedTuple):
    """One training, and its name: of folders, table rows and legends."""

    name: str
    recipe: str
    """The name without the seed: strategies of one recipe are trainings by chance different."""
    config: TrainConfig


def list_strategies(sweeps: Sequence[str], base: TrainConfig) -> list[Strategy]:
    """Every combination of the values of each sweep, each once; `base` says what sweeps do not.

    Raises ValueError for a sweep that cannot be read, or a strategy that is not allowed.

    >>> sweeps = ["optimizer=sgd,adam", "optimizer=sgd weight_decay=0,5e-3"]
    >>> [strategy.name for strategy in list_strategies(sweeps, TrainConfig(schedule="constant"))]
    ['sgd-constant-b64-wd0', 'adam-constant-b64-wd0', 'sgd-constant-b64-wd0.005']
    """
    strategies: dict[TrainConfig, Strategy] = {}
    for sweep in sweeps or [""]:
        values = parse_sweep(sweep)
        for combination in itertools.product(*values.values()):
            config = dataclasses.replace(base, **dict(zip(values, combination, strict=True)))
            config.validate()
            recipe = name_of(dataclasses.replace(config, seed=base.seed), base)
            strategies[config] = Strategy(name_of(config, base), recipe, config)
    return list(strategies.values())


def parse_sweep(text: str) -> dict[str, list[Any]]:
    """`optimizer=sgd weight_decay=0,5e-5` as lists of values by setting."""
    values: dict[str, list[Any]] = {}
    for part in text.split():
        name, equals, given = part.partition("=")
        if not equals or name not in _PARSE or name in values:
            allowed = f"settings once each, as name=value,value, of {', '.join(_PARSE)}"
            raise ValueError(f"sweep {text!r}: {part!r} is not one; allowed: {allowed}")
        try:
            values[name] = [_PARSE[name](value) for value in given.split(",")]
        except ValueError:
            kind = _PARSE[name].__name__
            raise ValueError(f"sweep {text!r}: {part!r} needs values of type {kind}") from None
    return values


def name_of(config: TrainConfig, base: TrainConfig) -> str:
    """The four settings of the study, and any other that differs from `base`."""
    parts = [config.optimizer, config.schedule]
    parts += [f"b{config.batch_size}", f"wd{_digits(config.weight_decay)}"]
    for setting, letters in _LETTERS.items():
        value = getattr(config, setting)
        if value != getattr(base, setting):
            parts.append(f"{letters}{_digits(value)}")
    return "-".join(parts)


def _digits(value: float) -> str:
    """As many digits as tell a number from all others, so that no two settings share a name."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def groups(strategies: Sequence[Strategy], most: int) -> list[list[Strategy]]:
    """Strategies that can train together, at most `most` of them, in the order of the first."""
    alike: dict[tuple, list[Strategy]] = {}
    for strategy in strategies:
        settings = dataclasses.asdict(strategy.config)
        shared = {name: value for name, value in settings.items() if name not in NUMBERS}
        # A penalty costs a second derivative, so those without one keep apart.
        key = (strategy.config.alpha > 0, repr(shared))
        alike.setdefault(key, []).append(strategy)
    return [
        members[start : start + most]
        for members in alike.values()
        for start in range(0, len(members), most)
    ]
