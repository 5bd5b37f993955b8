"""Loops that a fault could keep from ending: counted, and ended at a limit.

The turns of a `while_loop` whose condition is computed from parameters or images are data: a fault
can make them endless, a hang. `with_loop_limit` ends such a loop after a number of turns, and then
the outputs are NaN: a hang is a DUE. Loops that count to a number fixed at trace time (`scan`,
`fori_loop`) are left as they are, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxfi.faults import PyTree
from jaxfi.network._equations import Body, bind, call_parameter, read
from jaxfi.network._graph import ApplyFn, Network
from jaxfi.network._sources import (
    NOTHING,
    Sources,
    follow,
    inner_sources,
    leaf_sources,
    scan_counts,
    sources_of,
    through,
)

MOST_TURNS = 10**7  # of a fault-free loop


class _Ran(NamedTuple):
    """What came of equations: results, the most turns of an open loop, and whether one hung."""

    results: list
    turns: jax.Array
    hung: jax.Array


def has_open_loop(network: Network) -> bool:
    """Whether a fault could change how often some loop runs."""
    known = leaf_sources(network)
    return any(_is_open(e, sources_of(e.invars, known)) for e in network.equations)


def with_loop_limit(apply_fn: ApplyFn, limit: int) -> ApplyFn:
    """`apply_fn`, with every open loop ended after `limit` turns; then all float outputs are NaN.

    Args:
      apply_fn: pure; maps parameters and images [batch, ...] to outputs [batch, classes].
      limit: turns of each loop, more than the fault-free network takes. Of a loop that the images
        of a batch share, all of them hang together.
    """

    def limited(params: PyTree, images: jax.Array) -> Any:
        outputs, ran = _run(apply_fn, limit, params, images)
        return jax.tree.map(
            lambda out: (
                jnp.where(ran.hung, jnp.nan, out).astype(out.dtype)
                if jnp.issubdtype(out.dtype, jnp.floating)
                else out
            ),
            outputs,
        )

    return limited


def most_turns(apply_fn: ApplyFn) -> Callable[[PyTree, jax.Array], jax.Array]:
    """A function of parameters and images to the most turns that an open loop took, int32 scalar;
    `MOST_TURNS` if it would have taken more."""
    return lambda params, images: _run(apply_fn, MOST_TURNS, params, images)[1].turns


def _run(apply_fn: ApplyFn, limit: int, params: PyTree, images: jax.Array) -> tuple[Any, _Ran]:
    closed, shapes = jax.make_jaxpr(lambda *both: apply_fn(*both), return_shape=True)(
        params, images
    )
    inputs = jax.tree.leaves((params, images))
    given = [frozenset({number}) for number in range(len(inputs))]
    ran = _through(closed, inputs, given, limit)
    return jax.tree.unflatten(jax.tree.structure(shapes), ran.results), ran


def _is_open(equation: core.JaxprEqn, operands: Sequence[Sources]) -> bool:
    """Whether data decides how often a loop in the equation runs, itself or one inside."""
    inner = inner_sources(equation, operands)
    if equation.primitive.name == "while":
        (test,) = through(equation.params["cond_jaxpr"], inner["cond_jaxpr"])
        if test:
            return True
    if not inner and any(operands) and any(map(_loops, core.jaxprs_in_params(equation.params))):
        raise ValueError(
            f"apply_fn holds a {equation.primitive.name} with a loop inside, which a fault could "
            "keep from ending and no limit reaches: allowed are loops outside of it"
        )
    for name, inputs in inner.items():
        bodies = equation.params[name]
        for body in bodies if isinstance(bodies, tuple) else (bodies,):
            within: Any = getattr(body, "jaxpr", body)
            known = follow(within.eqns, dict(zip(within.invars, inputs, strict=True)))
            if any(_is_open(e, sources_of(e.invars, known)) for e in within.eqns):
                return True
    return False


def _loops(jaxpr: core.Jaxpr) -> bool:
    """Whether a while loop is inside, at any depth."""
    return any(
        e.primitive.name == "while" or any(map(_loops, core.jaxprs_in_params(e.params)))
        for e in jaxpr.eqns
    )


def _through(body: Body, inputs: Sequence, sources: Sequence[Sources], limit: int) -> _Ran:
    """Runs a body; `sources` say which inputs a fault can change."""
    inner = getattr(body, "jaxpr", body)
    known = follow(inner.eqns, dict(zip(inner.invars, sources, strict=True)))
    env = dict(zip(inner.constvars, getattr(body, "consts", ()), strict=True))
    env.update(zip(inner.invars, inputs, strict=True))
    turns, hung = jnp.int32(0), jnp.bool_(False)
    for equation in inner.eqns:
        operands = [read(env, value) for value in equation.invars]
        of_operands = sources_of(equation.invars, known)
        if _is_open(equation, of_operands):
            ran = _rebuilt(equation, operands, of_operands, limit)
            turns, hung = jnp.maximum(turns, ran.turns), hung | ran.hung
            results: Iterable = ran.results
        else:
            results = bind(equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
    return _Ran([read(env, value) for value in inner.outvars], turns, hung)


def _rebuilt(
    equation: core.JaxprEqn, operands: list, sources: Sequence[Sources], limit: int
) -> _Ran:
    inner, params = inner_sources(equation, sources), equation.params
    if equation.primitive.name == "while":
        return _while(params, operands, inner, limit)
    if equation.primitive.name == "scan":
        return _scan(equation, operands, inner["jaxpr"], limit)
    if equation.primitive.name == "cond":
        branches = [
            lambda *given, body=body: _through(body, given, inner["branches"], limit)
            for body in params["branches"]
        ]
        return lax.switch(operands[0], branches, *operands[1:])
    called = call_parameter(equation)
    assert called is not None  # `_is_open` found it inside
    return _through(params[called], operands, inner[called], limit)


def _while(params: dict, operands: list, inner: dict[str, list[Sources]], limit: int) -> _Ran:
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    consts = operands[of_test : of_test + of_body]
    (decided,) = through(params["cond_jaxpr"], inner["cond_jaxpr"])

    def goes_on(carry: list) -> jax.Array:
        inputs = [*operands[:of_test], *carry]
        return _through(params["cond_jaxpr"], inputs, [NOTHING] * len(inputs), limit).results[0]

    def test(state: tuple) -> jax.Array:
        turn, ran = state
        more = jnp.any(goes_on(ran.results)) & ~ran.hung
        return more & (turn < limit) if decided else more

    def body(state: tuple) -> tuple:
        turn, before = state
        ran = _through(params["body_jaxpr"], [*consts, *before.results], inner["body_jaxpr"], limit)
        turns, hung = jnp.maximum(before.turns, ran.turns), before.hung | ran.hung
        more = goes_on(before.results)  # under vmap one for each lane: the others stay as they are
        results = [
            jnp.where(more.reshape(more.shape + (1,) * (new.ndim - more.ndim)), new, old)
            if more.ndim
            else new
            for new, old in zip(ran.results, before.results, strict=True)
        ]
        return turn + 1, _Ran(results, turns, hung)

    start = _Ran(operands[of_test + of_body :], jnp.int32(0), jnp.bool_(False))
    turn, ran = lax.while_loop(test, body, (jnp.int32(0), start))
    if not decided:
        return ran
    over = (turn >= limit) & jnp.any(goes_on(ran.results))
    return _Ran(ran.results, jnp.maximum(ran.turns, turn), ran.hung | over)


def _scan(equation: core.JaxprEqn, operands: list, sources: Sequence[Sources], limit: int) -> _Ran:
    params, (first, num_carry) = equation.params, scan_counts(equation)

    def body(before: _Ran, slices: list) -> tuple[_Ran, list]:
        inputs = [*operands[:first], *before.results, *slices]
        ran = _through(params["jaxpr"], inputs, sources, limit)
        turns, hung = jnp.maximum(before.turns, ran.turns), before.hung | ran.hung
        return _Ran(ran.results[:num_carry], turns, hung), ran.results[num_carry:]

    start = _Ran(operands[first : first + num_carry], jnp.int32(0), jnp.bool_(False))
    ran, stacked = lax.scan(
        body,
        start,
        operands[first + num_carry :],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params.get("unroll", 1),
    )
    return ran._replace(results=[*ran.results, *stacked])
