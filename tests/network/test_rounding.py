"""Every operation rounds by itself: programs against NumPy, and against single operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfi
from jaxfi.engine import compiled
from jaxfi.engine._compilation import own_settings
from jaxfi.engine._golden import network_function
from jaxfi.network import trace_network
from jaxfi.network._rounding import rounded

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(64, 8)).astype(np.float32)
SMALL = {
    name: RANDOM.normal(size=shape).astype(np.float32)
    for name, shape in {"w": (8, 16), "b": (16,), "one": (1, 16), "k": (1, 1, 1, 3)}.items()
}
HUGE = {
    name: (value * np.exp(20 * RANDOM.normal(size=value.shape))).astype(np.float32)
    for name, value in SMALL.items()
}
C, D = np.float32(0.408), np.float32(1.7)


def scores(p, x):
    return x @ p["w"]


def in_scan(p, x):
    return lax.scan(lambda h, _: (jax.nn.softmax(h * C) * h + p["b"], None), scores(p, x), None, 3)


def in_while(p, x):
    def body(state):
        return state[0] + 1, state[1] * p["b"] + state[1] * C

    return lax.while_loop(lambda state: state[0] < 3, body, (0, scores(p, x)))[1]


def in_branches(p, x):
    branches = [lambda h: jnp.log(jnp.exp(h)), lambda h: h * C * D + p["b"]]
    return lax.cond(p["b"][0] > 0, *branches, scores(p, x))


def attention(p, x):
    h = scores(p, x).reshape(8, 8, 16)
    s = jnp.einsum("bqd,bkd->bqk", h, h) * C
    s = jnp.where(jnp.tril(jnp.ones((8, 8))) > 0, s, -jnp.inf)
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(s), h * D).reshape(64, 16)


def depthwise(p, x):
    images = jnp.broadcast_to(x[:, :4].reshape(64, 2, 2, 1), (64, 2, 2, 3))
    numbers = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(
        images, p["k"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3
    )
    return (h + p["b"][:3]).reshape(64, -1)


def batch_norm(p, x):
    scale = lax.rsqrt(p["b"] ** 2 + np.float32(1e-5)) * p["b"]
    return jax.nn.relu((scores(p, x) - p["b"]) * scale + p["b"])


def exponentials(p, x):
    h = scores(p, x)
    return jnp.exp(h) * jnp.exp(-h * C) + h / jnp.exp(h)


def powers(p, x):
    h = jnp.abs(scores(p, x))
    return (h**C) ** D + jnp.log(h**C) + jnp.sqrt(h) * jnp.sqrt(h)


def moved(p, x):
    h = scores(p, x)
    return jnp.take(h * p["b"], np.array([3, 1, 2]), axis=1)[:, ::-1] + -(h * C)[:, :3]


NETWORKS = {
    "softmax": lambda p, x: jax.nn.softmax(scores(p, x) * C),
    "softmax of a quotient": lambda p, x: jax.nn.softmax(scores(p, x) / D),
    "logsumexp": lambda p, x: scores(p, x) - jax.nn.logsumexp(scores(p, x) * C, -1, keepdims=True),
    "log of exp": lambda p, x: jnp.log(jnp.exp(scores(p, x))),
    "two factors": lambda p, x: scores(p, x) * C * D,
    "two divisors": lambda p, x: scores(p, x) / C / p["b"] / D,
    "two summands": lambda p, x: scores(p, x) + np.float32(1e5) + C - np.float32(1e5),
    "one product": lambda p, x: x[:, :1] @ p["one"] + p["b"],
    "depthwise": depthwise,
    "batch norm": batch_norm,
    "norm": lambda p, x: scores(p, x) / jnp.linalg.norm(scores(p, x), axis=1, keepdims=True),
    "exponentials": exponentials,
    "powers": powers,
    "moved": moved,
    "gelu": lambda p, x: jax.nn.gelu(scores(p, x)),
    "erf gelu": lambda p, x: jax.nn.gelu(scores(p, x), approximate=False),
    "silu": lambda p, x: jax.nn.silu(scores(p, x) * C) * scores(p, x) + p["b"],
    "softplus": lambda p, x: jax.nn.softplus(scores(p, x) * C) * p["b"] + p["b"],
    "tanh": lambda p, x: jnp.tanh(scores(p, x) * p["b"]) * p["b"] + 1,
    "attention": attention,
    "scan": lambda p, x: in_scan(p, x)[0],
    "while": in_while,
    "branches": in_branches,
    "map": lambda p, x: lax.map(lambda row: jax.nn.softmax((row @ p["w"]) * C), x),
    "float16": lambda p, x: jax.nn.softmax(scores(p, x).astype(jnp.float16) * jnp.float16(0.41)),
    "bfloat16": lambda p, x: (scores(p, x).astype(jnp.bfloat16) * jnp.bfloat16(0.41) + 1) * 3,
}


def words(array) -> np.ndarray:
    """Bits, NaN of any payload as one."""
    array = np.asarray(array)
    return np.where(np.isnan(array), -1, array.view(f"i{array.dtype.itemsize}").astype(np.int64))


@pytest.mark.parametrize("params", [SMALL, HUGE], ids=["small", "huge"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_is_its_operations(name, params, monkeypatch) -> None:
    """The oracle: JAX one operation after the other, without jit, loops in Python; divisions by
    NumPy, since XLA divides by a broadcast value as it multiplies with its reciprocal."""
    with own_settings():
        network = trace_network(NETWORKS[name], params, jax.ShapeDtypeStruct(X.shape, X.dtype))
        program = compiled(network_function(network))(params, X)
        monkeypatch.setattr(lax.div_p, "impl", lambda x, y: jnp.asarray(np.divide(x, y)))
        with jax.disable_jit(), np.errstate(all="ignore"):
            one_by_one = NETWORKS[name](jax.tree.map(jnp.asarray, params), jnp.asarray(X))
    np.testing.assert_array_equal(words(program), words(one_by_one))


def test_products_and_sums_are_numpys() -> None:
    def function(p, x):
        h = x * p["b"][None, :8]
        return (h + p["b"][8:]) * C * D - h / D

    with own_settings():
        network = trace_network(function, SMALL, jax.ShapeDtypeStruct(X.shape, X.dtype))
        found = compiled(network_function(network))(SMALL, X)
    h = X * SMALL["b"][:8]
    expected = (h + SMALL["b"][8:]) * C * D - h / D
    np.testing.assert_array_equal(words(found), words(expected))


@pytest.mark.parametrize(
    "dtype",
    [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.float8_e4m3fn, jnp.float8_e5m2],
)
def test_rounded_moves_no_bit(dtype) -> None:
    with jax.enable_x64(True):
        size = jnp.dtype(dtype).itemsize
        every = np.arange(2**16, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        values = jnp.asarray(every.astype(f"u{size}").view(jnp.dtype(dtype)))
        for function in (rounded, jax.jit(rounded)):
            found = np.asarray(function(values)).view(f"u{size}")
            np.testing.assert_array_equal(found, every.astype(f"u{size}"))


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
def test_softmax_in_a_loop_has_numpys_dues(engine) -> None:
    weights = {"w": RANDOM.normal(size=(6, 6)).astype(np.float32) * 0.5}
    images = RANDOM.normal(size=(8, 6)).astype(np.float32)
    faults = jaxfi.exhaustive_faults(weights, bits=[29, 30])

    def in_loop(p, x):
        return lax.scan(lambda h, _: (jax.nn.softmax(h * C), None), x @ p["w"], None, length=1)[0]

    def due(w):
        with np.errstate(all="ignore"):
            scaled = sum(images[:, k : k + 1] * w[k] for k in range(6)) * C
            shifted = np.exp(scaled - scaled.max(-1, keepdims=True))
            return ~np.isfinite(shifted / shifted.sum(-1, keepdims=True)).all(-1)

    expected = [
        due(np.asarray(jaxfi.inject(weights, faults.fault(n))["w"])) for n in range(len(faults))
    ]
    campaign = jaxfi.run_campaign(in_loop, weights, faults, images, np.zeros(8, int), engine=engine)
    np.testing.assert_array_equal(campaign.due, expected)


def test_a_scalar_or_constant_is_divided_truly() -> None:
    """Not multiplied by a reciprocal that the compiler knows or shares."""
    x, several = RANDOM.uniform(0.1, 9, (4, 8)).astype(np.float32), np.float32([[3, 5, 7]])

    def quotients(p, x):
        whole = x[:, :1]
        same = jnp.broadcast_to(whole, (4, 2))
        parts = [p["b"][0] / whole, np.float32(3) / whole, several / whole, 3 / same]
        return jnp.concatenate(
            [*parts, jnp.exp(several) / whole, jnp.exp(several) / p["b"][0] + 0 * x[:, :3]], 1
        )

    network = trace_network(quotients, SMALL, jax.ShapeDtypeStruct(x.shape, x.dtype))
    found = compiled(network_function(network))(SMALL, x)
    whole = x[:, :1]
    first, more = SMALL["b"][0], np.asarray(compiled(jnp.exp)(several))
    expected = [first / whole, 3 / whole, several / whole, 3 / whole, 3 / whole, more / whole]
    expected.append(np.broadcast_to(more / first, (4, 3)))
    np.testing.assert_array_equal(words(found), words(np.concatenate(expected, 1)))


def test_a_constant_matmul_over_what_was_joined_is_one_sum() -> None:
    constant = RANDOM.normal(size=(16, 3)).astype(np.float32)

    def both(p, x):
        return jnp.concatenate([x, x * p["b"][None, :8]], 1) @ constant

    x = RANDOM.normal(size=(4, 8)).astype(np.float32)
    network = trace_network(both, SMALL, jax.ShapeDtypeStruct(x.shape, x.dtype))
    joined = np.concatenate([x, x * np.asarray(SMALL["b"])[None, :8]], 1)
    expected = compiled(jnp.matmul)(joined, constant)
    found = compiled(network_function(network))(SMALL, x)
    np.testing.assert_array_equal(words(found), words(expected))
