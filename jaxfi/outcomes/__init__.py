"""What faults did: verdicts on outputs, rates with intervals, and tests between networks.

In: golden and faulty outputs, or outcomes [F, N] of campaigns. Out: masked, non-critical, critical
and DUE; `Estimate`s; p-values and correlations.
"""

from __future__ import annotations

from jaxfi.outcomes._outcomes import (
    CRITICAL,
    MASKED,
    NAN_POLICIES,
    NON_CRITICAL,
    Estimate,
    Rates,
    Results,
    accuracy,
    classify,
    estimate_difference,
    estimate_rate,
    judge,
    paired_difference,
    shares,
)
from jaxfi.outcomes._robustness import (
    GroupTest,
    PairedTest,
    bootstrap_mean,
    group_test,
    holm,
    paired_test,
    rank_correlation,
    relative_area,
)

__all__ = [
    "CRITICAL",
    "MASKED",
    "NAN_POLICIES",
    "NON_CRITICAL",
    "Estimate",
    "GroupTest",
    "PairedTest",
    "Rates",
    "Results",
    "accuracy",
    "bootstrap_mean",
    "classify",
    "estimate_difference",
    "estimate_rate",
    "group_test",
    "holm",
    "judge",
    "paired_difference",
    "paired_test",
    "rank_correlation",
    "relative_area",
    "shares",
]
