"""Faults as hardware makes them: several words or bits at once, drawn experiment by experiment.

A pattern says what is faulty together in one experiment; `sample` draws experiments of it, for
`run_campaign`, which has one row for each::

    faults = jaxfi.patterns.sample(0, params, 1000, jaxfi.patterns.bit_error_rate(1e-6))

The same key draws the same experiments everywhere, and a longer list begins with the shorter one.
`population` counts the experiments that a pattern knows, for `sample_size`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.faults._list import FaultGroups, FaultList
from jaxfi.faults._sampling import (
    _draw_distinct,
    _generator,
    _selected_leaves,
    generator_of,
)
from jaxfi.faults._sites import checked_integer, checked_model
from jaxfi.faults._transforms import BIT_MODELS, FAULT_MODELS, PyTree, word_bits, word_dtype

__all__ = [
    "Pattern",
    "bit_error_rate",
    "burst",
    "channel",
    "column",
    "kernel",
    "population",
    "row",
    "sample",
    "stuck_lane",
    "words",
]

ORDERS = ("keras", "torch")
_FLIP, _NULL = FAULT_MODELS.index("bit-flip"), FAULT_MODELS.index("null")
_MOST = 2**28  # faults of one list


class _Rows(NamedTuple):
    """Faults, and the experiment that each belongs to, [K] each."""

    experiment: np.ndarray
    leaf: np.ndarray
    element: np.ndarray
    bit: np.ndarray
    model: np.ndarray


class _Leaves(NamedTuple):
    """The parameters that may be faulty: a list of no faults, the leaves' numbers, their arrays."""

    empty: FaultList
    numbers: tuple[int, ...]
    arrays: Sequence[Any]

    def size(self, leaf: int) -> int:
        return math.prod(self.empty.shapes[leaf])

    def width(self, leaf: int) -> int:
        return word_bits(self.empty.dtypes[leaf])


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What is faulty together. Made by the functions here.

    Attributes:
      name: of the pattern, for messages.
      sites: of each leaf the number of experiments, by its place in `_Leaves.numbers`; None where
        they are not counted.
      faults: the faults of experiments, given the leaves, and [E] leaf and number of the site in
        it; or the key and E, where sites are not counted.
    """

    name: str
    sites: Callable[[_Leaves, int], int] | None
    faults: Callable[..., _Rows]


def sample(
    key: int | jax.Array,
    params: PyTree,
    num_experiments: int,
    pattern: Pattern,
    *,
    paths: str | Sequence[str] = "*",
) -> FaultGroups:
    """Draws experiments of a pattern, distinct and uniform over those that it counts.

    Args:
      key: an int or a JAX random key.
      params: the parameter tree.
      num_experiments: E, exactly.
      pattern: such as `burst(2)`.
      paths: pattern or patterns (fnmatch) of the leaves that may be faulty.

    Raises ValueError for more experiments than there are, a pattern that fits no leaf, or paths
    that match none.
    """
    leaves = _leaves(params, paths)
    num_experiments = checked_integer("num_experiments", num_experiments, 0)
    _check_pattern(pattern)
    possible = None
    if pattern.sites is None:
        rows = pattern.faults(leaves, key, num_experiments)
    else:
        counts = _counts(pattern, leaves)
        possible = sum(counts)
        if num_experiments > possible:
            raise ValueError(
                f"num_experiments {num_experiments} is out of range: there are {possible:,} "
                f"experiments of {pattern.name}"
            )
        sites = _draw_distinct(_generator(key, 0), num_experiments, max(possible, 1))
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, sites.astype(np.int64), side="right")
        rest = sites.astype(np.int64) - np.concatenate([[0], ends])[which]
        rows = pattern.faults(leaves, np.array(leaves.numbers)[which], rest)
    return _grouped(params, rows, num_experiments, possible)


def population(params: PyTree, pattern: Pattern, *, paths: str | Sequence[str] = "*") -> int:
    """Possible experiments of a pattern; ValueError for one that does not count them, such as bit
    error rates."""
    _check_pattern(pattern)
    if pattern.sites is None:
        raise ValueError(f"experiments of {pattern.name} are not counted: any number can be drawn")
    return sum(_counts(pattern, _leaves(params, paths)))


def burst(length: int, bits: Iterable[int] | None = None) -> Pattern:
    """`length` adjacent bits of one word flip.

    Args:
      length: 1 or more.
      bits: positions that may flip; None for all. The whole burst lies in them.

    >>> faults = sample(0, {"w": np.ones(3, np.float32)}, 93, burst(2))  # all there are
    >>> set(faults.sizes.tolist())
    {2}
    """
    checked_integer("length", length, 1)
    allowed = None if bits is None else {checked_integer("bit", bit, 0) for bit in bits}

    def starts(leaves: _Leaves, leaf: int) -> list[int]:
        inside = range(leaves.width(leaf) - length + 1)
        if allowed is None:
            return list(inside)
        return [first for first in inside if {*range(first, first + length)} <= allowed]

    def sites(leaves: _Leaves, leaf: int) -> int:
        return leaves.size(leaf) * len(starts(leaves, leaf))

    def faults(leaves: _Leaves, leaf: np.ndarray, site: np.ndarray) -> _Rows:
        first, element = np.zeros_like(site), np.zeros_like(site)
        for number in np.unique(leaf).tolist():
            here, possible = leaf == number, np.array(starts(leaves, number))
            element[here], place = np.divmod(site[here], len(possible))
            first[here] = possible[place]
        experiment = np.repeat(np.arange(len(site)), length)
        bit = (first[:, None] + np.arange(length)).ravel()
        return _flips(experiment, leaf[experiment], element[experiment], bit)

    return Pattern(f"bursts of {length} bits", sites, faults)


def bit_error_rate(rate: float) -> Pattern:
    """Each bit of each word flips by itself with probability `rate`, as memory tools have it.

    The number of flips of an experiment is binomial: rate times the bits on average. An experiment
    without any holds a fault that does nothing, and is masked.

    Args:
      rate: above 0, below 1; 1e-9 to 1e-3 are usual.

    >>> params = {"w": np.ones((100, 100), np.float32)}
    >>> faults = sample(0, params, 500, bit_error_rate(1e-4))
    >>> bool(abs(faults.sizes.mean() - 32) < 1)
    True
    """
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise ValueError(f"rate {rate!r} is out of range: allowed are numbers above 0, below 1")

    def faults(leaves: _Leaves, key: Any, num_experiments: int) -> _Rows:
        sizes = [leaves.size(leaf) * leaves.width(leaf) for leaf in leaves.numbers]
        total = sum(sizes)
        expected = total * num_experiments * rate
        if expected > _MOST or total * num_experiments >= 2**62:
            raise ValueError(
                f"{num_experiments:,} experiments of bit error rate {rate:g} are about "
                f"{expected:.2g} faults: allowed are {_MOST:.2g}"
            )
        place = _hits(_generator(key, 0), total * num_experiments, rate)
        experiment, bit = np.divmod(place, max(total, 1))
        ends = np.cumsum(sizes)
        which = np.searchsorted(ends, bit, side="right")
        widths = np.array([leaves.width(leaf) for leaf in leaves.numbers], np.int64)
        element, bit = np.divmod(bit - np.concatenate([[0], ends])[which], widths[which])
        return _flips(experiment, np.array(leaves.numbers)[which], element, bit)

    return Pattern(f"bit error rate {rate:g}", None, faults)


def row(*, model: str = "bit-flip", bits: Iterable[int] | None = None) -> Pattern:
    """All words of one row of a matrix, `leaf[i, :]`, with one bit position or value for all.

    Args:
      model: "bit-flip", "stuck-at-0" or "stuck-at-1" of one bit position, or "zero".
      bits: positions that may be faulty; None for all.
    """
    return _slab("rows", lambda rank: (0,) if rank == 2 else None, model, bits)


def column(*, model: str = "bit-flip", bits: Iterable[int] | None = None) -> Pattern:
    """All words of one column of a matrix, `leaf[:, j]`. Arguments as of `row`."""
    return _slab("columns", lambda rank: (1,) if rank == 2 else None, model, bits)


def channel(
    *, model: str = "bit-flip", bits: Iterable[int] | None = None, order: str = "keras"
) -> Pattern:
    """All words of one output channel of a layer's weights, of two axes or more.

    Args:
      model, bits: as of `row`.
      order: of the weights' axes, "keras" for Keras's and Flax's [*K, in, out], or "torch" for
        [out, in, *K].
    """
    last = _checked_order(order) == "keras"
    return _slab(
        "channels", lambda rank: (rank - 1 if last else 0,) if rank > 1 else None, model, bits
    )


def kernel(
    *, model: str = "bit-flip", bits: Iterable[int] | None = None, order: str = "keras"
) -> Pattern:
    """All words between one input and one output channel of a convolution. Arguments as of
    `channel`."""
    last = _checked_order(order) == "keras"
    return _slab(
        "kernels",
        lambda rank: ((rank - 2, rank - 1) if last else (0, 1)) if rank > 2 else None,
        model,
        bits,
    )


def stuck_lane(
    lane: int,
    *,
    of: int,
    model: str = "stuck-at-0",
    bits: Iterable[int] | None = None,
    order: str = "keras",
) -> Pattern:
    """Every `of`-th output channel of a layer, from channel `lane` on, has one bit stuck: what the
    weight register of one column of a weight-stationary array of `of` columns would hold.

    It leaves out that a register holds one weight at a time: stuck bits of the partial sums, of the
    multiplier and of the control, and what another mapping of channels to columns would reach.

    Args:
      lane: 0 to of - 1.
      of: columns of the array, at most the channels of the layer.
      model, bits, order: as of `channel`.
    """
    checked_integer("of", of, 1)
    if checked_integer("lane", lane, 0) >= of:
        raise ValueError(f"lane {lane} is out of range: allowed are 0 to {of - 1}")
    axis = -1 if _checked_order(order) == "keras" else 0

    def chosen(shape: tuple[int, ...]) -> np.ndarray:
        index = np.arange(math.prod(shape)).reshape(shape)
        return np.take(index, np.arange(lane, shape[axis], of), axis=axis).ravel()

    return _of_elements(
        f"lane {lane} of {of}",
        lambda shape: int(len(shape) > 1 and shape[axis] > lane),
        lambda shape, number: chosen(shape),
        model,
        bits,
    )


def words(function: Callable[[np.random.Generator, np.ndarray, str], np.ndarray]) -> Pattern:
    """The user's own corruption of the stored words of a leaf.

    Args:
      function: `fn(random, words, path) -> words`: of a leaf's words, unsigned, in its shape, those
        that are stored instead. An experiment is in one leaf, drawn in proportion to its bits.
        Everything random must come from `random`, which is the experiment's own.

    >>> def swapped_halves(random, words, path):
    ...     return (words << 16) | (words >> 16)
    >>> faults = sample(0, {"w": np.ones(3, np.float32)}, 2, words(swapped_halves))
    """

    def faults(leaves: _Leaves, key: Any, num_experiments: int) -> _Rows:
        sizes = np.array([leaves.size(n) * leaves.width(n) for n in leaves.numbers], np.int64)
        place = _uniform(_generator(key, 0), num_experiments) * sizes.sum()
        which = np.searchsorted(np.cumsum(sizes), place, side="right")
        found = []
        for number, leaf in enumerate(np.array(leaves.numbers)[which].tolist()):
            random = np.random.Generator(generator_of(key, 1, number))
            found.append(_changed_bits(function, random, leaves, leaf, number))
        columns = zip(*found, strict=True) if found else [()] * 4
        return _flips(*(np.concatenate([np.empty(0, np.int64), *c]) for c in columns))

    return Pattern("words", None, faults)


def _changed_bits(
    function: Callable, random: np.random.Generator, leaves: _Leaves, leaf: int, number: int
) -> tuple[np.ndarray, ...]:
    """Experiment, leaf, element and bit of each bit that the user's function changes."""
    stored = np.asarray(leaves.arrays[leaf])
    before = np.ascontiguousarray(stored).view(word_dtype(stored.dtype)).reshape(stored.shape)
    after = np.asarray(function(random, before.copy(), leaves.empty.paths[leaf]))
    if after.shape != before.shape or after.dtype != before.dtype:
        raise ValueError(
            f"the function returned {after.dtype}{list(after.shape)} for the words of "
            f"{leaves.empty.paths[leaf]}: allowed is {before.dtype}{list(before.shape)}"
        )
    difference = (before ^ after).reshape(-1)
    element = np.flatnonzero(difference)
    bits = difference[element, None] >> np.arange(leaves.width(leaf), dtype=before.dtype) & 1
    place, bit = np.nonzero(bits)
    same = np.full(len(bit), number), np.full(len(bit), leaf)
    return *same, element[place], bit


