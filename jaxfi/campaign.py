"""A campaign: every fault on every image, counted, checked by null faults, saved and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxfi.engine import ENGINES
from jaxfi.explain import LeafCost, leaf_costs, least_memory, plan_text
from jaxfi.fault_list import FaultList
from jaxfi.fault_sites import checked_integer
from jaxfi.faults import PyTree
from jaxfi.golden import Setup, golden_run, network_function
from jaxfi.ledger import Ledger, MemoryLedger, open_directory
from jaxfi.outcomes import (
    Rates,
    Results,
    accuracy,
    checked_nan_policy,
    checked_population,
    estimate_rate,
    judge,
    per_fault_shares,
)
from jaxfi.slicing import ApplyFn, digest, trace_network
from jaxfi.store import load
from jaxfi.workers import NotReproducible, run_blocks, run_checked, split_blocks, start_workers

__all__ = ["ENGINES", "PRECISIONS", "Campaign", "NotReproducible", "load_campaign", "run_campaign"]

PRECISIONS = ("highest", "high", "default")
_FAULTS_PER_BLOCK = 2048  # saved together; the results do not depend on it
_LOOK_EVERY = 0.5  # seconds between two looks at what the other processes have finished


@dataclasses.dataclass(frozen=True)
class Campaign:
    """The result of `run_campaign`.

    Attributes:
      faults: F faults.
      outcomes: [F, N] uint8, 0 masked, 1 non-critical, 2 critical.
      due: [F, N] bool, the faulty output holds NaN or Inf.
      correct: [F] int32, images whose faulty prediction is the label.
      golden: [N, classes] fault-free outputs.
      labels: [N] int32.
      provenance: what the result depends on: hashes, precision, batch size, seed, versions.
    """

    faults: FaultList
    outcomes: np.ndarray
    due: np.ndarray
    correct: np.ndarray
    golden: np.ndarray
    labels: np.ndarray
    provenance: dict[str, Any]

    @property
    def results(self) -> Results:
        return Results(self.outcomes, self.due, self.correct)

    @property
    def num_due(self) -> np.ndarray:
        """[F] images per fault whose output held NaN or Inf."""
        return self.due.sum(axis=1)

    @property
    def num_not_activated(self) -> int:
        """Faults that did not change the stored word (stuck-at the value it has)."""
        return self.provenance["num_not_activated"]

    @property
    def clean_accuracy(self) -> float:
        """Share of images that the fault-free network predicts correctly."""
        return accuracy(self.golden, self.labels, self.provenance["nan"])

    @property
    def faulty_accuracy(self) -> float:
        """Correct faulty predictions / (faults x images)."""
        return float(self.correct.sum() / self.outcomes.size)

    def rates(self, population: int | None = None, t: float = 2.58) -> Rates:
        """Rates with intervals that take each fault as one cluster of images.

        Args:
          population: possible faults; default those that the list was drawn from.
          t: cut-off of the normal distribution; 2.58 is 99 % confidence.
        """
        if population is None:
            population = self.faults.population
        checked_population(population, len(self.faults))
        if not 0 < t < float("inf"):
            raise ValueError(f"t {t} is out of range: allowed is t > 0")
        num_images = self.outcomes.shape[1]
        return Rates(*(
            estimate_rate(per_fault_shares(self.results, rate), num_images, population, t)
            for rate in Rates._fields
        ))  # fmt: skip


def run_campaign(
    apply_fn: ApplyFn,
    params: PyTree,
    faults: FaultList,
    images: Any,
    labels: Any,
    *,
    nan: str = "critical",
    engine: str = "fast",
    batch_size: int = 100,
    precision: str = "highest",
    memory_budget: int | None = None,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
    progress: bool = False,
    workdir: str | os.PathLike | None = None,
) -> Campaign:
    """Runs every fault on every image.

    Args:
      apply_fn: pure; maps `params` and images [batch, ...] to outputs [batch, classes].
      params: any pytree of float or integer arrays; faults go into these.
      faults: F faults in `params`.
      images: [N, ...].
      labels: [N] integers.
      nan: "critical" counts a changed output with a NaN as critical; "argmax" goes by the argmax
        of NaN, as published tools do.
      engine: "fast", "reference" (one fault at a time), or "vmap".
      batch_size: images per batch. It fixes the shapes, so the last bits: part of the result.
      precision: of matmuls and convolutions: "highest" (float32), "high", "default" (a GPU's TF32).
      memory_budget: bytes of each device; default 70 % of what it reports, or of the machine.
      seed: of the null faults that check the run.
      devices: where to run, of one kind and this process's own; default all local accelerators, or
        one CPU. Blocks of faults go to whichever is free. The outcomes do not depend on how many.
      progress: show a progress bar with rate and ETA.
      workdir: a directory that keeps finished work; the same campaign there is continued. The
        processes of a job (`jaxfi.distributed.join_job`) share it, and each returns the whole.

    Raises ValueError or TypeError, before any work, for arguments that do not fit; NotReproducible
    if a null fault is not masked.

    >>> params = {"w": jnp.eye(2)}
    >>> faults = FaultList.from_sites([("w", (0, 0), 31), ("w", (0, 1), 0)], params)
    >>> images = np.array([[2.0, 1.0], [0.5, 1.0]], np.float32)
    >>> result = run_campaign(lambda p, x: x @ p["w"], params, faults, images, [0, 1])
    >>> result.outcomes.tolist()
    [[2, 1], [0, 0]]
    """
    _check_choices(engine, precision, nan, seed)
    images, labels = _checked_images(images, labels)
    batches = _batched(images, batch_size)
    faults.check_injectable(params)
    devices = _checked_devices(devices, workdir)
    with jax.default_matmul_precision(precision), jax.default_device(devices[0]):
        shape = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
        network = trace_network(apply_fn, params, shape)
        params = jax.tree.map(jnp.asarray, params)
        activated = faults.activated(params)
        costs = leaf_costs(network, faults) if engine == "fast" else []
        memory = _checked_memory(memory_budget, devices, faults, len(images), costs)
        function = network_function(network, apply_fn)
        golden, speed = golden_run(function, params, batches, len(images))
        setup = Setup(network, function, params, batches, labels, golden, nan, memory)
        provenance = {
            **_fingerprint(setup, images, devices[0]),
            "engine": engine,
            "precision": precision,
            "seed": seed,
            "num_not_activated": int(np.count_nonzero(~activated)),
        }
        with _open_ledger(workdir, provenance, faults, setup, activated) as ledger:
            if progress and costs:
                plan = plan_text(costs, len(images), len(batches), memory, speed)
                print(plan, file=sys.stderr)
            _run_unfinished(ledger, setup, engine, devices, faults, activated, seed, progress)
            results = ledger.results()
    return Campaign(faults, *results, golden, labels, provenance)


def load_campaign(directory: str | os.PathLike) -> Campaign:
    """The campaign that `run_campaign(..., workdir=directory)` finished there.

    Raises FileNotFoundError, or ValueError naming what is missing or damaged.
    """
    stored = load(directory)
    golden, labels = stored.arrays["golden"], stored.arrays["labels"]
    return Campaign(stored.faults, *stored.results, golden, labels, stored.fingerprint)


@contextlib.contextmanager
def _open_ledger(
    workdir: str | os.PathLike | None,
    provenance: dict[str, Any],
    faults: FaultList,
    setup: Setup,
    activated: np.ndarray,
) -> Iterator[Ledger]:
    """What is finished; faults that are not activated are from the start, with golden's results."""
    golden, labels = setup.golden, setup.labels
    verdict = jax.tree.map(np.asarray, judge(golden, golden, labels, setup.nan))
    correct = np.array([verdict.correct.sum()], np.int32)
    masked = Results(verdict.outcome[None], verdict.due[None], correct)
    if workdir is None:
        yield MemoryLedger(masked, activated)
        return
    with open_directory(
        workdir,
        provenance,
        faults,
        faults.values(setup.params),
        {"golden": golden, "labels": labels},
        process_index=jax.process_index(),
        num_processes=jax.process_count(),
    ) as ledger:
        ledger.begin(masked, activated)
        yield ledger


def _run_unfinished(
    ledger: Ledger,
    setup: Setup,
    engine: str,
    devices: Sequence[jax.Device],
    faults: FaultList,
    activated: np.ndarray,
    seed: int,
    progress: bool,
) -> None:
    """Runs blocks until none is unfinished, whoever finishes them."""
    # Of all faults, not only the unfinished: every process must see the same blocks.
    num_workers = len(devices) * jax.process_count()
    blocks = split_blocks(faults, np.flatnonzero(activated), _FAULTS_PER_BLOCK, num_workers)
    run_block = functools.partial(run_checked, faults=faults, seed=seed)
    unfinished = ledger.unfinished()
    if not unfinished.any():
        return
    workers = start_workers(setup, engine, devices)
    with _bar(np.count_nonzero(unfinished) * setup.num_images, progress) as advance:
        while True:
            blocks_here = ledger.unclaimed(blocks)
            for rows, results in run_blocks(workers, blocks_here, run_block, advance):
                ledger.write(rows, results)
            if not ledger.unfinished().any():
                return
            time.sleep(_LOOK_EVERY)  # others work on the rest, or die and leave it


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, unit=" outcomes", unit_scale=True, disable=not progress) as bar:
        yield lambda count: bar.update(min(count, total - bar.n)) and None


