"""A campaign of a network that had one compiles nothing; one of another network does not share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfi
from jaxfi.engine import _kept
from jaxfi.network import trace_network
from jaxfi.network._graph import digest
from tests.conformance_models import batch_coupled, plain_conv, wide_layers
from tests.engine.test_conformance import faults_in_every_leaf

RANDOM = np.random.default_rng(0)
_COUNT = [0]
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: event.endswith("backend_compile_duration") and _COUNT.append(1)
)


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    before, found = len(_COUNT), []
    yield found
    found.append(len(_COUNT) - before)


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
@pytest.mark.parametrize("model", [plain_conv, wide_layers, batch_coupled])
def test_other_weights_and_faults_compile_nothing(model, engine) -> None:
    apply_fn, params, shape = model()
    images = RANDOM.normal(size=(20, *shape)).astype(np.float32)
    labels = np.zeros(20, int)
    faults = faults_in_every_leaf(params)
    jaxfi.run_campaign(apply_fn, params, faults, images, labels, engine=engine, batch_size=5)
    others = jax.tree.map(lambda leaf: leaf * np.float32(1.25), params)
    again = faults[::-1]
    with compilations() as counted:
        found = jaxfi.run_campaign(
            lambda p, x: apply_fn(p, x), others, again, images, labels, engine=engine, batch_size=5
        )
    assert counted == [0]
    _kept._KEPT.clear()
    fresh = jaxfi.run_campaign(apply_fn, others, again, images, labels, engine=engine, batch_size=5)
    np.testing.assert_array_equal(found.outcomes, fresh.outcomes)
    np.testing.assert_array_equal(found.golden, fresh.golden)


def test_counting_accuracy_compiles_nothing_again() -> None:
    apply_fn, params, shape = plain_conv()
    images = RANDOM.normal(size=(20, *shape)).astype(np.float32)
    trials = jaxfi.draw_trials(0, params, 4, 2)
    arguments = (trials, images, np.zeros(20, int), [0, 2, 4])
    jaxfi.cumulative_accuracy(apply_fn, params, *arguments, batch_size=5)
    with compilations() as counted:
        jaxfi.cumulative_accuracy(lambda p, x: apply_fn(p, x), params, *arguments, batch_size=5)
    assert counted == [0]


def in_scan(scale):
    def apply_fn(p, x):
        double = jax.jit(lambda h: h * scale)
        return lax.scan(lambda h, _: (double(h), None), x @ p["w"], None, length=2)[0]

    return apply_fn


def by_callback(scale):
    def apply_fn(p, x):
        h = x @ p["w"]
        shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
        return jax.pure_callback(lambda h: np.asarray(h) * scale, shape, h)

    return apply_fn


def by_constant(scale):
    return lambda p, x: x @ p["w"] * scale


@pytest.mark.parametrize("network", [in_scan, by_callback, by_constant])
def test_another_network_does_not_get_these_programs(network) -> None:
    params = {"w": RANDOM.normal(size=(4, 3)).astype(np.float32)}
    images = RANDOM.normal(size=(6, 4)).astype(np.float32)
    faults = jaxfi.sample_faults(0, params, 5)
    for factor in (1.0, 2.0, -3.0):
        scale = np.array([[1, 1, factor]], np.float32)
        campaign = jaxfi.run_campaign(
            network(scale), params, faults, images, np.zeros(6, int), engine="reference"
        )
        expected = np.asarray(network(scale)(params, jnp.asarray(images)))
        np.testing.assert_allclose(campaign.golden, expected, rtol=1e-6)


def test_the_digest_sees_what_inner_programs_close_over() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((4, 3), np.float32)}
    images = jax.ShapeDtypeStruct((6, 4), np.float32)
    digests = {
        digest(trace_network(in_scan(np.array([[1, 1, factor]], np.float32)), shapes, images))
        for factor in (1, 2, 2)
    }
    assert len(digests) == 2


def test_few_networks_are_kept() -> None:
    params = {"w": np.eye(3, dtype=np.float32)}
    faults = jaxfi.sample_faults(0, params, 2)
    for factor in range(1, 8):
        jaxfi.run_campaign(
            lambda p, x, factor=factor: x @ p["w"] * factor, params, faults,
            np.ones((2, 3), np.float32), [0, 0],
        )  # fmt: skip
    assert len(_kept._KEPT) == 4
