"""Wide layers add up their inputs in blocks: what one channel touches is one partial sum.

A sum over K inputs is split into blocks of whole channels, each block is one matmul or convolution,
and a binary tree adds the partial sums up. Every engine computes them so, the golden run included,
and the order is always the same. A fault in one weight, or in one input channel, then changes one
partial sum and the log2(blocks) sums above it: the fast engine computes these, and takes the rest
from the golden run. For LeNet's first dense layer (12,544 inputs) that is 1/32 of the arithmetic,
for a convolution of 256 input channels or more 1/4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxfi.network._rules import column_rule, dtype_of, shape_of

# Inputs from which on a layer is summed in blocks, and of one block: what pays on a CPU. A block of
# a convolution is a call of its own, which takes 30 ms to compile: hence at most four.
MATMULS = ("conv_general_dilated", "dot_general")
_LEAST_INPUTS = {"dot_general": 1024, "conv_general_dilated": 2048}
_LEAST_BLOCK = {"dot_general": 256, "conv_general_dilated": 512}
_MOST_BLOCKS = {"dot_general": math.inf, "conv_general_dilated": 4}
# [B, K] x [K, N], and PyTorch's [B, K] x [N, K]: the weights' axis that is summed over.
_SUMMED = {(((1,), (0,)), ((), ())): 0, (((1,), (1,)), ((), ())): 1}


class Blocks(NamedTuple):
    """How K inputs are split: seen as [outer, num_blocks, size, inner], block b is [:, b].

    `size` channels make one block; channel c is in block c // size. Inputs that are flattened
    images [height, width, channels] have outer = height x width and inner = 1, the channels of a
    convolution outer = inner = 1. `input_axis` and `weight_axis` are the axes of inputs and weights
    that the sum runs over.
    """

    outer: int
    num_blocks: int
    size: int
    inner: int
    input_axis: int = 1
    weight_axis: int = 0

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
      inputs: [num_blocks, B, ...], its inputs by block: [num_blocks, B, length] of a dense layer.
      levels: the tree's levels, [num_blocks, B, ...], [num_blocks / 2, B, ...], ..., [2, B, ...].
    """

    inputs: jax.Array
    levels: list[jax.Array]


