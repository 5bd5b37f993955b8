"""Three engines behind one signature: `run(faults) -> Results` on every image.

reference  inject, run the plain network, one fault at a time: the oracle for everything.
vmap       the whole network vmapped over a batch of faulty parameters, golden as one lane.
fast       columns, channel tail, packed suffix (jaxfi.plan says what runs where).

All run batches of one size, padded, so that every operation keeps its shape: floating-point sums
depend on it. See docs/engine.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxfi.fault_list import FaultList
from jaxfi.faults import FAULT_MODELS, Fault, PyTree, corrupt, inject, to_words
from jaxfi.outcomes import Results, judge
from jaxfi.plan import LeafPlan, leaf_bytes, plan_leaves
from jaxfi.slicing import ApplyFn, Network, bind, evaluate, read, trace_network

# A 16-bit network must round after every operation, wherever the compiler could keep 32 bits.
_OPTIONS = {"xla_allow_excess_precision": False}
# XLA's CPU library fuses whole stages of a network, and one convolution rounds differently in each:
# allow it single matmuls. (Single convolutions are exact too, but slower with few channels.)
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_NULL = FAULT_MODELS.index("null")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a campaign holds fixed, on one device.

    Attributes:
      apply_fn, params: the network.
      batches: [num_batches, batch_size, ...] images, the last batch padded.
      labels: [N] int32.
      golden: [N, classes] fault-free outputs.
      nan: see `jaxfi.outcomes.judge`.
      memory: bytes that golden activations of several batches may take together.
    """

    apply_fn: ApplyFn
    params: PyTree
    batches: np.ndarray
    labels: np.ndarray
    golden: np.ndarray
    nan: str
    memory: int

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def batch_size(self) -> int:
        return self.batches.shape[1]


Advance = Callable[[int], None]  # told how many (fault, image) pairs are done
Engine = Callable[[FaultList, Advance], Results]


def compiled(function: Callable, **options) -> Callable:
    """`jax.jit` with the arithmetic of a campaign: every engine compiles with it."""
    on_cpu = jax.default_backend() == "cpu"
    arithmetic = {**_OPTIONS, **(_CPU_OPTIONS if on_cpu else {})}
    return jax.jit(function, compiler_options=arithmetic, **options)


def golden_run(
    apply_fn: ApplyFn, params: PyTree, batches: np.ndarray, num_images: int
) -> np.ndarray:
    """Fault-free outputs, [num_images, classes]."""
    network = compiled(apply_fn)
    outputs = [np.asarray(network(params, batch)) for batch in batches]
    return np.concatenate(outputs)[:num_images]


def reference_engine(setup: Setup) -> Engine:
    """Plain re-execution: for each fault, inject and run the user's network on every batch."""
    network = compiled(setup.apply_fn)

    def run(faults: FaultList, advance: Advance) -> Results:
        tally = Tally(setup, len(faults))
        _rerun(network, setup, faults, np.arange(len(faults)), tally, advance)
        return tally.results()

    return run


def vmap_engine(setup: Setup, lanes: int = 8) -> Engine:
    """The whole network vmapped over `lanes` faults at once; the last lane is golden, a null fault.

    A lane's sums may be ordered differently from the plain network's: each is judged against the
    golden lane of its own program, so a null fault is always masked.
    """

    def network(params: PyTree, faults: Fault, batch: jax.Array) -> jax.Array:
        return jax.vmap(lambda fault: setup.apply_fn(inject(params, fault), batch))(faults)

    network = compiled(network)

    def run(faults: FaultList, advance: Advance) -> Results:
        tally = Tally(setup, len(faults))
        for start in range(0, len(faults), lanes - 1):
            rows = np.arange(start, min(start + lanes - 1, len(faults)))
            group = faults[rows].padded(lanes).batch()
            for number, batch in enumerate(setup.batches):
                outputs = network(setup.params, group, batch)
                for lane, row in enumerate(rows):
                    tally.add_batch(row, number, outputs[lane], golden=outputs[-1])
                advance(len(rows) * _images_in(setup, number))
        return tally.results()

    return run


