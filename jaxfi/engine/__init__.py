"""How faults are run: the plan of each leaf, its compiled programs, and the three engines.

In: a `Setup` (network, parameters, image batches, golden outputs) and a fault list. Out: `Results`,
the outcome of every fault on every image. `explain` says what will be done, before it is.
"""

from __future__ import annotations

from jaxfi.engine._compilation import PRECISIONS, compiled
from jaxfi.engine._engines import ENGINES
from jaxfi.engine._explain import LeafCost, explain
from jaxfi.engine._golden import Setup

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "LeafCost",
    "Setup",
    "compiled",
    "explain",
]
