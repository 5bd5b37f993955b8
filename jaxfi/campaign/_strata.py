"""Stratified campaigns: more faults where outcomes differ, fewer where they are alike.

The sites are divided into strata, h = 1..H, of which stratum h holds the share W_h. Faults are
drawn from each apart, and a rate is the sum of W_h times the stratum's mean. A pilot shows how much
the faults of each stratum differ, s_h, and Neyman's allocation (J. R. Stat. Soc. 1934) gives each
faults in proportion to W_h s_h: no other division of as many faults has a smaller variance.

The pilot must not be thrown together with what it decided: a stratum where it met no rare event
would get few faults more, and its mean stay too low. So each stage is an estimate by itself, right
on average whatever the stages before it showed, and the estimates are averaged by their precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxfi.campaign._anytime import Goal, goals_of
from jaxfi.outcomes._outcomes import Estimate

# Given [H] numbers of faults, what the first so many of each stratum count, H arrays [n_h, rates],
# and the variance [rates] of what all of them have in common.
MeasureStrata = Callable[[np.ndarray], tuple[list[np.ndarray], np.ndarray]]

PILOT_LEAST = 2  # faults of a stratum; fewer show no difference
_SLACK = 0.95  # aim for a margin a little narrower: the variances are not known exactly


class Strata(NamedTuple):
    """What a campaign's sites are divided into.

    Attributes:
      sites: [H] int64, fault sites of each stratum.
      group: [H] int64, strata of one group (a bit position) differ about as much.
    """

    sites: np.ndarray
    group: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """[H] share of the sites."""
        return self.sites / self.sites.sum()


def pilot_counts(strata: Strata, num_faults: int) -> np.ndarray:
    """[H] faults of the pilot: in proportion to the sites, and at least two where there are."""
    wanted = np.maximum(np.round(num_faults * strata.weights), PILOT_LEAST).astype(np.int64)
    return np.minimum(wanted, strata.sites)


def stratum_variances(strata: Strata, shares: Sequence[np.ndarray]) -> np.ndarray:
    """How much the faults of each stratum differ, [H, rates] variances.

    A few faults that are alike do not show that all are. So a stratum counts two faults more that
    differ as its group's do, and a group one more that differs as much as can be, by 1/4.

    Args:
      shares: of each stratum, [n_h, rates] in [0, 1], of the faults measured.
    """
    squares = np.stack([np.sum((s - s.mean(axis=0)) ** 2, axis=0) for s in shares])
    freedom = np.array([len(s) - 1 for s in shares])[:, None]
    variances = np.empty_like(squares)
    for group in np.unique(strata.group):
        rows = strata.group == group
        pooled = (squares[rows].sum(axis=0) + 0.25) / (freedom[rows].sum() + 1)
        variances[rows] = (squares[rows] + 2 * pooled) / (freedom[rows] + 2)
    return variances


def neyman_counts(
    strata: Strata, variances: np.ndarray, left: np.ndarray, goals: np.ndarray
) -> np.ndarray:
    """[H] faults with which each rate's estimate has its goal's variance, or less.

    No stratum gets less than half of its proportional part, and at least one fault: a stratum whose
    few faults happened to be alike would otherwise get too few to be found out.

    Args:
      variances: [H, rates], of the faults of a stratum.
      left: [H], sites not yet drawn.
      goals: [rates], variances of the estimates; infinite where nothing is needed.
    """
    spread = strata.weights[:, None] * np.sqrt(variances)
    needed = (spread.sum(axis=0) * spread / goals).max(axis=1)
    needed = np.maximum(needed, needed.sum() * strata.weights / 2)
    return np.minimum(np.maximum(np.ceil(needed).astype(np.int64), 1), left)


class Stage(NamedTuple):
    """What one stage says of each rate, by itself: [rates] means and variances."""

    means: np.ndarray
    variances: np.ndarray


def stage_estimate(
    strata: Strata,
    shares: Sequence[np.ndarray],
    variances: np.ndarray,
    start: np.ndarray,
    sampled: bool = False,
) -> Stage:
    """A stage's estimate from the faults after the first `start[h]` of each stratum.

    The stratum's mean is (sum of those before + (N_h - start_h) x the new ones' mean) / N_h: right
    on average, since the new ones are drawn from those left.

    Args:
      shares: of each stratum, [n_h, rates], up to and with this stage.
      variances: [H, rates], of the faults of a stratum.
      sampled: a share is of some images, so that of all faults of a stratum the mean is not known.
    """
    left, new = strata.sites - start, np.array([len(s) for s in shares]) - start
    means = np.stack([
        (s[:n].sum(axis=0) + rest * (s[n:].mean(axis=0) if rest else 0)) / sites
        for s, n, rest, sites in zip(shares, start, left, strata.sites, strict=True)
    ])  # fmt: skip
    some, rest = np.maximum(new, 1), left / strata.sites
    if sampled:  # those before and the new ones, each as if no fault were used up
        factors = rest**2 / some + (1 - rest) ** 2 / np.maximum(start, 1)
    else:
        factors = rest**2 * (1 - new / np.maximum(left, 1)) / some
    factors = strata.weights**2 * factors
    return Stage(strata.weights @ means, factors @ variances)


def stratified_estimates(
    strata: Strata,
    shares: Sequence[np.ndarray],
    stages: Sequence[np.ndarray],
    t: float = 2.58,
    shared: np.ndarray | None = None,
) -> list[Estimate]:
    """Each rate over all sites, with its interval: the stages' estimates by their precision.

    Args:
      shares: of each stratum, [n_h, rates] in [0, 1], of the faults measured.
      stages: [H] numbers of faults after each stage.
      t: cut-off of the normal distribution; 2.58 is 99 % confidence.
      shared: [rates] variance of what all have in common, where a share is of some images.
    """
    means, variances = _combined(strata, shares, stages, shared is not None)
    variances = variances if shared is None else variances + shared
    return [_interval(float(m), float(v), t) for m, v in zip(means, variances, strict=True)]


def _interval(mean: float, variance: float, t: float) -> Estimate:
    """Wilson's, of as many independent trials as have this variance: right for small rates too."""
    if variance == 0:
        return Estimate(mean, mean, mean)
    inside = min(2 * math.sqrt(variance), 0.5)
    rate = min(max(mean, inside), 1 - inside)
    size = rate * (1 - rate) / variance
    center = (mean + t**2 / (2 * size)) / (1 + t**2 / size)
    spread = mean * (1 - mean) / size + t**2 / (4 * size**2)
    half = t * math.sqrt(max(spread, 0.0)) / (1 + t**2 / size)
    return Estimate(mean, max(0.0, min(center - half, mean)), min(1.0, max(center + half, mean)))


