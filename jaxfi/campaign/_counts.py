"""Campaigns of which numbers are kept and not pairs: every bit of every weight fits into memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from jaxfi.campaign._parts import RateTable, in_percent, parts_by
from jaxfi.campaign._sample import Sample
from jaxfi.data._extras import extra
from jaxfi.faults import FAULT_MODELS, FaultList, PyTree, Stratum
from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import LayerOf
from jaxfi.faults._sampling import ExhaustiveFaults
from jaxfi.faults._transforms import word_bits
from jaxfi.outcomes._outcomes import (
    CRITICAL,
    MASKED,
    Moments,
    Rates,
    Results,
    accuracy,
    checked_population,
    estimate_counted_rate,
)

if TYPE_CHECKING:
    import pandas

_AT_ONCE = 2**20  # faults


class Counts(NamedTuple):
    """Numbers of the images of each fault, [F] each, of an unsigned type that holds them."""

    masked: np.ndarray
    critical: np.ndarray
    due: np.ndarray
    correct: np.ndarray


def counts_of(results: Results) -> Counts:
    """Of outcomes [F, N]."""
    outcomes = results.outcomes
    kind = count_type(outcomes.shape[1])

    def number(pairs: np.ndarray) -> np.ndarray:
        return np.count_nonzero(pairs, axis=1).astype(kind)

    masked, critical = number(outcomes == MASKED), number(outcomes == CRITICAL)
    return Counts(masked, critical, number(results.due), results.correct.astype(kind))


def no_counts(num_faults: int, num_images: int) -> Counts:
    """Of faults that nothing is known of."""
    masked, critical, due, correct = np.zeros((4, num_faults), count_type(num_images))
    return Counts(masked, critical, due, correct)


def count_type(num_images: int) -> np.dtype:
    """The least unsigned type that holds 0 to `num_images`."""
    return np.min_scalar_type(num_images)


@dataclasses.dataclass(frozen=True, repr=False)
class CampaignCounts:
    """The result of `run_campaign(..., keep="counts")`.

    Attributes:
      faults: F faults.
      masked, critical, due, correct: [F] unsigned integers, of each fault the images with that
        outcome, with NaN or Inf, and with the label predicted.
      num_images: images that each fault saw.
      golden: [N, classes] fault-free outputs; NaN for images that no fault saw.
      labels: [N] int32.
      provenance: what the result depends on.
      sample: which images each fault saw, None where it was all; see `images`.
    """

    faults: FaultList
    masked: np.ndarray
    critical: np.ndarray
    due: np.ndarray
    correct: np.ndarray
    num_images: int
    golden: np.ndarray
    labels: np.ndarray
    provenance: dict[str, Any]
    sample: Sample | None = None

    def __len__(self) -> int:
        return len(self.faults)

    def __repr__(self) -> str:
        rates = self.rates()
        of = f" of {len(self.labels):,} each" if self.sample is not None else ""
        shares = ", ".join(
            f"{name.replace('non_critical', 'not critical')} {in_percent(getattr(rates, name))}"
            for name in ("masked", "non_critical", "critical")
        )
        return (
            f"CampaignCounts: {len(self):,} faults x {self.num_images:,} images{of}\n"
            f"  {shares} %\n"
            f"  DUE {in_percent(rates.due)} %; accuracy {100 * self.clean_accuracy:.2f} % without "
            f"faults, {in_percent(rates.faulty_accuracy)} % with\n"
            "  go on: .rates(by='layer'), .rates(by='bit'), jaxfi.criticality(this); intervals are "
            "99 %"
        )

    @property
    def non_critical(self) -> np.ndarray:
        """[F] images whose output a fault changes and not their prediction."""
        return (self.num_images - self.masked - self.critical).astype(self.masked.dtype)

    @property
    def num_not_activated(self) -> int:
        """Faults that did not change the stored word (stuck-at the value it has)."""
        return self.provenance["num_not_activated"]

    @property
    def clean_accuracy(self) -> float:
        """Share of images that the fault-free network predicts correctly, of those it saw."""
        seen = slice(None) if self.sample is None else self.sample.seen()
        return accuracy(self.golden[seen], self.labels[seen], self.provenance["nan"])

    def images(self, rows: Any = slice(None)) -> np.ndarray:
        """[k, m] int32, the images that the faults at `rows` saw, a slice, a mask or integers; they
        are drawn again, as they were."""
        rows = np.atleast_1d(np.arange(len(self))[rows])
        if self.sample is None:
            return np.tile(np.arange(self.num_images, dtype=np.int32), (len(rows), 1))
        return self.sample.order[self.sample.of(rows)].astype(np.int32)

    @overload
    def rates(
        self,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
        by: None = None,
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
        layer_of: LayerOf | None = None,
    ) -> RateTable: ...

    def rates(
        self,
        population: int | None = None,
        t: float | None = None,
        *,
        confidence: float | None = None,
        by: str | Sequence[str] | None = None,
        layer_of: LayerOf | None = None,
    ) -> Rates | RateTable:
        """Rates with intervals, as `Campaign.rates` has them.

        Of sampled images it is not known which of them did what; the intervals take what faults
        share for as much as it can be (`estimate_counted_rate`).
        """
        t = checked_cutoff(t, confidence)
        if by is None:
            everything = np.ones(len(self._cells.faults), bool)
            return self._rates_of(everything, checked_population(population, self.faults), t)

        def of(here: np.ndarray, population: float) -> tuple[int, Rates, dict]:
            return int(self._cells.num_faults[here].sum()), self._rates_of(here, population, t), {}

        return parts_by(self._cells.faults, by, of, layer_of)

    def to_pandas(self, params: PyTree | None = None) -> pandas.DataFrame:
        """One row a fault, with the columns of `Campaign.to_pandas` but for `index`, a text; path
        and model are categories, so that 5e7 rows fit into memory.

        Raises ImportError where pandas is not installed.
        """
        with extra("report"):
            import pandas

        faults, values = self.faults, {}
        if params is not None:
            values = dict(zip(("value_before", "value_after"), faults.values(params), strict=True))
        bit = pandas.array(np.where(faults.bit < 0, 0, faults.bit), "Int16")
        bit[faults.bit < 0] = pandas.NA
        return pandas.DataFrame(
            {
                "row": np.arange(len(faults)),
                "path": pandas.Categorical.from_codes(faults.leaf, list(faults.paths)),
                "element": faults.element,
                "bit": bit,
                "model": pandas.Categorical.from_codes(faults.model, list(FAULT_MODELS)),
                **values,
                "masked": self.masked,
                "non_critical": self.non_critical,
                "critical": self.critical,
                "due": self.due,
                "correct": self.correct,
            }
        )

    def _rates_of(self, here: np.ndarray, population: float, t: float) -> Rates:
        cells, num_images = self._cells, len(self.labels)
        num_faults = int(cells.num_faults[here].sum())
        population = population if population >= num_faults else np.inf
        leaning = self._leaning(np.unique(cells.faults.leaf[here]))
        found = {}
        for name in Rates._fields:
            total = int(cells.totals[name][here].sum()) / self.num_images
            squares = int(cells.squares[name][here].sum()) / self.num_images**2
            moments = Moments(num_faults, total, squares)
            found[name] = estimate_counted_rate(
                moments, self.num_images, num_images, leaning, population, t
            )
        return Rates(**found)

    def _leaning(self, leaves: np.ndarray) -> float:
        """How much the faults of these leaves lean on some images together."""
        if self.sample is None:
            return 0.0
        counts = self.faults.counts_by_leaf()
        ends, weights = np.cumsum(counts), np.zeros(len(self.labels))
        for leaf in leaves.tolist():
            last, count = int(ends[leaf]), int(counts[leaf])
            weights += count * self.sample.weights(last - count, last)
        weights /= counts[leaves].sum()
        return float(np.square(weights - 1 / len(weights)).sum())

    @functools.cached_property
    def _cells(self) -> Cells:
        counts = Counts(self.masked, self.critical, self.due, self.correct)
        return _cells_of(self.faults, counts, self.num_images)


class Cells(NamedTuple):
    """A campaign by leaf, bit and model.

    Attributes:
      num_images: of each fault.
      faults: one of each cell.
      num_faults: [C] faults in each.
      totals, squares: of each rate, [C] sums of the faults' counts and of their squares.
    """

    num_images: int
    faults: FaultList
    num_faults: np.ndarray
    totals: dict[str, np.ndarray]
    squares: dict[str, np.ndarray]


def cells_of(campaign: Any) -> Cells:
    """Of a `Campaign` or `CampaignCounts`."""
    if isinstance(campaign, CampaignCounts):
        return campaign._cells
    return _cells_of(campaign.faults, counts_of(campaign.results), campaign.outcomes.shape[1])


def _cells_of(faults: FaultList, counts: Counts, num_images: int) -> Cells:
    if isinstance(faults, ExhaustiveFaults):
        first, sums = _sums_by_rule(faults, counts, num_images)
    else:
        first, sums = _sums_by_row(faults, counts, num_images)
    chosen = dataclasses.replace(faults[first], drawn_from=faults.drawn_from)
    # Counts are small integers: their sums are exact.
    num_faults, *of_rates = np.rint(sums).astype(np.int64)
    totals = dict(zip(Rates._fields, of_rates[0::2], strict=True))
    squares = dict(zip(Rates._fields, of_rates[1::2], strict=True))
    return Cells(num_images, chosen, num_faults, totals, squares)


def _sums_by_row(
    faults: FaultList, counts: Counts, num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first fault of each cell, [C], and the sums of 1 and of each rate's counts and squares,
    [11, C]."""
    key = np.stack([faults.leaf, faults.bit, faults.model], axis=1)
    _, first, cell = np.unique(key, axis=0, return_index=True, return_inverse=True)
    cell = cell.reshape(-1)
    weights = [
        None,
        *(n**power for n in _numbers(counts, slice(None), num_images) for power in (1, 2)),
    ]
    return first, np.array([np.bincount(cell, weight) for weight in weights], np.float64)


