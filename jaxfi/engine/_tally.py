"""Verdicts, collected fault by fault and image by image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._golden import Setup
from jaxfi.outcomes._outcomes import MASKED, Results, judge


class Tally:
    """Collects verdicts; a pair that is never added is golden, so masked.

    Of sampled pairs, `picks` [F, m] are the places, in the batches' order, of each fault's images;
    by default every fault has every image.
    """

    def __init__(self, setup: Setup, num_faults: int, picks: np.ndarray | None = None):
        self._golden = jnp.asarray(setup.golden)
        self._labels = jnp.asarray(setup.labels)
        self._setup = setup
        self._judge = _JUDGES[setup.nan]
        golden = self._judge(self._golden, self._golden, self._labels)
        self.picks = picks
        shape = (num_faults, setup.num_images) if picks is None else picks.shape
        self._golden_due = np.asarray(golden.due)
        self._golden_correct = np.asarray(golden.correct)
        if picks is not None:
            self._batches = picks // setup.batch_size  # [F, m]
            keys = (np.arange(num_faults)[:, None] * setup.num_images + picks).ravel()
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
        self.outcome, self.due = np.empty(shape, np.uint8), np.empty(shape, bool)
        self.correct = np.empty(shape, bool)
        self._waiting: list[tuple] = []
        self.forget(np.arange(num_faults))

    def forget(self, rows: np.ndarray) -> None:
        """Makes these faults golden again, whatever was added."""
        self.results()
        there = slice(None) if self.picks is None else self.picks[rows]
        self.outcome[rows], self.due[rows] = MASKED, self._golden_due[there]
        self.correct[rows] = self._golden_correct[there]

    def batches(self, rows: np.ndarray) -> list[int]:
        """Those that hold an image of these faults."""
        if self.picks is None:
            return list(range(len(self._setup.batches)))
        return np.unique(self._batches[rows]).tolist()

    def with_images_in(self, rows: np.ndarray, number: int) -> np.ndarray:
        """Which of these faults have images in a batch, places in `rows`."""
        if self.picks is None:
            return np.arange(len(rows))
        return np.flatnonzero((self._batches[rows] == number).any(axis=1))

    def num_pairs(self, rows: np.ndarray, number: int) -> int:
        """How many images of a batch these faults have together."""
        if self.picks is None:
            return len(rows) * self._setup.images_in(number)
        return int(np.count_nonzero(self._batches[rows] == number))

    def wanted(self, rows: np.ndarray, number: int) -> np.ndarray:
        """[k, B] bool: the pairs of these faults, -1 for none, and the places of a batch."""
        wanted = np.zeros((len(rows), self._setup.batch_size), bool)
        if self.picks is None:
            wanted[rows >= 0, : self._setup.images_in(number)] = True
            return wanted
        row, column = np.nonzero((self._batches[rows] == number) & (rows >= 0)[:, None])
        wanted[row, self.picks[rows[row], column] - number * self._setup.batch_size] = True
        return wanted

    def add_batch(self, row: int, number: int, outputs: jax.Array, golden: jax.Array | None = None):
        """Outputs [batch, classes] of one fault on one whole batch."""
        count = self._setup.images_in(number)
        images = np.arange(count) + number * self._setup.batch_size
        golden = jnp.asarray(self._setup.golden[images]) if golden is None else golden[:count]
        verdict = jax.tree.map(
            np.asarray, self._judge(golden, outputs[:count], self._labels[images])
        )
        if self.picks is not None:
            images = self.picks[row][self._batches[row] == number]
            place = images - number * self._setup.batch_size
            verdict = jax.tree.map(lambda array: array[place], verdict)
        self._record(np.full(len(images), row), images, verdict)

    def add_rows(self, rows: np.ndarray, images: np.ndarray, outputs: jax.Array) -> None:
        """Outputs [batch, classes] of packed rows; a row of -1 is padding."""
        verdict = _judge_rows(self._golden, self._labels, outputs, images, nan=self._setup.nan)
        self._waiting.append((rows, images, verdict))
        if len(self._waiting) > 4:  # let the device run ahead of the host
            self._settle(self._waiting.pop(0))

    def results(self) -> Results:
        while self._waiting:
            self._settle(self._waiting.pop(0))
        counts = self.correct.sum(axis=1, dtype=np.int32)
        return Results(self.outcome, self.due, counts, self.correct)

    def _settle(self, waiting: tuple) -> None:
        rows, images, verdict = waiting
        real = rows >= 0
        verdict = jax.tree.map(lambda array: np.asarray(array)[real], verdict)
        self._record(rows[real], images[real], verdict)

    def _record(self, rows: np.ndarray, images: np.ndarray, verdict) -> None:
        if self.picks is not None:
            found = np.searchsorted(self._keys, rows * self._setup.num_images + images)
            images = self._order[found] % self.picks.shape[1]
        self.outcome[rows, images] = verdict.outcome
        self.due[rows, images] = verdict.due
        self.correct[rows, images] = verdict.correct


_JUDGES = {
    nan: jax.jit(lambda golden, faulty, labels, nan=nan: judge(golden, faulty, labels, nan))
    for nan in ("critical", "argmax")
}


def _gather_and_judge(golden, labels, outputs, images, *, nan):
    return judge(golden[images], outputs, labels[images], nan)


_judge_rows = jax.jit(_gather_and_judge, static_argnames="nan")
