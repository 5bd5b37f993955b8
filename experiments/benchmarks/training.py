"""Step time of training LeNet, batch 64, against PyTorch: A B A B in one run, default loss and GR.

    python experiments/benchmarks/training.py [--rounds 5] [--steps 20] [--json FILE]

Both sides take whole steps on prepared batches: forward pass with dropout, gradient (with α = .06:
of the penalized loss), Adadelta. Augmentation is left out, since PyTorch does it elsewhere. Neither
side is told how many threads to use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from jaxfi.models import MODELS
from jaxfi.training.config import TrainConfig
from jaxfi.training.loop import epoch_batches
from jaxfi.training.plan import choose_plan
from jaxfi.training.step import initial_state, make_run_steps
from tests.torch_models import TORCH_MODELS

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet", choices=TORCH_MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    report = {
        "machine": {"processor": platform.processor(), "cores": os.cpu_count()},
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "results": [
            compare(arguments.model, alpha, arguments.rounds, arguments.steps)
            for alpha in (0.0, 0.06)
        ],
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
