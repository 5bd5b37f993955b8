"""Rates of parts of a campaign: by layer, bit position, fault model, or several of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxfi.data._extras import extra
from jaxfi.faults import FAULT_MODELS, FaultList
from jaxfi.faults._layers import LayerOf, layers_of
from jaxfi.outcomes._outcomes import Estimate, Rates, Results, rate_of

if TYPE_CHECKING:
    import pandas

KEYS = ("layer", "bit", "model")


class Part(NamedTuple):
    """What the faults of one part did.

    Attributes:
      name: the part: a layer, a bit position, a fault model; of several keys, joined by ", ".
      num_faults: faults in it.
      masked, non_critical, critical, due, faulty_accuracy: as in `Rates`, fractions.
      criteria: those of the campaign's own criteria, by name.
    """

    name: str
    num_faults: int
    masked: Estimate
    non_critical: Estimate
    critical: Estimate
    due: Estimate
    faulty_accuracy: Estimate
    criteria: Mapping[str, Estimate] = MappingProxyType({})

    def rate(self, name: str) -> Estimate:
        """One of them, by name."""
        return self.criteria[name] if name in self.criteria else getattr(self, name)


class RateTable(Sequence[Part]):
    """The rates of each part, with intervals; a sequence of `Part`.

    `str` is a table in percent; `to_pandas` has a column for each rate and for its interval's ends.
    """

    def __init__(self, by: str, parts: Sequence[Part]):
        self.by, self.parts = by, tuple(parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index]

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __repr__(self) -> str:
        width = max(len(self.by), *(len(part.name) for part in self.parts))
        names = self._names()
        lines = [f"{self.by:{width}} {'faults':>8} " + " ".join(f"{n:>21}" for n in names)]
        for part in self.parts:
            cells = " ".join(f"{in_percent(part.rate(name)):>21}" for name in names)
            lines.append(f"{part.name:{width}} {part.num_faults:>8,} {cells}")
        return "\n".join((*lines, "percent, with intervals"))

    def _names(self) -> tuple[str, ...]:
        return (*Rates._fields, *(self.parts[0].criteria if self.parts else ()))

    def to_pandas(self) -> pandas.DataFrame:
        """One row a part. Raises ImportError where pandas is not installed."""
        with extra("report"):
            import pandas

        rows = []
        for part in self.parts:
            row: dict[str, Any] = {self.by: part.name, "faults": part.num_faults}
            for name in self._names():
                value = part.rate(name)
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            rows.append(row)
        return pandas.DataFrame(rows)


def in_percent(estimate: Estimate) -> str:
    """`93.24 [92.94, 93.52]`."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(*(100 * x for x in estimate))


def whole_rates(results: Results, population: float, t: float) -> Rates:
    """The rates over all faults of `results`."""
    return Rates(*(rate_of(results, rate, population, t) for rate in Rates._fields))


def rates_by(
    faults: FaultList,
    results: Results,
    by: str | Sequence[str],
    t: float,
    layer_name: LayerOf | None = None,
    order: Sequence[str] | None = None,
) -> RateTable:
    """The rates of each part that has faults.

    Args:
      faults, results: F faults and what came of them.
      by: one of `KEYS`, or several.
      t: cut-off of the normal distribution.
      layer_name: the layer of a leaf's path, where `jaxfi.faults.layer_of` does not say it right.
      order: layers in the order wanted; by default the parameter tree's. Bits are from the most
        significant down.
    """

    def of(here: np.ndarray, population: float) -> tuple[int, Rates, dict[str, Estimate]]:
        num_faults, some = int(here.sum()), results.of_faults(here)
        population = population if population >= num_faults else math.inf  # faults are repeated
        criteria = {name: rate_of(some, name, population, t) for name in some.criteria}
        return num_faults, whole_rates(some, population, t), criteria

    return parts_by(faults, by, of, layer_name, order)


def parts_by(
    faults: FaultList,
    by: str | Sequence[str],
    rates: Callable[[np.ndarray, float], tuple[int, Rates, Mapping[str, Estimate]]],
    layer_name: LayerOf | None = None,
    order: Sequence[str] | None = None,
) -> RateTable:
    """The table of `rates_by`: `rates` gives the number of faults and the rates of a part, a mask
    of the `faults`, and of its possible faults, and those of criteria."""
    keys = (by,) if isinstance(by, str) else tuple(by)
    if not keys or any(key not in KEYS for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(f"cannot group by {by!r}: allowed are one or more of {', '.join(KEYS)}")
    layers = layers_of(faults.paths, layer_name)
    columns = [_column(key, faults, layers, order) for key in keys]
    parts = []
    for values in itertools.product(*(names for names, _ in columns)):
        here = np.ones(len(faults), bool)
        for value, (names, code) in zip(values, columns, strict=True):
            here &= code == names.index(value)
        if not here.any():
            continue
        chosen = dict(zip(keys, values, strict=True))
        possible = _population(faults[here], faults, chosen, layers)
        num_faults, found, criteria = rates(here, possible)
        parts.append(Part(", ".join(values), num_faults, *found, criteria))
    return RateTable(", ".join(keys), parts)


def _column(
    key: str, faults: FaultList, layers: list[str], order: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """The parts of one key, in order, and which of them each fault is in, [F]."""
    if key == "layer":
        names = list(dict.fromkeys([*(order or ()), *layers]))
        return names, np.array([names.index(layer) for layer in layers])[faults.leaf]
    if key == "model":
        return [*FAULT_MODELS], faults.model
    dtypes = np.array(faults.dtypes)[faults.leaf]
    several = len(set(dtypes)) > 1
    bits = {(-bit, dtype if several else "") for bit, dtype in zip(faults.bit.tolist(), dtypes)}  # noqa: B905
    found = sorted(bits)
    names = [_bit_name(-bit, dtype) for bit, dtype in found]
    code = np.zeros(len(faults), np.int64)
    for number, (bit, dtype) in enumerate(found):
        code[(faults.bit == -bit) & (dtypes == dtype if several else True)] = number
    return names, code


def _bit_name(bit: int, dtype: str) -> str:
    name = str(bit) if bit >= 0 else "word"
    return f"{dtype} {name}" if dtype else name


def _population(
    part: FaultList, faults: FaultList, chosen: dict[str, str], layers: list[str]
) -> float:
    """Possible faults in a part; infinite where they would be fewer than the faults in it."""
    leaves = None
    if "layer" in chosen:
        leaves = [n for n, layer in enumerate(layers) if layer == chosen["layer"]]
    bit = int(part.bit[0]) if "bit" in chosen else None
    population = faults.population_of(leaves, bit)
    if "model" in chosen and any(s.num_models > 1 for s in faults.drawn_from or ()):
        population //= 2  # both polarities of stuck-at were drawn: this is one of them
    return population
