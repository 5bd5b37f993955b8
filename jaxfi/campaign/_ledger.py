"""What is done of a campaign: in memory, or in a directory that several processes share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jaxfi.campaign._counts import Counts
from jaxfi.campaign._processes import Claims
from jaxfi.campaign._workers import Block
from jaxfi.faults._list import FaultList
from jaxfi.outcomes._outcomes import Results

if TYPE_CHECKING:
    from jaxfi.campaign._store import Store


Kept = Results | Counts
"""What is kept of faults."""


class Ledger(Protocol):
    """Keeps the results of F faults."""

    def unfinished(self) -> np.ndarray:
        """[F] bool: faults without results yet, whoever works on them."""

    def unclaimed(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        """The blocks that nobody else works on, which are this process's now: rows to run."""

    def write(self, rows: np.ndarray, results: Kept) -> None:
        """Keeps the results of these rows."""

    def results(self) -> Kept:
        """All results; only when none is unfinished."""


class MemoryLedger:
    """Of a campaign without a directory; `results` are there to be overwritten."""

    def __init__(self, results: Kept):
        self._results = results
        self._unfinished = np.ones(len(results.correct), bool)

    def unfinished(self) -> np.ndarray:
        return self._unfinished

    def unclaimed(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        for block in blocks:
            rows = np.asarray(block)
            rows = rows[self._unfinished[rows]]
            if len(rows):
                yield rows

    def write(self, rows: np.ndarray, results: Kept) -> None:
        for whole, part in zip(self._results[:4], results[:4], strict=True):
            if whole is not None:
                whole[rows] = part
        if isinstance(self._results, Results) and isinstance(results, Results):
            for name, met in results.criteria.items():
                self._results.criteria[name][rows] = met  # type: ignore[index]
        self._unfinished[rows] = False

    def results(self) -> Kept:
        return self._results


class DirectoryLedger:
    """Of a campaign in a directory, shared by the processes of a job."""

    def __init__(self, store: Store, claims: Claims, process_index: int, num_processes: int):
        self._store, self._claims = store, claims
        self._process_index, self._num_processes = process_index, num_processes

    def unfinished(self) -> np.ndarray:
        return ~self._store.finished()

    def unclaimed(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        # Each process begins elsewhere: they meet late, and compile other leaves first.
        start = self._process_index * len(blocks) // self._num_processes
        for block in (*blocks[start:], *blocks[:start]):
            if len(block) and self._claims.take(int(block[0])):
                # Looked at after the claim: who had it before has written, or never will.
                rows = np.asarray(block)
                rows = rows[~self._store.finished()[rows]]
                if len(rows):
                    yield rows

    def write(self, rows: np.ndarray, results: Kept) -> None:
        self._store.write(rows, results)

    def results(self) -> Kept:
        return self._store.merge() if self._process_index == 0 else self._store.read()


@contextlib.contextmanager
def open_directory(
    directory: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    faults: FaultList,
    values: tuple[np.ndarray, np.ndarray] | None,
    arrays: Mapping[str, np.ndarray],
    *,
    num_images: int,
    process_index: int = 0,
    num_processes: int = 1,
    keep: str = "outcomes",
    criteria: tuple[str, ...] = (),
) -> Iterator[DirectoryLedger]:
    """The ledger in `directory`, begun or continued. Raises as `open_store` and `Store.keep`.

    Args:
      fingerprint, faults, values, keep, criteria: as in `open_store`.
      arrays: golden outputs and labels, [N, ...] each, to keep beside the results, and of sampled
        pairs the images, [F, m].
      num_images: of each fault.
      process_index, num_processes: which process of the job this is, and of how many.
    """
    from jaxfi.campaign._store import open_store  # only directories need its packages

    with open_store(
        directory,
        fingerprint,
        faults,
        num_images,
        values=values,
        process_index=process_index,
        keep=keep,
        criteria=criteria,
    ) as store:
        store.keep(**arrays)
        claims = Claims(Path(directory) / "claims")
        try:
            yield DirectoryLedger(store, claims, process_index, num_processes)
        finally:
            claims.close()
