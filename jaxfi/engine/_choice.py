"""Which leaves are worth compiling for: few faults run sooner as the whole network, fault by fault.

The programs of a leaf take longer to compile than a small campaign takes to run. What they take is
predicted from their numbers and equations, at this machine's pace, which compiling the network
itself shows. Outcomes do not depend on the choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxfi.engine._explain import LeafCost, peak_memory
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
_CALLS_OF_A_GROUP, _CALLS_OF_A_BATCH = 4, 3  # and what the host does beside them
SURVIVING = 0.5  # of the pairs, that go through the suffix: not known before

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
        work = golden.seconds_per_image, batch_size, batches_of_a_fault, images_of_a_fault
        alone = seconds_to_run(cost._replace(method="whole"), *work)
        compiling = 0.0 if is_compiled(plan, programs) else scale * _compiling(network, plan)
        divided = seconds_to_run(cost, *work)
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


def seconds_to_run(
    cost: LeafCost,
    seconds_per_image: float,
    batch_size: int,
    batches_of_a_fault: float,
    images_of_a_fault: int,
    surviving: float = SURVIVING,
) -> float:
    """What a leaf's faults take, compiled, about.

    Args:
      cost: of the leaf, as it is run.
      seconds_per_image: of the whole network.
      batch_size, batches_of_a_fault, images_of_a_fault: as in `chosen_plans`.
      surviving: share of the pairs that go through the suffix.
    """
    batch = seconds_per_image * batch_size
    if cost.method == "columns":
        groups = cost.num_columns / cost.group_size * batches_of_a_fault
        batches = cost.num_faults * images_of_a_fault * surviving / batch_size
        seconds = groups * (cost.columns * cost.group_size * batch + _CALLS_OF_A_GROUP * _CALL)
        return seconds + batches * (cost.suffix * batch + _CALLS_OF_A_BATCH * _CALL)
    if cost.method == "unreached":
        return 0.0
    share = 1.0 if cost.method == "whole" else cost.suffix
    return cost.num_faults * batches_of_a_fault * (share * batch + _CALL)


def plan_text(
    costs: Sequence[LeafCost],
    num_batches: int,
    memory: int,
    work: tuple[float, int, float, int],
    compiling: float,
) -> str:
    """What a campaign will take, as a table, one line a leaf that has faults.

    Args:
      costs: of the leaves.
      num_batches: of the campaign.
      memory: bytes for golden values and working space.
      work: the arguments of `seconds_to_run` after the cost.
      compiling: seconds, about.
    """
    header = ("leaf", "faults", "method", "columns", "suffix", "memory", "about")
    lines = ["{:32} {:>10} {:>9} {:>8} {:>8} {:>11} {:>9}".format(*header)]
    faulty = [cost for cost in costs if cost.num_faults]
    for cost in faulty:
        peak = peak_memory([cost], num_batches, memory)
        lines.append(
            f"{cost.path:32} {cost.num_faults:10,} {cost.method:>9} {cost.columns:8.2%} "
            f"{cost.suffix:8.2%} {peak / 2**20:7,.0f} MiB "
            f"{_duration(seconds_to_run(cost, *work)):>9} {cost.reason}".rstrip()
        )
    total, num_images = sum(cost.num_faults for cost in faulty), work[-1]
    about, most = (
        sum(seconds_to_run(cost, *work, surviving) for cost in faulty) + compiling
        for surviving in (SURVIVING, 1.0)
    )
    mebibytes = peak_memory(list(costs), num_batches, memory) / 2**20
    lines.append(
        f"{total:,} faults x {num_images:,} images = {total * num_images:,} outcomes: about "
        f"{_duration(about)}, {_duration(compiling)} of it compilation, if every other pair is "
        f"masked early, and {_duration(most)} if none is; about {mebibytes:,.0f} MiB of memory"
    )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
