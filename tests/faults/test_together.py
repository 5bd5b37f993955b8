"""Several faults together, gradients through faults, keys: against Python's own words and loops."""

from __future__ import annotations

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxfi
from jaxfi import FaultList
from jaxfi.faults import Fault

PARAMS = {"a": np.float32([[1.5, -2.0, 0.25], [3.0, 0.0, 8.0]]), "b": np.int8([5, -7])}


def one_after_the_other(params: dict, faults: FaultList) -> dict:
    """The oracle: each fault in list order, on bytes."""
    leaves = {path: bytearray(np.asarray(params[path]).tobytes()) for path in params}
    for row in range(len(faults)):
        path = faults.paths[faults.leaf[row]]
        size = np.asarray(params[path]).itemsize
        start = int(faults.element[row]) * size
        word = int.from_bytes(leaves[path][start : start + size], "little")
        model, bit = int(faults.model[row]), max(int(faults.bit[row]), 0)
        name = jaxfi.FAULT_MODELS[model]
        if name == "bit-flip":
            word ^= 1 << bit
        elif name == "stuck-at-0":
            word &= ~(1 << bit)
        elif name == "stuck-at-1":
            word |= 1 << bit
        elif name == "zero":
            word = 0
        elif name == "value":
            value = float(faults.value[row])
            packed = struct.pack("<f", value) if size == 4 else struct.pack("<b", int(value))
            word = int.from_bytes(packed, "little")
        leaves[path][start : start + size] = word.to_bytes(size, "little")
    return leaves


@st.composite
def fault_lists(draw) -> FaultList:
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        leaf = draw(st.integers(0, 1))
        model = draw(st.integers(0, 5))
        bit = draw(st.integers(0, 7 if leaf else 31)) if model < 3 else -1
        value = float(draw(st.integers(-100, 100))) if model == 4 else np.nan
        rows.append((leaf, draw(st.integers(0, 1 if leaf else 2)), bit, model, value))
    return FaultList.from_arrays(PARAMS, *zip(*rows, strict=True))


injected = jax.jit(jaxfi.inject)


@given(fault_lists())
@settings(max_examples=60, deadline=None)
def test_all_faults_of_an_element_arrive_in_their_order(faults) -> None:
    faulty = injected(PARAMS, faults.padded(12).batch())  # of one length: compiled once
    expected = one_after_the_other(PARAMS, faults)
    for path, leaf in faulty.items():
        assert np.asarray(leaf).tobytes() == bytes(expected[path])


def test_a_hundred_random_flips_flip_a_hundred_bits() -> None:
    sites = np.random.default_rng(0).permutation(6 * 32)[:100]
    faults = FaultList.from_arrays(PARAMS, 0, sites // 32, sites % 32, "bit-flip")
    faulty = np.asarray(jax.jit(jaxfi.inject)(PARAMS, faults.batch())["a"])
    flipped = faulty.view(np.uint32) ^ PARAMS["a"].view(np.uint32)
    assert sum(int(word).bit_count() for word in flipped.reshape(-1)) == 100


def test_together_under_vmap_and_with_places_past_the_end() -> None:
    element = jnp.array([[0, 0, 6], [6, 6, 6], [2, 1, 2]])
    keep = jnp.full((3, 3), 2**32 - 1, jnp.uint32)
    flip = jnp.uint32([[1, 2, 4], [1, 2, 4], [8, 16, 8]])
    flips = jax.vmap(lambda *fault: jaxfi.corrupt(jnp.asarray(PARAMS["a"]), *fault))
    words = np.asarray(flips(element, keep, flip)).view(np.uint32).reshape(3, 6)
    changed = words ^ PARAMS["a"].view(np.uint32).reshape(1, 6)
    assert changed.tolist() == [[3, 0, 0, 0, 0, 0], [0] * 6, [0, 16, 0, 0, 0, 0]]


def test_one_fault_is_the_program_it_was() -> None:
    """A scalar fault needs no sorting."""
    fault = Fault(jnp.int32(0), jnp.int32(1), jnp.uint32(1), jnp.uint32(0))
    text = jax.jit(jaxfi.inject).lower(PARAMS, fault).as_text()
    assert "stablehlo.sort" not in text


def test_cumulative_accuracy_with_two_faults_in_one_element() -> None:
    params = {"w": np.eye(2, dtype=np.float32) * 1.5}
    both = FaultList.from_sites([("w", (0, 0), 30), ("w", (0, 0), 30)], params)
    images = np.float32([[1, 0.5], [0.1, 1]])
    result = jaxfi.cumulative_accuracy(
        lambda p, x: x @ p["w"], params, [both], images, [0, 1], [0, 1, 2]
    )
    assert result.accuracy.tolist() == [[1.0, 0.0, 1.0]]  # NaN, and the second undoes the first


# Gradients


def loss(params: dict, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ params["w"]) ** 2) + jnp.sum(params["v"] ** 3)


WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))
TREE = {"v": jnp.float32([0.5, -0.3]), "w": jnp.asarray(WEIGHTS, jnp.float32)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
HIT = FaultList.from_sites([("w", (1, 2), 31), ("v", 1, 22)], TREE).batch()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_gradients_away_from_the_fault_are_finite_differences(wrap) -> None:
    faulty = wrap(lambda tree: loss(jaxfi.inject(tree, HIT), X))
    gradient = jax.grad(faulty)(TREE)
    for name, place in (("w", (0, 0)), ("w", (1, 1)), ("w", (3, 2)), ("v", (0,))):
        step = 1e-2
        up, down = ({**TREE, name: TREE[name].at[place].add(s)} for s in (step, -step))
        expected = (faulty(up) - faulty(down)) / (2 * step)
        assert float(gradient[name][place]) == pytest.approx(float(expected), rel=2e-2, abs=2e-3)
    assert gradient["w"][1, 2] == gradient["v"][1] == 0


def test_the_hit_elements_gradient_on_request() -> None:
    through = jax.grad(lambda t: loss(jaxfi.inject(t, HIT, hit_gradient="straight-through"), X))
    there = jax.grad(lambda t: loss(t, X))(jaxfi.inject(TREE, HIT))
    for name in TREE:
        np.testing.assert_allclose(through(TREE)[name], there[name], rtol=1e-6)
    with pytest.raises(ValueError, match="unknown hit_gradient 'one': allowed are zero, straight"):
        jaxfi.inject(TREE, HIT, hit_gradient="one")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_forward_and_reverse_and_twice(dtype) -> None:
    w = jnp.asarray([1.5, 2.0, 3.0], dtype)

    def f(w):
        return jnp.sum(jaxfi.corrupt(w, 1, jnp.uint32(0xFFFF_FFFF), jnp.uint32(1)) ** 2)

    assert jax.grad(f)(w).tolist() == [3.0, 0.0, 6.0]
    assert jax.jacfwd(f)(w).tolist() == [3.0, 0.0, 6.0]
    assert np.asarray(jax.hessian(f)(w)).tolist() == [[2, 0, 0], [0, 0, 0], [0, 0, 2]]


def test_integer_leaves_do_not_stop_gradients() -> None:
    tree = {"w": jnp.ones(3), "n": jnp.arange(3, dtype=jnp.int8)}
    faults = FaultList.from_sites([("n", 1, 0), ("w", 2, 31)], tree).batch()
    gradient = jax.grad(lambda w: jnp.sum(jaxfi.inject({**tree, "w": w}, faults)["w"]))(tree["w"])
    assert gradient.tolist() == [1, 1, 0]


def test_gradients_through_neurons() -> None:
    tree = {"w": TREE["w"]}
    neurons = jaxfi.neuron_outputs(lambda p, x: x @ p["w"], tree, X)
    faults = FaultList.from_sites([("w", 1, 31)], neurons)
    faulty = jaxfi.inject_neurons(lambda p, x: x @ p["w"], neurons, faults.fault(0))
    gradient = jax.grad(lambda p: jnp.sum(faulty(p, X)))(tree)["w"]
    column = np.asarray(X).sum(axis=0)
    np.testing.assert_allclose(gradient, np.stack([column, 0 * column, column], axis=1), rtol=1e-5)
    words_fn, words = jaxfi.with_neuron_words(lambda p, x: x @ p["w"], tree, neurons)
    placed = jaxfi.neuron_faults(faults, words)
    gradient = jax.grad(
        lambda p: jnp.sum(words_fn(jaxfi.inject({**words, "params": p}, placed.fault(0)), X))
    )(tree)["w"]
    np.testing.assert_allclose(gradient, np.stack([column, 0 * column, column], axis=1), rtol=1e-5)


def test_a_network_learns_with_a_fault_in_it() -> None:
    params, target = {"w": jnp.zeros((4, 3))}, jnp.asarray(np.eye(3)[[0, 1, 2, 0, 1]])
    stuck = FaultList.from_sites([("w", (0, 0), None)], params, model="value", value=0.5).fault(0)

    @jax.jit
    def step(params):
        def error(params):
            return jnp.mean((X @ jaxfi.inject(params, stuck)["w"] - target) ** 2)

        value, gradient = jax.value_and_grad(error)(params)
        return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

    errors = []
    for _ in range(200):
        value, params = step(params)
        errors.append(float(value))
    assert errors[-1] < 0.6 * errors[0]
    assert params["w"][0, 0] == 0


# Keys


@pytest.mark.parametrize("key", [-1, 2**64, True, 1.0, "0", None])
def test_keys_that_are_none(key) -> None:
    for draw in (
        lambda: jaxfi.sample_faults(key, PARAMS, 3),
        lambda: jaxfi.draw_trials(key, PARAMS, 3, 1),
        lambda: jaxfi.run_stratified(lambda p, x: x, TREE, X, np.zeros(5, int), key=key),
    ):
        with pytest.raises((ValueError, TypeError), match="^key .*allowed are"):
            draw()


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("x64", [False, True])
def test_draws_do_not_depend_on_the_session(implementation: str, x64: bool) -> None:
    expected = {key: jaxfi.draw_trials(key, PARAMS, 5, 2) for key in (1, 2**32 + 1, 2**63)}
    assert expected[1] != expected[2**32 + 1]
    with jax.default_prng_impl(implementation), jax.enable_x64(x64):
        for key, trials in expected.items():
            assert jaxfi.draw_trials(key, PARAMS, 5, 2) == trials
            assert jaxfi.draw_trials(np.uint64(key), PARAMS, 5, 2) == trials


def test_several_keys_are_refused() -> None:
    for keys in (jax.random.split(jax.random.key(0), 3), jnp.ones(3), jnp.int32(0)):
        with pytest.raises(TypeError, match="allowed are an integer and one random key"):
            jaxfi.sample_faults(keys, PARAMS, 3)


def test_elements_of_several_faults_count_from_the_end_as_pythons_do() -> None:
    stored = np.float32([1, 2, 3, 4])
    sign = jnp.full(2, 1 << 31, jnp.uint32)
    faulty = jaxfi.corrupt(stored, jnp.array([-1, 0]), ~jnp.zeros(2, jnp.uint32), sign)
    np.testing.assert_array_equal(faulty, np.float32([-1, 2, 3, -4]))
