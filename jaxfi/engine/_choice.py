"""Which leaves are worth compiling for: few faults run sooner as the whole network, fault by fault.

The programs of a leaf take longer to compile than a small campaign takes to run. What they take is
predicted from their numbers and equations, at this machine's pace, which compiling the network
itself shows. Outcomes do not depend on the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfi.engine._explain import LeafCost
from jaxfi.engine._golden import GoldenRun
from jaxfi.engine._plan import LeafPlan
from jaxfi.engine._programs import is_compiled
from jaxfi.network._graph import Network, needed_equations

# Seconds on two cores of an AMD EPYC VM with JAX 0.10.2, tracing and lowering included: fitted to
# what five networks took.
_PER_PROGRAM, _PER_EQUATION = 0.09, 0.0014
_PROGRAMS_OF_A_LEAF, _COMMON_PROGRAMS = 2.3, 8  # the common ones serve all leaves
_PACES = (0.5, 20.0)  # times that, this machine's pace
_CALL = 2e-4  # seconds of the host for a call of a program, about
_SURVIVING = 0.5  # of the pairs, that go through the suffix: not known before

_REASON = "few faults: sooner than compiling for them"


def chosen_plans(
    network: Network,
    plans: Mapping[int, LeafPlan],
    costs: Sequence[LeafCost],
    programs: dict[Any, Any],
    golden: GoldenRun,
    batch_size: int,
    batches_of_a_fault: float,
    images_of_a_fault: int,
) -> dict[int, LeafPlan]:
    """The plans, and "whole" in place of those that are not worth compiling for.

    Args:
      plans, costs: of the leaves that have faults, in one order.
      programs: those that are compiled already cost nothing.
      golden: how fast this machine runs and compiles the network.
      batches_of_a_fault: those that hold its images, on average.
      images_of_a_fault: that count.
    """
    scale = _scale(network, programs, golden.compiling)
    whole, saved = {}, 0.0
    for (leaf, plan), cost in zip(plans.items(), costs, strict=True):
        if plan.method not in ("columns", "slice"):
            continue
        batch = golden.seconds_per_image * batch_size
        alone = cost.num_faults * batches_of_a_fault * (batch + _CALL)
        compiling = 0.0 if is_compiled(plan, programs) else scale * _compiling(network, plan)
        if plan.method == "columns":
            groups = cost.num_columns / cost.group_size * batches_of_a_fault
            pairs = cost.num_faults * images_of_a_fault * _SURVIVING
            divided = groups * (cost.columns * cost.group_size * batch + 3 * _CALL)
            divided += pairs * (cost.suffix * batch / batch_size + 3 * _CALL / batch_size)
        else:
            divided = cost.num_faults * batches_of_a_fault * (cost.suffix * batch + _CALL)
        if compiling and alone < divided + compiling:
            whole[leaf] = dataclasses.replace(plan, method="whole", reason=_REASON)
        elif compiling:
            saved += alone - divided - compiling
    if saved < scale * _COMMON_PROGRAMS * _PER_PROGRAM:
        whole |= {
            leaf: dataclasses.replace(plan, method="whole", reason=_REASON)
            for leaf, plan in plans.items()
            if plan.method in ("columns", "slice") and not is_compiled(plan, programs)
        }
    return {**plans, **whole}


def seconds_to_compile(
    network: Network,
    plans: Mapping[int, LeafPlan],
    programs: dict[Any, Any],
    golden: GoldenRun,
) -> float:
    """What the programs of these plans will take that are not compiled yet, about."""
    scale = _scale(network, programs, golden.compiling)
    divided = [
        plan
        for plan in plans.values()
        if plan.method in ("columns", "slice") and not is_compiled(plan, programs)
    ]
    common = _COMMON_PROGRAMS * _PER_PROGRAM if divided else 0.0
    return scale * (common + sum(_compiling(network, plan) for plan in divided))


def _scale(network: Network, programs: dict[Any, Any], compiling: float) -> float:
    """This machine's seconds over those above. A network that took far less than they say was read
    from a cache, which says nothing."""
    expected = _PER_PROGRAM + _PER_EQUATION * len(network.equations)
    if compiling > expected / 4:
        low, high = _PACES
        programs["pace"] = min(max(compiling / expected, low), high)
    return programs.get("pace", 1.0)


def _compiling(network: Network, plan: LeafPlan) -> float:
    """Seconds for a leaf's own programs: the rest of its suffix is others' too."""
    known = {*network.leaves, network.image}
    equations = needed_equations(network, [*plan.inputs, *plan.products], known)
    starts = {*network.leaves, *plan.whole} | ({plan.ahead} if plan.ahead is not None else set())
    suffix = needed_equations(network, plan.stops[0], starts)
    count = len(equations) + len(plan.steps) + len(suffix)
    return _PROGRAMS_OF_A_LEAF * _PER_PROGRAM + count * _PER_EQUATION
