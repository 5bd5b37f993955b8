"""What a campaign will do and need, said before it starts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.fault_list import FaultList
from jaxfi.faults import PyTree
from jaxfi.plan import (
    LeafPlan,
    columns_arithmetic,
    leaf_bytes,
    network_arithmetic,
    plan_leaves,
    suffix_arithmetic,
)
from jaxfi.slicing import ApplyFn, Network, trace_network


class LeafCost(NamedTuple):
    """How the fast engine runs the faults of one leaf.

    Attributes:
      path: the leaf.
      method: "columns", "slice" (no rule: the suffix, one fault at a time) or "unreached".
      reason: why not columns; empty if columns.
      num_faults: faults in it.
      columns: arithmetic of the columns for one (fault, image), as a share of the network's.
      suffix: the same, of the suffix; only pairs that survive the channel tail need it.
      golden_bytes: golden values held for one batch of images.
    """

    path: str
    method: str
    reason: str
    num_faults: int
    columns: float
    suffix: float
    golden_bytes: int

    @property
    def saving(self) -> float:
        """Whole networks that one run of this leaf replaces if every pair survives."""
        cost = self.columns + self.suffix
        return 1 / cost if cost else float("inf")


def explain(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    faults: FaultList | None = None,
    *,
    batch_size: int = 100,
    precision: str = "highest",
) -> list[LeafCost]:
    """Per leaf, the path that the fast engine takes and the arithmetic that it saves.

    Nothing is run or compiled, and `params` and `images` may be shapes (`jax.ShapeDtypeStruct`), so
    that a campaign can be planned for a network that does not fit in memory.

    Args:
      apply_fn, params, images, batch_size, precision: as in `run_campaign`.
      faults: counted per leaf; None counts none.

    >>> params = {"w": jax.ShapeDtypeStruct((4, 3), np.float32)}
    >>> images = jax.ShapeDtypeStruct((10, 4), np.float32)
    >>> explain(lambda p, x: x @ p["w"], params, images)[0].method
    'columns'
    """
    batch = jax.ShapeDtypeStruct(
        (min(batch_size, images.shape[0]), *images.shape[1:]), images.dtype
    )
    with jax.default_matmul_precision(precision):
        network = trace_network(apply_fn, params, batch)
    counts = np.zeros(len(network.leaves), int)
    if faults is not None:
        counts = np.bincount(faults.leaf, minlength=len(network.leaves))
    return [_cost(network, plan, int(counts[plan.leaf])) for plan in plan_leaves(network)]


def plan_text(costs: list[LeafCost]) -> str:
    """The costs as a table, one line a leaf that has faults."""
    lines = [f"{'leaf':32} {'faults':>8} {'method':>9} {'columns':>8} {'suffix':>8} {'golden':>10}"]
    for cost in costs:
        if cost.num_faults:
            lines.append(
                f"{cost.path:32} {cost.num_faults:8,} {cost.method:>9} {cost.columns:8.2%} "
                f"{cost.suffix:8.2%} {cost.golden_bytes / 2**20:6.1f} MiB {cost.reason}".rstrip()
            )
    total = sum(cost.num_faults for cost in costs)
    needed = sum(cost.num_faults * (cost.columns + cost.suffix) for cost in costs)
    lines.append(
        f"{total:,} faults; if no pair is masked early, {needed / max(total, 1):.2%} of the "
        "arithmetic of running the whole network for each"
    )
    return "\n".join(lines)


def _cost(network: Network, plan: LeafPlan, num_faults: int) -> LeafCost:
    whole = max(1, network_arithmetic(network))
    return LeafCost(
        path=network.paths[plan.leaf],
        method=plan.method,
        reason=plan.reason,
        num_faults=num_faults,
        columns=columns_arithmetic(network, plan) / max(1, plan.num_columns) / whole,
        suffix=suffix_arithmetic(network, plan) / whole,
        golden_bytes=sum(leaf_bytes(network, var) for var in plan.inputs),
    )
