"""The arithmetic of convolutions and matmuls, emulated on any backend.

An accelerator's matrix unit may round its operands before it multiplies: TF32 keeps 10 bits of the
mantissa, and then most faults in bits 0 to 11 of a float32 weight are rounded away, whatever the
network. `with_arithmetic` puts that rounding into a traced network, so it needs nothing from the
model and every engine runs it like any other network. The product of two operands of 11
significant bits is exact in float32; the sums stay the backend's float32 sums, as in the hardware.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxfi.faults._transforms import PyTree
from jaxfi.network._equations import Body, bind, bind_bodies, body_env, read
from jaxfi.network._graph import ApplyFn, trace_network
from jaxfi.network._rules import dtype_of
from jaxfi.network._sources import (
    IMAGES,
    NOTHING,
    Sources,
    follow,
    inner_sources,
    leaf_sources,
    sources_of,
)

Rounding = Callable[[jax.Array], jax.Array]
Choice = Callable[[core.JaxprEqn, Sequence[Sources]], Rounding | None]

# Operations of a matrix unit, which multiply their first two operands, and parts of the names of
# others that cannot be rounded from outside: scaled_dot, dot_product_attention_fwd, ...
_ROUNDED = ("conv_general_dilated", "dot_general", "ragged_dot_general")
_MATRIX_UNIT = (*_ROUNDED, "_dot", "dot_", "matmul")
_FULL = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)
# Below 2**-14, float16 has steps of 2**-24 and lax.reduce_precision(x, 5, 10) gives 0.
_FLOAT16_SMALLEST_NORMAL, _FLOAT16_STEPS = 2.0**-14, 2.0**24


def _straight_through(rounding: Rounding) -> Rounding:
    """`rounding`, whose derivative is 1: XLA's is the tangent rounded, so that small ones are 0."""
    rounded = jax.custom_jvp(rounding)
    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))
    return rounded


@_straight_through
def round_to_tf32(x: jax.Array) -> jax.Array:
    """`x` with 10 bits of mantissa and float32's exponents; nearest, ties to even."""
    return _reduce(x, exponent_bits=8, mantissa_bits=10)


@_straight_through
def round_to_bfloat16(x: jax.Array) -> jax.Array:
    """`x` with bfloat16's values, in its own dtype; nearest, ties to even."""
    return _reduce(x, exponent_bits=8, mantissa_bits=7)


@_straight_through
def round_to_float16(x: jax.Array) -> jax.Array:
    """`x` with IEEE float16's values, in its own dtype; nearest, ties to even, overflow to Inf.

    Not a cast to float16 and back: a compiler may drop such a pair.

    >>> round_to_float16(jnp.array([65519.0, 65520.0, 3e-8, 1e-8])).tolist()
    [65504.0, inf, 5.960464477539063e-08, 0.0]
    """
    wide = _widen(x)
    normal = _reduce(wide, exponent_bits=5, mantissa_bits=10)
    steps = lax.round(wide * _FLOAT16_STEPS, lax.RoundingMethod.TO_NEAREST_EVEN)
    rounded = jnp.where(jnp.abs(wide) < _FLOAT16_SMALLEST_NORMAL, steps / _FLOAT16_STEPS, normal)
    return rounded.astype(x.dtype)


def _widen(x: jax.Array) -> jax.Array:
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def _reduce(x: jax.Array, exponent_bits: int, mantissa_bits: int) -> jax.Array:
    return lax.reduce_precision(_widen(x), exponent_bits, mantissa_bits).astype(x.dtype)


def keep(x: jax.Array) -> jax.Array:
    """`x`, not rounded."""
    return x


ARITHMETIC: Mapping[str, Rounding] = {
    "float32": keep,
    "tf32": round_to_tf32,
    "bfloat16": round_to_bfloat16,
    "float16": round_to_float16,
}


