"""What moves "masked" on the same weights? A finished run of experiments.gr under other conditions.

Tables of shares compare only if they mean the same by an output, a NaN and a product. This injects
the same faults into the two networks of a run, with one condition changed at a time, and prints
what each does to the masked and the critical share, and to the difference between the two losses.

    python -m experiments.conditions --run=runs/table3_mnist_lenet --num_faults=1000 \\
        --num_images=1000 --out=conditions.csv
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags

from experiments.common.command import run_command
from experiments.common.config import Config, parse_flags
from experiments.gr import LOSSES, load_images
from jaxfi.campaign import Campaign, run_campaign
from jaxfi.data import Dataset, first_test_images, write_csv
from jaxfi.faults import sample_faults
from jaxfi.models import MODELS, PyTree, evaluation_function
from jaxfi.network import ApplyFn, with_arithmetic
from jaxfi.outcomes import Estimate, paired_difference
from jaxfi.training import load_variables

Change = Callable[[ApplyFn], ApplyFn]


class Condition(NamedTuple):
    """A change of the network's function, and how a NaN counts."""

    change: Change
    nan: str = "argmax"


class Effect(NamedTuple):
    """One row of the table; shares are fractions, intervals 99 %."""

    condition: str
    masked: tuple[Estimate, ...]
    critical: tuple[Estimate, ...]
    difference: Estimate


def arithmetic(name: str) -> Change:
    """All operands of convolutions and matmuls rounded."""
    return lambda apply_fn: with_arithmetic(apply_fn, {"*": name})


def output(function: Callable) -> Change:
    """The output vector is a function of the logits."""
    return lambda apply_fn: lambda params, images: function(apply_fn(params, images))


CONDITIONS = {
    "logits, float32, NaN by argmax": Condition(lambda apply_fn: apply_fn),
    "output is softmax": Condition(output(jax.nn.softmax)),
    "output is log-softmax": Condition(output(jax.nn.log_softmax)),
    "TF32 operands": Condition(arithmetic("tf32")),
    "bfloat16 operands": Condition(arithmetic("bfloat16")),
    "NaN is critical": Condition(lambda apply_fn: apply_fn, nan="critical"),
}


def run(folder: Path, num_faults: int, num_images: int) -> list[Effect]:
    """Every condition on both networks. Raises ValueError or OSError, in one line, before any."""
    config = Config(**json.loads((folder / "config.json").read_text()))
    config = dataclasses.replace(config, num_images=num_images)
    dataset = load_images(config)
    networks = [load_variables(folder / "networks" / loss) for loss in LOSSES]
    effects = []
    for name, condition in CONDITIONS.items():
        campaigns = [
            inject(config, condition, variables, dataset, num_faults, num_images)
            for variables in networks
        ]
        default, gradient = campaigns
        rates = [campaign.rates() for campaign in campaigns]
        effects.append(
            Effect(
                name,
                tuple(r.masked for r in rates),
                tuple(r.critical for r in rates),
                paired_difference(default, gradient, "masked"),
            )
        )
        print(row(effects[-1]), flush=True)
    return effects


def inject(
    config: Config,
    condition: Condition,
    variables: PyTree,
    dataset: Dataset,
    num_faults: int,
    num_images: int,
) -> Campaign:
    """The run's own sample of faults, cut to `num_faults`' sample, under one condition."""
    module = MODELS[config.model](num_classes=dataset.num_classes)
    images, labels = first_test_images(dataset, num_images)
    faults = sample_faults(config.seed, variables["params"], num_faults)
    return run_campaign(
        condition.change(evaluation_function(module, variables)),
        variables["params"],
        faults,
        images,
        labels,
        nan=condition.nan,
        batch_size=config.campaign_batch_size,
    )


def row(effect: Effect) -> str:
    """A line of a Markdown table, percent."""
    shares = [f"{100 * e.value:.2f}" for pair in (effect.masked, effect.critical) for e in pair]
    low, value, high = (100 * effect.difference[n] for n in (1, 0, 2))
    return f"| {effect.condition} | {' | '.join(shares)} | {value:+.2f} [{low:+.2f}, {high:+.2f}] |"


def write(effects: Sequence[Effect], path: Path) -> None:
    """Fractions; one row a condition."""
    shares = [f"{rate}_{loss}" for rate in ("masked", "critical") for loss in LOSSES]
    columns = ["condition", *shares, "difference", "difference_low", "difference_high"]
    rows = [
        [e.condition, *(rate.value for rate in (*e.masked, *e.critical)), *e.difference]
        for e in effects
    ]
    write_csv(path, columns, rows)


def define_flags(values: flags.FlagValues) -> None:
    """What to run, and where to write."""
    flags.DEFINE_string("run", None, "Folder of a finished experiments.gr.", values, required=True)
    flags.DEFINE_string("out", None, "CSV file to write.", values, required=True)
    flags.DEFINE_integer("num_faults", 1000, "Faults, dealt to the layers.", 1, flag_values=values)
    flags.DEFINE_integer("num_images", 1000, "Test images, the first ones.", 1, flag_values=values)


def run_from_flags(values: Any) -> None:
    """`run` as the flags say, and its table."""
    folder, out = Path(values["run"].value), Path(values["out"].value)
    write(run(folder, values["num_faults"].value, values["num_images"].value), out)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
