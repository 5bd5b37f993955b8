"""What the experiments of the training-strategies study log: the tables' columns, and their rows.

Every table is of text; figures and further tables are made of nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxfi.campaign._cumulative import counts_of_range

TRAINING_COLUMNS = (
    "strategy", "epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy",
    "weight_mean", "weight_std", "weight_l2",
)  # fmt: skip
INJECTION_COLUMNS = ("strategy", "epoch", "trial", "num_faults", "accuracy")
BIT_COLUMNS = ("dtype", "bit", "num_faults", "trial", "accuracy", "num_non_finite")
SUMMARY_COLUMNS = (
    "strategy", "recipe", "seed", "epochs", "max_test_accuracy", "best_epoch",
    "last_test_accuracy", "diverged_epoch",
)  # fmt: skip
"""A recipe is a strategy without its seed."""
PREDICTORS = (
    "test_accuracy", "weight_mean", "weight_std", "weight_l2", "gradient_norm", "sharpness",
)  # fmt: skip
NETWORK_COLUMNS = ("strategy", "epoch", *PREDICTORS)
"""What is known of a strategy's last network with faults: of that very epoch."""
ROBUSTNESS_COLUMNS = (
    "strategy", "recipe", "epoch", "max_faults", "num_trials", "clean_accuracy", "area", "area_low",
    "area_high",
)  # fmt: skip

Rows = Sequence[Mapping[str, str]]
Curves = dict[int, np.ndarray]
"""Accuracy of each trial, by number of faults."""


def accuracies(rows: Rows) -> dict[str, dict[int, Curves]]:
    """Accuracies by strategy, epoch and number of faults, trials in order."""
    return {
        name: {
            int(epoch): {
                int(count): numbers(chosen, "accuracy")
                for count, chosen in split(of_epoch, "num_faults").items()
            }
            for epoch, of_epoch in split(part, "epoch").items()
        }
        for name, part in split(rows, "strategy").items()
    }


def logged_ranges(workdir: Path, rows: Rows) -> list[list[int]]:
    """The numbers of faults of each range that config.json names; without it all are one range.

    Raises ValueError if the file is damaged, or names numbers that no row has.
    """
    counts = {int(row["num_faults"]) for row in rows}
    path = workdir / "config.json"
    if not path.exists() or not counts:
        return [sorted(counts)] if counts else []
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))["ranges"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} names no ranges: it is damaged or of another run") from None
    ranges = [[*counts_of_range(text)] for text in texts]
    if missing := set().union(*ranges) - counts:
        raise ValueError(f"{path} names {min(missing)} faults, which no row of the tables has")
    return ranges


def split(rows: Rows, column: str) -> dict[str, list[Mapping[str, str]]]:
    """Rows by the value of a column, in the order of the first."""
    parts: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        parts.setdefault(row[column], []).append(row)
    return parts


def numbers(rows: Rows, column: str) -> np.ndarray:
    """A column as floats; an empty field is NaN."""
    return np.array([float(row[column] or "nan") for row in rows])
