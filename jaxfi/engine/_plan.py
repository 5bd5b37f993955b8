"""How the fast engine treats each leaf: what is computed in columns, what is packed, what is cut.

One fault touches one leaf, so what does not depend on the leaf is golden, and what comes after has
golden weights. `plan_leaf` divides a network, for one leaf, into

    prefix   golden, once per image batch
    columns  the leaf's own operation and the channel tail, C faults at a time: column k of every
             value is what the network would hold in channel c(k) with fault k alone in it
    suffix   the rest, as an ordinary network, on rows packed from any faults and images

and says why where it cannot ("slice": the suffix alone, one fault at a time).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxfi.faults._list import FaultList
from jaxfi.network._blocks import Blocks, sum_length
from jaxfi.network._equations import Value, variables
from jaxfi.network._graph import Network, is_boundary, needed_equations, reached_from
from jaxfi.network._rows import Run, State, mixes_rows, never, uniform_constant
from jaxfi.network._rules import column_rule, operand_axes, shape_of


class Gate(NamedTuple):
    """Where a weight is only ever multiplied by one input channel: a batch in which that channel is
    zero everywhere cannot see the weight (0 times a finite weight of the same sign is the same).

    Attributes:
      inputs: the golden operand; `input_axis` is its channel axis.
      leaf_axis: the leaf's axis that names the channel.
    """

    inputs: core.Var
    input_axis: int
    leaf_axis: int


class _NoColumns(Exception):
    """Why a leaf cannot be computed in columns along the axis tried."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation of the columns; `columns` says which operands are columns, not golden."""

    equation: core.JaxprEqn
    columns: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How faults in one leaf are run.

    Attributes:
      leaf: position of the leaf in the tree.
      method: "columns", "slice", "unreached" (the output does not depend on the leaf), or "whole"
        (the engine saw that a cut moves bits, and re-runs the network).
      reason: why not columns; empty if columns.
      axis: the leaf's axis that becomes the columns; `num_columns` is its length.
      steps: the equations of the columns, in order; `axes` is the column axis of each value.
      taken: golden values re-indexed along their column axis, to be operands of steps.
      golden: golden values that steps read as they are.
      compared: column values compared with golden: a fault that changes none of them is masked.
      packed: column values from which rows are packed, one channel replaced.
      carried: golden values whose rows are packed with them.
      inputs: golden values that the prefix computes and the others start from.
      gate: what makes faults invisible without arithmetic, None if nothing does.
      own: result of the leaf's layer where that is summed in blocks: its columns compute the faulty
        block alone.
      ahead: result of the blocked layer that reads the one packed channel: the suffix starts with
        that channel's block alone.
      whole: values whose rows are packed as they are: of `suffix_inputs`, all but the one that only
        the layer ahead reads.
      stops: where the suffix is cut into programs that leaves share: values of stop n are computed
        from stop n - 1, those of the first from the rows; the last is the output.
      products: the blocked layers whose partial sums the prefix computes.
    """

    leaf: int
    method: str
    reason: str = ""
    axis: int = 0
    num_columns: int = 1
    steps: tuple[Step, ...] = ()
    axes: dict[core.Var, int] = dataclasses.field(default_factory=dict)
    taken: tuple[core.Var, ...] = ()
    golden: tuple[core.Var, ...] = ()
    compared: tuple[core.Var, ...] = ()
    packed: tuple[core.Var, ...] = ()
    carried: tuple[core.Var, ...] = ()
    inputs: tuple[core.Var, ...] = ()
    gate: Gate | None = None
    own: core.Var | None = None
    ahead: core.Var | None = None
    whole: tuple[core.Var, ...] = ()
    stops: tuple[tuple[Value, ...], ...] = ()
    products: tuple[core.Var, ...] = ()

    @property
    def suffix_inputs(self) -> tuple[core.Var, ...]:
        """What the suffix starts from: the packed values, then the carried ones."""
        return self.packed + self.carried


def plan_leaves(network: Network, leaves: Collection[int]) -> dict[int, LeafPlan]:
    """A plan for each of the leaves. Those with one suffix, a layer's, get one prefix too: fewer
    programs to compile."""
    plans = {leaf: plan_leaf(network, leaf) for leaf in leaves}
    inputs: dict[tuple, dict[core.Var, None]] = {}
    products: dict[tuple, dict[core.Var, None]] = {}
    for plan in plans.values():
        inputs.setdefault(plan.suffix_inputs, {}).update(dict.fromkeys(plan.inputs))
        products.setdefault(plan.suffix_inputs, {}).update(dict.fromkeys(plan.products))
    cuts = _Cuts(network, plans.values())
    return {
        leaf: dataclasses.replace(
            plan,
            inputs=tuple(inputs[plan.suffix_inputs]),
            products=_in_order(network, products[plan.suffix_inputs]),
            stops=cuts.behind(plan),
        )
        for leaf, plan in plans.items()
    }


def part_of_layer(network: Network, plans: Iterable[LeafPlan], faults: FaultList) -> np.ndarray:
    """Which block of its own layer each fault is in, [F]: those of one share columns. 0 if the
    leaf's columns hold the whole sum."""
    parts = np.zeros(len(faults), np.int64)
    for plan in plans:
        if plan.own is None:
            continue
        rows, blocks = np.flatnonzero(faults.leaf == plan.leaf), network.blocks[plan.own]
        place = np.unravel_index(faults.element[rows], faults.shapes[plan.leaf])
        parts[rows], _ = blocks.place(place[blocks.weight_axis])
    return parts


