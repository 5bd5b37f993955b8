"""What the two experiments of the training-strategies study share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from flax import linen as nn

from experiments.command import run_command, workdir_from
from experiments.config import config_from_flags, define_flags, parse_flags
from jaxfi.faults import PyTree
from jaxfi.slicing import ApplyFn


def apply_function(module: nn.Module) -> ApplyFn:
    """The network as a function of its variables, so that one compilation serves all trainings."""

    def apply_fn(variables: PyTree, images: jax.Array) -> jax.Array:
        return module.apply(variables, images, train=False)

    return apply_fn


def require(settings: Any, name: str, condition: bool, allowed: str) -> None:
    """Raises ValueError, in one line, for a setting that is not allowed."""
    if not condition:
        raise ValueError(f"{name} is {getattr(settings, name)!r}; allowed: {allowed}")


def integers(settings: Any, name: str) -> list[int]:
    """The setting called `name`, a list of texts, as integers >= 0."""
    texts = getattr(settings, name)
    require(settings, name, all(text.isdecimal() for text in texts), "integers >= 0")
    return [int(text) for text in texts]


def run_from_flags(run: Callable[[Any, Path], Any], settings: type) -> None:
    """A command line for `run(settings, workdir)`; exits with one line that says what is wrong."""

    def from_flags() -> None:
        workdir = workdir_from(flags.FLAGS)
        run(config_from_flags(flags.FLAGS, settings), workdir)

    assert dataclasses.is_dataclass(settings)
    define_flags(flags.FLAGS, settings)
    app.run(lambda argv: run_command(argv, from_flags), flags_parser=parse_flags)
