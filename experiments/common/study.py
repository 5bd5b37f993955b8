"""What the two experiments of the training-strategies study share."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import linen as nn

from experiments.common.command import run_command, workdir_from
from experiments.common.config import config_from_flags, define_flags, parse_flags
from jaxfi.data import Dataset
from jaxfi.faults import described_leaves, leaf_paths
from jaxfi.models import MODELS, PyTree
from jaxfi.network import ApplyFn
from jaxfi.training import load_variables, train


def apply_function(module: nn.Module) -> ApplyFn:
    """The network as a function of its variables, so that one compilation serves all trainings."""

    def apply_fn(variables: PyTree, images: jax.Array) -> jax.Array:
        return module.apply(variables, images, train=False)

    return apply_fn


def require(settings: Any, name: str, condition: bool, allowed: str) -> None:
    """Raises ValueError, in one line, for a setting that is not allowed."""
    if not condition:
        raise ValueError(f"{name} is {getattr(settings, name)!r}; allowed: {allowed}")


def weight_leaves(paths: str, variables: PyTree) -> list[Any]:
    """The arrays whose elements are weights: those whose path matches the pattern."""
    named = zip(leaf_paths(variables), jax.tree.leaves(variables), strict=True)
    return [leaf for name, leaf in named if fnmatch.fnmatchcase(name, paths)]


def require_weights(settings: Any, name: str, most: int, variables: PyTree) -> None:
    """Raises ValueError if the setting called `name` asks for more faults than there are weights.

    `variables` may be their shapes.
    """
    chosen = weight_leaves(settings.paths, variables)
    require(settings, "paths", bool(chosen), f"patterns of {', '.join(leaf_paths(variables))}")
    number = sum(leaf.size for leaf in chosen)
    require(settings, name, most <= number, f"up to the {number:,} weights of this network")


def load_network(settings: Any, shapes: PyTree) -> PyTree:
    """The variables of the training that `weights` names. Raises ValueError if they are of another
    network than these shapes."""
    variables = load_variables(settings.weights)
    found, wanted = described_leaves(variables), described_leaves(shapes)
    different = [path for path in wanted | found if wanted.get(path) != found.get(path)]
    allowed = f"a {settings.model} for {settings.dataset}; other leaves: {', '.join(different)}"
    require(settings, "weights", not different, allowed)
    return variables


def train_network(settings: Any, dataset: Dataset, folder: Path) -> PyTree:
    """The variables after the last epoch of `settings.training()`; `folder` keeps the training."""
    module = MODELS[settings.model](num_classes=dataset.num_classes)
    return train(module, dataset, settings.training(), workdir=folder, progress=True).variables


def initial_shapes(model: str, dataset: Dataset) -> PyTree:
    """Shapes and dtypes of the network's variables, none of which is computed."""
    module = MODELS[model](num_classes=dataset.num_classes)
    image = jax.ShapeDtypeStruct((1, *dataset.train_images.shape[1:]), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)


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
