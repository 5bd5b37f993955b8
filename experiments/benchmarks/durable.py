"""What keeping a campaign costs: bytes on disk, and the time that it takes to write them.

    python -m experiments.benchmarks.durable --campaign=runs/table3_mnist_lenet/campaigns/default

A campaign that is finished is kept again, in a new directory that is deleted at the end, through
the ledger that `run_campaign` writes to: in the same blocks, with the same golden outputs, and
merged. Nothing is computed but what is written, so all the time is the store's.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.command import run_command
from experiments.config import parse_flags
from jaxfi.campaign import FAULTS_PER_BLOCK, Campaign, load_campaign
from jaxfi.description import read_description, read_faults
from jaxfi.ledger import open_directory
from jaxfi.outcomes import MASKED, Results
from jaxfi.workers import split_blocks

_CAMPAIGN = flags.DEFINE_string("campaign", "", "A finished campaign's directory.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that it is kept.")


def keep(campaign: Campaign, values: tuple[np.ndarray, np.ndarray], directory: Path) -> None:
    """Writes the campaign as `run_campaign` does, from nothing to merged."""
    faults, arrays = campaign.faults, {"golden": campaign.golden, "labels": campaign.labels}
    rows, part = np.arange(len(faults)), np.zeros(len(faults), np.int64)
    blocks = split_blocks(faults, rows, part, FAULTS_PER_BLOCK, 1)
    with open_directory(directory, campaign.provenance, faults, values, arrays) as ledger:
        for rows in ledger.unclaimed(blocks):
            ledger.write(rows, Results(*(array[rows] for array in campaign.results)))
        ledger.results()


def num_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def measure() -> None:
    """A line on the campaign, and one a round."""
    folder = Path(_CAMPAIGN.value)
    campaign, (_, values) = load_campaign(folder), read_faults(folder, read_description(folder))
    shape = campaign.outcomes.shape
    print(f"{shape[0]:,} faults x {shape[1]:,} images, "
          f"{np.mean(campaign.outcomes == MASKED):.2%} masked")  # fmt: skip
    for _ in range(_ROUNDS.value):
        directory = Path(tempfile.mkdtemp())
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            keep(campaign, values, directory)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            size = num_bytes(directory)
        finally:
            shutil.rmtree(directory)
        print(f"{size / 1e6:.2f} MB, {wall:.2f} s ({cpu:.2f} s of CPU)", flush=True)


def main(argv: Sequence[str]) -> None:
    run_command(argv, measure, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