class _Cuts:
    """Where suffixes start: each is a place to cut those that start before it.

    Suffixes of a deep network then share their programs, which are as many as the network has
    layers and not as the square of that.
    """

    def __init__(self, network: Network, plans: Iterable[LeafPlan]):
        starts = dict.fromkeys(p.suffix_inputs for p in plans if p.method == "columns")
        self._network = network
        self._after = {start: self._count_after(start) for start in starts}
        self._stops: dict[tuple, tuple[tuple[Value, ...], ...]] = {}

    def behind(self, plan: LeafPlan) -> tuple[tuple[Value, ...], ...]:
        """`LeafPlan.stops`."""
        if plan.method not in ("columns", "slice"):
            return ()
        return self._behind(plan.whole if plan.ahead is None else (*plan.whole, plan.ahead))

    def _behind(self, known: tuple[core.Var, ...]) -> tuple[tuple[Value, ...], ...]:
        if known not in self._stops:
            stop = self._next(known)
            self._stops[known] = (stop, *self._behind(stop)) if stop else ((self._network.output,),)
        return self._stops[known]

    def _next(self, known: tuple[core.Var, ...]) -> tuple[core.Var, ...] | None:
        """The first cut that can be computed from the known values."""
        left = self._count_after(known)
        behind = sorted(
            (cut for cut, after in self._after.items() if 0 < after < left),
            key=self._after.__getitem__,
            reverse=True,
        )
        return next((cut for cut in behind if self._is_reachable(cut, known)), None)

    def _is_reachable(self, cut: tuple[core.Var, ...], known: tuple[core.Var, ...]) -> bool:
        network = self._network
        equations = needed_equations(network, cut, {*network.leaves, *known})
        read = {*cut, *(var for equation in equations for var in variables(equation.invars))}
        return network.image not in read - {*known}

    def _count_after(self, known: Iterable[core.Var]) -> int:
        network = self._network
        return len(needed_equations(network, [network.output], {*network.leaves, *known}))


def plan_leaf(network: Network, leaf: int) -> LeafPlan:
    """The plan for one leaf: columns along the last axis that allows it, else the slice alone."""
    source = network.leaves[leaf]
    if network.output not in reached_from(network, source):
        return LeafPlan(leaf, "unreached", "the output does not depend on it")
    reasons = []
    for axis in reversed(range(len(shape_of(source)))):
        try:
            return _plan_columns(network, leaf, axis)
        except _NoColumns as reason:
            reasons.append(str(reason))
    return slice_plan(network, leaf, reasons[0] if reasons else "it is a scalar")


