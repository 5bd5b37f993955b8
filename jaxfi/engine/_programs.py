"""The compiled programs of one leaf: prefix, columns, pack, suffix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxfi.engine._compilation import compiled
from jaxfi.engine._costs import golden_bytes, num_held, working_bytes
from jaxfi.engine._golden import Setup
from jaxfi.engine._plan import LeafPlan, is_storable
from jaxfi.faults._transforms import corrupt, corrupt_distinct, to_words
from jaxfi.network._blocks import (
    Blocks,
    Partials,
    block_of,
    climb,
    layer_dot,
    partials,
    replace_channel,
    siblings,
)
from jaxfi.network._equations import read, variables
from jaxfi.network._graph import Network, evaluate, needed_equations, run


class Golden(NamedTuple):
    """What the prefix puts out: `plan.inputs`, and the partial sums of `plan.products`."""

    inputs: list[jax.Array]
    products: list[Partials]


class Pick(NamedTuple):
    """What goes into each of B rows: column and image of a pair, its channel, and whether new. The
    host sends it as one array [4, B] of integers."""

    column: jax.Array
    image: jax.Array
    channel: jax.Array
    fresh: jax.Array


class Segment(NamedTuple):
    """A part of the suffix, `program(leaves, values, block) -> values`, and the leaves it reads."""

    leaves: list[int]
    program: Callable


class Programs:
    """One leaf's programs; jit compiles those that are run. Holds golden values (`golden`).

    Leaves of one layer have the same suffix and often the same prefix, leaves of equal shapes other
    programs: `shared` keeps them.
    """

    def __init__(self, network: Network, plan: LeafPlan, shared: dict):
        self.network, self.plan, self.shared = network, plan, shared
        self._alone = copy.copy(self)  # without golden values: programs outlive the campaign
        self.faulty_leaf = self._common(corrupt)
        self._faulty_columns = self._common(_faulty_columns, static_argnames="how")
        self._lit = self._common(_lit, static_argnames="axis")
        self._taken = self._common(_taken, static_argnames="axis")
        self._same_columns = self._common(_same_columns, static_argnames="place")
        key = columns_key(plan)
        self.columns = shared.setdefault(("columns", key), compiled(self._alone._columns))
        self.pack = shared.setdefault(("pack", key), compiled(self._alone._pack))
        self._suffix = [self._segment(number) for number in range(len(plan.stops))]
        self._golden: dict[int, Golden] = {}
        self._earlier: dict[int, dict[core.Var, jax.Array]] = {}  # values to start the prefix from
        self._starts: dict[int, tuple] = {}  # what the prefix of each of `_golden` started from

    def suffix(self, leaves: list[jax.Array], rows: list[jax.Array], block: int) -> jax.Array:
        """The network's outputs [B, classes] for rows packed by `pack`."""
        values = rows
        for segment in self._suffix:
            values = segment.program([leaves[n] for n in segment.leaves], values, block)
        return values[0]

    def golden(self, setup: Setup, number: int) -> Golden:
        """The prefix on one batch; kept for the leaf's next faults where memory allows it."""
        if number in self._golden:
            return self._golden[number]
        num_held, num_all = self._num_held(setup), len(setup.batches) + len(setup.shuffled)
        stored = num_held >= (len(setup.batches) if number >= 0 else num_all)
        if setup.sampled and number >= 0:
            stored = True
            while self._golden and len(self._golden) + len(self._earlier) >= num_held:
                del self._golden[next(iter(self._golden))]
        self._starts[number] = self._start_of(number)
        start: dict[core.Var, Any] = {self.network.image: setup.batch(number)}
        values = self._run_prefix(setup, start | self._earlier.pop(number, {}))
        if stored:
            self._golden[number] = values
        return values

    def prefix_of(self, number: int) -> tuple:
        """What the prefix on a batch gives, and starts from: that decides its program."""
        return *self._wanted(), self._start_of(number)

    def _start_of(self, number: int) -> tuple:
        if number in self._golden:
            return self._starts[number]
        return self.network.image, *self._earlier.get(number, ())

    @property
    def holds_golden(self) -> bool:
        """Whether golden values are kept."""
        return bool(self._golden or self._earlier)

    def forget(self) -> None:
        """Frees the golden values."""
        self._golden, self._earlier, self._starts = {}, {}, {}

    def take_over(self, setup: Setup, before: Programs | None) -> None:
        """Goes on from what `before` holds, where both fit in memory, and frees that."""
        if before is None or before is self:
            return
        held, starts = before._golden, before._starts
        before.forget()
        if self.plan.method not in ("columns", "slice"):
            return
        plans = (self.plan, before.plan)
        size = len(held) * sum(golden_bytes(self.network, plan) for plan in plans)
        size += working_bytes(self.network, self.plan)
        all_there = setup.sampled or all(number in held for number in range(len(setup.batches)))
        if not all_there or size > setup.memory or self.holds_golden:
            return
        if self._wanted() == before._wanted():
            self._golden, self._starts = held, starts
            return
        storable = [is_storable(self.network, var) for var in before.plan.inputs]
        for number in held:
            values = zip(before.plan.inputs, held[number].inputs, storable, strict=True)
            self._earlier[number] = {var: value for var, value, stored in values if stored}

    def batches_held(self, setup: Setup) -> int:
        """How many batches' golden values fit in memory together, at least 1."""
        return min(self._num_held(setup), len(setup.batches))

    def _num_held(self, setup: Setup) -> int:
        """As many, those of shuffled batches among them."""
        golden = golden_bytes(self.network, self.plan)
        working = working_bytes(self.network, self.plan)
        num_all = len(setup.batches) + len(setup.shuffled)
        return num_held(setup.memory, golden, working, num_all)

    def golden_rows(self, golden: Golden, images: np.ndarray | None = None) -> list[jax.Array]:
        """A batch of rows for the suffix in which nothing is faulty; of block 0.

        `images` [n] are the batch's images in the first n rows; by default each in its place.
        """
        given = dict(zip(self.plan.inputs, golden.inputs, strict=True))
        rows = [given[var] for var in self.plan.whole]
        axes = [self.network.batch_axis[var] for var in self.plan.whole]
        if self.plan.ahead is not None:
            product = self._product(golden, self.plan.ahead)
            rows = [product.inputs[0], *siblings(product.levels, 0), *rows]
            axes = [0] * (len(rows) - len(axes)) + axes
        if images is None or np.array_equal(images, np.arange(len(images))):
            return rows
        every = np.arange(rows[0].shape[axes[0]], dtype=np.int32)
        every[: len(images)] = images
        return [self._taken(row, every, axis=a) for row, a in zip(rows, axes, strict=True)]

    def stores_golden(
        self, stored: list[jax.Array], golden: Golden, channel: np.ndarray
    ) -> list[jax.Array]:
        """Of each packed value, whether its columns are golden's channels, to the bit."""
        given = dict(zip(self.plan.inputs, golden.inputs, strict=True))
        places = [(self.plan.axes[var], self.network.batch_axis[var]) for var in self.plan.packed]
        return [
            self._same_columns(columns, given[var], channel, place=place)
            for columns, var, place in zip(stored, self.plan.packed, places, strict=True)
        ]

    def empty_rows(self, device: Any) -> list[jax.Array]:
        """A batch of rows of zeros for the suffix, on the device that packs them: rows that are
        bound to none would compile `pack` a second time."""
        avals: list[Any] = [var.aval for var in self.plan.whole]
        if self.plan.ahead is not None:
            result, blocks = self.plan.ahead.aval, self.ahead
            inputs: Any = self.network.producers[self.plan.ahead].invars[0].aval
            shape = list(inputs.shape)
            shape[blocks.input_axis] = blocks.length
            height = blocks.num_blocks.bit_length() - 1
            avals = [inputs.update(shape=tuple(shape)), *[result] * height, *avals]
        return [jnp.zeros(aval.shape, aval.dtype, device=device) for aval in avals]

    def faulty_columns(self, leaf, block, channel, element, keep, flip) -> jax.Array:
        """A leaf of the same shape, or one block of it: column k is channel k's, with fault k."""
        how = (self.plan.axis, self.own)
        return self._faulty_columns(leaf, block, channel, element, keep, flip, how=how)

    def lit(self, golden: Golden) -> jax.Array:
        """Which input channels are not zero everywhere in a batch, [channels] bool."""
        gate = self.plan.gate
        assert gate is not None, "only called where there is a gate"
        values = golden.inputs[self.plan.inputs.index(gate.inputs)]
        return self._lit(values, axis=gate.input_axis)

    @property
    def own(self) -> Blocks | None:
        """The blocks of the leaf's own layer."""
        return None if self.plan.own is None else self.network.blocks[self.plan.own]

    @property
    def ahead(self) -> Blocks:
        """The blocks of the layer that reads the packed channel."""
        assert self.plan.ahead is not None, "only called where there is such a layer"
        return self.network.blocks[self.plan.ahead]

    def _common(self, function: Callable, **options: Any) -> Callable:
        """One program for all leaves, compiled once for leaves of equal shapes."""
        return self.shared.setdefault(function, compiled(function, **options))

    def _wanted(self) -> tuple:
        return self.plan.inputs, self.plan.products

    def _run_prefix(self, setup: Setup, known: dict[core.Var, jax.Array]) -> Golden:
        start = tuple(known)
        key = ("prefix", self._wanted(), start)
        alone = self._alone

        def prefix(leaves: list, values: list) -> Golden:
            return alone._prefix(leaves, dict(zip(start, values, strict=True)))

        program = self.shared.setdefault(key, compiled(prefix))
        return program(jax.tree.leaves(setup.params), list(known.values()))

    def _prefix(self, leaves: list, start: dict[core.Var, jax.Array]) -> Golden:
        known = {**self._leaves(leaves), **start}
        products = []
        for result in self.plan.products:
            equation = self.network.producers[result]
            x, weights = evaluate(self.network, equation.invars, known)
            how = self.network.blocks[result]
            products.append(partials(x, weights, how, layer_dot(equation)))
            known[result] = climb(*products[-1].levels[-1])
        return Golden(evaluate(self.network, self.plan.inputs, known), products)

    def _product(self, golden: Golden, result: core.Var) -> Partials:
        return golden.products[self.plan.products.index(result)]

    def _leaves(self, leaves: list) -> dict[core.Var, jax.Array]:
        return dict(zip(self.network.leaves, leaves, strict=True))

    def _columns(self, leaves: list, golden: Golden, faulty, block, channel: jax.Array):
        """Which pairs changed, [C, B] bool, and each column of the values to pack, [C, B, ...]."""
        plan, network = self.plan, self.network
        given = dict(zip(plan.inputs, golden.inputs, strict=True))
        wanted = (*plan.golden, *plan.taken)
        known = {**self._leaves(leaves), **given}
        plain = {**known, **dict(zip(wanted, evaluate(network, wanted, known), strict=True))}
        env = {network.leaves[plan.leaf]: faulty}
        for var in plan.taken:
            env[var] = jnp.take(plain[var], channel, axis=plan.axes[var], mode="clip")
        for step in plan.steps:
            if plan.own is not None and step.equation.outvars[0] is plan.own:
                env[plan.own] = self._own_layer(golden, faulty, block, channel)
                continue
            operands = [
                read(env if column else plain, value)
                for value, column in zip(step.equation.invars, step.columns, strict=True)
            ]
            results = run(network, step.equation, operands)
            env.update(zip(step.equation.outvars, results, strict=True))
        changed = [self._changed(env[var], given[var], var, channel) for var in plan.compared]
        return jnp.any(jnp.stack(changed), axis=0), [
            self._by_fault(env[var], var) for var in plan.packed
        ]

    def _own_layer(self, golden: Golden, faulty, block, channel) -> jax.Array:
        """Columns of the leaf's blocked layer: the faulty block's partial sum, the rest golden."""
        own = self.plan.own
        assert own is not None
        product = self._product(golden, own)
        inputs = lax.dynamic_index_in_dim(product.inputs, block, keepdims=False)
        others = [
            jnp.take(other, channel, axis=1, mode="clip")
            for other in siblings(product.levels, block)
        ]
        dot = layer_dot(self.network.producers[own])
        return climb(dot(inputs, faulty), *others)

    def _by_fault(self, value: jax.Array, var: core.Var) -> jax.Array:
        """Columns and images first: [C, B, ...]."""
        return jnp.moveaxis(value, (self.plan.axes[var], self.network.batch_axis[var]), (0, 1))

    def _changed(self, faulty, golden, var, channel) -> jax.Array:
        golden = jnp.take(golden, channel, axis=self.plan.axes[var], mode="clip")
        differs = self._by_fault(_bits_differ(faulty, golden), var)
        return jnp.any(differs, axis=tuple(range(2, differs.ndim)))

    def _pack(self, rows: list, golden: Golden, columns: list, picked: jax.Array, block) -> list:
        """`rows` with those that `picked`, a `Pick`, names replaced by pairs of this batch."""
        pick = Pick(*picked)
        given = dict(zip(self.plan.inputs, golden.inputs, strict=True))
        new, axes = [], []
        if self.plan.ahead is not None:
            new += self._block_rows(golden, columns[0], pick, block)
            axes += [0] * len(new)
        for var in self.plan.whole:
            axes.append(self.network.batch_axis[var])
            row = jnp.take(given[var], pick.image, axis=axes[-1], mode="clip")
            if var in self.plan.packed:
                faulty = columns[self.plan.packed.index(var)]
                faulty = faulty[pick.column, pick.image]  # [B, ...] one channel
                row = self._replace_channel(row, faulty, pick.channel, var)
            new.append(row)
        return [
            jnp.where(_along(pick.fresh > 0, axis, row.ndim), row, old)
            for row, old, axis in zip(new, rows, axes, strict=True)
        ]

    def _block_rows(self, golden: Golden, columns: jax.Array, pick: Pick, block) -> list:
        """Of the blocked layer ahead: the inputs of its one faulty block, and the siblings."""
        assert self.plan.ahead is not None
        product = self._product(golden, self.plan.ahead)
        inputs = lax.dynamic_index_in_dim(product.inputs, block, keepdims=False)
        picked = [
            jnp.take(value, pick.image, axis=0, mode="clip")
            for value in (inputs, *siblings(product.levels, block))
        ]
        faulty = columns[pick.column, pick.image]
        return [replace_channel(picked[0], self.ahead, pick.channel, faulty), *picked[1:]]

    def _replace_channel(self, rows, faulty, channel, var) -> jax.Array:
        axis, batch = self.plan.axes[var], self.network.batch_axis[var]
        faulty = jnp.expand_dims(jnp.moveaxis(faulty, 0, batch - (axis < batch)), axis)
        index = _along(jnp.arange(rows.shape[axis], dtype=jnp.int32), axis, rows.ndim)
        return jnp.where(index == _along(channel, batch, rows.ndim), faulty, rows)

    def _segment(self, number: int) -> Segment:
        """The suffix up to `plan.stops[number]`, shared with all leaves that run it."""
        plan, network, alone = self.plan, self.network, self._alone
        starts = variables(plan.stops[number - 1]) if number else [*plan.whole]
        ahead, stops = None if number else plan.ahead, plan.stops[number]
        known = {*network.leaves, *starts} | ({ahead} if ahead is not None else set())
        equations = needed_equations(network, stops, known)
        weights = [] if ahead is None else network.producers[ahead].invars[1:]
        equations += needed_equations(network, weights, network.leaves)
        read = {*weights, *(var for e in equations for var in variables(e.invars))}
        leaves = [n for n, leaf in enumerate(network.leaves) if leaf in read]

        def segment(of_leaves: list, values: list, block) -> list:
            known = {network.leaves[n]: leaf for n, leaf in zip(leaves, of_leaves, strict=True)}
            count = len(values) - len(starts)  # before those: what the layer ahead starts from
            known.update(zip(starts, values[count:], strict=True))
            if ahead is not None:
                known[ahead] = alone._layer_ahead(known, values[:count], block)
            return evaluate(network, stops, known)

        key = ("suffix", tuple(starts), ahead, stops)
        return Segment(leaves, self.shared.setdefault(key, compiled(segment)))

    def _layer_ahead(self, known: dict[core.Var, jax.Array], of_block: list, block) -> jax.Array:
        """The blocked layer ahead, from its block's inputs and the siblings."""
        assert self.plan.ahead is not None
        equation, blocks = self.network.producers[self.plan.ahead], self.ahead
        weights = evaluate(self.network, equation.invars[1:], known)[0]
        weights = block_of(weights, blocks.weight_axis, blocks, block)
        return climb(layer_dot(equation)(of_block[0], weights), *of_block[1:])