def split(array: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """The axis that the sum runs over taken apart: [num_blocks, ..., length, ...]."""
    apart = jnp.moveaxis(array.reshape(_apart(array, axis, blocks)), axis + 1, 0)
    return apart.reshape([blocks.num_blocks, *_of_block(array, axis, blocks)])


def block_of(array: jax.Array, axis: int, blocks: Blocks, block: Any) -> jax.Array:
    """`split(array, axis, blocks)[block]`, [..., length, ...]; `block` may be traced."""
    apart = array.reshape(_apart(array, axis, blocks))
    part = lax.dynamic_index_in_dim(apart, block, axis + 1, keepdims=False)
    return part.reshape(_of_block(array, axis, blocks))


def replace_channel(
    inputs: jax.Array, blocks: Blocks, channel: jax.Array, values: jax.Array
) -> jax.Array:
    """One block's inputs [B, ...] with one channel of each row replaced.

    Args:
      channel: [B] of the layer's input channels, all in this block.
      values: [B, ...] what row b holds in channel[b], its other axes in the inputs' order.
    """
    axis = blocks.input_axis
    shape = [*inputs.shape[:axis], blocks.outer, blocks.size, blocks.inner]
    shape += inputs.shape[axis + 1 :]
    one = [*shape[: axis + 1], 1, *shape[axis + 2 :]]
    number = jnp.arange(blocks.size).reshape([-1 if n == axis + 1 else 1 for n in range(len(one))])
    here = number == (channel % blocks.size).reshape([-1] + [1] * (len(one) - 1))
    return jnp.where(here, values.reshape(one), inputs.reshape(shape)).reshape(inputs.shape)


def _apart(array: jax.Array, axis: int, blocks: Blocks) -> list[int]:
    inner = blocks.size * blocks.inner
    return [*array.shape[:axis], blocks.outer, blocks.num_blocks, inner, *array.shape[axis + 1 :]]


def _of_block(array: jax.Array, axis: int, blocks: Blocks) -> list[int]:
    return [*array.shape[:axis], blocks.length, *array.shape[axis + 1 :]]


def partials(x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable) -> Partials:
    """Inputs x [B, ...] and weights by block and level; `dot` is the layer's own operation."""
    x = _stored(x)
    levels = _levels(x, weights, blocks, dot)
    return Partials(split(x, blocks.input_axis, blocks), [jnp.stack(level) for level in levels])


def blocked_dot(x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable) -> jax.Array:
    """The layer's result, [B, ...]."""
    return climb(*_levels(_stored(x), weights, blocks, dot)[-1])


def _levels(
    x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable
) -> list[list[jax.Array]]:
    """The tree from the blocks' sums up to the two that make the result."""
    levels = [_block_sums(x, weights, blocks, dot)]
    while len(levels[-1]) > 2:
        below = levels[-1]
        levels.append([a + b for a, b in zip(below[0::2], below[1::2], strict=True)])
    return levels


def _block_sums(x: jax.Array, weights: jax.Array, blocks: Blocks, dot: Callable) -> list[jax.Array]:
    if x.ndim == 2:
        apart = (split(x, blocks.input_axis, blocks), split(weights, blocks.weight_axis, blocks))
        return list(lax.map(lambda block: dot(*block), apart))
    both = ((x, blocks.input_axis), (weights, blocks.weight_axis))
    starts = range(0, blocks.num_blocks * blocks.size, blocks.size)
    return [  # not in a loop: XLA's CPU convolutions are slow in one
        dot(*(lax.slice_in_dim(array, n, n + blocks.size, axis=axis) for array, axis in both))
        for n in starts
    ]


def siblings(levels: list[jax.Array], block: Any) -> list[jax.Array]:
    """What is added to block's partial sum on its way up the tree, each [B, ...]."""
    return [
        lax.dynamic_index_in_dim(level, (block >> height) ^ 1, keepdims=False)
        for height, level in enumerate(levels)
    ]


def climb(partial: jax.Array, *others: jax.Array) -> jax.Array:
    """The layer's result from one partial sum and its siblings.

    a + b is b + a to the bit, unless both are NaN: which of the two it is then is not known.

    The result has to be stored, as other layers' are: if XLA fuses the last sum into a reduction
    that reads it (ResNet18's mean over positions), that reduction runs in another order than over
    a stored value.
    """
    for other in others[:-1]:
        partial = partial + other
    return unfused(jnp.add, partial, others[-1])


def _stored(x: jax.Array) -> jax.Array:
    """A dense layer's inputs, in memory before they are taken apart: fused with that, what computes
    them would run in the order of the blocks, slowly (LeNet's pool: 33 ms more for 500 images)."""
    return unfused(lambda x: x, x) if x.ndim == 2 else x


def unfused(function: Callable, *operands: jax.Array) -> Any:
    """`function(*operands)`, arrays that XLA fuses with nothing.

    XLA's CPU compiler drops an optimization barrier before it fuses; through a conditional, which
    always takes its first branch, it does not fuse.
    """
    if operands[0].size == 0:
        return function(*operands)
    value = operands[0].ravel()[0]
    always = (value == value) | (value != value)
    results = jax.eval_shape(function, *operands)

    def nothing(*_: jax.Array) -> Any:
        return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)

    return lax.cond(always, function, nothing, *operands)


def layer_dot(equation: core.JaxprEqn) -> Callable:
    """The equation's matmul or convolution, on other lengths of its sum."""
    params = equation.primitive.get_bind_params(equation.params)

    def dot(x: jax.Array, weights: jax.Array) -> jax.Array:
        with equation.ctx.manager:
            return equation.primitive.bind(x, weights, **params)

    return dot


def find_blocks(
    equations: Iterable[core.JaxprEqn], batch_axis: Mapping[core.Var, int | None]
) -> dict[core.Var, Blocks]:
    """How each wide layer on the images is split, by the layer's result.

    A block must hold whole channels of what the layer reads, so that a faulty channel stays in one.
    """
    found: dict[core.Var, Blocks] = {}
    channel_axis: dict[core.Var, int] = {}  # of what a convolution put out, and on from there
    flattened: dict[core.Var, Any] = {}
    for equation in equations:
        name, result = equation.primitive.name, equation.outvars[0]
        if _is_wide(equation, batch_axis):
            if name == "dot_general":
                blocks = _dense_blocks(equation, batch_axis, channel_axis, flattened)
            else:
                blocks = _convolution_blocks(equation)
            if blocks is not None:
                found[result] = blocks
        if name == "dot_general":
            continue
        if (axis := _channel_axis(equation, channel_axis)) is not None:
            channel_axis.update(dict.fromkeys(equation.outvars, axis))
        elif name == "reshape":
            flattened[result] = equation.invars[0]
    return found


