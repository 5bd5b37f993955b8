"""The command line that all experiments share: no loose words, errors in one line, a quick stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from experiments.common.stopping import STOPPED, stop_now, stop_soon
from jaxfi.campaign import NotReproducible

_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, NotReproducible)


def run_command(argv: Sequence[str], run: Callable[[], Any], stopped: str = STOPPED) -> None:
    """Calls `run`; what is wrong ends the program in one line, with exit code 1.

    Ctrl-C and SIGTERM end it soon, and `stopped` says so.
    """
    if len(argv) > 1:
        sys.exit(f"error: {argv[1]!r} is not a flag: all settings are --name=value")
    logging.set_verbosity(logging.WARNING)  # matplotlib tells of every glyph
    stop_soon(stopped)
    try:
        run()
    except _EXPECTED as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        stop_now(stopped)


def workdir_from(values: flags.FlagValues) -> Path:
    """The folder that --workdir names. Raises ValueError if it names none."""
    if not values["workdir"].value:
        raise ValueError("--workdir is missing: give the folder for the results")
    return Path(values["workdir"].value)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
