"""The same faults on the same network and images through jaxfi, PyTorchFI, MRFI, plain PyTorch.

Agreement of outcomes fault by fault, every kind of disagreement with its size, and outcomes per
second, in one run. Peers that are not installed are left out (`pip install 'jaxfi[bench]'`).

    python -m experiments.benchmarks.peers --weights=FILE.npz --fault_list=FILE.csv \\
        --num_faults=250 --num_images=200 --workdir=runs/peers
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from absl import app, flags
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.peer_tools import INPUT_SHAPE, Logits, TorchFault, installed_tools
from experiments.common.agreement import sample_rows
from experiments.common.command import run_command, workdir_from
from experiments.common.config import parse_flags
from experiments.common.published_network import Subject, load_subject
from jaxfi.campaign import run_campaign
from jaxfi.convert import FLATTENED, load_state, read_fault_list, to_torch_layout, torch_name
from jaxfi.data import write_csv
from jaxfi.engine import compiled
from jaxfi.faults import FaultList, inject
from jaxfi.outcomes import CRITICAL, MASKED, NON_CRITICAL
from tests.torch_models import TORCH_MODELS

NAMES = {MASKED: "masked", NON_CRITICAL: "non-critical", CRITICAL: "critical"}
UNSUPPORTED = 255


class Run(NamedTuple):
    """What a tool found.

    Attributes:
      tool: its name.
      outcomes: [F, N] uint8; `UNSUPPORTED` rows are faults that the tool cannot inject.
      change: [F, N] float32, largest |faulty - golden| logit over the image's largest |logit|.
      seconds: wall time, golden run and compilation included.
    """

    tool: str
    outcomes: np.ndarray
    change: np.ndarray
    seconds: float


# Running them


def torch_faults(faults: FaultList) -> list[TorchFault]:
    """The faults in PyTorch's names and index order. Raises ValueError for others than weights."""
    if (faults.bit < 0).any():
        raise ValueError("allowed are faults with a bit position")
    found = []
    for leaf, element, bit in zip(faults.leaf, faults.element, faults.bit, strict=True):
        path, shape = faults.paths[leaf], faults.shapes[leaf]
        indices = to_torch_layout(path, np.arange(np.prod(shape)).reshape(shape), FLATTENED)
        flat = int(np.flatnonzero(indices == element)[0])
        axes = tuple(int(axis) for axis in np.unravel_index(flat, indices.shape))
        module = torch_name(path).removesuffix(".weight")
        found.append(TorchFault(module, flat, axes, int(bit)))
    return found


def torch_network(settings: Any) -> torch.nn.Module:
    """The network with its weights, ready for inference."""
    model = TORCH_MODELS[settings.network]()
    state = {name: torch.from_numpy(a.copy()) for name, a in load_state(settings.weights).items()}
    model.load_state_dict(state, strict=False)  # num_batches_tracked may be absent
    return model.eval()


def run_tool(
    name: str,
    tool: Callable,
    model: torch.nn.Module,
    subject: Subject,
    faults: FaultList,
    size: int,
) -> Run:
    """One fault at a time, in batches of `size` images."""
    images = torch.from_numpy(np.ascontiguousarray(subject.images.transpose(0, 3, 1, 2)))
    batches = images.split(size)

    def forward(network: Callable) -> Logits:
        with torch.no_grad():
            return torch.cat([network(batch) for batch in batches]).numpy()

    sites = torch_faults(faults)
    start = time.perf_counter()
    golden = forward(model)
    faulty = tool(model, forward)
    outputs = [faulty(site) for site in sites]
    verdicts = [judge(golden, output) for output in outputs]
    seconds = time.perf_counter() - start
    if not same_bits(forward(model), golden).all():
        raise RuntimeError(f"{name} left the network changed")
    outcomes, change = map(np.stack, zip(*verdicts, strict=True))
    return Run(name, outcomes, change, seconds)


