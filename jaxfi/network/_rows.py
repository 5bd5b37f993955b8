"""Whether row b of a result is computed from row b of what it starts from, in one way for all b.

A suffix runs on rows packed from any faults, images and batches. That is right only if row b of its
result depends on row b of its inputs alone, and in the same way for every b: as under `jax.vmap`.
Shapes cannot tell (a cumulative sum over the batch has the batch's length, a mask made at trace
time treats places differently, the condition of a loop may look at all images), so every operation
between must say so by a rule: `column_rule`, whose question is the same. If re-indexing the rows
of some operands re-indexes the rows of the result, whatever the index, then row b of the result is
made of row b of the operands. An operand that does not depend on the rows but meets them must be
uniform along them. Loops, branches and calls are followed inside: what decides how often a body
runs, or which, must not depend on the rows. An operation without a rule counts as mixing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxfi.network._equations import call_parameter
from jaxfi.network._rules import column_rule, shape_of
from jaxfi.network._sources import scan_counts

Value = core.Var | core.Literal


_REDUCTIONS = {"reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or",
               "reduce_xor", "argmax", "argmin"}  # fmt: skip


class Run(NamedTuple):
    """Where the rows are: an axis seen as [outer, length, inner], rows along `length`."""

    axis: int
    length: int
    outer: int = 1
    inner: int = 1


# What is known of a value: where its rows are; of one that does not depend on them, whether it is
# uniform along a run; or why it is neither.
State = Run | Callable[[Run], bool] | str


class Certain(str):
    """A reason why rows are mixed for certain; another may only say that there is no rule."""


def mixes_rows(
    equations: Iterable[core.JaxprEqn],
    states: Mapping[core.Var, State],
    results: Mapping[Value, Run],
) -> str:
    """Why a result's rows are not made of the same rows of the inputs; empty if they are.

    Args:
      equations: in order.
      states: of all that they start from, `rows_of` and `uniform_constant` make them.
      results: values among those computed (or started from), and where their rows should be.
    """
    known = dict(states)
    follow(equations, known)
    for value, run in results.items():
        found = known[value] if isinstance(value, core.Var) else "the result is a constant"
        if found != run:
            return (
                found if isinstance(found, str) else "the images' axis of a value behind it moves"
            )
    return ""


def uniform_constant(value: object) -> Callable[[Run], bool]:
    """Whether a concrete array has the same values, to the bit, all along a run."""

    def is_uniform(run: Run) -> bool:
        try:
            array = np.asarray(value)
        except TypeError:  # a random key
            return False
        if not _fits(run, array.shape):
            return False
        apart = array.reshape(*array.shape[: run.axis], run.outer, run.length, run.inner, -1)
        first = np.take(apart, [0], axis=run.axis + 1)
        return bool(np.all((apart == first) | ((apart != apart) & (first != first))))

    return is_uniform


def _fits(run: Run, shape: Sequence[int]) -> bool:
    return run.axis < len(shape) and shape[run.axis] == run.outer * run.length * run.inner


def never(run: Run) -> bool:
    """The uniformity of a value of which nothing is known, such as a parameter."""
    return run.length == 1


def follow(equations: Iterable[core.JaxprEqn], states: dict[core.Var, State]) -> None:
    """Adds the states of all that the equations compute."""
    for equation in equations:
        operands = [_state(value, states) for value in equation.invars]
        results = _results(equation, operands)
        states.update(zip(equation.outvars, results, strict=True))


def _state(value: Value, states: Mapping[core.Var, State]) -> State:
    if isinstance(value, core.Literal):
        return uniform_constant(value.val)
    return states.get(value, never)


def _results(equation: core.JaxprEqn, operands: list[State]) -> list[State]:
    count = len(equation.outvars)
    mixed = next((state for state in operands if isinstance(state, str)), None)
    if mixed is not None:
        return [mixed] * count
    if equation.primitive.name == "optimization_barrier":
        return operands
    inner = _INNER.get(equation.primitive.name)
    if inner is None and call_parameter(equation) is not None:
        inner = _of_call
    if inner is not None:
        return inner(equation, operands)
    runs = [state if isinstance(state, Run) else None for state in operands]
    if any(runs):
        return [_carried(equation, operands, runs)] * count
    return [partial(_is_uniform, equation, operands, n) for n in range(count)]


def _carried(equation: core.JaxprEqn, operands: list[State], runs: list[Run | None]) -> State:
    moved = _moved(equation, runs)
    if moved is not None:
        result, takes = moved
        uniform = [
            take is None or isinstance(state, Run) or _holds(state, take)
            for state, take in zip(operands, takes, strict=True)
        ]
        if all(uniform):
            return result
        return f"{equation.primitive.name} behind it treats the places of a batch differently"
    reason = f"{equation.primitive.name} behind it mixes the images of a batch"
    reduced = equation.params.get("axes", ()) if equation.primitive.name in _REDUCTIONS else ()
    if any(run and run.axis in reduced for run in runs):
        return Certain(reason)
    return f"{reason}, or has no rule"


def _holds(state: State, run: Run) -> bool:
    return callable(state) and state(run)


def _moved(
    equation: core.JaxprEqn, runs: Sequence[Run | None]
) -> tuple[Run, list[Run | None]] | None:
    """Where the rows of the result are, and along which runs the other operands must be uniform."""
    known = [run for run in runs if run is not None]
    if equation.primitive.name == "reshape":
        before, after = (shape_of(v) for v in (equation.invars[0], equation.outvars[0]))
        run = _reshaped(known[0], before, after)
        return None if run is None else (run, [None] * len(runs))
    if equation.primitive.name == "tile":
        repeats = equation.params["reps"][known[0].axis]
        return known[0]._replace(outer=known[0].outer * repeats), [None]
    if len({run[1:] for run in known}) != 1:
        return None
    found = column_rule(equation, tuple(run.axis if run else None for run in runs))
    if found is None:
        return None
    axis, takes = found
    rest = known[0]
    size = rest.outer * rest.length * rest.inner
    if any(shape_of(var)[axis] != size for var in equation.outvars):
        return None
    return rest._replace(axis=axis), [
        None if take is None else rest._replace(axis=take) for take in takes
    ]


def _reshaped(run: Run, before: Sequence[int], after: Sequence[int]) -> Run | None:
    """The run after a reshape, which keeps the order of all elements."""
    ahead = prod(before[: run.axis]) * run.outer
    for axis in reversed(range(len(after))):
        outer, rest = divmod(ahead, max(1, prod(after[:axis])))
        if rest == 0 and outer and after[axis] % (outer * run.length) == 0:
            return Run(axis, run.length, outer, after[axis] // (outer * run.length))
    return None


def _is_uniform(equation: core.JaxprEqn, operands: list[State], number: int, run: Run) -> bool:
    """Whether a result that does not depend on the rows is uniform along a run: it is, if it is the
    operands re-indexed, and they are uniform."""
    name, params = equation.primitive.name, equation.params
    shape = shape_of(equation.outvars[number])
    if not _fits(run, shape):
        return False
    if run.length == 1:
        return True
    if name == "iota":
        return params["dimension"] != run.axis
    if name == "broadcast_in_dim":
        source = params["broadcast_dimensions"]
        inputs = shape_of(equation.invars[0])
        if run.axis not in source or inputs[source.index(run.axis)] != shape[run.axis]:
            return True
        return _holds(operands[0], run._replace(axis=source.index(run.axis)))
    if name == "tile":
        length = shape_of(equation.invars[0])[run.axis]
        if run.inner % length == 0:
            return True
        outer, rest = divmod(length, run.length * run.inner)
        return rest == 0 and _holds(operands[0], run._replace(outer=outer))
    if name == "reshape":
        back = _reshaped(run, shape, shape_of(equation.invars[0]))
        return back is not None and _holds(operands[0], back)
    return any(
        _maps_to(equation, operands, first, axis, run)
        for first, value in enumerate(equation.invars)
        for axis, size in enumerate(shape_of(value))
        if size == shape[run.axis]
    )


def _maps_to(equation, operands: list[State], first: int, axis: int, run: Run) -> bool:
    """Whether the result's run comes from operand `first`'s axis, uniform there and beside it."""
    start = [run._replace(axis=axis) if n == first else None for n in range(len(operands))]
    moved = _moved(equation, start)
    if moved is None or moved[0] != run:
        return False
    along = [take or start[n] for n, take in enumerate(moved[1])]
    return all(
        where is None or _holds(state, where) for state, where in zip(operands, along, strict=True)
    )


def _through(body: core.ClosedJaxpr | core.Jaxpr, inputs: Sequence[State]) -> list[State]:
    """The states of a body's results."""
    inner = getattr(body, "jaxpr", body)
    states: dict[core.Var, State] = dict(zip(inner.invars, inputs, strict=True))
    constants = zip(inner.constvars, getattr(body, "consts", ()), strict=False)
    states.update({var: uniform_constant(value) for var, value in constants})
    follow(inner.eqns, states)
    return [_state(value, states) for value in inner.outvars]