def slice_plan(network: Network, leaf: int, reason: str) -> LeafPlan:
    """The plan that runs what depends on the leaf, one fault at a time, each image in its place."""
    inputs = _slice_inputs(network, network.leaves[leaf])
    plan = LeafPlan(leaf, "slice", reason, carried=inputs, whole=inputs, inputs=inputs)
    return dataclasses.replace(plan, stops=((network.output,),))


def undivided(network: Network, plan: LeafPlan, layer: str) -> LeafPlan:
    """The plan without blocks of its "own" layer, or of the one "ahead"."""
    own, ahead = (None if name == layer else getattr(plan, name) for name in ("own", "ahead"))
    plan = dataclasses.replace(
        plan,
        own=own,
        ahead=ahead,
        whole=_rows(network, plan.suffix_inputs, ahead),
        products=tuple(var for var in (own, ahead) if var is not None),
    )
    return dataclasses.replace(plan, stops=_Cuts(network, [plan]).behind(plan))


def _plan_columns(network: Network, leaf: int, axis: int) -> LeafPlan:
    source = network.leaves[leaf]
    columns = _Columns(network, source, axis)
    for equation in network.equations:
        columns.propagate(equation)
    if isinstance(network.output, core.Var) and network.output in columns.reached:
        columns.compare(network.output)
    if source in columns.frontier:
        reader = next(e for e in network.consumers[source] if set(e.outvars) & columns.mixed)
        raise _NoColumns(f"{reader.primitive.name} has no column rule for it")
    for var in columns.frontier:
        _check_batch_axis(network, var, columns.reached[var])

    def may_cut(var: core.Var) -> bool:
        return var not in columns.mixed and is_storable(network, var)

    suffix_inputs = _cut(network, [network.output], may_cut, forbidden=source)
    packed = tuple(var for var in suffix_inputs if var in columns.reached)
    carried = tuple(var for var in suffix_inputs if var not in columns.reached)
    for var in packed:
        _check_batch_axis(network, var, columns.reached[var])
    compared = tuple(columns.frontier)
    if mixes := mixes_images(network, suffix_inputs, compared):
        raise _NoColumns(mixes)
    golden = tuple(dict.fromkeys(columns.golden))
    needed = _cut(network, (*columns.taken, *golden), lambda v: is_storable(network, v))
    own = _find_own(network, source, axis, columns.steps)
    ahead = _find_ahead(network, packed, columns)
    return LeafPlan(
        leaf=leaf,
        method="columns",
        axis=axis,
        num_columns=shape_of(source)[axis],
        steps=tuple(columns.steps),
        axes={**columns.reached, **columns.pulled},
        taken=tuple(columns.taken),
        golden=golden,
        compared=compared,
        packed=packed,
        carried=carried,
        inputs=(inputs := tuple(dict.fromkeys((*needed, *compared, *packed, *carried)))),
        gate=_gate(network, source, inputs),
        own=own,
        ahead=ahead,
        whole=_rows(network, packed + carried, ahead),
        products=tuple(var for var in (own, ahead) if var is not None),
    )


def _find_own(
    network: Network, source: core.Var, axis: int, steps: Sequence[Step]
) -> core.Var | None:
    """The result of the blocked dense layer whose weights the leaf is, [K, N] or [N, K], N in
    columns.

    Not of a convolution: it has a few blocks, each of which would need a group of columns.
    """
    readers = network.consumers[source]
    result = readers[0].outvars[0]
    if not steps or len(readers) != 1 or result not in network.blocks:
        return None
    is_own = steps[0].equation is readers[0] and steps[0].columns == (False, True)
    other = 1 - network.blocks[result].weight_axis
    return result if is_own and axis == other and len(shape_of(source)) == 2 else None


