"""Does jaxfi agree with what others published? One network, fault by fault.

The published faults, or a stratified sample of them, are injected into the published network under
a named arithmetic, and each fault's shares of masked and critical images are put beside the
published ones. A layer of the table is the first part of a leaf's path: `layer3`.

    python -m experiments.ground_truth --network=resnet20 --weights=FILE.npz --outcomes=FILE.csv \\
        --arithmetic='layer3/*=tf32,*=float32' --num_faults=1000 --num_images=500 --workdir=DIR
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console

from experiments.common.agreement import (
    Agreement,
    compare,
    correct_images,
    print_agreement,
    print_correlations,
    sample_rows,
    write_agreement,
    write_faults,
    write_intervals,
)
from experiments.common.command import run_command, workdir_from
from experiments.common.config import check_same_config, claim_workdir, parse_flags
from experiments.common.published_network import (
    NetworkSettings,
    check_arithmetic,
    define_network_flags,
    given_settings,
    load_subject,
)
from jaxfi.campaign import Campaign, run_campaign
from jaxfi.convert import ResultTable, read_results
from jaxfi.engine import PRECISIONS
from jaxfi.faults import FaultList


@dataclasses.dataclass(frozen=True)
class Settings(NetworkSettings):
    """Everything that decides the result; the flags have the same names and say what they mean."""

    outcomes: str
    arithmetic: str
    precision: str


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `Settings`, and --workdir."""
    define_network_flags(values)
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    text("outcomes", None, "Published faults and outcomes (CSV, see jaxfi.convert).")
    text("arithmetic", "*=float32", "PATTERN=ARITHMETIC, comma-separated; first match counts.")
    flags.DEFINE_integer(
        "num_faults", 0, "Faults, stratified by layer and bits; 0 is all.", 0, flag_values=values
    )
    flags.DEFINE_enum(
        "precision", "highest", PRECISIONS, "Of the backend's matmuls.", flag_values=values
    )


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """Raises ValueError for a missing file name or numbers that are none."""
    return Settings(**given_settings(Settings, values, ("weights", "outcomes")))


def parse_arithmetic(text: str) -> dict[str, str]:
    """PATTERN=ARITHMETIC, comma-separated, as `with_arithmetic` takes it; ValueError for others.

    >>> parse_arithmetic("layer3/*=tf32,*=float32")
    {'layer3/*': 'tf32', '*': 'float32'}
    """
    entries = {}
    for entry in text.split(","):
        pattern, equals, name = entry.rpartition("=")
        if not equals or not pattern or pattern in entries:
            raise ValueError(f"arithmetic {text!r} is not PATTERN=ARITHMETIC,... of new patterns")
        entries[pattern] = name
    return entries


def restrict(faults: FaultList, pattern: str, bits: Sequence[int]) -> np.ndarray:
    """Rows of the faults whose leaf's path matches, in these bits (none: all).

    Raises ValueError if there is none.
    """
    chosen = np.array([fnmatch.fnmatchcase(path, pattern) for path in faults.paths])[faults.leaf]
    if not chosen.any():
        hit = ", ".join(faults.paths[leaf] for leaf in np.unique(faults.leaf))
        raise ValueError(f"--paths={pattern}: no fault there; the list has faults in {hit}")
    if bits:
        there = np.unique(faults.bit[chosen]).tolist()
        chosen &= np.isin(faults.bit, bits)
        if not chosen.any():
            raise ValueError(f"--bits={bits}: no fault there; the list has faults in {there}")
    return np.flatnonzero(chosen)


def run(settings: Settings, workdir: Path) -> list[Agreement]:
    """Injects the faults and compares. Raises ValueError or OSError, in one line, before that."""
    arithmetic = parse_arithmetic(settings.arithmetic)
    if not Path(settings.outcomes).is_file():
        raise FileNotFoundError(f"--outcomes={settings.outcomes}: no such file")
    check_same_config(settings, workdir)  # type: ignore[arg-type]
    subject = load_subject(settings)
    listed = read_results(settings.outcomes, subject.params)
    within = restrict(listed.faults, settings.paths, settings.bits)
    published = ResultTable(listed.faults[within], *(counts[within] for counts in listed[1:]))
    rows = sample_rows(published.faults, settings.num_faults, settings.seed)
    apply_fn = check_arithmetic(subject, arithmetic)
    claim_workdir(settings, workdir)  # type: ignore[arg-type]
    campaign = run_campaign(
        apply_fn,
        subject.params,
        published.faults[rows],
        subject.images,
        subject.labels,
        nan=settings.nan,
        engine=settings.engine,
        batch_size=settings.batch_size,
        precision=settings.precision,
        progress=True,
        workdir=workdir / "campaign",
    )
    write_faults(workdir / "faults.csv", listed, within[rows], campaign)
    return write_results(published, rows, campaign, subject.note, workdir)


def write_results(
    published: ResultTable, rows: np.ndarray, campaign: Campaign, note: str, workdir: Path
) -> list[Agreement]:
    """agreement.csv, intervals.csv; the table and correlations on the terminal."""
    console = Console()
    agreements = compare(published, rows, campaign)
    write_agreement(workdir / "agreement.csv", agreements)
    print_agreement("all images", agreements, console)
    of_correct = compare(published, rows, correct_images(campaign))
    write_intervals(workdir / "intervals.csv", {"all": agreements, "right": of_correct})
    print_agreement("images that the golden network gets right", of_correct[-1:], console)
    print_correlations(published, rows, campaign, console)
    accuracy = f"{len(campaign.labels):,} images, clean accuracy {campaign.clean_accuracy:.4f}"
    console.print(f"{accuracy}; {note}", highlight=False)
    return agreements


def run_from_flags(values: flags.FlagValues) -> None:
    """`run` as the flags say."""
    workdir = workdir_from(values)
    run(settings_from_flags(values), workdir)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
