"""What the figures of the report have in common: look, sizes, numbers as matplotlib takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from jaxfi.outcomes._outcomes import Estimate
from jaxfi.report._shares import bit_fields

SERIES_STYLES = (
    {"marker": "o", "color": "#12466b", "markerfacecolor": "#12466b"},
    {"marker": "s", "color": "#c8601b", "markerfacecolor": "white"},
    {"marker": "^", "color": "#3d7a52", "markerfacecolor": "#3d7a52"},
    {"marker": "D", "color": "#8a4f9e", "markerfacecolor": "white"},
)
_STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.dpi": 110,
    "pdf.fonttype": 42,  # editable text, which publishers ask for
    "svg.fonttype": "none",
}
ERROR_BARS = {"ecolor": "#1a1a1a", "elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9}
TEXT_WIDTH = 6.9  # inches: a two-column text width


@contextmanager
def print_style() -> Iterator[None]:
    """Figures are to be drawn within this context."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "jaxfi"}):
        yield


def mark_fields(axes: Axes, dtype: str) -> None:
    """Names sign, exponent and mantissa above the bars; the most significant bit is left."""
    try:
        fields = bit_fields(dtype)
    except ValueError:  # an integer word has none
        return
    low = 0
    for name, high in zip(fields._fields, fields, strict=True):
        axes.annotate(
            name, ((low + high) / 2, 1.02), xycoords=("data", "axes fraction"),
            ha="center", va="bottom", fontsize=7.5, annotation_clip=False,
        )  # fmt: skip
        if low:
            axes.axvline(low - 0.5, color="#1a1a1a", linewidth=0.8, linestyle=(0, (4, 2)))
        low = high + 1
    axes.set_xlim(fields.sign + 0.7, -0.7)
    axes.set_xticks([fields.sign, fields.exponent, *range(0, fields.mantissa + 2, 4)])


def percent(estimates: Sequence[Estimate]) -> np.ndarray:
    """The values, [len] percent."""
    return 100 * np.array([estimate.value for estimate in estimates])


def interval_lengths(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths of the intervals below and above the value, [2, len] percent."""
    value, low, high = 100 * np.array(estimates).T
    return np.maximum(np.stack([value - low, high - value]), 0)
