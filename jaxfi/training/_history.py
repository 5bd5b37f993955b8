"""What training leaves beside its checkpoints: curves as CSV and for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.data._files import write_csv


class EpochRecord(NamedTuple):
    """One row of training.csv. Accuracies are fractions."""

    epoch: int
    """From 1."""
    learning_rate: float
    train_loss: float
    """Mean cross-entropy over the epoch's batches, with dropout and augmentation, no penalty."""
    penalty: float
    """Mean ‖∇L‖² over the epoch's batches, not multiplied by α."""
    train_accuracy: float
    """Of the epoch's batches, with dropout and augmentation, before each update."""
    test_loss: float
    test_accuracy: float
    seconds: float
    """Wall time of the epoch; of a resumed one, that since the resumption."""
    weight_mean: float | None = None
    """Over all weights at the epoch's end, as the next two; see `weight_statistics`."""
    weight_std: float | None = None
    weight_l2: float | None = None
    held_out_loss: float | None = None
    """Mean cross-entropy of the held-out training images, if any."""


class WeightStatistics(NamedTuple):
    """Of all weights of a network together, in float64."""

    mean: float
    std: float
    """Population standard deviation."""
    l2: float
    """The Euclidean norm."""


def weight_statistics(params: Any) -> WeightStatistics:
    """Mean, standard deviation and norm of the weights: the arrays of two axes or more (kernels).

    Biases and BatchNorm's parameters, which have one axis, are no weights.

    >>> weight_statistics({"kernel": np.array([[3.0], [-3.0]]), "bias": np.ones(1)})
    WeightStatistics(mean=0.0, std=3.0, l2=4.242640687119285)
    """
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.device_get(params))]
    kernels = [leaf for leaf in leaves if leaf.ndim >= 2]
    count = sum(leaf.size for leaf in kernels)
    mean = sum(leaf.sum() for leaf in kernels) / count
    spread = sum(np.square(leaf - mean).sum() for leaf in kernels)
    squares = sum(np.square(leaf).sum() for leaf in kernels)
    return WeightStatistics(float(mean), math.sqrt(spread / count), math.sqrt(squares))


def write_history(history: Sequence[EpochRecord], workdir: Path) -> None:
    """Writes `workdir`/training.csv, whole."""
    write_csv(workdir / "training.csv", EpochRecord._fields, history)


def write_tensorboard(history: Sequence[EpochRecord], workdir: Path) -> None:
    """Writes the last record to `workdir`/tensorboard; points of undone epochs are purged."""
    from tensorboardX import SummaryWriter

    record = history[-1]
    with SummaryWriter(str(workdir / "tensorboard"), purge_step=record.epoch) as writer:
        for name, value in record._asdict().items():
            if name != "epoch" and value is not None:
                writer.add_scalar(name, value, record.epoch)
