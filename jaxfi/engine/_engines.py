"""Three engines behind one signature: `run(faults) -> Results` on every image.

reference  inject, run the plain network, one fault at a time: the oracle for everything.
vmap       the whole network vmapped over a batch of faulty parameters, golden as one lane.
fast       columns, channel tail, packed suffix (_plan.py says what runs where).

All run batches of one size, padded, so that every operation keeps its shape: floating-point sums
depend on it. See docs/engine.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._compilation import compiled
from jaxfi.engine._golden import Setup
from jaxfi.engine._packing import Group, Packer
from jaxfi.engine._plan import LeafPlan, slice_plan, undivided
from jaxfi.engine._programs import Golden, Programs, columns_key
from jaxfi.engine._tally import Tally
from jaxfi.faults._list import FaultGroups, FaultList
from jaxfi.faults._transforms import FAULT_MODELS, Fault, PyTree, inject
from jaxfi.network._graph import ApplyFn, Network
from jaxfi.outcomes._outcomes import Results

_NULL = FAULT_MODELS.index("null")
_SEVERAL_LEAVES = "faults in several leaves together"
_SEVERAL_CHANNELS = "faults in several channels together"


Advance = Callable[[int], None]  # told how many (fault, image) pairs are done
Engine = Callable[[FaultList, Advance, "np.ndarray | None"], Results]  # picks: see Tally


def whole_programs(programs: dict, apply_fn: ApplyFn) -> tuple[Callable, Callable]:
    """The whole network, and `inject`, among a network's programs."""
    network = programs.setdefault("network", compiled(apply_fn))
    return network, programs.setdefault("inject", compiled(inject))


def reference_engine(setup: Setup) -> Engine:
    """Plain re-execution: for each fault, inject and run the network on every batch."""
    network, injected = whole_programs(setup.programs, setup.apply_fn)

    def run(faults: FaultList, advance: Advance, picks: np.ndarray | None = None) -> Results:
        tally = Tally(setup, len(faults), picks)
        _rerun(network, injected, setup, faults, np.arange(len(faults)), tally, advance)
        return tally.results()

    return run


def vmap_engine(setup: Setup, lanes: int = 8) -> Engine:
    """The whole network vmapped over `lanes` faults at once; the last lane is golden, a null fault.

    A lane's sums may be ordered differently from the plain network's: each is judged against the
    golden lane of its own program, so a null fault is always masked.
    """

    def network(params: PyTree, faults: Fault, batch: jax.Array) -> jax.Array:
        return jax.vmap(lambda fault: setup.apply_fn(inject(params, fault), batch))(faults)

    network = setup.programs.setdefault(("vmap", lanes), compiled(network))

    def run(faults: FaultList, advance: Advance, picks: np.ndarray | None = None) -> Results:
        tally = Tally(setup, len(faults), picks)
        for start in range(0, len(faults), lanes - 1):
            rows = np.arange(start, min(start + lanes - 1, len(faults)))
            group = faults[rows].padded(lanes).batch()
            for number in tally.batches(rows):
                outputs = network(setup.params, group, setup.batches[number])
                for lane in tally.with_images_in(rows, number).tolist():
                    tally.add_batch(rows[lane], number, outputs[lane], golden=outputs[-1])
                advance(tally.num_pairs(rows, number))
        return tally.results()

    return run


def fast_engine(setup: Setup) -> Engine:
    """Columns, channel tail and packed suffix; each leaf's programs are compiled once."""
    programs: dict[tuple[int, str], Programs] = {}
    shared = setup.programs

    def run(faults: FaultList, advance: Advance, picks: np.ndarray | None = None) -> Results:
        tally = Tally(setup, len(faults), picks)
        for plan, rows in _planned(setup, faults):
            key = plan.leaf, plan.reason
            before = next((p for p in programs.values() if p.holds_golden), None)
            if key not in programs:
                programs[key] = Programs(setup.network, plan, shared)
            programs[key].take_over(setup, before)
            while True:
                runner = _RUNNERS[programs[key].plan.method]
                try:
                    runner(setup, programs[key], faults[rows], rows, tally, advance)
                    break
                except _MovesBits as found:
                    programs[key] = _less_divided(programs[key], found)
                    tally.forget(rows)
        return tally.results()

    return run


