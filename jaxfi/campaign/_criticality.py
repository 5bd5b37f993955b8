"""Where a network is soft: what the faults of each weight did, in arrays like the parameters."""

from __future__ import annotations

import os

import numpy as np

from jaxfi.campaign._counts import CampaignCounts, by_element
from jaxfi.campaign._result import Campaign, load_campaign
from jaxfi.faults import FaultGroups
from jaxfi.outcomes._outcomes import Rates, per_fault_shares


def criticality(
    campaign: Campaign | CampaignCounts | str | os.PathLike,
    rate: str = "critical",
    *,
    by_bit: bool = False,
) -> dict[str, np.ndarray]:
    """The share of (fault, image) pairs of each weight that count towards a rate.

    Args:
      campaign: a campaign, or the directory that it finished in.
      rate: "masked", "non_critical", "critical", "due", "faulty_accuracy", or a criterion.
      by_bit: one value for each bit of the stored word, not their mean over the injected ones.

    Returns:
      By path, an array [*leaf shape] float64, or [*leaf shape, word bits] float32 `by_bit`, bit 0
      first; NaN where no fault was injected.

    Raises ValueError for an unknown rate, and as `load_campaign`.

    >>> import jaxfi
    >>> params = {"w": np.eye(2, dtype=np.float32)}
    >>> faults = jaxfi.FaultList.from_sites([("w", (0, 0), 31), ("w", (0, 1), 0)], params)
    >>> images = np.array([[2.0, 1.0], [0.5, 1.0]], np.float32)
    >>> found = jaxfi.run_campaign(lambda p, x: x @ p["w"], params, faults, images, [0, 1])
    >>> criticality(found)["w"].tolist()
    [[0.5, 0.0], [nan, nan]]
    """
    known = campaign if isinstance(campaign, Campaign | CampaignCounts) else load_campaign(campaign)
    allowed = (*Rates._fields, *getattr(known, "criteria", ()))
    if rate not in allowed:
        raise ValueError(f"unknown rate {rate!r}: allowed are {', '.join(allowed)}")
    if isinstance(known.faults, FaultGroups):
        raise ValueError(
            "the campaign's experiments have several faults each: allowed are single faults"
        )
    if isinstance(known, CampaignCounts):
        name = "correct" if rate == "faulty_accuracy" else rate
        counts, unit = getattr(known, name), known.num_images
    else:
        counts, unit = per_fault_shares(known.results, rate), 1
    faults, found = known.faults, {}
    for leaf, (path, shape) in enumerate(zip(faults.paths, faults.shapes, strict=True)):
        totals, numbers = by_element(faults, counts, leaf, by_bit)
        with np.errstate(invalid="ignore"):
            share = totals / unit / numbers
        whole = (*shape, share.shape[1]) if by_bit else shape
        found[path] = share.reshape(whole).astype(np.float32 if by_bit else np.float64)
    return found
