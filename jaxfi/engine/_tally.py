"""Verdicts, collected fault by fault and image by image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._golden import Setup
from jaxfi.outcomes._outcomes import MASKED, Results, judge

_AHEAD = 8  # batches of verdicts that the device may be ahead of the host


class Tally:
    """Collects verdicts; a pair that is never added is golden, so masked.

    Of sampled pairs, `picks` [F, m] are the places, in the batches' order, of each fault's images;
    by default every fault has every image.
    """

    def __init__(self, setup: Setup, num_faults: int, picks: np.ndarray | None = None):
        self._golden = jnp.asarray(setup.golden)
        self._labels = jnp.asarray(setup.labels)
        self._setup = setup
        everything = np.arange(setup.num_images)
        golden = _judged(self._golden, self._labels, self._golden, everything, None, nan=setup.nan)
        self.picks = picks
        shape = (num_faults, setup.num_images) if picks is None else picks.shape
        _, self._golden_due, self._golden_correct = _unpacked(np.asarray(golden))
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
        """Outputs [batch, classes] of one fault on one whole batch; `golden` ones of the same
        program, where that is not the network's."""
        size = self._setup.batch_size
        images = np.minimum(np.arange(size) + number * size, self._setup.num_images - 1)
        wanted = self.wanted(np.array([row]), number)[0]
        self.add_rows(np.where(wanted, row, -1), images, outputs, golden)

    def add_rows(
        self,
        rows: np.ndarray,
        images: np.ndarray,
        outputs: jax.Array,
        golden: jax.Array | None = None,
    ) -> None:
        """Outputs [batch, classes] of faults and images; a row of -1 is padding."""
        verdict = _judged(self._golden, self._labels, outputs, images, golden, nan=self._setup.nan)
        verdict.copy_to_host_async()
        self._waiting.append((rows, images, verdict))
        if len(self._waiting) > _AHEAD:
            self._settle(self._waiting.pop(0))

    def results(self) -> Results:
        while self._waiting:
            self._settle(self._waiting.pop(0))
        counts = self.correct.sum(axis=1, dtype=np.int32)
        return Results(self.outcome, self.due, counts, self.correct)

    def _settle(self, waiting: tuple) -> None:
        rows, images, verdict = waiting
        real = rows >= 0
        rows, images, verdict = rows[real], images[real], np.asarray(verdict)[real]
        if self.picks is not None:
            found = np.searchsorted(self._keys, rows * self._setup.num_images + images)
            images = self._order[found] % self.picks.shape[1]
        for kept, found in zip(
            (self.outcome, self.due, self.correct), _unpacked(verdict), strict=True
        ):
            kept[rows, images] = found


def _judge(golden, labels, outputs, images, own_golden, *, nan):
    """Outcome, DUE and correctness in one byte: the host fetches them together."""
    golden = golden[images] if own_golden is None else own_golden
    verdict = judge(golden, outputs, labels[images], nan)
    return (
        verdict.outcome
        | verdict.due.astype(jnp.uint8) << 2
        | verdict.correct.astype(jnp.uint8) << 3
    )


def _unpacked(verdict: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return verdict & 3, (verdict & 4) > 0, (verdict & 8) > 0


_judged = jax.jit(_judge, static_argnames="nan")
