"""Campaign results on disk: durable chunks that any process may add, resume from, and read.

A directory holds `campaign.json` (the fingerprint), `faults-*.npz` (the fault list), `golden-*.npz`
(golden outputs and labels), one `lock-*` a process, and `results/faults-*.parquet`: the chunks
(_chunks says how others read them). Every data file carries the hash of its content in its
name: it is verified as a whole, and processes that write the same directory cannot collide.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfi.campaign import _chunks, _count_chunks
from jaxfi.campaign._chunks import Chunk
from jaxfi.campaign._counts import Counts
from jaxfi.campaign._description import (
    CAMPAIGN_FILE,
    check_same,
    describe,
    list_arrays,
    read_description,
    read_faults,
)
from jaxfi.data._files import (
    content_hash,
    damaged,
    locked,
    read_npz,
    read_verified,
    to_npz,
    write_whole,
    writing,
)
from jaxfi.faults._list import FaultList
from jaxfi.outcomes._outcomes import Results

_CHUNK_NAME = re.compile(r"faults-\d{9,}-\d{9,}-[0-9a-f]{32}\.parquet")
_LOOKS, _LOOK_EVERY = 600, 0.1  # seconds; a file server may show a file that is gone for a minute
_KINDS: dict[str, Any] = {"outcomes": _chunks, "counts": _count_chunks}


class StoredCampaign(NamedTuple):
    """A whole campaign as read from disk.

    Attributes:
      fingerprint: as given to `open_store`.
      faults: the fault list.
      arrays: as given to `Store.keep`: golden outputs, labels, images of sampled pairs.
      results: outcomes [F, N] uint8, due [F, N] bool, correct [F] int32; or counts.
      num_images: of each fault.
    """

    fingerprint: dict[str, Any]
    faults: FaultList
    arrays: dict[str, np.ndarray]
    results: Results | Counts
    num_images: int


class Store:
    """The results of one campaign in a directory. Made by `open_store`."""

    def __init__(self, directory: str | os.PathLike, process_index: int = 0):
        self.directory = Path(directory)
        self._process_index = process_index
        description = read_description(self.directory)
        self.fingerprint: dict[str, Any] = description["fingerprint"]
        self.num_images: int = description["num_images"]
        self.faults, self._values = read_faults(self.directory, description)
        self._campaign: str = description["sha256"]
        self._kind = _KINDS[description.get("keep", "outcomes")]
        criteria = tuple(description.get("criteria", ()))
        self._of = {"criteria": criteria} if criteria else {}
        self._known: set[str] = set()  # chunks verified so far
        self._finished = np.zeros(len(self.faults), bool)  # by those

    def finished(self) -> np.ndarray:
        """[F] bool: the faults whose results are on disk, by whichever process.

        Raises ValueError naming a file that is damaged or foreign.
        """
        return _patiently(self._find_finished)

    def write(self, rows: np.ndarray, results: Results | Counts) -> None:
        """Adds one chunk: absent until it is whole, and safe from a crash once this returns.

        Args:
          rows: [k] integers, positions in the fault list, in any order.
          results: of these faults; counts where the campaign keeps those.

        Raises OSError naming the file that cannot be written; the chunks before are unharmed.
        """
        rows = np.asarray(rows)
        self._check_results(rows, results)
        self._write_chunk(Chunk(rows, self._kind.pack(results, **self._of), results.correct))

    def keep(self, **arrays: np.ndarray) -> None:
        """Stores named arrays, such as golden outputs; on a resume, checks that they are the same.

        Raises ValueError naming the arrays of which any bit differs.
        """
        given = {name: np.asarray(array) for name, array in arrays.items()}
        if _golden_file(self.directory) is None:
            content = to_npz(given)
            path = self.directory / f"golden-{content_hash(content)}.npz"
            write_whole(path, content, self._process_index)
        stored = _read_golden(self.directory)
        different = [n for n in stored | given if not _same_bits(stored.get(n), given.get(n))]
        if different:
            raise ValueError(
                f"{self.directory} holds other {', '.join(different)}: what began the campaign "
                "computed other bits than this machine does; use another directory"
            )

    def read(self) -> Results | Counts:
        """All results, in the order of the fault list.

        Raises ValueError if faults are missing, or naming a file that is damaged or foreign.
        """
        return self._unpacked(_patiently(self._read_all))

    def _find_finished(self) -> np.ndarray:
        for path in self._chunks():
            if path.name not in self._known:
                self._mark(path.name, self._read_chunk(path).rows)
        return self._finished

    def _mark(self, name: str, rows: np.ndarray) -> None:
        self._known.add(name)
        self._finished[rows] = True

    def _read_all(self) -> Chunk:
        """All faults in one chunk, in their order; of those without results, correct is -1."""
        num_faults = len(self.faults)
        functions = self._kind.width, self._kind.dtype
        width, dtype = (function(self.num_images, **self._of) for function in functions)
        packed = np.zeros((num_faults, width), dtype)
        whole = Chunk(np.arange(num_faults), packed, np.full(num_faults, -1, np.int32))
        for path in self._chunks():
            rows, *parts = self._read_chunk(path)
            again = whole.correct[rows] >= 0
            for array, part in zip(whole[1:], parts, strict=True):
                if not np.array_equal(array[rows[again]], part[again]):
                    raise damaged(path, "it contradicts another chunk")
                array[rows] = part
        missing = np.count_nonzero(whole.correct < 0)
        if missing:
            raise ValueError(
                f"{self.directory} is not finished: {missing} of {num_faults} faults are "
                "missing; run the campaign again to go on"
            )
        return whole

    def _unpacked(self, whole: Chunk) -> Results | Counts:
        return self._kind.unpack(whole, self.num_images, **self._of)

    def merge(self) -> Results | Counts:
        """`read`, and rewrites the results in few files, the same whatever the chunks were.

        For one process of a job, when all is finished. It may be killed and called again.
        """
        whole, old = _patiently(self._read_all), self._chunks()
        size = self._kind.rows_together(self.num_images, **self._of)
        parts = [slice(first, first + size) for first in range(0, len(self.faults), size)]
        new = {self._write_chunk(Chunk(*(array[part] for array in whole))) for part in parts}
        for path in old:
            if path not in new:
                path.unlink(missing_ok=True)
        return self._unpacked(whole)

    def _chunks(self) -> list[Path]:
        """The chunk files, sorted. ValueError naming a file that is none."""
        folder = self.directory / "results"
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            message = f"cannot read {folder} ({error.strerror}): restore it, or begin again"
            raise OSError(error.errno, message) from None
        for name in names:
            if not _CHUNK_NAME.fullmatch(name):
                raise damaged(folder / name, "its name is not that of a chunk")
        return [folder / name for name in names]

    def _read_chunk(self, path: Path) -> Chunk:
        content = read_verified(path)
        try:
            return self._kind.decode_chunk(
                content, len(self.faults), self.num_images, self._campaign, **self._of
            )
        except ValueError as error:
            raise damaged(path, str(error)) from None

    def _check_results(self, rows: np.ndarray, results: Results | Counts) -> None:
        """What would be refused on reading must not be written."""
        self._kind.check(results, len(rows), self.num_images, **self._of)
        inside = (rows >= 0) & (rows < len(self.faults))
        if len(np.unique(rows)) != len(rows) or not inside.all():
            raise ValueError(f"a chunk's rows are distinct and from 0 to {len(self.faults) - 1}")

    def _write_chunk(self, chunk: Chunk) -> Path | None:
        rows = chunk.rows
        if len(rows) == 0:
            return None
        values = self._values and (self._values[0][rows], self._values[1][rows])
        faults, encode = self.faults[rows], self._kind.encode_chunk
        content = encode(chunk, faults, values, self.num_images, self._campaign, **self._of)
        name = f"faults-{rows.min():09d}-{len(rows):09d}-{content_hash(content)}.parquet"
        path = self.directory / "results" / name
        write_whole(path, content, self._process_index)
        self._mark(name, rows)
        return path


@contextlib.contextmanager
def open_store(
    directory: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    faults: FaultList,
    num_images: int,
    *,
    values: tuple[np.ndarray, np.ndarray] | None,
    process_index: int = 0,
    keep: str = "outcomes",
    criteria: tuple[str, ...] = (),
) -> Iterator[Store]:
    """Opens or creates the results of one campaign, locked against a second process.

    Args:
      directory: created if it is missing.
      fingerprint: what the results depend on; nested, of JSON's types.
      faults: [F] faults.
      num_images: N, images per fault.
      values: the parameters' values before and after each fault, two [F] float64 arrays; None
        where the list is a rule.
      process_index: which process of the job this is; each has its own lock.
      keep: "outcomes" of pairs, or "counts" of faults.
      criteria: names of the campaign's own, whose answers are kept beside the outcomes.

    Raises ValueError naming each difference if the directory holds another campaign, or the file
    that is damaged; BlockingIOError if another process holds the lock; OSError naming the file
    that cannot be written.
    """
    directory = Path(directory)
    with writing(directory):
        (directory / "results").mkdir(parents=True, exist_ok=True)
    with locked(directory / f"lock-{process_index:04d}"):
        content = None
        if values is not None:
            content = to_npz({**list_arrays(faults), "before": values[0], "after": values[1]})
        description = describe(fingerprint, faults, num_images, content, keep, criteria)
        if (directory / CAMPAIGN_FILE).exists():
            check_same(directory, read_description(directory), description)
        if content is not None and not (directory / description["faults_file"]).exists():
            write_whole(directory / description["faults_file"], content, process_index)
        if not (directory / CAMPAIGN_FILE).exists():
            text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
            write_whole(directory / CAMPAIGN_FILE, text.encode(), process_index)
        yield Store(directory, process_index)


def load(directory: str | os.PathLike) -> StoredCampaign:
    """A finished campaign, read without its model or parameters. Nothing is written or locked.

    Raises FileNotFoundError if the directory holds no campaign, ValueError if faults are missing
    or naming the file that is damaged.
    """
    store = Store(directory)
    arrays = _read_golden(store.directory)
    return StoredCampaign(store.fingerprint, store.faults, arrays, store.read(), store.num_images)


def _patiently(read: Callable[[], Any]) -> Any:
    """`read()`, again when a chunk is gone that was listed: process 0 has just merged it."""
    for _ in range(_LOOKS):
        try:
            return read()
        except FileNotFoundError as error:
            if not Path(error.filename or "").parent.is_dir():
                raise
            time.sleep(_LOOK_EVERY)
    return read()


def _golden_file(directory: Path) -> Path | None:
    files = sorted(directory.glob("golden-*.npz"))
    if len(files) > 1:
        raise damaged(files[1], "there are two golden runs")
    return files[0] if files else None


def _read_golden(directory: Path) -> dict[str, np.ndarray]:
    path = _golden_file(directory)
    if path is None:
        raise ValueError(f"{directory} has no golden outputs: run the campaign again to go on")
    return read_npz(path)


def _same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.tobytes() == b.tobytes()