def _planned(setup: Setup, faults: FaultList) -> Iterator[tuple[LeafPlan, np.ndarray]]:
    """Of each leaf that has faults, its plan and their rows. Of experiments of several faults,
    those in one channel ride in columns, those in one leaf go by slice, others re-run the network.
    """
    for leaf in np.unique(faults.leaf):
        plan, rows = setup.plans[leaf], np.flatnonzero(faults.leaf == leaf)
        if not isinstance(faults, FaultGroups):
            yield plan, rows
            continue
        some = faults[rows]
        spread = some.is_spread
        apart = ~spread & _in_several_columns(setup.network, plan, some)
        for here, of_these in (
            (~spread & ~apart, plan),
            (apart, _by_slice(setup, plan)),
            (spread, dataclasses.replace(plan, method="whole", reason=_SEVERAL_LEAVES)),
        ):
            if here.any():
                yield of_these, rows[here]


def typical_plans(
    network: Network, plans: Mapping[int, LeafPlan], faults: FaultList
) -> list[LeafPlan]:
    """The plan that most experiments of each leaf go by: what a campaign is priced by."""
    if not isinstance(faults, FaultGroups):
        return list(plans.values())
    found = []
    for leaf, plan in plans.items():
        some = faults[np.flatnonzero(faults.leaf == leaf)]
        if some.is_spread.mean() > 0.5:
            plan = dataclasses.replace(plan, method="whole", reason=_SEVERAL_LEAVES)
        elif _in_several_columns(network, plan, some).mean() > 0.5:
            plan = slice_plan(network, leaf, _SEVERAL_CHANNELS)
        found.append(plan)
    return found


def _in_several_columns(network: Network, plan: LeafPlan, faults: FaultGroups) -> np.ndarray:
    """[E] bool: experiments in one leaf that do not fit in one column of its plan."""
    several = np.zeros(len(faults), bool)
    if plan.method != "columns":
        return several
    first, rest = (_column_of(network, plan, some) for some in (faults.first, faults.others))
    differs = (first[faults.owner] != rest).any(axis=1)
    several[faults.owner[differs]] = True
    return several


def _column_of(network: Network, plan: LeafPlan, faults: FaultList) -> np.ndarray:
    """[F, 2] channel and block of faults; those of other leaves are taken as if in this one."""
    shape = faults.shapes[plan.leaf]
    place = np.unravel_index(faults.element % max(1, math.prod(shape)), shape)
    block = np.zeros(len(faults), np.int64)
    if plan.own is not None:
        blocks = network.blocks[plan.own]
        block, _ = blocks.place(place[blocks.weight_axis])
    return np.stack([place[plan.axis], block], axis=1)


def _by_slice(setup: Setup, plan: LeafPlan) -> LeafPlan:
    if plan.method != "columns":
        return plan
    return slice_plan(setup.network, plan.leaf, _SEVERAL_CHANNELS)


ENGINES: dict[str, Callable[[Setup], Engine]] = {
    "fast": fast_engine,
    "reference": reference_engine,
    "vmap": vmap_engine,
}


def _run_unreached(setup, programs, faults, rows, tally, advance) -> None:
    advance(tally.outcome[rows].size)


class _MovesBits(Exception):
    """The programs do not give the network's bits; `cut` says that cutting it does that."""

    def __init__(self, reason: str, cut: bool = False):
        super().__init__(reason)
        self.cut = cut


def _less_divided(programs: Programs, found: _MovesBits) -> Programs:
    """Programs for the same leaf without the blocks of a layer, or that keep each image in its
    place, or re-run the network."""
    programs.forget()
    network, plan, reason = programs.network, programs.plan, str(found)
    layer = "ahead" if found.cut else "own"
    if getattr(plan, layer) is not None:
        plan = undivided(network, plan, layer)
    elif plan.method == "columns" and not found.cut:
        plan = slice_plan(network, plan.leaf, reason)
    else:
        plan = dataclasses.replace(plan, method="whole", reason=reason)
    return Programs(network, plan, programs.shared)


def _golden(programs: Programs, setup: Setup, number: int, faults: FaultList) -> Golden:
    """The prefix on one batch. The first batches, `LEAST_CHECKED` images, show whether prefix,
    columns and suffix round as the network does: `_MovesBits` is raised if they do not. Of fewer
    images, others are made for that: `Setup.shuffled`. What leaves share, and what an earlier
    campaign of the same parameters and images has shown, is not checked again.
    """
    plan, random = programs.plan, np.random.default_rng(number)
    own_way = plan.method, plan.whole, plan.ahead, plan.stops
    keys: list[tuple] = [("cut", *own_way, *programs.prefix_of(number))]
    if plan.method == "columns":
        keys.append(("columns", columns_key(plan)))
    in_blocks = plan.own is not None or plan.ahead is not None
    if in_blocks and setup.holds_nan:
        text = "the golden outputs hold NaN, and which of two NaNs a sum keeps is open"
        raise _MovesBits(text, cut=True)
    due = [key for key in keys if setup.is_to_check(key, number)]
    if not due:
        return programs.golden(setup, number)
    if not all(setup.checked.get(key) for key in due):  # first these: each is freed, or kept as
        network, _ = whole_programs(setup.programs, setup.apply_fn)  # memory allows
        for other in setup.shuffled:
            expected = setup.shuffled_outputs(network, other)
            if not setup.questions.holds_nan(expected).any():  # see above
                _check_bits(
                    programs, setup, programs.golden(setup, other), expected, faults, random, due
                )
    golden = programs.golden(setup, number)
    first, count = number * setup.batch_size, setup.images_in(number)
    expected = setup.golden[first : first + count]
    _check_bits(programs, setup, golden, expected, faults, random, due)
    for key in due:
        setup.checked.setdefault(key, set()).add(number)
    return golden