def is_compiled(plan: LeafPlan, programs: dict) -> bool:
    """Whether a campaign has run the plan before, with these programs."""
    return ("columns", columns_key(plan)) in programs


def columns_key(plan: LeafPlan) -> tuple:
    """All of a plan that its columns and packing depend on."""
    steps = tuple((id(step.equation), step.columns) for step in plan.steps)
    values = (plan.taken, plan.golden, plan.compared, plan.packed, plan.carried, plan.inputs)
    layers = (plan.own, plan.ahead, plan.whole, plan.products)
    return plan.leaf, plan.method, plan.axis, steps, values, layers


def _faulty_columns(leaf, block, channel, element, keep, flip, how: tuple) -> jax.Array:
    axis, own = how
    if own is not None:
        leaf = block_of(leaf, own.weight_axis, own, block)
    columns = jnp.take(leaf, channel, axis=axis, mode="clip")
    if element.ndim > 1:  # several in each column
        return corrupt(columns, *(array.reshape(-1) for array in (element, keep, flip)))
    return corrupt_distinct(columns, element, keep, flip)  # one in each column


def _taken(row: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    return jnp.take(row, places, axis=axis, mode="clip")


def _same_columns(
    columns: jax.Array, golden: jax.Array, channel: jax.Array, place: tuple[int, int]
) -> jax.Array:
    known = jnp.moveaxis(jnp.take(golden, channel, axis=place[0], mode="clip"), place, (0, 1))
    return ~jnp.any(_bits_differ(columns, known))


def _lit(values: jax.Array, axis: int) -> jax.Array:
    return jnp.any(values != 0, axis=[other for other in range(values.ndim) if other != axis])


def _bits_differ(a: jax.Array, b: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(a):
        return _bits_differ(a.real, b.real) | _bits_differ(a.imag, b.imag)
    return a != b if a.dtype == bool else to_words(a) != to_words(b)


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])
