"""How much of "masked" belongs to the network and how much to the accelerator's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from jaxfi.campaign._result import Campaign
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._transforms import word_bits
from jaxfi.outcomes._outcomes import MASKED, Estimate
from jaxfi.report._shares import fault_dtype, parts_by_bit
from jaxfi.report._style import (
    ERROR_BARS,
    SERIES_STYLES,
    TEXT_WIDTH,
    interval_lengths,
    mark_fields,
    percent,
    print_style,
)

_NETWORK = {"facecolor": "#d5e5f0", "edgecolor": "#12466b", "linewidth": 0.6}
_ROUNDING = {"facecolor": "#f0c9a4", "edgecolor": "#c8601b", "linewidth": 0.6, "hatch": "////"}


def masked_by_arithmetic(
    campaigns: Mapping[str, Campaign], t: float | None = None, *, confidence: float | None = None
) -> Figure:
    """Masked share by bit position, one line an arithmetic, and the whole share divided in two.

    Args:
      campaigns: campaigns of the same faults and images by the arithmetic's name. The first is
        the one to compare with: what others mask beyond it is the rounding's.
      t, confidence: of the intervals, as in `Campaign.rates`.

    Raises ValueError if the campaigns have other faults than the first, or no bit positions.
    """
    first, t = next(iter(campaigns.values())), checked_cutoff(t, confidence)
    for name, campaign in campaigns.items():
        if campaign.faults != first.faults or campaign.outcomes.shape != first.outcomes.shape:
            raise ValueError(f"campaign {name!r} has other faults or images than the first")
    with print_style():
        figure = Figure(figsize=(TEXT_WIDTH, 2.9), layout="constrained")
        by_bit, whole = figure.subplots(1, 2, width_ratios=(4.4, 1.6))
        _draw_bits(by_bit, campaigns, t)
        _draw_whole(whole, campaigns, t)
        handles, labels = by_bit.get_legend_handles_labels()
        bars = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        figure.legend(*bars, loc="outside upper right", ncols=2)
        return figure


def masked_beyond(first: Campaign, other: Campaign) -> np.ndarray:
    """Each fault's share of images that `other` masks and `first` does not, [F]."""
    return np.mean((other.outcomes == MASKED) & (first.outcomes != MASKED), axis=1)


def _draw_bits(axes: Axes, campaigns: Mapping[str, Campaign], t: float) -> None:
    offsets = np.linspace(0.22, -0.22, len(campaigns)) if len(campaigns) > 1 else [0.0]
    for number, (name, campaign) in enumerate(campaigns.items()):
        parts = parts_by_bit(campaign, t)
        bits = np.array([int(part.name) for part in parts]) + offsets[number]
        masked = [part.masked for part in parts]
        style = SERIES_STYLES[number % len(SERIES_STYLES)]
        axes.errorbar(
            bits, percent(masked), yerr=interval_lengths(masked), label=name,
            markersize=3.2, linewidth=0.8, elinewidth=0.9, ecolor=to_rgba(style["color"], 0.45),
            **style,
        )  # fmt: skip
    dtype = fault_dtype(next(iter(campaigns.values())).faults)
    width = word_bits(dtype)
    mark_fields(axes, dtype)
    axes.set_xticks(range(width - 1, -1, -1), minor=True)
    axes.set_xticks([width - 1, *range(width - 4, -1, -4)])
    axes.set(ylim=(-2, 102), ylabel="Masked (fault, image) pairs (%)")
    axes.set_xlabel(f"Bit position of the fault in the stored {dtype} word")
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def _draw_whole(axes: Axes, campaigns: Mapping[str, Campaign], t: float) -> None:
    first = next(iter(campaigns.values()))
    rows = range(len(campaigns))
    total = [_masked(campaign, t) for campaign in campaigns.values()]
    beyond = [100 * float(masked_beyond(first, c).mean()) for c in campaigns.values()]
    base = percent(total) - beyond
    axes.bar(rows, base, 0.66, label="by the network", **_NETWORK)
    axes.bar(rows, beyond, 0.66, bottom=base, label="by the rounding alone", **_ROUNDING)
    axes.errorbar(
        rows, percent(total), yerr=interval_lengths(total), linestyle="none",
        **ERROR_BARS,
    )  # fmt: skip
    for row, share in zip(rows, total, strict=True):
        height = 100 * share.high + 2
        axes.text(row, height, f"{100 * share.value:.1f}", ha="center", fontsize=8)
    axes.set(ylim=(0, 102), xlim=(-0.6, len(campaigns) - 0.4), yticks=(0, 25, 50, 75, 100))
    axes.set_xticks(list(rows), _short(list(campaigns)))
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("All bits")


def _masked(campaign: Campaign, t: float) -> Estimate:
    return campaign.rates(t=t).masked


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit under a bar."""
    return [name.replace("bfloat16", "bf16").replace("float", "fp").upper() for name in names]
