"""Tables of the training-strategies study: robustness, who differs from whom, what predicts it."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfi.data._files import read_csv, write_csv
from jaxfi.outcomes._robustness import (
    bootstrap_mean,
    group_test,
    holm,
    paired_test,
    rank_correlation,
    relative_area,
)
from jaxfi.report._study_logs import (
    INJECTION_COLUMNS,
    NETWORK_COLUMNS,
    PREDICTORS,
    ROBUSTNESS_COLUMNS,
    SUMMARY_COLUMNS,
    Rows,
    accuracies,
    logged_ranges,
)

PAIR_COLUMNS = (
    "strategy_a", "epoch_a", "strategy_b", "epoch_b", "max_faults", "difference", "low", "high",
    "p_value", "p_holm", "num_tests",
)  # fmt: skip
CORRELATION_COLUMNS = ("predictor", "members", "max_faults", "rho", "low", "high", "num_members")
SEED_COLUMNS = (
    "recipe", "max_faults", "num_seeds", "area", "area_sd", "area_min", "area_max",
    "clean_accuracy", "clean_accuracy_sd",
)  # fmt: skip
EFFECT_COLUMNS = (
    "max_faults", "num_recipes", "num_networks", "share_between", "sd_between_seeds", "p_value",
)  # fmt: skip
_LEARNED = 0.5  # of the best member's accuracy


class Curve(NamedTuple):
    """One network under all trials."""

    strategy: str
    epoch: int
    is_last: bool
    """Of the strategy's epochs with faults."""
    counts: np.ndarray
    """[S] numbers of faults."""
    accuracy: np.ndarray
    """[T, S] fractions."""

    @property
    def clean_accuracy(self) -> float:
        return float(self.accuracy[:, 0].mean())

    def area(self, most: int) -> np.ndarray:
        """[T] areas under the relative-accuracy curve up to `most` faults."""
        within = self.counts <= most
        return relative_area(self.counts[within].tolist(), self.accuracy[:, within])


def write_tables(workdir: str | Path) -> None:
    """robustness, paired_tests, correlations, seeds and recipe_effect .csv from what was logged.

    Intervals are 99 %. Networks whose clean accuracy is 0 have no relative accuracy: left out.
    """
    workdir = Path(workdir)
    path = workdir / "accuracy_by_injections.csv"
    injections = read_csv(path, INJECTION_COLUMNS) if path.exists() else []
    recipes = {row["strategy"]: row["recipe"]
               for row in read_csv(workdir / "summary.csv", SUMMARY_COLUMNS)}  # fmt: skip
    networks = read_csv(workdir / "networks.csv", NETWORK_COLUMNS)
    curves = read_curves(injections)
    last = [curve for curve in curves if curve.is_last]
    ends = sorted({counts[-1] for counts in logged_ranges(workdir, injections)})
    for name, columns, rows in (
        ("robustness", ROBUSTNESS_COLUMNS, robustness_rows(curves, recipes, ends)),
        ("paired_tests", PAIR_COLUMNS, pair_rows(curves, ends)),
        ("correlations", CORRELATION_COLUMNS, correlation_rows(last, networks, ends)),
        ("seeds", SEED_COLUMNS, seed_rows(last, recipes, ends)),
        ("recipe_effect", EFFECT_COLUMNS, effect_rows(last, recipes, ends)),
    ):
        write_csv(workdir / f"{name}.csv", columns, rows)


def read_curves(rows: Rows) -> list[Curve]:
    """The rows of accuracy_by_injections.csv, network by network, but those never right."""
    return [
        Curve(strategy, epoch, epoch == max(epochs), np.array(counts), accuracy)
        for strategy, epochs in accuracies(rows).items()
        for epoch, curve in epochs.items()
        for counts in [sorted(curve)]
        for accuracy in [np.stack([curve[count] for count in counts], axis=1)]
        if (accuracy[:, 0] > 0).all()
    ]


def learned_curves(curves: Sequence[Curve]) -> list[Curve]:
    """Those at least half as accurate as the best: others answer alike with and without faults."""
    least = _LEARNED * max((curve.clean_accuracy for curve in curves), default=0.0)
    return [curve for curve in curves if curve.clean_accuracy >= least]


