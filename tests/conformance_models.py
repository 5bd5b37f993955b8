"""Networks that the fast engine never saw at design time, for test_conformance.py.

Each function returns `(apply_fn, params, shape of one image)`.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxfi.models import MODELS, ResNet

Model = tuple[Callable, dict, tuple[int, ...]]
CLASSES = 4


def normal(seed: int, *shape: int, scale: float | None = None) -> jax.Array:
    """Reproducible weights; the default scale keeps activations of order one."""
    scale = scale or 1 / np.sqrt(max(1, np.prod(shape[:-1])))
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values, jnp.float32)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def along_last(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def dense(x: jax.Array, layer: dict) -> jax.Array:
    y = x @ layer["kernel"]
    return y + along_last(layer["bias"], y)


def dense_layer(seed: int, inputs: int, outputs: int) -> dict:
    return {"kernel": normal(seed, inputs, outputs), "bias": normal(seed + 1, outputs, scale=0.1)}


def plain_mlp() -> Model:
    params = {"a": dense_layer(0, 6, 8), "b": dense_layer(2, 8, 7), "c": dense_layer(4, 7, CLASSES)}

    def apply_fn(p, x):
        x = jax.nn.relu(dense(x, p["a"]))
        return dense(jnp.tanh(dense(x, p["b"])), p["c"])

    return apply_fn, params, (6,)


def plain_conv() -> Model:
    params = {"conv": normal(0, 3, 3, 2, 6), "strided": normal(1, 3, 3, 6, 5),
              "out": dense_layer(2, 5 * 9, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["conv"]))
        x = jax.nn.silu(conv(x, p["strided"], stride=2))
        return dense(x.reshape(x.shape[0], -1), p["out"])

    return apply_fn, params, (6, 6, 2)


def wide_layers() -> Model:
    """Dense layers that are summed in blocks: behind flattened images, and behind each other."""
    params = {"conv": normal(0, 3, 3, 2, 8), "first": dense_layer(1, 16 * 16 * 8, 1024),
              "second": dense_layer(3, 1024, 12), "out": dense_layer(5, 12, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["conv"]))
        x = jax.nn.relu(dense(x.reshape(x.shape[0], -1), p["first"]))
        return dense(jax.nn.relu(dense(x, p["second"])), p["out"])

    return apply_fn, params, (16, 16, 2)


def wide_channels_first() -> Model:
    """The same with images laid out as PyTorch's, and the wide layer's weights used transposed."""
    params = {"conv": normal(0, 8, 2, 3, 3), "wide": normal(1, 12, 16 * 16 * 8),
              "out": normal(2, 16 * 16 * 8 + 12, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        layout = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=layout)
        flat = jax.nn.relu(x).reshape(x.shape[0], -1)
        wide = jax.nn.relu(flat @ p["wide"].T)
        return jnp.concatenate([flat, wide], axis=1) @ p["out"]

    return apply_fn, params, (2, 16, 16)


def wide_rows() -> Model:
    """Dense layers as PyTorch has them, weights [out, in], behind a flattened image."""
    params = {"conv": normal(0, 3, 3, 2, 32), "a": normal(1, 64, 32 * 36, scale=0.03),
              "b": normal(2, CLASSES, 64)}  # fmt: skip

    def linear(x, weights):
        return jax.lax.dot_general(x, weights, (((1,), (1,)), ((), ())))

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["conv"]))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first
        return linear(jax.nn.relu(linear(x, p["a"])), p["b"])

    return apply_fn, params, (6, 6, 2)


def wide_twice() -> Model:
    """Wide weights that two layers use, and a wide layer's input that the sum behind it reads."""
    params = {"in": dense_layer(0, 6, 1024), "tied": normal(2, 1024, 1024),
              "out": dense_layer(3, 1024, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = jax.nn.relu(dense(x, p["in"]))
        return dense(jnp.tanh(jax.nn.relu(x @ p["tied"]) @ p["tied"]) + x, p["out"])

    return apply_fn, params, (6,)


def wide_convolutions() -> Model:
    """Convolutions that are summed in blocks, one of whose inputs a shortcut reads too."""
    params = {"in": normal(0, 3, 3, 2, 256), "shift": normal(1, 256, scale=0.1),
              "a": normal(2, 3, 3, 256, 256), "b": normal(3, 3, 3, 256, 6),
              "shortcut": normal(4, 1, 1, 256, 256), "out": normal(5, 6, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = conv(x, p["in"])
        x = jax.nn.relu(x + along_last(p["shift"], x))
        x = jax.nn.relu(conv(x, p["a"], stride=2) + conv(x, p["shortcut"], stride=2))
        return conv(x, p["b"]).mean((1, 2)) @ p["out"]

    return apply_fn, params, (4, 4, 2)


def wide_convolutions_channels_first() -> Model:
    params = {"in": normal(0, 256, 2, 3, 3), "wide": normal(1, 6, 256, 3, 3),
              "out": normal(2, 6 * 2 * 3, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        layout = ("NCHW", "OIHW", "NCHW")
        for name in ("in", "wide"):
            x = jax.lax.conv_general_dilated(x, p[name], (1, 1), "VALID", dimension_numbers=layout)
            x = jnp.tanh(x)
        return x.reshape(x.shape[0], -1) @ p["out"]

    return apply_fn, params, (2, 6, 7)


class LinenCnn(nn.Module):
    """Convolutions, BatchNorm, both pools."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (2, 2), (2, 2))
        x = nn.Conv(5, (3, 3), padding="VALID", use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), (1, 1))
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


def shaken(variables: dict) -> dict:
    """Every leaf moved a little: fresh BatchNorms and biases are all ones and zeros."""
    leaves, treedef = jax.tree.flatten(variables)
    moved = [leaf + jnp.abs(normal(n, *leaf.shape, scale=0.1)) for n, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, moved)


def of_linen(module: nn.Module, shape: tuple[int, ...]) -> Model:
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    return module.apply, shaken(variables), shape


def linen_cnn() -> Model:
    return of_linen(LinenCnn(), (8, 8, 2))


def nnx_cnn() -> Model:
    class Cnn(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.conv = nnx.Conv(2, 5, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
            self.out = nnx.Linear(5, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
            return self.out(x.mean((1, 2)))

    graph, state = nnx.split(Cnn(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), shaken(state), (6, 6, 2)


def equinox_cnn() -> Model:
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential([
        eqx.nn.Conv2d(2, 5, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(20, 6, key=keys[1]), eqx.nn.LayerNorm(6),
        eqx.nn.Linear(6, CLASSES, key=keys[2]),
    ])  # fmt: skip
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), shaken(params), (2, 6, 6)


def haiku_cnn() -> Model:
    def network(x):
        x = hk.MaxPool((2, 2, 1), (2, 2, 1), "VALID")(jax.nn.relu(hk.Conv2D(5, 3)(x)))
        return hk.nets.MLP([6, CLASSES])(hk.Flatten()(x))

    pure = hk.without_apply_rng(hk.transform(network))
    return pure.apply, shaken(pure.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))), (6, 6, 2)


def depthwise_separable() -> Model:
    params = {"depth": normal(0, 3, 3, 1, 4), "point": normal(1, 1, 1, 4, 6),
              "doubling": normal(2, 3, 3, 1, 12), "out": dense_layer(3, 12, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = jax.nn.relu6(conv(x, p["depth"], groups=4))
        x = jax.nn.hard_swish(conv(x, p["point"]))
        return dense(conv(x, p["doubling"], groups=6).mean((1, 2)), p["out"])

    return apply_fn, params, (5, 5, 4)


def dense_concatenation() -> Model:
    params = {f"conv{n}": normal(n, 3, 3, 2 + 3 * n, 3) for n in range(3)}
    params["out"] = dense_layer(9, 11, CLASSES)

    def apply_fn(p, x):
        for n in range(3):
            x = jnp.concatenate([x, jax.nn.relu(conv(x, p[f"conv{n}"]))], axis=-1)
        return dense(x.max((1, 2)), p["out"])

    return apply_fn, params, (5, 5, 2)


def squeeze_and_excite() -> Model:
    params = {"conv": normal(0, 3, 3, 2, 6), "squeeze": dense_layer(1, 6, 3),
              "excite": dense_layer(3, 3, 6), "out": dense_layer(5, 6, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = jax.nn.relu(conv(x, p["conv"]))
        gate = jax.nn.relu(dense(x.mean((1, 2)), p["squeeze"]))
        gate = jax.nn.sigmoid(dense(gate, p["excite"]))
        return dense((x * gate[:, None, None, :]).mean((1, 2)), p["out"])

    return apply_fn, params, (5, 5, 2)


class VisionTransformer(nn.Module):
    """One block: patches, class token, positions, attention, GELU."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), (3, 3))(x).reshape(x.shape[0], 4, 8)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.1), (1, 5, 8))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


def vision_transformer() -> Model:
    return of_linen(VisionTransformer(), (6, 6, 2))


def recurrent() -> Model:
    params = {"in": normal(0, 3, 6), "hidden": normal(1, 6, 6), "start": normal(2, 6, scale=1.0),
              "out": dense_layer(3, 6, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        def step(state, inputs):
            state = jnp.tanh(inputs @ p["in"] + state @ p["hidden"])
            return state, None

        start = jnp.broadcast_to(p["start"], (x.shape[0], 6))
        return dense(jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[0], p["out"])

    return apply_fn, params, (5, 3)


def shared_leaf() -> Model:
    params = {"twice": dense_layer(0, 6, 6), "tied": normal(2, 6, 6), "out": normal(3, 6, CLASSES)}

    def apply_fn(p, x):
        x = jax.nn.relu(dense(x, p["twice"]))
        x = jax.nn.relu(dense(x, p["twice"])) @ p["tied"]
        return jax.nn.relu(x @ p["tied"].T) @ p["out"]

    return apply_fn, params, (6,)


def rematerialized() -> Model:
    params = {"a": dense_layer(0, 6, 8), "b": dense_layer(2, 8, 8), "out": dense_layer(4, 8, 4)}

    @jax.checkpoint
    def block(layer, x):
        return jax.nn.gelu(dense(x, layer))

    return lambda p, x: dense(block(p["b"], block(p["a"], x)), p["out"]), params, (6,)


def unreached_leaf() -> Model:
    params = {"used": dense_layer(0, 6, CLASSES), "unused": normal(3, 4, 4), "dead": normal(4, 3)}

    def apply_fn(p, x):
        jnp.sum(p["dead"])  # traced, but nothing reads it
        return dense(x, p["used"])

    return apply_fn, params, (6,)


def scalars_and_integers() -> Model:
    """A temperature, a per-image gain, and an integer table that looks up rows."""
    params = {"table": jnp.arange(24, dtype=jnp.int32).reshape(6, 4) % 5 - 2,
              "temperature": jnp.float32(0.7), "out": dense_layer(0, 4, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        x = x @ p["table"].astype(jnp.float32) / p["temperature"]
        return jax.nn.log_softmax(dense(x, p["out"]))

    return apply_fn, params, (6,)


def sliced_scale() -> Model:
    """A learned scale before a softmax: its layer runs in columns, the scale by its slice."""
    params = {"a": normal(0, 5, 5), "scale": normal(1, 5), "b": normal(2, 5, CLASSES)}

    def apply_fn(p, x):
        return jax.nn.softmax(x @ p["a"] * along_last(p["scale"], x)) @ p["b"]

    return apply_fn, params, (5,)


def dead_inputs() -> Model:
    """Input channels that are 0 or -0 everywhere, and a matmul that contracts one channel."""
    params = {"one": normal(0, 1, 4), "a": normal(1, 5, 4), "out": normal(2, 4, CLASSES)}

    def apply_fn(p, x):
        mask = along_last(jnp.array([1.0, 0.0, -0.0, 1.0, 0.0]), x)
        signs = jnp.sign(1 / (jax.nn.relu(x[:, :1]) @ p["one"]))  # tells 0 from -0
        return ((x * mask) @ p["a"] + signs) @ p["out"]

    return apply_fn, params, (5,)


def chained_products() -> Model:
    """Products and sums that a compiler may contract, with leaves used on both sides."""
    params = {"a": normal(0, 6, 5), "scale": normal(1, 5), "shift": normal(2, 5),
              "out": normal(3, 5, CLASSES)}  # fmt: skip

    def apply_fn(p, x):
        scale, shift = p["scale"][None], p["shift"][None]
        x = (x @ p["a"]) * scale + shift
        x = x * x - shift * x + x * scale
        return (x * jax.nn.sigmoid(x * 1.7)) @ p["out"]

    return apply_fn, params, (6,)


def residual() -> Model:
    """The pre-declared networks' block with its padded shortcut, and BatchNorm, narrow."""
    return of_linen(ResNet((4, 8), (1, 1), False, CLASSES), (8, 8, 3))


def residual_projected() -> Model:
    return of_linen(ResNet((4, 8), (1, 1), True, CLASSES), (8, 8, 3))


def group_norm() -> Model:
    """A reshape between a product and what stores it: a cut that moves bits, so runs whole."""
    params = {"a": normal(0, 6), "c": normal(1, 96, CLASSES)}

    def apply_fn(p, x):
        groups = x.reshape(x.shape[0], 4, 4, 2, 3)
        centred = groups - groups.mean((1, 2, 4), keepdims=True)
        y = centred.reshape(x.shape) * p["a"][None, None, None]
        return y.reshape(y.shape[0], -1) @ p["c"]

    return apply_fn, params, (4, 4, 6)


def batch_coupled() -> Model:
    """One infinite activation decides for all images of a batch: rows must not be packed."""
    params = {"a": normal(0, 5, 5), "b": normal(1, 5, 5), "c": normal(2, 5, CLASSES)}

    def apply_fn(p, x):
        y = jnp.tanh((x @ p["a"]) @ p["b"])
        return jnp.where(jnp.isfinite((x @ p["a"]).sum()), y, -y) @ p["c"]

    return apply_fn, params, (5,)


def spectral() -> Model:
    """Complex activations."""
    params = {"a": normal(0, 5, 8), "c": normal(1, 8, CLASSES)}
    return lambda p, x: jnp.abs(jnp.fft.fft(x @ p["a"])) @ p["c"], params, (5,)


TINY = (plain_mlp, plain_conv, wide_layers, wide_channels_first, wide_rows, wide_twice,
        wide_convolutions, wide_convolutions_channels_first, linen_cnn, nnx_cnn,
        equinox_cnn, haiku_cnn, depthwise_separable,
        dense_concatenation, squeeze_and_excite, vision_transformer, recurrent, shared_leaf,
        rematerialized, unreached_leaf, scalars_and_integers, sliced_scale, dead_inputs,
        chained_products, residual,
        residual_projected, group_norm, batch_coupled, spectral)  # fmt: skip


def studied(name: str) -> Model:
    """A network of jaxfi.models at its published size."""
    return of_linen(MODELS[name](), (32, 32, 3))
