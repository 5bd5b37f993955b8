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

from jaxfi.campaign._chunks import (
    Chunk,
    decode_chunk,
    encode_chunk,
    pack_outcomes,
    packed_bytes,
    unpack_outcomes,
)
from jaxfi.campaign._description import (
    CAMPAIGN_FILE,
    LIST_COLUMNS,
    check_same,
    describe,
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
from jaxfi.outcomes._outcomes import CRITICAL, Results

_CHUNK_NAME = re.compile(r"faults-\d{9,}-\d{9,}-[0-9a-f]{32}\.parquet")
_LOOKS, _LOOK_EVERY = 600, 0.1  # seconds; a file server may show a file that is gone for a minute
_MERGED_BYTES = 2**26  # of packed outcomes in one merged chunk, before compression


class StoredCampaign(NamedTuple):
    """A whole campaign as read from disk.

    Attributes:
      fingerprint: as given to `open_store`.
      faults: the fault list.
      arrays: as given to `Store.keep`: golden outputs, labels, images of sampled pairs.
      results: outcomes [F, N] uint8, due [F, N] bool, correct [F] int32.
    """

    fingerprint: dict[str, Any]
    faults: FaultList
    arrays: dict[str, np.ndarray]
    results: Results


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
        self._rows_of: dict[str, np.ndarray] = {}  # of the chunks verified so far

    def finished(self) -> np.ndarray:
        """[F] bool: the faults whose results are on disk, by whichever process.

        Raises ValueError naming a file that is damaged or foreign.
        """
        return _patiently(self._find_finished)

    def write(
        self, rows: np.ndarray, outcomes: np.ndarray, due: np.ndarray, correct: np.ndarray
    ) -> None:
        """Adds one chunk: absent until it is whole, and safe from a crash once this returns.

        Args:
          rows: [k] integers, positions in the fault list, in any order.
          outcomes: [k, N] uint8.
          due: [k, N] bool.
          correct: [k] integers.

        Raises OSError naming the file that cannot be written; the chunks before are unharmed.
        """
        rows = np.asarray(rows)
        results = Results(np.asarray(outcomes), np.asarray(due), np.asarray(correct))
        self._check_results(rows, results)
        packed = pack_outcomes(results.outcomes, results.due)
        self._write_chunk(Chunk(rows, packed, results.correct))

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

    def read(self) -> Results:
        """All results, in the order of the fault list.

        Raises ValueError if faults are missing, or naming a file that is damaged or foreign.
        """
        return self._unpacked(_patiently(self._read_all))

    def _find_finished(self) -> np.ndarray:
        finished = np.zeros(len(self.faults), bool)
        for path in self._chunks():
            if path.name not in self._rows_of:
                self._rows_of[path.name] = self._read_chunk(path).rows
            finished[self._rows_of[path.name]] = True
        return finished

    def _read_all(self) -> Chunk:
        """All faults in one chunk, in their order; of those without results, correct is -1."""
        num_faults = len(self.faults)
        packed = np.zeros((num_faults, packed_bytes(self.num_images)), np.uint8)
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

    def _unpacked(self, whole: Chunk) -> Results:
        return Results(*unpack_outcomes(whole.packed, self.num_images), whole.correct)

    def merge(self) -> Results:
        """`read`, and rewrites the results in few files, the same whatever the chunks were.

        For one process of a job, when all is finished. It may be killed and called again.
        """
        whole, old = _patiently(self._read_all), self._chunks()
        size = max(1, _MERGED_BYTES // packed_bytes(self.num_images))
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
            return decode_chunk(content, len(self.faults), self.num_images, self._campaign)
        except ValueError as error:
            raise damaged(path, str(error)) from None

    def _check_results(self, rows: np.ndarray, results: Results) -> None:
        """What would be refused on reading must not be written."""
        allowed = (len(rows), self.num_images), (len(rows), self.num_images), (len(rows),)
        shapes = tuple(array.shape for array in results[:3])
        if shapes != allowed:
            raise ValueError(f"a chunk's outcomes, due, correct are {shapes}: allowed is {allowed}")
        if (
            len(np.unique(rows)) != len(rows)
            or not np.isin(rows, np.arange(len(self.faults))).all()
        ):
            raise ValueError(f"a chunk's rows are distinct and from 0 to {len(self.faults) - 1}")
        if results.outcomes.max(initial=0) > CRITICAL:
            raise ValueError(
                f"a chunk's outcomes hold {results.outcomes.max()}: allowed are 0, 1, 2"
            )
        if not ((results.correct >= 0) & (results.correct <= self.num_images)).all():
            raise ValueError(f"a chunk's correct images are from 0 to {self.num_images}")

    def _write_chunk(self, chunk: Chunk) -> Path | None:
        rows = chunk.rows
        if len(rows) == 0:
            return None
        values = self._values[0][rows], self._values[1][rows]
        content = encode_chunk(chunk, self.faults[rows], values, self.num_images, self._campaign)
        name = f"faults-{rows.min():09d}-{len(rows):09d}-{content_hash(content)}.parquet"
        path = self.directory / "results" / name
        write_whole(path, content, self._process_index)
        self._rows_of[name] = rows
        return path


@contextlib.contextmanager
def open_store(
    directory: str | os.PathLike,
    fingerprint: Mapping[str, Any],
    faults: FaultList,
    num_images: int,
    *,
    values: tuple[np.ndarray, np.ndarray],
    process_index: int = 0,
) -> Iterator[Store]:
    """Opens or creates the results of one campaign, locked against a second process.

    Args:
      directory: created if it is missing.
      fingerprint: what the results depend on; nested, of JSON's types.
      faults: [F] faults.
      num_images: N, images per fault.
      values: the parameters' values before and after each fault, two [F] float64 arrays.
      process_index: which process of the job this is; each has its own lock.

    Raises ValueError naming each difference if the directory holds another campaign, or the file
    that is damaged; BlockingIOError if another process holds the lock; OSError naming the file
    that cannot be written.
    """
    directory = Path(directory)
    with writing(directory):
        (directory / "results").mkdir(parents=True, exist_ok=True)
    with locked(directory / f"lock-{process_index:04d}"):
        columns = {name: getattr(faults, name) for name in LIST_COLUMNS}
        content = to_npz({**columns, "before": values[0], "after": values[1]})
        description = describe(fingerprint, faults, num_images, content)
        if (directory / CAMPAIGN_FILE).exists():
            check_same(directory, read_description(directory), description)
        if not (directory / description["faults_file"]).exists():
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
    return StoredCampaign(store.fingerprint, store.faults, arrays, store.read())


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
