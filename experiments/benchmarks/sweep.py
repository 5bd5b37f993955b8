"""Members trained together under vmap against the same trainings one after the other.

    python -m experiments.benchmarks.sweep --members=8 --steps=20

Times are of whole compiled steps, after compilation, which is given apart: eight trainings of one
process compile eight times. CPU time is what a shared machine can still tell: it leaves out the
waiting, not the idle core. A member equals its run alone (tests/test_sweep.py).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxfi.data import load_dataset
from jaxfi.models import MODELS
from jaxfi.training import TrainConfig
from jaxfi.training._loop import epoch_batches
from jaxfi.training._step import Plan, initial_state
from jaxfi.training._sweep import make_run_members, stack

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet", choices=[*MODELS])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="in one compiled loop")
    parser.add_argument("--convolution", default="im2col", choices=["im2col", "xla"])
    parser.add_argument("--seeds", action="store_true", help="members differ in their seeds too")
    options = parser.parse_args()
    configs = [member_config(options, number) for number in range(options.members)]
    print(f"{options.model}, digits, batch {options.batch_size}, {options.steps} steps, "
          f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")  # fmt: skip
    together, alone = measure(options, configs), measure(options, configs[:1])
    for name, here, one in zip(("wall", "CPU"), together, alone, strict=True):
        compiled, steady = one[0] * options.members, one[1] * options.members
        print(f"{name} time, one after the other: compilation {compiled:.1f} s, "
              f"{1e3 * steady:.0f} ms a step of all; together: compilation {here[0]:.1f} s, "
              f"{1e3 * here[1]:.0f} ms a step of all; speed-up {steady / here[1]:.2f}")  # fmt: skip


def member_config(options: Any, number: int) -> TrainConfig:
    """Members differ in weight decay, and in the seed if asked for."""
    return TrainConfig(
        optimizer="sgd", learning_rate=0.01, schedule="constant", augment=None,
        batch_size=options.batch_size, weight_decay=1e-5 * number,
        seed=number if options.seeds else 0,
    )  # fmt: skip


def measure(options: Any, configs: list[TrainConfig]) -> list[tuple[float, float]]:
    """In wall time and CPU time: seconds of compilation, and of one step, the best of REPEATS."""
    dataset = load_dataset("digits")
    model = MODELS[options.model](num_classes=dataset.num_classes)
    plan = Plan(options.convolution, "fast", options.steps if options.steps > 1 else 1)
    run_steps = make_run_members(model, dataset, configs, plan)
    image = jnp.zeros((1, *dataset.train_images.shape[1:]), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    state = stack([initial_state(variables, config) for config in configs])
    batches = batches_of(dataset, configs)
    rates = jnp.full(len(configs), 0.01, jnp.float32)
    clocks = (time.perf_counter, time.process_time)
    rows = []
    for _ in range(1 + REPEATS):
        start = [clock() for clock in clocks]
        state = jax.block_until_ready(run_steps(state, batches, rates, 0, options.steps))
        rows.append([clock() - began for clock, began in zip(clocks, start, strict=True)])
    return [
        (first - min(later), min(later) / options.steps)
        for first, *later in zip(*rows, strict=True)
    ]


def batches_of(dataset: Any, configs: list[TrainConfig]) -> Any:
    """One epoch's batches, shared by members of one seed."""
    train_set = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    own = [epoch_batches(train_set, config.seed, 0) for config in configs]
    if len({config.seed for config in configs}) == 1:
        return own[0]
    return own[0]._replace(
        order=jnp.stack([batches.order for batches in own]),
        key=jnp.stack([batches.key for batches in own]),
    )


if __name__ == "__main__":
    main()
