"""Step time of training LeNet, batch 64, against PyTorch: A B A B in one run, default loss and GR.

    python -m experiments.benchmarks.training --rounds=5 --steps=20 --out=training.json

Both sides take whole steps on prepared batches: forward pass with dropout, gradient (with α = .06:
of the penalized loss), Adadelta. Augmentation is left out, since PyTorch does it elsewhere. Neither
side is told how many threads to use.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

from experiments.benchmarks.engine import machine, versions
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.data import write_whole
from jaxfi.models import MODELS
from jaxfi.training import TrainConfig
from jaxfi.training._loop import epoch_batches
from jaxfi.training._plan import choose_plan
from jaxfi.training._step import initial_state, make_run_steps
from tests.torch_models import TORCH_MODELS

_NETWORK = flags.DEFINE_enum("network", "lenet", list(TORCH_MODELS), "What is trained.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often the two take turns.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps that each takes in a round.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file of the result.")

BATCH = 64
STATISTICS = ((0.5,) * 3, (0.5,) * 3)
TakeSteps = Callable[[int], None]


def ours(name: str, alpha: float, images: np.ndarray, labels: np.ndarray) -> tuple[TakeSteps, dict]:
    """A function that takes so many steps, and the plan that was measured to be the fastest."""
    model, config = MODELS[name](), TrainConfig(alpha=alpha, augment=None, batch_size=BATCH)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    batches = epoch_batches((jnp.array(images), jnp.array(labels)), 0, 0)
    state = initial_state(variables, config)
    plan, run_steps = choose_plan(
        config, lambda plan: make_run_steps(model, *STATISTICS, config, plan), state, batches, 10**6
    )
    rate = jnp.float32(1.0)

    def take_steps(number: int) -> None:
        nonlocal state
        for start in range(0, number, plan.steps_per_call):
            stop = min(start + plan.steps_per_call, number)
            state = run_steps(state, batches, rate, start, stop)
        jax.block_until_ready(state)

    return take_steps, plan._asdict()


def theirs(name: str, alpha: float, images: np.ndarray, labels: np.ndarray) -> TakeSteps:
    """The same in PyTorch, with its double backward for the penalty."""
    torch.manual_seed(0)
    model = TORCH_MODELS[name]().train()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    pixels = torch.tensor((images.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, dtype=torch.float32)
    targets = torch.tensor(labels, dtype=torch.int64)

    def step(index: int) -> None:
        chosen = slice(index * BATCH, (index + 1) * BATCH)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixels[chosen]), targets[chosen])
        if alpha:
            parameters = list(model.parameters())
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            loss = loss + alpha * sum((g**2).sum() for g in gradients)
        loss.backward()
        optimizer.step()

    def take_steps(number: int) -> None:
        for index in range(number):
            step(index)

    return take_steps


def compare(name: str, alpha: float, rounds: int, steps: int) -> dict:
    """Milliseconds a step of both sides in turns, and the ratio of the medians."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH * steps, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, BATCH * steps, dtype=np.int32)
    jaxfi_steps, plan = ours(name, alpha, images, labels)
    sides = {"jaxfi": jaxfi_steps, "torch": theirs(name, alpha, images, labels)}
    timings: dict[str, list[float]] = {side: [] for side in sides}
    for take_steps in sides.values():
        take_steps(steps)
    for _ in range(rounds):
        for side, take_steps in sides.items():
            start = time.perf_counter()
            take_steps(steps)
            timings[side].append((time.perf_counter() - start) / steps * 1e3)
    result: dict = {"model": name, "alpha": alpha, "plan": plan}
    for side, values in timings.items():
        spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        result[f"{side}_ms"] = spread
    result["ratio"] = result["jaxfi_ms"]["median"] / result["torch_ms"]["median"]
    return result


def measure() -> None:
    """Prints the result, and writes it if there is a file for it."""
    report = {
        "machine": machine(),
        "versions": versions(),
        "results": [
            compare(_NETWORK.value, alpha, _ROUNDS.value, _STEPS.value) for alpha in (0.0, 0.06)
        ],
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if _OUT.value:
        write_whole(Path(_OUT.value), text.encode())


def main(argv: Sequence[str]) -> None:
    run_command(argv, measure, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
