"""Fault sites as people write them, (path, index, bit) or rows of CSV, checked against leaves."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfi.faults._transforms import BIT_MODELS, FAULT_MODELS, PyTree, describe_leaves, word_bits

CSV_COLUMNS = ("path", "index", "bit", "model", "value", "shape", "dtype")


def checked_model(model: str) -> str:
    """`model` if it is a fault model; ValueError, listing those allowed, if not."""
    if model not in FAULT_MODELS:
        raise ValueError(f"unknown fault model {model!r}: allowed are {', '.join(FAULT_MODELS)}")
    return model


def checked_integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; TypeError if it is none, ValueError if it is less than `least`.

    >>> checked_integer("batch_size", np.int64(100), 1)
    100
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} {value!r} is not an integer")
    if least is not None and number < least:
        raise ValueError(f"{name} {value} is out of range: allowed are integers >= {least}")
    return number


def parse_index(text: str) -> tuple[int, ...] | int:
    """`(3, 0, 2)` as a tuple, `12` as an int. ValueError for anything else."""
    if re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if not re.fullmatch(r"\((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?\)", text):
        shown = text if len(text) < 80 else text[:80] + "..."
        raise ValueError(f"{shown!r} is not an index: allowed are a tuple (3, 0, 2) and an integer")
    return tuple(int(i) for i in re.findall(r"[0-9]+", text))


def csv_sites(
    rows: Iterable[list[str]], described: Mapping[str, tuple[tuple[int, ...], str]]
) -> Iterator[tuple]:
    """Rows of `CSV_COLUMNS` as (path, index, bit, model, value); ValueError names the fault."""
    for number, row in enumerate(rows):
        try:
            if len(row) != len(CSV_COLUMNS):
                raise ValueError(f"it has {len(row)} fields, not {len(CSV_COLUMNS)}")
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


def parse_sites(sites: Iterable[tuple], params: PyTree) -> list[tuple]:
    """(path, index, bit, model, value) as columns leaf, element, bit, model code and value.

    Raises ValueError naming the first site that does not fit `params`.
    """
    paths, shapes, dtypes = describe_leaves(params)
    number_of = {path: number for number, path in enumerate(paths)}
    parsed: list[tuple] = []
    for row, site in enumerate(sites):
        try:
            path, index, bit, model, value = site
            if not isinstance(path, str):
                raise ValueError(f"{path!r} is no leaf's path: the leaves are {', '.join(paths)}")
            if path not in number_of:
                raise ValueError(f"no leaf {path!r}: the leaves are {', '.join(paths)}")
            leaf = number_of[path]
            element = _flat_index(index, shapes[leaf])
            bit = _checked_bit(bit, checked_model(model), dtypes[leaf])
            value = checked_value(value, model, dtypes[leaf])
        except (ValueError, TypeError) as error:
            raise ValueError(f"fault {row}: {error}") from None
        parsed.append((leaf, element, bit, FAULT_MODELS.index(model), value))
    return list(zip(*parsed, strict=True)) or [()] * 5


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
        if int(float(value)) != int(value):
            raise ValueError(
                f"value {value} is no float64, which a fault's value is: allowed are integers that "
                f"are, such as {int(float(value))}"
            )
    return float(value)
