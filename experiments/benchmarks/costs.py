"""What each row pair of the paper's tables should cost, from shapes: predicted, nothing is run.

    python -m experiments.benchmarks.costs
    python -m experiments.benchmarks.costs --write

`--write` puts the prediction into each flagfile's comment. Counted are the operations of
convolutions and matmuls, one way through the network being one pass:

- training: 3 passes a step for the default loss (forward, and backward to weights and inputs), 9
  for the gradient loss, whose derivative is the same 3 and their tangents, each of two products;
  and one pass of every test image an epoch;
- campaigns, two: the engine's own plan (`jaxfi.explain`), with the suffix of every pair, as if no
  pair were masked before it.

Two CPU cores are taken to do `--gflops` throughout. Golden runs, batch 100, did 51 (LeNet) and 170
(ResNet9) in two seconds of CPU time (AMD EPYC, two cores, Python 3.11, JAX 0.10.2; the machine busy
with other work). An H200 is taken as docs/scaling.md takes it, though steps on 64 images cannot
fill one, least of all LeNet's. Augmentation, the optimizer, BatchNorm, memory and reports are not
counted, nor is compilation on a CPU, so expect more: for digits.flags 57 s are predicted and 111 s
were measured. For table3_mnist_lenet.flags 80 min of training are predicted; 40 epochs at the best
rates that were seen make 74.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks.campaign_plan import (
    CampaignPlan,
    compiling_seconds,
    computing_seconds,
    plan_campaign,
)
from experiments.common.command import run_command
from experiments.common.config import Config, parse_flags, read_flagfile
from experiments.gr import LOSSES, list_faults
from jaxfi.models import MODELS

_WRITE = flags.DEFINE_boolean("write", False, "Write the predictions into the flagfiles.")
_GFLOPS = flags.DEFINE_float("gflops", 100.0, "10^9 operations a second of two CPU cores.")

FLAGFILES = Path(__file__).parents[1] / "flags"
PASSES = {"default": 3, "gradient": 9}
_COST = re.compile(r"^# Cost[:,](?:.*\n# )*.*\n", re.MULTILINE)  # up to the line with "#" alone


class Images(NamedTuple):
    """Of a data set, 32 x 32 pixels."""

    train: int
    test: int
    channels: int


IMAGES = {
    "digits": Images(1_297, 500, 1),
    "mnist": Images(60_000, 10_000, 1),
    "cifar10": Images(50_000, 10_000, 3),
}


class Cost(NamedTuple):
    """Operations of both trainings and of both campaigns; leaves that the campaigns compile."""

    training: float
    campaigns: float
    num_leaves: int

    @property
    def device_seconds(self) -> float:
        """On one H200, by the flags."""
        return computing_seconds(self.training + self.campaigns) + compiling_seconds(
            self.num_leaves
        )


def plan_of(config: Config) -> CampaignPlan:
    """The plan of one of its two campaigns, whose shapes are the same."""
    images = IMAGES[config.dataset]
    shape = (config.num_images or images.test, 32, 32, images.channels)
    module = MODELS[config.model](num_classes=10)
    return plan_campaign(
        module,
        jax.ShapeDtypeStruct(shape, jnp.float32),
        lambda params: list_faults(config, params),
        config.campaign_batch_size,
    )


def predict(config: Config, plan: CampaignPlan) -> Cost:
    """What `experiments.gr` computes for this configuration."""
    images = IMAGES[config.dataset]
    trained = (config.num_train_images or images.train) // config.batch_size * config.batch_size
    passes = sum(trained * PASSES[loss] + images.test for loss in LOSSES)
    return Cost(
        training=plan.network * passes * config.epochs,
        campaigns=len(LOSSES) * plan.operations(surviving=1.0),
        num_leaves=len(LOSSES) * plan.num_leaves,
    )


def comment(cost: Cost, gflops: float) -> str:
    """The lines of a flagfile that say the cost."""
    text = (
        "Cost, predicted by experiments.benchmarks.costs, not measured: about "
        f"{duration(cost.training / gflops / 1e9)} of training and "
        f"{duration(cost.campaigns / gflops / 1e9)} of campaigns on two CPU cores; about "
        f"{duration(cost.device_seconds)} on an H200 as docs/scaling.md assumes it, "
        f"{duration(compiling_seconds(cost.num_leaves))} of it compilation."
    )
    return textwrap.fill(text, 118, initial_indent="# ", subsequent_indent="# ") + "\n"


def with_comment(flagfile: str, lines: str) -> str:
    """The text of a flagfile with its cost replaced; raises ValueError if it says none."""
    text, found = _COST.subn(lambda match: lines, flagfile, count=1)
    if not found:
        raise ValueError("the flagfile has no line that begins with '# Cost'")
    return text


def duration(seconds: float) -> str:
    """Two digits, in the unit that suits: `4.4 days`.

    >>> [duration(seconds) for seconds in (45, 400, 5_000, 20_000, 380_000, 2_000_000)]
    ['45 s', '6.7 min', '83 min', '5.6 h', '4.4 days', '23 days']
    """
    units = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min"), (0, 1, "s"))
    unit, name = next((unit, name) for least, unit, name in units if seconds >= least)
    number = seconds / unit
    return f"{number:.1f} {name}" if number < 10 else f"{number:.0f} {name}"


def print_costs() -> None:
    """A line for each table's flagfile."""
    gflops = _GFLOPS.value
    print(
        f"{'':36} {'training':>10} {'campaigns':>10} {'training':>10} {'campaigns':>10} {'H200':>9}"
    )
    for path in sorted(FLAGFILES.glob("table*.flags")):
        config = read_flagfile(path)
        cost = predict(config, plan_of(config))
        seconds = [cost.training / gflops / 1e9, cost.campaigns / gflops / 1e9, cost.device_seconds]
        columns = " ".join(f"{duration(number):>10}" for number in seconds)
        print(f"{path.stem:36} {cost.training:10.2g} {cost.campaigns:10.2g} {columns}", flush=True)
        if _WRITE.value:
            text = with_comment(path.read_text(encoding="utf-8"), comment(cost, gflops))
            path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    run_command(argv, print_costs, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
