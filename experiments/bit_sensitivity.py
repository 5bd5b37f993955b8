"""Which bits of a weight matter? Accuracy with k random weights flipped in one bit position.

One trained network, its weights stored as float64 (the study's 64 positions), float32, bfloat16,
float16 and int8 (symmetric, one scale a channel). Words of 32 bits or fewer are computed with in
float32, those of 64 bits in float64. The same weights are hit at every bit and in every dtype.
Writes accuracy_by_bit.csv, bit_effects.csv and the figures.

    python -m experiments.bit_sensitivity \\
        --flagfile=experiments/flags/bit_sensitivity_smoke.flags --workdir=runs/bits
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.config import check_same_config, claim_workdir, setting
from experiments.common.study import (
    apply_function,
    initial_shapes,
    integers,
    load_network,
    require,
    require_weights,
    run_from_flags,
    train_network,
    weight_leaves,
)
from experiments.gr import load_images
from jaxfi.campaign import cumulative_accuracy, draw_trials
from jaxfi.data import DATASETS, Dataset, first_test_images, read_csv, write_csv
from jaxfi.faults import (
    BitEffect,
    bit_effects,
    leaf_paths,
    stored_weights,
    word_bits,
)
from jaxfi.models import MODELS, PyTree
from jaxfi.network import ApplyFn, quantize, with_quantized_weights
from jaxfi.outcomes import NAN_POLICIES
from jaxfi.report.study import BIT_COLUMNS, write_study
from jaxfi.training import TrainConfig, with_matmul_convolutions

DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the result; each field is a flag of the same name."""

    dataset: str = setting("digits", "digits, mnist or cifar10.")
    model: str = setting("lenet", "Network: a name in jaxfi.models.MODELS.")
    weights: str = setting("", "Checkpoint of its variables; none: train one as said below.")
    optimizer: str = setting("sgd", "adadelta, adam, sgd, adagrad or rmsprop.")
    learning_rate: float = setting(0.1, "Initial learning rate.")
    schedule: str = setting("cosine", "constant, step, cosine or plateau.")
    epochs: int = setting(10, "Epochs of the training.")
    batch_size: int = setting(128, "Images per training step.")
    num_train_images: int = setting(0, "Training images to use, the first ones; 0 is all.")
    dtypes: Sequence[str] = setting(DTYPES, f"What a stored word is: {', '.join(DTYPES)}.")
    num_faults: Sequence[str] = setting(("1", "1000", "10000"), "Weights with the bit flipped.")
    paths: str = setting("*kernel", "Pattern of the arrays whose elements are weights.")
    trials: int = setting(10, "Fault lists, the same for every bit and dtype.")
    num_images: int = setting(0, "Test images that faulty networks see, the first ones; 0 is all.")
    injection_batch_size: int = setting(500, "Images that run together through a faulty network.")
    trials_together: int = setting(
        1, "Faulty networks that run together: more on a GPU.", decides=False
    )
    nan: str = setting("argmax", "What a NaN output counts as: argmax (as published) or critical.")
    seed: int = setting(0, "Seed of the training and of the faults.")

    def validate(self) -> None:
        """Raises ValueError, in one line, for a setting that is not allowed."""
        for name, names in (("dataset", DATASETS), ("model", MODELS), ("nan", NAN_POLICIES)):
            require(self, name, getattr(self, name) in names, ", ".join(names))
        for name in ("trials", "injection_batch_size", "trials_together"):
            require(self, name, getattr(self, name) >= 1, "integers >= 1")
        for name in ("num_train_images", "num_images"):
            require(self, name, getattr(self, name) >= 0, "integers >= 0")
        known = len(self.dtypes) == len({*self.dtypes} & {*DTYPES}) > 0
        require(self, "dtypes", known, f"once each, {', '.join(DTYPES)}")
        rising = integers(self, "num_faults")
        require(self, "num_faults", rising == sorted(set(rising)) != [], "rising integers")
        self.training().validate()

    def training(self) -> TrainConfig:
        """The settings of the training: those that have the same name here."""
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {name: value for name, value in vars(self).items() if name in names}
        return TrainConfig(augment=None, **given)


