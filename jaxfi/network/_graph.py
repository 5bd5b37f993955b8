"""The network as a flat list of equations, and the part of it that a computation needs.

`trace_network` turns `apply_fn(params, images)` into one flat jaxpr, with every inner call inlined,
and `evaluate` runs what a wanted value depends on, starting from whatever values are given. Prefix
and suffix of a leaf are both calls of `evaluate`.

Where a network may be cut without moving a bit
-----------------------------------------------
Each operation rounds by itself (`_rounding`), so a value may be stored between two programs. Only
what a reduction reads may not: the order of its sum depends on what is fused into it. Such a value
is computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxfi.faults._transforms import PyTree, leaf_paths
from jaxfi.network._blocks import MATMULS, Blocks, blocked_dot, find_blocks, layer_dot, sum_length
from jaxfi.network._equations import Value, bind, read, variables
from jaxfi.network._frozen import ALLOWED, ApplyFn, Array, Frozen, check_output, frozen
from jaxfi.network._rounding import bind_rounded, rounded, to_be_rounded
from jaxfi.network._rules import dtype_of, shape_of

UNKNOWN = -1  # depends on the images, but no axis is known to be theirs
COUPLED = -2  # depends on the images, and no axis can be theirs: it mixes a batch's images

_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
          "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", "custom_vmap_call"}  # fmt: skip
_BODY_NAMES = ("jaxpr", "call_jaxpr", "call")
_OWN_DERIVATIVES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_NONE: frozenset[bool] = frozenset()
# These move values and round nothing.
_MOVES = {"broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "pad", "concatenate",
          "convert_element_type", "copy", "copy_p", "expand_dims", "rev", "split"}  # fmt: skip
# The order of these sums may depend on what is fused into them.
_REDUCTIONS = {"reduce_sum", "reduce_prod", "cumsum", "reduce_window_sum", "argmax", "argmin",
               "reduce_precision"}  # fmt: skip


_ADDRESS = re.compile(" at 0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Network:
    """A traced network.

    Attributes:
      equations: all that the output depends on, in order, inner calls inlined.
      leaves: the parameters, in `jax.tree.flatten` order; `paths` names them.
      image: the image batch, [batch, ...].
      output: [batch, classes].
      given: values of the remaining variables (what `apply_fn` closes over).
      batch_axis: per variable: the images' axis, None for none, `UNKNOWN` or `COUPLED`.
      producers, consumers: the equation that computes a variable; those that read it.
      blocks: the results of layers that are summed in blocks, and how.
      rounded: results that every engine keeps the compiler from putting together with what reads
        them (`_rounding`).
    """

    equations: tuple[core.JaxprEqn, ...]
    leaves: tuple[core.Var, ...]
    paths: tuple[str, ...]
    image: core.Var
    output: Value
    given: Mapping[core.Var, Array]
    batch_axis: Mapping[core.Var, Any]
    producers: Mapping[core.Var, core.JaxprEqn]
    consumers: Mapping[core.Var, tuple[core.JaxprEqn, ...]]
    blocks: Mapping[core.Var, Blocks]
    rounded: frozenset[core.Var]


def trace_network(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.ShapeDtypeStruct,
    *,
    keep_derivatives: bool = False,
) -> Network:
    """Traces `apply_fn(params, images)`.

    Args:
      apply_fn: pure; maps images [batch, ...] to outputs [batch, classes].
      params: the parameter tree (arrays, or their shapes).
      images: shape and dtype of one batch.
      keep_derivatives: a function with derivatives of its own (jax.custom_jvp, jax.custom_vjp)
        stays one equation, so that what is differentiated later has them; unless it is where
        parameters meet the images.

    Raises ValueError if the output is not [batch, classes].
    """
    now = frozen(apply_fn)
    jaxpr, closed_over = _flat_jaxpr(now, params, images, keep_derivatives)
    check_output(jaxpr, images.shape[0])
    num_leaves = len(jax.tree.leaves(params))
    leaves, image = tuple(jaxpr.invars[:num_leaves]), jaxpr.invars[num_leaves]
    equations = _needed(jaxpr.eqns, jaxpr.outvars)
    consumers: dict[core.Var, list[core.JaxprEqn]] = {}
    for equation in equations:
        for var in variables(equation.invars):
            consumers.setdefault(var, []).append(equation)
    batch_axis = _batch_axes(now, params, images, jaxpr, keep_derivatives)
    return Network(
        equations=equations,
        leaves=leaves,
        paths=leaf_paths(params),
        image=image,
        output=jaxpr.outvars[0],
        given=dict(zip(jaxpr.constvars, closed_over, strict=True)),
        batch_axis=batch_axis,
        producers={var: equation for equation in equations for var in equation.outvars},
        consumers={var: tuple(equations) for var, equations in consumers.items()},
        blocks=find_blocks(equations, batch_axis),
        rounded=to_be_rounded(equations),
    )


def digest(network: Network) -> str:
    """SHA-256 of what the network computes: operations, shapes, settings, constants, blocks."""
    hashed = hashlib.sha256()
    number: dict[core.Var, int] = {}

    def described(value: Value) -> str:
        if isinstance(value, core.Literal):
            return f"{value.val}:{value.aval.str_short()}"
        return f"{number.setdefault(value, len(number))}:{value.aval.str_short()}"

    inputs = [described(var) for var in (*network.leaves, network.image, *network.given)]
    for equation in network.equations:
        values = [[described(v) for v in side] for side in (equation.invars, equation.outvars)]
        settings = sorted((name, _text(value)) for name, value in equation.params.items())
        described_so = (equation.primitive.name, values, settings, equation.ctx)
        hashed.update(_ADDRESS.sub("", repr(described_so)).encode())
    for value in network.given.values():
        hashed.update(_bytes(value))
    hashed.update(repr((inputs, described(network.output), [*network.blocks.values()])).encode())
    return hashed.hexdigest()


def digest_of(closed: core.ClosedJaxpr) -> str:
    """SHA-256 of what a traced function computes, with the constants that it closes over."""
    hashed = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for equation in closed.jaxpr.eqns:
        hashed.update("".join(_text(setting) for setting in equation.params.values()).encode())
    for value in closed.consts:
        hashed.update(_bytes(value))
    return hashed.hexdigest()


def is_known_by_digest(network: Network) -> bool:
    """Whether networks of one digest compute the same: a callback is a function, of which only the
    name is seen."""
    return not any(
        _ADDRESS.search(repr(setting))
        for equation in network.equations
        for setting in equation.params.values()
    )


def _text(setting: Any) -> str:
    """What an equation's setting says, without addresses; of inner programs what they hold, too."""
    return _ADDRESS.sub("", f"{setting!r} {[*_constants(setting)]}")


