"""How much of "masked" belongs to the accelerator? The same faults under several arithmetics.

One network, one fault list with equally many faults of every bit position, the same images; all
convolutions and matmuls multiply operands of float32, TF32, bfloat16. Writes arithmetic.csv and
the figure masked_by_arithmetic (PDF, SVG, PNG).

    python -m experiments.arithmetic --flagfile=experiments/flags/arithmetic.flags \\
        --weights=FILE.npz --workdir=runs/arithmetic
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags

from experiments.command import run_command, workdir_from
from experiments.config import check_same_config, claim_workdir, parse_flags
from experiments.published_network import (
    NetworkSettings,
    check_arithmetic,
    define_network_flags,
    given_settings,
    load_subject,
)
from jaxfi.campaign import Campaign, run_campaign
from jaxfi.files import write_whole
from jaxfi.report.by_arithmetic import masked_beyond, masked_by_arithmetic
from jaxfi.report.figures import save_figure
from jaxfi.report.shares import shares_by_bit
from jaxfi.sampling import sample_faults

COLUMNS = (
    "arithmetic", "bit", "num_faults", "masked", "masked_low", "masked_high", "masked_by_rounding",
    "critical", "critical_low", "critical_high",
)  # fmt: skip


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
    write_table(workdir / "arithmetic.csv", campaigns)
    save_figure(masked_by_arithmetic(campaigns), workdir / "masked_by_arithmetic")
    print_summary(campaigns, subject.note)
    return campaigns


def write_table(path: Path, campaigns: Mapping[str, Campaign]) -> None:
    """Shares by arithmetic and bit position, fractions with intervals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    first = next(iter(campaigns.values()))
    for name, campaign in campaigns.items():
        beyond = masked_beyond(first, campaign)
        for part in shares_by_bit(campaign):
            by_rounding = beyond[campaign.faults.bit == int(part.name)].mean()
            numbers = (*part.masked, by_rounding, *part.critical)
            row = [f"{number:.6f}" for number in numbers]
            writer.writerow([name, part.name, part.num_faults, *row])
    write_whole(path, text.getvalue().encode())


def print_summary(campaigns: Mapping[str, Campaign], note: str) -> None:
    """Accuracy and shares over all bits, per arithmetic."""
    first = next(iter(campaigns.values()))
    for name, campaign in campaigns.items():
        rates = campaign.rates()
        beyond = masked_beyond(first, campaign).mean()
        print(
            f"{name}: clean accuracy {campaign.clean_accuracy:.4f}, "
            f"masked {rates.masked.value:.4f} [{rates.masked.low:.4f}, {rates.masked.high:.4f}], "
            f"of which by rounding {beyond:.4f}, critical {rates.critical.value:.4f} "
            f"[{rates.critical.low:.4f}, {rates.critical.high:.4f}]"
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