def _check_bits(programs, setup, golden, expected, faults, random, due: list[tuple]) -> None:
    """Raises `_MovesBits` if the parts that are `due`, put together, give other than the `expected`
    outputs for the first images of a batch, each in a place of another."""
    images, in_columns = np.arange(len(expected)), programs.plan.method == "columns"
    kinds = [key[0] for key in due]
    if "cut" in kinds:
        order = random.permutation(images) if in_columns else images
        if not _suffix_gives(programs, setup, golden, order, expected):
            if in_columns and _suffix_gives(programs, setup, golden, images, expected):
                raise _MovesBits("the output for an image depends on its place in the batch")
            raise _MovesBits("cutting the network moves bits", cut=True)
    if "columns" in kinds and _columns_move_bits(programs, setup, golden, faults, random):
        raise _MovesBits("a channel's bits depend on its column")


def _suffix_gives(
    programs: Programs, setup: Setup, golden: Golden, images: np.ndarray, expected: np.ndarray
) -> bool:
    """Whether the suffix gives the expected outputs of these images of a batch, to the bit, from
    rows that hold them in this order."""
    rows = programs.golden_rows(golden, images)
    outputs = np.asarray(programs.suffix(jax.tree.leaves(setup.params), rows, 0))
    return outputs[: len(images)].tobytes() == expected[images].tobytes()


def _columns_move_bits(
    programs: Programs, setup: Setup, golden: Golden, faults: FaultList, random: np.random.Generator
) -> bool:
    """Whether null faults change a bit where a full group's columns hold any channels, repeated,
    in order, so that most stand in another place than in the network."""
    plan, leaves = programs.plan, jax.tree.leaves(setup.params)
    shape = faults.shapes[plan.leaf]
    place = [np.zeros(plan.num_columns, np.int64) for _ in shape]  # of one block
    place[plan.axis] = random.integers(0, shape[plan.axis], plan.num_columns)
    nulls = faults.nulls(np.ravel_multi_index(place, shape))
    _, group = next(_groups(nulls, np.arange(len(nulls)), programs, np.ones(len(nulls))))
    faulty = programs.faulty_columns(leaves[plan.leaf], *group[2:])
    changed, stored = programs.columns(leaves, golden, faulty, group.block, group.channel)
    # A program may compute a value twice, and compare another rounding of it than it stores.
    same = programs.stores_golden(stored, golden, group.channel)
    return bool(np.asarray(changed).any()) or not all(map(bool, same))


def _run_whole(setup, programs, faults, rows, tally, advance) -> None:
    """Plain re-execution of the whole network."""
    network, injected = whole_programs(programs.shared, setup.apply_fn)
    _rerun(network, injected, setup, faults, rows, tally, advance)


def _rerun(network, injected, setup, faults, rows, tally, advance) -> None:
    for position, fault in zip(rows.tolist(), _each(faults), strict=True):
        params = injected(setup.params, fault)
        here = np.array([position])
        for number in tally.batches(here):
            tally.add_batch(position, number, network(params, setup.batches[number]))
            advance(tally.num_pairs(here, number))


def _run_slice(setup, programs, faults, rows, tally, advance) -> None:
    """The suffix alone, one fault at a time."""
    plan, leaves = programs.plan, jax.tree.leaves(setup.params)
    for number in tally.batches(rows):
        golden = programs.golden_rows(_golden(programs, setup, number, faults))
        some = tally.with_images_in(rows, number)
        for row, fault in zip(rows[some], _each(faults[some]), strict=True):
            faulty = programs.faulty_leaf(leaves[plan.leaf], *fault[1:])
            swapped = [faulty if n == plan.leaf else x for n, x in enumerate(leaves)]
            tally.add_batch(row, number, programs.suffix(swapped, golden, 0))
            advance(tally.num_pairs(np.array([row]), number))


