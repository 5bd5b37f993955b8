"""How long the answer takes: rates within a margin, against the study's campaign in PyTorch.

    python -m experiments.benchmarks.answer --network=lenet --dataset=mnist --margin=0.01 \\
        --out=answer.json

jaxfi's side is one call of `run_stratified` (or, with --how=sequential, of `run_sequential`) that
ends when masked, non-critical, critical and DUE are each known within the margin at 99 %; in a
process of its own, with nothing compiled before (cold), and in another one that finds the first
one's programs in jaxfi's cache (warm). Importing and loading images are not counted.

PyTorch's side copies the model, flips the bit and runs it, two ways: on the same pairs, each fault
on its own images (a sample, extrapolated); and as the study does, 16,638 faults (the sample size
of the margin) on every image, at the rate that a few faults on a thousand images have.

Nothing is trained: without --weights they are the initial ones, whose rates mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags

from experiments.benchmarks.engine import machine, versions
from experiments.benchmarks.sides import (
    RANDOM,
    Subject,
    judge,
    load_subject,
    run_pytorch,
    torch_sites,
    with_fault,
)
from experiments.benchmarks.time_shares import matmul_limit
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.campaign import AdaptiveCampaign, run_sequential, run_stratified
from jaxfi.data import DATASETS, write_whole
from jaxfi.faults import sample_faults
from tests.torch_models import TORCH_MODELS

HOW = {"stratified": run_stratified, "sequential": run_sequential}
_SAME_FAULTS = 100  # that PyTorch runs on their own images
_FULL_FAULTS, _FULL_IMAGES = 5, 1000  # from which its rate in the study's campaign comes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; each field is a flag of the same name."""

    network: str = "lenet"
    dataset: str = "mnist"
    weights: str = ""
    margin: float = 0.01
    how: str = "stratified"
    num_images: int = 0
    channels: int = 3
    batch_size: int = 100
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError, in one line, for an unknown name or a number out of range."""
        names = {"network": TORCH_MODELS, "dataset": (RANDOM, *DATASETS), "how": HOW}
        for name, allowed in names.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"--{name} is {given!r}; allowed: {', '.join(allowed)}")
        if not 0 < self.margin < 1:
            raise ValueError(f"--margin is {self.margin}; allowed: above 0, below 1")
        if self.dataset == RANDOM and not self.num_images:
            raise ValueError("--num_images is missing: random images have no number of their own")


_HELP = {
    "network": "A name in tests.torch_models.TORCH_MODELS.",
    "dataset": "random, or a data set whose test images are used.",
    "weights": "Checkpoint folder, or PyTorch state dict; without it, initial weights.",
    "margin": "Half width of each rate's interval at 99 %.",
    "how": "stratified or sequential.",
    "num_images": "Test images, the first ones; 0 is all.",
    "channels": "Of random images: 1 or 3.",
    "batch_size": "Images per batch.",
    "seed": "Of initial weights, random images, faults and drawn images.",
}


def answer(settings: Settings, subject: Subject) -> tuple[float, AdaptiveCampaign]:
    """Seconds of the call, and what it found."""
    start = time.perf_counter()
    found = HOW[settings.how](
        subject.apply_fn, subject.variables["params"], subject.images, subject.labels,
        key=settings.seed, seed=settings.seed, margin=settings.margin, nan="argmax",
        batch_size=settings.batch_size,
    )  # fmt: skip
    return time.perf_counter() - start, found


def measure(settings: Settings) -> dict[str, Any]:
    """Everything that the JSON file holds. Raises ValueError or OSError before any work."""
    settings.validate()
    before = machine() | {"matmul_gflop_per_s": round(matmul_limit() / 1e9)}
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (_in_a_process(settings, folder) for _ in range(2))
    subject = load_subject(settings)
    _, found = answer(settings, subject)
    same, agreement = pytorch_on_same_pairs(subject, found)
    num_pairs_full = found.num_pairs_fixed
    full = num_pairs_full / pytorch_rate(settings, subject)
    return {
        "jaxfi_seconds_cold": cold,
        "jaxfi_seconds_warm": warm,
        "num_faults": len(found.campaign.faults),
        "images_per_fault": found.images_per_fault,
        "estimates": {name: list(map(float, e)) for name, e in found.rates._asdict().items()},
        "stages": found.stages,
        "num_pairs": found.num_pairs,
        "pytorch_seconds_same_pairs": same,
        "pytorch_seconds_full": full,
        "pairs_full": num_pairs_full,
        "ratio_cold": {"full": full / cold, "same_pairs": same / cold},
        "ratio_warm": {"full": full / warm, "same_pairs": same / warm},
        "agreement_with_pytorch": agreement,
        "settings": dataclasses.asdict(settings),
        "images": subject.note,
        "versions": versions(),
        "machine": before,
    }


def _in_a_process(settings: Settings, cache: str) -> float:
    """Seconds of `answer` in a new process, whose programs come from and go to `cache`."""
    given = [f"--{name}={value}" for name, value in dataclasses.asdict(settings).items()]
    command = [sys.executable, "-m", "experiments.benchmarks.answer", "--once", *given]
    environment = {**os.environ, "JAXFI_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the campaign failed: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def pytorch_on_same_pairs(subject: Subject, found: AdaptiveCampaign) -> tuple[float, float]:
    """Seconds for all pairs, from those of some faults; and the share of equal outcomes."""
    campaign = found.campaign
    rows = np.linspace(0, len(campaign.faults) - 1, _SAME_FAULTS).astype(int)
    pixels = torch.from_numpy(subject.images.transpose(0, 3, 1, 2).copy()).to(subject.device)
    everything = np.arange(len(subject.images))
    images = [everything if campaign.images is None else campaign.images[row] for row in rows]
    with torch.no_grad():
        golden = [subject.model(pixels[chosen]).cpu().numpy() for chosen in images]
        start, equal = time.perf_counter(), []
        sites = torch_sites(campaign.faults[rows])
        for row, chosen, site, plain in zip(rows, images, sites, golden, strict=True):
            faulty = with_fault(subject.model, *site)(pixels[chosen]).cpu().numpy()
            equal.append(judge(plain, faulty) == campaign.outcomes[row])
        seconds = time.perf_counter() - start
    return seconds * len(campaign.faults) / len(rows), float(np.mean(equal))


def pytorch_rate(settings: Settings, subject: Subject) -> float:
    """Pairs a second of a campaign on all images."""
    faults = sample_faults(settings.seed, subject.variables["params"], _FULL_FAULTS)
    seconds, outcomes = run_pytorch(settings, subject, faults, _FULL_IMAGES)
    return outcomes.size / seconds


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table, with what it was measured on."""
    settings, machine = result["settings"], result["machine"]
    rates = ", ".join(
        f"{name.replace('_', ' ')} {100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        for name, (value, low, high) in result["estimates"].items()
    )
    lines = ["| | seconds | PyTorch, same pairs | PyTorch, full campaign |", "|---|--:|--:|--:|"]
    for name in ("cold", "warm"):
        ratio = result[f"ratio_{name}"]
        lines.append(
            f"| {name} | {result[f'jaxfi_seconds_{name}']:.1f} | {ratio['same_pairs']:,.1f} × | "
            f"{ratio['full']:,.0f} × |"
        )
    lines += ["", (
        f"{settings['network']}, {settings['dataset']}, ±{100 * settings['margin']:g} %: "
        f"{result['num_faults']:,} faults × {result['images_per_fault']} images; {rates} %. "
        f"{machine['cores']} cores of {machine['processor']}, "
        f"{machine['matmul_gflop_per_s']} GFLOP/s"
    )]  # fmt: skip
    return "\n".join(lines)


