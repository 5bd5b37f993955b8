"""Tables and figures of the training-strategies study, made of what its experiments logged.

`python -m jaxfi.report.study DIR` makes them again; DIR is the workdir of either experiment.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jaxfi.data._files import read_csv
from jaxfi.report._study_figures import areas, by_bit, injection_figures, training_figures
from jaxfi.report._study_logs import (
    BIT_COLUMNS,
    INJECTION_COLUMNS,
    NETWORK_COLUMNS,
    ROBUSTNESS_COLUMNS,
    SUMMARY_COLUMNS,
    TRAINING_COLUMNS,
    Rows,
    logged_ranges,
)
from jaxfi.report._study_tables import write_tables
from jaxfi.report.figures import save_figure

__all__ = [
    "BIT_COLUMNS",
    "INJECTION_COLUMNS",
    "NETWORK_COLUMNS",
    "ROBUSTNESS_COLUMNS",
    "SUMMARY_COLUMNS",
    "TRAINING_COLUMNS",
    "write_study",
]


def write_study(workdir: str | Path) -> list[Path]:
    """Writes every table and draws every figure that the logs in `workdir` allow.

    Returns the figures' files, PDF, SVG and PNG. Raises FileNotFoundError if nothing was logged,
    ValueError for a table that is damaged.
    """
    workdir = Path(workdir)
    if (workdir / "summary.csv").exists():
        write_tables(workdir)
    drawn: dict[str, Figure] = {}
    if rows := _logged(workdir / "training.csv", TRAINING_COLUMNS):
        drawn |= training_figures(rows)
    if rows := _logged(workdir / "accuracy_by_injections.csv", INJECTION_COLUMNS):
        drawn |= injection_figures(rows, logged_ranges(workdir, rows))
    if rows := _logged(workdir / "robustness.csv", ROBUSTNESS_COLUMNS):
        drawn["areas"] = areas(rows)
    if rows := _logged(workdir / "accuracy_by_bit.csv", BIT_COLUMNS):
        drawn["accuracy_by_bit"] = by_bit(rows)
    if not drawn:
        raise FileNotFoundError(f"{workdir} has no training.csv and no accuracy_by_*.csv")
    return [path for stem, figure in drawn.items()
            for path in save_figure(figure, workdir / stem)]  # fmt: skip


def _logged(path: Path, columns: Sequence[str]) -> Rows:
    """The rows of a table; none if there is no such table."""
    return read_csv(path, columns) if path.exists() else []


def main(arguments: Sequence[str]) -> None:
    """Exits with one line that says what is wrong."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: python -m jaxfi.report.study DIR    (DIR: an experiment's workdir)")
    try:
        for path in write_study(arguments[0]):
            print(path)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(sys.argv[1:])
