"""What keeping a campaign costs: bytes on disk, and the time that it takes to write them.

    python -m experiments.benchmarks.durable --campaign=runs/table3_mnist_lenet/campaigns/default

A campaign that is finished is kept again, in a new directory that is deleted at the end, through
the ledger that `run_campaign` writes to: in the same blocks, with the same golden outputs, and
merged. Nothing is computed but what is written. For comparison the same blocks go through the
ledger of a campaign without a directory, which only puts them into the arrays that it returns.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.campaign import Campaign, load_campaign
from jaxfi.campaign._description import read_description, read_faults
from jaxfi.campaign._ledger import Ledger, MemoryLedger, open_directory
from jaxfi.campaign._run import FAULTS_PER_BLOCK
from jaxfi.campaign._workers import by_leaf, split_blocks
from jaxfi.outcomes import MASKED

CAMPAIGN = flags.DEFINE_string("campaign", "", "A finished campaign's directory.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that it is kept.")


def fill(ledger: Ledger, campaign: Campaign) -> None:
    """Everything that `run_campaign` does with a ledger that is empty."""
    rows = by_leaf(campaign.faults, np.arange(len(campaign.faults)))
    blocks = split_blocks(rows, FAULTS_PER_BLOCK, 1)
    for block in ledger.unclaimed(blocks):
        ledger.write(block, campaign.results.of_faults(block))
    ledger.results()


def keep(campaign: Campaign, values: tuple[np.ndarray, np.ndarray], directory: Path) -> None:
    """Writes the campaign as `run_campaign` does, from nothing to merged."""
    arrays = {"golden": campaign.golden, "labels": campaign.labels}
    with open_directory(
        directory,
        campaign.provenance,
        campaign.faults,
        values,
        arrays,
        num_images=campaign.outcomes.shape[1],
    ) as ledger:
        fill(ledger, campaign)


def hold(campaign: Campaign) -> None:
    """The same without a directory."""
    first = campaign.results.of_faults(np.zeros(len(campaign.faults), int))
    fill(MemoryLedger(first), campaign)


def seconds(run: Callable, *arguments: object) -> tuple[float, float]:
    """Wall time and CPU time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure() -> None:
    """A line on the campaign, and one a round."""
    folder = Path(CAMPAIGN.value)
    campaign, (_, values) = load_campaign(folder), read_faults(folder, read_description(folder))
    shape = campaign.outcomes.shape
    print(f"{shape[0]:,} faults x {shape[1]:,} images, "
          f"{np.mean(campaign.outcomes == MASKED):.2%} masked")  # fmt: skip
    for _ in range(_ROUNDS.value):
        _, held = seconds(hold, campaign)
        directory = Path(tempfile.mkdtemp())
        try:
            wall, kept = seconds(keep, campaign, values, directory)
            size = num_bytes(directory)
        finally:
            shutil.rmtree(directory)
        print(f"{size / 1e6:.2f} MB, {wall:.2f} s ({kept:.2f} s of CPU; {held:.2f} s without a "
              "directory)", flush=True)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    run_command(argv, measure, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
