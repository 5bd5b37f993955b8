"""Each operation rounds by itself, whatever the compiler fuses it with.

Inside a fusion XLA's CPU backend contracts `a * b + c` to one operation that rounds once, and its
simplifier puts operations together: log(exp(x)) is x, x * 0.3 * 0.7 is x * 0.21, and x / y is
x * (1 / y) where y is a constant or broadcast. Where a fault made
a value huge, that decides the outcome: x * c - max(x * c) is then the rounding error of a maximum,
not 0, and its exponential Inf. No compile option keeps XLA from it but switching fusion off. So
what an operation computed goes through `rounded`, an identity on its bits that no compiler has
seen through yet (tests/network/test_rounding.py), before another one reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxfi.network._blocks import MATMULS, sum_length, unfused
from jaxfi.network._equations import (
    Body,
    Value,
    bind,
    bind_bodies,
    body_env,
    has_bodies,
    read,
    variables,
)
from jaxfi.network._rules import dtype_of

_ADD = {"add", "sub", "add_any"}
# What rounds, or computes what another operation might be put together with.
_ROUND = _ADD | set("""
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh cumlogsumexp cumprod
    cumsum digamma div erf erf_inv erfc exp exp2 expm1 igamma igammac integer_pow lgamma log log1p
    logistic mul polygamma pow reduce_prod reduce_sum reduce_window_sum
    regularized_incomplete_beta rem rsqrt sin sinh sqrt square tan tanh zeta
    """.split())  # fmt: skip
# What nothing is put together with: they choose and compare, or their operands are stored.
_SAFE = set("""
    argmax argmin conv_general_dilated dot_general eq ge gt is_finite le lt max min ne reduce_max
    reduce_min sort top_k
    """.split())  # fmt: skip
# What adds or multiplies many, in an order of the compiler's.
_SUMS = set("""
    cumlogsumexp cumprod cumsum reduce_prod reduce_sum reduce_window_sum
    """.split())  # fmt: skip
_MOVES = set("""
    broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice expand_dims gather
    neg pad real imag reshape rev select_n slice split squeeze tile transpose
    """.split())  # fmt: skip


def rounded(x: jax.Array) -> jax.Array:
    """`x`, to the bit, but not to the compiler."""
    if jnp.iscomplexobj(x):
        return lax.complex(rounded(x.real), rounded(x.imag))
    words = _words(x)
    return lax.bitcast_convert_type(words | _nothing(words), x.dtype)


def _words(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _nothing(words: jax.Array) -> jax.Array:
    """Zeros: i * (i + 1) is even, which the compiler does not know."""
    return (words * (words + 1)) & 1


def _divided(x: jax.Array, y: jax.Array) -> list[jax.Array]:
    """x / y: of a y that is another one in each place, the compiler does not take the reciprocal;
    x may be a constant, and y be broadcast."""
    x, y = jnp.broadcast_arrays(x, y)  # either may be a scalar
    places = lax.iota(_words(y).dtype, y.size).reshape(y.shape)
    words = _words(y) | _nothing(_words(x) + _words(y) + places)
    return [lax.div(x, lax.bitcast_convert_type(words, x.dtype))]


def _no_constants(operands: list) -> list:
    """The operands of a matmul, none of them a constant to the compiler, which would take the
    product of two values joined, with a constant, apart into two."""
    given = [isinstance(operand, jax.core.Tracer) for operand in operands]
    dtypes = [jnp.dtype(operand.dtype) for operand in operands]
    empty = any(operand.size == 0 for operand in operands)
    if all(given) or not any(given) or empty or not all(map(_is_real, dtypes)):
        return operands
    zero = _nothing(_words(operands[given.index(True)].ravel()[0]))
    return [
        operand
        if traced
        else lax.bitcast_convert_type(_words(operand) | zero.astype(_words(operand).dtype), dtype)
        for operand, traced, dtype in zip(operands, given, dtypes, strict=True)
    ]


def to_be_rounded(
    equations: Sequence[core.JaxprEqn], outputs: Iterable[Value] = ()
) -> frozenset[core.Var]:
    """The results that go through `rounded` before they are read; `outputs` are read elsewhere."""
    readers: dict[core.Var, set[str]] = {var: {"output"} for var in variables(outputs)}
    found = set()
    for equation in reversed(equations):
        name = _name(equation)
        read_by = set().union(*(readers.get(var, set()) for var in equation.outvars))
        for var in variables(equation.invars):
            readers.setdefault(var, set()).update({name} | (read_by if name in _MOVES else set()))
        if name not in _ROUND or not _has_words(equation.outvars[0]):
            continue
        # A sum is put together with other sums alone.
        others = {"output"} | _ADD if name in _ADD else read_by
        if (read_by & others) - _SAFE - _MOVES:
            found.add(equation.outvars[0])
    return frozenset(found)


def _name(equation: core.JaxprEqn) -> str:
    """A matmul or convolution that sums one product is a product to the compiler."""
    name = equation.primitive.name
    return "mul" if name in MATMULS and sum_length(equation) == 1 else name


def bind_rounded(equation: core.JaxprEqn, operands: list) -> list:
    """Runs one equation; inside loops, branches and calls each operation rounds by itself."""
    if has_bodies(equation):
        return bind_bodies(equation, operands, _run_body)
    if equation.primitive.name == "div" and _has_words(equation.outvars[0], np.floating):
        return _divided(*operands)
    if equation.primitive.name in MATMULS:
        operands = _no_constants(operands)
    if equation.primitive.name in _SUMS and _has_words(equation.outvars[0]):
        # In an order of its own, whatever is before and behind it in a program.
        return unfused(lambda *given: bind(equation, list(given)), *operands)
    return bind(equation, operands)


def _run_body(_: str, body: Body, inputs: Sequence) -> list[jax.Array]:
    inner = getattr(body, "jaxpr", body)
    env, rounds = body_env(body, inputs), to_be_rounded(inner.eqns, inner.outvars)
    for equation in inner.eqns:
        results = bind_rounded(equation, [read(env, value) for value in equation.invars])
        for var, result in zip(equation.outvars, results, strict=True):
            env[var] = rounded(result) if var in rounds else result
    return [read(env, value) for value in inner.outvars]


def _has_words(var: core.Var, kind: type = np.inexact) -> bool:
    dtype = dtype_of(var)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False
    return jnp.issubdtype(dtype, kind) and jnp.finfo(dtype).bits >= 8


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.floating) and jnp.finfo(dtype).bits >= 8
