"""Layers with PyTorch's defaults: initial distributions, symmetric padding, batch statistics.

Parameters are float32. To compute in another type, cast the variables and the images to it.
`convolution` and `dense` are to be called inside a compact module, which then owns the layer.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def uniform_by_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Draws from U(-1/√fan_in, 1/√fan_in).

    This is what torch.nn.Conv2d and Linear draw their bias from, and, as
    `kaiming_uniform_(a=√5)`, their weight too.
    """
    bound = 1 / math.sqrt(fan_in)

    def initialise(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialise


def convolution(
    x: jax.Array,
    features: int,
    *,
    name: str,
    size: int = 3,
    stride: int = 1,
    padding: int = 1,
    use_bias: bool = False,
) -> jax.Array:
    """torch.nn.Conv2d on `[B, H, W, C]`: `padding` zeros on each of the four sides.

    Flax's "SAME" is not it: with stride 2 it pads even images on one side only.
    """
    draw = uniform_by_fan_in(size * size * x.shape[-1])
    sides = [(padding, padding)] * 2
    if x.shape[1] < size:  # XLA's CPU backend would swap image and kernel: 25 times slower
        x = lax.optimization_barrier(jnp.pad(x, [(0, 0), *sides, (0, 0)]))
        sides = [(0, 0)] * 2
    layer = nn.Conv(
        features, (size, size), stride, sides,
        use_bias=use_bias, kernel_init=draw, bias_init=draw, name=name,
    )  # fmt: skip
    return layer(x)


def dense(x: jax.Array, features: int, *, name: str) -> jax.Array:
    """torch.nn.Linear on `[B, C]`."""
    draw = uniform_by_fan_in(x.shape[-1])
    return nn.Dense(features, kernel_init=draw, bias_init=draw, name=name)(x)


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """torch.nn.MaxPool2d(size) on `[B, H, W, C]`: NaN wins, of equals the first has the gradient.

    Not nn.max_pool: XLA's CPU backend loses NaN in a max reduction over 16 channels or more (seen
    in jaxlib 0.10.2 and 0.11.2), so a fault's NaN would vanish in the pool. Its gradient is slow
    there too: 112 ms against 9 for 100 images of 28×28×64, on two cores.
    """
    for axis in (2, 1):  # columns before rows, so that the first is PyTorch's first
        end = x.shape[axis] // size * size
        lines = [lax.slice_in_dim(x, start, end, size, axis) for start in range(size)]
        x = functools.reduce(_larger, lines)
    return x


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    first_wins = (first >= second) | (first != first)  # NaN differs from itself
    return lax.select(first_wins, first, second)


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm2d on `[B, H, W, C]`.

    Training normalises by the biased variance of the batch and keeps a running mean of the
    *unbiased* one, where `flax.linen.BatchNorm` keeps the biased one. Statistics are computed in
    float32 or wider; the result has the type of `x`.

    Raises ValueError in training if a channel has a single value, which has no variance.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1  # PyTorch's: the weight of the new batch

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        wide = x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)
        if train:
            mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
            if not self.is_initializing():
                self._advance(running_mean, mean)
                self._advance(running_var, var * _bessel(x))
        else:
            mean, var = running_mean.value, running_var.value

        mean, var, scale, bias = (
            jnp.expand_dims(v.astype(wide.dtype), (0, 1, 2)) for v in (mean, var, scale, bias)
        )
        normal = (wide - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return normal.astype(x.dtype)

    def _advance(self, running: nn.Variable, batch: jax.Array) -> None:
        old = running.value
        running.value = (1 - self.momentum) * old + self.momentum * batch.astype(old.dtype)


def _bessel(x: jax.Array) -> float:
    """n / (n - 1) for the n values of a channel."""
    count = x.size // x.shape[-1]
    if count < 2:
        raise ValueError(f"training needs 2 or more values per channel, given shape {x.shape}")
    return count / (count - 1)
