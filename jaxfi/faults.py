"""Faults in stored parameters, as pure transforms of a parameter tree.

Every fault model is one operation on the stored word of one element::

    word' = (word & keep) ^ flip

bit-flip keeps all bits and flips one; stuck-at clears one bit and sets it or not; zero and value
clear the word and write another. So a batch of mixed faults is four arrays, and `inject` has no
branches: it can be jitted and vmapped over any batch.
"""

from __future__ import annotations

import csv
import dataclasses
import operator
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any

FAULT_MODELS = ("bit-flip", "stuck-at-0", "stuck-at-1", "zero", "value", "null")
BIT_MODELS = FAULT_MODELS[:3]  # those that name a bit; the others name a whole word
_CSV_COLUMNS = ("path", "index", "bit", "model", "value", "shape", "dtype")


class Fault(NamedTuple):
    """One fault (scalars), several in the same parameters ([K]), or a batch to vmap over ([F]).

    Attributes:
      leaf: int32, position of the leaf in `jax.tree.flatten` order.
      element: int32, flat index into the leaf, C order.
      keep: unsigned word, the bits of the stored word that survive.
      flip: unsigned word, the bits inverted after that.
    """

    leaf: jax.Array
    element: jax.Array
    keep: jax.Array
    flip: jax.Array


def word_bits(dtype: Any) -> int:
    """Width in bits of a stored word of `dtype`: 8, 16, 32 or 64.

    Raises TypeError for a dtype whose storage is not a whole float or integer word.

    >>> word_bits("bfloat16")
    16
    """
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        bits = jnp.finfo(dtype).bits
    elif jnp.issubdtype(dtype, jnp.integer):
        bits = jnp.iinfo(dtype).bits
    else:
        bits = 0
    if bits != dtype.itemsize * 8:
        raise TypeError(f"cannot inject faults into dtype {dtype}: allowed are floats and integers")
    return bits


def word_dtype(dtype: Any) -> np.dtype:
    """The unsigned integer dtype of the same width as `dtype`."""
    return np.dtype(f"uint{word_bits(dtype)}")


def to_words(array: jax.Array) -> jax.Array:
    """The stored words of `array`, same shape, unsigned."""
    return lax.bitcast_convert_type(array, word_dtype(array.dtype))


