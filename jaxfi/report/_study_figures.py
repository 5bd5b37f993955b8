"""Figures of the training-strategies study, drawn from the tables that it logs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxfi.faults._transforms import word_bits
from jaxfi.report._study_logs import Curves, Rows, accuracies, numbers, split
from jaxfi.report._style import SERIES_STYLES, TEXT_WIDTH, mark_fields, print_style

_LINES = itertools.product(("-", "--", "-.", ":"), ("o", "s", "^", "D"))
_LINE_STYLES = [{"linestyle": line, "marker": marker} for line, marker in _LINES]
_PANEL = 1.75  # inches

Ranges = Sequence[Sequence[int]]
"""The numbers of faults of each range that was injected."""


def training_figures(rows: Rows) -> dict[str, Figure]:
    """Every figure of training.csv, by the name of its files."""
    return {
        "training_curves": training_curves(rows),
        "training_losses": training_losses(rows),
        "weight_statistics": weight_statistics(rows),
    }


def injection_figures(rows: Rows, ranges: Ranges) -> dict[str, Figure]:
    """Every figure of accuracy_by_injections.csv, by the name of its files."""
    drawn = {
        "accuracy_by_injections": by_injections(rows, ranges),
        "accuracy_minus_mean": by_injections(rows, ranges, minus_mean=True),
    }
    if any(len(epochs) > 1 for epochs in accuracies(rows).values()):
        drawn["accuracy_by_epoch"] = by_epoch(rows, max(ranges, key=max))
    return drawn


def training_curves(rows: Rows) -> Figure:
    """A panel a strategy: test accuracy by epoch, the learning rate on a second axis."""

    def draw(axes: Axes, epochs: np.ndarray, part: Rows) -> None:
        accuracy = 100 * numbers(part, "test_accuracy")
        axes.plot(epochs, accuracy, color="#12466b", label="test accuracy (%)")
        axes.set_ylim(0, 100)

    return _by_epoch_with_rate(rows, draw)


def training_losses(rows: Rows) -> Figure:
    """A panel a strategy: training and test loss by epoch, the learning rate on a second axis."""

    def draw(axes: Axes, epochs: np.ndarray, part: Rows) -> None:
        train, test = numbers(part, "train_loss"), numbers(part, "test_loss")
        axes.plot(epochs, train, color="#3d7a52", linestyle=":", label="training loss")
        axes.plot(epochs, test, color="#12466b", label="test loss")

    return _by_epoch_with_rate(rows, draw)


def _by_epoch_with_rate(rows: Rows, draw: Callable[[Axes, np.ndarray, Rows], None]) -> Figure:
    strategies = split(rows, "strategy")
    rates = numbers(rows, "learning_rate")
    rates = rates[rates > 0]  # the end of a cosine is 0, which no logarithm shows
    limits = [10 ** np.floor(np.log10(rates.min()) - 0.1), 10 ** np.ceil(np.log10(rates.max()))]
    with print_style():
        figure, panels = _grid(len(strategies), columns=3)
        for axes, (name, part) in zip(panels, strategies.items(), strict=True):
            epochs = numbers(part, "epoch")
            draw(axes, epochs, part)
            axes.set_title(name, fontsize=6.5)
            rate = axes.twinx()
            rate.plot(
                epochs, numbers(part, "learning_rate"),
                color="#c8601b", linestyle="--", label="learning rate",
            )  # fmt: skip
            rate.set(yscale="log", ylim=limits)
            rate.minorticks_off()
            rate.spines["right"].set_visible(True)
            rate.tick_params(axis="y", colors="#c8601b")
        figure.legend(*_handles(panels[0], rate), loc="outside upper center", ncols=4)
        figure.supxlabel("Epoch", fontsize=8.5)
        return figure


def weight_statistics(rows: Rows) -> Figure:
    """Mean, standard deviation and L2 norm of all weights by epoch, a line a strategy."""
    strategies = split(rows, "strategy")
    labels = {"weight_mean": "Mean", "weight_std": "Standard deviation", "weight_l2": "L2 norm"}
    with print_style():
        figure = Figure(
            figsize=(TEXT_WIDTH, 2.4 + 0.14 * len(strategies) / 3), layout="constrained"
        )
        for axes, (column, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
            for number, (name, part) in enumerate(strategies.items()):
                values = numbers(part, column)
                style = _line_style(number, len(strategies))
                axes.plot(numbers(part, "epoch"), values, label=name, markersize=2.5, **style)
            axes.set(xlabel="Epoch", title=label)
            if column != "weight_mean" and _is_wide(numbers(rows, column)):
                axes.set_yscale("log")
            axes.tick_params(labelsize=7)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                      fontsize=6.5)  # fmt: skip
        return figure


def by_injections(rows: Rows, ranges: Ranges, minus_mean: bool = False) -> Figure:
    """Accuracy by number of faults: a row an optimizer, a column a range, a line a strategy.

    Bands go from the least to the most of the trials. Each strategy is shown at its last epoch
    with faults. With `minus_mean` the mean over all strategies is subtracted.
    """
    curves = {name: epochs[max(epochs)] for name, epochs in accuracies(rows).items()}
    mean = _mean_curve(curves.values()) if minus_mean else None
    by_optimizer: dict[str, dict[str, Curves]] = {}
    for name, curve in curves.items():
        by_optimizer.setdefault(name.partition("-")[0], {})[name] = curve
    with print_style():
        height = 0.8 + 2.1 * len(by_optimizer)
        figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
        panels = figure.subplots(len(by_optimizer), len(ranges), squeeze=False, sharey=True)
        for line, (optimizer, part) in zip(panels, by_optimizer.items(), strict=True):
            for axes, counts in zip(line, ranges, strict=True):
                _draw_curves(axes, part, counts, mean)
                axes.set_title(f"{optimizer}, up to {max(counts):,} faults", loc="left")
            line[0].set_ylabel("Accuracy - mean (points)" if minus_mean else "Accuracy (%)")
            line[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        if not minus_mean:
            panels[0, 0].set_ylim(0, 100)
        _label_faults(panels[-1])
        return figure


def by_epoch(rows: Rows, counts: Sequence[int]) -> Figure:
    """Accuracy by number of faults at several epochs of one training, a panel a strategy."""
    several = {name: epochs for name, epochs in accuracies(rows).items() if len(epochs) > 1}
    with print_style():
        figure, panels = _grid(len(several), columns=2)
        for axes, (name, epochs) in zip(panels, several.items(), strict=False):
            named = {f"epoch {epoch}": curve for epoch, curve in sorted(epochs.items())}
            _draw_curves(axes, named, counts, None)
            axes.set_title(name, loc="left", fontsize=7)
            axes.set(ylim=(0, 100), ylabel="Accuracy (%)")
            axes.legend(fontsize=7)
        _label_faults(panels[max(len(several) - 2, 0) : len(several)])
        return figure


def areas(rows: Rows) -> Figure:
    """Areas of robustness.csv with their intervals: a line a recipe, a marker a seed.

    A column a range; each strategy at its last epoch with faults.
    """
    last = {row["strategy"]: row["epoch"] for row in sorted(rows, key=lambda r: int(r["epoch"]))}
    rows = [row for row in rows if row["epoch"] == last[row["strategy"]]]
    ranges, recipes = split(rows, "max_faults"), [*split(rows, "recipe")]
    with print_style():
        figure = Figure(figsize=(TEXT_WIDTH, 0.8 + 0.22 * len(recipes)), layout="constrained")
        panels = figure.subplots(1, len(ranges), squeeze=False, sharey=True)[0]
        for axes, (most, part) in zip(panels, ranges.items(), strict=True):
            for line, recipe in enumerate(recipes):
                _draw_areas(axes, line, [row for row in part if row["recipe"] == recipe])
            axes.set_title(f"Up to {int(most):,} faults", loc="left")
            axes.set_xlabel("Area under the relative accuracy")
            axes.grid(axis="x", linewidth=0.4, color="#dddddd")
        panels[0].set_yticks(range(len(recipes)), recipes, fontsize=7)
        panels[0].set_ylim(len(recipes) - 0.5, -0.5)
        return figure


def by_bit(rows: Rows) -> Figure:
    """Accuracy by bit position: a panel a dtype, a line a number of faults, fields marked.

    Bands go from the least to the most of the trials; a cross marks NaN or Inf in an output.
    """
    dtypes = split(rows, "dtype")
    with print_style():
        height = 0.7 + _PANEL * len(dtypes)
        figure = Figure(figsize=(TEXT_WIDTH, height), layout="constrained")
        panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
        for axes, (dtype, part) in zip(panels, dtypes.items(), strict=True):
            for number, (count, chosen) in enumerate(split(part, "num_faults").items()):
                style = SERIES_STYLES[number % len(SERIES_STYLES)]
                _draw_bits(axes, chosen, f"k = {int(count):,}", style)
            _mark_word(axes, dtype)
            axes.set(ylim=(-3, 103), ylabel=f"{dtype}\nAccuracy (%)")
        panels[-1].set_xlabel("Bit position of the faults in the stored word")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
        return figure


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Curves],
    counts: Sequence[int],
    mean: Mapping[int, float] | None,
) -> None:
    for number, (name, curve) in enumerate(curves.items()):
        base = np.array([0.0 if mean is None else mean[count] for count in counts])
        trials = 100 * (np.stack([curve[count] for count in counts], axis=1) - base[None])
        style = _line_style(number, len(curves))
        axes.plot(counts, trials.mean(axis=0), label=name, markersize=2.5, **style)
        axes.fill_between(counts, trials.min(axis=0), trials.max(axis=0),
                          color=style["color"], alpha=0.15, linewidth=0)  # fmt: skip
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")


def _draw_areas(axes: Axes, line: int, seeds: Rows) -> None:
    """One recipe's seeds, one below the other within the line."""
    places = line + 0.5 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) / max(len(seeds), 3)
    value, low, high = (numbers(seeds, name) for name in ("area", "area_low", "area_high"))
    lengths = np.maximum([value - low, high - value], 0)
    axes.errorbar(
        value, places, xerr=lengths, fmt="o", markersize=2.5, color="#12466b", elinewidth=0.7
    )