def judge(golden: Logits, faulty: Logits | None) -> tuple[np.ndarray, np.ndarray]:
    """Outcome, with NaN as argmax takes it, and size of the change, of every image."""
    if faulty is None:
        return np.full(len(golden), UNSUPPORTED, np.uint8), np.full(len(golden), np.nan, np.float32)
    moved = np.argmax(faulty, axis=1) != np.argmax(golden, axis=1)
    outcome = np.where(moved, CRITICAL, NON_CRITICAL)
    outcome = np.where(same_bits(golden, faulty), MASKED, outcome).astype(np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.abs(faulty - golden).max(axis=1) / np.abs(golden).max(axis=1)
    return outcome, change


def same_bits(golden: Logits, faulty: Logits) -> np.ndarray:
    """[N] bool: all logits of an image have the same words."""
    return (golden.view(np.uint32) == faulty.view(np.uint32)).all(axis=1)


def run_jaxfi(subject: Subject, faults: FaultList, size: int) -> Run:
    """The fast engine; the size of changes afterwards, by plain re-execution, untimed."""
    start = time.perf_counter()
    campaign = run_campaign(
        subject.apply_fn, subject.params, faults, subject.images, subject.labels,
        nan="argmax", batch_size=size,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    network = compiled(lambda fault, x: subject.apply_fn(inject(subject.params, fault), x))
    change = np.empty(campaign.outcomes.shape, np.float32)
    with jax.default_matmul_precision("highest"):
        for row in range(len(faults)):
            outputs = [
                np.asarray(network(faults.fault(row), subject.images[first : first + size]))
                for first in range(0, len(subject.images), size)
            ]
            change[row] = judge(campaign.golden, np.concatenate(outputs))[1]
    return Run("jaxfi", campaign.outcomes, change, seconds)


# Comparing them


def disagreements(runs: Sequence[Run]) -> Iterator[tuple]:
    """(tool, its outcome, jaxfi's outcome, pairs, median and largest change, reason)."""
    ours = runs[0]
    for run in runs[1:]:
        supported = run.outcomes != UNSUPPORTED
        for theirs, our in ((a, b) for a in NAMES for b in NAMES if a != b):
            pairs = supported & (run.outcomes == theirs) & (ours.outcomes == our)
            if pairs.any():
                change = np.fmax(run.change[pairs], ours.change[pairs])
                with np.errstate(invalid="ignore"):
                    size = float(np.median(change)), float(np.max(change))
                yield run.tool, NAMES[theirs], NAMES[our], int(pairs.sum()), *size, reason(*size)


def reason(median: float, largest: float) -> str:
    """What a change of the logits of this relative size says about a disagreement.

    "order of sums": the fault moves the logits by rounding errors only, which each tool rounds in
    its own order. "near a decision boundary": the same holds for the two best classes' distance.
    """
    if largest < 1e-4:
        return "order of sums"
    if np.isnan(median) or np.isinf(median):
        return "NaN or Inf"
    return "near a decision boundary"


def write_runs(path: Path, runs: Sequence[Run], faults: FaultList) -> None:
    """Shares of masked and critical images of every fault in every tool."""
    header = ["path", "index", "bit"]
    header += [f"{outcome}_{run.tool}" for run in runs for outcome in ("masked", "critical")]
    columns = [share_texts(run, code) for run in runs for code in (MASKED, CRITICAL)]
    sites = zip(faults.leaf, faults.indices(), faults.bit.tolist(), *columns, strict=True)
    write_csv(path, header, ((faults.paths[leaf], *rest) for leaf, *rest in sites))


def share_texts(run: Run, code: int) -> list[str]:
    """Share of images per fault; empty for a fault that the tool cannot inject."""
    shares = (run.outcomes == code).mean(axis=1)
    supported = run.outcomes[:, 0] != UNSUPPORTED
    return [f"{x:.6f}" if here else "" for x, here in zip(shares, supported, strict=True)]


def summary(runs: Sequence[Run]) -> list[tuple]:
    """Rows (tool, faults, outcomes per second, agreement with jaxfi and with PyTorch)."""
    rows = []
    for run in runs:
        supported = run.outcomes[:, 0] != UNSUPPORTED
        num_pairs = int(supported.sum()) * run.outcomes.shape[1]
        same = [
            float(np.mean(run.outcomes[supported] == other.outcomes[supported]))
            for other in runs[:2]
        ]
        rows.append((run.tool, int(supported.sum()), num_pairs / run.seconds, run.seconds, *same))
    return rows


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)


def run(settings: Any, workdir: Path) -> list[Run]:
    """Every tool on the same faults. Raises ValueError or OSError, in one line, before that."""
    subject = load_subject(settings)
    if settings.network not in TORCH_MODELS or subject.images.shape[-1] != INPUT_SHAPE[0]:
        raise ValueError(f"allowed are networks {', '.join(TORCH_MODELS)} on images of 3 channels")
    listed = read_fault_list(settings.fault_list, subject.params)
    faults = listed[sample_rows(listed, settings.num_faults, settings.seed)]
    workdir.mkdir(parents=True, exist_ok=True)
    size = min(settings.batch_size, len(subject.images))
    runs = [run_jaxfi(subject, faults, size)]
    for name, tool in installed_tools().items():
        with contextlib.redirect_stdout(io.StringIO()):
            runs.append(run_tool(name, tool, torch_network(settings), subject, faults, size))
    write_runs(workdir / "peers.csv", runs, faults)
    report(runs, workdir)
    return runs


def report(runs: Sequence[Run], workdir: Path) -> None:
    """Both tables, on the terminal and as CSV."""
    tables = {
        "summary": (
            ("tool", "faults", "outcomes_per_second", "seconds", "as_jaxfi", "as_pytorch"),
            summary(runs),
        ),
        "disagreements": (
            ("tool", "theirs", "ours", "pairs", "median_change", "largest_change", "reason"),
            list(disagreements(runs)),
        ),
    }
    for name, (headings, rows) in tables.items():
        write_csv(workdir / f"{name}.csv", headings, rows)
        print_table(name, headings, rows)


def define_flags(values: flags.FlagValues) -> None:
    """What `load_subject` asks for, the fault list, and --workdir."""
    text: Any = functools.partial(flags.DEFINE_string, flag_values=values)
    number: Any = functools.partial(flags.DEFINE_integer, flag_values=values)
    text("workdir", None, "Folder of the results.")
    text("weights", None, "PyTorch state dict of the network: .npz, .safetensors or .pt.")
    text("fault_list", None, "Faults in the field's CSV (Injection,Layer,TensorIndex,Bit).")
    text("network", "resnet20", "Network: a name in jaxfi.models.MODELS.")
    text("dataset", "cifar10", "Its test images are used.")
    flags.DEFINE_list("mean", ["0.4914", "0.4822", "0.4465"], "Per channel.", flag_values=values)
    flags.DEFINE_list("std", ["0.2023", "0.1994", "0.2010"], "Per channel.", flag_values=values)
    number("num_faults", 0, "Faults, stratified by layer and bits; 0 is all.", 0)
    number("num_images", 100, "Test images, the first ones; 0 is all.", 0)
    number("jpeg_quality", 0, "Compress the images again at this quality; 0: do not.", 0, 95)
    number("batch_size", 100, "Images per batch.", 1)
    number("seed", 0, "Seed of the sample.")


def run_from_flags(values: Any) -> None:
    """`run` as the flags say. Raises ValueError for a file that is not named."""
    for name in ("weights", "fault_list"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing")
    values.mean, values.std = ([float(x) for x in values[n].value] for n in ("mean", "std"))
    run(values, workdir_from(values))


def main(argv: Sequence[str]) -> None:
    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
