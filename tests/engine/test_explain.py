"""What a campaign will do and need, against operations counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfi
from jaxfi import FaultList

PARAMS = {"a": np.ones((16, 8), np.float32), "b": np.ones((8, 4), np.float32)}
IMAGES = jax.ShapeDtypeStruct((250, 16), np.float32)


def two_layers(params, images):
    return jnp.maximum(images @ params["a"], 0) @ params["b"]


def test_shares_of_arithmetic_are_those_counted_by_hand():
    # Multiply-adds an image: 16·8 and 8·4, 160 in all. One column of a is 16 of them, and needs b
    # behind it; one column of b is 8, and is the output.
    of_a, of_b = jaxfi.explain(two_layers, PARAMS, IMAGES)
    assert (of_a.path, of_a.method, of_a.reason) == ("a", "columns", "")
    assert (of_a.columns, of_a.suffix) == pytest.approx((16 / 160, 32 / 160))
    assert of_a.saving == pytest.approx(160 / 48)
    assert (of_b.path, of_b.method) == ("b", "columns")
    assert (of_b.columns, of_b.suffix) == pytest.approx((8 / 160, 0))


def test_faults_are_counted_in_their_leaves_and_shapes_are_enough():
    sites = [("a", (0, 0), 31), ("b", (1, 1), 0), ("b", (2, 2), 5)]
    faults = FaultList.from_sites(sites, PARAMS)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    costs = jaxfi.explain(two_layers, shapes, IMAGES, faults)
    assert [cost.num_faults for cost in costs] == [1, 2]


def test_leaf_that_is_not_read_is_unreached():
    params = {**PARAMS, "c": np.ones(3, np.float32)}
    cost = jaxfi.explain(two_layers, params, IMAGES)[2]
    assert (cost.path, cost.method, cost.columns, cost.suffix) == ("c", "unreached", 0, 0)


@pytest.mark.parametrize(
    ("function", "settings", "error", "message"),
    [
        (two_layers, {"batch_size": 0}, ValueError, "batch_size 0 is out of range"),
        (two_layers, {"batch_size": 2.5}, TypeError, "batch_size"),
        (two_layers, {"faults": "of others"}, ValueError, "the fault list is for other parameters"),
        (lambda p, x: two_layers(p, x)[0], {}, ValueError, "allowed are arrays whose first axis"),
        (two_layers, {"precision": "tf32"}, ValueError, "unknown precision 'tf32'"),
    ],
)
def test_bad_arguments_are_named(function, settings, error, message):
    if "faults" in settings:
        others = {"w": np.ones(2, np.float32)}
        settings = {"faults": FaultList.from_sites([("w", (0,), 0)], others)}
    with pytest.raises(error, match=message):
        jaxfi.explain(function, PARAMS, IMAGES, **settings)
