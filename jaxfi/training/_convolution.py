"""The same network with convolutions that differentiate fast on a CPU.

XLA's CPU gradients of a convolution with few channels are slow, and any convolution inside a loop
is slower still. `with_matmul_convolutions` rewrites a traced function: the user's model and its
parameters stay as they are, and the results differ by rounding alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# Patches are built for so many bytes of images at a time. They are nine times the size of what they
# are taken from: whole batches of them leave the caches and cost a page fault every 4 KiB.
BLOCK_BYTES = 4 << 20


def with_matmul_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its convolutions as im2col and matmul.

    Convolutions that are grouped, dilated or not in NHWC, and those inside loops or functions with
    derivatives of their own, stay as they are.
    """

    @functools.wraps(fn)
    def rewritten(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        results = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return rewritten


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(closed.jaxpr.invars, args, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in closed.jaxpr.eqns:
        results = _apply(closed, equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in closed.jaxpr.outvars]


def _apply(closed: Any, equation: Any, args: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"], args)
    if name == "conv_general_dilated" and _is_plain_convolution(params):
        images, kernel = args
        return [matmul_convolution(images, kernel, params["window_strides"], params["padding"])]
    return _as_it_is(closed, equation, args)


def _as_it_is(closed: Any, equation: Any, args: list[Any]) -> list[Any]:
    """The equation as a program of its own: how one is bound differs between versions of JAX."""
    named = {
        variable: value
        for variable, value in zip(equation.invars, args, strict=True)
        if not isinstance(variable, core.Literal)
    }
    alone = closed.jaxpr.replace(
        constvars=[], invars=[*named], outvars=equation.outvars, eqns=[equation]
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*named.values())


def _is_plain_convolution(params: dict[str, Any]) -> bool:
    numbers = params["dimension_numbers"]
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    dilations = (*params["lhs_dilation"], *params["rhs_dilation"])
    groups = (params["feature_group_count"], params["batch_group_count"])
    padding = itertools.chain(*params["padding"])
    nhwc = layout == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    return nhwc and {*dilations, *groups} == {1} and min(padding) >= 0


def matmul_convolution(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
) -> jax.Array:
    """Images `[B, H, W, C]` and kernel `[h, w, C, D]` to `[B, H', W', D]`, by patches @ kernel."""
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    batch, height, width, channels = images.shape
    rows, columns = kernel.shape[:2]
    out = ((height - rows) // strides[0] + 1, (width - columns) // strides[1] + 1)

    # Recomputing a block's patches in the backward pass is cheaper than keeping them.
    @jax.checkpoint
    def convolve(block: jax.Array) -> jax.Array:
        return _patches(block, (rows, columns), strides) @ kernel.reshape(-1, kernel.shape[-1])

    size = rows * columns * channels * math.prod(out) * images.dtype.itemsize
    fitting = range(1, max(1, min(batch, BLOCK_BYTES // size)) + 1)
    block = max(num_images for num_images in fitting if batch % num_images == 0)
    if block == batch:
        return convolve(images)
    results = lax.map(convolve, images.reshape(-1, block, height, width, channels))
    return results.reshape(batch, *out, kernel.shape[-1])


def _patches(images: jax.Array, window: tuple[int, int], strides: tuple[int, int]) -> jax.Array:
    """`[B, H', W', h·w·C]`: the window at each place, in the order of a kernel's elements."""
    _, height, width, _ = images.shape
    ends = (height - window[0] + 1, width - window[1] + 1)
    shifted = [
        images[:, row : row + ends[0] : strides[0], column : column + ends[1] : strides[1]]
        for row, column in itertools.product(*map(range, window))
    ]
    return jnp.concatenate(shifted, axis=-1)