def _sums_by_rule(
    faults: ExhaustiveFaults, counts: Counts, num_images: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_sums_by_row`, element after element: the cells of a leaf's elements are in one order."""
    firsts, sums = [], []
    for leaf, bits, num_models in faults.drawn_from:
        there, num_cells = faults.rows_of_leaf(leaf), len(bits) * num_models
        if there.start == there.stop:
            continue
        total = np.zeros((11, num_cells))
        step = max(1, _AT_ONCE // num_cells) * num_cells
        for start in range(there.start, there.stop, step):
            rows = slice(start, min(start + step, there.stop))
            numbers = _numbers(counts, rows, num_images)
            grids = [number.reshape(-1, num_cells) for number in numbers]
            total[0] += len(grids[0])
            total[1::2] += [grid.sum(axis=0) for grid in grids]
            total[2::2] += [np.square(grid).sum(axis=0) for grid in grids]
        firsts.append(there.start + np.arange(num_cells))
        sums.append(total)
    return np.concatenate(firsts), np.concatenate(sums, axis=1)


def _numbers(counts: Counts, rows: slice, num_images: int) -> list[np.ndarray]:
    """Counts of each of `Rates`, int64."""
    masked, critical, due, correct = (np.asarray(number[rows], np.int64) for number in counts)
    return [masked, num_images - masked - critical, critical, due, correct]


def by_element(
    faults: FaultList, counts: np.ndarray, leaf: int, by_bit: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of a leaf's faults, the sums of `counts` [F] by element, and how many they are: both
    [elements], or [elements, word bits] `by_bit`, then of faults that name one."""
    size = int(np.prod(faults.shapes[leaf]))
    width = word_bits(faults.dtypes[leaf]) if by_bit else 1
    totals, numbers = np.zeros((size, width)), np.zeros((size, width), np.int64)
    if isinstance(faults, ExhaustiveFaults):
        of_leaf = (s for s in faults.drawn_from if s.leaf == leaf)
        _, bits, num_models = next(of_leaf, Stratum(leaf, (), 1))
        grid = counts[faults.rows_of_leaf(leaf)].reshape(size, len(bits), num_models)
        if not by_bit:
            totals[:, 0], numbers[:, 0] = grid.sum(axis=(1, 2)), len(bits) * num_models
        elif bits != (-1,):
            totals[:, bits], numbers[:, bits] = grid.sum(axis=2), num_models
    else:
        here = (faults.leaf == leaf) & ((faults.bit >= 0) | (not by_bit))
        place = faults.element[here] * width + (faults.bit[here] if by_bit else 0)
        totals += np.bincount(place, counts[here], size * width).reshape(size, width)
        numbers += np.bincount(place, minlength=size * width).reshape(size, width)
    return (totals, numbers) if by_bit else (totals[:, 0], numbers[:, 0])
