"""What a campaign found: outcomes of every fault on every image, and the rates they give."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._audit import Audit, Subject, audited
from jaxfi.campaign._counts import CampaignCounts, Counts
from jaxfi.campaign._look import html_of, lines_of
from jaxfi.campaign._parts import RateTable, rates_by, whole_rates
from jaxfi.campaign._sample import Sample
from jaxfi.data._extras import extra
from jaxfi.faults import FAULT_MODELS, FaultList, PyTree
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import LayerOf
from jaxfi.faults._sites import checked_integer
from jaxfi.network._layout import layout_from
from jaxfi.outcomes._outcomes import (
    CRITICAL,
    MASKED,
    NON_CRITICAL,
    Estimate,
    Rates,
    Results,
    accuracy,
    checked_population,
    correct_predictions,
    rate_of,
)
from jaxfi.outcomes._two_stage import Seen

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass(frozen=True, repr=False)
class Campaign:
    """The result of `run_campaign`.

    Attributes:
      faults: F faults.
      outcomes: [F, N] uint8, 0 masked, 1 non-critical, 2 critical.
      due: [F, N] bool, the faulty output holds NaN or Inf.
      correct: [F] int32, images whose faulty prediction is the label.
      golden: [N, classes] fault-free outputs; of outputs that are not one array [batch, classes]
        all of them, [N, ...] each, as the network arranges them; loaded from a directory, by name.
      labels: [N] int32, -1 where none were given; accuracies are then NaN.
      provenance: what the result depends on: hashes, precision, batch size, seed, versions.
      pairs_correct: [F, N] bool, the faulty prediction is the label; None where a directory kept
        only the number of such images.
      images: None where every fault saw every image; else [F, m] int32, the images that each saw.
        Arrays [F, N] are then [F, m], and the golden outputs of images that no fault saw are NaN.
      criteria: by the campaign's own criteria, [F, N] bool each, whether the pair meets it.
    """

    faults: FaultList
    outcomes: np.ndarray
    due: np.ndarray
    correct: np.ndarray
    golden: Any
    labels: np.ndarray
    provenance: dict[str, Any]
    pairs_correct: np.ndarray | None = None
    images: np.ndarray | None = None
    criteria: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    _subject: Subject | None = dataclasses.field(default=None, compare=False)

    def __repr__(self) -> str:
        return "\n".join(lines_of(self))

    def _repr_html_(self) -> str:
        return html_of(self)

    def __len__(self) -> int:
        return len(self.faults)

    def __getitem__(self, rows: Any) -> Campaign:
        """The campaign of the faults at `rows`: a slice, a mask, integers or one integer."""
        rows = np.atleast_1d(np.arange(len(self.faults))[rows])
        faults = dataclasses.replace(self.faults[rows], drawn_from=self.faults.drawn_from)
        pairs = self.pairs_correct
        return dataclasses.replace(
            self,
            faults=faults,
            outcomes=self.outcomes[rows],
            due=self.due[rows],
            correct=self.correct[rows],
            pairs_correct=None if pairs is None else pairs[rows],
            images=None if self.images is None else self.images[rows],
            criteria={name: met[rows] for name, met in self.criteria.items()},
        )

    @property
    def results(self) -> Results:
        """What the faults did, with the images that they saw where it was not all."""
        seen = None
        if self.images is not None:
            right = np.zeros(len(self.labels), bool)
            if self._labelled:
                right = correct_predictions(self.golden, self.labels, self.provenance["nan"])
            right = np.where(self.seen, right, np.int8(-1)).astype(np.int8)
            seen = Seen(self.images, right, self.faults.leaf)
        return Results(
            self.outcomes, self.due, self.correct, self.pairs_correct, seen, self.criteria,
            self._labelled,
        )  # fmt: skip

    @property
    def _labelled(self) -> bool:
        return bool((self.labels >= 0).any())

    @property
    def seen(self) -> np.ndarray:
        """[N] bool: images that the fault-free network ran on."""
        if self.images is None:
            return np.ones(len(self.labels), bool)
        seen: Any = np.zeros(len(self.labels), bool)
        for golden in jax.tree.leaves(self.golden):
            if jnp.issubdtype(golden.dtype, jnp.inexact):
                seen |= ~np.isnan(golden).reshape(len(golden), -1).all(axis=1)
        seen[self.images] = True
        return seen

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
        """Share of images that the fault-free network predicts correctly, of those it saw; NaN
        without labels."""
        if not self._labelled:
            return math.nan
        seen = self.seen
        return accuracy(self.golden[seen], self.labels[seen], self.provenance["nan"])

    @property
    def faulty_accuracy(self) -> float:
        """Correct faulty predictions / (faults x images); NaN without labels."""
        if self.images is not None or not self._labelled:
            return self.rates().faulty_accuracy.value
        return float(self.correct.sum() / self.outcomes.size)

    def rate(
        self,
        name: str,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
    ) -> Estimate:
        """The share of pairs that meet one of the campaign's criteria, or one of `Rates` by name.

        Args:
          name: of a criterion, or "masked", "non_critical", "critical", "due", "faulty_accuracy".
          population, t, confidence: as in `rates`.

        Raises ValueError as `rates`, and for another name.
        """
        t = checked_cutoff(t, confidence)
        return rate_of(self.results, name, checked_population(population, self.faults), t)

    @overload
    def rates(
        self,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
        by: None = None,
        images: Any = None,
        layer_of: LayerOf | None = None,
    ) -> Rates: ...

    @overload
    def rates(
        self,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
        by: str | Sequence[str],
        images: Any = None,
        layer_of: LayerOf | None = None,
    ) -> RateTable: ...

    def rates(
        self,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
        by: str | Sequence[str] | None = None,
        images: Any = None,
        layer_of: LayerOf | None = None,
    ) -> Rates | RateTable:
        """Rates with intervals that take each fault as one cluster of images.

        Args:
          population: possible faults; default those that the list was drawn from.
          t, confidence: of the intervals: a cut-off of the normal distribution, or such as 0.95;
            default t = 2.58, which the studies take for 99 %.
          by: "layer", "bit", "model" or several of them: a table with a row for each.
          images: a mask [N], or numbers of images: the rates on those alone; of a campaign of all
            images.
          layer_of: the layer of a leaf's path, where `jaxfi.faults.layer_of` does not say it right.

        Returns fractions. `jaxfi.outcomes.estimate_rate` has the source. Raises ValueError for what
        is out of range, a population of fewer faults than the list, or images whose correct
        predictions a directory did not keep.
        """
        t = checked_cutoff(t, confidence)
        results = self.results if images is None else self._of_images(images)
        if by is not None:
            return rates_by(self.faults, results, by, t, layer_of)
        return whole_rates(results, checked_population(population, self.faults), t)

    def to_pandas(self, params: PyTree | None = None) -> pandas.DataFrame:
        """One row a fault, with the columns of the Parquet files: row, path, index, element, bit,
        model, and the numbers of images that are masked, non-critical, critical, DUE and correct;
        with the campaign's `params` also value_before and value_after.

        Raises ImportError where pandas is not installed.
        """
        with extra("report"):
            import pandas

        faults = self.faults
        counts = {
            name: np.count_nonzero(self.outcomes == outcome, axis=1)
            for name, outcome in (
                ("masked", MASKED), ("non_critical", NON_CRITICAL), ("critical", CRITICAL),
            )
        }  # fmt: skip
        values = {}
        if params is not None:
            values = dict(zip(("value_before", "value_after"), faults.values(params), strict=True))
        return pandas.DataFrame(
            {
                "row": np.arange(len(faults)),
                "path": np.array(faults.paths)[faults.leaf],
                "index": [str(index) for index in faults.indices()],
                "element": faults.element,
                "bit": pandas.array(np.where(faults.bit < 0, 0, faults.bit), "Int16"),
                "model": np.array(FAULT_MODELS)[faults.model],
                **values,
                **counts,
                "due": self.num_due,
                "correct": self.correct,
                **{name: met.sum(axis=1) for name, met in self.criteria.items()},
            }
        ).assign(bit=lambda table: table["bit"].mask(faults.bit < 0))

    def audit(self, num_pairs: int = 200, key: int = 0) -> Audit:
        """Checks random (fault, image) pairs against the network evaluated operation by operation.

        Args:
          num_pairs: distinct pairs, of all faults and images alike.
          key: of the draw; the same pairs on every machine.

        Returns the agreement by outcome, with an interval; its `repr` is one line. Raises
        ValueError for a campaign that was loaded: run it again with its workdir, which runs no
        fault twice, and audit what that returns.
        """
        checked_integer("num_pairs", num_pairs, 1)
        if self._subject is None:
            raise ValueError(
                "a loaded campaign has no network: allowed is one that run_campaign returned, "
                "with the same workdir, which continues where that is"
            )
        return audited(
            self._subject, self.faults, self.outcomes, self.due, num_pairs, key, self.images,
            self.criteria,
        )  # fmt: skip

    def _of_images(self, images: Any) -> Results:
        """The results on these images alone."""
        if self.images is not None:
            raise ValueError(
                f"each fault saw {self.images.shape[1]} images of its own: allowed are rates over "
                "those, or a campaign without images_per_fault"
            )
        chosen = np.arange(len(self.labels))[np.asarray(images)]
        if not chosen.size or chosen.ndim != 1:
            raise ValueError(f"images choose {chosen.shape}: allowed are one image or more, [N]")
        pairs = self.pairs_correct if self._labelled else np.zeros(self.outcomes.shape, bool)
        if pairs is None:
            pairs = self._derived_correct(chosen)
        pairs = pairs[:, chosen]
        criteria = {name: met[:, chosen] for name, met in self.criteria.items()}
        return Results(
            self.outcomes[:, chosen], self.due[:, chosen], pairs.sum(axis=1), pairs,
            criteria=criteria, labelled=self._labelled,
        )  # fmt: skip

    def _derived_correct(self, chosen: np.ndarray) -> np.ndarray:
        """`pairs_correct` where outcomes tell it: of images that the golden network gets right."""
        right = correct_predictions(self.golden, self.labels, self.provenance["nan"])
        derived = right & (self.outcomes != CRITICAL)
        critical = np.any(self.outcomes[:, chosen[~right[chosen]]] == CRITICAL)
        if critical and np.any(derived.sum(axis=1) != self.correct):
            raise ValueError(
                "the directory kept how many predictions of a fault are correct, not which: "
                "allowed are images that the fault-free network gets right"
            )
        return derived


def load_campaign(directory: str | os.PathLike) -> Any:
    """The `Campaign` that `run_campaign(..., workdir=directory)` finished there, or its
    `CampaignCounts` where it kept counts.

    Raises FileNotFoundError, or ValueError naming what is missing or damaged.
    """
    from jaxfi.campaign._store import load  # only directories need its packages

    stored = load(directory)
    arrays = stored.arrays
    if isinstance(stored.results, Counts):
        return _loaded_counts(stored)
    golden, outputs = arrays["golden"], stored.fingerprint.get("outputs")
    return Campaign(
        stored.faults,
        *stored.results[:3],
        golden=golden if outputs is None else layout_from(outputs).by_name(golden),
        labels=arrays["labels"],
        provenance=stored.fingerprint,
        images=arrays.get("images"),
        criteria=stored.results.criteria,
    )


def _loaded_counts(stored: Any) -> CampaignCounts:
    golden, labels = stored.arrays["golden"], stored.arrays["labels"]
    order = stored.arrays.get("order")
    found, num_images, sample = stored.fingerprint, stored.num_images, None
    if order is not None:
        in_order = np.array_equal(order, np.arange(len(labels)))
        sample = Sample(
            stored.faults, len(labels), num_images, found["batch_size"], found["seed"],
            in_order=in_order,
        )  # fmt: skip
    masked, critical, due, correct = stored.results
    return CampaignCounts(
        stored.faults, masked, critical, due, correct, num_images, golden, labels, found, sample
    )
