"""How well a network bears many faults, in one number; and whether two networks differ in it.

The number is the area under the relative-accuracy curve: accuracy with k faults divided by that
with none, averaged over k. It is 1 for a network that never loses an image, and it compares
networks of different clean accuracy: no mean is subtracted, which depends on who is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.outcomes._outcomes import Estimate

_EXACT_UP_TO = 40  # trials: two halves of a million patterns of signs each
_RANDOM_PATTERNS = 100_000
_ROUNDING = 1e-12  # of sums of the same numbers in another order, relative to them


class PairedTest(NamedTuple):
    """Whether two networks differ, over trials that are common to both.

    Attributes:
      difference: mean of second - first over the trials, with its interval.
      p_value: of the hypothesis that exchanging the two in any trial changes nothing.
    """

    difference: Estimate
    p_value: float


class GroupTest(NamedTuple):
    """Whether groups differ by more than their members do.

    Attributes:
      share: of the sum of squares around the common mean, what lies between the groups (η²). By
        chance alone it is about (groups - 1) / (members - 1).
      within: standard deviation of members around their group's mean, pooled.
      p_value: of the hypothesis that it does not matter who is in which group.
    """

    share: float
    within: float
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

    The p-value is the share of all 2**T patterns of signs that move the mean as far (Fisher's
    randomization test), so it cannot be below 2 / 2**T. It is exact up to 40 trials, and from
    100,000 random patterns beyond. `seed` is of those, and of the interval's resamples.

    Raises ValueError for other numbers of trials.

    >>> paired_test(np.array([0.5, 0.6, 0.7]), np.array([0.6, 0.7, 0.8])).p_value
    0.25
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"cannot pair {len(first)} trials with {len(second)}: allowed is T = T")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    interval = bootstrap_mean(difference, confidence=confidence, seed=seed)
    # As far is as far also where rounding makes it less.
    far = abs(difference.sum()) - _ROUNDING * np.abs(difference).sum()
    if len(difference) > _EXACT_UP_TO:
        return PairedTest(interval, _share_of_random_signs(difference, far, seed))
    return PairedTest(interval, _share_of_signs(difference, far))


def _share_of_signs(values: np.ndarray, far: float) -> float:
    """Share of the 2**T patterns of signs for which the sum's magnitude is `far` or more.

    All sums of one half of the values meet those of the other, sorted: 2**(T/2) of each.
    """
    if far <= 0:
        return 1.0
    half = len(values) // 2
    first, second = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    above = len(second) - np.searchsorted(second, far - first, side="left")
    return 2 * int(above.sum()) / 2 ** len(values)  # a sum below -far is one above it mirrored


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """[2**n] sums of n values, with every pattern of signs."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _share_of_random_signs(values: np.ndarray, far: float, seed: int) -> float:
    """The same by random patterns, of which the one seen counts as one."""
    signs = np.random.default_rng(seed).choice([1.0, -1.0], (_RANDOM_PATTERNS - 1, len(values)))
    return (1 + int((np.abs(signs @ values) >= far).sum())) / _RANDOM_PATTERNS


def group_test(
    groups: Sequence[Sequence[float]], *, num_permutations: int = 100_000, seed: int = 0
) -> GroupTest:
    """One-way analysis of variance by permutation: do groups differ more than their members do?

    The p-value is from `num_permutations` random ways to put the members into groups of these
    sizes, of which the one seen counts as one.

    Raises ValueError unless there are two groups or more, one of them with two members or more.

    >>> test = group_test([[1.0, 2.0], [5.0, 6.0]])
    >>> round(test.share, 3), round(test.within, 3), round(test.p_value, 2)
    (0.941, 0.707, 0.33)
    """
    sizes = [len(group) for group in groups]
    if len(sizes) < 2 or min(sizes) < 1 or max(sizes) < 2:
        raise ValueError(f"groups have {sizes} members: allowed are two groups, one of two members")
    values = np.concatenate([np.asarray(group, np.float64) for group in groups])
    values = values - values.mean()
    starts = np.cumsum([0, *sizes[:-1]])

    def between(members: np.ndarray) -> np.ndarray:
        return (np.add.reduceat(members, starts, axis=-1) ** 2 / np.array(sizes)).sum(axis=-1)

    seen, total = float(between(values)), float(values @ values)
    orders = np.random.default_rng(seed).permuted(
        np.broadcast_to(values, (num_permutations - 1, len(values))), axis=1
    )
    as_far = (between(orders) >= seen - _ROUNDING * total).sum()
    within = math.sqrt(max(total - seen, 0.0) / (len(values) - len(sizes)))
    share = seen / total if total > 0 else math.nan
    return GroupTest(share, within, (1 + int(as_far)) / num_permutations)


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


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    t: float | None = None,
    *,
    confidence: float | None = None,
) -> Estimate:
    """Spearman's ρ with the interval of Bonett and Wright (Psychometrika, 2000).

    Args:
      x, y: n numbers each; ties share their mean rank.
      t, confidence: of the interval, as in `estimate_rate`.

    Where x or y is constant or empty ρ is NaN; below 4 pairs the interval is all of [-1, 1].

    >>> round(rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).value, 2)
    0.8
    """
    t = checked_cutoff(t, confidence)
    if len(x) != len(y):
        raise ValueError(f"cannot correlate {len(x)} numbers with {len(y)}: allowed is n = n")
    if len(x) == 0:
        return Estimate(math.nan, -1.0, 1.0)
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
