"""Intervals that hold however often one looks: when may a campaign stop?

Looking at an ordinary interval after every few faults, and stopping once it is narrow, misses the
truth more often than its confidence says. A confidence sequence holds at all times at once, so at
whatever time one stops. Used here is the predictable plug-in empirical-Bernstein sequence
(Waudby-Smith and Ramdas, J. R. Stat. Soc. B 2024, theorem 2) for draws without replacement (the
same, NeurIPS 2020): no normal approximation, for any values from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfi.outcomes._outcomes import Estimate

# Draws so many faults of the seeded order: what each counts for each rate, [n, rates] in [0, 1],
# and the variance [rates] of what they have in common, which no number of them shows.
Measure = Callable[[int], tuple[np.ndarray, np.ndarray]]


class Goal(NamedTuple):
    """The half width that is asked of a rate's interval: `margin`, or `relative` times the rate."""

    margin: float
    relative: float | None = None

    def half(self, rate: Any) -> Any:
        """Of a rate, or of rates [n]."""
        return self.margin + 0 * rate if self.relative is None else self.relative * rate

    def is_kept(self, found: Estimate) -> bool:
        """A rate of 0 is known within no share of itself."""
        return found.high - found.low <= 2 * self.half(found.value) * (1 + 1e-9)

    def is_hopeless(self, found: Estimate) -> bool:
        """What is asked is a share of a rate that never occurred."""
        return self.relative is not None and found.value == 0 and not self.is_kept(found)


def goals_of(margin: float | Sequence[Goal], count: int) -> list[Goal]:
    """One for each rate; a number is for all of them."""
    return [Goal(margin)] * count if isinstance(margin, int | float) else list(margin)


FRESH = 2**62  # a population that draws leave as it is, as of faults and images drawn together


def confidence_sequence(
    values: np.ndarray, population: int, margin: float | Goal, t: float = 2.58
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width of the interval after each draw; all hold together.

    With bets l_i that depend on earlier values only, running means m_i, and S_i the sum so far,

        centre_n = sum l_i (x_i + S_{i-1} / (N-i+1)) / L_n,     L_n = sum l_i N / (N-i+1)
        half_n = (log(2/a) + sum (x_i - m_{i-1})^2 (-log(1 - l_i) - l_i)) / L_n

    Any bets are right; l = e / (e + variance) reaches the half width e soonest. Where e is a share
    of the rate, each bet takes the mean so far for it.

    Args:
      values: [n] in [0, 1], drawn uniformly without replacement, in the order drawn.
      population: N, what they are drawn from.
      margin: e, the half width that is wanted, or a goal.
      t: confidence as a cut-off of the normal distribution, a = 2 (1 - Phi(t)); 2.58 is 99 %.

    Returns:
      [n] and [n] float64; the interval is not cut to [0, 1].
    """
    number = np.arange(1, len(values) + 1)
    before = np.cumsum(values) - values
    mean_before = (before + 0.5) / number  # with one value of 1/2 to start from
    mean_after = (before + values + 0.5) / (number + 1)
    squares = np.cumsum((values - mean_after) ** 2) + 0.25
    variance_before = np.concatenate([[0.25], (squares / (number + 1))[:-1]])
    wanted = margin.half(mean_before) if isinstance(margin, Goal) else margin
    bets = wanted / (wanted + variance_before)
    left = population - number + 1
    weights = np.cumsum(bets * (population / left))
    centre = np.cumsum(bets * (values + before / left)) / weights
    surprise = np.cumsum((values - mean_before) ** 2 * (-np.log1p(-bets) - bets))
    return centre, (_evidence(t) + surprise) / weights


def anytime_estimate(
    values: np.ndarray,
    population: int,
    margin: float | Goal,
    t: float = 2.58,
    shared: float = 0.0,
) -> Estimate:
    """The mean of the values so far, and the interval of their confidence sequence.

    Args:
      values, population, margin, t: as in `confidence_sequence`; a census has no width.
      shared: variance of what the values have in common.
    """
    mean = float(np.mean(values))
    if len(values) == population:
        return Estimate(mean, mean, mean)
    centre, half = (
        float(array[-1]) for array in confidence_sequence(values, population, margin, t)
    )
    half = math.hypot(half, t * math.sqrt(shared))
    return Estimate(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


def draw_until_kept(
    measure: Measure,
    population: int,
    margin: float | Sequence[Goal],
    t: float = 2.58,
    first: int = 500,
    most: int | None = None,
    enough: float = math.inf,
) -> list[int]:
    """Draws until every rate is known as its goal asks; the number of draws at each look, the last
    of which is enough.

    Args:
      measure: gives all values of the first n draws; asked for more and more of them.
      margin: half width of every rate, or a goal for each.
      first: draws before the first look. How often one looks changes no guarantee.
      most: draws that there are, where they are fewer than the population.
      enough: draws after which a rate that never occurred is given up.
    """
    most = population if most is None else most
    looks = [min(first, most)]
    while True:
        values, shared = measure(looks[-1])
        goals = goals_of(margin, values.shape[1])
        missing = 0
        for column, goal, s in zip(values.T, goals, map(float, shared), strict=True):
            given_up = looks[-1] >= enough and goal.is_hopeless(
                anytime_estimate(column, population, goal, t, s)
            )
            if not given_up:
                missing = max(missing, _missing(column, population, goal, t, s))
        if missing == 0 or looks[-1] == most:
            return looks
        # What is predicted is uncertain at first: go at most four times as far.
        following = looks[-1] + max(missing, looks[-1] // 20)
        looks.append(min(following, 4 * looks[-1], most))


def _missing(values: np.ndarray, population: int, goal: Goal, t: float, shared: float) -> int:
    """How many draws more the goal takes, if the next are as the last; 0 if it is kept."""
    num_drawn = len(values)
    half = confidence_sequence(values, population, goal, t)[1][-1]
    margin = float(goal.half(np.mean(values)))
    if math.hypot(half, t * math.sqrt(shared)) <= margin or num_drawn == population:
        return 0
    if margin == 0:
        return num_drawn
    wanted = math.sqrt(max(margin**2 - t**2 * shared, (margin / 4) ** 2))
    variance = (float(np.var(values)) * num_drawn + 0.25) / (num_drawn + 1)
    bet = margin / (margin + variance)
    gain = wanted * bet - variance * (-math.log1p(-bet) - bet)  # evidence won by one draw
    return math.ceil(_evidence(t) * max(half / wanted - 1, 0.05) / gain) if gain > 0 else num_drawn


def _evidence(t: float) -> float:
    """log(2/a) for a confidence of 1-a that is given as a cut-off of the normal distribution."""
    return math.log(2 / math.erfc(t / math.sqrt(2)))