def _check_choices(engine: str, precision: str, nan: str, seed: int) -> None:
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: allowed are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    checked_nan_policy(nan)
    checked_integer("seed", seed, 0)


def _checked_images(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim < 1 or not len(images):
        raise ValueError(f"images have shape {images.shape}: allowed is [N, ...] with N >= 1")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}: allowed is {images.shape[:1]}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels have dtype {labels.dtype}: allowed are integers")
    if images.dtype == np.float64 and not jax.config.jax_enable_x64:
        images = images.astype(np.float32)
    return images, labels.astype(np.int32)


def _batched(images: np.ndarray, batch_size: int) -> np.ndarray:
    batch_size = min(checked_integer("batch_size", batch_size, 1), len(images))
    padding = -len(images) % batch_size
    padded = np.concatenate([images, np.repeat(images[:1], padding, axis=0)])
    return padded.reshape(-1, batch_size, *images.shape[1:])


def _checked_devices(
    devices: Sequence[jax.Device] | None, workdir: str | os.PathLike | None
) -> tuple[jax.Device, ...]:
    local = jax.local_devices()
    devices = tuple(devices or (local[:1] if local[0].platform == "cpu" else local))
    kinds = sorted({f"{device.platform} {device.device_kind}" for device in devices})
    if len(kinds) > 1:
        raise ValueError(f"devices are {' and '.join(kinds)}: allowed is one kind, for equal bits")
    if any(device.process_index != jax.process_index() for device in devices):
        raise ValueError("devices are another process's: allowed are jax.local_devices()")
    if jax.process_count() > 1 and workdir is None:
        raise ValueError(f"{jax.process_count()} processes need a workdir: they share work there")
    return devices