def robustness_rows(
    curves: Sequence[Curve], recipes: Mapping[str, str], ends: Sequence[int]
) -> list[list[Any]]:
    """Area with its interval, of each network and range."""
    return [
        [curve.strategy, recipes[curve.strategy], curve.epoch, most, len(curve.accuracy),
         curve.clean_accuracy, *bootstrap_mean(curve.area(most))]
        for curve in curves
        for most in ends
    ]  # fmt: skip


def pair_rows(curves: Sequence[Curve], ends: Sequence[int]) -> list[list[Any]]:
    """Paired tests between strategies at their last epochs, and between epochs of a strategy.

    Holm's correction is over all rows, both ranges and both kinds of pairs: any may be looked at.
    """
    pairs = [
        (a, b, most)
        for most in ends
        for a, b in itertools.combinations(curves, 2)
        if a.strategy == b.strategy or (a.is_last and b.is_last)
    ]
    tests = [paired_test(a.area(m), b.area(m), seed=_seed_of(a, b, m)) for a, b, m in pairs]
    adjusted = holm([test.p_value for test in tests]).tolist()
    return [
        [a.strategy, a.epoch, b.strategy, b.epoch, most, *test.difference, test.p_value, p,
         len(tests)]
        for (a, b, most), test, p in zip(pairs, tests, adjusted, strict=True)
    ]  # fmt: skip


def _seed_of(a: Curve, b: Curve, most: int) -> int:
    """Another one for each pair, whatever other pairs there are."""
    return zlib.crc32(f"{a.strategy}/{a.epoch}/{b.strategy}/{b.epoch}/{most}".encode())


def correlation_rows(
    curves: Sequence[Curve], networks: Rows, ends: Sequence[int]
) -> list[list[Any]]:
    """Rank correlations between what is known of the very networks that got faults and their areas.

    Over all members, and over those that learned.
    """
    known = {(row["strategy"], int(row["epoch"])): row for row in networks}
    rows: list[list[Any]] = []
    for name, chosen in (("all", curves), ("learned", learned_curves(curves))):
        for predictor, most in itertools.product(PREDICTORS, ends):
            pairs = [
                (value, float(curve.area(most).mean()))
                for curve in chosen
                if math.isfinite(value := float(known[curve.strategy, curve.epoch][predictor]))
            ]
            x, y = zip(*pairs, strict=True) if pairs else ((), ())
            rows.append([predictor, name, most, *rank_correlation(x, y), len(pairs)])
    return rows


def seed_rows(
    curves: Sequence[Curve], recipes: Mapping[str, str], ends: Sequence[int]
) -> list[list[Any]]:
    """Each recipe's mean over its seeds, and how far these are apart; none without a second."""
    return [
        [recipe, most, len(group), *_spread(areas), areas.min(), areas.max(),
         *_spread(np.array([curve.clean_accuracy for curve in group]))]
        for recipe, group in _by_recipe(curves, recipes).items()
        if len(group) > 1
        for most in ends
        for areas in [_mean_areas(group, most)]
    ]  # fmt: skip


def effect_rows(
    curves: Sequence[Curve], recipes: Mapping[str, str], ends: Sequence[int]
) -> list[list[Any]]:
    """Do recipes differ in area by more than their seeds? Over networks that learned."""
    groups = [
        group for group in _by_recipe(learned_curves(curves), recipes).values() if len(group) > 1
    ]
    if len(groups) < 2:
        return []
    rows = []
    for most in ends:
        test = group_test([_mean_areas(group, most).tolist() for group in groups])
        rows.append([most, len(groups), sum(map(len, groups)), *test])
    return rows


def _by_recipe(curves: Sequence[Curve], recipes: Mapping[str, str]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(recipes[curve.strategy], []).append(curve)
    return groups


def _mean_areas(curves: Sequence[Curve], most: int) -> np.ndarray:
    return np.array([curve.area(most).mean() for curve in curves])


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a sample."""
    return float(values.mean()), float(values.std(ddof=1))
