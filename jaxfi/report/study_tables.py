"""Tables of the training-strategies study: robustness, who differs from whom, what predicts it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfi.files import read_csv, write_csv
from jaxfi.report.study import INJECTION_COLUMNS, SUMMARY_COLUMNS, accuracies, range_ends
from jaxfi.robustness import bootstrap_mean, holm, paired_test, rank_correlation, relative_area

ROBUSTNESS_COLUMNS = (
    "strategy", "epoch", "max_faults", "num_trials", "clean_accuracy", "area", "area_low",
    "area_high",
)  # fmt: skip
PAIR_COLUMNS = (
    "strategy_a", "epoch_a", "strategy_b", "epoch_b", "max_faults", "difference", "low", "high",
    "p_value", "p_holm",
)  # fmt: skip
CORRELATION_COLUMNS = ("predictor", "members", "max_faults", "rho", "low", "high", "num_members")
PREDICTORS = (
    "weight_mean", "weight_std", "weight_l2", "gradient_norm", "sharpness", "last_test_accuracy",
)  # fmt: skip
_LEARNED = 0.5  # of the best member's accuracy


class Curve(NamedTuple):
    """One network under all trials."""

    strategy: str
    epoch: int
    counts: np.ndarray
    """[S] numbers of faults."""
    accuracy: np.ndarray
    """[T, S] fractions."""

    def area(self, most: int) -> np.ndarray:
        """[T] areas under the relative-accuracy curve up to `most` faults."""
        within = self.counts <= most
        return relative_area(self.counts[within].tolist(), self.accuracy[:, within])


def write_tables(workdir: str | Path) -> None:
    """robustness.csv, paired_tests.csv and correlations.csv from what the experiment logged.

    Intervals are 99 %. Networks whose clean accuracy is 0 have no relative accuracy: left out.
    """
    workdir = Path(workdir)
    path = workdir / "accuracy_by_injections.csv"
    curves = read_curves(read_csv(path, INJECTION_COLUMNS) if path.exists() else [])
    summary = read_csv(workdir / "summary.csv", SUMMARY_COLUMNS)
    ends = range_ends(curves[0].counts.tolist()) if curves else []
    write_csv(workdir / "robustness.csv", ROBUSTNESS_COLUMNS, robustness_rows(curves, ends))
    write_csv(workdir / "paired_tests.csv", PAIR_COLUMNS, pair_rows(curves, ends))
    rows = correlation_rows(last_curves(curves), summary, ends)
    write_csv(workdir / "correlations.csv", CORRELATION_COLUMNS, rows)


def read_curves(rows: Sequence[Mapping[str, str]]) -> list[Curve]:
    """The rows of accuracy_by_injections.csv, network by network."""
    curves = [
        Curve(
            strategy, epoch, np.array(sorted(curve)), np.stack([curve[c] for c in sorted(curve)], 1)
        )
        for strategy, epochs in accuracies(rows).items()
        for epoch, curve in epochs.items()
    ]
    return [curve for curve in curves if (curve.accuracy[:, 0] > 0).all()]


def last_curves(curves: Sequence[Curve]) -> dict[str, Curve]:
    """Each strategy at its last epoch with faults."""
    by_epoch = sorted(curves, key=lambda curve: curve.epoch)
    return {curve.strategy: curve for curve in by_epoch}


def robustness_rows(curves: Sequence[Curve], ends: Sequence[int]) -> list[list[Any]]:
    """Area with its interval, of each network and range."""
    return [
        [curve.strategy, curve.epoch, most, len(curve.accuracy),
         float(curve.accuracy[:, 0].mean()), *bootstrap_mean(curve.area(most))]
        for curve in curves
        for most in ends
    ]  # fmt: skip


def pair_rows(curves: Sequence[Curve], ends: Sequence[int]) -> list[list[Any]]:
    """Paired tests between strategies at their last epochs, and between epochs of a strategy."""
    last = set(map(id, last_curves(curves).values()))
    pairs = [
        (a, b)
        for a, b in itertools.combinations(curves, 2)
        if a.strategy == b.strategy or {id(a), id(b)} <= last
    ]
    rows: list[list[Any]] = []
    for most in ends:
        tests = [paired_test(a.area(most), b.area(most)) for a, b in pairs]
        adjusted = holm([test.p_value for test in tests])
        rows += [
            [a.strategy, a.epoch, b.strategy, b.epoch, most, *test.difference, test.p_value, p]
            for (a, b), test, p in zip(pairs, tests, adjusted.tolist(), strict=True)
        ]
    return rows


def correlation_rows(
    curves: Mapping[str, Curve], summary: Sequence[Mapping[str, str]], ends: Sequence[int]
) -> list[list[Any]]:
    """Rank correlations between what is known of a network and its area.

    Over all members, and over those that learned: others answer alike with and without faults.
    """
    members = [row for row in summary if row["strategy"] in curves]
    best = max((float(row["last_test_accuracy"]) for row in members), default=0.0)
    learned = [row for row in members if float(row["last_test_accuracy"]) >= _LEARNED * best]
    rows: list[list[Any]] = []
    for name, chosen in (("all", members), ("learned", learned)):
        for predictor, most in itertools.product(PREDICTORS, ends):
            pairs = [
                (float(row[predictor]), float(curves[row["strategy"]].area(most).mean()))
                for row in chosen
                if row[predictor] and math.isfinite(float(row[predictor]))
            ]
            x, y = zip(*pairs, strict=True) if pairs else ((), ())
            rows.append([predictor, name, most, *rank_correlation(x, y), len(pairs)])
    return rows
