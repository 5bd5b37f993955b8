"""The field's CSV files: fault lists and result tables, in PyTorch's names and index order."""

from __future__ import annotations

import csv
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxfi.convert._layout import (
    Layout,
    from_torch_layout,
    layout_of,
    shapes_of,
    to_torch_layout,
    torch_leaves,
    torch_name,
)
from jaxfi.faults._list import FaultGroups, FaultList
from jaxfi.faults._sites import parse_index
from jaxfi.faults._transforms import BIT_MODELS, FAULT_MODELS, word_bits

PyTree = Any
Path = str | os.PathLike

_FAULT_COLUMNS = ("Injection", "Layer", "TensorIndex", "Bit")
ORDERS = ("torch", "keras")
_COUNT_COLUMNS = ("n_injections", "masked", "non_critical", "critical")


class ResultTable(NamedTuple):
    """What a campaign found for each fault of a list, as the field tabulates it.

    Attributes:
      faults: F faults.
      n_injections: [F] int64, images per fault.
      masked, non_critical, critical: [F] int64, images per outcome; they add to `n_injections`.
    """

    faults: FaultList
    n_injections: np.ndarray
    masked: np.ndarray
    non_critical: np.ndarray
    critical: np.ndarray


def read_fault_list(
    path: Path,
    params: PyTree,
    *,
    model: str = "bit-flip",
    order: str = "torch",
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> FaultList:
    """Reads the field's CSV `Injection,Layer,TensorIndex,Bit`: PyTorch names and index order.

    Args:
      path: the file. Layer is a module (`conv1`, meaning its weight) or a parameter
        (`linear.bias`); TensorIndex a tuple `"(3, 0, 2, 1)"` or a flat integer. Other columns are
        ignored, and rows keep their order. Read too: columns between semicolons or tabs, headings
        of any case, blanks around fields, tuples as `[3, 0]` or `torch.Size([3, 0])`, NumPy's
        integers, a bit of `30.0`, and names behind `module.`.
      params: parameters, or variables, that the list is for; shapes and dtypes are enough.
      model: what the file does not say: "bit-flip", "stuck-at-0" or "stuck-at-1".
      order: of TensorIndex: "torch", or "keras" for Keras's and Flax's, [*K, in, out].
      flattened, kinds: see `from_torch`.

    Returns single faults; where rows share an Injection, which are faulty together, experiments
    (`FaultList.grouped`) in the order of the file. Raises ValueError naming the first line that
    does not fit.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: allowed are {', '.join(ORDERS)}")
    if model not in BIT_MODELS:
        raise ValueError(f"fault model {model!r} names no bit: allowed are {', '.join(BIT_MODELS)}")
    layout = None if order == "keras" else layout_of(shapes_of(params), flattened, kinds)
    site = _site_parser(params, layout)
    rows = list(_read_rows(path, _FAULT_COLUMNS, site))
    faults = FaultList.from_sites([place for _, place in rows], params, model=model)
    places: dict[int, int] = {}
    ids = [places.setdefault(injection, len(places)) for injection, _ in rows]
    return faults if len(places) == len(rows) else faults.grouped(ids)


def write_fault_list(
    path: Path,
    faults: FaultList,
    *,
    flat: bool = False,
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Writes what `read_fault_list` reads; `flat` writes TensorIndex as an integer. The faults of
    an experiment (`FaultList.grouped`) share their Injection.

    Raises ValueError for faults without a bit or of several models, which the CSV cannot tell.
    """
    numbers = np.arange(len(faults))
    if isinstance(faults, FaultGroups):
        numbers = np.concatenate([numbers, faults.owner])
        order = np.argsort(numbers, kind="stable")
        faults, numbers = (faults.first + faults.others)[order], numbers[order]
    sites = _site_texts(faults, flat, _layout_of_list(faults, flattened, kinds))
    _write_rows(path, _FAULT_COLUMNS, zip(numbers.tolist(), sites, strict=True))


def read_results(
    path: Path,
    params: PyTree,
    *,
    model: str = "bit-flip",
    order: str = "torch",
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> ResultTable:
    """Reads a fault list with `n_injections,masked,non_critical,critical` beside it.

    Arguments and errors are those of `read_fault_list`; counts that do not add up are one.
    """
    faults = read_fault_list(
        path, params, model=model, order=order, flattened=flattened, kinds=kinds
    )
    if isinstance(faults, FaultGroups):
        raise ValueError(
            f"{path}: rows share an Injection, whose counts would be several: allowed are results "
            "of single faults"
        )
    counts = _read_rows(path, _COUNT_COLUMNS, _counts)
    return ResultTable(faults, *np.array(list(counts), np.int64).reshape(-1, 4).T)


def write_results(
    path: Path,
    results: ResultTable,
    *,
    flat: bool = False,
    flattened: Mapping[str, int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Writes what `read_results` reads."""
    counts = np.stack(results[1:], axis=1).tolist()
    layout = _layout_of_list(results.faults, flattened, kinds)
    sites = _site_texts(results.faults, flat, layout)
    rows = [(*site, *row) for site, row in zip(sites, counts, strict=True)]
    _write_rows(path, _FAULT_COLUMNS + _COUNT_COLUMNS, enumerate(rows))


def _read_rows(path: Path, columns: tuple[str, ...], parse: Callable) -> Iterator[Any]:
    """`parse` of the named columns of every row; what is wrong is given the file and line."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        heading = file.readline()
        file.seek(0)
        between = next((mark for mark in ";\t" if mark in heading and "," not in heading), ",")
        reader = csv.DictReader(file, restval="", delimiter=between, skipinitialspace=True)
        try:
            if reader.fieldnames:
                reader.fieldnames = [_heading(name, columns) for name in reader.fieldnames]
            twice = [name for name in columns if (reader.fieldnames or []).count(name) > 1]
            if twice:
                raise ValueError(f"column {twice[0]} is there twice")
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"no column {', '.join(missing)} in {reader.fieldnames or []}")
            for row in reader:
                yield parse(*((row[name] or "").strip() for name in columns))
        except ValueError as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
        except csv.Error as error:  # in the line behind the last that was read
            raise ValueError(f"{path}: line {reader.line_num + 1}: {error}") from None


def _heading(name: str, columns: tuple[str, ...]) -> str:
    """The column that a heading means, whatever its case and the blanks around it."""
    return next((column for column in columns if column.lower() == name.strip().lower()), name)


def _layout_of_list(
    faults: FaultList, flattened: Mapping[str, int] | None, kinds: Mapping[str, str] | None
) -> Layout:
    return layout_of(dict(zip(faults.paths, faults.shapes, strict=True)), flattened, kinds)


def _write_rows(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[int, tuple]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows((number, *row) for number, row in rows)


def _site_parser(params: PyTree, layout: Layout | None) -> Callable:
    """A function from the texts of a row to (path, flat index, bit), in jaxfi's layout."""
    leaves = {name: (path, leaf) for name, path, leaf in torch_leaves(params)}
    leaves |= {name.removesuffix(".weight"): where for name, where in leaves.items()}

    @functools.cache
    def positions(layer: str) -> np.ndarray:
        return _positions(leaves[layer][0], leaves[layer][1].shape, layout)

    def parse(injection: str, layer: str, index: str, bit: str) -> tuple[int, tuple[str, int, int]]:
        number = _integer(injection)
        if layer not in leaves:
            layer = layer.removeprefix("module.")
        if layer not in leaves:
            known = ", ".join(name for name in leaves if not name.endswith(".weight"))
            raise ValueError(f"no layer {layer!r}: allowed are {known}")
        path, leaf = leaves[layer]
        width = word_bits(leaf.dtype)
        if _integer(bit) >= width:
            raise ValueError(f"bit {bit} is outside a {leaf.dtype} word of {width} bits")
        place = _lookup(positions(layer), parse_index(_plain_index(index)))
        return number, (path, place, _integer(bit))

    return parse


def _positions(path: str, shape: tuple[int, ...], layout: Layout | None) -> np.ndarray:
    """jaxfi's flat index of every element of a leaf, laid out as PyTorch does."""
    indices = np.arange(math.prod(shape)).reshape(shape)
    return indices if layout is None else to_torch_layout(path, indices, layout)


def _plain_index(text: str) -> str:
    """`torch.Size([3, 0])`, `[3, 0]` and `(np.int64(3), np.int64(0))` as `(3, 0)`."""
    text = re.sub(r"(?:np\.|numpy\.)?u?int\d+\((\d+)\)", r"\1", text)
    found = re.fullmatch(r"(?:torch\.Size\()?\[([\d, ]*)\]\)?", text)
    if found is None:
        found = re.fullmatch(r"\(\s*(\d+(?:\s*,\s*\d+)*\s*,?)\s*\)", text)
    return text if found is None else f"({re.sub(' ', '', found[1])})"


def _lookup(positions: np.ndarray, index: tuple[int, ...] | int) -> int:
    if isinstance(index, int):
        if index < positions.size:
            return int(positions.flat[index])
    elif len(index) == positions.ndim and np.all(np.less(index, positions.shape)):
        return int(positions[index])
    raise ValueError(f"index {index} is outside the tensor's shape {positions.shape}")


def _integer(text: str) -> int:
    index = parse_index(re.sub(r"\.0+$", "", text))
    if not isinstance(index, int):
        raise ValueError(f"{text!r} is not an integer")
    return index


def _counts(*texts: str) -> list[int]:
    total, *outcomes = map(_integer, texts)
    if total < 1:
        raise ValueError(f"n_injections is {total}; allowed: integers >= 1")
    if sum(outcomes) != total:
        raise ValueError(f"masked, non_critical, critical {outcomes} do not add to {total}")
    return [total, *outcomes]


def _site_texts(faults: FaultList, flat: bool, layout: Layout) -> list[tuple[str, Any, int]]:
    """(Layer, TensorIndex, Bit) of every fault."""
    models = [FAULT_MODELS[code] for code in np.unique(faults.model)]
    if len(models) > 1 or not set(models) <= set(BIT_MODELS):
        allowed = ", ".join(BIT_MODELS)
        raise ValueError(f"the CSV holds faults of one model of {allowed}, given {models}")
    layers = [torch_name(path).removesuffix(".weight") for path in faults.paths]
    indices: list[Any] = [None] * len(faults)
    for number in np.unique(faults.leaf):
        rows = np.flatnonzero(faults.leaf == number)
        path, shape = faults.paths[number], faults.shapes[number]
        there = to_torch_layout(path, np.empty(shape, bool), layout).shape
        places = np.arange(math.prod(shape)).reshape(there)
        elements = from_torch_layout(path, places, layout).ravel()[faults.element[rows]]
        axes = [axis.tolist() for axis in np.unravel_index(elements, there)]
        tuples = zip(*axes, strict=True)
        for row, index in zip(rows, elements.tolist() if flat else tuples, strict=True):
            indices[row] = index
    sites = zip(faults.leaf.tolist(), indices, faults.bit.tolist(), strict=True)
    return [(layers[leaf], index, bit) for leaf, index, bit in sites]
