"""Which parameters each value of a traced network is computed from, inside loops and branches too.

A set of sources holds the numbers of leaves, and `IMAGES`. What decides only how often a loop runs
or which branch is taken is no source of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from jax.extend import core

from jaxfi.network._equations import Body, Value, call_parameter
from jaxfi.network._graph import Network

Sources = frozenset[int]

IMAGES = -1  # stands among leaf numbers for "depends on the images"
NOTHING: Sources = frozenset()


def leaf_sources(network: Network) -> dict[core.Var, Sources]:
    """The leaves (by number) that each variable is computed from, and `IMAGES`."""
    leaves = {var: frozenset({number}) for number, var in enumerate(network.leaves)}
    return follow(network.equations, {**leaves, network.image: frozenset({IMAGES})})


def follow(
    equations: Iterable[core.JaxprEqn], known: Mapping[core.Var, Sources]
) -> dict[core.Var, Sources]:
    """The sources of the known variables and of all that the equations compute."""
    found = dict(known)
    for equation in equations:
        results = _results_sources(equation, sources_of(equation.invars, found))
        found.update(zip(equation.outvars, results, strict=True))
    return found


def sources_of(values: Iterable[Value], known: Mapping[core.Var, Sources]) -> list[Sources]:
    """The sources of some operands; literals and constants have none."""
    return [NOTHING if isinstance(v, core.Literal) else known.get(v, NOTHING) for v in values]


def inner_sources(equation: core.JaxprEqn, operands: Sequence[Sources]) -> dict[str, list[Sources]]:
    """Sources of the inputs of an equation's bodies, by the name of the body's parameter.

    In a loop they are those of any round. Empty for an equation that is no loop, branch or call.
    """
    name = equation.primitive.name
    if name == "scan":
        return {"jaxpr": _inputs_of_scan(equation, operands)}
    if name == "while":
        return _inputs_of_while(equation, operands)
    if name == "cond":
        return {"branches": list(operands[1:])}
    called = call_parameter(equation)
    return {called: list(operands)} if called else {}


def through(body: Body, inputs: Sequence[Sources]) -> list[Sources]:
    """The sources of a body's results."""
    inner = getattr(body, "jaxpr", body)
    known = follow(inner.eqns, dict(zip(inner.invars, inputs, strict=True)))
    return sources_of(inner.outvars, known)


def _results_sources(equation: core.JaxprEqn, operands: Sequence[Sources]) -> list[Sources]:
    inner = inner_sources(equation, operands)
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return inner["body_jaxpr"][params["body_nconsts"] :]
    if name == "cond":
        branches = [through(body, inner["branches"]) for body in params["branches"]]
        return [NOTHING.union(*sources) for sources in zip(*branches, strict=True)]
    if name == "scan":
        first, num_carry = scan_counts(equation)
        stacked = through(params["jaxpr"], inner["jaxpr"])[num_carry:]
        return [*inner["jaxpr"][first : first + num_carry], *stacked]
    for called, inputs in inner.items():
        return through(params[called], inputs)
    return [NOTHING.union(*operands)] * len(equation.outvars)


def _inputs_of_scan(equation: core.JaxprEqn, operands: Sequence[Sources]) -> list[Sources]:
    first, num_carry = scan_counts(equation)
    body, consts, slices = equation.params["jaxpr"], operands[:first], operands[first + num_carry :]
    carry = _any_round(
        lambda carry: through(body, [*consts, *carry, *slices])[:num_carry],
        operands[first : first + num_carry],
    )
    return [*consts, *carry, *slices]


def scan_counts(equation: core.JaxprEqn) -> tuple[int, int]:
    """How many constants and carried values a scan has: they have no axis more than in its body.

    JAX 0.10 and 0.11 keep these numbers in different parameters.
    """
    body = equation.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)

    def unstacked(outside: Iterable[Value], inside: Iterable[Value]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(a.aval.ndim == b.aval.ndim for a, b in pairs)  # type: ignore[attr-defined]

    num_carry = unstacked(equation.outvars, inner.outvars)
    return unstacked(equation.invars, inner.invars) - num_carry, num_carry


def _inputs_of_while(
    equation: core.JaxprEqn, operands: Sequence[Sources]
) -> dict[str, list[Sources]]:
    of_test, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    test, consts = operands[:of_test], operands[of_test : of_test + of_body]
    carry = _any_round(
        lambda carry: through(equation.params["body_jaxpr"], [*consts, *carry]),
        operands[of_test + of_body :],
    )
    return {"cond_jaxpr": [*test, *carry], "body_jaxpr": [*consts, *carry]}


def _any_round(step: Callable, carry: Sequence[Sources]) -> list[Sources]:
    """The sources of what a loop carries, whatever the round: they grow until they do not."""
    while True:
        grown = [old | new for old, new in zip(carry, step(carry), strict=True)]
        if grown == list(carry):
            return grown
        carry = grown