def _draw_bits(axes: Axes, rows: Rows, label: str, style: Mapping[str, Any]) -> None:
    bits = split(rows, "bit")
    positions = np.array([int(bit) for bit in bits])
    trials = [100 * numbers(part, "accuracy") for part in bits.values()]
    mean = np.array([values.mean() for values in trials])
    axes.plot(positions, mean, label=label, markersize=2.5, linewidth=0.8, **style)
    low, high = ([reduce(values) for values in trials] for reduce in (np.min, np.max))
    axes.fill_between(positions, low, high, color=style["color"], alpha=0.15, linewidth=0)
    bad = np.array([numbers(part, "num_non_finite").any() for part in bits.values()])
    axes.plot(positions[bad], mean[bad], "x", color="#8c2330", markersize=6, zorder=4)


def _mark_word(axes: Axes, dtype: str) -> None:
    width = word_bits(dtype)
    mark_fields(axes, dtype)
    if dtype.startswith("int"):
        axes.axvline(width - 1.5, color="#1a1a1a", linewidth=0.8, linestyle=(0, (4, 2)))
        axes.annotate("sign", (width - 1, 1.02), xycoords=("data", "axes fraction"), ha="center",
                      va="bottom", fontsize=7.5, annotation_clip=False)  # fmt: skip
        axes.set_xlim(width - 0.3, -0.7)
    # Every position where labels fit; of 64 every fourth, bits 62 and 54 among them.
    axes.set_xticks(range(width) if width <= 32 else range(2, width, 4))


