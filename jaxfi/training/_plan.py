"""Which convolution and which derivative to train with: by measurement, once a training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxfi.training._config import TrainConfig
from jaxfi.training._step import Batches, Plan, RunSteps, TrainState

MakeRunSteps = Callable[[Plan], RunSteps]

# A loop in the compiled program amortizes its start and, on a CPU, the page faults of its scratch
# memory. Its end is when progress, losses and checkpoints are looked at.
_LOOP_STEPS = {"cpu": 10}
_LOOP_STEPS_ELSEWHERE = 50
_WORTH_MEASURING = 200  # steps: in fewer, trying the alternatives costs more than it saves


def choose_plan(
    config: TrainConfig,
    make_run_steps: MakeRunSteps,
    state: TrainState,
    batches: Batches,
    num_steps: int,
) -> tuple[Plan, RunSteps]:
    """The fastest of the plans that `config` leaves open, and its compiled steps.

    `num_steps` of the whole training decide whether it is worth trying; else it is the plan that
    is most often the fastest. `state` is left alone.
    """
    plans = candidate_plans(config, jax.default_backend())
    if len(plans) == 1 or num_steps < _WORTH_MEASURING:
        return plans[0], make_run_steps(plans[0])
    runners = [make_run_steps(plan) for plan in plans]
    seconds = [seconds_per_step(runner, state, batches) for runner in runners]
    fastest = seconds.index(min(seconds))
    return plans[fastest], runners[fastest]


def candidate_plans(config: TrainConfig, backend: str) -> list[Plan]:
    """The plans worth trying on this backend, the likeliest first.

    On a CPU XLA's convolution is very slow inside loops, and slow under two reverse passes.
    Elsewhere its gradients are fast, and patches would only cost memory.
    """
    on_cpu = backend == "cpu"
    loop = _LOOP_STEPS.get(backend, _LOOP_STEPS_ELSEWHERE)
    likely = ["im2col", "xla"] if on_cpu else ["xla"]
    convolutions = likely if config.convolution == "auto" else [config.convolution]
    derivatives = ["fast", "plain"] if config.derivative == "auto" else [config.derivative]
    if config.alpha == 0:
        derivatives = derivatives[:1]
    return [
        Plan(convolution, derivative, 1 if on_cpu and convolution == "xla" else loop)
        for convolution in convolutions
        for derivative in derivatives
        if len(derivatives) == 1 or not (on_cpu and (convolution, derivative) == ("xla", "plain"))
    ]


def seconds_per_step(run_steps: RunSteps, state: TrainState, batches: Batches) -> float:
    """The shortest of three timings of two steps each, after one that compiles."""
    timings = []
    for _ in range(4):
        copy: Any = jax.tree.map(lambda leaf: leaf.copy(), state)
        start = time.perf_counter()
        for number in range(2):  # one by one, which all plans can
            copy = run_steps(copy, batches, jax.numpy.float32(0), number, number + 1)
        jax.block_until_ready(copy)
        timings.append((time.perf_counter() - start) / 2)
    return min(timings[1:])