def _checked_memory(
    budget: int | None,
    devices: Sequence[jax.Device],
    faults: FaultList,
    num_images: int,
    costs: list[LeafCost],
) -> int:
    """Bytes for golden values and working space of each device."""
    # Outcomes and DUEs are kept on the host, a byte each: all, and one block's.
    kept = 2 * num_images * (len(faults) + min(len(faults), _FAULTS_PER_BLOCK))
    kept = kept // len(devices) if devices[0].platform == "cpu" else 0
    memory = (_default_budget(devices) if budget is None else budget) - kept
    if memory < (least := least_memory(costs)):
        raise ValueError(
            f"memory_budget {memory + kept:,} bytes is too small for one batch of images: allowed "
            f"is {least + kept:,} or more, or a smaller batch_size"
        )
    return memory


def _default_budget(devices: Sequence[jax.Device]) -> int:
    """Bytes of each device; CPU devices share the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return int(0.7 * (devices[0].memory_stats() or {}).get("bytes_limit", machine))


def _fingerprint(setup: Setup, images: np.ndarray, device: jax.Device) -> dict[str, Any]:
    """What decides the outcomes' bits. NumPy's version does not: it only draws the faults, which
    are compared themselves, and moves bits."""
    return {
        "params_sha256": _hash(*jax.tree.leaves(setup.params)),
        "images_sha256": _hash(images),
        "labels_sha256": _hash(setup.labels),
        "network_sha256": digest(setup.network),
        "batch_size": setup.batch_size,
        "nan": setup.nan,
        "jaxfi": metadata.version("jaxfi"),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "x64": bool(jax.config.jax_enable_x64),
        "backend": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
    }


def _hash(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
