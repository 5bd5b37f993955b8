"""Intervals that hold however often one looks: when may a campaign stop?

Looking at an ordinary interval after every few faults, and stopping once it is narrow, misses the
truth more often than its confidence says. A confidence sequence holds at all times at once, so at
whatever time one stops. Used here is the predictable plug-in empirical-Bernstein sequence
(Waudby-Smith and Ramdas, J. R. Stat. Soc. B 2024, theorem 2) for draws without replacement (the
same, NeurIPS 2020): no normal approximation, for any values from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jaxfi.outcomes._outcomes import Estimate

# Draws so many faults of the seeded order; what each counts for each rate, [n, rates] in [0, 1].
Measure = Callable[[int], np.ndarray]


def confidence_sequence(
    values: np.ndarray, population: int, margin: float, t: float = 2.58
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half width of the interval after each draw; all hold together.

    With bets l_i that depend on earlier values only, running means m_i, and S_i the sum so far,

        centre_n = sum l_i (x_i + S_{i-1} / (N-i+1)) / L_n,     L_n = sum l_i N / (N-i+1)
        half_n = (log(2/a) + sum (x_i - m_{i-1})^2 (-log(1 - l_i) - l_i)) / L_n

    Any bets are right; l = e / (e + variance) reaches the half width e soonest.

    Args:
      values: [n] in [0, 1], drawn uniformly without replacement, in the order drawn.
      population: N, what they are drawn from.
      margin: e, the half width that is wanted.
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
    bets = margin / (margin + variance_before)
    left = population - number + 1
    weights = np.cumsum(bets * (population / left))
    centre = np.cumsum(bets * (values + before / left)) / weights
    surprise = np.cumsum((values - mean_before) ** 2 * (-np.log1p(-bets) - bets))
    return centre, (_evidence(t) + surprise) / weights


def anytime_estimate(
    values: np.ndarray, population: int, margin: float, t: float = 2.58
) -> Estimate:
    """The mean of the values so far, and the interval of their confidence sequence.

    Arguments as in `confidence_sequence`. Of a census, the interval has no width.
    """
    mean = float(np.mean(values))
    if len(values) == population:
        return Estimate(mean, mean, mean)
    centre, half = (
        float(array[-1]) for array in confidence_sequence(values, population, margin, t)
    )
    return Estimate(mean, max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean)))


def draw_until_kept(
    measure: Measure, population: int, margin: float, t: float = 2.58, first: int = 500
) -> list[int]:
    """Draws until the half width of every rate is at most `margin`; the number of draws at each
    look, the last of which is enough.

    Args:
      measure: gives all values of the first n draws; asked for more and more of them.
      first: draws before the first look. How often one looks changes no guarantee.
    """
    looks = [min(first, population)]
    while True:
        missing = max(_missing(column, population, margin, t) for column in measure(looks[-1]).T)
        if missing == 0:
            return looks
        # What is predicted is uncertain at first: go at most four times as far.
        following = looks[-1] + max(missing, looks[-1] // 20)
        looks.append(min(following, 4 * looks[-1], population))


def _missing(values: np.ndarray, population: int, margin: float, t: float) -> int:
    """How many draws more the margin takes, if the next are as the last; 0 if it is kept."""
    num_drawn = len(values)
    half = confidence_sequence(values, population, margin, t)[1][-1]
    if half <= margin or num_drawn == population:
        return 0
    variance = (float(np.var(values)) * num_drawn + 0.25) / (num_drawn + 1)
    bet = margin / (margin + variance)
    gain = margin * bet - variance * (-math.log1p(-bet) - bet)  # evidence won by one draw
    return math.ceil(_evidence(t) * (half / margin - 1) / gain) if gain > 0 else num_drawn


def _evidence(t: float) -> float:
    """log(2/a) for a confidence of 1-a that is given as a cut-off of the normal distribution."""
    return math.log(2 / math.erfc(t / math.sqrt(2)))
