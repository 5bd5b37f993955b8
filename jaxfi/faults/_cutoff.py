"""How sure an interval or a sample size is to be."""

from __future__ import annotations

import math
import statistics


def checked_cutoff(t: float | None, confidence: float | None = None) -> float:
    """The normal distribution's cut-off of an interval, by itself or by the confidence.

    Args:
      t: half width in standard errors; by default 2.58, which the studies take for 99 %.
      confidence: in place of t, such as 0.99; its cut-off is the exact one, 2.5758.

    >>> round(checked_cutoff(None, 0.95), 4)
    1.96
    """
    if confidence is None:
        t = 2.58 if t is None else t
        if not 0 < t < math.inf:
            raise ValueError(f"t {t} is out of range: allowed is t > 0")
        return t
    if t is not None:
        raise ValueError(f"t {t} and confidence {confidence} are given: allowed is one of them")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is out of range: allowed is 0 < confidence < 1")
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
