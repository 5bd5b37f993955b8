"""Campaigns: every fault on every image, checked, shared out, saved, resumed.

In: `apply_fn`, parameters, a fault list, images and labels. Out: a `Campaign`, in memory or in a
directory; an `AdaptiveCampaign`, which stops when the rates are known; a `CumulativeResult`, the
accuracy against the number of faults.
"""

from __future__ import annotations

from jaxfi.campaign._adaptive import (
    AdaptiveCampaign,
    best_images_per_fault,
    run_sequential,
    run_stratified,
)
from jaxfi.campaign._audit import Audit
from jaxfi.campaign._counts import CampaignCounts
from jaxfi.campaign._criticality import criticality
from jaxfi.campaign._cumulative import (
    CumulativeResult,
    counts_of_range,
    cumulative_accuracy,
    draw_trials,
)
from jaxfi.campaign._processes import join_job
from jaxfi.campaign._result import Campaign, load_campaign
from jaxfi.campaign._run import run_campaign
from jaxfi.campaign._workers import NotReproducible

__all__ = [
    "AdaptiveCampaign",
    "Audit",
    "Campaign",
    "CampaignCounts",
    "CumulativeResult",
    "NotReproducible",
    "best_images_per_fault",
    "counts_of_range",
    "criticality",
    "cumulative_accuracy",
    "draw_trials",
    "join_job",
    "load_campaign",
    "run_campaign",
    "run_sequential",
    "run_stratified",
]
