"""Figures of campaigns for print: readable in greyscale and with any colour vision."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxfi.campaign._parts import Part, rates_by
from jaxfi.campaign._result import Campaign
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import LayerOf
from jaxfi.outcomes._outcomes import Estimate
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

# Lightness falls from masked to critical, so that order survives greyscale; hatches repeat it.
OUTCOME_STYLES = {
    "Masked": {"facecolor": "#d5e5f0", "hatch": ""},
    "Not critical": {"facecolor": "#57a0b8", "hatch": "////"},
    "Critical": {"facecolor": "#8c2330", "hatch": ""},
}
_FEW_FAULTS = 30  # an arrow at the axis' end stands for the interval of a layer with fewer


def outcome_shares(
    campaigns: Mapping[str, Campaign], t: float | None = None, *, confidence: float | None = None
) -> Figure:
    """One stacked bar a network: masked, not critical and critical, with intervals.

    Args:
      campaigns: campaigns by the name to print beside the bar.
      t, confidence: of the intervals, as in `Campaign.rates`.
    """
    with print_style():
        figure = Figure(figsize=(TEXT_WIDTH, 1.15 + 0.42 * len(campaigns)), layout="constrained")
        axes = figure.subplots()
        rates = [campaign.rates(t=t, confidence=confidence) for campaign in campaigns.values()]
        columns = [[getattr(r, name) for r in rates] for name in ("masked", "non_critical")]
        critical = [r.critical for r in rates]
        _stack(axes, np.arange(len(rates)), [*columns, critical], horizontal=True, thickness=0.62)
        _print_shares(axes, [*columns, critical])
        axes.set_yticks(range(len(rates)), list(campaigns))
        axes.set(xlim=(0, 100), ylim=(len(rates) - 0.5, -0.6))
        axes.set_xlabel("Share of (fault, image) pairs (%)")
        axes.tick_params(axis="y", length=0)
        _legend(figure, axes)
        return figure


def outcomes_by_bit(
    campaigns: Mapping[str, Campaign], t: float | None = None, *, confidence: float | None = None
) -> Figure:
    """One panel a network: a stacked bar for every bit position, fields of the word marked.

    Args:
      campaigns: campaigns by panel title. Raises ValueError where no fault has a bit, or the
        faulty leaves have several dtypes.
      t, confidence: of the intervals, as in `Campaign.rates`.
    """
    with print_style():
        height = 0.9 + 1.55 * len(campaigns)
        figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
        panels = figure.subplots(len(campaigns), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, campaign) in zip(panels, campaigns.items(), strict=True):
            parts = parts_by_bit(campaign, t, confidence)
            columns = [_column(parts, k) for k in ("masked", "non_critical", "critical")]
            _stack(axes, np.array([int(part.name) for part in parts]), columns, thickness=0.84)
            dtype = fault_dtype(campaign.faults)
            mark_fields(axes, dtype)
            axes.set_title(name, loc="left", pad=15)
            axes.set(ylim=(0, 100), ylabel="Share of pairs (%)", yticks=(0, 25, 50, 75, 100))
        panels[-1].set_xlabel(f"Bit position of the fault in the {dtype} word")
        _legend(figure, panels[0])
        return figure


def critical_by_layer(
    campaigns: Mapping[str, Campaign],
    order: Sequence[str] | None = None,
    t: float | None = None,
    *,
    confidence: float | None = None,
    layer_of: LayerOf | None = None,
) -> Figure:
    """Critical share of each layer's faults, one marker a network, with intervals.

    Args:
      campaigns: campaigns by legend label.
      order: layer names from input to output; None takes the parameter tree's order.
      t, confidence: of the intervals, as in `Campaign.rates`.
      layer_of: the layer of a leaf's path, where `jaxfi.faults.layer_of` does not say it right.

    An arrow at the right edge says that an interval goes on.
    """
    with print_style():
        cutoff = checked_cutoff(t, confidence)
        by_layer = [
            rates_by(campaign.faults, campaign.results, "layer", cutoff, layer_of, order)
            for campaign in campaigns.values()
        ]
        names = list(dict.fromkeys(part.name for parts in by_layer for part in parts))
        height = 1.1 + len(names) * (0.12 + 0.13 * len(campaigns))
        figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        limit = _critical_limit([part for parts in by_layer for part in parts])
        offsets = np.linspace(-0.2, 0.2, len(campaigns)) if len(campaigns) > 1 else np.zeros(1)
        for number, (label, parts) in enumerate(zip(campaigns, by_layer, strict=True)):
            rows = np.array([names.index(part.name) for part in parts]) + offsets[number]
            critical = _column(parts, "critical")
            style = SERIES_STYLES[number % len(SERIES_STYLES)]
            beyond = percent(critical) + interval_lengths(critical)[1] > limit
            for row in rows[beyond]:
                axes.plot(limit, row, marker=">", ms=4, color=style["color"], clip_on=False)
            axes.errorbar(
                percent(critical), rows, xerr=interval_lengths(critical), label=label,
                linestyle="none", markersize=4.5, elinewidth=1.0, capsize=2.0, zorder=3, **style,
            )  # fmt: skip
        counts = {part.name: part.num_faults for part in by_layer[0]}
        labels = [f"{name}  ({counts.get(name, 0):,})" for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.01 * limit, limit)
        axes.grid(axis="x", linewidth=0.4, color="#cccccc")
        axes.set_axisbelow(True)
        axes.set_xlabel("Critical share of (fault, image) pairs (%)")
        axes.set_ylabel("Layer (number of faults)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)
        return figure


def save_figure(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    """Writes `figure` as `stem`.pdf, .svg and .png (300 dpi); returns the three paths.

    Its layout stays as it is from then on.
    """
    paths = [Path(f"{os.fspath(stem)}.{kind}") for kind in ("pdf", "svg", "png")]
    with print_style():
        for _ in range(2):  # the layout takes two passes to settle
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for path in paths:
            # No dates: the same campaign gives the same files.
            metadata = {"CreationDate": None} if path.suffix == ".pdf" else None
            metadata = {"Date": None} if path.suffix == ".svg" else metadata
            figure.savefig(path, dpi=300, metadata=metadata)
    return paths


def _stack(
    axes: Axes,
    positions: np.ndarray,
    columns: Sequence[Sequence[Estimate]],
    *,
    thickness: float,
    horizontal: bool = False,
) -> None:
    """Stacked bars of shares in percent; intervals of the first and last at their inner edges."""
    draw = axes.barh if horizontal else axes.bar
    base = np.zeros(len(positions))
    for (label, style), column in zip(OUTCOME_STYLES.items(), columns, strict=True):
        size = {"height": thickness} if horizontal else {"width": thickness}
        start = {"left": base} if horizontal else {"bottom": base}
        draw(
            positions, percent(column), **size, **start,
            label=label, edgecolor="white", linewidth=0.4, **style,
        )  # fmt: skip
        base = base + percent(column)
    masked, critical = columns[0], columns[-1]
    for edge, bars in (
        (percent(masked), interval_lengths(masked)),
        (100 - percent(critical), interval_lengths(critical)[::-1]),
    ):
        where = (edge, positions) if horizontal else (positions, edge)
        error = {"xerr": bars} if horizontal else {"yerr": bars}
        axes.errorbar(*where, **error, linestyle="none", **ERROR_BARS)


def _print_shares(axes: Axes, columns: Sequence[Sequence[Estimate]]) -> None:
    """The bars' numbers in three columns to the right: the smallest share is hard to see."""
    for number, (label, column) in enumerate(zip(OUTCOME_STYLES, columns, strict=True)):
        x = 112.5 + 13 * number
        axes.text(x, -0.5, label.lower().replace("critical", "crit."), ha="right", fontsize=7.5)
        for row, share in enumerate(column):
            axes.text(x, row, f"{100 * share.value:.2f}", ha="right", va="center", fontsize=8)


def _critical_limit(parts: Sequence[Part]) -> float:
    """End of the axis, percent: layers with a handful of faults must not stretch it."""
    intervals = [part.critical.high for part in parts if part.num_faults >= _FEW_FAULTS]
    values = [part.critical.value for part in parts]
    highest = max(intervals or [part.critical.high for part in parts])
    return 105 * max(highest, *values, 1e-4)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))


def _column(parts: Sequence[Part], outcome: str) -> list[Estimate]:
    return [getattr(part, outcome) for part in parts]
