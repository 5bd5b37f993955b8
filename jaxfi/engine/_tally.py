"""Verdicts, collected fault by fault and image by image."""

from __future__ import annotations

import jax
import numpy as np

from jaxfi.engine._golden import Setup
from jaxfi.engine._questions import answers_of
from jaxfi.outcomes._outcomes import MASKED, Results

_AHEAD = 8  # batches of verdicts that the device may be ahead of the host


class Tally:
    """Collects verdicts; a pair that is never added is golden, so masked.

    Of sampled pairs, `picks` [F, m] are the places, in the batches' order, of each fault's images;
    by default every fault has every image.
    """

    def __init__(self, setup: Setup, num_faults: int, picks: np.ndarray | None = None):
        self._setup, self.picks = setup, picks
        shape = (num_faults, setup.num_images) if picks is None else picks.shape
        if picks is not None:
            self._batches = picks // setup.batch_size  # [F, m]
            keys = (np.arange(num_faults)[:, None] * setup.num_images + picks).ravel()
            self._order = np.argsort(keys)
            self._keys = keys[self._order]
        self.outcome = np.empty(shape, np.uint8)
        self._flags = [np.empty(shape, bool) for _ in (setup.golden_answers[1:])]
        self._waiting: list[tuple] = []
        self.forget(np.arange(num_faults))

    def forget(self, rows: np.ndarray) -> None:
        """Makes these faults golden again, whatever was added."""
        self.results()
        there = slice(None) if self.picks is None else self.picks[rows]
        self.outcome[rows] = MASKED
        for kept, golden in zip(self._flags, self._setup.golden_answers[1:], strict=True):
            kept[rows] = golden[there]

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
        verdict = self._setup.judged(outputs, images, golden)
        verdict.copy_to_host_async()
        self._waiting.append((rows, images, verdict))
        if len(self._waiting) > _AHEAD:
            self._settle(self._waiting.pop(0))

    def results(self) -> Results:
        while self._waiting:
            self._settle(self._waiting.pop(0))
        due, correct, *criteria = self._flags
        counts = correct.sum(axis=1, dtype=np.int32)
        named = dict(zip(self._setup.questions.criteria, criteria, strict=True))
        return Results(self.outcome, due, counts, correct, criteria=named)

    def _settle(self, waiting: tuple) -> None:
        rows, images, verdict = waiting
        real = rows >= 0
        rows, images, verdict = rows[real], images[real], np.asarray(verdict)[real]
        if self.picks is not None:
            found = np.searchsorted(self._keys, rows * self._setup.num_images + images)
            images = self._order[found] % self.picks.shape[1]
        answers = answers_of(verdict, len(self._setup.questions.criteria))
        for kept, found in zip((self.outcome, *self._flags), answers, strict=True):
            kept[rows, images] = found