def run_from_flags(values: flags.FlagValues) -> dict[str, Any]:
    """Raises ValueError or OSError, and ValueError if --out is missing."""
    given: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
    settings = Settings(**given)
    if values["once"].value:
        settings.validate()
        seconds, _ = answer(settings, load_subject(settings))
        print(seconds)
        return {}
    if not values["out"].value:
        raise ValueError("--out is missing: give the JSON file for the result")
    out = Path(str(values["out"].value))
    out.parent.mkdir(parents=True, exist_ok=True)
    result = measure(settings)
    write_whole(out, (json.dumps(result, indent=2) + "\n").encode())
    print(table(result))
    return result


def define_flags(values: flags.FlagValues) -> None:
    """--out, --once, and a flag for each field of `Settings`."""
    flags.DEFINE_string("out", None, "JSON file of the result.", flag_values=values)
    flags.DEFINE_boolean("once", False, "Print jaxfi's seconds alone.", flag_values=values)
    define: dict[str, Any] = {
        "str": flags.DEFINE_string, "int": flags.DEFINE_integer, "float": flags.DEFINE_float,
    }  # fmt: skip
    for field in dataclasses.fields(Settings):
        kind = define[str(field.type)]
        kind(field.name, field.default, _HELP[field.name], flag_values=values)


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
