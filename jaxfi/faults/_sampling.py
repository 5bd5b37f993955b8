"""How many faults to inject, and which: statistical fault injection and exhaustive lists.

The random numbers come from NumPy's Philox bit generator, whose stream is guaranteed, and are
turned into sites by exact integer arithmetic: the same key gives the same list on every platform,
and a longer list from the same key by="network" begins with the shorter one.
"""

from __future__ import annotations

import fnmatch
import functools
import html
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.faults._cutoff import checked_cutoff
from jaxfi.faults._layers import LayerOf, layers_of
from jaxfi.faults._list import FaultList, Stratum, typed_columns
from jaxfi.faults._sites import checked_integer, checked_model, checked_value
from jaxfi.faults._transforms import BIT_MODELS, FAULT_MODELS, PyTree, word_bits

STRATA = ("layer", "network", "bit")
STUCK_AT = "stuck-at"  # both polarities, drawn with equal chance

# A stratum is a list of (leaf, bits): the sites are every element of the leaf times every bit.
_Stratum = list[tuple[int, tuple[int, ...]]]


def fault_population(params: PyTree) -> int:
    """Number of possible single faults: parameters x word bits x 2 transitions.

    Raises TypeError for a leaf that is not a float or integer array.

    >>> fault_population({"w": np.zeros((3, 4), np.float32)})
    768
    """
    return FaultList.from_arrays(params, [], [], [], []).population


def sample_size(
    population: int,
    margin: float = 0.01,
    t: float | None = None,
    p: float = 0.5,
    *,
    confidence: float | None = None,
) -> int:
    """Faults to inject so that a rate is known within `margin`.

    n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p))), rounded (Leveugle et al., DATE 2009).

    Args:
      population: N, possible faults.
      margin: e, half width of the interval, a fraction.
      t, confidence: a cut-off of the normal distribution, or a confidence such as 0.95; default
        t = 2.58, which the studies take for 99 %.
      p: expected rate; 0.5 is the safe choice.

    Raises ValueError for a population below 1, or margin, t or p out of range.

    >>> sample_size(104_092_288)
    16638
    """
    if population < 1:
        raise ValueError(f"population {population} is too small: allowed are integers >= 1")
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin} is out of range: allowed is 0 < margin < 1")
    t = checked_cutoff(t, confidence)
    if not 0 < p < 1:
        raise ValueError(f"p {p} is out of range: allowed is 0 < p < 1")
    return round(population / (1 + margin**2 * (population - 1) / (t**2 * p * (1 - p))))


def sample_faults(
    key: int | jax.Array,
    params: PyTree,
    num_faults: int,
    *,
    model: str = "bit-flip",
    by: str = "layer",
    paths: str | Sequence[str] = "*",
    bits: Sequence[int] | None = None,
    value: float | None = None,
    layer_of: LayerOf | None = None,
) -> FaultList:
    """Draws distinct fault sites, uniform within each stratum.

    Args:
      key: an int or a JAX random key; the same key draws the same list everywhere.
      params: the parameter tree.
      num_faults: faults to draw, exactly.
      model: one of `FAULT_MODELS`, or "stuck-at" for both polarities.
      by: "layer" deals the faults to the layers (`layer_of`) in proportion to their
        fault sites (with one dtype: to their parameters), largest remainders first; "bit" deals
        them equally to the bit positions, or in proportion where one runs out of sites; "network"
        draws from all sites at once.
      paths: pattern or patterns (fnmatch) that a leaf's path must match, `layer3/*`.
      bits: bit positions allowed; None for all. Models without a bit do not look at it.
      value: what the model "value" writes, rounded to the leaf's dtype.
      layer_of: the layer of a leaf's path; default `jaxfi.faults.layer_of`.

    Raises ValueError for more faults than sites, a pattern that matches nothing, a bit outside
    the word, a value that does not fit, or an unknown name.

    >>> faults = sample_faults(0, {"w": np.zeros((30, 40), np.float32)}, 100)
    >>> len(faults), len(set(zip(faults.element, faults.bit)))
    (100, 100)
    """
    if by not in STRATA:
        raise ValueError(f"cannot sample by {by!r}: allowed are {', '.join(STRATA)}")
    num_faults = checked_integer("num_faults", num_faults)
    empty, leaves = _selected_leaves(params, model, paths, bits)
    value = _checked_value(value, model, empty, leaves)
    counts = _site_counts(empty, leaves, model)
    if not 0 <= num_faults <= sum(counts):
        raise ValueError(
            f"num_faults {num_faults} is out of range: there are {sum(counts)} fault sites"
        )
    strata = _strata(layers_of(empty.paths, layer_of), leaves, by)
    capacity = [sum(_site_counts(empty, stratum, model)) for stratum in strata]
    # Dealing by bit is equal, unless a position runs out of sites (8-bit beside 32-bit leaves).
    weights = [min(min(capacity) if by == "bit" else c, c) for c in capacity]
    shares = _deal(num_faults, weights if num_faults <= sum(weights) else capacity)
    drawn = [
        _decode(empty, stratum, _draw_distinct(_generator(key, number), share, sites), model)
        for number, (stratum, share, sites) in enumerate(zip(strata, shares, capacity, strict=True))
    ]
    leaf, element, bit, code = np.concatenate(drawn, axis=1)
    drawn_from = _drawn_from(leaves, model)
    return FaultList.from_arrays(params, leaf, element, bit, code, value, drawn_from)


