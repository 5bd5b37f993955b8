"""Wide dense layers add up their inputs in blocks: what one channel touches is one partial sum.

A sum over K inputs is split into blocks of whole channels, each block is one matmul, and a binary
tree adds the partial sums up. Every engine computes them so, the golden run included, and the
order is always the same. A fault in one weight, or in one input channel, then changes one partial
sum and the log2(blocks) sums above it: the fast engine computes these, and takes the rest from the
golden run. For LeNet's first dense layer (12,544 inputs) that is 1/32 of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxfi.rules import column_rule

_LEAST_INPUTS = 1024  # narrower layers are one sum
_LEAST_BLOCK = 256  # inputs a block: below, a matmul is no longer efficient
_PLAIN = (((1,), (0,)), ((), ()))  # [B, K] x [K, N]


class Blocks(NamedTuple):
    """How K inputs are split: seen as [outer, num_blocks, size, inner], block b is [:, b].

    `size` channels make one block; channel c is in block c // size. Inputs that are flattened
    images [height, width, channels] have outer = height x width and inner = 1.
    """

    outer: int
    num_blocks: int
    size: int
    inner: int

    @property
    def length(self) -> int:
        """Inputs in one block."""
        return self.outer * self.size * self.inner

    def place(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block of each input, and its place in the block."""
        shape = (self.outer, self.num_blocks, self.size, self.inner)
        outer, block, channel, inner = np.unravel_index(inputs, shape)
        return block, (outer * self.size + channel) * self.inner + inner


class Partials(NamedTuple):
    """A blocked layer on one batch.

    Attributes:
      inputs: [num_blocks, B, length], its inputs by block.
      levels: the tree's levels, [num_blocks, B, N], [num_blocks / 2, B, N], ..., [2, B, N].
    """

    inputs: jax.Array
    levels: list[jax.Array]


def split(array: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """The axis of the K inputs taken apart: [num_blocks, ..., length, ...]."""
    shape = list(array.shape)
    shape[axis : axis + 1] = [blocks.outer, blocks.num_blocks, blocks.size, blocks.inner]
    apart = jnp.moveaxis(array.reshape(shape), axis + 1, 0)
    shape = list(array.shape)
    shape[axis] = blocks.length
    return apart.reshape([blocks.num_blocks, *shape])


def partials(x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable) -> Partials:
    """Inputs x [B, K], weights [K, N]; `dot` is the layer's matmul."""
    inputs = split(x, 1, blocks)
    first = lax.map(lambda block: dot(*block), (inputs, split(weights, 0, blocks)))
    levels = [first]
    while len(levels[-1]) > 2:
        levels.append(levels[-1][0::2] + levels[-1][1::2])
    return Partials(inputs, levels)


def blocked_dot(x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable) -> jax.Array:
    """The layer's result, [B, N]."""
    return climb(*partials(x, weights, blocks, dot).levels[-1])


def siblings(levels: list[jax.Array], block: Any) -> list[jax.Array]:
    """What is added to block's partial sum on its way up the tree, each [B, N]."""
    return [
        lax.dynamic_index_in_dim(level, (block >> height) ^ 1, keepdims=False)
        for height, level in enumerate(levels)
    ]


def climb(partial: jax.Array, *others: jax.Array) -> jax.Array:
    """The layer's result from one partial sum and its siblings.

    a + b is b + a to the bit, unless both are NaN: which of the two it is then is not known.
    """
    for other in others:
        partial = partial + other
    return partial


def layer_dot(equation: core.JaxprEqn) -> Callable:
    """The equation's matmul, on other lengths of its sum."""
    wanted = {k: equation.params[k] for k in ("precision", "preferred_element_type")}
    return lambda x, weights: lax.dot_general(x, weights, _PLAIN, **wanted)


def find_blocks(
    equations: Iterable[core.JaxprEqn], batch_axis: Mapping[core.Var, int | None]
) -> dict[core.Var, Blocks]:
    """How each wide dense layer on the images is split, by the layer's result.

    A block must hold whole channels of what the layer reads, so that a faulty channel stays in one.
    """
    found: dict[core.Var, Blocks] = {}
    channel_axis: dict[core.Var, int] = {}  # of what a convolution put out, and on from there
    flattened: dict[core.Var, core.Var] = {}
    for equation in equations:
        result = equation.outvars[0]
        if equation.primitive.name == "dot_general":
            if blocks := _dense_blocks(equation, batch_axis, channel_axis, flattened):
                found[result] = blocks
        elif (axis := _channel_axis(equation, channel_axis)) is not None:
            channel_axis.update(dict.fromkeys(equation.outvars, axis))
        elif equation.primitive.name == "reshape":
            flattened[result] = equation.invars[0]
    return found


def _channel_axis(equation: core.JaxprEqn, known: Mapping[core.Var, int]) -> int | None:
    if equation.primitive.name == "conv_general_dilated":
        return equation.params["dimension_numbers"].out_spec[1]
    axes = tuple(known.get(v) if isinstance(v, core.Var) else None for v in equation.invars)
    rule = column_rule(equation, axes) if any(axis is not None for axis in axes) else None
    return None if rule is None else rule[0]


def _dense_blocks(
    equation: core.JaxprEqn,
    batch_axis: Mapping[core.Var, int | None],
    channel_axis: Mapping[core.Var, int],
    flattened: Mapping[core.Var, core.Var],
) -> Blocks | None:
    x, weights = equation.invars
    if isinstance(x, core.Literal) or isinstance(weights, core.Literal):
        return None
    plain = equation.params["dimension_numbers"] == _PLAIN
    if not plain or (len(x.aval.shape), len(weights.aval.shape)) != (2, 2):
        return None
    dtypes = {v.aval.dtype for v in (x, weights, equation.outvars[0])}
    exact = len(dtypes) == 1 and dtypes.pop() in (np.float32, np.float64)  # sums lose no bits
    on_images = batch_axis.get(x) == 0 and batch_axis.get(weights) is None
    if not (exact and on_images and x.aval.shape[1] >= _LEAST_INPUTS):
        return None
    source = flattened.get(x, x)
    axis, shape = channel_axis.get(source, 0), source.aval.shape
    if source is x or axis < 1 or batch_axis.get(source) != 0:
        return _split(1, x.aval.shape[1], 1)
    return _split(int(np.prod(shape[1:axis])), shape[axis], int(np.prod(shape[axis + 1 :])))


def _split(outer: int, channels: int, inner: int) -> Blocks | None:
    count = 1
    while channels % (2 * count) == 0 and outer * inner * channels // (2 * count) >= _LEAST_BLOCK:
        count *= 2
    return Blocks(outer, count, channels // count, inner) if count > 1 else None
