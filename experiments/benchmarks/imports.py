"""How long `import jaxfi` takes beside `import jax`, each in processes of its own, in turns.

python -m experiments.benchmarks.imports --rounds=7
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from experiments.common.command import run_command

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Times that each is imported.")


def seconds(module: str) -> float:
    """Wall time of a new process that imports it."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def run(rounds: int) -> str:
    """A B A B: medians, their ratio and difference."""
    taken: dict[str, list[float]] = {"jax": [], "jaxfi": []}
    for name in taken:
        seconds(name)  # the files are read once before
    for _ in range(rounds):
        for name, times in taken.items():
            times.append(seconds(name))
    jax, jaxfi = (statistics.median(times) for times in taken.values())
    ranges = ", ".join(f"{n} {min(t):.2f} to {max(t):.2f} s" for n, t in taken.items())
    return (
        f"import jax {jax:.2f} s, import jaxfi {jaxfi:.2f} s: {jaxfi / jax:.2f} times, "
        f"{jaxfi - jax:+.2f} s ({rounds} rounds in turns; {ranges})"
    )


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: print(run(_ROUNDS.value)), "stopped")


if __name__ == "__main__":
    app.run(main)