def with_arithmetic(apply_fn: ApplyFn, arithmetic: Mapping[str, str]) -> ApplyFn:
    """`apply_fn` with the operands of its convolutions and matmuls rounded, layer by layer.

    A convolution or matmul belongs to the leaf that one of its operands is computed from (without
    the images), and takes the first entry whose pattern matches the leaf's path. One that belongs
    to no leaf, as in attention, takes the entry "*". Both operands are rounded; sums, biases and
    everything else stay as they are. Without an entry nothing is rounded. Inside scan, while, cond
    and inner calls the same holds; layers that share a stacked leaf share its entry.

    Args:
      apply_fn: pure; maps parameters and images [batch, ...] to outputs [batch, classes].
      arithmetic: pattern (fnmatch) of leaf paths to a name in `ARITHMETIC`: "float32" (operands as
        they are), "tf32", "bfloat16" or "float16". Products are then taken at full precision,
        whatever the backend's default.

    Returns:
      A function like `apply_fn`, pure and jit-able. Rounding passes derivatives on as they are.

    Raises ValueError for an unknown arithmetic; when called, also for a pattern that is the first
    to match no leaf, and for a convolution or matmul that no rounding can reach, as in shard_map
    or a Pallas kernel.

    >>> def apply_fn(params, images):
    ...     return images @ params["dense"]["kernel"]
    >>> params = {"dense": {"kernel": jnp.array([[1.0], [2.0**-11]])}}
    >>> images = jnp.array([[1.0 + 2.0**-11, 1.0]])
    >>> apply_fn(params, images).item()
    1.0009765625
    >>> with_arithmetic(apply_fn, {"*": "tf32"})(params, images).item()
    1.00048828125
    """
    unknown = [name for name in arithmetic.values() if name not in ARITHMETIC]
    if unknown:
        allowed = ", ".join(ARITHMETIC)
        raise ValueError(f"unknown arithmetic {unknown[0]!r}: allowed are {allowed}")
    patterns = dict(arithmetic)

    def rounded_apply_fn(params: PyTree, images: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        network = trace_network(apply_fn, params, shape, keep_derivatives=True)
        entries = _entry_of_each_leaf(network.paths, patterns)
        choose = functools.partial(_rounding, entries=entries, patterns=patterns)
        leaves = zip(network.leaves, jax.tree.leaves(params), strict=True)
        env = {**network.given, **dict(leaves), network.image: images}
        return read(_run(network.equations, env, leaf_sources(network), choose), network.output)

    return rounded_apply_fn


def _entry_of_each_leaf(paths: Sequence[str], patterns: Mapping[str, str]) -> list[str | None]:
    """The pattern that decides each leaf."""
    entries = []
    for path in paths:
        matching = (pattern for pattern in patterns if fnmatch.fnmatchcase(path, pattern))
        entries.append(next(matching, None))
    idle = [pattern for pattern in patterns if pattern not in entries and pattern != "*"]
    if idle:
        raise ValueError(
            f"arithmetic pattern {idle[0]!r} is the first to match no leaf: "
            f"the leaves are {', '.join(paths)}"
        )
    return entries


def _run(
    equations: Iterable[core.JaxprEqn],
    env: Mapping[core.Var, jax.Array],
    sources: Mapping[core.Var, Sources],
    choose: Choice,
) -> dict[core.Var, jax.Array]:
    """`env` and the results of the equations, with operands rounded as `choose` says."""
    values = dict(env)
    for equation in equations:
        operands = [read(values, value) for value in equation.invars]
        results = _apply(equation, operands, sources_of(equation.invars, sources), choose)
        values.update(zip(equation.outvars, results, strict=True))
    return values


def _apply(
    equation: core.JaxprEqn, operands: list, sources: Sequence[Sources], choose: Choice
) -> list:
    name = equation.primitive.name
    inside = next(_matrix_unit(equation), None)
    if inside is None:
        return bind(equation, operands)
    if name in _ROUNDED:
        rounding = choose(equation, sources)
        if rounding is None:
            return bind(equation, operands)
        # Whatever the backend's default: on a GPU it is TF32, on a TPU bfloat16.
        full = equation.replace(params={**equation.params, "precision": _FULL})
        return bind(full, [*map(rounding, operands[:2]), *operands[2:]])
    bodies = inner_sources(equation, sources)
    if not bodies:
        where = f" inside a {name}" if inside != name else ""
        raise ValueError(
            f"cannot set the arithmetic of a {inside}{where}: allowed are {', '.join(_ROUNDED)}, "
            "also inside scan, while, cond and calls"
        )
    return bind_bodies(
        equation,
        operands,
        lambda name, body, inputs: _run_body(body, inputs, bodies[name], choose),
    )


def _run_body(
    body: Body, operands: Sequence, sources: Sequence[Sources], choose: Choice
) -> list[jax.Array]:
    inner = getattr(body, "jaxpr", body)
    known = follow(inner.eqns, dict(zip(inner.invars, sources, strict=True)))
    values = _run(inner.eqns, body_env(body, operands), known, choose)
    return [read(values, value) for value in inner.outvars]


def _rounding(
    equation: core.JaxprEqn,
    sources: Sequence[Sources],
    entries: Sequence[str | None],
    patterns: Mapping[str, str],
) -> Rounding | None:
    """What to do to both operands of an equation; None leaves them."""
    dtypes = [dtype_of(value) for value in equation.invars[:2]]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    leaves = NOTHING.union(*(source for source in sources[:2] if IMAGES not in source))
    decided_by = [entries[leaf] for leaf in leaves] if leaves else ["*"]
    entry = next((pattern for pattern in patterns if pattern in decided_by), None)
    return ARITHMETIC[patterns[entry]] if entry is not None else None


def _matrix_unit(equation: core.JaxprEqn) -> Iterator[str]:
    """Names of the matrix unit's operations in an equation."""
    name = equation.primitive.name
    if any(part in name for part in _MATRIX_UNIT):
        yield name
    for body in core.jaxprs_in_params(equation.params):
        for inner in body.eqns:
            yield from _matrix_unit(inner)
