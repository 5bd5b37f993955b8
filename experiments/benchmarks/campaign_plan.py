"""A campaign planned from shapes, and how long an H200 is assumed to take for one.

The engine's own plan (`jaxfi.explain`) is made from shapes: no parameter is allocated and nothing
is compiled or run. The assumptions about the device are flags; docs/scaling.md says where they are
from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from jaxfi.campaign._run import FAULTS_PER_BLOCK, leaf_price
from jaxfi.campaign._workers import by_leaf, split_blocks
from jaxfi.engine import LeafCost, explain
from jaxfi.engine._costs import network_arithmetic
from jaxfi.faults import FaultList
from jaxfi.models import PyTree
from jaxfi.network import trace_network

_PEAK = flags.DEFINE_float("peak", 67e12, "Operations a second of a device: H200, float32.")
_REACHED = flags.DEFINE_float("reached", 0.5, "Share of the peak that is reached.")
_COMPILATION = flags.DEFINE_float("compilation", 20.0, "Seconds to compile one leaf's programs.")


class CampaignPlan(NamedTuple):
    """What a campaign on a network takes, by the engine's plan.

    Attributes:
      num_parameters: of the network.
      faults: of the campaign.
      network: operations of one image through the network.
      costs: each leaf's.
      golden: operations of the golden values that all leaves start from, all images.
      columns, suffix: operations of the columns; of the suffix if every pair survives.
      largest: bytes of the golden values of one batch, of the leaf that has most.
    """

    num_parameters: int
    faults: FaultList
    network: float
    costs: list[LeafCost]
    golden: float
    columns: float
    suffix: float
    largest: int

    def operations(self, surviving: float) -> float:
        """Of the whole campaign, if this share of the pairs needs the suffix."""
        return self.golden + self.columns + surviving * self.suffix

    @property
    def num_faults(self) -> int:
        return len(self.faults)

    @property
    def num_leaves(self) -> int:
        """Leaves that have faults."""
        return sum(cost.num_faults > 0 for cost in self.costs)


def plan_campaign(
    module: nn.Module,
    images: jax.ShapeDtypeStruct,
    list_faults: Callable[[PyTree], FaultList],
    batch_size: int,
) -> CampaignPlan:
    """Plans a campaign on `images` [N, H, W, C]; `list_faults` gets the parameters' shapes."""
    batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), images.dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), batch)
    # Running statistics are not faulted; here they have no values, so zeros stand for them.
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    params = variables["params"]

    def apply_fn(params: Any, images: jax.Array) -> jax.Array:
        return module.apply({"params": params, **rest}, images)

    faults = list_faults(params)
    costs = explain(apply_fn, params, faults, images, batch_size=batch_size)
    network = network_arithmetic(trace_network(apply_fn, params, batch)) / batch_size
    pairs = network * images.shape[0]
    return CampaignPlan(
        num_parameters=sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
        faults=faults,
        network=network,
        costs=costs,
        golden=pairs * sum((1 - cost.suffix) for cost in costs if cost.num_faults),
        columns=pairs * sum(cost.num_columns * cost.columns for cost in costs),
        suffix=pairs * sum(cost.num_faults * cost.suffix for cost in costs),
        largest=max(cost.golden_bytes for cost in costs),
    )


def dealt_work(
    plan: CampaignPlan, num_devices: int, surviving: np.ndarray, *, alike: bool = False
) -> list[float]:
    """What each block of the campaign takes, in runs of the whole network on all images.

    Args:
      num_devices: that the blocks are made for.
      surviving: [F] share of each fault's pairs that need the suffix.
      alike: make the blocks as if all faults took as long.
    """
    prices = None if alike else {leaf: leaf_price(cost) for leaf, cost in enumerate(plan.costs)}
    rows = by_leaf(plan.faults, np.arange(plan.num_faults))
    blocks = split_blocks(rows, FAULTS_PER_BLOCK, num_devices, prices)
    costs = [of_block(plan.costs[plan.faults.leaf[block[0]]], len(block)) for block in blocks]
    return [
        cost.num_columns * cost.columns + surviving[block].sum() * cost.suffix
        for cost, block in zip(costs, blocks, strict=True)
    ]


def of_block(cost: LeafCost, num_faults: int) -> LeafCost:
    """Of so many of a leaf's faults, which are in the same share of its layer's blocks."""
    parts = -(-cost.num_blocks * num_faults // cost.num_faults)
    return cost._replace(num_faults=num_faults, num_blocks=parts)


def until_the_last(work: Sequence[float], num_devices: int) -> float:
    """Work of the device that ends last, if each takes the next block when it is free."""
    devices = [0.0] * num_devices
    for amount in work:
        heapq.heappush(devices, heapq.heappop(devices) + amount)
    return max(devices)


def unevenness(work: Sequence[float], num_devices: int) -> float:
    """`until_the_last` over the mean device's work."""
    return until_the_last(work, num_devices) * num_devices / sum(work)


def computing_seconds(operations: float, num_devices: int = 1) -> float:
    """Of so many operations on that many H200s, by the flags."""
    return operations / (_PEAK.value * _REACHED.value * num_devices)


def compiling_seconds(num_leaves: float) -> float:
    """Of the programs of so many leaves, by the flag."""
    return _COMPILATION.value * num_leaves