def _find_ahead(
    network: Network, packed: tuple[core.Var, ...], columns: _Columns
) -> core.Var | None:
    """The result of the blocked layer with the longest sum that reads the packed value, as it is or
    flattened."""
    if len(packed) != 1:
        return None
    value, axis = packed[0], columns.reached[packed[0]]
    found = []
    for reader in network.consumers.get(value, ()):
        inputs = value
        if reader.primitive.name == "reshape":
            inputs = reader.outvars[0]
            readers = network.consumers.get(inputs, ())
            if len(readers) != 1:
                continue
            reader = readers[0]
        result = reader.outvars[0]
        if result not in network.blocks or reader.invars[0] is not inputs:
            continue
        weights = reader.invars[1]
        golden_weights = weights not in columns.mixed and weights not in columns.reached
        if golden_weights and _matches(network.blocks[result], value, inputs, axis):
            found.append(result)
    return max(found, key=lambda result: sum_length(network.producers[result]), default=None)


def _matches(blocks: Blocks, value: core.Var, inputs: core.Var, axis: int) -> bool:
    """Whether the blocks hold whole channels of a value [B, ...] with its channels at `axis`, that
    the layer reads as `inputs`: as it is or flattened."""
    channels, shape = blocks.num_blocks * blocks.size, shape_of(value)
    if inputs is value:
        return (axis, blocks.outer, blocks.inner) == (blocks.input_axis, 1, 1)
    seen = (math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    return axis > 0 and seen == (blocks.outer, channels, blocks.inner)


def _rows(
    network: Network, suffix_inputs: tuple[core.Var, ...], ahead: core.Var | None
) -> tuple[core.Var, ...]:
    """The suffix inputs that something else than the layer ahead reads."""
    if ahead is None:
        return suffix_inputs
    known = {*network.leaves, *suffix_inputs, ahead}
    equations = needed_equations(network, [network.output], known)
    read = {network.output, *(var for e in equations for var in variables(e.invars))}
    return tuple(var for var in suffix_inputs if var in read)


def _gate(network: Network, source: core.Var, inputs: tuple[core.Var, ...]) -> Gate | None:
    readers = network.consumers[source]
    operands = readers[0].invars
    if len(readers) != 1 or len(operands) != 2 or operands[1] is not source:
        return None
    params, images = readers[0].params, operands[0]
    if readers[0].primitive.name == "dot_general" and images in inputs:
        contracting, batch = params["dimension_numbers"]
        if len(contracting[0]) == 1 and not batch[0]:
            return Gate(images, contracting[0][0], contracting[1][0])
    if readers[0].primitive.name == "conv_general_dilated" and images in inputs:
        spec = params["dimension_numbers"]
        if params["feature_group_count"] == params["batch_group_count"] == 1:
            return Gate(images, spec.lhs_spec[1], spec.rhs_spec[1])
    return None


class _Columns:
    """Follows columns through the equations, in order (the state of `_plan_columns`)."""

    def __init__(self, network: Network, source: core.Var, axis: int):
        self.network = network
        self.reached: dict[core.Var, int] = {source: axis}  # faulty columns
        self.pulled: dict[core.Var, int] = {}  # golden columns
        self.mixed: set[core.Var] = set()  # depends on the leaf, no longer in columns
        self.frontier: dict[core.Var, None] = {}
        self.steps: list[Step] = []
        self.taken: list[core.Var] = []
        self.golden: list[core.Var] = []

    def propagate(self, equation: core.JaxprEqn) -> None:
        operands = variables(equation.invars)
        if not self.mixed.intersection(operands):
            if not set(operands) & self.reached.keys():
                return
            axes = tuple(self._axis(value) for value in equation.invars)
            found = column_rule(equation, axes)
            if found is not None and self._try_step(equation, axes, *found):
                self.reached.update(dict.fromkeys(equation.outvars, found[0]))
                return
        self.mixed.update(equation.outvars)
        for var in operands:
            if var in self.reached:
                self.compare(var)

    def compare(self, var: core.Var) -> None:
        self.frontier[var] = None

    def _axis(self, value: Value) -> int | None:
        return None if isinstance(value, core.Literal) else self.reached.get(value)

    def _try_step(
        self,
        equation: core.JaxprEqn,
        axes: tuple[int | None, ...],
        axis: int,
        takes: tuple[int | None, ...],
    ) -> bool:
        wanted = [a if a is not None else take for a, take in zip(axes, takes, strict=True)]
        return self._add_step(equation, wanted)

    def _add_step(self, equation: core.JaxprEqn, axes: Sequence[int | None]) -> bool:
        """Adds an equation whose operands are columns along `axes`, golden where that is None."""
        for value, axis in zip(equation.invars, axes, strict=True):
            if isinstance(value, core.Literal):
                continue
            if axis is None:
                self.golden.append(value)
            elif not self._pull(value, axis):
                return False
        self.steps.append(Step(equation, tuple(axis is not None for axis in axes)))
        return True

    def _pull(self, var: core.Var, axis: int) -> bool:
        """Makes a golden value available as columns: re-indexed where it may be cut, else again
        computed from columns, so that it rounds as in the whole network."""
        if var in self.pulled or var in self.reached:
            return self.pulled.get(var, self.reached.get(var)) == axis
        if is_boundary(self.network, var):
            self.pulled[var] = axis
            self.taken.append(var)
            return True
        equation = self.network.producers[var]
        axes = operand_axes(equation, axis)
        if axes is None or not self._add_step(equation, axes):
            return False
        self.pulled[var] = axis
        return True


def is_storable(network: Network, var: core.Var) -> bool:
    """A value of the images that may be cut here, and whose rows can be picked by image."""
    axis = network.batch_axis.get(var)
    return axis is not None and axis >= 0 and is_boundary(network, var)


def _slice_inputs(network: Network, source: core.Var) -> tuple[core.Var, ...]:
    reached = reached_from(network, source)

    def may_cut(var: core.Var) -> bool:
        on_images = network.batch_axis.get(var) is not None
        return var not in reached and on_images and is_boundary(network, var)

    return _cut(network, [network.output], may_cut)


def _cut(
    network: Network,
    wanted: Iterable[Value],
    may_cut: Callable[[core.Var], bool],
    forbidden: core.Var | None = None,
) -> tuple[core.Var, ...]:
    """The values nearest to `wanted` that may be cut and from which, with the parameters, `wanted`
    can be computed."""
    found: dict[core.Var, None] = {}
    seen: set[core.Var] = set()
    stack = variables(wanted)
    while stack:
        var = stack.pop()
        if var in seen:
            continue
        seen.add(var)
        if var is forbidden:
            raise _NoColumns("what follows its channel tail reads it too")
        if may_cut(var):
            found[var] = None
        elif var in network.producers:
            stack.extend(variables(network.producers[var].invars))
        elif var is network.image:
            found[var] = None
    return _in_order(network, found)


def _in_order(network: Network, values: Iterable[core.Var]) -> tuple[core.Var, ...]:
    """Sorted by when they are computed."""
    order = {var: n for n, e in enumerate(network.equations) for var in e.outvars}
    return tuple(sorted(values, key=lambda var: order.get(var, -1)))


def mixes_images(
    network: Network, suffix_inputs: Sequence[core.Var], compared: Iterable[core.Var]
) -> str:
    """Why rows packed from several batches would not give each image's output; empty if they do.

    Args:
      suffix_inputs: what the rows are of; of the image itself, whole batches.
      compared: values whose rows must be the images' too, besides the output's.
    """
    batch = shape_of(network.image)[0]
    if batch == 1:
        return ""
    equations = needed_equations(network, [network.output], {*network.leaves, *suffix_inputs})
    states: dict[core.Var, State] = dict.fromkeys(network.leaves, never)
    states |= {var: uniform_constant(value) for var, value in network.given.items()}
    states |= {var: Run(network.batch_axis[var], batch) for var in suffix_inputs}
    results: dict[Value, Run] = {network.output: Run(0, batch)}
    results |= {var: Run(network.batch_axis[var], batch) for var in compared}
    return mixes_rows(equations, states, results)


def _check_batch_axis(network: Network, var: core.Var, column_axis: int) -> None:
    axis = network.batch_axis.get(var)
    if axis is None:
        producer = network.producers.get(var)
        raise _NoColumns(f"{producer.primitive.name if producer else 'its reader'} mixes channels")
    if axis < 0 or axis == column_axis:
        raise _NoColumns("the images' axis of a value behind it cannot be told")
