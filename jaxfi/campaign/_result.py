"""What a campaign found: outcomes of every fault on every image, and the rates they give."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from jaxfi.faults import FaultList
from jaxfi.outcomes._outcomes import (
    Rates,
    Results,
    accuracy,
    checked_population,
    estimate_rate,
    per_fault_shares,
)


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
        """`outcomes`, `due` and `correct` together."""
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
        return accuracy(self.golden, self.labels, self.provenance["nan"])

    @property
    def faulty_accuracy(self) -> float:
        """Correct faulty predictions / (faults x images)."""
        return float(self.correct.sum() / self.outcomes.size)

    def rates(self, population: int | None = None, t: float = 2.58) -> Rates:
        """Rates with intervals that take each fault as one cluster of images.

        Args:
          population: possible faults; default those that the list was drawn from.
          t: cut-off of the normal distribution; 2.58 is 99 % confidence.

        Returns fractions. `jaxfi.outcomes.estimate_rate` has the source. Raises ValueError for a t
        that is not positive, or a population of fewer faults than the list.
        """
        if population is None:
            population = self.faults.population
        checked_population(population, len(self.faults))
        if not 0 < t < float("inf"):
            raise ValueError(f"t {t} is out of range: allowed is t > 0")
        num_images = self.outcomes.shape[1]
        return Rates(*(
            estimate_rate(per_fault_shares(self.results, rate), num_images, population, t)
            for rate in Rates._fields
        ))  # fmt: skip


def load_campaign(directory: str | os.PathLike) -> Campaign:
    """The campaign that `run_campaign(..., workdir=directory)` finished there.

    Raises FileNotFoundError, or ValueError naming what is missing or damaged.
    """
    from jaxfi.campaign._store import load  # only directories need its packages

    stored = load(directory)
    golden, labels = stored.arrays["golden"], stored.arrays["labels"]
    return Campaign(stored.faults, *stored.results, golden, labels, stored.fingerprint)