def leaf_paths(params: PyTree) -> tuple[str, ...]:
    """Names of the leaves, `conv1/kernel`, in `jax.tree.flatten` order.

    >>> leaf_paths({"conv1": {"kernel": jnp.zeros(3), "bias": jnp.zeros(1)}})
    ('conv1/bias', 'conv1/kernel')
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


def corrupt(array: jax.Array, element: Any, keep: Any, flip: Any) -> jax.Array:
    """`array` with the words at flat index `element` replaced by `(word & keep) ^ flip`.

    Args:
      array: any shape, float or integer dtype.
      element: int scalar or [K], flat indices in C order; one past the end changes nothing.
      keep, flip: unsigned words, shaped like `element`.
    """
    if array.size == 0:
        return array
    words = to_words(array).reshape(-1)
    old = words.at[element].get(mode="clip")
    new = (old & jnp.asarray(keep).astype(words.dtype)) ^ jnp.asarray(flip).astype(words.dtype)
    words = words.at[element].set(new, mode="drop")
    return lax.bitcast_convert_type(words, array.dtype).reshape(array.shape)


def inject(params: PyTree, fault: Fault) -> PyTree:
    """`params` with the fault in it: pure, jit-able, and vmap-able over a batch of faults.

    Args:
      params: any pytree of float or integer arrays.
      fault: scalars for one fault; arrays [K] inject K faults together, in distinct elements.

    Returns:
      A tree like `params`. Only the faulty elements differ.

    >>> params = {"w": jnp.ones((2, 3))}
    >>> faults = FaultList.from_sites([("w", (0, 2), 31)], params)
    >>> inject(params, faults.fault(0))["w"].tolist()
    [[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    faulty = []
    for number, leaf in enumerate(leaves):
        array = jnp.asarray(leaf)
        here = jnp.where(fault.leaf == number, fault.element, array.size)  # out of range: no-op
        faulty.append(corrupt(array, here, fault.keep, fault.flip))
    return jax.tree.unflatten(treedef, faulty)


@dataclasses.dataclass(frozen=True, eq=False)
class FaultList:
    """An ordered list of F faults in the leaves of one parameter tree (NumPy, on the host).

    Attributes:
      paths, shapes, dtypes: name, shape and dtype name of every leaf, in tree order.
      leaf: [F] int32, position in `paths`.
      element: [F] int64, flat index in the leaf, C order.
      bit: [F] int16, 0 is the least significant bit; -1 where the model has no bit.
      model: [F] uint8, position in `FAULT_MODELS`.
      value: [F] float64, the value written by the model "value"; NaN elsewhere.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    leaf: np.ndarray
    element: np.ndarray
    bit: np.ndarray
    model: np.ndarray
    value: np.ndarray

    @classmethod
    def from_arrays(
        cls, params: PyTree, leaf: Any, element: Any, bit: Any, model: Any, value: Any = np.nan
    ) -> FaultList:
        """A list from arrays that broadcast to [F]; `model` is a name or codes. Not validated."""
        if isinstance(model, str):
            model = FAULT_MODELS.index(checked_model(model))
        columns = np.broadcast_arrays(leaf, element, bit, model, value)
        typed = zip(columns, _COLUMN_TYPES, strict=True)
        arrays = [np.array(column, dtype).reshape(-1) for column, dtype in typed]
        return cls(*_describe(params), *arrays)

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
        naming the first fault that does not fit `params`.
        """
        checked_model(model)
        return _parse_sites(((*site, model, value) for site in sites), params)

    def __len__(self) -> int:
        return len(self.leaf)

    def __getitem__(self, rows: Any) -> FaultList:
        """The faults at `rows`, a list again: a slice, a mask, an integer array or one integer."""
        columns: dict[str, Any] = {
            name: np.atleast_1d(getattr(self, name)[rows]) for name in _COLUMNS
        }
        return dataclasses.replace(self, **columns)

    def __add__(self, other: FaultList) -> FaultList:
        """Both lists, of the same parameters, one after the other; ValueError for others."""
        if self._leaves() != other._leaves():
            raise ValueError("the fault lists are for different parameters: allowed are the same")
        columns = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _COLUMNS}
        return dataclasses.replace(self, **columns)

    def nulls(self, elements: np.ndarray) -> FaultList:
        """Faults that change nothing, at these elements of the first fault's leaf."""
        row = self[np.zeros(len(elements), np.int64)]
        code = np.full(len(elements), FAULT_MODELS.index("null"), np.uint8)
        none = {"bit": np.full_like(row.bit, -1), "value": np.full_like(row.value, np.nan)}
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
        """Possible single faults in the parameters: elements x word bits x 2 transitions."""
        sizes = [int(np.prod(shape, dtype=object)) for shape in self.shapes]
        return sum(s * word_bits(d) * 2 for s, d in zip(sizes, self.dtypes, strict=True))

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

        Raises OverflowError for a leaf of 2**31 elements or more, and ValueError for a 64-bit leaf
        where JAX would cut it to 32 bits.
        """
        wide = [p for p, d in zip(self.paths, self.dtypes, strict=True) if word_bits(d) == 64]
        if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise ValueError(f"leaf {wide[0]} has 64-bit words: set jax_enable_x64 or cast it")
        if len(self) and self.element.max() >= 2**31 - 1:
            raise OverflowError("leaves of 2**31 elements or more are not supported")
        word = np.uint64 if wide else np.uint32
        keep, flip = (mask.astype(word) for mask in self.masks())
        return Fault(*map(jnp.asarray, (self.leaf, self.element.astype(np.int32), keep, flip)))

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
        here = _described(params)
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

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one row a fault: path, index, bit, model, value, the leaf's shape and dtype."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_CSV_COLUMNS)
            columns = (getattr(self, name).tolist() for name in ("leaf", "bit", "model", "value"))
            for index, leaf, bit, model, value in zip(self.indices(), *columns, strict=True):
                name = FAULT_MODELS[model]
                bit_text = bit if name in BIT_MODELS else ""
                value_text = repr(value) if name == "value" else ""
                described = (bit_text, name, value_text, self.shapes[leaf], self.dtypes[leaf])
                writer.writerow((self.paths[leaf], index, *described))

    @classmethod
    def from_csv(cls, path: str | os.PathLike, params: PyTree) -> FaultList:
        """Reads what `to_csv` wrote. Raises ValueError naming the first fault that does not fit."""
        # Bytes that are not UTF-8 become surrogates, which no field allows: the row is named.
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = tuple(next(reader, ()))
                if header != _CSV_COLUMNS:
                    raise ValueError(f"columns are {header!r}, not {_CSV_COLUMNS}")
                return _parse_sites(_csv_rows(reader, _described(params)), params)
            except csv.Error as error:
                raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None


_COLUMNS = ("leaf", "element", "bit", "model", "value")
_COLUMN_TYPES = (np.int32, np.int64, np.int16, np.uint8, np.float64)


def checked_model(model: str) -> str:
    """`model` if it is a fault model; ValueError, listing those allowed, if not."""
    if model not in FAULT_MODELS:
        raise ValueError(f"unknown fault model {model!r}: allowed are {', '.join(FAULT_MODELS)}")
    return model


def parse_index(text: str) -> tuple[int, ...] | int:
    """`(3, 0, 2)` as a tuple, `12` as an int. ValueError for anything else."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if not re.fullmatch(r"\((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?\)", text):
        shown = text if len(text) < 80 else text[:80] + "..."
        raise ValueError(f"{shown!r} is not an index: allowed are a tuple (3, 0, 2) and an integer")
    return tuple(int(i) for i in re.findall(r"[0-9]+", text))


def _describe(params: PyTree) -> tuple[tuple, tuple, tuple]:
    """Path, shape and dtype name of every leaf; TypeError for one that is not a numeric array."""
    paths, leaves = leaf_paths(params), jax.tree.leaves(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"leaf {path} is a {type(leaf).__name__}: allowed are arrays")
        if paths.count(path) > 1:
            raise ValueError(f"two leaves have the path {path}: a fault could not name its leaf")
    shapes = tuple(tuple(leaf.shape) for leaf in leaves)
    return paths, shapes, tuple(str(jnp.dtype(leaf.dtype)) for leaf in leaves)


def _described(params: PyTree) -> dict[str, tuple[tuple[int, ...], str]]:
    return {path: (shape, dtype) for path, shape, dtype in zip(*_describe(params), strict=True)}


def _csv_rows(rows: Iterable[list[str]], described: dict) -> Iterator[tuple]:
    for number, row in enumerate(rows):
        try:
            if len(row) != len(_CSV_COLUMNS):
                raise ValueError(f"it has {len(row)} fields, not {len(_CSV_COLUMNS)}")
            path, index, bit, model, value, shape, dtype = row
            expected = described.get(path)
            if expected and (parse_index(shape), dtype) != expected:
                raise ValueError(
                    f"it is for {path} {dtype!r} {shape}, "
                    f"the parameters have {expected[1]} {expected[0]}"
                )
            number_of_bit = int(bit) if bit else None
            site = path, parse_index(index), number_of_bit, model, float(value) if value else None
        except ValueError as error:
            raise ValueError(f"fault {number}: {error}") from None
        yield site


def _parse_sites(rows: Iterable[tuple], params: PyTree) -> FaultList:
    """Checks `(path, index, bit, model, value)` rows against `params`."""
    paths, shapes, dtypes = _describe(params)
    number_of = {path: number for number, path in enumerate(paths)}
    parsed: list[tuple] = []
    for row, site in enumerate(rows):
        try:
            path, index, bit, model, value = site
            if path not in number_of:
                raise ValueError(f"no leaf {path!r}: the leaves are {', '.join(paths)}")
            leaf = number_of[path]
            element = _flat_index(index, shapes[leaf])
            bit = _checked_bit(bit, checked_model(model), dtypes[leaf])
            value = checked_value(value, model, dtypes[leaf])
        except (ValueError, TypeError) as error:
            raise ValueError(f"fault {row}: {error}") from None
        parsed.append((leaf, element, bit, FAULT_MODELS.index(model), value))
    columns = list(zip(*parsed, strict=True)) or [()] * 5
    return FaultList.from_arrays(params, *columns)


def _flat_index(index: int | Sequence[int], shape: tuple[int, ...]) -> int:
    if not isinstance(index, Sequence):
        if 0 <= operator.index(index) < int(np.prod(shape, dtype=object)):
            return operator.index(index)
    elif len(index) == len(shape) and all(0 <= i < n for i, n in zip(index, shape, strict=True)):
        return int(np.ravel_multi_index(tuple(index), shape)) if shape else 0
    raise ValueError(f"index {index} is outside the leaf's shape {shape}")


def _checked_bit(bit: int | None, model: str, dtype: str) -> int:
    if model not in BIT_MODELS:
        return -1
    width = word_bits(dtype)
    if bit is None or not 0 <= operator.index(bit) < width:
        raise ValueError(f"bit {bit} is outside a {dtype} word: allowed are 0 to {width - 1}")
    return operator.index(bit)


def checked_value(value: float | None, model: str, dtype: str) -> float:
    """`value` as the model "value" can write it to `dtype`, NaN for other models; or ValueError."""
    if model != "value":
        return np.nan
    if value is None:
        raise ValueError('the fault model "value" needs a value')
    if jnp.issubdtype(jnp.dtype(dtype), jnp.integer):
        limits = jnp.iinfo(dtype)
        if not (float(value).is_integer() and int(limits.min) <= value <= int(limits.max)):
            allowed = f"integers from {limits.min} to {limits.max}"
            raise ValueError(f"value {value} does not fit {dtype}: allowed are {allowed}")
    return float(value)
