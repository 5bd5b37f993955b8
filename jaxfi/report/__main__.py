"""Writes DIR/report.html, of a campaign or of an experiment: `python -m jaxfi.report DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxfi.report._html import write_report

USAGE = "usage: python -m jaxfi.report DIR    (DIR: a campaign's, or an experiment's workdir)"


def main(arguments: Sequence[str]) -> None:
    """Exits with one line that says what is wrong."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit(USAGE)
    try:
        print(write_report(arguments[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(sys.argv[1:])
