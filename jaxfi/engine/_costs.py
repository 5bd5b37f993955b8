"""What a leaf's plan costs: floating-point operations and bytes, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

from jax.extend import core

from jaxfi.engine._plan import LeafPlan
from jaxfi.network._equations import Value
from jaxfi.network._graph import Network, arithmetic, needed_equations
from jaxfi.network._rules import dtype_of, shape_of


def suffix_arithmetic(network: Network, plan: LeafPlan) -> int:
    """Floating-point operations that a batch of packed rows costs after the columns."""
    if plan.method == "unreached":
        return 0
    equations = needed_equations(network, [network.output], _known(network, plan))
    return sum(_share(network, plan.ahead, equation) for equation in equations)


def columns_arithmetic(network: Network, plan: LeafPlan) -> int:
    """Floating-point operations that one group of columns costs for a batch."""
    return sum(_share(network, plan.own, step.equation) for step in plan.steps)


def _share(network: Network, blocked: core.Var | None, equation: core.JaxprEqn) -> int:
    """An equation's arithmetic; of the blocked layer, one block's."""
    if blocked is None or equation.outvars[0] is not blocked:
        return arithmetic([equation])
    return arithmetic([equation]) // network.blocks[blocked].num_blocks


def network_arithmetic(network: Network) -> int:
    """Floating-point operations of the whole network for a batch."""
    return arithmetic(network.equations)


def _known(network: Network, plan: LeafPlan) -> set[core.Var]:
    return {*network.leaves, *plan.suffix_inputs}


def golden_bytes(network: Network, plan: LeafPlan) -> int:
    """Golden values that a leaf's prefix puts out for one batch, bytes."""
    return sum(leaf_bytes(network, var) for var in plan.inputs) + sum(
        leaf_bytes(network, network.producers[var].invars[0])
        + leaf_bytes(network, var) * (2 * network.blocks[var].num_blocks - 2)
        for var in plan.products
    )


def num_held(memory: int, golden: int, working: int, num_batches: int) -> int:
    """How many batches' golden values are held together, at least 1; all arguments but the last
    are bytes."""
    return max(1, min(num_batches, (memory - working) // max(1, golden)))


def working_bytes(network: Network, plan: LeafPlan) -> int:
    """What a leaf's programs take beside the golden values, about, bytes.

    Three groups' columns are in flight: one computed, one waiting, one packed. Of the rows of each
    block that the suffix may start with there are an old and a new version. Within a program, the
    two largest values live at a time.
    """
    if plan.method == "unreached":
        return 0
    columns = 3 * sum(leaf_bytes(network, var) for var in plan.packed)
    within = [_two_largest(network, [step.equation for step in plan.steps])]
    suffix = needed_equations(network, [network.output], _known(network, plan))
    within.append(_two_largest(network, suffix))
    rows, num_bins = sum(leaf_bytes(network, var) for var in plan.whole), 1
    if plan.ahead is not None:
        num_bins = network.blocks[plan.ahead].num_blocks
        rows += leaf_bytes(network, network.producers[plan.ahead].invars[0]) // num_bins
        rows += (num_bins.bit_length() - 1) * leaf_bytes(network, plan.ahead)
    return columns + 2 * rows * num_bins + max(within)


def _two_largest(network: Network, equations: Iterable[core.JaxprEqn]) -> int:
    sizes = sorted(leaf_bytes(network, var) for e in equations for var in e.outvars)
    return sum(sizes[-2:])


def leaf_bytes(network: Network, var: Value) -> int:
    """Size of one value, bytes."""
    return dtype_of(var).itemsize * math.prod(shape_of(var))
