"""How well a network bears many faults, in one number; and whether two networks differ in it.

The number is the area under the relative-accuracy curve: accuracy with k faults divided by that
with none, averaged over k. It is 1 for a network that never loses an image, and it compares
networks of different clean accuracy: no mean is subtracted, which depends on who is compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfi.outcomes import Estimate

_EXACT_UP_TO = 16  # trials: 65,536 patterns of signs
_RANDOM_PATTERNS = 100_000


class PairedTest(NamedTuple):
    """Whether two networks differ, over trials that are common to both.

    Attributes:
      difference: mean of second - first over the trials, with its interval.
      p_value: of the hypothesis that exchanging the two in any trial changes nothing.
    """

    difference: Estimate
    p_value: float


def relative_area(counts: Sequence[int], accuracy: np.ndarray) -> np.ndarray:
    """Area under the relative-accuracy curve of each trial, [T], by the trapezoidal rule.

    Args:
      counts: [S] rising numbers of faults; the first is 0.
      accuracy: [T, S] fractions.

    Raises ValueError if the counts do not start at 0, or a trial's clean accuracy is 0.

    >>> relative_area([0, 10, 20], np.array([[0.8, 0.8, 0.4]])).tolist()
    [0.875]
    """
    x, y = np.asarray(counts, np.float64), np.asarray(accuracy, np.float64)
    if len(x) < 2 or x[0] != 0 or not (np.diff(x) > 0).all():
        raise ValueError(f"counts are {list(counts)}: allowed are two or more, rising from 0")
    if not (y[:, 0] > 0).all():
        raise ValueError("the clean accuracy is 0: there is no accuracy to be relative to")
    relative = y / y[:, :1]
    return (np.diff(x)[None] * (relative[:, 1:] + relative[:, :-1])).sum(axis=1) / (2 * x[-1])


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.99, num_resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of [T] values and its percentile bootstrap interval (Efron and Tibshirani, 1993).

    With few trials the interval is somewhat short, since it knows no spread but theirs.
    """
    values = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values[chosen].mean(axis=1), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_test(
    first: np.ndarray, second: np.ndarray, *, confidence: float = 0.99, seed: int = 0
) -> PairedTest:
    """Compares [T] values of two networks under the same T fault lists, by flipping signs.

    The p-value is exact up to 16 trials (Fisher's randomization test), and from 100,000 random
    patterns of signs beyond. With T trials it cannot be below 2 / 2**T.

    Raises ValueError for other numbers of trials.

    >>> paired_test(np.array([0.5, 0.6, 0.7]), np.array([0.6, 0.7, 0.8])).p_value
    0.25
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"cannot pair {len(first)} trials with {len(second)}: allowed is T = T")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    means = _signs(len(difference), seed) @ difference / len(difference)
    as_far = np.abs(means) >= abs(difference.mean()) * (1 - 1e-12)
    return PairedTest(
        bootstrap_mean(difference, confidence=confidence, seed=seed), float(as_far.mean())
    )


def _signs(length: int, seed: int) -> np.ndarray:
    """[patterns, length] of 1 and -1; the first of the random ones is the pattern seen."""
    if length <= _EXACT_UP_TO:
        return np.array(list(itertools.product((1.0, -1.0), repeat=length)))
    signs = np.random.default_rng(seed).choice([1.0, -1.0], (_RANDOM_PATTERNS, length))
    signs[0] = 1
    return signs


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values of several tests, raised so that any of them may be looked at (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    raised = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    adjusted = np.empty_like(p)
    adjusted[order] = raised
    return adjusted


def rank_correlation(x: Sequence[float], y: Sequence[float], t: float = 2.58) -> Estimate:
    """Spearman's ρ with the interval of Bonett and Wright (Psychometrika, 2000).

    Args:
      x, y: n numbers each; ties share their mean rank.
      t: cut-off of the normal distribution; 2.58 is 99 % confidence.

    Where x or y is constant ρ is NaN; below 4 pairs the interval is all of [-1, 1].

    >>> round(rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).value, 2)
    0.8
    """
    if len(x) != len(y):
        raise ValueError(f"cannot correlate {len(x)} numbers with {len(y)}: allowed is n = n")
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(float(centred[0] @ centred[0]) * float(centred[1] @ centred[1]))
    if scale == 0:
        return Estimate(math.nan, -1.0, 1.0)
    rho = min(max(float(centred[0] @ centred[1]) / scale, -1.0), 1.0)
    if len(x) < 4:
        return Estimate(rho, -1.0, 1.0)
    half = t * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    middle = math.atanh(min(max(rho, -1 + 1e-15), 1 - 1e-15))
    return Estimate(rho, math.tanh(middle - half), math.tanh(middle + half))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
