"""How many test images it takes to detect a network's faults: figure and tables.

sets = [measure_coverage(name, campaign.outcomes, "observable") for name, campaign in ...]
save_figure(coverage_figure(sets), folder / "coverage")
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxfi.data._files import write_whole
from jaxfi.report._latex import latex_text
from jaxfi.report._page import literal
from jaxfi.report._style import SERIES_STYLES, TEXT_WIDTH, print_style
from jaxfi.testset import (
    DETECTS,
    Cover,
    Curve,
    ExactCover,
    cover,
    coverage_curve,
    exact_cover_size,
    images_needed,
    num_detectable,
)

FRACTIONS = (0.9, 0.99, 1.0)
COLUMNS = (
    "network", "detect", "num_faults", "num_detectable", "num_images",
    "greedy_90", "greedy_99", "greedy_100", "exact_100", "exact_100_lower",
    "random_90", "random_99", "random_100",
)  # fmt: skip
HEADINGS = (
    "Network", "Faults", "Detectable", "Greedy 90 %", "99 %", "100 %", "Smallest",
    "Random 90 %", "99 %", "100 %",
)  # fmt: skip
_RANDOM: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (4, 2))}
_TITLES = {"observable": "Observable faults", "critical": "Critical faults"}


class Coverage(NamedTuple):
    """What the images of one campaign detect.

    Attributes:
      network: the name to print.
      detect: "observable" or "critical".
      num_faults, num_images: size of the campaign.
      num_detectable: faults that at least one image detects.
      cover: the greedy image set.
      random: images in random order; None if nothing is detectable.
      exact: the smallest image set, if it was looked for.
    """

    network: str
    detect: str
    num_faults: int
    num_images: int
    num_detectable: int
    cover: Cover
    random: Curve | None
    exact: ExactCover | None


def measure_coverage(
    network: str,
    outcomes: np.ndarray,
    detect: str = "observable",
    *,
    num_orders: int = 100,
    seed: int = 0,
    time_limit: float = 0.0,
) -> Coverage:
    """Greedy, random and, with a time limit, smallest image sets of one campaign.

    Args:
      network: the name to print.
      outcomes: [F, N] uint8.
      detect: see `jaxfi.testset.cover`.
      num_orders, seed: random permutations of the images, to compare with.
      time_limit: seconds to look for the smallest image set; 0 does not look.

    Raises ValueError or TypeError as `jaxfi.testset.cover`.
    """
    detectable = num_detectable(outcomes, detect)
    return Coverage(
        network,
        detect,
        len(outcomes),
        outcomes.shape[1],
        detectable,
        cover(outcomes, detect),
        coverage_curve(outcomes, detect, num_orders=num_orders, seed=seed) if detectable else None,
        exact_cover_size(outcomes, detect, time_limit=time_limit) if time_limit else None,
    )


def coverage_figure(coverages: Sequence[Coverage]) -> Figure:
    """Detected faults, percent of all injected, against images: a panel for each `detect`.

    Each network has its greedy order, marked where it detects 90, 99 and 100 % of what all images
    detect, and the mean and the band of nine tenths of random orders.

    Args:
      coverages: of one or more networks. Raises ValueError for none.
    """
    if not coverages:
        raise ValueError("no figure of no coverages: give at least one")
    networks = list(dict.fromkeys(c.network for c in coverages))
    styles: dict[str, dict[str, Any]] = {
        n: dict(SERIES_STYLES[i % len(SERIES_STYLES)]) for i, n in enumerate(networks)
    }
    detects = [d for d in DETECTS if any(c.detect == d for c in coverages)]
    with print_style():
        figure = Figure(figsize=(TEXT_WIDTH, 3.2), layout="constrained")
        panels = figure.subplots(1, len(detects), squeeze=False)[0]
        for axes, detect in zip(panels, detects, strict=True):
            shown = [c for c in coverages if c.detect == detect and c.random is not None]
            for line, coverage in enumerate(shown):
                _draw(axes, coverage, styles[coverage.network], line)
            _dress(axes, _TITLES[detect], max(c.num_images for c in coverages))
        handles = [
            *(Line2D([], [], label=literal(n), markersize=4.5, **styles[n]) for n in networks),
            Line2D([], [], color="#555555", linewidth=1.5, label="greedy order"),
            Line2D([], [], color="#555555", **_RANDOM, label="random order, mean and 5–95 %"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
        return figure


def write_csv(coverages: Sequence[Coverage], path: str | os.PathLike[str]) -> None:
    """Writes the columns of `COLUMNS`; where there is no number, the field is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for c in coverages:
        exact = (c.exact.size, c.exact.lower) if c.exact else (None, None)
        counts = (c.num_faults, c.num_detectable, c.num_images)
        writer.writerow((c.network, c.detect, *counts, *_greedy(c), *exact, *_random(c)))
    write_whole(Path(path), text.getvalue().encode())