def fast_engine(setup: Setup) -> Engine:
    """Columns, channel tail and packed suffix; each leaf's programs are compiled once."""
    image = jax.ShapeDtypeStruct(setup.batches.shape[1:], setup.batches.dtype)
    network = trace_network(setup.apply_fn, setup.params, image)
    plans = plan_leaves(network)
    programs: dict[int, _Programs] = {}
    shared: dict = {}

    def run(faults: FaultList, advance: Advance) -> Results:
        tally = Tally(setup, len(faults))
        for leaf in np.unique(faults.leaf):
            for other in programs.keys() - {leaf}:
                programs[other].forget()
            if leaf not in programs:
                programs[leaf] = _uncut_if_inexact(_Programs(network, plans[leaf], shared), setup)
            rows = np.flatnonzero(faults.leaf == leaf)
            runner = _RUNNERS[programs[leaf].plan.method]
            runner(setup, programs[leaf], faults[rows], rows, tally, advance)
        return tally.results()

    return run


ENGINES: dict[str, Callable[[Setup], Engine]] = {
    "fast": fast_engine,
    "reference": reference_engine,
    "vmap": vmap_engine,
}


class Tally:
    """Collects verdicts; a pair that is never added is golden, so masked."""

    def __init__(self, setup: Setup, num_faults: int):
        self._golden = jnp.asarray(setup.golden)
        self._labels = jnp.asarray(setup.labels)
        self._setup = setup
        self._judge = _JUDGES[setup.nan]
        golden = self._judge(self._golden, self._golden, self._labels)
        shape = (num_faults, setup.num_images)
        self.outcome = np.zeros(shape, np.uint8)
        self.due = np.broadcast_to(np.asarray(golden.due), shape).copy()
        self._golden_correct = np.asarray(golden.correct)
        self.correct = np.full(num_faults, self._golden_correct.sum(), np.int32)
        self._waiting: list[tuple] = []

    def add_batch(self, row: int, number: int, outputs: jax.Array, golden: jax.Array | None = None):
        """Outputs [batch, classes] of one fault on one whole batch."""
        count = _images_in(self._setup, number)
        images = np.arange(count) + number * self._setup.batch_size
        golden = jnp.asarray(self._setup.golden[images]) if golden is None else golden[:count]
        verdict = self._judge(golden, outputs[:count], self._labels[images])
        self._record(np.full(count, row), images, jax.tree.map(np.asarray, verdict))

    def add_rows(self, rows: np.ndarray, images: np.ndarray, outputs: jax.Array) -> None:
        """Outputs [batch, classes] of packed rows; a row of -1 is padding."""
        verdict = _judge_rows(self._golden, self._labels, outputs, images, nan=self._setup.nan)
        self._waiting.append((rows, images, verdict))
        if len(self._waiting) > 4:  # let the device run ahead of the host
            self._settle(self._waiting.pop(0))

    def results(self) -> Results:
        while self._waiting:
            self._settle(self._waiting.pop(0))
        return Results(self.outcome, self.due, self.correct)

    def _settle(self, waiting: tuple) -> None:
        rows, images, verdict = waiting
        real = rows >= 0
        verdict = jax.tree.map(lambda array: np.asarray(array)[real], verdict)
        self._record(rows[real], images[real], verdict)

    def _record(self, rows: np.ndarray, images: np.ndarray, verdict) -> None:
        self.outcome[rows, images] = verdict.outcome
        self.due[rows, images] = verdict.due
        change = verdict.correct.astype(np.int32) - self._golden_correct[images]
        np.add.at(self.correct, rows, change)


_JUDGES = {
    nan: jax.jit(lambda golden, faulty, labels, nan=nan: judge(golden, faulty, labels, nan))
    for nan in ("critical", "argmax")
}


