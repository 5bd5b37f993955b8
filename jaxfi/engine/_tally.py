"""Verdicts, collected fault by fault and image by image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._golden import Setup
from jaxfi.outcomes._outcomes import MASKED, Results, judge


class Tally:
    """Collects verdicts; a pair that is never added is golden, so masked."""

    def __init__(self, setup: Setup, num_faults: int):
        self._golden = jnp.asarray(setup.golden)
        self._labels = jnp.asarray(setup.labels)
        self._setup = setup
        self._judge = _JUDGES[setup.nan]
        golden = self._judge(self._golden, self._golden, self._labels)
        shape = (num_faults, setup.num_images)
        self._golden_due = np.asarray(golden.due)
        self._golden_correct = np.asarray(golden.correct)
        self.outcome, self.due = np.empty(shape, np.uint8), np.empty(shape, bool)
        self.correct = np.empty(shape, bool)
        self._waiting: list[tuple] = []
        self.forget(np.arange(num_faults))

    def forget(self, rows: np.ndarray) -> None:
        """Makes these faults golden again, whatever was added."""
        self.results()
        self.outcome[rows], self.due[rows] = MASKED, self._golden_due
        self.correct[rows] = self._golden_correct

    def add_batch(self, row: int, number: int, outputs: jax.Array, golden: jax.Array | None = None):
        """Outputs [batch, classes] of one fault on one whole batch."""
        count = self._setup.images_in(number)
        images = np.arange(count) + number * self._setup.batch_size
        golden = jnp.asarray(self._setup.golden[images]) if golden is None else golden[:count]
        verdict = self._judge(golden, outputs[:count], self._labels[images])
        self._record(np.full(count, row), images, jax.tree.map(np.asarray, verdict))

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
