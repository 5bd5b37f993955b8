"""A whole jaxfi campaign against PyTorch's copy, flip and re-run: outcomes per second of both.

    python -m experiments.benchmarks.engine --network=lenet --dataset=mnist --num_faults=16638 \\
        --num_images=10000 --out=engine.json

Both sides have the same weights, faults, images and batch size, and take turns (A B A B):

- jaxfi: all of `run_campaign` from empty caches: tracing, compiling, golden run, every outcome.
- PyTorch: for each fault, copy the model, flip the bit, run it, compare. Its time is proportional
  to faults x images, so a sample of both is enough; its golden run is not counted.

`--reference_faults=N` also times N faults by plain re-execution in JAX, compiled beforehand, with
the faster of XLA's default options and the campaign's.

`ratio` is the quotient of the medians. Nothing is trained: without --weights they are the initial
ones, whose outcomes mean nothing, and whose masked share decides how much jaxfi has to compute.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from absl import app, flags

from experiments.benchmarks.sides import (
    RANDOM,
    Subject,
    load_subject,
    run_jaxfi,
    run_pytorch,
    run_reference,
)
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.data import DATASETS, write_whole
from jaxfi.engine import PRECISIONS, compiled
from jaxfi.faults import FaultList, fault_population, sample_faults, sample_size
from jaxfi.outcomes import CRITICAL
from tests.torch_models import TORCH_MODELS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; each field is a flag of the same name."""

    network: str = "lenet"
    dataset: str = RANDOM
    weights: str = ""
    num_faults: int = 0
    num_images: int = 0
    channels: int = 3
    batch_size: int = 100
    precision: str = "highest"
    rounds: int = 2
    pytorch_faults: int = 20
    pytorch_images: int = 1000
    reference_faults: int = 0
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError, in one line, for an unknown name or a number out of range."""
        names = {"network": TORCH_MODELS, "dataset": (RANDOM, *DATASETS), "precision": PRECISIONS}
        for name, allowed in names.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"--{name} is {given!r}; allowed: {', '.join(allowed)}")
        least = dict.fromkeys(("batch_size", "rounds", "pytorch_faults", "pytorch_images"), 1)
        least |= dict.fromkeys(("num_faults", "num_images", "reference_faults"), 0)
        for name, minimum in least.items():
            if (given := getattr(self, name)) < minimum:
                raise ValueError(f"--{name} is {given}; allowed: integers >= {minimum}")
        if self.channels not in (1, 3):
            raise ValueError(f"--channels is {self.channels}; allowed: 1, 3")
        if self.dataset == RANDOM and not self.num_images:
            raise ValueError("--num_images is missing: random images have no number of their own")


_HELP = {
    "network": "A name in tests.torch_models.TORCH_MODELS.",
    "dataset": "random, or a data set whose test images are used.",
    "weights": "Checkpoint folder, or PyTorch state dict; without it, initial weights.",
    "num_faults": "Faults, dealt to the layers as the paper does; 0 is its sample size.",
    "num_images": "Test images, the first ones; 0 is all.",
    "channels": "Of random images: 1 or 3.",
    "batch_size": "Images per batch, on every side.",
    "precision": "Of matmuls and convolutions: highest, high or default.",
    "rounds": "How often jaxfi and PyTorch take turns.",
    "pytorch_faults": "Faults that PyTorch re-runs in a round.",
    "pytorch_images": "Images that it re-runs them on, rounded to whole batches.",
    "reference_faults": "Faults of the plain re-execution in JAX; 0 leaves it out.",
    "seed": "Of initial weights, random images and faults.",
}


# The measurement


def measure(settings: Settings) -> dict[str, Any]:
    """Everything that the JSON file holds. Raises ValueError or OSError before any work."""
    settings.validate()
    subject = load_subject(settings)
    params = subject.variables["params"]
    num_faults = settings.num_faults or sample_size(fault_population(params))
    faults = sample_faults(settings.seed, params, num_faults)
    before = machine()
    allow_tf32(settings.precision != "highest")
    rows = _spread_rows(num_faults, settings.pytorch_faults)
    num_images = _sampled_images(settings, subject)
    ours, theirs = [], []
    for _ in range(settings.rounds):
        seconds, campaign = run_jaxfi(settings, subject, faults)
        ours.append(seconds)
        seconds, outcomes = run_pytorch(settings, subject, faults[rows], num_images)
        theirs.append(seconds)
    num_outcomes = num_faults * len(subject.images)
    rates = [num_outcomes / seconds for seconds in ours]
    pytorch_rates = [outcomes.size / seconds for seconds in theirs]
    return {
        "jaxfi_outcomes_per_s": statistics.median(rates),
        "pytorch_outcomes_per_s": statistics.median(pytorch_rates),
        "ratio": statistics.median(rates) / statistics.median(pytorch_rates),
        "seconds": statistics.median(ours),
        "num_faults": num_faults,
        "num_images": len(subject.images),
        "device": jax.local_devices()[0].device_kind,
        "precision": settings.precision,
        "spread": {
            "jaxfi_outcomes_per_s": _spread(rates),
            "pytorch_outcomes_per_s": _spread(pytorch_rates),
        },
        "reference": reference_rates(settings, subject, faults, num_images, rates),
        "outcomes": {
            name: estimate.value for name, estimate in campaign.rates()._asdict().items()
        },
        "agreement": agreement(campaign.outcomes[rows, :num_images], outcomes),
        "pytorch": {
            "num_faults": len(rows), "num_images": num_images, "device": subject.device.type,
        },
        "settings": dataclasses.asdict(settings),
        "images": subject.note,
        "versions": versions(),
        "machine": before,
    }  # fmt: skip


def reference_rates(
    settings: Settings, subject: Subject, faults: FaultList, num_images: int, rates: Sequence[float]
) -> dict[str, Any] | None:
    """Outcomes per second of plain re-execution in JAX, and jaxfi's over the faster one."""
    if not settings.reference_faults:
        return None
    sample = faults[_spread_rows(len(faults), settings.reference_faults)]
    found = {
        options: len(sample) * num_images
        / run_reference(settings, subject, sample, num_images, compile)
        for options, compile in (("xla", jax.jit), ("campaign", compiled))
    }  # fmt: skip
    ratio = statistics.median(rates) / max(found.values())
    return {"outcomes_per_s": found, "ratio": ratio, "num_faults": len(sample)}


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Share of the sampled outcomes that are the same, and that agree on being critical.

    Masked means equal bits, and the two libraries round differently, so the first is below 1.
    """
    same_critical = (ours == CRITICAL) == (theirs == CRITICAL)
    return {"outcome": float(np.mean(ours == theirs)), "critical": float(np.mean(same_critical))}


def allow_tf32(allowed: bool) -> None:
    """PyTorch's precision on a GPU; nothing changes on a CPU."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def versions() -> dict[str, str]:
    """Of Python and the packages that matter; PyTorch's names its build too: +cpu, +cu130."""
    names = ("jax-fault-injection", "jax", "jaxlib", "flax", "numpy")
    installed = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **installed, "torch": torch.__version__}


