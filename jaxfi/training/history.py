"""What training leaves beside its checkpoints: curves as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxfi.files import write_whole


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


def write_history(history: Sequence[EpochRecord], workdir: Path) -> None:
    """Writes `workdir`/training.csv, whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EpochRecord._fields)
    writer.writerows(history)
    write_whole(workdir / "training.csv", text.getvalue().encode())


def write_tensorboard(history: Sequence[EpochRecord], workdir: Path) -> None:
    """Writes the last record to `workdir`/tensorboard; points of undone epochs are purged."""
    from tensorboardX import SummaryWriter

    record = history[-1]
    with SummaryWriter(str(workdir / "tensorboard"), purge_step=record.epoch) as writer:
        for name, value in record._asdict().items():
            if name != "epoch":
                writer.add_scalar(name, value, record.epoch)