def draw_strata_until_kept(
    measure: MeasureStrata,
    strata: Strata,
    margin: float | Sequence[Goal],
    t: float = 2.58,
    pilot: int = 1000,
    sampled: bool = False,
    enough: float = math.inf,
) -> list[np.ndarray]:
    """Pilot, then Neyman's allocation, until every rate is known as its goal asks.

    Args:
      measure: gives the shares of the first n_h faults of each stratum; asked for more and more.
      margin: half width of every rate, or a goal for each.
      pilot: faults of the pilot; at least two a stratum are taken.
      sampled: a share is of some images of the fault.
      enough: faults after which a rate that never occurred is given up.

    Returns:
      [H] numbers of faults after each stage, the last of which are enough.
    """
    stages = [pilot_counts(strata, pilot)]
    while True:
        shares, shared = measure(stages[-1])
        found = stratified_estimates(strata, shares, stages, t, shared if sampled else None)
        goals, num_drawn = goals_of(margin, len(found)), int(stages[-1].sum())
        left = strata.sites - stages[-1]
        pairs = list(zip(goals, found, strict=True))
        given_up = np.array(
            [num_drawn >= enough and goal.is_hopeless(rate) for goal, rate in pairs]
        )
        kept = np.array([goal.is_kept(rate) for goal, rate in pairs])
        if (kept | given_up).all() or not left.any():
            return stages
        reached = _combined(strata, shares, stages, sampled).variances
        # Of a rate that did not occur yet, as if it were as large as it can be.
        halves = np.array([goal.half(rate.value or rate.high) for goal, rate in pairs])
        allowed = _SLACK * (halves / t) ** 2
        precision = 1 / np.maximum(allowed - shared, allowed / 4) - 1 / np.maximum(reached, 1e-300)
        asked = (precision > 0) & ~given_up
        goal_variances = np.where(asked, 1 / np.maximum(precision, 1e-300), np.inf)
        variances = stratum_variances(strata, shares)
        new = neyman_counts(strata, variances, left, goal_variances)
        # What faults have in common takes other images, so more faults of any kind; and a share of
        # a rate is a goal that moves.
        if sampled or any(goal.relative for goal in goals):
            new = np.minimum(np.maximum(new, -(-stages[-1] // 4)), left)
        if any(goal.relative for goal in goals) and new.sum() > 3 * num_drawn:
            # The rate itself is uncertain at first.
            new = np.minimum(np.maximum(new * (3 * num_drawn) // new.sum(), 1), left)
        stages.append(stages[-1] + new)


def _combined(
    strata: Strata, shares: Sequence[np.ndarray], stages: Sequence[np.ndarray], sampled: bool
) -> Stage:
    """The stages' estimates, weighted by their faults: not by their variances, which are estimated
    together with the means, and low where these are."""
    variances = stratum_variances(strata, shares)
    starts = [np.zeros_like(stages[0]), *stages[:-1]]
    found = [
        stage_estimate(
            strata, [s[:n] for s, n in zip(shares, stop, strict=True)], variances, start, sampled
        )
        for start, stop in zip(starts, stages, strict=True)
    ]
    size = np.array([(stop - start).sum() for start, stop in zip(starts, stages, strict=True)])
    weights = size / size.sum()
    return Stage(
        weights @ np.stack([stage.means for stage in found]),
        weights**2 @ np.stack([stage.variances for stage in found]),
    )
