"""Packing: surviving (fault, image) pairs, of any fault and image, fill batches for the suffix."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxfi.engine._golden import Setup
from jaxfi.engine._programs import Golden, Programs
from jaxfi.engine._tally import Tally


class Group(NamedTuple):
    """Up to C faults that ride together.

    Attributes:
      rows: [C] their rows in the tally, -1 for padding.
      null: [C] bool, null faults.
      block: of the leaf's own layer, 0 where that is not blocked.
      channel: [C] the channel that each column holds.
      element, keep, flip: [C] the faults, in the leaf of columns; [C, K] where several are
        together.
    """

    rows: np.ndarray
    null: np.ndarray
    block: int
    channel: np.ndarray
    element: np.ndarray
    keep: np.ndarray
    flip: np.ndarray

    @property
    def num_faults(self) -> int:
        return int((self.rows >= 0).sum())


@dataclasses.dataclass
class _Bin:
    """A batch for the suffix that is being filled."""

    values: list[jax.Array]
    row: np.ndarray
    image: np.ndarray
    filled: int = 0


class Packer:
    """Fills rows with surviving pairs; a full batch runs the suffix.

    Where the suffix starts with one block of a layer, the rows of a batch share the block.
    """

    def __init__(self, setup: Setup, programs: Programs, leaves: list, tally: Tally):
        self._setup, self._programs, self._leaves, self._tally = setup, programs, leaves, tally
        self._bins: dict[int, _Bin] = {}
        self._waiting: list[tuple] = []

    def submit(self, *work) -> None:
        """Queues one group on one batch: the host looks at it while the device runs the next."""
        *_, changed, _ = work
        changed.copy_to_host_async()
        self._waiting.append(work)
        if len(self._waiting) > 1:
            self._pack(*self._waiting.pop(0))

    def drain(self) -> None:
        while self._waiting:
            self._pack(*self._waiting.pop(0))

    def flush(self) -> None:
        self.drain()
        for block, bin in self._bins.items():
            if bin.filled:
                self._run(block, bin)

    def _pack(self, group: Group, number: int, golden: Golden, changed, columns: list) -> None:
        column, image = np.nonzero(self._survives(group, number, np.array(changed)))
        channel = group.channel[column]
        if self._programs.plan.ahead is None:
            self._fill(0, group, number, golden, columns, (column, image, channel))
            return
        blocks = channel // self._programs.ahead.size
        for block in np.unique(blocks):
            pairs = tuple(array[blocks == block] for array in (column, image, channel))
            self._fill(int(block), group, number, golden, columns, pairs)

    def _survives(self, group: Group, number: int, changed: np.ndarray) -> np.ndarray:
        wanted = self._tally.wanted(group.rows, number)
        changed &= wanted
        # A null fault is sent through the suffix on one image per batch, wherever that lands.
        for column in np.flatnonzero(group.null):
            images = np.flatnonzero(wanted[column])
            changed[column, images[(7919 * group.rows[column]) % len(images)]] = True
        return changed

    def _fill(self, block, group, number, golden, columns, pairs) -> None:
        size, done = self._setup.batch_size, 0
        column, image, channel = pairs
        while done < len(column):
            if block not in self._bins:
                self._bins[block] = self._empty_bin()
            bin = self._bins[block]
            count = min(size - bin.filled, len(column) - done)
            here, there = slice(bin.filled, bin.filled + count), slice(done, done + count)
            pick = np.zeros((4, size), np.int32)  # see `Pick`
            pick[:, here] = column[there], image[there], channel[there], np.ones(count)
            bin.values = self._programs.pack(bin.values, golden, columns, pick, block)
            bin.row[here] = group.rows[column[there]]
            bin.image[here] = image[there] + number * size
            bin.filled, done = bin.filled + count, done + count
            if bin.filled == size:
                self._run(block, bin)

    def _empty_bin(self) -> _Bin:
        size = self._setup.batch_size
        rows = self._programs.empty_rows(self._leaves[0].sharding)
        return _Bin(rows, np.full(size, -1), np.zeros(size, np.int32))

    def _run(self, block: int, bin: _Bin) -> None:
        outputs = self._programs.suffix(self._leaves, bin.values, block)
        self._tally.add_rows(bin.row.copy(), bin.image.copy(), outputs)
        bin.row[:], bin.filled = -1, 0
