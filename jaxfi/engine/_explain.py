"""What a campaign will do and need, said before it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfi.engine._compilation import checked_precision, own_settings
from jaxfi.engine._costs import (
    columns_arithmetic,
    golden_bytes,
    network_arithmetic,
    num_held,
    suffix_arithmetic,
    working_bytes,
)
from jaxfi.engine._plan import LeafPlan, plan_leaves
from jaxfi.faults._list import FaultList
from jaxfi.faults._sites import checked_integer
from jaxfi.faults._transforms import PyTree, describe_leaves
from jaxfi.network._frozen import frozen
from jaxfi.network._graph import ApplyFn, Network, trace_network, used_leaves
from jaxfi.network._images import packed_shape
from jaxfi.network._layout import Layout, between_arrays, layout_of


class LeafCost(NamedTuple):
    """How the fast engine runs the faults of one leaf.

    Attributes:
      path: the leaf.
      method: "columns", "slice" (no rule: the suffix, one fault at a time) or "unreached". Of the
        first two, a campaign makes "whole" (plain re-execution) if a golden batch asks for it, or
        if the faults are so few that compiling would take longer.
      reason: why not columns; empty if columns.
      num_faults: faults in it.
      columns: arithmetic of the columns for one (fault, image), as a share of the network's.
      suffix: the same, of the suffix; only pairs that survive the channel tail need it.
      golden_bytes: golden values of one batch of images; as many batches are held as fit.
      working_bytes: what its programs take beside them.
      group_size: faults that the columns hold; a group costs the same if fewer ride in it.
      num_blocks: of the leaf's own layer; the faults of a group are in one block.
    """

    path: str
    method: str
    reason: str
    num_faults: int
    columns: float
    suffix: float
    golden_bytes: int
    working_bytes: int
    group_size: int = 1
    num_blocks: int = 1

    @property
    def num_columns(self) -> int:
        """Columns that are computed for all its faults: whole groups, each of one block."""
        groups = -(-self.num_faults // self.group_size)
        if self.num_blocks > 1:
            groups = min(self.num_faults, self.num_blocks + self.num_faults // self.group_size)
        return groups * self.group_size

    @property
    def saving(self) -> float:
        """Whole networks that one run of this leaf replaces if every pair survives."""
        cost = self.columns + self.suffix
        return 1 / cost if cost else float("inf")


def explain(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    faults: Any = None,
    labels: Any = None,
    *,
    batch_size: int = 100,
    precision: str = "highest",
) -> list[LeafCost]:
    """Per leaf, the path that the fast engine takes and the arithmetic that it saves.

    Nothing is run or compiled, and `params` and `images` may be shapes (`jax.ShapeDtypeStruct`), so
    that a campaign can be planned for a network that does not fit in memory.

    Args:
      apply_fn, params, images, batch_size, precision: as in `run_campaign` with criteria.
      faults: counted per leaf; None counts none. They may stand before the images, as there.
      labels: not looked at.

    Returns one `LeafCost` a leaf, in the order of `jax.tree.leaves(params)`. Raises ValueError or
    TypeError for arguments that do not fit, and for outputs that are not [batch, ...] each.

    >>> params = {"w": jax.ShapeDtypeStruct((4, 3), np.float32)}
    >>> images = jax.ShapeDtypeStruct((10, 4), np.float32)
    >>> explain(lambda p, x: x @ p["w"], params, images)[0].method
    'columns'
    """
    if isinstance(images, FaultList):
        images, faults = faults, images
    images, of_images = packed_shape(images)
    batch_size = min(checked_integer("batch_size", batch_size, 1), images.shape[0])
    batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), images.dtype)
    describe_leaves(params)
    if faults is not None:
        faults.validate(params)
    with own_settings(), jax.default_matmul_precision(checked_precision(precision)):
        network = trace_network(_of_arrays(apply_fn, params, batch, of_images), params, batch)
    used_leaves(network)
    counts = np.zeros(len(network.leaves), np.int64) if faults is None else faults.counts_by_leaf()
    idle, faulty = (np.flatnonzero(there).tolist() for there in (counts == 0, counts > 0))
    plans = plan_leaves(network, idle) | plan_leaves(network, faulty)
    return leaf_costs(network, [plans[leaf] for leaf in range(len(counts))], counts)


def _of_arrays(
    apply_fn: ApplyFn, params: PyTree, batch: jax.ShapeDtypeStruct, of_images: Layout | None
) -> ApplyFn:
    """The function of one array to one, as campaigns run it."""
    now = frozen(apply_fn)
    outputs = now.outputs(params, batch if of_images is None else of_images.unpack_shape(batch))
    leaves, layout = jax.tree.leaves(outputs), None
    if len(leaves) != 1 or leaves[0].ndim != 2:
        layout = layout_of("the outputs", outputs, batch.shape[0])
    return between_arrays(now, of_images, layout)


def leaf_costs(network: Network, plans: Iterable[LeafPlan], counts: np.ndarray) -> list[LeafCost]:
    """What each plan costs; `counts` are the faults of each leaf."""
    return [_cost(network, plan, int(counts[plan.leaf])) for plan in plans]


def least_memory(costs: list[LeafCost]) -> int:
    """Bytes that the fast engine needs for one batch of images, whichever leaf it is at."""
    return max((c.golden_bytes + c.working_bytes for c in costs if c.num_faults), default=0)


def peak_memory(costs: list[LeafCost], num_batches: int, memory: int) -> int:
    """Bytes that the fast engine takes within `memory`: golden values and working space."""
    held = [
        num_held(memory, cost.golden_bytes, cost.working_bytes, num_batches) * cost.golden_bytes
        + cost.working_bytes
        for cost in costs
        if cost.num_faults
    ]
    return max(held, default=0)


def _cost(network: Network, plan: LeafPlan, num_faults: int) -> LeafCost:
    whole = max(1, network_arithmetic(network))
    path = network.paths[plan.leaf]
    if plan.method == "whole":
        return LeafCost(path, plan.method, plan.reason, num_faults, 0.0, 1.0, 0, 0)
    return LeafCost(
        path=path,
        method=plan.method,
        reason=plan.reason,
        num_faults=num_faults,
        columns=columns_arithmetic(network, plan) / max(1, plan.num_columns) / whole,
        suffix=suffix_arithmetic(network, plan) / whole,
        golden_bytes=golden_bytes(network, plan),
        working_bytes=working_bytes(network, plan),
        group_size=max(1, plan.num_columns),
        num_blocks=1 if plan.own is None else network.blocks[plan.own].num_blocks,
    )
