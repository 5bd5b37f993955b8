"""Small campaigns, which end before much is compiled: fast against plain re-execution.

    python -m experiments.benchmarks.small --rounds=3 --out=small.json

Each campaign runs in new processes, the engines in turns, with nothing compiled before. Importing
and making the network are not counted. Beside the seconds stands what the fast one said that the
rest would take, and the seconds from then on.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks.engine import machine, versions
from experiments.benchmarks.time_shares import matmul_limit
from experiments.common.command import run_command
from jaxfi.campaign import run_campaign
from jaxfi.data import write_whole
from jaxfi.faults import sample_faults
from jaxfi.models import MODELS
from tests import conformance_models as models

# Network, faults, images.
CASES = {
    f"{network}, {num_faults} x {num_images}": (network, num_faults, num_images)
    for network, num_faults, num_images in [
        ("nnx_cnn", 600, 100), ("equinox_cnn", 200, 100), ("haiku_cnn", 200, 100),
        ("linen_cnn", 200, 100), ("vision_transformer", 100, 100),
        ("vision_transformer", 600, 200), ("squeeze_and_excite", 200, 100),
        ("recurrent", 100, 100), ("lenet", 200, 100), ("resnet20", 50, 100),
        ("resnet20", 50, 500), ("resnet20", 100, 200),
    ]
}  # fmt: skip
ENGINES = "fast", "reference"
_SAID = re.compile(r"outcomes: about ([\d.]+) (s|min|h)")
_UNITS = {"s": 1, "min": 60, "h": 3600}


class _Said(io.StringIO):
    """Keeps what was printed, and when the plan was."""

    seconds, at = 0.0, 0.0

    def write(self, text: str) -> int:
        if found := _SAID.search(text):
            self.seconds, self.at = float(found[1]) * _UNITS[found[2]], time.perf_counter()
        return super().write(text)


def run_once(case: str, engine: str) -> tuple[float, float, float]:
    """Seconds of one campaign of random images, those that it said, and those after that."""
    network, num_faults, num_images = CASES[case]
    known = network in MODELS
    apply_fn, params, shape = models.studied(network) if known else getattr(models, network)()
    images = np.random.default_rng(0).normal(size=(num_images, *shape)).astype(np.float32)
    labels = np.zeros(num_images, int)
    faults = sample_faults(0, params, num_faults)
    with contextlib.redirect_stderr(_Said()) as said:
        start = time.perf_counter()
        run_campaign(apply_fn, params, faults, images, labels, engine=engine, progress=True)
        end = time.perf_counter()
    return end - start, said.seconds, end - said.at


def measure(cases: Sequence[str], rounds: int) -> dict[str, Any]:
    """Everything that the JSON file holds. Raises ValueError naming a case that does not exist."""
    for case in cases:
        if case not in CASES:
            raise ValueError(f"--cases names {case!r}; allowed: {'; '.join(CASES)}")
    before = machine() | {"matmul_gflop_per_s": round(matmul_limit() / 1e9)}
    found = {}
    for case in cases:
        taken: dict[str, list[tuple[float, float, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(rounds):
            for engine, times in taken.items():
                times.append(_in_a_process(case, engine))
        seconds = {engine: [time for time, *_ in times] for engine, times in taken.items()}
        fast, reference = (statistics.median(seconds[engine]) for engine in ENGINES)
        said, took = (
            statistics.median(some) for some in list(zip(*taken["fast"], strict=True))[1:]
        )
        found[case] = {
            "seconds": seconds, "ratio": fast / reference, "said": said, "took": took
        }  # fmt: skip
    return {"cases": found, "versions": versions(), "machine": before}


def _in_a_process(case: str, engine: str) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "experiments.benchmarks.small", f"--once={case}:{engine}"]
    environment = {**os.environ, "JAXFI_CACHE_DIR": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the campaign failed: {done.stderr[-500:]}")
    seconds, said, took = map(float, done.stdout.split()[-3:])
    return seconds, said, took


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what it was measured on."""
    lines = [
        "| | fast, s | plain, s | fast / plain | said, s | took after that, s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case, found in result["cases"].items():
        fast, plain = (
            ", ".join(f"{seconds:.1f}" for seconds in found["seconds"][engine])
            for engine in ENGINES
        )
        lines.append(
            f"| {case.replace(' x ', ' × ')} | {fast} | {plain} | {found['ratio']:.2f} | "
            f"{found['said']:.1f} | {found['took']:.1f} |"
        )
    of = result["machine"]
    lines += ["", f"{of['cores']} cores of {of['processor']}, {of['matmul_gflop_per_s']} GFLOP/s"]
    return "\n".join(lines)


def run_from_flags(values: flags.FlagValues) -> dict[str, Any]:
    """Raises ValueError or OSError."""
    if once := values["once"].value:
        print(*run_once(*once.split(":")))
        return {}
    if not values["out"].value:
        raise ValueError("--out is missing: give the JSON file for the result")
    out = Path(str(values["out"].value))
    out.parent.mkdir(parents=True, exist_ok=True)
    result = measure(values["cases"].value or list(CASES), int(str(values["rounds"].value)))
    write_whole(out, (json.dumps(result, indent=2) + "\n").encode())
    print(table(result))
    return result


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "JSON file of the result.", flag_values=values)
    flags.DEFINE_multi_string("cases", [], "Those to run; default all.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Times that each runs.", 1, flag_values=values)
    flags.DEFINE_string("once", "", "CASE:ENGINE, of one process.", flag_values=values)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
