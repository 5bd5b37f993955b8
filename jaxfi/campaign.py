"""A campaign: every fault on every image, counted, checked by null faults, saved and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxfi.engine import ENGINES, Engine
from jaxfi.explain import explain, plan_text
from jaxfi.fault_list import FaultList
from jaxfi.faults import PyTree
from jaxfi.golden import Setup, golden_run, network_function
from jaxfi.outcomes import (
    MASKED,
    Rates,
    Results,
    checked_nan_policy,
    estimate_rate,
    judge,
    per_fault_shares,
)
from jaxfi.slicing import ApplyFn, digest, trace_network
from jaxfi.store import Store, load, open_store

PRECISIONS = ("highest", "high", "default")
_FAULTS_PER_BLOCK = 2048  # saved together; the results do not depend on it
_FAULTS_PER_NULL = 128


class NotReproducible(RuntimeError):
    """A null fault was not masked: this backend's sums depend on where an image stands."""


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
        return float(np.mean(np.asarray(jnp.argmax(self.golden, axis=-1)) == self.labels))

    @property
    def faulty_accuracy(self) -> float:
        """Correct faulty predictions / (faults x images)."""
        return float(self.correct.sum() / self.outcomes.size)

    def rates(self, population: int | None = None, t: float = 2.58) -> Rates:
        """Rates with intervals that take each fault as one cluster of images.

        Args:
          population: possible faults; default all single faults of the parameters.
          t: cut-off of the normal distribution; 2.58 is 99 % confidence.
        """
        if population is None:
            population = self.faults.population
        if population < len(self.faults):
            raise ValueError(f"population {population} is less than the {len(self.faults)} faults")
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
      memory_budget: bytes; default 70 % of what the device reports.
      seed: of the null faults that check the run.
      devices: where to run, blocks of faults dealt to whichever is free; default all local
        accelerators, or one CPU. The outcomes do not depend on how many.
      progress: show a progress bar with rate and ETA.
      workdir: a directory that keeps finished work; the same campaign there is continued.

    Raises ValueError or TypeError, before any work, for arguments that do not fit; NotReproducible
    if a null fault is not masked.

    >>> params = {"w": jnp.eye(2)}
    >>> faults = FaultList.from_sites([("w", (0, 0), 31), ("w", (0, 1), 0)], params)
    >>> images = np.array([[2.0, 1.0], [0.5, 1.0]], np.float32)
    >>> result = run_campaign(lambda p, x: x @ p["w"], params, faults, images, [0, 1])
    >>> result.outcomes.tolist()
    [[2, 1], [0, 0]]
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: allowed are {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    checked_nan_policy(nan)
    images, labels = _checked_images(images, labels)
    batches = _batched(images, batch_size)
    faults.validate(params)
    faults.check()
    if seed < 0:
        raise ValueError(f"seed {seed} is out of range: allowed are integers >= 0")
    with jax.default_matmul_precision(precision):
        shape = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
        network = trace_network(apply_fn, params, shape)
        params = jax.tree.map(jnp.asarray, params)
        devices = tuple(devices or _default_devices())
        with jax.default_device(devices[0]):
            function = network_function(network, apply_fn)
            golden = golden_run(function, params, batches, len(images))
        memory = (memory_budget or _default_budget()) // (4 * len(devices))
        setup = Setup(network, function, params, batches, labels, golden, nan, memory)
        activated = faults.activated(params)
        provenance = {
            **_fingerprint(params, images, labels),
            "network_sha256": digest(network),
            "engine": engine,
            "precision": precision,
            "batch_size": batches.shape[1],
            "nan": nan,
            "seed": seed,
            "num_not_activated": int(np.count_nonzero(~activated)),
        }
        with _storage(workdir, provenance, faults, params, golden, labels) as storage:
            if progress and engine == "fast":
                print(plan_text(explain(apply_fn, params, images, faults, batch_size=batch_size,
                                        precision=precision)), file=sys.stderr)  # fmt: skip
            todo = storage.todo(activated)
            with _bar(todo, len(images), progress) as advance:
                block = functools.partial(_checked_block, faults=faults, seed=seed, advance=advance)
                blocks = _blocks(faults, todo, len(devices))
                for done in _on_devices(setup, engine, precision, devices, block, blocks):
                    storage.write(*done)
            results = storage.results()
    return Campaign(faults, *results, golden, labels, provenance)


def load_campaign(directory: str | os.PathLike) -> Campaign:
    """The campaign that `run_campaign(..., workdir=directory)` finished there.

    Raises FileNotFoundError, or ValueError naming what is missing or damaged.
    """
    stored = load(directory)
    golden, labels = stored.arrays["golden"], stored.arrays["labels"]
    return Campaign(stored.faults, *stored.results, golden, labels, stored.fingerprint)


class _Memory:
    """Results kept in memory, for a campaign without a directory."""

    def __init__(self, golden_results: Results, num_faults: int):
        self._results = Results(*(np.repeat(a, num_faults, axis=0) for a in golden_results))
        self._finished = np.zeros(num_faults, bool)

    def todo(self, activated: np.ndarray) -> np.ndarray:
        return np.flatnonzero(activated & ~self._finished)

    def write(self, rows: np.ndarray, results: Results) -> None:
        for whole, part in zip(self._results, results, strict=True):
            whole[rows] = part
        self._finished[rows] = True

    def results(self) -> Results:
        return self._results


class _Directory:
    """Results kept in a store; faults that are not activated are written at once."""

    def __init__(self, store: Store, golden_results: Results):
        self._store, self._golden = store, golden_results

    def todo(self, activated: np.ndarray) -> np.ndarray:
        idle = np.flatnonzero(~activated & ~self._store.finished())
        if len(idle):
            self.write(idle, Results(*(np.repeat(a, len(idle), axis=0) for a in self._golden)))
        return np.flatnonzero(~self._store.finished())

    def write(self, rows: np.ndarray, results: Results) -> None:
        self._store.write(rows, *results)

    def results(self) -> Results:
        return self._store.merge()


@contextlib.contextmanager
def _storage(workdir, provenance, faults, params, golden, labels) -> Iterator[Any]:
    verdict = jax.tree.map(np.asarray, judge(golden, golden, labels, provenance["nan"]))
    correct = np.array([verdict.correct.sum()], np.int32)
    masked = Results(verdict.outcome[None], verdict.due[None], correct)
    if workdir is None:
        yield _Memory(masked, len(faults))
        return
    values = faults.values(params)
    with open_store(workdir, provenance, faults, len(labels), values=values) as store:
        store.keep(golden=golden, labels=labels)
        yield _Directory(store, masked)


def _blocks(faults: FaultList, rows: np.ndarray, num_devices: int) -> list[np.ndarray]:
    """Rows that are run and saved together: faults of one leaf, enough blocks for the devices."""
    size = min(_FAULTS_PER_BLOCK, -(-len(rows) // num_devices) or 1)
    return [
        of_leaf[start : start + size]
        for leaf in np.unique(faults.leaf[rows])
        for of_leaf in [rows[faults.leaf[rows] == leaf]]
        for start in range(0, len(of_leaf), size)
    ]


def _on_devices(
    setup: Setup,
    engine: str,
    precision: str,
    devices: Sequence[jax.Device],
    block: Callable[[Engine, Setup, np.ndarray], Results],
    blocks: Sequence[np.ndarray],
) -> Iterator[tuple[np.ndarray, Results]]:
    """Runs each block on whichever device is free, one thread and one engine a device."""
    free: queue.SimpleQueue = queue.SimpleQueue()
    for device in devices:
        with jax.default_device(device):
            here = dataclasses.replace(setup, params=jax.device_put(setup.params, device))
            free.put((device, here, ENGINES[engine](here)))

    def run(rows: np.ndarray) -> tuple[np.ndarray, Results]:
        device, here, started = free.get()
        try:
            with jax.default_device(device), jax.default_matmul_precision(precision):
                return rows, block(started, here, rows)
        finally:
            free.put((device, here, started))

    if len(devices) == 1:
        yield from map(run, blocks)
        return
    pool = ThreadPoolExecutor(len(devices))
    try:
        for future in as_completed([pool.submit(run, rows) for rows in blocks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _checked_block(
    run: Engine,
    setup: Setup,
    rows: np.ndarray,
    *,
    faults: FaultList,
    seed: int,
    advance: Callable[[int], None],
) -> Results:
    """Runs a block with null faults at random places in it, which must all be masked."""
    faults = faults[rows]
    leaf = int(faults.leaf[0])
    generator = np.random.default_rng([seed, leaf, int(faults.element[0])])
    num_null = 1 + len(faults) // _FAULTS_PER_NULL
    size = int(np.prod(faults.shapes[leaf], dtype=np.int64))
    mixed = faults + faults.nulls(generator.integers(0, size, num_null))
    order = generator.permutation(len(mixed))
    results = run(mixed[order], advance)
    place = np.argsort(order)
    if np.any(results.outcomes[place[len(faults) :]] != MASKED):
        raise NotReproducible(
            f"a null fault in {faults.paths[leaf]} was not masked on {jax.default_backend()} "
            f"with batches {setup.batches.shape[1:]}: the output for an image depends on its "
            "place in the batch, so outcomes would be wrong. Nothing is reported; "
            "try engine='reference' or another batch_size"
        )
    return Results(*(array[place[: len(faults)]] for array in results))


@contextlib.contextmanager
def _bar(todo: np.ndarray, num_images: int, progress: bool) -> Iterator[Callable[[int], None]]:
    total = len(todo) * num_images
    with tqdm(total=total, unit=" outcomes", unit_scale=True, disable=not progress) as bar:
        yield lambda count: bar.update(min(count, total - bar.n)) and None


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
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is out of range: allowed are integers >= 1")
    batch_size = min(batch_size, len(images))
    padding = -len(images) % batch_size
    padded = np.concatenate([images, np.repeat(images[:1], padding, axis=0)])
    return padded.reshape(-1, batch_size, *images.shape[1:])


def _default_devices() -> list[jax.Device]:
    local = jax.local_devices()
    return local[:1] if local[0].platform == "cpu" else local


def _default_budget() -> int:
    statistics = jax.local_devices()[0].memory_stats() or {}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(0.7 * statistics.get("bytes_limit", total))


def _fingerprint(params: PyTree, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    device = jax.local_devices()[0]
    return {
        "params_sha256": _hash(*jax.tree.leaves(params)),
        "images_sha256": _hash(images),
        "labels_sha256": _hash(labels),
        "jaxfi": metadata.version("jaxfi"),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
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