def exhaustive_faults(
    params: PyTree,
    *,
    model: str = "bit-flip",
    paths: str | Sequence[str] = "*",
    bits: Sequence[int] | None = None,
    value: float | None = None,
) -> FaultList:
    """Every fault site, in the order leaf, element, bit. Arguments and errors as in
    `sample_faults`.

    The list is a rule: it takes no memory until its columns are asked for, and `[rows]` makes those
    rows alone. `run_campaign(..., keep="counts")` goes through it so.

    >>> len(exhaustive_faults({"w": np.zeros((3, 4), np.int8)}))
    96
    """
    empty, leaves = _selected_leaves(params, model, paths, bits)
    value = _checked_value(value, model, empty, leaves)
    return ExhaustiveFaults(empty, _drawn_from(leaves, model), model, value)


class ExhaustiveFaults(FaultList):
    """A `FaultList` of every fault of some sites, in the order leaf, element, bit, polarity.

    Its columns are made when they are first asked for, and rows when those are.

    Args:
      empty: a list of no faults, which describes the parameters.
      drawn_from: the sites; each leaf once, in order.
      model: one of `FAULT_MODELS`, or "stuck-at" for both polarities.
      value: what the model "value" writes.
    """

    def __init__(
        self,
        empty: FaultList,
        drawn_from: Sequence[Stratum],
        model: str,
        value: float | None = None,
    ):
        given = {name: getattr(empty, name) for name in ("paths", "shapes", "dtypes")}
        self.drawn_from: tuple[Stratum, ...]
        self.rule_model: str
        self.rule_value: float | None
        self._sizes: list[int]
        given |= {"drawn_from": tuple(drawn_from), "rule_model": model, "rule_value": value}
        self.__dict__.update(given)  # the class is frozen
        strata = [(leaf, bits) for leaf, bits, _ in drawn_from]
        self.__dict__["_sizes"] = _site_counts(empty, strata, model)

    def __len__(self) -> int:
        return sum(self._sizes)

    def __getitem__(self, rows: Any) -> FaultList:
        return self._rows(_positions(rows, len(self)))

    def counts_by_leaf(self) -> np.ndarray:
        counts = np.zeros(len(self.paths), np.int64)
        counts[[stratum.leaf for stratum in self.drawn_from]] = self._sizes
        return counts

    def rows_of_leaf(self, leaf: int) -> slice:
        """The rows of a leaf's faults."""
        counts = self.counts_by_leaf()
        last = int(counts[: leaf + 1].sum())
        return slice(last - int(counts[leaf]), last)

    def rows_of_element(self, leaf: int, element: int) -> np.ndarray:
        """The rows of the faults in one element, rising."""
        rows = self.rows_of_leaf(leaf)
        each = (rows.stop - rows.start) // math.prod(self.shapes[leaf])
        return rows.start + element * each + np.arange(each)

    def _lines(self) -> list[str]:
        sizes = zip(self._sizes, self.drawn_from, strict=True)
        where = ", ".join(f"{size:,} {self.paths[stratum.leaf]}" for size, stratum in sizes)
        return [
            f"FaultList: every {self.rule_model} of {len(self.drawn_from)} of {len(self.paths)} "
            f"leaves, {len(self):,} faults",
            f"  {where}",
            '  go on: [rows], +, jaxfi.run_campaign(..., keep="counts")',
        ]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def check(self) -> None:
        sizes = [math.prod(shape) for shape in self.shapes]
        if any(size < 0 for shape in self.shapes for size in shape):
            raise ValueError(f"its shapes are {self.shapes}")
        leaves = [stratum.leaf for stratum in self.drawn_from]
        if leaves != sorted(set(leaves)) or not set(leaves) <= set(range(len(sizes))):
            raise ValueError("its leaves are not each there once, in order")
        polarities = 2 if self.rule_model == STUCK_AT else 1
        for leaf, bits, num_models in self.drawn_from:
            allowed = _allowed_bits(self.paths[leaf], self.dtypes[leaf], self.rule_model, None)
            if num_models != polarities or list(bits) != sorted(set(bits) & set(allowed)):
                raise ValueError(f"it cannot hold {Stratum(leaf, bits, num_models)}")
        if self.rule_model != STUCK_AT:
            checked_model(self.rule_model)

    def _rows(self, sites: np.ndarray) -> FaultList:
        strata = [(leaf, bits) for leaf, bits, _ in self.drawn_from]
        leaf, element, bit, code = _decode(self, strata, sites, self.rule_model)
        columns = typed_columns(leaf, element, bit, code, self.rule_value)
        return FaultList(*self._leaves(), *columns)

    @functools.cached_property
    def _table(self) -> FaultList:
        return self._rows(np.arange(len(self)))

    # What the base class holds as fields.
    leaf = property(lambda self: self._table.leaf)
    element = property(lambda self: self._table.element)
    bit = property(lambda self: self._table.bit)
    model = property(lambda self: self._table.model)
    value = property(lambda self: self._table.value)