def machine() -> dict[str, Any]:
    """What ran it, and how busy it was: on a busy machine threads wait for each other."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "system": platform.system(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _spread(values: Sequence[float]) -> dict[str, Any]:
    median, low, high = statistics.median(values), min(values), max(values)
    return {"median": median, "min": low, "max": high, "rounds": list(values)}


def _spread_rows(num_faults: int, count: int) -> np.ndarray:
    """Rows evenly over the list, which is ordered by layer."""
    return np.unique(np.linspace(0, num_faults - 1, min(count, num_faults)).astype(int))


def _sampled_images(settings: Settings, subject: Subject) -> int:
    """Whole batches only: another shape would be another program."""
    size = min(settings.batch_size, len(subject.images))
    return max(1, min(settings.pytorch_images, len(subject.images)) // size) * size


# Command line


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what it was measured on.

    Medians; the range over the rounds in brackets.
    """
    settings, sample = result["settings"], result["pytorch"]
    rows = [
        ("jaxfi, whole campaign", result["num_faults"], result["num_images"],
         _rate(result["spread"]["jaxfi_outcomes_per_s"]), "1"),
        ("PyTorch, copy and re-run", sample["num_faults"], sample["num_images"],
         _rate(result["spread"]["pytorch_outcomes_per_s"]), f"{result['ratio']:,.1f}"),
    ]  # fmt: skip
    if reference := result["reference"]:
        rate = f"{max(reference['outcomes_per_s'].values()):,.0f}"
        rows.append(("JAX, re-run", reference["num_faults"], sample["num_images"], rate,
                     f"{reference['ratio']:,.1f}"))  # fmt: skip
    lines = ["| side | faults | images | outcomes/s | jaxfi faster by |", "|---|--:|--:|--:|--:|"]
    lines += [f"| {side} | {f:,} | {n:,} | {rate} | {by} |" for side, f, n, rate, by in rows]
    machine, versions = result["machine"], result["versions"]
    caption = (
        f"{settings['network']}, {settings['dataset']}, batches of {settings['batch_size']}, "
        f"precision {result['precision']}, {result['device']}: campaign {result['seconds']:.1f} s; "
        f"{machine['cores']} cores of {machine['processor']}, load {machine['load_average'][0]}, "
        f"JAX {versions['jax']}, PyTorch {versions['torch']}"
    )
    if machine["load_average"][0] > machine["cores"] / 2:
        caption += "; THE MACHINE WAS BUSY before this began, so the figures are no measurement"
    return "\n".join((*lines, "", caption))


def _rate(spread: dict[str, Any]) -> str:
    return f"{spread['median']:,.0f} [{spread['min']:,.0f}, {spread['max']:,.0f}]"


def run(settings: Settings, out: Path) -> dict[str, Any]:
    """Measures, writes the JSON file, prints the table. Raises ValueError or OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = measure(settings)
    write_whole(out, (json.dumps(result, indent=2) + "\n").encode())
    print(table(result))
    return result


def define_flags(values: flags.FlagValues) -> None:
    """--out, and a flag for each field of `Settings`."""
    flags.DEFINE_string("out", None, "JSON file of the result.", flag_values=values)
    for field in dataclasses.fields(Settings):
        text = field.type == "str"
        define: Any = flags.DEFINE_string if text else flags.DEFINE_integer
        define(field.name, field.default, _HELP[field.name], flag_values=values)


def run_from_flags(values: flags.FlagValues) -> dict[str, Any]:
    """Raises as `run` does, and ValueError if --out is missing."""
    if not values["out"].value:
        raise ValueError("--out is missing: give the JSON file for the result")
    return run(settings_from_flags(values), Path(values["out"].value))


def settings_from_flags(values: flags.FlagValues) -> Settings:
    """The settings that the parsed flags spell."""
    given: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    return Settings(**given)


def main(argv: Sequence[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # a campaign compiles, each time
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
