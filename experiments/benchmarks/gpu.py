"""jaxfi on a GPU: is it exact there, how fast is it, and a row pair of the study. In minutes.

    python -m experiments.benchmarks.gpu --pack=.gpu       # on a machine with a network
    bash .gpu/run --out=DIR --seconds=600                  # on one with a GPU, in the same checkout

The second machine needs JAX with its GPU plugin, PyTorch and what comes with both; the folder that
--pack makes, by the Python version that the other machine has, brings the wheels that such a
machine lacks, and MNIST. Stages run by their value, each
in a process of its own, and each writes its JSON as it ends; what does not fit into --seconds is
left out and said. --stages chooses some. --smoke runs all of it, small, on any machine.

Stages:
  machine: the card, versions, and float32 matmul and copy rates.
  conformance: fast against reference, pair by pair, on every network of tests.conformance_models
    and some studied ones, at precision highest and default. Beside it, as it only compiles, the
    row pair of Table 3's LeNet: `python -m experiments.gr`, training and campaigns.
  deterministic: the same networks with XLA's deterministic operations.
  lenet, resnet18: whole campaigns, cold and again, against PyTorch's copy, flip and re-run on the
    same GPU, its batch as large as all images; some faults also with the reference engine.
  batches: LeNet's with other batch sizes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"machine": 40, "conformance": 200, "lenet": 150, "resnet18": 150, "batches": 150,
          "deterministic": 200}  # fmt: skip
"""By value, and the seconds that each may take at most."""
PRECISIONS = ("highest", "default")
STUDIED = ("lenet", "resnet9", "resnet18")
ROW = "table3_mnist_lenet"
# What an image with JAX and PyTorch lacks; promise comes as source only.
WHEELS = """array_record dm-haiku dm-tree docstring_parser googleapis-common-protos immutabledict
            importlib_resources jmp promise simple-parsing tensorboardX tensorflow-datasets
            tensorflow-metadata termcolor toml""".split()
RUN = """#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
python3 -m pip install -q --no-index --no-deps --target "$here/site" "$here"/wheels/*.whl || exit
export PYTHONPATH=$here/site TFDS_DATA_DIR=$here/tfds
exec python3 -m experiments.benchmarks.gpu "$@"
"""
# A process takes the memory that it needs, not three quarters of the card.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}


# The machine with network: what to carry


def pack(folder: Path) -> None:
    """Wheels of the installed versions, and MNIST as TFDS prepared it, into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "wheels")]
    subprocess.run([*wheel, *versions], check=True)
    prepared = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    if not (prepared / "mnist").is_dir():
        raise FileNotFoundError(f"{prepared} has no mnist: prepare it with TFDS")
    shutil.copytree(prepared / "mnist", folder / "tfds" / "mnist")
    (folder / "run").write_text(RUN, encoding="utf-8")


# The machine with a GPU: stages, one after another


def run_stages(stages: Sequence[str], out: Path, seconds: float, environment: dict) -> None:
    """Each stage in a process of its own, as long as `seconds` last."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        beside = [row_pair(out, environment)] if stage == "conformance" else []
        most = min(end - time.monotonic(), STAGES[stage])
        ended = run_stage(stage, out, most, environment)
        for process in beside:
            ended += f"; row pair: {wait(process, min(end - time.monotonic(), 60))}"
            keep_row(out)
        print(f"{stage}: {ended}; {end - time.monotonic():.0f} s are left")


def run_stage(stage: str, out: Path, seconds: float, environment: dict) -> str:
    """How it ended."""
    if seconds < 5:
        return "no time is left"
    flag = {"deterministic": "--xla_gpu_deterministic_ops=true"}.get(stage, "")
    flags_now = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", *sys.argv[1:]]
    command += [f"--stages={stage}", "--alone", f"--out={out}", f"--seconds={seconds - 3:.0f}"]
    with open(out / f"{stage}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "XLA_FLAGS": flags_now},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    ended = wait(process, seconds)
    tail = (out / f"{stage}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
    return ended if ended == "done" else f"{ended}\n{tail}"


def wait(process: subprocess.Popen, seconds: float) -> str:
    """How it ended; one that takes longer is killed with all that it started."""
    start = time.monotonic()
    try:
        code = process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"stopped after {time.monotonic() - start:.0f} s"
    return "done" if code == 0 else f"failed with exit code {code}"


def row_pair(out: Path, environment: dict) -> subprocess.Popen:
    """Table 3's LeNet, from the first step of training to the table; in the background."""
    command = [sys.executable, "-m", "experiments.gr"]
    if "--smoke" in sys.argv:
        command += ["--flagfile=experiments/flags/smoke.flags"]
    else:
        command += [f"--flagfile=experiments/flags/{ROW}.flags", "--campaign_batch_size=1000"]
    with open(out / "row.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"--workdir={workdir(out)}"], cwd=ROOT, env=environment,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def workdir(out: Path) -> Path:
    return out / "rows" / ROW


def keep_row(out: Path) -> None:
    """Tables, histories and weights as one file: a machine may bring back few and small ones."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only starts others
    import numpy as np
    from flax.traverse_util import flatten_dict

    from jaxfi.training import load_variables

    folder = workdir(out)
    for network in folder.glob("networks/*/checkpoints/last"):
        arrays = flatten_dict(load_variables(network), sep="/")
        np.savez(network.parents[1] / "weights.npz", **arrays)
    with tarfile.open(out / "row.tar.gz", "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not {"results", "checkpoints", "tensorboard"} & set(path.parts):
                tar.add(path, path.relative_to(out))


def write(out: Path, name: str, result: Any) -> None:
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# Stages; each is called in a process of its own, and imports JAX there


def machine(out: Path, smoke: bool) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    def rate(function: Any, amount: float, *arguments: Any) -> float:
        """`amount` a second: the median of ten calls."""
        program = jax.jit(function)
        jax.block_until_ready(program(*arguments))
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(time.perf_counter() - start)
        return amount / statistics.median(times)

    size = 512 if smoke else 8192
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    a, b = jax.device_put((a, b))
    rates = {}
    for precision in PRECISIONS:
        with jax.default_matmul_precision(precision):
            rates[precision] = rate(jnp.dot, 2e-12 * size**3, a, b)
    copies = rate(lambda x: x + 1, 2e-9 * a.nbytes, a)
    write(out, "machine", {
        "device": device(), "versions": versions(), "cores": os.cpu_count(),
        "matmul_tflop_per_s": rates, "copy_gb_per_s": copies,
    })  # fmt: skip


def device() -> str:
    import jax

    return jax.local_devices()[0].device_kind


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def conformance(out: Path, smoke: bool, name: str = "conformance") -> None:
    """Every network at both precisions, some processes at a time; written as each ends."""
    from tests import conformance_models

    models = [model.__name__ for model in conformance_models.TINY]
    tasks = [(model, precision) for precision in PRECISIONS for model in models]
    tasks += [(f"studied:{model}", precision) for precision in PRECISIONS for model in STUDIED]
    tasks = [("plain_mlp", "highest"), ("plain_conv", "default")] if smoke else tasks
    processes = max(1, min((os.cpu_count() or 1) - 3, len(tasks), 12))
    results = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        futures = [pool.submit(compare, *task) for task in tasks]
        for future in concurrent.futures.as_completed(futures):
            results.append(future.result())
            write(out, name, results)
            print(results[-1])


def compare(model: str, precision: str) -> dict[str, Any]:
    """How many pairs the fast and the reference engine judge differently."""
    import jax
    import numpy as np

    from jaxfi import run_campaign
    from tests import conformance_models
    from tests.engine.test_conformance import faults_in_every_leaf

    start = time.perf_counter()
    kind, _, name = model.rpartition(":")
    make = conformance_models.studied if kind else None
    apply_fn, params, shape = make(name) if make else getattr(conformance_models, name)()
    faults = faults_in_every_leaf(params)
    generator = np.random.default_rng(1)
    images = generator.normal(size=(13, *shape)).astype(np.float32)
    labels = generator.integers(0, 4, len(images))
    batch_size = 13 if name == "batch_coupled" else 5
    result: dict[str, Any] = {"model": model, "precision": precision, "faults": len(faults)}
    campaigns = {}
    # Divided, as large campaigns are: so few faults would re-run the network.
    divided = mock.patch("jaxfi.campaign._run.chosen_plans", lambda _, plans, *others: dict(plans))
    for engine in ("reference", "fast"):
        try:
            with divided:
                campaigns[engine] = run_campaign(
                    apply_fn, params, faults, images, labels,
                    engine=engine, batch_size=batch_size, precision=precision,
                )  # fmt: skip
        except Exception as error:  # the others are still to be compared
            result[engine] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    if len(campaigns) == 2:
        fast, reference = campaigns["fast"], campaigns["reference"]
        differ = (fast.outcomes != reference.outcomes) | (fast.due != reference.due)
        leaves = sorted({faults.paths[leaf] for leaf in faults.leaf[differ.any(axis=1)]})
        result |= {
            "pairs": differ.size, "differ": int(differ.sum()), "leaves": leaves[:8],
            "masked": float(np.mean(reference.outcomes == 0)),
            "correct_equal": bool(np.array_equal(fast.correct, reference.correct)),
        }  # fmt: skip
    jax.clear_caches()
    return result | {"seconds": time.perf_counter() - start}


def deterministic(out: Path, smoke: bool) -> None:
    conformance(out, smoke, "deterministic")


@dataclasses.dataclass(frozen=True)
class Speed:
    """One comparison with PyTorch; `weights` as `experiments.benchmarks.sides` takes them."""

    network: str
    num_faults: int
    num_images: int
    batch_sizes: tuple[int, ...]
    pytorch_faults: int
    weights: str = ""
    dataset: str = "mnist"
    channels: int = 1
    batch_size: int = 0
    precision: str = "highest"
    seed: int = 0
    images_per_fault: int = 0


def lenet(out: Path, smoke: bool, name: str = "lenet", sizes: tuple[int, ...] = (1000,)) -> None:
    trained = workdir(out) / "networks" / "default" / "checkpoints" / "last"
    weights = flags.FLAGS.weights or (str(trained) if trained.is_dir() else "")
    settings = Speed("lenet", 16_638, 10_000, sizes, 100, weights, images_per_fault=6)
    speed(out, name, _small(settings) if smoke else settings)


def batches(out: Path, smoke: bool) -> None:
    lenet(out, smoke, "batches", (10_000, 100))


def resnet18(out: Path, smoke: bool) -> None:
    settings = Speed("resnet18", 500, 1000, (500,), 20, images_per_fault=100)
    speed(out, "resnet18", _small(settings) if smoke else settings)


def _small(settings: Speed) -> Speed:
    return dataclasses.replace(
        settings, network="lenet", weights="", num_faults=20, num_images=40, batch_sizes=(20,),
        pytorch_faults=2, dataset="random", images_per_fault=6,
    )  # fmt: skip


def speed(out: Path, name: str, settings: Speed) -> None:
    """Whole campaigns by batch size, cold and again, and PyTorch's, before and after them."""
    import jax
    import numpy as np

    from experiments.benchmarks.sides import load_subject, run_jaxfi, run_pytorch
    from jaxfi.campaign import run_campaign
    from jaxfi.engine._costs import network_arithmetic
    from jaxfi.faults import sample_faults
    from jaxfi.network import trace_network

    subject = load_subject(settings)
    params = subject.variables["params"]
    faults = sample_faults(settings.seed, params, settings.num_faults)
    rows = np.unique(np.linspace(0, len(faults) - 1, settings.pytorch_faults).astype(int))
    whole = dataclasses.replace(settings, batch_size=settings.num_images)
    result: dict[str, Any] = {"settings": dataclasses.asdict(settings), "device": device()}
    batch = jax.ShapeDtypeStruct((1, *subject.images.shape[1:]), np.float32)
    operations = network_arithmetic(trace_network(subject.apply_fn, params, batch))
    pairs = len(faults) * len(subject.images)
    result |= {"images": subject.note, "pairs": pairs, "operations_per_image": operations}
    result |= {"pytorch_pairs_per_s": [], "campaigns": []}

    def pytorch() -> None:
        run_pytorch(whole, subject, faults[rows[:2]], settings.num_images)
        seconds, outcomes = run_pytorch(whole, subject, faults[rows], settings.num_images)
        result["pytorch_pairs_per_s"].append(outcomes.size / seconds)
        theirs.append(outcomes)

    theirs: list[np.ndarray] = []
    pytorch()
    for batch_size in settings.batch_sizes:
        entry: dict[str, Any] = {"batch_size": batch_size}
        result["campaigns"].append(entry)
        now = dataclasses.replace(settings, batch_size=batch_size)
        entry["cold_s"], campaign = run_jaxfi(now, subject, faults)
        entry["rates"] = rates_of(campaign)
        entry["same_as_pytorch"] = float(np.mean(campaign.outcomes[rows] == theirs[0]))
        write(out, name, result)

        def timed(faults: Any, **options: Any) -> tuple[float, Any]:
            images, labels = subject.images, subject.labels
            start = time.perf_counter()
            found = run_campaign(
                subject.apply_fn, params, faults, images, labels,
                nan="argmax", batch_size=batch_size, **options,  # noqa: B023
            )  # fmt: skip
            return time.perf_counter() - start, found

        entry["again_s"], again = timed(faults)
        entry["repeats"] = bool(np.array_equal(campaign.outcomes, again.outcomes))
        write(out, name, result)
        entry["sampled_s"], sampled = timed(faults, images_per_fault=settings.images_per_fault)
        entry["sampled"] = rates_of(sampled)
        pairs_of = campaign.outcomes[np.arange(len(faults))[:, None], sampled.images]
        entry["sample_is_full"] = bool(np.array_equal(sampled.outcomes, pairs_of))
        write(out, name, result)
        _, reference = timed(faults[rows], engine="reference")
        differ = campaign.outcomes[rows] != reference.outcomes
        entry["reference"] = {"pairs": differ.size, "differ": int(differ.sum())}
        write(out, name, result)
        print(entry)
    pytorch()
    write(out, name, result)


def rates_of(campaign: Any) -> dict[str, list[float]]:
    """Value and interval of each."""
    return {name: list(map(float, e)) for name, e in campaign.rates()._asdict().items()}


# Command line


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("pack", None, "Make this folder, and end.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder of the results.", flag_values=values)
    flags.DEFINE_integer("seconds", 600, "Of all stages together.", flag_values=values)
    flags.DEFINE_list("stages", list(STAGES), "What to run, in this order.", flag_values=values)
    flags.DEFINE_string("weights", "", "Of LeNet, where no row pair ran.", flag_values=values)
    flags.DEFINE_boolean("smoke", False, "Small, on any machine.", flag_values=values)
    flags.DEFINE_boolean("alone", False, "In this process: the launcher's.", flag_values=values)


def run_from_flags(values: flags.FlagValues) -> None:
    """Raises ValueError or OSError in one line."""
    given: dict[str, Any] = {name: values[name].value for name in values}
    if given["pack"]:
        return pack(Path(given["pack"]))
    if not given["out"]:
        raise ValueError("--out is missing: give the folder for the results")
    out, stages = Path(given["out"]).resolve(), given["stages"]
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"--stages has {unknown[0]!r}; allowed: {', '.join(STAGES)}")
    if given["alone"]:
        return globals()[stages[0]](out, given["smoke"])
    return run_stages(stages, out, given["seconds"], {**os.environ, **ENVIRONMENT})


def main(argv: Sequence[str]) -> None:
    from experiments.common.command import run_command

    run_command(argv, lambda: run_from_flags(flags.FLAGS), "stopped")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    app.run(main)