def _gather_and_judge(golden, labels, outputs, images, *, nan):
    return judge(golden[images], outputs, labels[images], nan)


_judge_rows = jax.jit(_gather_and_judge, static_argnames="nan")


class _Programs:
    """The programs of one leaf: prefix, columns, pack, suffix; jit compiles those that are run.

    Leaves of one layer have the same suffix and often the same prefix: `shared` keeps them.
    """

    def __init__(self, network: Network, plan: LeafPlan, shared: dict):
        self.network, self.plan = network, plan
        self.faulty_columns = compiled(self._faulty_columns)
        self.faulty_leaf = compiled(corrupt)
        self.columns = compiled(self._columns)
        self.pack = compiled(self._pack)
        self.lit = compiled(self._lit)
        self.shared = shared
        prefix, suffix = ("prefix", plan.inputs), ("suffix", plan.suffix_inputs)
        self._golden: dict[int, list] = {}
        self.prefix = shared.setdefault(prefix, compiled(self._prefix))
        self.suffix = shared.setdefault(suffix, compiled(self._suffix))

    def golden_inputs(self, setup: Setup, number: int) -> list:
        """The prefix on one batch; kept for the leaf's next faults where memory allows it."""
        if number in self._golden:
            return self._golden[number]
        values = self.prefix(jax.tree.leaves(setup.params), setup.batches[number])
        if self.batches_held(setup) == len(setup.batches):
            self._golden[number] = values
        return values

    def batches_held(self, setup: Setup) -> int:
        """How many batches' golden values fit in memory together, at least 1."""
        size = sum(leaf_bytes(self.network, var) for var in self.plan.inputs)
        return max(1, min(len(setup.batches), setup.memory // max(1, size)))

    def _lit(self, inputs: list) -> jax.Array:
        """Which input channels are not zero everywhere in a batch, [channels] bool."""
        gate = self.plan.gate
        assert gate is not None, "only called where there is a gate"
        values = inputs[self.plan.inputs.index(gate.inputs)]
        others = [axis for axis in range(values.ndim) if axis != gate.input_axis]
        return jnp.any(values != 0, axis=others)

    def forget(self) -> None:
        """Frees the golden values kept."""
        self._golden.clear()

    def _leaves(self, leaves: list) -> dict[core.Var, jax.Array]:
        return dict(zip(self.network.leaves, leaves, strict=True))

    def _prefix(self, leaves: list, batch: jax.Array) -> list:
        known = {**self._leaves(leaves), self.network.image: batch}
        return evaluate(self.network, self.plan.inputs, known)

    def _faulty_columns(self, leaf, channel, element, keep, flip) -> jax.Array:
        """A leaf of the same shape: column k is channel k's column of the leaf, with fault k."""
        columns = jnp.take(leaf, channel, axis=self.plan.axis, mode="clip")
        return corrupt(columns, element, keep, flip)

    def _columns(self, leaves: list, inputs: list, faulty: jax.Array, channel: jax.Array):
        """Which pairs changed, [C, B] bool, and each column of the values to pack, [C, B, ...]."""
        plan, network = self.plan, self.network
        given = dict(zip(plan.inputs, inputs, strict=True))
        wanted = (*plan.golden, *plan.taken)
        known = {**self._leaves(leaves), **given}
        golden = {**known, **dict(zip(wanted, evaluate(network, wanted, known), strict=True))}
        env = {network.leaves[plan.leaf]: faulty}
        for var in plan.taken:
            env[var] = jnp.take(golden[var], channel, axis=plan.axes[var], mode="clip")
        for step in plan.steps:
            operands = [
                read(env if column else golden, value)
                for value, column in zip(step.equation.invars, step.columns, strict=True)
            ]
            env.update(zip(step.equation.outvars, bind(step.equation, operands), strict=True))
        changed = [self._changed(env[var], given[var], var, channel) for var in plan.compared]
        changed = jnp.any(jnp.stack(changed), axis=0)
        return changed, [self._by_fault(env[var], var) for var in plan.packed]

    def _by_fault(self, value: jax.Array, var: core.Var) -> jax.Array:
        """Columns and images first: [C, B, ...]."""
        return jnp.moveaxis(value, (self.plan.axes[var], self.network.batch_axis[var]), (0, 1))

    def _changed(self, faulty, golden, var, channel) -> jax.Array:
        golden = jnp.take(golden, channel, axis=self.plan.axes[var], mode="clip")
        differs = self._by_fault(_bits_differ(faulty, golden), var)
        return jnp.any(differs, axis=tuple(range(2, differs.ndim)))

    def _pack(self, rows: list, inputs: list, columns: list, pick: Pick) -> list:
        """`rows` with those that `pick` names replaced by pairs of this batch."""
        given = dict(zip(self.plan.inputs, inputs, strict=True))
        packed = []
        for position, var in enumerate(self.plan.suffix_inputs):
            axis = self.network.batch_axis[var]
            row = jnp.take(given[var], pick.image, axis=axis, mode="clip")
            if position < len(columns):
                faulty = columns[position][pick.column, pick.image]  # [B, ...] one channel
                row = self._replace_channel(row, faulty, pick.channel, var)
            fresh = _along(pick.fresh, axis, row.ndim)
            packed.append(jnp.where(fresh, row, rows[position]))
        return packed

    def _replace_channel(self, rows, faulty, channel, var) -> jax.Array:
        axis, batch = self.plan.axes[var], self.network.batch_axis[var]
        faulty = jnp.expand_dims(jnp.moveaxis(faulty, 0, batch - (axis < batch)), axis)
        index = _along(jnp.arange(rows.shape[axis], dtype=jnp.int32), axis, rows.ndim)
        return jnp.where(index == _along(channel, batch, rows.ndim), faulty, rows)

    def _suffix(self, leaves: list, rows: list) -> jax.Array:
        known = {**self._leaves(leaves), **dict(zip(self.plan.suffix_inputs, rows, strict=True))}
        return evaluate(self.network, [self.network.output], known)[0]


def _bits_differ(a: jax.Array, b: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(a):
        return _bits_differ(a.real, b.real) | _bits_differ(a.imag, b.imag)
    return a != b if a.dtype == bool else to_words(a) != to_words(b)


class Pick(NamedTuple):
    """What goes into each of B rows: column and image of a pair, its channel, and whether new."""

    column: np.ndarray
    image: np.ndarray
    channel: np.ndarray
    fresh: np.ndarray


def _along(vector: jax.Array, axis: int, ndim: int) -> jax.Array:
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _images_in(setup: Setup, number: int) -> int:
    return min(setup.batch_size, setup.num_images - number * setup.batch_size)


def _run_unreached(setup, programs, faults, rows, tally, advance) -> None:
    advance(len(faults) * setup.num_images)


def _uncut_if_inexact(programs: _Programs, setup: Setup) -> _Programs:
    """Runs prefix and suffix on one batch: if a compiler rounds them otherwise than the whole
    network, in a way that `is_boundary` does not know, the leaf's faults re-run the network."""
    plan = programs.plan
    if plan.method == "unreached":
        return programs
    given = dict(zip(plan.inputs, programs.golden_inputs(setup, 0), strict=True))
    rows = [given[var] for var in plan.suffix_inputs]
    outputs = np.asarray(programs.suffix(jax.tree.leaves(setup.params), rows))
    count = _images_in(setup, 0)
    if outputs[:count].tobytes() == setup.golden[:count].tobytes():
        return programs
    whole = dataclasses.replace(plan, method="whole", reason="cutting the network moves bits")
    return _Programs(programs.network, whole, programs.shared)


def _run_whole(setup, programs, faults, rows, tally, advance) -> None:
    """Plain re-execution of the whole network."""
    network = programs.shared.setdefault("whole", compiled(setup.apply_fn))
    _rerun(network, setup, faults, rows, tally, advance)


@functools.cache
def _injector() -> Callable:
    return compiled(inject)


def _rerun(network, setup, faults, rows, tally, advance) -> None:
    injected = _injector()
    for row, position in enumerate(rows):
        params = injected(setup.params, faults.fault(row))
        for number, batch in enumerate(setup.batches):
            tally.add_batch(position, number, network(params, batch))
            advance(_images_in(setup, number))


def _run_slice(setup, programs, faults, rows, tally, advance) -> None:
    """The suffix alone, one fault at a time."""
    plan, leaves = programs.plan, jax.tree.leaves(setup.params)
    for number in range(len(setup.batches)):
        given = dict(zip(plan.inputs, programs.golden_inputs(setup, number), strict=True))
        golden = [given[var] for var in plan.suffix_inputs]
        for row, fault in zip(rows, _each(faults), strict=True):
            faulty = programs.faulty_leaf(leaves[plan.leaf], *fault)
            swapped = [faulty if n == plan.leaf else x for n, x in enumerate(leaves)]
            tally.add_batch(row, number, programs.suffix(swapped, golden))
            advance(_images_in(setup, number))


def _each(faults: FaultList) -> Iterator[tuple]:
    batch = jax.tree.map(np.asarray, faults.batch())
    return zip(batch.element, batch.keep, batch.flip, strict=True)


def _run_columns(setup, programs, faults, rows, tally, advance) -> None:
    plan, leaves = programs.plan, jax.tree.leaves(setup.params)
    packer = _Packer(setup, programs, leaves, tally)
    num_held = programs.batches_held(setup)
    for first in range(0, len(setup.batches), num_held):
        held = range(first, min(first + num_held, len(setup.batches)))
        golden = [programs.golden_inputs(setup, number) for number in held]
        visible = _visible(programs, setup, faults, golden)
        order = np.argsort(visible.sum(axis=0), kind="stable")  # the invisible ride together
        groups = _groups(faults[order], rows[order], plan, faults.shapes[plan.leaf])
        for group, start in zip(groups, itertools.count(0, plan.num_columns), strict=False):
            seen = visible[:, order[start : start + plan.num_columns]].any(axis=1)
            if seen.any():
                faulty = programs.faulty_columns(leaves[plan.leaf], *group.columns)
            for number, inputs, any_seen in zip(held, golden, seen, strict=True):
                if any_seen:
                    changed, columns = programs.columns(leaves, inputs, faulty, group.columns[0])
                    packer.submit(group, number, inputs, changed, columns)
                advance(group.num_faults * _images_in(setup, number))
        packer.drain()
    packer.flush()


def _visible(
    programs: _Programs, setup: Setup, faults: FaultList, golden: list[list]
) -> np.ndarray:
    """Which faults may change anything in which batch, [batches, F] bool.

    A fault is invisible if the input channel that its weight multiplies is zero throughout, and
    the faulty weight has the golden one's sign and is far from infinite: the products are then the
    same zeros, whatever the order of the sum. Null faults stay visible, to do their work.
    """
    plan, gate = programs.plan, programs.plan.gate
    everything = np.ones((len(golden), len(faults)), bool)
    dtype = jnp.dtype(faults.dtypes[plan.leaf])
    if gate is None or not jnp.issubdtype(dtype, jnp.floating):
        return everything
    before, after = faults.values(setup.params)
    tame = np.abs(np.stack([before, after])) < float(jnp.finfo(dtype).max) / 2
    same = tame.all(axis=0) & (np.signbit(before) == np.signbit(after)) & (faults.model != _NULL)
    place = np.unravel_index(faults.element, faults.shapes[plan.leaf])
    lit = np.stack([np.asarray(programs.lit(inputs)) for inputs in golden])
    return lit[:, place[gate.leaf_axis]] | ~same


class _Group(NamedTuple):
    """Up to C faults that ride together: their rows in the tally, and what builds the columns."""

    rows: np.ndarray
    null: np.ndarray
    columns: tuple

    @property
    def num_faults(self) -> int:
        return int((self.rows >= 0).sum())


def _groups(
    faults: FaultList, rows: np.ndarray, plan: LeafPlan, shape: tuple[int, ...]
) -> Iterator[_Group]:
    for start in range(0, len(faults), plan.num_columns):
        part = faults[start : start + plan.num_columns]
        padding = (0, plan.num_columns - len(part))
        part_rows = np.pad(rows[start : start + len(part)], padding, constant_values=-1)
        batch = jax.tree.map(np.asarray, part.padded(plan.num_columns).batch())
        place = list(np.unravel_index(batch.element, shape))
        channel = place[plan.axis].astype(np.int32)
        place[plan.axis] = np.arange(plan.num_columns)
        element = np.ravel_multi_index(place, shape).astype(np.int32)
        null = np.pad(part.model == _NULL, padding)
        yield _Group(part_rows, null, (channel, element, batch.keep, batch.flip))


class _Packer:
    """Fills rows with surviving pairs of any fault and image; a full batch runs the suffix."""

    def __init__(self, setup: Setup, programs: _Programs, leaves: list, tally: Tally):
        self._setup, self._programs, self._leaves, self._tally = setup, programs, leaves, tally
        shapes = [var.aval for var in programs.plan.suffix_inputs]
        self._buffer = [jnp.zeros(aval.shape, aval.dtype) for aval in shapes]
        self._row = np.full(setup.batch_size, -1)
        self._image = np.zeros(setup.batch_size, np.int32)
        self._filled = 0
        self._waiting: list[tuple] = []

    def submit(self, *work) -> None:
        """Queues one group on one batch: the host looks at it while the device runs the next."""
        self._waiting.append(work)
        if len(self._waiting) > 1:
            self._pack(*self._waiting.pop(0))

    def drain(self) -> None:
        while self._waiting:
            self._pack(*self._waiting.pop(0))

    def flush(self) -> None:
        self.drain()
        if self._filled:
            self._run()

    def _pack(self, group: _Group, number: int, inputs: list, changed, columns: list) -> None:
        survives = np.array(changed)
        survives[group.rows < 0] = False
        survives[:, _images_in(self._setup, number) :] = False
        # A null fault is sent through the suffix on one image per batch, wherever that lands.
        for column in np.flatnonzero(group.null):
            survives[column, (7919 * group.rows[column]) % _images_in(self._setup, number)] = True
        column, image = np.nonzero(survives)
        size, done = self._setup.batch_size, 0
        while done < len(column):
            count = min(size - self._filled, len(column) - done)
            here, there = slice(self._filled, self._filled + count), slice(done, done + count)
            pick = Pick(*(np.zeros(size, t) for t in (np.int32, np.int32, np.int32, bool)))
            pick.column[here], pick.image[here] = column[there], image[there]
            pick.channel[here] = group.columns[0][column[there]]
            pick.fresh[here] = True
            self._buffer = self._programs.pack(self._buffer, inputs, columns, pick)
            self._row[here] = group.rows[column[there]]
            self._image[here] = image[there] + number * size
            self._filled, done = self._filled + count, done + count
            if self._filled == size:
                self._run()

    def _run(self) -> None:
        outputs = self._programs.suffix(self._leaves, self._buffer)
        self._tally.add_rows(self._row.copy(), self._image.copy(), outputs)
        self._row[:], self._filled = -1, 0


_RUNNERS = {
    "columns": _run_columns,
    "slice": _run_slice,
    "whole": _run_whole,
    "unreached": _run_unreached,
}