def _of_call(equation: core.JaxprEqn, operands: list[State]) -> list[State]:
    called = call_parameter(equation)
    assert called is not None  # or this would not be its rule
    return _through(equation.params[called], operands)


def _of_cond(equation: core.JaxprEqn, operands: list[State]) -> list[State]:
    if isinstance(operands[0], Run):
        return ["cond behind it looks at the images of a batch"] * len(equation.outvars)
    branches = [_through(body, operands[1:]) for body in equation.params["branches"]]
    return [_joined(states) for states in zip(*branches, strict=True)]


def _joined(states: Sequence[State]) -> State:
    """One state for a value that may be any of several."""
    mixed = next((state for state in states if isinstance(state, str)), None)
    if mixed is not None:
        return mixed
    runs = {state for state in states if isinstance(state, Run)}
    if not runs:
        return lambda run: all(_holds(state, run) for state in states)
    run = runs.pop()
    if not runs and all(isinstance(state, Run) or _holds(state, run) for state in states):
        return run
    return "a loop or branch behind it moves the images' axis"


def _of_scan(equation: core.JaxprEqn, operands: list[State]) -> list[State]:
    first, num_carry = scan_counts(equation)
    body = equation.params["jaxpr"]
    slices = [_sliced(state) for state in operands[first + num_carry :]]
    carry, stacked = _any_round(
        lambda carry: _through(body, [*operands[:first], *carry, *slices]),
        operands[first : first + num_carry],
    )
    return [*carry, *(_stacked(state) for state in stacked)]