def _slab(
    name: str, axes: Callable[[int], tuple[int, ...] | None], model: str, bits: Any
) -> Pattern:
    """All words of a leaf at one index along some axes."""

    def count(shape: tuple[int, ...]) -> int:
        fixed = axes(len(shape))
        return 0 if fixed is None else math.prod(shape[axis] for axis in fixed)

    def elements(shape: tuple[int, ...], number: int) -> np.ndarray:
        fixed = axes(len(shape)) or ()
        place = np.unravel_index(number, [shape[axis] for axis in fixed])
        index: list[Any] = [slice(None)] * len(shape)
        for axis, at in zip(fixed, place, strict=True):
            index[axis] = at
        return np.arange(math.prod(shape)).reshape(shape)[tuple(index)].ravel()

    return _of_elements(name, count, elements, model, bits)


def _of_elements(
    name: str,
    count: Callable[[tuple[int, ...]], int],
    elements: Callable[[tuple[int, ...], int], np.ndarray],
    model: str,
    bits: Iterable[int] | None,
) -> Pattern:
    """Some elements of a leaf, each with the same bit and model: `count` sets of them a leaf."""
    if checked_model(model) not in (*BIT_MODELS, "zero"):
        allowed = ", ".join((*BIT_MODELS, "zero"))
        raise ValueError(f"model {model!r} has no pattern: allowed are {allowed}")
    code = FAULT_MODELS.index(model)
    chosen = None if bits is None else sorted({checked_integer("bit", bit, 0) for bit in bits})

    def positions(leaves: _Leaves, leaf: int) -> list[int]:
        if model == "zero":
            return [-1]
        every = range(leaves.width(leaf))
        return [*every] if chosen is None else [bit for bit in chosen if bit in every]

    def sites(leaves: _Leaves, leaf: int) -> int:
        return count(leaves.empty.shapes[leaf]) * len(positions(leaves, leaf))

    def faults(leaves: _Leaves, leaf: np.ndarray, site: np.ndarray) -> _Rows:
        parts = []
        for number, (here, rest) in enumerate(zip(leaf.tolist(), site.tolist(), strict=True)):
            possible = positions(leaves, here)
            which, place = divmod(rest, len(possible))
            of_leaf = elements(leaves.empty.shapes[here], which)
            fill = np.full(len(of_leaf), 1)
            parts.append((number * fill, here * fill, of_leaf, possible[place] * fill, code * fill))
        columns = zip(*parts, strict=True) if parts else [()] * 5
        return _Rows(*(np.concatenate([np.empty(0, np.int64), *c]) for c in columns))

    return Pattern(name, sites, faults)


