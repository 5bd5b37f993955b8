"""Where in the network and in the word a fault matters: outcome shares by layer and bit."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxfi.campaign._counts import CampaignCounts, Cells, cells_of
from jaxfi.campaign._result import Campaign
from jaxfi.faults._layers import layers_of
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import word_bits
from jaxfi.report._page import literal
from jaxfi.report._shares import BitFields, bit_fields, fault_dtype
from jaxfi.report._style import print_style

_WIDTH = 10.0  # inches: a landscape page or a screen
# Each of one hue, from light to dark, so that greyscale keeps the order.
_PANELS = {
    "masked": ("Masked", "Blues"),
    "non_critical": ("Not critical", "BuGn"),
    "critical": ("Critical", "Reds"),
}
_EMPTY: dict[str, Any] = {
    "facecolor": "#ffffff",
    "edgecolor": "#c4c4c4",
    "hatch": "/////",
    "linewidth": 0,
}


class BitShares(NamedTuple):
    """Outcome shares of the faults in each layer and bit position.

    Attributes:
      layers: L layer names, those with faults, in the parameter tree's order.
      bits: B bit positions, the highest first; -1, for faults of whole words, is last.
      num_faults: [L, B] int64.
      masked, non_critical, critical: [L, B] float64, shares of the (fault, image) pairs; NaN
        where there is no fault.
    """

    layers: list[str]
    bits: list[int]
    num_faults: np.ndarray
    masked: np.ndarray
    non_critical: np.ndarray
    critical: np.ndarray


def shares_by_layer_and_bit(campaign: Campaign | CampaignCounts) -> BitShares:
    """Outcome shares of each layer and bit position; a layer is the leaves under one module."""
    return _shares(cells_of(campaign))


def _shares(cells: Cells) -> BitShares:
    faults = cells.faults
    names = layers_of(faults.paths)
    layers = list(dict.fromkeys(names[leaf] for leaf in np.unique(faults.leaf)))
    row_of_leaf = np.array([layers.index(name) if name in layers else -1 for name in names])
    bits = _columns(faults)
    column = np.where(faults.bit < 0, len(bits) - 1, bits[0] - faults.bit)
    where = row_of_leaf[faults.leaf], column
    num_faults = np.zeros((len(layers), len(bits)), np.int64)
    np.add.at(num_faults, where, cells.num_faults)
    shares = []
    for outcome in _PANELS:
        total = np.zeros(num_faults.shape)
        np.add.at(total, where, cells.totals[outcome] / cells.num_images)
        shares.append(np.where(num_faults > 0, total / np.maximum(num_faults, 1), np.nan))
    return BitShares(layers, bits, num_faults, *shares)


def heat_map(campaign: Campaign | CampaignCounts) -> Figure:
    """A panel for each outcome: its share, percent, in a cell for each layer and bit position.

    The critical panel's scale ends at its highest cell, the others' at 100 %. Cells without
    faults are hatched.
    """
    cells = cells_of(campaign)
    shares = _shares(cells)
    with print_style():
        size = (_WIDTH, 1.55 + 0.2 * len(shares.layers))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(_PANELS), sharey=True)
        for axes, outcome in zip(panels, _PANELS, strict=True):
            _draw(figure, axes, outcome, 100 * getattr(shares, outcome))
            _label_bits(axes, cells.faults, shares.bits)
        names = [literal(name) for name in shares.layers]
        panels[0].set_yticks(np.arange(len(names)) + 0.5, names)
        panels[0].invert_yaxis()
        return figure


def _columns(faults: FaultList) -> list[int]:
    """Every bit of the widest faulty word, highest first, and -1 if faults take whole words."""
    width = max(word_bits(faults.dtypes[leaf]) for leaf in np.unique(faults.leaf))
    bits = list(reversed(range(width))) if (faults.bit >= 0).any() else []
    return bits + [-1] * bool((faults.bit < 0).any())


def _draw(figure: Figure, axes: Axes, outcome: str, percent: np.ndarray) -> None:
    title, colormap = _PANELS[outcome]
    top = max(float(np.nanmax(percent)), 1e-3) if outcome == "critical" else 100.0
    axes.set_facecolor("#ffffff")
    height, width = percent.shape
    axes.add_patch(Rectangle((0, 0), width, height, **_EMPTY))
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(percent), cmap=colormap, vmin=0, vmax=top,
        edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=40, pad=0.02, fraction=0.05)
    bar.set_label("Share of (fault, image) pairs (%)")
    bar.outline.set_visible(False)
    axes.set_title(title, loc="left", pad=15)
    axes.tick_params(axis="y", length=0)


def _label_bits(axes: Axes, faults: FaultList, bits: list[int]) -> None:
    """Bit positions every four, and the fields of the word if all words are of one float type."""
    shown = [column for column, bit in enumerate(bits) if bit % 4 == 0 or bit == bits[0]]
    labels = [str(bits[column]) for column in shown]
    if bits[-1] < 0:
        shown, labels = [*shown, len(bits) - 1], [*labels, "word"]
    axes.set_xticks(np.array(shown) + 0.5, labels)
    axes.xaxis.set_tick_params(length=2, pad=1)
    axes.set_xlabel("Bit position")
    with contextlib.suppress(ValueError):  # several types, or integers: no fields to name
        fields = bit_fields(fault_dtype(faults))
        if bits[0] == fields.sign:
            _mark_fields(axes, fields)


def _mark_fields(axes: Axes, fields: BitFields) -> None:
    low = 0
    for name, high in zip(fields._fields, fields, strict=True):
        left, right = fields.sign - high, fields.sign - low + 1
        label = "s" if name == "sign" else name
        axes.annotate(
            label, ((left + right) / 2, 1.0), xytext=(0, 2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="bottom", fontsize=7.5,
        )  # fmt: skip
        if left:
            axes.axvline(left, color="#1a1a1a", linewidth=0.8)
        low = high + 1
