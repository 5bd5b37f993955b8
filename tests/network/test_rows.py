"""What `mixes_rows` says of single operations and of random networks, against running them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfi.network import trace_network
from jaxfi.network._rows import Run, mixes_rows, never, uniform_constant
from tests.engine.random_networks import WIDTH, Builder, random_network

BATCH = 4


def reason(apply_fn, params, width: int = WIDTH) -> str:
    """Why the images of a batch do not stay apart from the input on; empty if they do."""
    network = trace_network(apply_fn, params, jax.ShapeDtypeStruct((BATCH, width), np.float32))
    states = dict.fromkeys(network.leaves, never) | {network.image: Run(0, BATCH)}
    states |= {var: uniform_constant(value) for var, value in network.given.items()}
    return mixes_rows(network.equations, states, {network.output: Run(0, BATCH)})


def stay_apart(apply_fn, params, width: int = WIDTH) -> bool:
    """The oracle: whether rows in any order, repeated, give outputs in that order."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(BATCH, width)) * [[0.1], [1], [4], [30]]
    images = jnp.asarray(images, jnp.float32)
    outputs = np.asarray(apply_fn(params, images), np.float32)
    orders = [generator.permutation(BATCH), *([place] * BATCH for place in range(BATCH))]
    return all(
        np.allclose(
            np.asarray(apply_fn(params, images[order]), np.float32),
            outputs[order],
            rtol=1e-2,
            atol=1e-3,
            equal_nan=True,
        )
        for order in map(np.array, orders)
    )


MASK = np.random.default_rng(1).random((BATCH, WIDTH)) < 0.5
ZEROS = jnp.zeros((BATCH, WIDTH))


def tokens(merged, shape):
    return jnp.tanh(merged + jnp.tile(jnp.eye(4), (BATCH, 1))).reshape(shape)


def halved(s):
    return s * 0.5


APART = {
    "mask of features": lambda h: h * MASK[:1],
    "tiled mask": lambda h: h * np.tile(MASK[:1], (BATCH, 1)),
    "iota of features": lambda h: h + lax.broadcasted_iota(h.dtype, h.shape, 1),
    "sorted with its places": lambda h: jnp.take_along_axis(h, jnp.argsort(h, 1), 1),
    "tokens merged": lambda h: tokens(h.reshape(-1, 4), h.shape),
    "batch behind tokens": lambda h: (
        h.reshape(-1, 4, 4).swapaxes(0, 1).reshape(-1, 4).reshape(4, -1, 4).swapaxes(0, 1)
    ).reshape(h.shape),
    "counted loop": lambda h: lax.fori_loop(0, 3, lambda n, s: s * 0.5 + h, jnp.zeros_like(h)),
    "scan over features": lambda h: lax.scan(lambda s, c: (s + c, s), jnp.zeros(BATCH), h.T)[1].T,
    "branch on a constant": lambda h: lax.cond(jnp.sum(jnp.arange(3)) > 2, jnp.tanh, jnp.sin, h),
    "jitted": jax.jit(lambda h: jax.nn.softmax(h)),
    "lookup": lambda h: jnp.eye(WIDTH)[jnp.argmax(h, 1)],
    "vmapped": jax.vmap(lambda row: jnp.convolve(row, jnp.ones(3), "same")),
}  # fmt: skip
MIXING = {
    "frozen mask": lambda h: h * MASK,
    "closed-over array": lambda h: h + jnp.asarray(MASK, jnp.float32),
    "iota of places": lambda h: h + jnp.arange(BATCH, dtype=h.dtype)[:, None],
    "scatter at a place": lambda h: h.at[1].add(1.0),
    "random bits": lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape),
    "reversed batch": lambda h: h[::-1],
    "rolled batch": lambda h: jnp.roll(h, 1, 0),
    "running sum": lambda h: jnp.cumsum(h, 0),
    "sorted batch": lambda h: jnp.sort(h, 0),
    "mean of the batch": lambda h: h - h.mean(0, keepdims=True),
    "gram matrix": lambda h: (h @ h.T) @ h,
    "tokens of two images": lambda h: (
        h.reshape(2, -1, WIDTH).mean(1, keepdims=True).repeat(2, 1).reshape(h.shape)
    ),
    "mask of merged tokens": lambda h: (
        h.reshape(-1, 4) * jnp.arange(16.0)[:, None]
    ).reshape(h.shape),
    "loop until all are done": lambda h: lax.while_loop(lambda s: s.max() > 0.5, halved, h),
    "carry of the batch": lambda h: lax.fori_loop(0, 2, lambda n, s: h - s.mean(0), ZEROS),
    "place made in a loop": lambda h: (
        h + lax.fori_loop(0, 3, lambda n, s: s + jnp.arange(4.0)[:, None], ZEROS)
    ),
    "branch on the batch": lambda h: lax.cond(h[0, 0] > 0, lambda h: h, lambda h: -h, h),
    "scan over images": lambda h: lax.scan(lambda s, row: (s + row, s), jnp.zeros(WIDTH), h)[1],
    "transposed square": lambda h: h[:, :BATCH].T.repeat(4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_images_that_stay_apart(name: str) -> None:
    def apply_fn(p, h):
        return APART[name](h)

    with jax.numpy_rank_promotion("allow"):
        assert stay_apart(apply_fn, {})
        assert reason(apply_fn, {}) == ""


@pytest.mark.parametrize("name", MIXING)
def test_images_that_do_not(name: str) -> None:
    def apply_fn(p, h):
        return MIXING[name](h)

    with jax.numpy_rank_promotion("allow"):
        assert not stay_apart(apply_fn, {})
        assert reason(apply_fn, {})


@pytest.mark.parametrize("layer", [*Builder.APART, *Builder.COUPLED], ids=lambda f: f.__name__)
def test_random_layers(layer) -> None:
    known = {"loop_of_each_image"}  # under vmap it ends when all images are done
    for seed in range(8):
        builder = Builder(seed)
        apply_fn = layer(builder)
        apart, said = stay_apart(apply_fn, builder.params), reason(apply_fn, builder.params)
        assert apart or said, seed
        if layer in Builder.APART and layer.__name__ not in known:
            assert not said or "inner" in layer.__name__ or "shortcut" in layer.__name__, said


@pytest.mark.parametrize("seed", range(0, 40))
def test_random_networks_are_never_said_apart_when_they_are_not(seed: int) -> None:
    apply_fn, params, _ = random_network(seed)
    assert reason(apply_fn, params) or stay_apart(apply_fn, params)
