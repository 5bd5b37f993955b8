"""The same faults on the same network and images through jaxfi, PyTorchFI, MRFI, plain PyTorch.

Agreement of outcomes fault by fault, every kind of disagreement with its size, and outcomes per
second, in one run. Peers that are not installed are left out (`pip install 'jaxfi[bench]'`).

    python -m experiments.benchmarks.peers --weights=FILE.npz --fault_list=FILE.csv \\
        --num_faults=250 --num_images=200 --workdir=runs/peers
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import sys
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

from experiments.agreement import sample_rows
from experiments.config import parse_flags
from experiments.ground_truth import Subject, load_subject
from jaxfi.campaign import NotReproducible, run_campaign
from jaxfi.convert import FLATTENED, load_state, read_fault_list
from jaxfi.convert.layout import to_torch_layout, torch_name
from jaxfi.faults import FaultList, inject
from jaxfi.files import write_whole
from jaxfi.outcomes import CRITICAL, MASKED, NON_CRITICAL
from tests.torch_models import TORCH_MODELS

NAMES = {MASKED: "masked", NON_CRITICAL: "non-critical", CRITICAL: "critical"}
UNSUPPORTED = 255
Logits = np.ndarray  # [N, classes] float32


class TorchFault(NamedTuple):
    """A bit-flip in PyTorch's names: module, flat index and index of its weight, bit."""

    module: str
    element: int
    index: tuple[int, ...]
    bit: int


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


# The tools: each gives the faulty logits of one fault, and leaves the network as it was.


def plain_pytorch(model: torch.nn.Module, forward: Callable) -> Callable:
    """Flips the bit in place, runs the network, flips it back."""
    modules = dict(model.named_modules())

    def faulty(fault: TorchFault) -> Logits:
        words = modules[fault.module].weight.detach().view(torch.int32).view(-1)
        mask = int(np.uint32(1 << fault.bit).view(np.int32))
        words[fault.element] ^= mask
        outputs = forward(model)
        words[fault.element] ^= mask
        return outputs

    return faulty


def pytorchfi(model: torch.nn.Module, forward: Callable) -> Callable:
    """`declare_weight_fi` copies the model for each fault. It indexes four axes: convolutions."""
    from pytorchfi.core import fault_injection

    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    injector = fault_injection(model, 1, [3, 32, 32], [torch.nn.Conv2d])

    def faulty(fault: TorchFault) -> Logits | None:
        if fault.module not in names:
            return None
        k, *rest = ([axis] for axis in fault.index)
        corrupted = injector.declare_weight_fi(
            function=lambda weight, index: flip_bit(weight[index], fault.bit),
            layer_num=[names.index(fault.module)], k=k, dim1=rest[0], dim2=rest[1], dim3=rest[2],
        )  # fmt: skip
        return forward(corrupted)

    return faulty


def flip_bit(value: torch.Tensor, bit: int) -> torch.Tensor:
    """A scalar float32 with one bit of its word flipped."""
    word = value.detach().clone().view(torch.int32) ^ int(np.uint32(1 << bit).view(np.int32))
    return word.view(torch.float32)


def mrfi(model: torch.nn.Module, forward: Callable) -> Callable:
    """One injector for every layer, of which one is enabled at a time."""
    import mrfi as package

    injector = {
        "type": "weight", "name": ["weight"], "enabled": False,
        "selector": {"method": "FixPosition", "position": 0},
        "error_mode": {"method": "FloatFixedBitFlip", "bit": 0},
        "module_type": ["Conv2d", "Linear"],
    }  # fmt: skip
    wrapped = package.MRFI(model, package.EasyConfig({"faultinject": [injector]}))

    def faulty(fault: TorchFault) -> Logits:
        (config,) = wrapped.get_weights_configs(module_fullname=fault.module)
        config["selector"]["args"]["position"] = fault.element
        config["error_mode"]["args"]["bit"] = fault.bit
        config["enabled"] = True
        outputs = forward(wrapped)
        # MRFI restores a weight only in the next run of an *enabled* injector: disabling it now
        # would leave the fault in the network for good, and faults would pile up.
        with wrapped.golden_run():
            wrapped(torch.zeros(1, *INPUT_SHAPE))
        config["enabled"] = False
        return outputs

    return faulty


INPUT_SHAPE = (3, 32, 32)
TOOLS = {"PyTorch": plain_pytorch, "PyTorchFI": pytorchfi, "MRFI": mrfi}


def installed_tools() -> dict[str, Callable]:
    """The tools whose packages are here."""
    return {
        name: tool
        for name, tool in TOOLS.items()
        if name == "PyTorch" or importlib.util.find_spec(name.lower())
    }


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
        index = tuple(int(axis) for axis in np.unravel_index(flat, indices.shape))
        module = torch_name(path).removesuffix(".weight")
        found.append(TorchFault(module, flat, index, int(bit)))
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
    network = jax.jit(lambda fault, x: subject.apply_fn(inject(subject.params, fault), x))
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
    """What a change of the logits of this relative size says about a disagreement."""
    if largest < 1e-4:
        return "order of float sums: the fault moves the logits by rounding errors only"
    if np.isnan(median) or np.isinf(median):
        return "NaN or Inf in the logits of one of the two"
    return "a fault of this size meets images near a decision boundary"


def write_runs(path: Path, runs: Sequence[Run], faults: FaultList) -> None:
    """Shares of masked and critical images of every fault in every tool."""
    header = ["path", "index", "bit"]
    header += [f"{outcome}_{run.tool}" for run in runs for outcome in ("masked", "critical")]
    columns = [
        (run.outcomes == code).mean(axis=1).round(6) for run in runs for code in (MASKED, CRITICAL)
    ]
    sites = zip(faults.leaf, faults.indices(), faults.bit.tolist(), *columns, strict=True)
    _write_csv(path, header, ((faults.paths[leaf], *rest) for leaf, *rest in sites))


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


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
    table = Table(title=title, box=box.SIMPLE_HEAD)
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
    headings = ("tool", "faults", "outcomes_per_second", "seconds", "as_jaxfi", "as_pytorch")
    rows = summary(runs)
    _write_csv(workdir / "summary.csv", headings, rows)
    print_table("Peers on the same faults and images", headings, rows)
    headings = ("tool", "theirs", "ours", "pairs", "median_change", "largest_change", "reason")
    rows = list(disagreements(runs))
    _write_csv(workdir / "disagreements.csv", headings, rows)
    print_table("Where a tool and jaxfi differ", headings, rows)


def define_flags(values: flags.FlagValues) -> None:
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


def main(argv: Sequence[str]) -> None:
    values = flags.FLAGS
    try:
        for name in ("workdir", "weights", "fault_list"):
            if not values[name].value:
                raise ValueError(f"--{name} is missing")
        values.mean, values.std = ([float(x) for x in values[n].value] for n in ("mean", "std"))
        run(values, Path(values.workdir))
    except (ValueError, TypeError, OSError, NotReproducible) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main, flags_parser=parse_flags)
