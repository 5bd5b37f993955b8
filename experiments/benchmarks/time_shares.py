"""Where a campaign's time goes, and how near each part comes to the machine's arithmetic limit.

    python -m experiments.benchmarks.time_shares --network=resnet18 --num_faults=99 --num_images=200

Takes the flags of `experiments.benchmarks.engine`. One campaign runs, every program waited for
so that its time is its own: host and device then do not overlap, so the whole takes a little
longer than a campaign does. The limit is this machine's best matmul of 2,000 × 2,000 float32.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import engine
from experiments.benchmarks.sides import load_subject, run_jaxfi
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.engine import compiled
from jaxfi.engine._costs import columns_arithmetic, network_arithmetic, suffix_arithmetic
from jaxfi.engine._golden import golden_run
from jaxfi.engine._programs import Programs
from jaxfi.faults import fault_population, sample_faults, sample_size
from jaxfi.network import trace_network as traced
from jaxfi.network._graph import arithmetic, needed_equations

PARTS = ("golden run", "prefix", "columns and tail", "packing", "suffix", "compiling")
_COMPILING = "/jax/core/compile/"


class Clock:
    """Seconds and floating-point operations by part; what compiling takes is a part of its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.operations: dict[str, int] = collections.defaultdict(int)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith(_COMPILING):
            self.seconds["compiling"] += duration_secs

    def timed(self, part: str, program: Callable, operations: int = 0) -> Callable:
        """`program`, waited for; a call does so many operations."""

        def run(*args: Any) -> Any:
            before, start = self.seconds["compiling"], time.perf_counter()
            result = jax.block_until_ready(program(*args))
            compiling = self.seconds["compiling"] - before
            self.seconds[part] += time.perf_counter() - start - compiling
            self.operations[part] += operations
            return result

        return run


def timed_programs(clock: Clock) -> type[Programs]:
    """`Programs` whose programs are timed."""

    class Timed(Programs):
        def __init__(self, network: Any, plan: Any, shared: dict):
            super().__init__(network, plan, shared)
            columns = columns_arithmetic(network, plan)
            self.columns = clock.timed("columns and tail", self.columns, columns)
            self.pack = clock.timed("packing", self.pack)

        def faulty_columns(self, *args: Any) -> Any:
            return clock.timed("columns and tail", super().faulty_columns)(*args)

        def suffix(self, *args: Any) -> Any:
            operations = suffix_arithmetic(self.network, self.plan)
            return clock.timed("suffix", super().suffix, operations)(*args)

        def _run_prefix(self, setup: Any, known: dict) -> Any:
            wanted, start = (*self.plan.inputs, *self.plan.products), {*self.network.leaves, *known}
            operations = arithmetic(needed_equations(self.network, wanted, start))
            return clock.timed("prefix", super()._run_prefix, operations)(setup, known)

    return Timed


def timed_golden_run(clock: Clock) -> Callable:
    """`golden_run`, timed; its operations are known to the network alone (`measure` adds them)."""
    return clock.timed("golden run", golden_run)


def matmul_limit(size: int = 2000, repeats: int = 5) -> float:
    """The best of some float32 matmuls, in floating-point operations per second."""
    matmul, ones = compiled(jnp.dot), jnp.ones((size, size), jnp.float32)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        matmul(ones, ones).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def measure(settings: engine.Settings) -> tuple[float, Clock, float]:
    """Seconds of the whole campaign, the parts of it, and the limit."""
    settings.validate()
    subject = load_subject(settings)
    params = subject.variables["params"]
    num_faults = settings.num_faults or sample_size(fault_population(params))
    faults = sample_faults(settings.seed, params, num_faults)
    limit, clock, networks = matmul_limit(), Clock(), []

    def trace(*args: Any) -> Any:
        networks.append(traced(*args))
        return networks[-1]

    with (
        mock.patch("jaxfi.engine._engines.Programs", timed_programs(clock)),
        mock.patch("jaxfi.campaign._run.golden_run", timed_golden_run(clock)),
        mock.patch("jaxfi.campaign._checks.trace_network", trace),
    ):
        seconds, _ = run_jaxfi(settings, subject, faults)
    num_batches = -(-len(subject.images) // min(settings.batch_size, len(subject.images)))
    clock.operations["golden run"] = num_batches * network_arithmetic(networks[0])
    return seconds, clock, limit


def table(seconds: float, clock: Clock, limit: float) -> str:
    """A line for each part: seconds, their share, GFLOP/s, share of the limit."""
    taken = {part: clock.seconds[part] for part in PARTS}
    taken["host and the rest"] = seconds - sum(taken.values())
    operations = {**clock.operations, "all": sum(clock.operations.values())}
    lines = ["| part | seconds | share | GFLOP/s | of the limit |", "|---|--:|--:|--:|--:|"]
    for part, time_taken in (*taken.items(), ("all", seconds)):
        rate = operations.get(part, 0) / time_taken if time_taken else 0.0
        reached = f"{rate / 1e9:,.0f} | {rate / limit:.0%}" if rate else "|"
        lines.append(f"| {part} | {time_taken:.1f} | {time_taken / seconds:.0%} | {reached} |")
    return "\n".join((*lines, "", f"Limit: {limit / 1e9:,.0f} GFLOP/s (a matmul)."))


def run_from_flags(values: Any) -> None:
    """Measures as the flags say, and prints the table."""
    print(table(*measure(engine.settings_from_flags(values))))


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    engine.define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
