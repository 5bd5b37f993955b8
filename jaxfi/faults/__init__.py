"""What is injected: faults in stored words, where they may be, and which are drawn.

In: a parameter tree. Out: a `FaultList`, a table on the host; and the pure transforms `corrupt` and
`inject`, which put faults into an array or a tree.
"""

from __future__ import annotations

from jaxfi.faults._bit_effects import BitEffect, bit_effects, stored_weights
from jaxfi.faults._layers import layer_of
from jaxfi.faults._list import FaultGroups, FaultList, Stratum
from jaxfi.faults._sampling import (
    STUCK_AT,
    exhaustive_faults,
    fault_population,
    sample_faults,
    sample_size,
)
from jaxfi.faults._transforms import (
    BIT_MODELS,
    FAULT_MODELS,
    Fault,
    PyTree,
    corrupt,
    described_leaves,
    inject,
    leaf_paths,
    word_bits,
)

__all__ = [
    "BIT_MODELS",
    "FAULT_MODELS",
    "STUCK_AT",
    "BitEffect",
    "Fault",
    "FaultGroups",
    "FaultList",
    "PyTree",
    "Stratum",
    "bit_effects",
    "corrupt",
    "described_leaves",
    "exhaustive_faults",
    "fault_population",
    "inject",
    "layer_of",
    "leaf_paths",
    "sample_faults",
    "sample_size",
    "stored_weights",
    "word_bits",
]