def _positions(rows: Any, length: int) -> np.ndarray:
    """What an index chooses of `range(length)`, [k]. IndexError as NumPy."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(length))
    rows = np.atleast_1d(rows)
    if rows.size == 0:
        return np.empty(0, np.int64)
    if rows.dtype == bool:
        if rows.shape != (length,):
            raise IndexError(f"a mask is {rows.shape}: allowed is {(length,)}")
        return np.flatnonzero(rows)
    if not np.issubdtype(rows.dtype, np.integer):
        raise IndexError(f"faults are chosen by {rows.dtype}: allowed are integers and masks")
    wrong = rows[(rows < -length) | (rows >= length)]
    if wrong.size:
        raise IndexError(f"index {wrong[0]} is out of bounds for a list of {length:,} faults")
    return rows % length


def _selected_leaves(
    params: PyTree, model: str, paths: str | Sequence[str], bits: Sequence[int] | None
) -> tuple[FaultList, _Stratum]:
    """An empty list that describes `params`, and the leaves and bits that may be faulty."""
    if model != STUCK_AT:
        checked_model(model)
    empty = FaultList.from_arrays(params, [], [], [], [])
    patterns = (paths,) if isinstance(paths, str) else tuple(paths)
    bits = None if bits is None else _checked_bits(bits)
    leaves: _Stratum = []
    for leaf, (path, dtype) in enumerate(zip(empty.paths, empty.dtypes, strict=True)):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            leaves.append((leaf, _allowed_bits(path, dtype, model, bits)))
    for pattern in patterns:
        if leaves and not any(fnmatch.fnmatchcase(path, pattern) for path in empty.paths):
            raise ValueError(
                f"no leaf matches {pattern!r}: the leaves are {', '.join(empty.paths)}"
            )
    if not leaves:
        raise ValueError(f"no leaf matches {patterns}: the leaves are {', '.join(empty.paths)}")
    return empty, leaves


def _checked_value(value: float | None, model: str, empty: FaultList, leaves: _Stratum) -> float:
    written = [checked_value(value, model, empty.dtypes[leaf]) for leaf, _ in leaves]
    return written[0]


def _allowed_bits(path: str, dtype: str, model: str, bits: Sequence[int] | None) -> tuple[int, ...]:
    if model not in (*BIT_MODELS, STUCK_AT):
        return (-1,)
    last = word_bits(dtype) - 1
    if bits is None:
        return tuple(range(last + 1))
    wrong = [bit for bit in bits if not 0 <= bit <= last]
    if wrong:
        raise ValueError(f"bit {wrong[0]} is outside {path} ({dtype}): allowed are 0 to {last}")
    return tuple(bits)


def _checked_bits(bits: Any) -> list[int]:
    if isinstance(bits, str) or not isinstance(bits, Iterable):
        raise TypeError(f"bits is {bits!r}: allowed are several integers, as in bits=[30, 31]")
    return sorted({checked_integer("bit", bit) for bit in bits})


def _strata(layers: list[str], leaves: _Stratum, by: str) -> list[_Stratum]:
    if by == "network":
        return [leaves]
    if by == "bit":
        positions = sorted({bit for _, bits in leaves for bit in bits})
        return [[(leaf, (bit,)) for leaf, bits in leaves if bit in bits] for bit in positions]

    def layer(site: tuple[int, tuple[int, ...]]) -> str:
        return layers[site[0]]

    return [list(group) for _, group in groupby(sorted(leaves, key=layer), key=layer)]


def _site_counts(empty: FaultList, stratum: _Stratum, model: str) -> list[int]:
    polarities = 2 if model == STUCK_AT else 1
    sizes = [int(np.prod(shape, dtype=object)) for shape in empty.shapes]
    return [sizes[leaf] * len(bits) * polarities for leaf, bits in stratum]


def _drawn_from(leaves: _Stratum, model: str) -> tuple[Stratum, ...]:
    return tuple(Stratum(leaf, bits, 2 if model == STUCK_AT else 1) for leaf, bits in leaves)


def _decode(empty: FaultList, stratum: _Stratum, sites: np.ndarray, model: str) -> np.ndarray:
    """Site numbers of a stratum as rows (leaf, element, bit, model), [4, F] int64."""
    ends = np.cumsum(np.array(_site_counts(empty, stratum, model), np.int64))
    sites = sites.astype(np.int64)
    which = np.searchsorted(ends, sites, side="right")
    rest = sites - np.concatenate([[0], ends])[which]
    leaf = np.array([leaf for leaf, _ in stratum], np.int64)[which]
    code = np.full(len(sites), 0 if model == STUCK_AT else FAULT_MODELS.index(model))
    if model == STUCK_AT:
        rest, polarity = np.divmod(rest, 2)
        code = FAULT_MODELS.index("stuck-at-0") + polarity
    num_bits = np.array([len(bits) for _, bits in stratum], np.int64)
    table = np.full((len(stratum), num_bits.max(initial=1)), -1, np.int64)
    for row, (_, bits) in enumerate(stratum):
        table[row, : len(bits)] = bits
    element, position = np.divmod(rest, num_bits[which])
    return np.stack([leaf, element, table[which, position], code])


def _deal(num_faults: int, weights: Sequence[int]) -> list[int]:
    """`num_faults` in proportion to `weights`, rounded so that the sum is exact (Hamilton)."""
    total = sum(weights) or 1
    shares = [num_faults * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: -(num_faults * weights[i] % total))
    for i in by_remainder[: num_faults - sum(shares)]:
        shares[i] += 1
    return shares


def nth_key(key: Any, number: int) -> jax.Array:
    """A key of its own for each number, of the same key on every machine and in every session.

    An integer's is threefry's, whatever the session's generator, with all 64 bits of it. Raises as
    `sample_faults` for what is no key.
    """
    words = np.array(_words(key), np.uint32)
    with jax.transfer_guard("allow"):
        if not isinstance(key, jax.Array):
            key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
        return jax.random.fold_in(key, number)


def _words(key: Any) -> tuple[int, ...]:
    """The 32-bit words of a key."""
    is_integer = isinstance(key, (int, np.integer)) and not isinstance(key, (bool, np.bool_))
    if is_integer:
        if not 0 <= key < 2**64:
            raise ValueError(f"key {key} is out of range: allowed are integers from 0 to 2**64 - 1")
        return int(key) >> 32, int(key) & 0xFFFFFFFF  # as jax.random.key(key) stores it
    if isinstance(key, jax.Array):
        typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if typed else 1) and (typed or key.dtype == np.uint32):
            data = np.asarray(jax.random.key_data(key) if typed else key)
            return tuple(int(word) for word in data.reshape(-1))
        raise TypeError(f"key is {key.dtype}{key.shape}: allowed are an integer and one random key")
    raise TypeError(f"key {key!r} is not a key: allowed are an integer and a JAX random key")


def _generator(key: Any, stratum: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(_words(key), spawn_key=(stratum,)))


def generator_of(key: Any, *numbers: int) -> np.random.Philox:
    """NumPy's random bits of a key, the same everywhere; for what is no fault list."""
    spawn_key = (2**32 - 1, *numbers)
    return np.random.Philox(np.random.SeedSequence(_words(key), spawn_key=spawn_key))


def _draw_distinct(generator: np.random.Philox, count: int, population: int) -> np.ndarray:
    """The first `count` distinct numbers of a uniform stream over range(population), [F] uint64."""
    chosen = np.empty(0, np.uint64)
    while len(chosen) < count:
        # The words it takes on average: near the end of a small population, most are repeats.
        missing = math.log1p((count - len(chosen)) / (population - count + 1)) * population
        words = generator.random_raw(min(64 + int(1.1 * missing), 2**24))
        # Reject the ragged end of the 64-bit range, so that every number is equally likely.
        words = words[words <= np.uint64(2**64 - 1 - 2**64 % population)]
        drawn = np.concatenate([chosen, words % np.uint64(population)])
        chosen = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return chosen[:count]
