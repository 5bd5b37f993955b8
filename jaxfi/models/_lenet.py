"""LeNet as the studies used it: two convolutions, one pool, two dense layers."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxfi.models._layers import convolution, dense, max_pool


class LeNet(nn.Module):
    """1,626,442 parameters with 3 input channels, 1,625,866 with 1.

    >>> import jax, jax.numpy as jnp
    >>> variables = jax.eval_shape(LeNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    1626442
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Images `[B, 32, 32, C]` to logits `[B, num_classes]`; training needs a "dropout" key."""
        x = nn.relu(convolution(x, 32, padding=0, use_bias=True, name="conv1"))
        x = nn.relu(convolution(x, 64, padding=0, use_bias=True, name="conv2"))
        x = max_pool(x, 2)
        x = nn.Dropout(0.25, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(x, 128, name="fc1"))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return dense(x, self.num_classes, name="fc2")
