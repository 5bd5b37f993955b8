"""Random networks: the fast engine equals the reference engine, outcome for outcome."""

from __future__ import annotations

import numpy as np
import pytest

from jaxfi.campaign import run_campaign
from tests.engine.random_networks import random_network
from tests.engine.test_conformance import faults_in_every_leaf


def assert_random_network(seed: int) -> None:
    apply_fn, params, shape = random_network(seed)
    generator = np.random.default_rng(seed)
    images = generator.normal(size=(12, *shape)).astype(np.float32)
    labels, batch_size = generator.integers(0, 4, 12), int(generator.choice([1, 2, 4, 4, 12]))
    faults = faults_in_every_leaf(params, seed)
    fast, reference = (
        run_campaign(apply_fn, params, faults, images, labels, engine=e, batch_size=batch_size)
        for e in ("fast", "reference")
    )
    for name in ("outcomes", "due", "correct"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(reference, name), err_msg=name)


@pytest.mark.filterwarnings("ignore:the fault-free network's outputs hold NaN")
@pytest.mark.filterwarnings("ignore:the output does not depend on")
@pytest.mark.parametrize("seed", range(24))
def test_fast_equals_reference_on_random_networks(seed: int) -> None:
    assert_random_network(seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fault-free network's outputs hold NaN")
@pytest.mark.filterwarnings("ignore:the output does not depend on")
@pytest.mark.parametrize("first", range(24, 2024, 50))
def test_fast_equals_reference_on_2000_random_networks(first: int) -> None:
    for seed in range(first, first + 50):
        assert_random_network(seed)