def write_markdown(coverages: Sequence[Coverage], path: str | os.PathLike[str]) -> None:
    """Writes the images needed for 90, 99 and 100 % as a Markdown table."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    for coverage in coverages:
        cells = (cell.replace("|", r"\|") for cell in coverage_cells(coverage))
        lines.append(f"| {' | '.join(cells)} |")
    write_whole(Path(path), "\n".join([*lines, "", caption(coverages), ""]).encode())


def write_latex(coverages: Sequence[Coverage], path: str | os.PathLike[str]) -> None:
    """Writes the images needed for 90, 99 and 100 % as a booktabs `tabular`."""
    greedy = r"\multicolumn{4}{c}{Images, greedy order}"
    random = r"\multicolumn{3}{c}{Images, random order}"
    fractions = [heading.removeprefix("Random ") for heading in HEADINGS[7:]]
    headings = [*HEADINGS[:3], *fractions, HEADINGS[6], *fractions]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{ll" + "r" * (len(HEADINGS) - 2) + "}",
        r"\toprule",
        f"& & & {greedy} & {random}" + r" \\",
        r"\cmidrule(lr){4-7} \cmidrule(l){8-10}",
        " & ".join(map(latex_text, headings)) + r" \\",
        r"\midrule",
        *(" & ".join(map(latex_text, coverage_cells(c))) + r" \\" for c in coverages),
        r"\bottomrule",
        r"\multicolumn{10}{@{}p{0.95\linewidth}}{\footnotesize "
        + latex_text(caption(coverages))
        + "}",
        r"\end{tabular}",
    ]
    write_whole(Path(path), ("\n".join(lines) + "\n").encode())


def coverage_cells(coverage: Coverage) -> list[str]:
    """The table's row of one campaign, texts under `HEADINGS`."""
    exact = coverage.exact
    smallest = "–" if exact is None else f"{exact.size:,}"
    if exact is not None and exact.lower < exact.size:
        smallest = f"{exact.lower:,}–{exact.size:,}"
    needed = [f"{number:,}" if number is not None else "–" for number in _greedy(coverage)]
    random = [f"{number:,}" if number is not None else "–" for number in _random(coverage)]
    detectable = f"{coverage.num_detectable:,} ({_detectable_percent(coverage):.2f} %)"
    return [coverage.network, coverage.detect, detectable, *needed, smallest, *random]


def caption(coverages: Sequence[Coverage]) -> str:
    """What the table's numbers are."""
    first = coverages[0]
    return (
        f"Images needed to detect 90, 99 and 100 % of the faults that all {first.num_images:,} "
        f"images detect, of {first.num_faults:,} injected. Greedy: each next image detects most "
        "of what is left. Smallest: the optimum for 100 %, or the bounds known. Random: as many "
        "images suffice in 95 of 100 random orders."
    )


def _greedy(coverage: Coverage) -> tuple[int | None, ...]:
    return images_needed(coverage.cover, FRACTIONS)


def _random(coverage: Coverage) -> tuple[int | None, ...]:
    if coverage.random is None:
        return (0,) * len(FRACTIONS)
    return images_needed(coverage.random.low, FRACTIONS)


def _draw(axes: Axes, coverage: Coverage, style: Mapping[str, Any], line: int) -> None:
    """One network's greedy and random orders, and the size of its image set as a line of text."""
    assert coverage.random is not None
    percent, color = _detectable_percent(coverage), style["color"]
    images = _shown_on_log_axis(coverage.num_images)
    mean, low, high = (percent * curve[images - 1] for curve in coverage.random)
    axes.fill_between(images, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(images, mean, color=color, **_RANDOM)
    # The last level goes on: more images detect nothing more.
    greedy = percent * np.append(coverage.cover.coverage, np.ones(1))
    steps = np.append(np.arange(1, len(greedy)), max(coverage.num_images, len(greedy)))
    axes.step(steps, greedy, where="post", color=color, linewidth=1.5)
    needed = np.array(_greedy(coverage))
    axes.plot(needed, greedy[needed - 1], linestyle="none", markersize=4.5, **style)
    height = 0.95 - 0.075 * line
    axes.plot(0.045, height, markersize=4.5, transform=axes.transAxes, **style)
    axes.text(
        0.075, height - 0.003, f"all detectable with {needed[-1]:,} images",
        transform=axes.transAxes, va="center", fontsize=7.5,
    )  # fmt: skip


def _shown_on_log_axis(num_images: int) -> np.ndarray:
    """Of 1 to `num_images`, as many as a logarithmic axis can show: 200 a decade."""
    count = 2 + int(200 * np.log10(num_images))
    return np.unique(np.geomspace(1, num_images, count).astype(int))


def _detectable_percent(coverage: Coverage) -> float:
    return 100 * coverage.num_detectable / coverage.num_faults


def _dress(axes: Axes, title: str, num_images: int) -> None:
    axes.set_title(title, loc="left")
    axes.set_xscale("log")
    axes.set(
        xlim=(0.9, num_images * 1.1), xlabel="Test images", ylabel="Detected, of all injected (%)"
    )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the lines of text
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
