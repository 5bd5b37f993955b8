"""The paper's table, from campaigns: CSV, Markdown, LaTeX and terminal."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfi.campaign._result import Campaign
from jaxfi.data._files import write_whole
from jaxfi.outcomes._outcomes import Estimate, Rates
from jaxfi.report._latex import latex_text

COLUMNS = (
    "dataset", "model", "loss", "optimizer", "epochs", "alpha", "clean_acc", "faulty_acc",
    "masked", "non_critical", "critical", "due", "num_faults", "num_images",
)  # fmt: skip
HEADINGS = ("Model", "Loss", "Clean Acc", "Faulty Acc", "Masked", "Not Critical", "Critical")


class TableRow(NamedTuple):
    """One campaign on one trained network.

    Attributes:
      dataset, model, loss, optimizer: names as in the flags; loss is "default" or "gradient".
      epochs: epochs trained.
      alpha: weight of the gradient penalty, 0 for the default loss.
      clean_accuracy: fraction of correct golden predictions.
      rates: outcome shares, DUE share and faulty accuracy, fractions with intervals.
      num_faults, num_images: size of the campaign.
      drawn_from: images that those of each fault were drawn from; None where they are all.
    """

    dataset: str
    model: str
    loss: str
    optimizer: str
    epochs: int
    alpha: float
    clean_accuracy: float
    rates: Rates
    num_faults: int
    num_images: int
    drawn_from: int | None = None


def table_row(
    campaign: Campaign,
    *,
    dataset: str,
    model: str,
    loss: str,
    optimizer: str,
    epochs: int,
    alpha: float,
    population: int | None = None,
    t: float | None = None,
    confidence: float | None = None,
) -> TableRow:
    """The table's row of one campaign.

    Args:
      campaign: F faults, N images.
      dataset, model, loss, optimizer, epochs, alpha: what was trained; see `TableRow`.
      population: possible faults; None is those that the list was drawn from.
      t, confidence: of the intervals, as in `Campaign.rates`.
    """
    num_faults, num_images = campaign.outcomes.shape
    drawn_from = None if campaign.images is None else len(campaign.labels)
    rates = campaign.rates(population=population, t=t, confidence=confidence)
    return TableRow(
        dataset, model, loss, optimizer, epochs, alpha,
        campaign.clean_accuracy, rates, num_faults, num_images, drawn_from,
    )  # fmt: skip


def write_csv(rows: Sequence[TableRow], path: str | os.PathLike[str]) -> None:
    """Writes `rows` with the columns of `COLUMNS`; accuracies and shares are percentages."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_values(row) for row in rows)
    write_whole(Path(path), text.getvalue().encode())


def write_markdown(
    rows: Sequence[TableRow], difference: Estimate, note: str, path: str | os.PathLike[str]
) -> None:
    """Writes `rows`, the paired difference of Masked (a fraction), and where the images are from
    (`jaxfi.data.Dataset.note`) as a Markdown table."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * 2 + "---:|" * 5]
    lines += [f"| {' | '.join(_cells(row, '{} [{}, {}]'))} |" for row in rows]
    lines += ["", *_below(rows, difference, note), ""]
    write_whole(Path(path), "\n".join(lines).encode())


def write_latex(
    rows: Sequence[TableRow], difference: Estimate, note: str, path: str | os.PathLike[str]
) -> None:
    """Writes `rows` as a booktabs `tabular`, with the same lines below it as in Markdown."""
    interval = r"\begin{{tabular}}{{@{{}}r@{{}}}}{}\\{{\scriptsize [{}, {}]}}\end{{tabular}}"
    body = [" & ".join(_cells(row, interval, latex_text)) + r" \\" for row in rows]
    below = [latex_text(line) for line in _below(rows, difference, note)]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{llrrrrr}",
        r"\toprule",
        " & ".join(HEADINGS) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        " \\\\\n".join(rf"\multicolumn{{7}}{{@{{}}l}}{{\footnotesize {line}}}" for line in below),
        r"\end{tabular}",
    ]
    write_whole(Path(path), ("\n".join(lines) + "\n").encode())


def print_table(
    rows: Sequence[TableRow], difference: Estimate, note: str, console: Console | None = None
) -> None:
    """Prints the paper's table, percentages over their intervals, and the lines below it."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)  # a log file need not wrap
    caption = escape("\n".join(_below(rows, difference, note)))
    table = Table(caption=caption, caption_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, "{}\n[dim]{}–{}[/dim]"), end_section=True)
    console.print(table)


def _values(row: TableRow) -> list[str | int | float]:
    rates = row.rates
    shares = (rates.faulty_accuracy, rates.masked, rates.non_critical, rates.critical, rates.due)
    percentages = [row.clean_accuracy, *(share.value for share in shares)]
    return [
        row.dataset, row.model, row.loss, row.optimizer, row.epochs, row.alpha,
        *(round(100 * fraction, 6) for fraction in percentages),
        row.num_faults, row.num_images,
    ]  # fmt: skip


def _cells(row: TableRow, interval: str, literal: Callable = str) -> list[str]:
    """A row's texts, made `literal`, and its shares as `interval` has them."""
    rates = row.rates
    shares = (rates.faulty_accuracy, rates.masked, rates.non_critical, rates.critical)
    loss = f"gradient, α={row.alpha:g}" if row.alpha else row.loss
    percentages = [interval.format(*(f"{100 * x:.2f}" for x in share)) for share in shares]
    return [literal(row.model), literal(loss), f"{100 * row.clean_accuracy:.2f}", *percentages]


def _below(rows: Sequence[TableRow], difference: Estimate, note: str) -> list[str]:
    first = rows[0]
    value, low, high = (100 * fraction for fraction in difference)
    size = f"{first.num_faults:,} faults × {first.num_images:,} images"
    if first.drawn_from is not None:
        margins = (row.rates.masked.high - row.rates.masked.low for row in rows)
        size += (
            f" drawn for each of {first.drawn_from:,} ({first.num_faults * first.num_images:,} "
            f"pairs, masked within ±{50 * max(margins):.2f} points)"
        )
    return [
        f"{first.dataset}, {size}, percent.",
        f"Masked, gradient − default, paired: {value:+.2f} [{low:+.2f}, {high:+.2f}] points.",
        f"Images: {note.rstrip('.')}.",
    ]
