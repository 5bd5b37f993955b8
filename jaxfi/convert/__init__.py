"""Other frameworks' networks as JAX functions; PyTorch weights, fault lists and result tables, into
jaxfi's names and layouts and back.

In: a module, a file or a state dict of another tool. Out: a function and its parameters, a
parameter tree, a `FaultList`, a `ResultTable`.
"""

from __future__ import annotations

from jaxfi.convert._layout import FLATTENED, to_torch_layout, torch_name
from jaxfi.convert._modules import from_equinox, from_keras, from_module, from_nnx
from jaxfi.convert._tables import (
    ResultTable,
    read_fault_list,
    read_results,
    write_fault_list,
    write_results,
)
from jaxfi.convert._weights import from_torch, load_state, to_torch

__all__ = [
    "FLATTENED",
    "ResultTable",
    "from_equinox",
    "from_keras",
    "from_module",
    "from_nnx",
    "from_torch",
    "load_state",
    "read_fault_list",
    "read_results",
    "to_torch",
    "to_torch_layout",
    "torch_name",
    "write_fault_list",
    "write_results",
]
