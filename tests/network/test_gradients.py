"""Derivatives that users define stay in transformed networks: those of the plain ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfi
from jaxfi.network import inject_neurons, neuron_outputs, with_arithmetic, with_neuron_words

RANDOM = np.random.default_rng(0)
PARAMS = {
    "first": {"w": RANDOM.normal(size=(5, 6)).astype(np.float32)},
    "second": {"w": RANDOM.normal(size=(6, 3)).astype(np.float32)},
    "scale": np.ones(6, np.float32),
}
X = np.round(RANDOM.normal(size=(4, 5))).astype(np.float32)
PARAMS["first"]["w"][:, 0] = 0  # at whose outputs relu's derivative is 0, that of max .5


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_jvp
def scaled(x, scale):
    return x * scale


scaled.defjvp(
    lambda primals, tangents: (primals[0] * primals[1], 2 * tangents[0] + 3 * tangents[1])
)


def straight_through(params, x):
    h = rounded(x @ rounded(2 * params["first"]["w"]))
    return jax.jit(rounded)(h) @ params["second"]["w"] * params["scale"][:3]


def relu(params, x):
    return jax.nn.relu(x @ params["first"]["w"]) @ params["second"]["w"] * params["scale"][:3]


def in_loop(params, x):
    h, _ = lax.scan(lambda h, _: (rounded(h), None), x @ params["first"]["w"], None, length=2)
    return h @ params["second"]["w"] * params["scale"][:3]


def softmax(params, x):
    h = jax.nn.softmax(jax.nn.silu(x @ params["first"]["w"]))
    return jax.nn.logsumexp(h[:, :, None] * params["second"]["w"], axis=1) * params["scale"][:3]


def transformed(apply_fn):
    neurons = neuron_outputs(apply_fn, PARAMS, X)
    nothing = jaxfi.sample_faults(0, neurons, 1, model="bit-flip").fault(0)
    nothing = jax.tree.map(jnp.zeros_like, nothing)._replace(keep=~jnp.zeros_like(nothing.keep))
    words, tree = with_neuron_words(apply_fn, PARAMS, neurons)
    return {
        "inject_neurons": inject_neurons(apply_fn, neurons, nothing),
        "with_neuron_words": lambda p, x: words({**tree, "params": p}, x),
        "with_arithmetic": with_arithmetic(apply_fn, {"*": "float32"}),
    }


@pytest.mark.parametrize("way", ["inject_neurons", "with_neuron_words", "with_arithmetic"])
@pytest.mark.parametrize("apply_fn", [straight_through, relu, in_loop, softmax])
def test_derivatives_are_the_networks(apply_fn, way) -> None:
    with jax.numpy_rank_promotion("allow"):
        changed = transformed(apply_fn)[way]

        def gradient(function):
            return jax.grad(lambda p: (function(p, X) ** 2).sum())(PARAMS)

        expected, found = gradient(apply_fn), gradient(changed)
        assert np.abs(expected["first"]["w"]).max() > 0
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_where_parameters_meet_the_images_a_layer_keeps_its_name() -> None:
    def apply_fn(params, x):
        return scaled(x @ params["first"]["w"], params["scale"]) @ params["second"]["w"]

    with jax.numpy_rank_promotion("allow"):
        assert [*neuron_outputs(apply_fn, PARAMS, X)] == ["first", "scale", "second"]