def _each(faults: FaultList) -> Iterator[Fault]:
    """On the host: a device would be asked for each of them."""
    return map(Fault, *faults.on_host())


def _run_columns(setup, programs, faults, rows, tally, advance) -> None:
    packer = Packer(setup, programs, jax.tree.leaves(setup.params), tally)
    # Of all pairs, a group of faults goes through all batches that are held; of a sample, the
    # faults with images in a batch ride together.
    numbers = tally.batches(rows)
    num_held = programs.batches_held(setup) if tally.picks is None else 1
    for first in range(0, len(numbers), num_held):
        _run_held(setup, programs, faults, rows, tally, advance, packer, numbers[first:][:num_held])
    packer.flush()


def _run_held(setup, programs, faults, rows, tally, advance, packer, held: list[int]) -> None:
    """All groups on batches whose golden values are held; they are free after that."""
    plan, leaves = programs.plan, jax.tree.leaves(setup.params)
    golden = [_golden(programs, setup, number, faults) for number in held]
    some = tally.with_images_in(rows, held[0])
    visible = _visible(programs, setup, faults[some], golden)
    for part, group in _groups(faults[some], rows[some], programs, visible.sum(axis=0)):
        seen = np.any(visible[:, part], axis=1).tolist()
        if any(seen):
            faulty = programs.faulty_columns(leaves[plan.leaf], *group[2:])
        for number, values, any_seen in zip(held, golden, seen, strict=True):
            if any_seen:
                work = programs.columns(leaves, values, faulty, group.block, group.channel)
                packer.submit(group, number, values, *work)
            advance(tally.num_pairs(group.rows[: group.num_faults], number))
    packer.drain()


def _visible(
    programs: Programs, setup: Setup, faults: FaultList, golden: list[Golden]
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
    if isinstance(faults, FaultGroups):  # each alone may be invisible, and several not
        return everything
    before, after = faults.values(setup.params)
    tame = np.abs(np.stack([before, after])) < float(jnp.finfo(dtype).max) / 2
    same = tame.all(axis=0) & (np.signbit(before) == np.signbit(after)) & (faults.model != _NULL)
    place = np.unravel_index(faults.element, faults.shapes[plan.leaf])
    lit = np.stack([np.asarray(programs.lit(values)) for values in golden])
    return lit[:, place[gate.leaf_axis]] | ~same


def _groups(
    faults: FaultList, rows: np.ndarray, programs: Programs, visible: np.ndarray
) -> Iterator[tuple[np.ndarray, Group]]:
    """Faults that ride together, and where they stand in `faults`.

    The invisible ride together; of the others those in one block of the leaf's own layer, which
    must, and those with the same channel, whose pairs then fill the same batches of the suffix.
    """
    plan, own = programs.plan, programs.own
    host: Any = faults.on_host()
    size, shape = plan.num_columns, list(faults.shapes[plan.leaf])
    # Of experiments of several faults, [n, K]; what fills them up is at place 0 of column 0.
    place = list(np.unravel_index(host.element, shape))
    channel, place[plan.axis] = place[plan.axis].astype(np.int32), np.zeros_like(host.element)
    block: Any = np.zeros(host.element.shape, np.int64)
    if own is not None:
        block, place[own.weight_axis] = own.place(place[own.weight_axis])
        shape[own.weight_axis] = own.length
    element = np.ravel_multi_index(place, shape).astype(np.int32)  # in column 0
    if element.ndim > 1:  # all of an experiment are where its first one is
        channel, block = channel[:, 0], block[:, 0]
    in_column = np.arange(size, dtype=np.int32) * math.prod(shape[plan.axis + 1 :])
    null = faults.model == _NULL

    in_column = in_column.reshape(-1, *[1] * (element.ndim - 1))

    def filled(values: np.ndarray, fill: int = 0) -> np.ndarray:
        rest = np.full((size - len(values), *values.shape[1:]), fill, values.dtype)
        return np.concatenate([values, rest])

    order = np.lexsort((visible, channel, visible > 0, block))
    ends = np.flatnonzero(np.diff(block[order])) + 1
    for same_block in np.split(order, ends):
        for start in range(0, len(same_block), size):
            part = same_block[start : start + size]
            yield (
                part,
                Group(
                    rows=filled(rows[part], -1),
                    null=filled(null[part]),
                    block=int(block[part[0]]),
                    channel=filled(channel[part]),
                    element=filled(element[part]) + in_column,
                    keep=filled(host.keep[part], np.iinfo(host.keep.dtype).max),
                    flip=filled(host.flip[part]),
                ),
            )


_RUNNERS = {
    "columns": _run_columns,
    "slice": _run_slice,
    "whole": _run_whole,
    "unreached": _run_unreached,
}
