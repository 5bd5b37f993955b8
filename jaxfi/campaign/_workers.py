"""Workers: one engine a device, and the blocks of faults that they run, null faults among them."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np

from jaxfi.campaign._sample import Sample
from jaxfi.engine._compilation import own_settings
from jaxfi.engine._engines import ENGINES, Advance, Engine
from jaxfi.engine._golden import Setup
from jaxfi.faults._list import FaultList
from jaxfi.outcomes._outcomes import MASKED, Results

_FAULTS_PER_NULL = 128
_BLOCKS_PER_WORKER = 4  # so that the last to finish is not far behind the first


class NotReproducible(RuntimeError):
    """A null fault was not masked: this backend's sums depend on where an image stands."""


class Worker(NamedTuple):
    """A device, what is on it, and the engine that runs there."""

    device: jax.Device
    setup: Setup
    engine: Engine


class Price(NamedTuple):
    """What a leaf's faults take, in any unit.

    Attributes:
      fault: each of them.
      block: a block beside its faults, at most; its faults then take at least as much.
    """

    fault: float
    block: float = 0.0


Block = np.ndarray | range
"""Rows that are run and saved together."""

RunBlock = Callable[[Worker, np.ndarray, Advance], Results]


def by_leaf(faults: FaultList, rows: np.ndarray) -> dict[int, Block]:
    """The rows of each leaf that has any, in their order."""
    leaves = faults.leaf[rows]
    return {leaf: rows[leaves == leaf] for leaf in np.unique(leaves).tolist()}


def split_blocks(
    rows_of: Mapping[int, Block],
    largest: int,
    num_workers: int,
    prices: Mapping[int, Price] | None = None,
) -> list[Block]:
    """Rows that are run and saved together: faults of one leaf, enough blocks for all workers.

    Args:
      rows_of: of each leaf, rows that are divided in their order: neighbours stay together.
      largest: faults in a block at most.
      num_workers: devices of all processes. Of several, each gets a few blocks, so that the last to
        finish is not far behind the first.
      prices: of each leaf that has faults; by default all faults take as long.
    """
    of_leaf = {leaf: (prices or {}).get(leaf, Price(1.0)) for leaf in rows_of}
    total = sum(len(rows_of[leaf]) * price.fault for leaf, price in of_leaf.items())
    share = total / (num_workers * _BLOCKS_PER_WORKER) if num_workers > 1 else np.inf
    blocks: list[Block] = []
    for leaf, price in of_leaf.items():
        wanted = max(share, price.block) / price.fault if price.fault else largest
        size = math.ceil(min(wanted, largest)) or 1
        there = rows_of[leaf]
        parts = (there[n : n + size] for n in range(0, len(there), size))
        blocks += [part if isinstance(part, range) else np.sort(part) for part in parts]
    return blocks


def start_workers(
    setup: Setup, engine: str, devices: Sequence[jax.Device], subject: tuple[str, ...]
) -> list[Worker]:
    """One engine a device, with the parameters on it; `subject` are hashes of these and of the
    images, for which a campaign need not check what an earlier one has."""
    workers = []
    for device in devices:
        with jax.default_device(device):
            params = jax.device_put(setup.params, device)
            checked = setup.programs.setdefault(("checked", device, *subject), {})
            here = dataclasses.replace(setup, params=params, checked=checked)
            workers.append(Worker(device, here, ENGINES[engine](here)))
    return workers


def run_blocks(
    workers: Sequence[Worker],
    blocks: Iterable[np.ndarray],
    run_block: RunBlock,
    advance: Advance,
) -> Iterator[tuple[np.ndarray, Results]]:
    """Runs each block on whichever worker is free, and takes the next one only then.

    Yields rows and results as they come. `advance` is told of (fault, image) pairs as they are
    done, from one thread a worker. Closing the iterator stops the others at their next batch.
    """
    if len(workers) == 1:
        for rows in blocks:
            with jax.default_device(workers[0].device):
                results = run_block(workers[0], rows, advance)
            yield rows, results
        return
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    stopped = threading.Event()

    def advance_or_stop(count: int) -> None:
        if stopped.is_set():
            raise CancelledError
        advance(count)

    def run(rows: np.ndarray) -> tuple[np.ndarray, Results]:
        worker = free.get()
        try:  # a thread has its own settings
            arithmetic = jax.default_matmul_precision(precision)
            with own_settings(), jax.default_device(worker.device), arithmetic:
                return rows, run_block(worker, rows, advance_or_stop)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            yield from _as_finished(pool, run, blocks, len(workers))
        finally:
            stopped.set()


def _as_finished(
    pool: ThreadPoolExecutor, run: Callable, blocks: Iterable[np.ndarray], at_once: int
) -> Iterator[tuple[np.ndarray, Results]]:
    running: set = set()
    for rows in blocks:
        running.add(pool.submit(run, rows))
        if len(running) == at_once:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def run_checked(
    worker: Worker,
    rows: np.ndarray,
    advance: Advance,
    *,
    faults: FaultList,
    seed: int,
    sample: Sample | None = None,
) -> Results:
    """Runs a block with null faults among it, at places of its faults, which must all be masked;
    of sampled pairs, on the images of one of these faults.

    Raises NotReproducible if one is not.
    """
    faults = faults[rows]
    leaf = int(faults.leaf[0])
    generator = np.random.default_rng([seed, leaf, int(faults.element[0])])
    num_null = 1 + len(faults) // _FAULTS_PER_NULL
    like = generator.choice(len(faults), num_null)
    mixed = faults + faults.nulls(faults.element[like])
    order = generator.permutation(len(mixed))
    picks = None
    if sample is not None:
        places = sample.of(rows)
        picks = np.concatenate([places, places[like]])[order]
    results = worker.engine(mixed[order], advance, picks)
    place = np.argsort(order)
    if np.any(results.outcomes[place[len(faults) :]] != MASKED):
        raise NotReproducible(
            f"a null fault in {faults.paths[leaf]} was not masked on {worker.device.platform} "
            f"with batches {worker.setup.batches.shape[1:]}: the output for an image depends on "
            "its place in the batch, so outcomes would be wrong. Nothing is reported; "
            "try engine='reference' or another batch_size"
        )
    return results.of_faults(place[: len(faults)])