class Stored(NamedTuple):
    """A network as the memory holds it."""

    words: PyTree
    """The variables; those that get faults are of the stored dtype."""
    apply_fn: ApplyFn
    """Computes with them."""
    images: np.ndarray
    """Of the dtype that is computed with."""


def run(settings: Settings, workdir: Path) -> None:
    """Flips every bit position of every dtype. What `workdir` holds is not done again.

    Raises ValueError or OSError, in one line, and before any work for all that is known then.
    """
    settings.validate()
    check_same_config(settings, workdir)
    dataset = load_images(settings)  # type: ignore[arg-type]
    shapes = initial_shapes(settings.model, dataset)
    require_weights(settings, "num_faults", integers(settings, "num_faults")[-1], shapes)
    given = load_network(settings, shapes) if settings.weights else None
    claim_workdir(settings, workdir)
    variables = jax.device_get(given or train_network(settings, dataset, workdir / "network"))
    path = workdir / "accuracy_by_bit.csv"
    rows: list[Any] = []
    if path.exists():
        rows = [list(row.values()) for row in read_csv(path, BIT_COLUMNS)]
    effects: list[Any] = []
    for dtype in settings.dtypes:
        with words_of(dtype):
            stored = store(settings, dtype, variables, dataset)
            effects += [[dtype, *effect] for effect in effects_of(settings, stored)]
            for bit in reversed(range(word_bits(dtype))):
                if not any((row[0], int(row[1])) == (dtype, bit) for row in rows):
                    rows += flip_bit(settings, dtype, bit, stored, dataset)
                    write_csv(path, BIT_COLUMNS, rows)
    write_csv(workdir / "bit_effects.csv", ("dtype", *BitEffect._fields), effects)
    write_study(workdir)


@contextlib.contextmanager
def words_of(dtype: str) -> Iterator[None]:
    """64-bit words where they are asked for, and sums in the words' own precision."""
    wide = jax.enable_x64(True) if word_bits(dtype) == 64 else contextlib.nullcontext()
    with wide, jax.default_matmul_precision("highest"):
        yield


def store(settings: Settings, dtype: str, variables: PyTree, dataset: Dataset) -> Stored:
    """The network with its weights stored as `dtype`."""
    apply_fn = apply_function(MODELS[settings.model](num_classes=dataset.num_classes))
    images, _ = first_test_images(dataset, settings.num_images)
    if dtype == "int8":
        words, scales = quantize(variables, settings.paths)
        return Stored(words, with_quantized_weights(apply_fn, scales), images)
    if dtype == "float64":
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        if jax.default_backend() == "cpu":  # where XLA's of doubles take 2.7 times as long
            apply_fn = with_matmul_convolutions(apply_fn)
        return Stored(wide, apply_fn, images.astype(np.float64))

    def widened(words: PyTree, images: jax.Array) -> jax.Array:
        return apply_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), words), images)

    names = leaf_paths(variables)
    leaves, structure = jax.tree.flatten(variables)
    narrow = [
        leaf.astype(jnp.dtype(dtype)) if fnmatch.fnmatchcase(name, settings.paths) else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return Stored(jax.tree.unflatten(structure, narrow), widened, images)


def effects_of(settings: Settings, stored: Stored) -> list[BitEffect]:
    """What each bit does to the weights that get faults."""
    return bit_effects(stored_weights(weight_leaves(settings.paths, stored.words)))


def flip_bit(
    settings: Settings, dtype: str, bit: int, stored: Stored, dataset: Dataset
) -> list[list[Any]]:
    """The rows of one bit position."""
    counts = integers(settings, "num_faults")
    trials = draw_trials(
        settings.seed, stored.words, counts[-1], settings.trials,
        model="bit-flip", bit=bit, paths=settings.paths,
    )  # fmt: skip
    labels = dataset.test_labels[: len(stored.images)]
    result = cumulative_accuracy(
        stored.apply_fn, stored.words, trials, stored.images, labels, counts,
        batch_size=settings.injection_batch_size,
        trials_together=settings.trials_together,
        nan=settings.nan,
    )  # fmt: skip
    return [
        [dtype, bit, counts[step], trial, float(accuracy), int(result.num_non_finite[trial, step])]
        for (trial, step), accuracy in np.ndenumerate(result.accuracy)
    ]


if __name__ == "__main__":
    run_from_flags(run, Settings)