def _sliced(state: State) -> State:
    """Of one slice of a scan's input."""
    if isinstance(state, Run):
        return state._replace(axis=state.axis - 1) if state.axis else "scan runs over the images"
    if isinstance(state, str):
        return state
    return lambda run: state(run._replace(axis=run.axis + 1))


def _stacked(state: State) -> State:
    """Of a scan's stacked outputs."""
    if isinstance(state, Run):
        return state._replace(axis=state.axis + 1)
    if isinstance(state, str):
        return state
    return lambda run: run.axis > 0 and state(run._replace(axis=run.axis - 1))


def _of_while(equation: core.JaxprEqn, operands: list[State]) -> list[State]:
    params = equation.params
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    consts = operands[of_test : of_test + of_body]
    carry, _ = _any_round(
        lambda carry: _through(params["body_jaxpr"], [*consts, *carry]),
        operands[of_test + of_body :],
    )
    (test,) = _through(params["cond_jaxpr"], [*operands[:of_test], *carry])
    if isinstance(test, (Run, str)):
        return ["while behind it runs until all images of a batch are done"] * len(carry)
    return carry


def _any_round(
    step: Callable[[list[State]], list[State]], start: Sequence[State]
) -> tuple[list[State], list[State]]:
    """States of what a loop carries, whatever the round, and of its other results.

    A value that some round makes of the rows must be uniform along them before.
    """
    carry = list(start)
    while True:
        steady: list[State] = [
            _steady(step, carry, number) if callable(state) else state
            for number, state in enumerate(carry)
        ]
        results = step(steady)
        grown = [
            old if callable(old) and callable(new) else _joined([old, new])
            for old, new in zip(carry, results, strict=False)
        ]
        if grown == carry:
            return steady, results[len(carry) :]
        carry = grown


def _steady(
    step: Callable[[list[State]], list[State]], carry: list[State], number: int
) -> Callable[[Run], bool]:
    """Whether a carried value that never depends on the rows is uniform in every round: it starts
    so, and if all that start so are, a round keeps it so."""

    def is_uniform(run: Run) -> bool:
        holding = {n for n, state in enumerate(carry) if _holds(state, run)}
        while number in holding:
            assumed: list[State] = [
                partial(_same, run if n in holding else None) if callable(state) else state
                for n, state in enumerate(carry)
            ]
            results = step(assumed)
            # What a round makes of the rows is told by the round itself.
            kept = {n for n in holding if isinstance(results[n], Run) or _holds(results[n], run)}
            if kept == holding:
                return True
            holding = kept
        return False

    return is_uniform


def _same(known: Run | None, run: Run) -> bool:
    return run == known


_INNER = {"cond": _of_cond, "scan": _of_scan, "while": _of_while}
