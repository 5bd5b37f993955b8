"""Random small networks out of some forty operations, places, loops and dtypes.

`random_network(seed)` is a network as conformance_models has them; the operations that mix the
images of a batch, or treat its places differently, are among the others.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.conformance_models import CLASSES, Model, conv, normal

Array = jax.Array
Layer = Callable[[dict, Array], Array]
WIDTH = 16  # of every hidden value, [batch, WIDTH]; also an image of 2 x 2 x 4, or 4 tokens of 4


class Builder:
    """Draws layers; each adds its parameters, and returns a function of them and of [B, WIDTH]."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.params: dict[str, Array] = {}

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.params):02}"
        self.params[name] = normal(int(self.random.integers(2**31)), *shape)
        return name

    # Images stay apart.
    def dense(self) -> Layer:
        w, b = self.weight(WIDTH, WIDTH), self.weight(WIDTH)
        return lambda p, h: h @ p[w] + p[b][None]

    def wide(self) -> Layer:
        up, down = self.weight(WIDTH, 1024), self.weight(1024, WIDTH)
        return lambda p, h: jax.nn.relu(h @ p[up]) @ p[down]

    def transposed_dense(self) -> Layer:
        w = self.weight(WIDTH, WIDTH)
        return lambda p, h: jnp.einsum("bi,oi->bo", h, p[w])

    def activation(self) -> Layer:
        choices = [jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jnp.abs,
                   jax.nn.sigmoid, jnp.square, jnp.sin, jax.nn.relu6, jax.nn.elu]  # fmt: skip
        function = choices[self.random.integers(len(choices))]
        return lambda p, h: function(h)

    def layer_norm(self) -> Layer:
        scale = self.weight(WIDTH)

        def layer(p, h):
            h = h - h.mean(-1, keepdims=True)
            return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) * (1 + p[scale][None])

        return layer

    def batch_norm_evaluated(self) -> Layer:
        scale, shift = self.weight(WIDTH), self.weight(WIDTH)
        return lambda p, h: (h - 0.1) * (1 + p[scale][None]) + p[shift][None]

    def softmax(self) -> Layer:
        return lambda p, h: jax.nn.softmax(h) * 4 + jax.nn.logsumexp(h, axis=-1, keepdims=True) / 4

    def convolution(self) -> Layer:
        kernel = self.weight(3, 3, 4, 4)
        return lambda p, h: conv(h.reshape(-1, 2, 2, 4), p[kernel]).reshape(h.shape)

    def depthwise(self) -> Layer:
        kernel = self.weight(2, 2, 1, 4)
        return lambda p, h: conv(h.reshape(-1, 2, 2, 4), p[kernel], groups=4).reshape(h.shape)

    def channels_first(self) -> Layer:
        kernel = self.weight(4, 4, 2, 2)

        def layer(p, h):
            layout = ("NCHW", "OIHW", "NCHW")
            x = h.reshape(-1, 4, 2, 2)
            x = lax.conv_general_dilated(x, p[kernel], (1, 1), "SAME", dimension_numbers=layout)
            return x.reshape(h.shape)

        return layer

    def pools(self) -> Layer:
        def layer(p, h):
            x = h.reshape(-1, 2, 2, 4)
            most = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
            return (most + x.mean((1, 2), keepdims=True)).reshape(h.shape)

        return layer

    def attention(self) -> Layer:
        q, k, v = self.weight(4, 4), self.weight(4, 4), self.weight(4, 4)

        def layer(p, h):
            t = h.reshape(-1, 4, 4)
            scores = jnp.einsum("bqc,bkc->bqk", t @ p[q], t @ p[k])
            return (t + jax.nn.softmax(scores / 2) @ (t @ p[v])).reshape(h.shape)

        return layer

    def tokens_in_one_axis(self) -> Layer:
        w, place = self.weight(4, 4), self.weight(4, 4)

        def layer(p, h):
            rows = h.reshape(-1, 4) @ p[w]
            tiled = jnp.tile(p[place], (h.shape[0], 1))
            return jnp.tanh(rows + tiled).reshape(h.shape)

        return layer

    def along_features(self) -> Layer:
        choices = [lambda h: jnp.cumsum(h, -1), lambda h: jnp.sort(h, -1), lambda h: h[:, ::-1],
                   lambda h: jnp.roll(h, 3, axis=1), lambda h: lax.top_k(h, WIDTH)[0],
                   lambda h: jnp.abs(jnp.fft.fft(h)).astype(h.dtype),
                   lambda h: jnp.take_along_axis(h, jnp.argsort(h, -1), -1),
                   lambda h: jnp.pad(h[:, 2:], ((0, 0), (0, 2))),
                   lambda h: lax.dynamic_update_slice(h, h[:, :4] * 2, (0, 5)),
                   lambda h: lax.dynamic_slice(h, (0, 3), (h.shape[0], 8)).repeat(2, axis=1),
                   lambda h: h.at[:, ::2].multiply(0.5)]  # fmt: skip
        function = choices[self.random.integers(len(choices))]
        return lambda p, h: function(h)

    def embedding(self) -> Layer:
        table = self.weight(7, WIDTH)
        return lambda p, h: h + p[table][jnp.clip((h[:, 0] * 2).astype(jnp.int32) + 3, 0, 6)]

    def words(self) -> Layer:
        dtype = [jnp.bfloat16, jnp.float16, jnp.int32][self.random.integers(3)]
        return lambda p, h: h + (h * 8).astype(dtype).astype(h.dtype) / 8

    def shortcut(self) -> Layer:
        inner = self.draw(coupled=False)
        return lambda p, h: h + inner(p, h)

    def inner_call(self) -> Layer:
        inner = self.draw(coupled=False)
        return [jax.jit, jax.checkpoint][self.random.integers(2)](inner)

    def scan_over_layers(self) -> Layer:
        stack = self.weight(3, WIDTH, WIDTH)

        def layer(p, h):
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p[stack])[0]

        return layer

    def recurrence(self) -> Layer:
        w = self.weight(4, 4)

        def layer(p, h):
            tokens = h.reshape(-1, 4, 4).swapaxes(0, 1)
            start = jnp.zeros_like(tokens[0])
            _, out = lax.scan(lambda s, t: (jnp.tanh(s @ p[w] + t),) * 2, start, tokens)
            return out.swapaxes(0, 1).reshape(h.shape)

        return layer

    def counted_loop(self) -> Layer:
        w = self.weight(WIDTH, WIDTH)
        return lambda p, h: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p[w]), h)

    def loop_of_each_image(self) -> Layer:
        def one(h):
            return lax.while_loop(lambda h: jnp.abs(h).max() > 1, lambda h: h * 0.5, h)

        return lambda p, h: jax.vmap(one)(h)

    def branch_on_parameter(self) -> Layer:
        w = self.weight(WIDTH)
        return lambda p, h: lax.cond(p[w][0] > 0, jnp.tanh, jnp.abs, h) + p[w][None]

    # These mix images, or treat places differently.
    def batch_statistics(self) -> Layer:
        return lambda p, h: (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 0.1)

    def along_batch(self) -> Layer:
        choices = [lambda h: jnp.cumsum(h, 0) / 2, lambda h: jnp.sort(h, 0), lambda h: h[::-1],
                   lambda h: jnp.roll(h, 1, axis=0), lambda h: jax.nn.softmax(h, axis=0),
                   lambda h: h / (1 + jnp.abs(h).max()), lambda h: h @ (h.T @ h) / 16,
                   lambda h: h + jnp.where(h.sum() > 0, 1.0, -1.0).astype(h.dtype),
                   lambda h: h[jnp.argsort(h[:, 0])]]  # fmt: skip
        function = choices[self.random.integers(len(choices))]
        return lambda p, h: function(h)

    def place(self) -> Layer:
        choices = [lambda h: h * (np.random.RandomState(0).rand(*h.shape) < 0.8),
                   lambda h: h.at[:1].add(1.0), lambda h: h.at[0, 0].set(2.0),
                   lambda h: h + jnp.arange(h.shape[0], dtype=h.dtype)[:, None] / 4,
                   lambda h: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.7, h.shape), h, 0),
                   lambda h: h + jax.random.normal(jax.random.key(1), h.shape, h.dtype),
                   lambda h: jnp.concatenate([h[:1] * 2, h[1:]])]  # fmt: skip
        function = choices[self.random.integers(len(choices))]
        return lambda p, h: function(h).astype(h.dtype)

    def loop_of_the_batch(self) -> Layer:
        w = self.weight(WIDTH)

        def layer(p, h):
            h = h * (1 + p[w][None] / 4)
            return lax.while_loop(lambda h: jnp.abs(h).max() > 1, lambda h: h * 0.5, h)

        return layer

    def branch_on_the_batch(self) -> Layer:
        return lambda p, h: lax.cond(h.sum() > 0, jnp.tanh, lambda h: h * 0.5, h)

    def scan_over_images(self) -> Layer:
        def layer(p, h):
            return lax.scan(lambda s, row: (s * 0.5 + row,) * 2, jnp.zeros_like(h[0]), h)[1]

        return layer

    def scan_with_batch_carry(self) -> Layer:
        def layer(p, h):
            start = jnp.zeros_like(h)
            return lax.scan(lambda s, _: (h - s.mean(0, keepdims=True), None), start, None, 2)[0]

        return layer

    APART = (dense, wide, transposed_dense, activation, layer_norm, batch_norm_evaluated, softmax,
             convolution, depthwise, channels_first, pools, attention, tokens_in_one_axis,
             along_features, embedding, words, shortcut, inner_call, scan_over_layers, recurrence,
             counted_loop, loop_of_each_image, branch_on_parameter)  # fmt: skip
    COUPLED = (batch_statistics, along_batch, place, loop_of_the_batch, branch_on_the_batch,
               scan_over_images, scan_with_batch_carry)  # fmt: skip

    def draw(self, coupled: bool) -> Layer:
        kinds = self.COUPLED if coupled else self.APART
        return kinds[self.random.integers(len(kinds))](self)


def random_network(seed: int) -> Model:
    """A network of three to six layers; half of them hold one that mixes images or places."""
    builder = Builder(seed)
    count = int(builder.random.integers(2, 5))
    coupled = builder.random.integers(2 * count)
    layers = [builder.dense()]
    layers += [builder.draw(coupled=number == coupled) for number in range(count)]
    if builder.random.integers(2):
        layers.append(builder.dense())
    out = builder.weight(WIDTH, CLASSES)
    dtype = [jnp.float32] * 4 + [jnp.bfloat16, jnp.float16]
    chosen = dtype[builder.random.integers(len(dtype))]
    params = jax.tree.map(lambda leaf: leaf.astype(chosen), builder.params)

    def apply_fn(p: dict, images: Array) -> Array:
        h = images.astype(chosen)
        for layer in layers:
            h = layer(p, h).astype(chosen)
        return h @ p[out]

    return apply_fn, params, (WIDTH,)
