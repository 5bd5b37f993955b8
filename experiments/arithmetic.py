"""How much of "masked" belongs to the accelerator? The same faults under several arithmetics.

One network, one fault list with equally many faults of every bit position, the same images; all
convolutions and matmuls multiply operands of float32, TF32, bfloat16. Writes arithmetic.csv (by bit
position), arithmetic_classes.csv and the figure masked_by_arithmetic (PDF, SVG, PNG).

    python -m experiments.arithmetic --flagfile=experiments/flags/arithmetic.flags \\
        --weights=FILE.npz --workdir=runs/arithmetic
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.common.agreement import BIT_CLASSES, in_decimals
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
from jaxfi.data import write_csv
from jaxfi.faults import sample_faults
from jaxfi.outcomes import CRITICAL, MASKED, estimate_rate, shares
from jaxfi.report import masked_beyond, masked_by_arithmetic
from jaxfi.report.figures import save_figure

COLUMNS = (
    "arithmetic", "bits", "num_faults", "masked", "masked_low", "masked_high",
    "by_rounding", "by_rounding_low", "by_rounding_high", "critical", "critical_low",
    "critical_high", "pairs_critical_in_one",
)  # fmt: skip
BITS = {str(bit): (bit,) for bit in reversed(range(32))}
CLASSES = {**BIT_CLASSES, "all": range(32)}


@dataclasses.dataclass(frozen=True)
class Settings(NetworkSettings):
    """Everything that decides the result; the flags have the same names and say what they mean."""

    arithmetics: list[str]


def define_flags(values: flags.FlagValues) -> None:
    """The flags of `Settings`, and --workdir."""
    define_network_flags(values)
    flags.DEFINE_list(
        "arithmetics",
        ["float32", "tf32", "bfloat16"],
        "The first is compared with.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_faults", 640, "Faults, equally many of each bit position.", 32, flag_values=values
    )


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """Raises ValueError for a missing file name or numbers that are none."""
    return Settings(**given_settings(Settings, values, ("weights",)))


def run(settings: Settings, workdir: Path) -> dict[str, Campaign]:
    """One campaign per arithmetic. Raises ValueError or OSError, in one line, before any."""
    check_same_config(settings, workdir)  # type: ignore[arg-type]
    subject = load_subject(settings)
    networks = {name: check_arithmetic(subject, {"*": name}) for name in settings.arithmetics}
    faults = sample_faults(
        settings.seed, subject.params, settings.num_faults,
        by="bit", paths=settings.paths, bits=settings.bits or None,
    )  # fmt: skip
    claim_workdir(settings, workdir)  # type: ignore[arg-type]
    campaigns = {
        name: run_campaign(
            apply_fn,
            subject.params,
            faults,
            subject.images,
            subject.labels,
            nan=settings.nan,
            engine=settings.engine,
            batch_size=settings.batch_size,
            progress=True,
            workdir=workdir / name,
        )
        for name, apply_fn in networks.items()
    }
    for name, parts in (("arithmetic", BITS), ("arithmetic_classes", CLASSES)):
        rows = in_decimals(table_rows(campaigns, parts))
        write_csv(workdir / f"{name}.csv", COLUMNS, rows)
    save_figure(masked_by_arithmetic(campaigns), workdir / "masked_by_arithmetic")
    print_summary(campaigns, subject.note)
    return campaigns


def table_rows(
    campaigns: Mapping[str, Campaign], parts: Mapping[str, Sequence[int]]
) -> Iterator[list]:
    """The values of `COLUMNS` for each arithmetic and each part, which is some bit positions.

    `by_rounding` is the share of pairs that the arithmetic masks and the first one does not;
    `pairs_critical_in_one` counts those that are critical in one of the two.
    """
    first = next(iter(campaigns.values()))
    for name, campaign in campaigns.items():
        masked, critical = (shares(campaign.outcomes, code) for code in (MASKED, CRITICAL))
        per_fault = (masked, masked_beyond(first, campaign), critical)
        moved = (campaign.outcomes == CRITICAL) != (first.outcomes == CRITICAL)
        for part, bits in parts.items():
            rows = np.isin(campaign.faults.bit, bits)
            if not rows.any():
                continue
            population = sum(campaign.faults.population_of(bit=bit) for bit in bits)
            estimates = [
                estimate_rate(numbers[rows], moved.shape[1], population) for numbers in per_fault
            ]
            yield [name, part, rows.sum(), *np.concatenate(estimates), moved[rows].sum()]


def print_summary(campaigns: Mapping[str, Campaign], note: str) -> None:
    """Accuracy and shares over all bits, per arithmetic."""
    first = next(iter(campaigns.values()))
    for name, _, _, *numbers, moved in table_rows(campaigns, {"all": CLASSES["all"]}):
        texts = [f"{a:.4f} [{b:.4f}, {c:.4f}]" for a, b, c in np.reshape(numbers, (-1, 3))]
        print(
            f"{name}: clean accuracy {campaigns[name].clean_accuracy:.4f}, masked {texts[0]}, "
            f"of which by rounding {texts[1]}, critical {texts[2]}, {moved} pairs in one only"
        )
    print(f"{len(first.faults):,} faults x {len(first.labels):,} images; {note}")


def run_from_flags(values: flags.FlagValues) -> None:
    """`run` as the flags say."""
    workdir = workdir_from(values)
    run(settings_from_flags(values), workdir)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS))


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