def _channel_axis(equation: core.JaxprEqn, known: Mapping[core.Var, int]) -> int | None:
    if equation.primitive.name == "conv_general_dilated":
        return equation.params["dimension_numbers"].out_spec[1]
    axes = tuple(known.get(v) if isinstance(v, core.Var) else None for v in equation.invars)
    rule = column_rule(equation, axes) if any(axis is not None for axis in axes) else None
    return None if rule is None else rule[0]


def _is_wide(equation: core.JaxprEqn, batch_axis: Mapping[core.Var, int | None]) -> bool:
    """A layer [B, ...] to [B, ...] with golden weights and many inputs, whose sums lose no bits."""
    if equation.primitive.name not in _LEAST_INPUTS:
        return False
    x, weights = equation.invars
    if isinstance(x, core.Literal) or isinstance(weights, core.Literal):
        return False
    dtypes = {dtype_of(v) for v in (x, weights, equation.outvars[0])}
    exact = len(dtypes) == 1 and dtypes.pop() in (np.float32, np.float64)
    on_images = [batch_axis.get(v) for v in (x, weights, equation.outvars[0])] == [0, None, 0]
    return exact and on_images and sum_length(equation) >= _LEAST_INPUTS[equation.primitive.name]


def sum_length(equation: core.JaxprEqn) -> int:
    """How many products a matmul or convolution adds up for one value of its result."""
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        return math.prod(shape_of(equation.invars[0])[axis] for axis in contracting)
    kernel, spec = shape_of(equation.invars[1]), equation.params["dimension_numbers"].rhs_spec
    return math.prod(kernel) // kernel[spec[0]]


def _dense_blocks(
    equation: core.JaxprEqn,
    batch_axis: Mapping[core.Var, int | None],
    channel_axis: Mapping[core.Var, int],
    flattened: Mapping[core.Var, Any],
) -> Blocks | None:
    x, weights = equation.invars
    summed = _SUMMED.get(equation.params["dimension_numbers"])
    if summed is None or (len(shape_of(x)), len(shape_of(weights))) != (2, 2):
        return None
    source: Any = flattened.get(x, x) if isinstance(x, core.Var) else x
    axis, shape = channel_axis.get(source, 0), shape_of(source)
    if source is x or axis < 1 or batch_axis.get(source) != 0:
        apart = 1, shape_of(x)[1], 1
    else:
        apart = math.prod(shape[1:axis]), shape[axis], math.prod(shape[axis + 1 :])
    blocks = _split(equation, *apart)
    return None if blocks is None else blocks._replace(weight_axis=summed)


def _convolution_blocks(equation: core.JaxprEqn) -> Blocks | None:
    spec = equation.params["dimension_numbers"]
    groups = (equation.params["feature_group_count"], equation.params["batch_group_count"])
    if groups != (1, 1) or (spec.lhs_spec[0], spec.out_spec[0]) != (0, 0):
        return None
    channels = shape_of(equation.invars[0])[spec.lhs_spec[1]]
    axes = {"input_axis": spec.lhs_spec[1], "weight_axis": spec.rhs_spec[1]}
    blocks = _split(equation, 1, channels, 1)
    return None if blocks is None else blocks._replace(**axes)


def _split(equation: core.JaxprEqn, outer: int, channels: int, inner: int) -> Blocks | None:
    """Into as many blocks, a power of two, as are worth it; None if that is one."""
    name, inputs = equation.primitive.name, sum_length(equation)
    most = min(inputs // _LEAST_BLOCK[name], _MOST_BLOCKS[name])
    count = 1
    while channels % (2 * count) == 0 and 2 * count <= most:
        count *= 2
    return Blocks(outer, count, channels // count, inner) if count > 1 else None
