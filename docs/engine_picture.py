"""Draws docs/engine.svg, the picture of docs/engine.md: python docs/engine_picture.py [FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

# Faults by colour (Okabe and Ito), the channel that each is in, and the images that it survives.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
CHANNELS = (1, 3, 3, 0, 5, 2)
SURVIVORS = {(0, 0), (0, 2), (2, 3), (3, 1), (5, 0)}  # (fault, image)
NUM_IMAGES, CELL = 4, 0.32
GOLDEN, EDGE, TEXT = "#E4E4E4", "#8A8A8A", "#222222"


def grid(axes: Axes, left: float, top: float, colours: list[list[str]]) -> None:
    """A table of coloured cells; `colours` has a list per row."""
    for row, cells in enumerate(colours):
        for column, colour in enumerate(cells):
            corner = (left + column * CELL, top - (row + 1) * CELL)
            axes.add_patch(
                Rectangle(corner, CELL, CELL, facecolor=colour, edgecolor=EDGE, linewidth=0.7)
            )


def mark(axes: Axes, left: float, top: float, row: int, column: int) -> None:
    """The faulty element."""
    x, y = left + (column + 0.5) * CELL, top - (row + 0.5) * CELL
    axes.plot(x, y, marker="x", color="black", markersize=6, markeredgewidth=1.6)


def text(axes: Axes, x: float, y: float, content: str, **options) -> None:
    axes.text(x, y, content, ha="center", va="top", fontsize=9, color=TEXT, **options)


def arrow(axes: Axes, start: float, end: float, y: float) -> None:
    style = {"arrowstyle": "-|>", "color": TEXT, "linewidth": 1.2}
    axes.annotate("", xy=(end, y), xytext=(start, y), arrowprops=style)


def prefix(axes: Axes, left: float) -> None:
    grid(axes, left, 2.0, [[GOLDEN] * 5] * NUM_IMAGES)
    text(axes, left + 2.5 * CELL, 3.52, "1  prefix", weight="bold")
    text(axes, left + 2.5 * CELL, 3.25, "golden, once per batch,\nfor all faults of the leaf")
    text(axes, left + 2.5 * CELL, 0.55, "the layer's input\nrow: image")


def columns(axes: Axes, left: float) -> None:
    top = 2.0 + CELL / 2
    grid(axes, left, top, [list(COLOURS)] * 5)
    for column, row in enumerate((2, 0, 4, 1, 3, 2)):
        mark(axes, left, top, row, column)
    for column, channel in enumerate(CHANNELS):
        text(axes, left + (column + 0.5) * CELL, top + 0.24, str(channel))
    text(axes, left + 3 * CELL, 3.52, "2  columns", weight="bold")
    text(axes, left + 3 * CELL, 3.25, "the layer's own program on\na kernel of its own shape")
    text(axes, left + 3 * CELL, 2.66, "golden channel copied:")
    text(axes, left + 3 * CELL, 0.4, "column: one fault (×)")


def tail(axes: Axes, left: float) -> None:
    cells = [
        [COLOURS[k] if (k, image) in SURVIVORS else "white" for k in range(len(COLOURS))]
        for image in range(NUM_IMAGES)
    ]
    grid(axes, left, 2.0, cells)
    text(axes, left + 3 * CELL, 3.52, "3  channel tail", weight="bold")
    text(axes, left + 3 * CELL, 3.25, "bias, BatchNorm, ReLU, pool;\ncompare bits with golden")
    text(axes, left + 3 * CELL, 0.55, "white: equal, so masked\ncoloured: survives")


def pack(axes: Axes, left: float) -> None:
    rows = []
    for fault, _ in sorted(SURVIVORS)[:NUM_IMAGES]:
        row = [GOLDEN] * len(COLOURS)
        row[CHANNELS[fault]] = COLOURS[fault]
        rows.append(row)
    grid(axes, left, 2.0, rows)
    for channel in range(len(COLOURS)):
        text(axes, left + (channel + 0.5) * CELL, 2.24, str(channel))
    text(axes, left + 3 * CELL, 3.52, "4  pack", weight="bold")
    text(axes, left + 3 * CELL, 3.25, "golden activations with the\none channel replaced")
    text(axes, left + 3 * CELL, 0.55, "row: a surviving pair,\nof any fault and image")


def suffix(axes: Axes, left: float) -> None:
    axes.add_patch(
        Rectangle((left, 2.0 - 4 * CELL), 1.5, 4 * CELL, facecolor="white", edgecolor=TEXT)
    )
    text(axes, left + 0.75, 1.62, "rest of the\nnetwork,\ngolden weights")
    text(axes, left + 0.75, 3.52, "5  suffix", weight="bold")
    text(axes, left + 0.75, 3.25, "an ordinary batch,\nonce for each full one")
    text(axes, left + 0.75, 0.55, "logits: outcome\nof each pair")


def draw(path: Path) -> None:
    """Writes the picture, in the format of the file's suffix."""
    figure, axes = plt.subplots(figsize=(12.2, 3.5))
    axes.set(xlim=(0, 13.1), ylim=(-0.1, 3.6), aspect="equal")
    axes.axis("off")
    middle = 2.0 - 2 * CELL
    for part, left in ((prefix, 0.4), (columns, 2.95), (tail, 5.75), (pack, 8.5), (suffix, 11.2)):
        part(axes, left)
    for start, end in ((2.1, 2.85), (4.97, 5.65), (7.77, 8.4), (10.52, 11.1)):
        arrow(axes, start, end, middle)
    # Reproducible: no date, fixed identifiers.
    plt.rcParams.update({"svg.hashsalt": "jaxfi", "svg.fonttype": "none"})
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, bbox_inches="tight", dpi=110, metadata=metadata, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("engine.svg"))
