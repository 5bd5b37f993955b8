"""PyTorch weights, fault lists and result tables, into jaxfi's names and layouts and back."""

from __future__ import annotations

from jaxfi.convert.layout import FLATTENED
from jaxfi.convert.tables import (
    ResultTable,
    read_fault_list,
    read_results,
    write_fault_list,
    write_results,
)
from jaxfi.convert.weights import from_torch, load_state, to_torch

__all__ = [
    "FLATTENED",
    "ResultTable",
    "from_torch",
    "load_state",
    "read_fault_list",
    "read_results",
    "to_torch",
    "write_fault_list",
    "write_results",
]