def _flips(experiment: Any, leaf: Any, element: Any, bit: Any) -> _Rows:
    return _Rows(experiment, leaf, element, bit, np.full(len(experiment), _FLIP))


def _grouped(params: PyTree, rows: _Rows, count: int, possible: int | None) -> FaultGroups:
    """Experiments 0 to count - 1; one without faults holds a fault that does nothing."""
    empty = np.setdiff1d(np.arange(count), rows.experiment)
    if len(empty):
        leaf = int(rows.leaf[0]) if len(rows.leaf) else 0
        none = np.zeros_like(empty)
        nothing = _Rows(empty, none + leaf, none, none - 1, none + _NULL)
        rows = _Rows(*(np.concatenate(both) for both in zip(rows, nothing, strict=True)))
    faults = FaultList.from_arrays(params, rows.leaf, rows.element, rows.bit, rows.model)
    return dataclasses.replace(faults.grouped(rows.experiment.astype(np.int64)), possible=possible)


def _hits(bits: np.random.Philox, length: int, rate: float) -> np.ndarray:
    """Which of `range(length)` are hit, each by itself with probability `rate`: by the gaps between
    them, which are geometric."""
    found, last = [np.empty(0, np.int64)], -1
    while last < length:
        most = int(max(length - last, 0) * rate)
        count = min(64 + most + 4 * math.isqrt(most), 2**22)
        gaps = np.log1p(-_uniform(bits, count)) / math.log1p(-rate)
        steps = 1 + np.minimum(gaps, 2.0**61 / count).astype(np.int64)  # their sum fits
        found.append(last + np.cumsum(steps))
        last = int(found[-1][-1])
    hits = np.concatenate(found)
    return hits[hits < length]


def _uniform(bits: np.random.Philox, count: int) -> np.ndarray:
    """[count] float64 in [0, 1)."""
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def _leaves(params: PyTree, paths: str | Sequence[str]) -> _Leaves:
    empty, chosen = _selected_leaves(params, "bit-flip", paths, None)
    return _Leaves(empty, tuple(leaf for leaf, _ in chosen), jax.tree.leaves(params))


def _counts(pattern: Pattern, leaves: _Leaves) -> list[int]:
    assert pattern.sites is not None, "only called where they are counted"
    counts = [pattern.sites(leaves, leaf) for leaf in leaves.numbers]
    if not any(counts):
        shapes = [leaves.empty.shapes[leaf] for leaf in leaves.numbers]
        raise ValueError(
            f"no leaf has {pattern.name}: the leaves are {', '.join(map(str, shapes[:5]))}"
        )
    return counts


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, Pattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}: allowed is one such as burst(2), called"
        )


def _checked_order(order: str) -> str:
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: allowed are {', '.join(ORDERS)}")
    return order
