"""Equations of a jaxpr: their operands, and running them on others, inside loops and calls too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxfi.network._frozen import Array

Value = core.Var | core.Literal
Body = core.Jaxpr | core.ClosedJaxpr
RunBody = Callable[[str, Body, Sequence], list]

_BODIES = {
    "scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)
}  # fmt: skip


def variables(values: Iterable[Value]) -> list[core.Var]:
    """The variables among an equation's operands, without the literals."""
    return [value for value in values if not isinstance(value, core.Literal)]


def read(env: Mapping[core.Var, Array], value: Value) -> Any:
    """The value of an operand: a literal's own, or the variable's in `env`."""
    return value.val if isinstance(value, core.Literal) else env[value]


def bind(equation: core.JaxprEqn, operands: list) -> list:
    """Runs one equation on other operands of the same shapes."""
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def call_parameter(equation: core.JaxprEqn) -> str | None:
    """The parameter that holds what an equation calls; None if it is no plain call.

    A plain call (of a jitted function, of one with its own derivative, of a checkpointed one) runs
    its body once, on the equation's operands, and gives the body's results.
    """
    for name in ("jaxpr", "call_jaxpr", "call"):
        body = equation.params.get(name)
        if isinstance(body, Body) and equation.primitive.name != "scan":
            inner = getattr(body, "jaxpr", body)
            outside = [value.aval for value in (*equation.invars, *equation.outvars)]
            if outside == [value.aval for value in (*inner.invars, *inner.outvars)]:
                return name
    return None


def has_bodies(equation: core.JaxprEqn) -> bool:
    """Whether `bind_bodies` reaches what is inside an equation."""
    return equation.primitive.name in _BODIES or call_parameter(equation) is not None


def bind_bodies(equation: core.JaxprEqn, operands: list, run: RunBody) -> list:
    """Runs a loop, branch or plain call; each body by `run(its parameter's name, body, inputs)`."""
    called = call_parameter(equation)
    if called is not None:
        return run(called, equation.params[called], operands)

    def rebuilt(name: str, body: Any) -> Any:
        if isinstance(body, tuple):
            return tuple(rebuilt(name, one) for one in body)
        return jax.make_jaxpr(lambda *inputs: run(name, body, inputs))(*body.in_avals)

    names = _BODIES[equation.primitive.name]
    bodies = {name: rebuilt(name, equation.params[name]) for name in names}
    return bind(equation.replace(params={**equation.params, **bodies}), operands)


def body_env(body: Body, inputs: Sequence) -> dict[core.Var, Any]:
    """A body's constants and inputs by variable."""
    inner = getattr(body, "jaxpr", body)
    values = (*getattr(body, "consts", ()), *inputs)
    return dict(zip((*inner.constvars, *inner.invars), values, strict=True))
