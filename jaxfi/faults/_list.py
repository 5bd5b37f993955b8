"""A list of faults as a table on the host: made from sites or CSV, checked, sliced, and batched."""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import io
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.data._files import write_whole
from jaxfi.faults._sites import CSV_COLUMNS, checked_model, csv_sites, parse_sites
from jaxfi.faults._transforms import (
    BIT_MODELS,
    FAULT_MODELS,
    Fault,
    PyTree,
    describe_leaves,
    described_leaves,
    word_bits,
    word_dtype,
)

_COLUMNS = ("leaf", "element", "bit", "model", "value")
_COLUMN_TYPES = (np.int32, np.int64, np.int16, np.uint8, np.float64)


class Stratum(NamedTuple):
    """Fault sites that a list is drawn from: each element of a leaf, with each bit and model.

    Attributes:
      leaf: position in `FaultList.paths`.
      bits: bit positions; (-1,) where the model has no bit.
      num_models: 2 where both polarities of stuck-at are drawn, else 1.
    """

    leaf: int
    bits: tuple[int, ...]
    num_models: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FaultList:
    """An ordered list of F faults in the leaves of one parameter tree (NumPy, on the host).

    Attributes:
      paths, shapes, dtypes: name, shape and dtype name of every leaf, in tree order.
      leaf: [F] int32, position in `paths`.
      element: [F] int64, flat index in the leaf, C order.
      bit: [F] int16, 0 is the least significant bit; -1 where the model has no bit.
      model: [F] uint8, position in `FAULT_MODELS`.
      value: [F] float64, the value written by the model "value"; NaN elsewhere.
      drawn_from: what the list is a sample or the whole of; None where that is not known: a list
        of given sites or from a file, or a part of a list. Not compared by `==`.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    leaf: np.ndarray
    element: np.ndarray
    bit: np.ndarray
    model: np.ndarray
    value: np.ndarray
    drawn_from: tuple[Stratum, ...] | None = dataclasses.field(default=None, kw_only=True)

    @classmethod
    def from_arrays(
        cls,
        params: PyTree,
        leaf: Any,
        element: Any,
        bit: Any,
        model: Any,
        value: Any = np.nan,
        drawn_from: tuple[Stratum, ...] | None = None,
    ) -> FaultList:
        """A list from arrays that broadcast to [F]; `model` is a name or codes. Not validated."""
        if isinstance(model, str):
            model = FAULT_MODELS.index(checked_model(model))
        columns = typed_columns(leaf, element, bit, model, value)
        return cls(*describe_leaves(params), *columns, drawn_from=drawn_from)

    @classmethod
    def from_sites(
        cls,
        sites: Iterable[tuple[str, int | Sequence[int], int | None]],
        params: PyTree,
        *,
        model: str = "bit-flip",
        value: float | None = None,
    ) -> FaultList:
        """A list from `(path, index, bit)`: index a tuple or a flat int, bit None for whole words.

        `value` is what the model "value" writes, rounded to the leaf's dtype. Raises ValueError
        naming the first fault that does not fit `params`, TypeError for what is no list.
        """
        checked_model(model)
        rows = ((*site, model, value) for site in _triples(sites))
        return cls.from_arrays(params, *parse_sites(rows, params))

    def __len__(self) -> int:
        return len(self.leaf)

    def grouped(self, ids: Any) -> FaultGroups:
        """Experiments of several faults each, which are faulty together.

        Args:
          ids: [F] integers or texts, the experiment of each fault. Several faults of one element
            all change it, in the order of the list.

        Returns the experiments in the order of their ids: a campaign on them has one row for each.
        Raises ValueError for another number of ids, or a list that is grouped already.

        >>> params = {"w": np.ones((2, 3), np.float32)}
        >>> faults = FaultList.from_sites([("w", 0, 30), ("w", 5, 1), ("w", 1, 2)], params)
        >>> len(faults.grouped([7, 7, 9]))
        2
        """
        given = np.asarray(ids)
        if given.shape != (len(self),) or given.dtype.kind not in "iuUS":
            raise ValueError(
                f"ids are {given.dtype} {given.shape}: allowed is an integer or a text for each of "
                f"the {len(self)} faults"
            )
        _, number = np.unique(given, return_inverse=True)
        order = np.argsort(number, kind="stable")
        first = np.diff(number[order], prepend=-1) > 0
        others = order[~first]
        return FaultGroups.of(self[order[first]], self[others], number[others])

    def counts_by_leaf(self) -> np.ndarray:
        """How many faults each leaf has, one int64 a leaf."""
        return np.bincount(self.leaf, minlength=len(self.paths))

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        bits, counts = np.unique(self.bit, return_counts=True)
        most = counts.max(initial=1)
        bars = "".join(
            f'<rect x="{14 * n}" y="{40 - 40 * count / most:.1f}" width="12" '
            f'height="{40 * count / most:.1f}" fill="#7fa8c9"><title>'
            f"{'no bit' if bit < 0 else f'bit {bit}'}: {count:,} faults</title></rect>"
            for n, (bit, count) in enumerate(zip(bits[::-1], counts[::-1], strict=True))
        )
        svg = f'<svg width="{14 * len(bits)}" height="40" role="img">{bars}</svg>'
        return f"<div><pre>{html.escape(repr(self))}</pre>{svg}<div>faults by bit</div></div>"

    def _lines(self) -> list[str]:
        """Sizes, models and bits, and how to go on."""
        models = _most(np.array(FAULT_MODELS)[self.model])
        where = _most(np.array(self.paths)[self.leaf])
        bits = np.unique(self.bit[self.bit >= 0])
        of_bits = f"; bits {bits.min()} to {bits.max()}" if len(bits) else ""
        return [
            f"FaultList: {len(self):,} faults in {len(np.unique(self.leaf))} of "
            f"{len(self.paths)} leaves, of {self.population:,} possible",
            f"  {models}{of_bits}",
            f"  {where}",
            "  go on: [rows], +, .values(params), .to_csv(path), jaxfi.run_campaign",
        ]

    def __getitem__(self, rows: Any) -> FaultList:
        """The faults at `rows`, a list again: a slice, a mask, an integer array or one integer."""
        columns: dict[str, Any] = {
            name: np.atleast_1d(getattr(self, name)[rows]) for name in _COLUMNS
        }
        return FaultList(*self._leaves(), **columns)

    def __add__(self, other: FaultList) -> FaultList:
        """Both lists, of the same parameters, one after the other; ValueError for others.

        Where it is known what each was drawn from, the possible faults add up, as of flips and
        stuck-ats; of two draws from the same faults they are counted twice, which makes an interval
        rather too wide than too narrow.
        """
        if self._leaves() != other._leaves():
            raise ValueError("the fault lists are for different parameters: allowed are the same")
        columns: dict[str, Any] = {
            n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _COLUMNS
        }
        known = self.drawn_from is not None and other.drawn_from is not None
        drawn_from = (*(self.drawn_from or ()), *(other.drawn_from or ())) if known else None
        return FaultList(*self._leaves(), **columns, drawn_from=drawn_from)

    def nulls(self, elements: np.ndarray) -> FaultList:
        """Faults that change nothing, at these elements of the first fault's leaf."""
        row = self[np.zeros(len(elements), np.int64)]
        code = np.full(len(elements), FAULT_MODELS.index("null"), np.uint8)
        none: dict[str, Any] = {
            "bit": np.full_like(row.bit, -1),
            "value": np.full_like(row.value, np.nan),
        }
        return dataclasses.replace(row, element=elements.astype(np.int64), model=code, **none)

    def padded(self, length: int) -> FaultList:
        """The list, made `length` long with null faults."""
        return self + self.nulls(np.zeros(length - len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FaultList):
            return NotImplemented
        same_leaves = self._leaves() == other._leaves()
        return same_leaves and all(
            np.array_equal(getattr(self, c), getattr(other, c), equal_nan=c == "value")
            for c in _COLUMNS
        )

    @property
    def population(self) -> int:
        """Possible faults that the list is a sample or the whole of; see `population_of`."""
        return self.population_of()

    def population_of(
        self, leaves: Sequence[int] | np.ndarray | None = None, bit: int | None = None
    ) -> int:
        """Possible faults in these leaves (None: all) and of this bit position (None: any).

        They are the sites in `drawn_from`. Where that is not known they are all single faults of
        the parameters, elements x word bits x 2 transitions: no fewer, so that an interval is
        rather too wide than too narrow.
        """
        strata = self.drawn_from
        if strata is None:
            widths = [word_bits(dtype) for dtype in self.dtypes]
            strata = tuple(Stratum(n, tuple(range(w)), 2) for n, w in enumerate(widths))
        return sum(
            int(np.prod(self.shapes[leaf], dtype=object)) * num_models
            for leaf, bits, num_models in strata
            if leaves is None or leaf in leaves
            for site_bit in bits
            if bit is None or site_bit == bit
        )

    def _leaves(self) -> tuple:
        return self.paths, self.shapes, self.dtypes

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """`keep` and `flip` of every fault, [F] uint64, in the low bits of the leaf's width."""
        width = np.array([word_bits(d) for d in self.dtypes], np.uint64)[self.leaf]
        ones = np.uint64(2**64 - 1) >> (np.uint64(64) - width)
        bit = np.uint64(1) << np.maximum(self.bit, 0).astype(np.uint64)
        name = np.array(FAULT_MODELS)[self.model]
        keep = np.where(name == "bit-flip", ones, ones & ~bit)
        keep = np.where(name == "null", ones, keep)
        keep = np.where(np.isin(name, ("zero", "value")), np.uint64(0), keep)
        flip = np.where(np.isin(name, ("bit-flip", "stuck-at-1")), bit, np.uint64(0))
        for number in np.unique(self.leaf[name == "value"]):
            rows = (name == "value") & (self.leaf == number)
            dtype = jnp.dtype(self.dtypes[number])
            with np.errstate(over="ignore"):
                flip[rows] = self.value[rows].astype(dtype).view(word_dtype(dtype))
        return keep, flip

    def batch(self) -> Fault:
        """All faults as one `Fault` of [F] arrays, to vmap `inject` over.

        Raises OverflowError for a leaf of 2**31 elements or more; else as `check_width`.
        """
        return jax.tree.map(jnp.asarray, self.on_host())

    def on_host(self) -> Fault:
        """`batch` in NumPy arrays."""
        self.check_width()
        if len(self) and self.element.max() >= 2**31 - 1:
            raise OverflowError("leaves of 2**31 elements or more are not supported")
        word = np.uint64 if 64 in map(word_bits, self.dtypes) else np.uint32
        keep, flip = (mask.astype(word) for mask in self.masks())
        return Fault(self.leaf, self.element.astype(np.int32), keep, flip)  # type: ignore[arg-type]

    def fault(self, row: int) -> Fault:
        """The fault in `row`, as scalars for `inject`."""
        return jax.tree.map(lambda x: x[0], self[np.array([row])].batch())

    def words(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """The stored words before and after each fault, two [F] uint64 arrays."""
        self.validate(params)
        before = np.zeros(len(self), np.uint64)
        leaves = jax.tree.leaves(params)
        for number in np.unique(self.leaf):
            rows = self.leaf == number
            stored = np.asarray(leaves[number]).reshape(-1)
            before[rows] = stored[self.element[rows]].view(word_dtype(stored.dtype))
        keep, flip = self.masks()
        return before, (before & keep) ^ flip

    def activated(self, params: PyTree) -> np.ndarray:
        """[F] bool: the fault changes the stored word. A stuck-at fault often does not."""
        before, after = self.words(params)
        return before != after

    def values(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """The parameter's value before and after each fault, two [F] float64 arrays.

        Exact, but for 64-bit integers beyond 2**53.
        """
        numbers = []
        for words in self.words(params):
            number = np.zeros(len(self), np.float64)
            for leaf in np.unique(self.leaf):
                rows = self.leaf == leaf
                dtype = jnp.dtype(self.dtypes[leaf])
                stored = words[rows].astype(word_dtype(dtype)).view(dtype)
                with np.errstate(invalid="ignore"):  # a fault can make a signalling NaN
                    number[rows] = stored.astype(np.float64)
            numbers.append(number)
        return numbers[0], numbers[1]

    def validate(self, params: PyTree) -> None:
        """Raises ValueError, naming path, shape and dtype, if the list is for other parameters."""
        here = described_leaves(params)
        for path, shape, dtype in zip(*self._leaves(), strict=True):
            if here.get(path) != (shape, dtype):
                found = "no such leaf" if path not in here else "{1} {0}".format(*here[path])
                raise ValueError(
                    f"the fault list is for other parameters: it has {path} {dtype} {shape}, "
                    f"the parameters have {found}"
                )
        if len(here) != len(self.paths):
            extra = sorted(set(here) - set(self.paths))
            raise ValueError(f"the fault list is for other parameters: it lacks leaf {extra[0]}")
        if tuple(here) != self.paths:
            raise ValueError(
                "the fault list is for other parameters: it has the leaves in the order "
                f"{', '.join(self.paths)}, the parameters have {', '.join(here)}"
            )

    def indices(self) -> list[tuple[int, ...]]:
        """The index of each fault's element in its leaf, F tuples."""
        found: list[tuple[int, ...]] = [()] * len(self)
        for leaf in np.unique(self.leaf):
            rows = np.flatnonzero(self.leaf == leaf)
            index = np.unravel_index(self.element[rows], self.shapes[leaf] or (1,))
            for row, where in zip(rows, np.stack(index, axis=1).tolist(), strict=True):
                found[row] = tuple(where) if self.shapes[leaf] else ()
        return found

    def check_width(self) -> None:
        """Raises ValueError for a leaf of 64-bit words where JAX would cut them to 32 bits."""
        for path, dtype in zip(self.paths, self.dtypes, strict=True):
            if word_bits(dtype) == 64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
                raise ValueError(
                    f"leaf {path} is {dtype}, which JAX cuts to 32 bits: "
                    "set jax_enable_x64, or cast it before drawing faults"
                )

    def check_injectable(self, params: PyTree) -> None:
        """All that can be known before a campaign on `params` starts.

        Raises ValueError for an empty list; else as `validate`, `check` and `check_width`.
        """
        if not len(self):
            raise ValueError("the fault list is empty: allowed is one fault or more")
        self.validate(params)
        self.check()
        self.check_width()

    def check(self) -> None:
        """Raises ValueError if a fault is outside its leaf or word: for lists from strangers."""
        for name, dtype in zip(_COLUMNS, _COLUMN_TYPES, strict=True):
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != (len(self),):
                raise ValueError(f"column {name} is {column.dtype} {column.shape}")
        if not len(self.paths) == len(self.shapes) == len(self.dtypes):
            raise ValueError("it has other numbers of paths, shapes and dtypes")
        sizes = np.array([int(np.prod(shape, dtype=object)) for shape in self.shapes], np.int64)
        widths = np.array([word_bits(dtype) for dtype in self.dtypes], np.int64)
        if not ((self.leaf >= 0) & (self.leaf < len(self.paths))).all():
            raise ValueError("a fault is in no leaf")
        if not ((self.element >= 0) & (self.element < sizes[self.leaf])).all():
            raise ValueError("a fault's element is outside its leaf")
        if not (self.model < len(FAULT_MODELS)).all():
            raise ValueError("a fault has an unknown model")
        has_bit = self.model < len(BIT_MODELS)
        inside = (self.bit >= 0) & (self.bit < widths[self.leaf])
        if not np.where(has_bit, inside, self.bit == -1).all():
            raise ValueError("a fault's bit is outside its word")
        for stratum in self.drawn_from or ():
            if not 0 <= stratum.leaf < len(self.paths) or stratum.num_models not in (1, 2):
                raise ValueError(f"it cannot be drawn from {stratum}")

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one row a fault: path, index, bit, model, value, the leaf's shape and dtype.

        The file is whole or as it was before. Raises OSError naming it.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(CSV_COLUMNS)
        columns = (getattr(self, name).tolist() for name in ("leaf", "bit", "model", "value"))
        for index, leaf, bit, model, value in zip(self.indices(), *columns, strict=True):
            name = FAULT_MODELS[model]
            bit_text = bit if name in BIT_MODELS else ""
            value_text = repr(value) if name == "value" else ""
            described = (bit_text, name, value_text, self.shapes[leaf], self.dtypes[leaf])
            writer.writerow((self.paths[leaf], index, *described))
        write_whole(Path(path), text.getvalue().encode(), os.getpid())

    @classmethod
    def from_csv(cls, path: str | os.PathLike, params: PyTree) -> FaultList:
        """Reads what `to_csv` wrote. Raises ValueError naming the first fault that does not fit."""
        # Bytes that are not UTF-8 become surrogates, which no field allows: the row is named.
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = tuple(next(reader, ()))
                if header != CSV_COLUMNS:
                    raise ValueError(f"columns are {header!r}, not {CSV_COLUMNS}")
                rows = csv_sites(reader, described_leaves(params))
                return cls.from_arrays(params, *parse_sites(rows, params))
            except csv.Error as error:
                raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FaultGroups(FaultList):
    """E experiments, each of one fault or more that are faulty together. `FaultList.grouped`.

    As a list it is one of E rows, of each experiment's first fault: by that one an experiment is
    counted with a leaf, a bit and a model.

    Attributes:
      others: the faults behind the first, experiment by experiment.
      owner: [K] int64, the experiment of each of them, rising.
      possible: experiments that these are a sample of; None where that is not known.
    """

    others: FaultList = dataclasses.field(kw_only=True)
    owner: np.ndarray = dataclasses.field(kw_only=True)
    possible: int | None = dataclasses.field(default=None, kw_only=True)

    @classmethod
    def of(
        cls, first: FaultList, others: FaultList, owner: np.ndarray, possible: int | None = None
    ) -> FaultGroups:
        """Experiments of these first faults and others; see the attributes."""
        parts: dict[str, Any] = {
            **dict(zip(("paths", "shapes", "dtypes"), first._leaves(), strict=True)),
            **{name: getattr(first, name) for name in _COLUMNS},
            **{"others": others, "owner": np.asarray(owner, np.int64), "possible": possible},
        }
        return cls(**parts)

    @property
    def first(self) -> FaultList:
        """The first fault of each experiment."""
        return FaultList(*self._leaves(), *(getattr(self, name) for name in _COLUMNS))

    @property
    def sizes(self) -> np.ndarray:
        """[E] faults of each experiment."""
        return 1 + np.bincount(self.owner, minlength=len(self))

    @property
    def is_spread(self) -> np.ndarray:
        """[E] bool: the experiment's faults are in several leaves."""
        spread = np.zeros(len(self), bool)
        spread[self.owner[self.others.leaf != self.leaf[self.owner]]] = True
        return spread

    def grouped(self, ids: Any) -> FaultGroups:
        raise ValueError("the list is grouped already: allowed is to group single faults")

    def __getitem__(self, rows: Any) -> FaultGroups:
        rows = np.atleast_1d(np.arange(len(self))[rows])
        start, stop = (np.searchsorted(self.owner, rows, side=side) for side in ("left", "right"))
        owner = np.repeat(np.arange(len(rows)), stop - start)
        before = np.repeat(np.cumsum(stop - start) - (stop - start), stop - start)
        chosen = np.repeat(start, stop - start) + np.arange(len(owner)) - before
        return FaultGroups.of(self.first[rows], self.others[chosen], owner)

    def __add__(self, other: FaultList) -> FaultGroups:
        return _joined(self, other)

    def __radd__(self, other: FaultList) -> FaultGroups:
        return _joined(other, self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FaultGroups):
            return False if isinstance(other, FaultList) else NotImplemented
        same = self.first == other.first and self.others == other.others
        return same and np.array_equal(self.owner, other.owner)

    def nulls(self, elements: np.ndarray) -> FaultList:
        return self.first.nulls(elements)

    def population_of(
        self, leaves: Sequence[int] | np.ndarray | None = None, bit: int | None = None
    ) -> int:
        """Possible experiments; where that is not known, or of a part, more than any list has."""
        whole = leaves is None and bit is None
        return self.possible if whole and self.possible is not None else 2**62

    def on_host(self) -> Fault:
        """[E, K] arrays; an experiment of fewer faults is filled up with some of no leaf, which do
        nothing. K is a power of two, so that few programs are compiled."""
        first, more = self.first.on_host(), self.others.on_host()
        most = int(self.sizes.max(initial=1))
        width = 1 << (most - 1).bit_length()
        place = np.arange(len(self.owner)) - np.searchsorted(self.owner, self.owner) + 1
        nothing = (-1, 0, np.iinfo(first.keep.dtype).max, 0)
        filled: list[Any] = []
        for column, rest, fill in zip(first, more, nothing, strict=True):
            array = np.full((len(self), width), fill, column.dtype)
            array[:, 0], array[self.owner, place] = column, rest
            filled.append(array)
        return Fault(*filled)

    def fault(self, row: int) -> Fault:
        """The experiment in `row`, its faults as [k] arrays for `inject`."""
        (row,) = np.atleast_1d(np.arange(len(self))[row])
        both = self.first[row] + self.others[self.owner == row]
        return both.batch()

    def words(self, params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        """Of each experiment's first fault."""
        return self.first.words(params)

    def activated(self, params: PyTree) -> np.ndarray:
        """[E] bool: the faults together change a stored word."""
        changed = np.zeros(len(self), bool)
        together = np.concatenate([np.arange(len(self)), self.owner])
        both = self.first + self.others
        before, _ = both.words(params)
        keep, flip = both.masks()
        after: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        order = np.argsort(together, kind="stable")
        places = zip(together[order].tolist(), both.leaf[order].tolist(),
                     both.element[order].tolist(), order.tolist(), strict=True)  # fmt: skip
        for experiment, leaf, element, row in places:
            place = experiment, leaf, element
            word, start = after.get(place, (before[row], before[row]))
            after[place] = (word & keep[row]) ^ flip[row], start
        for (experiment, *_), (word, start) in after.items():
            changed[experiment] |= bool(word != start)
        return changed

    def validate(self, params: PyTree) -> None:
        self.first.validate(params)
        self.others.validate(params)

    def check(self) -> None:
        self.first.check()
        self.others.check()
        known = len(self.owner) == len(self.others) and (np.diff(self.owner) >= 0).all()
        if not known or not ((self.owner >= 0) & (self.owner < len(self))).all():
            raise ValueError("its groups are of no experiment")

    def to_csv(self, path: str | os.PathLike) -> None:
        raise ValueError(
            "experiments of several faults have no CSV of single ones: keep them in a campaign's "
            "workdir, or use jaxfi.convert.write_fault_list"
        )

    def _lines(self) -> list[str]:
        """Sizes, and what their first faults are."""
        sizes = self.sizes
        many = f"{sizes.min(initial=1)} to {sizes.max(initial=1):,}"
        _, *first, _ = self.first._lines()
        return [
            f"FaultGroups: {len(self):,} experiments of {many} faults, "
            f"{len(self) + len(self.owner):,} together; their first faults:",
            *first,
            "  go on: [rows], +, jaxfi.run_campaign",
        ]


def _joined(one: FaultList, two: FaultList) -> FaultGroups:
    """Experiments of both lists, of which one has groups."""
    first = [some.first if isinstance(some, FaultGroups) else some for some in (one, two)]
    others, owner = [first[0][:0]], [np.zeros(0, np.int64)]
    for some, offset in ((one, 0), (two, len(one))):
        if isinstance(some, FaultGroups):
            others.append(some.others)
            owner.append(some.owner + offset)
    more = functools.reduce(operator.add, others)
    return FaultGroups.of(first[0] + first[1], more, np.concatenate(owner))


def typed_columns(leaf: Any, element: Any, bit: Any, model: Any, value: Any) -> list[np.ndarray]:
    """A list's columns from arrays that broadcast to [F]; `model` is codes."""
    columns = np.broadcast_arrays(leaf, element, bit, model, value)
    typed = zip(columns, _COLUMN_TYPES, strict=True)
    return [np.array(column, dtype).reshape(-1) for column, dtype in typed]


def _most(values: np.ndarray, shown: int = 4) -> str:
    """`120 conv1/kernel, 30 fc/kernel, 5 in 3 others`."""
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    texts = [f"{counts[n]:,} {names[n]}" for n in order[:shown]]
    if len(order) > shown:
        texts.append(f"{counts[order[shown:]].sum():,} in {len(order) - shown} others")
    return ", ".join(texts) or "none"


def _triples(sites: Any) -> Iterator[Sequence]:
    """`sites`, or ValueError naming the first that is no (path, index, bit)."""
    allowed = "allowed is a list of (path, index, bit)"
    if not isinstance(sites, Iterable) or isinstance(sites, str | bytes):
        raise TypeError(f"sites is {sites!r}: {allowed}")
    for row, site in enumerate(sites):
        if not isinstance(site, Sequence) or isinstance(site, str | bytes) or len(site) != 3:
            raise ValueError(f"fault {row}: {site!r} is no site: {allowed}")
        yield site