def _constants(setting: Any) -> Iterator[bytes]:
    """What inner programs close over, at any depth."""
    for body in core.jaxprs_in_params({"": setting}):
        for equation in body.eqns:
            yield _ADDRESS.sub("", repr(equation.ctx)).encode()
            for inner in equation.params.values():
                yield from _constants(inner)
    for body in setting if isinstance(setting, tuple) else (setting,):
        yield from (_bytes(const) for const in getattr(body, "consts", ()))


def _bytes(value: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value).tobytes()


def evaluate(network: Network, wanted: Iterable[Value], known: Mapping[core.Var, Array]) -> list:
    """The wanted values, computed from the known ones: only what is needed between them.

    Raises KeyError if a wanted value depends on an input that is not known.
    """
    env = {**network.given, **known}
    wanted = list(wanted)
    for equation in _needed(network.equations, wanted, set(env)):
        operands = [read(env, value) for value in equation.invars]
        results = run(network, equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
    return [read(env, value) for value in wanted]


def run(network: Network, equation: core.JaxprEqn, operands: list) -> list:
    """Runs one equation as every engine does: wide layers in blocks, each operation rounded."""
    result = equation.outvars[0]
    if result in network.blocks:
        x, weights = operands
        return [blocked_dot(x, weights, network.blocks[result], layer_dot(equation))]
    results = bind_rounded(equation, operands)
    return [rounded(results[0])] if result in network.rounded else results


def reached_from(network: Network, source: core.Var) -> set[core.Var]:
    """Every variable that depends on `source`, itself included."""
    reached = {source}
    for equation in network.equations:
        if reached.intersection(variables(equation.invars)):
            reached.update(equation.outvars)
    return reached


def is_boundary(network: Network, var: core.Var) -> bool:
    """Whether `var` may be stored between two programs without moving a bit of either.

    A value that a reduction reads may not, unless it is an input or the result of a convolution or
    matmul; nor may a random key, which has no words to store.
    """
    producer = network.producers.get(var)
    if jax.dtypes.issubdtype(dtype_of(var), jax.dtypes.extended):
        return False
    if producer is None or producer.primitive.name in MATMULS:
        return True
    return not _readers(var, network) & _REDUCTIONS


def arithmetic(equations: Iterable[core.JaxprEqn]) -> int:
    """Floating-point operations of the convolutions and matmuls among `equations`."""
    return sum(_operations(equation) for equation in equations)


def needed_equations(
    network: Network, wanted: Iterable[Value], known: Iterable[core.Var]
) -> tuple[core.JaxprEqn, ...]:
    """The equations that `evaluate` would run."""
    return _needed(network.equations, wanted, set(known) | set(network.given))


def _operations(equation: core.JaxprEqn) -> int:
    if equation.primitive.name in MATMULS:
        return 2 * sum_length(equation) * int(np.prod(shape_of(equation.outvars[0])))
    return sum(
        _operations(inner) * int(equation.params.get("length", 1))
        for jaxpr in core.jaxprs_in_params(equation.params)
        for inner in jaxpr.eqns
    )


def _readers(var: core.Var, network: Network) -> set[str]:
    """Names of the operations that read `var`, looking through moves."""
    names: set[str] = set()
    for equation in network.consumers.get(var, ()):
        names.add(equation.primitive.name)
        if equation.primitive.name in _MOVES:
            names = names.union(*(_readers(other, network) for other in equation.outvars))
    return names


def _needed(
    equations: Iterable[core.JaxprEqn], wanted: Iterable[Value], known: Iterable[core.Var] = ()
) -> tuple[core.JaxprEqn, ...]:
    known, needed = set(known), set(variables(wanted))
    kept = []
    for equation in reversed(tuple(equations)):
        if (needed - known).intersection(equation.outvars):
            kept.append(equation)
            needed.update(variables(equation.invars))
    return tuple(reversed(kept))


def _flat_jaxpr(
    apply_fn: Frozen, params: PyTree, images: jax.ShapeDtypeStruct, keep_derivatives: bool = False
) -> tuple[core.Jaxpr, list]:
    nested = apply_fn.traced(params, images)
    last = len(nested.jaxpr.invars) - 1
    sources = (
        [frozenset({number == last}) for number in range(last + 1)] if keep_derivatives else ()
    )
    flat = jax.make_jaxpr(
        lambda *inputs: _run_inlined(nested.jaxpr, nested.consts, inputs, sources)
    )(*[var.aval for var in nested.jaxpr.invars])
    return flat.jaxpr, flat.consts


def _run_inlined(
    jaxpr: core.Jaxpr, consts: Iterable, inputs: Iterable, sources: Iterable[frozenset[bool]]
) -> list:
    """With `sources` of the inputs, which say if they are computed from images, from parameters, or
    from both, calls with derivatives of their own stay, unless they join parameters and images."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    known = dict(zip(jaxpr.invars, sources, strict=True)) if sources else {}
    for equation in jaxpr.eqns:
        operands = [read(env, value) for value in equation.invars]
        inner = next((equation.params[n] for n in _BODY_NAMES if n in equation.params), None)
        of_operands = [
            _NONE if isinstance(v, core.Literal) else known.get(v, _NONE) for v in equation.invars
        ]
        joins = frozenset({False}) in of_operands and any(True in one for one in of_operands)
        kept = sources and not joins and equation.primitive.name in _OWN_DERIVATIVES
        if equation.primitive.name in _CALLS and inner is not None and not kept:
            body = inner.jaxpr if hasattr(inner, "jaxpr") else inner
            of_inputs = of_operands if sources else ()
            results = _run_inlined(body, getattr(inner, "consts", ()), operands, of_inputs)
        else:
            results = bind(equation, operands)
        env.update(zip(equation.outvars, results, strict=True))
        known.update(dict.fromkeys(equation.outvars, _NONE.union(*of_operands)))
    return [read(env, value) for value in jaxpr.outvars]


def num_classes(network: Network) -> int:
    """Columns of the output; ValueError for one, of which argmax knows one class, and for outputs
    that are no floats."""
    output: Any = network.output.aval
    if not jax.numpy.issubdtype(output.dtype, jax.numpy.floating):
        raise ValueError(f"apply_fn returned {output.str_short()}: {ALLOWED}")
    if output.shape[1] == 1:
        raise ValueError(
            f"apply_fn returned {output.str_short()}, one column, whose argmax is always class 0: "
            "allowed are two or more, such as jnp.concatenate([1 - p, p], axis=1) of a probability "
            "p, or [0, z] of a logit z; or criteria="
        )
    return output.shape[1]


def used_leaves(network: Network) -> set[int]:
    """The leaves that the output depends on, by number; ValueError if there are none."""
    read = {var for equation in network.equations for var in variables(equation.invars)}
    read.update(variables([network.output]))
    used = {number for number, leaf in enumerate(network.leaves) if leaf in read}
    if not used:
        raise ValueError(
            "apply_fn does not use params: no fault in them could change its output; allowed is a "
            "function of its first argument, not of parameters that it closes over"
        )
    return used


def _batch_axes(
    apply_fn: Frozen,
    params: PyTree,
    images: jax.ShapeDtypeStruct,
    jaxpr: core.Jaxpr,
    keep_derivatives: bool,
) -> dict[core.Var, int | None]:
    """Finds the images' axis of every value by tracing once more at another batch size.

    It is the axis whose length follows the batch. This needs no rule for any primitive.
    """
    batch = images.shape[0]
    other_images = jax.ShapeDtypeStruct((batch + 1, *images.shape[1:]), images.dtype)
    try:
        other = _flat_jaxpr(apply_fn, params, other_images, keep_derivatives)[0].eqns
    except Exception:  # the user's function may refuse any other batch size, in any way
        other = []
    same = [e.primitive.name for e in other] == [e.primitive.name for e in jaxpr.eqns]
    image = jaxpr.invars[-1]
    axes: dict[core.Var, int | None] = dict.fromkeys((*jaxpr.constvars, *jaxpr.invars))
    axes[image] = 0
    for position, equation in enumerate(jaxpr.eqns):
        depends = any(axes.get(var) is not None for var in variables(equation.invars))
        for number, var in enumerate(equation.outvars):
            found = UNKNOWN
            if same:
                shape = shape_of(other[position].outvars[number])
                found = _changed_axis(shape_of(var), shape, batch)
            axes[var] = found if depends else None
    return axes


def _changed_axis(shape: tuple[int, ...], other: tuple[int, ...], batch: int) -> int:
    if len(shape) != len(other):
        return UNKNOWN
    moved = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if not moved:
        return COUPLED
    if len(moved) == 1 and (shape[moved[0]], other[moved[0]]) == (batch, batch + 1):
        return moved[0]
    return UNKNOWN
