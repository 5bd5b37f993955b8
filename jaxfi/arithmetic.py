"""The arithmetic of convolutions and matmuls, emulated on any backend.

An accelerator's matrix unit may round its operands before it multiplies: TF32 keeps 10 bits of the
mantissa, and then most faults in bits 0 to 11 of a float32 weight are rounded away, whatever the
network. `with_arithmetic` puts that rounding into a traced network, so it needs nothing from the
model and every engine runs it like any other network. The product of two operands of 11
significant bits is exact in float32; the sums stay the backend's float32 sums, as in the hardware.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxfi.faults import PyTree
from jaxfi.slicing import ApplyFn, Network, bind, read, trace_network, variables

Rounding = Callable[[jax.Array], jax.Array]

_MATRIX_UNIT = ("conv_general_dilated", "dot_general")
IMAGES = -1  # stands among leaf numbers for "depends on the images"
# Below 2**-14, float16 has steps of 2**-24 and lax.reduce_precision(x, 5, 10) gives 0.
_FLOAT16_SMALLEST_NORMAL, _FLOAT16_STEPS = 2.0**-14, 2.0**24


def round_to_tf32(x: jax.Array) -> jax.Array:
    """`x` with 10 bits of mantissa and float32's exponents; nearest, ties to even."""
    return _reduce(x, exponent_bits=8, mantissa_bits=10)


def round_to_bfloat16(x: jax.Array) -> jax.Array:
    """`x` with bfloat16's values, in its own dtype; nearest, ties to even."""
    return _reduce(x, exponent_bits=8, mantissa_bits=7)


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


ARITHMETIC: Mapping[str, Rounding | None] = {
    "float32": None,
    "tf32": round_to_tf32,
    "bfloat16": round_to_bfloat16,
    "float16": round_to_float16,
}


def with_arithmetic(apply_fn: ApplyFn, arithmetic: Mapping[str, str]) -> ApplyFn:
    """`apply_fn` with the operands of its convolutions and matmuls rounded, layer by layer.

    A convolution or matmul belongs to the leaf that one of its operands is computed from (without
    the images), and takes the first entry whose pattern matches the leaf's path. One that belongs
    to no leaf, as in attention, takes the entry "*". Both operands are rounded; sums, biases and
    everything else stay as they are. Without an entry nothing is rounded.

    Args:
      apply_fn: pure; maps parameters and images [batch, ...] to outputs [batch, classes].
      arithmetic: pattern (fnmatch) of leaf paths to a name in `ARITHMETIC`: "float32" (as is),
        "tf32", "bfloat16" or "float16".

    Returns:
      A function like `apply_fn`, pure and jit-able.

    Raises ValueError for an unknown arithmetic; when called, also for a pattern that is the first
    to match no leaf, and for a convolution or matmul inside a loop or branch.

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
        network = trace_network(apply_fn, params, shape)
        entries = _entry_of_each_leaf(network.paths, patterns)
        return _run(network, jax.tree.leaves(params), images, entries, patterns)

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
    network: Network,
    leaves: Sequence[jax.Array],
    images: jax.Array,
    entries: Sequence[str | None],
    patterns: Mapping[str, str],
) -> jax.Array:
    env = {**network.given, **dict(zip(network.leaves, leaves, strict=True)), network.image: images}
    sources = leaf_sources(network)
    for equation in network.equations:
        operands = [read(env, value) for value in equation.invars]
        rounding = _rounding(equation, sources, entries, patterns)
        if rounding is not None:
            operands = [rounding(operand) for operand in operands]
        env.update(zip(equation.outvars, bind(equation, operands), strict=True))
    return read(env, network.output)


def leaf_sources(network: Network) -> dict[core.Var, frozenset[int]]:
    """The leaves (by number) that each variable is computed from, and `IMAGES`."""
    sources = {var: frozenset({number}) for number, var in enumerate(network.leaves)}
    sources[network.image] = frozenset({IMAGES})
    for equation in network.equations:
        operands = [sources.get(var, frozenset()) for var in variables(equation.invars)]
        sources.update(dict.fromkeys(equation.outvars, frozenset().union(*operands)))
    return sources


def _rounding(
    equation: core.JaxprEqn,
    sources: Mapping[core.Var, frozenset[int]],
    entries: Sequence[str | None],
    patterns: Mapping[str, str],
) -> Rounding | None:
    """What to do to both operands of an equation; None leaves them."""
    name = equation.primitive.name
    if name not in _MATRIX_UNIT:
        _check_no_matrix_unit_inside(equation)
        return None
    dtypes = [value.aval.dtype for value in equation.invars]  # type: ignore[attr-defined]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    operands = [sources.get(var, frozenset()) for var in variables(equation.invars)]
    leaves = frozenset().union(*(source for source in operands if IMAGES not in source))
    decided_by = [entries[leaf] for leaf in leaves] if leaves else ["*"]
    entry = next((pattern for pattern in patterns if pattern in decided_by), None)
    return ARITHMETIC[patterns[entry]] if entry is not None else None


def _check_no_matrix_unit_inside(equation: core.JaxprEqn) -> None:
    for jaxpr in core.jaxprs_in_params(equation.params):
        for inner in jaxpr.eqns:
            if inner.primitive.name in _MATRIX_UNIT:
                raise ValueError(
                    f"cannot set the arithmetic of a {inner.primitive.name} inside a "
                    f"{equation.primitive.name}: allowed are networks without it, so unroll it"
                )
            _check_no_matrix_unit_inside(inner)
