"""How many faults an adaptive campaign saves, and whether its answer is that of the full one.

    python -m experiments.benchmarks.adaptive --network=lenet --dataset=digits --num_images=100 \\
        --checkpoint=runs/digits/networks/default --margin=0.01

Three campaigns on the same network, images and margin, each fault on all images: the fixed sample,
`sample_size` faults; `run_sequential`; `run_stratified`. Without --checkpoint the weights are the
initial ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.campaign import run_campaign, run_sequential, run_stratified
from jaxfi.data import DATASETS, load_dataset, normalise
from jaxfi.faults import fault_population, sample_faults, sample_size
from jaxfi.models import MODELS, evaluation_function
from jaxfi.outcomes import Rates
from jaxfi.training import load_variables

_NETWORK = flags.DEFINE_enum("network", "lenet", list(MODELS), "Name in jaxfi.models.MODELS.")
_DATASET = flags.DEFINE_enum("dataset", "digits", list(DATASETS), "Images and labels.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Training's folder; none: initial weights.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 100, "Test images, the first ones.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images per batch.")
_MARGIN = flags.DEFINE_float("margin", 0.01, "Half width of every rate's interval.")
_KEY = flags.DEFINE_integer("key", 0, "Of the order of the faults.")


def subject() -> dict[str, Any]:
    """The arguments that all campaigns share."""
    dataset = load_dataset(_DATASET.value)
    module = MODELS[_NETWORK.value](num_classes=dataset.num_classes)
    image = jnp.zeros((1, *dataset.test_images.shape[1:]), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), image)
    if _CHECKPOINT.value:
        variables = load_variables(_CHECKPOINT.value)
    images = dataset.test_images[: _NUM_IMAGES.value]
    return {
        "apply_fn": evaluation_function(module, variables),
        "params": variables["params"],
        "images": normalise(images, dataset.mean, dataset.std),
        "labels": dataset.test_labels[: _NUM_IMAGES.value],
        "batch_size": _BATCH_SIZE.value,
        "images_per_fault": None,  # all
    }


def print_row(name: str, num_faults: int, fixed: int, rates: Rates, seconds: float) -> None:
    shown = [f"{100 * r.value:.2f} [{100 * r.low:.2f}, {100 * r.high:.2f}]" for r in rates]
    saved = f"{1 - num_faults / fixed:.0%}"
    print(
        f"| {name} | {num_faults:,} | {saved} | {' | '.join(shown)} | {seconds:.0f} |", flush=True
    )


def compare() -> None:
    """The fixed campaign, then both adaptive ones; a line each."""
    shared = subject()
    fixed = sample_size(fault_population(shared["params"]), _MARGIN.value)
    print(f"| campaign | faults | saved | {' | '.join(Rates._fields)} | seconds |")
    print("|---" * (len(Rates._fields) + 4) + "|")
    began = time.perf_counter()
    full = run_campaign(faults=sample_faults(1000, shared["params"], fixed), **shared)
    print_row("fixed", fixed, fixed, full.rates(), time.perf_counter() - began)
    for run in (run_sequential, run_stratified):
        began = time.perf_counter()
        found = run(**shared, margin=_MARGIN.value, key=_KEY.value)
        name = f"{run.__name__.removeprefix('run_')}, stages {found.stages}"
        print_row(name, found.stages[-1], fixed, found.rates, time.perf_counter() - began)


def main(argv: Sequence[str]) -> None:
    run_command(argv, compare, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