def _mean_curve(curves: Iterable[Curves]) -> dict[int, float]:
    """Mean over strategies and trials, by number of faults."""
    curves = list(curves)
    return {count: float(np.mean([curve[count].mean() for curve in curves])) for count in curves[0]}


def _is_wide(values: np.ndarray) -> bool:
    """Values > 0 that only a logarithm shows side by side."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and 0 < 10 * finite.min() < finite.max())


def _line_style(number: int, total: int) -> dict[str, Any]:
    """Colours that fall in lightness, and lines and markers that do not need colour."""
    colour = matplotlib.colormaps["viridis"](0.05 + 0.85 * number / max(total - 1, 1))
    return {"color": colour, "linewidth": 0.9, **_LINE_STYLES[number % len(_LINE_STYLES)]}


def _grid(number: int, columns: int) -> tuple[Figure, list[Axes]]:
    columns = min(columns, number)
    lines = -(-number // columns)
    figure = Figure(figsize=(TEXT_WIDTH, 0.9 + _PANEL * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels[:number]


def _handles(*panels: Axes) -> tuple[list, list]:
    handles, labels = zip(*(axes.get_legend_handles_labels() for axes in panels), strict=True)
    return list(itertools.chain(*handles)), list(itertools.chain(*labels))


def _label_faults(panels: Iterable[Axes]) -> None:
    for axes in panels:
        axes.set_xlabel("Weights that read 0")
