"""Loops that data may keep from ending: counted and limited, against Python's own loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfi import FaultList, run_campaign
from jaxfi.network import trace_network
from jaxfi.network._loops import has_open_loop, most_turns, with_loop_limit

PARAMS = {"a": np.ones((2, 2), np.float32), "n": np.int32(3)}
IMAGES = np.array([[1, 2], [8, 8.5], [0.1, 0.1], [3, 1]], np.float32)


def halved(p, x):
    return lax.while_loop(lambda h: jnp.abs(h).max() > 1, lambda h: h * 0.5, x @ p["a"])


def halved_by_python(x) -> tuple[np.ndarray, int]:
    h, turns = x @ PARAMS["a"], 0
    while np.abs(h).max() > 1:
        h, turns = h * np.float32(0.5), turns + 1
    return h, turns


def in_scan(p, x):
    return lax.scan(lambda h, _: (halved(p, h + x), h.sum()), x, None, length=2)[0]


def in_branch(p, x):
    return lax.cond(x.sum() > 0, lambda x: halved(p, x), lambda x: x, x)


def in_call(p, x):
    return jax.jit(halved)(p, x) + 1


def in_loop(p, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, halved(p, s[1])), (0, x))[1]


def of_each_image(p, x):
    return jax.vmap(lambda row: halved(p, row[None])[0])(x)


def counted(p, x):
    return lax.fori_loop(0, 5, lambda n, h: h * 0.5, x @ p["a"])


def counted_by_parameter(p, x):
    return lax.fori_loop(0, p["n"], lambda n, h: h * 0.5, x @ p["a"])


OPEN = [halved, in_scan, in_branch, in_call, in_loop, of_each_image, counted_by_parameter]


@pytest.mark.parametrize("apply_fn", OPEN)
def test_open_loops_are_found_and_kept_to_the_bit(apply_fn) -> None:
    assert has_open_loop(trace_network(apply_fn, PARAMS, IMAGES))
    limited = jax.jit(with_loop_limit(apply_fn, 1000))(PARAMS, IMAGES)
    np.testing.assert_array_equal(limited, jax.jit(apply_fn)(PARAMS, IMAGES))


def test_a_loop_that_counts_is_not_open() -> None:
    assert not has_open_loop(trace_network(counted, PARAMS, IMAGES))


def test_turns_are_those_of_a_loop_in_python() -> None:
    expected, turns = halved_by_python(IMAGES)
    assert int(most_turns(halved)(PARAMS, IMAGES)) == turns
    np.testing.assert_array_equal(halved(PARAMS, IMAGES), expected)
    assert int(most_turns(counted_by_parameter)(PARAMS, IMAGES)) == 3


@pytest.mark.parametrize("apply_fn", OPEN[:-1])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_an_endless_loop_ends_in_nan(apply_fn, value) -> None:
    params = {**PARAMS, "a": np.full((2, 2), value, np.float32)}
    outputs = jax.jit(with_loop_limit(apply_fn, 50))(params, IMAGES)
    if np.isnan(value):  # no comparison with NaN holds: the loop ends at once
        assert np.isnan(outputs).all()
    else:
        assert np.isnan(outputs).all()
        assert int(jax.jit(most_turns(halved))(PARAMS, IMAGES)) < 50


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
def test_a_hang_is_a_due(engine: str) -> None:
    faults = FaultList.from_sites([("a", (0, 0), 30), ("a", (0, 0), 0)], PARAMS)  # 1.0 -> inf
    images, labels = IMAGES[:, :2], np.zeros(4, int)
    campaign = run_campaign(
        lambda p, x: halved(p, x) + 0 * p["n"].astype(x.dtype), PARAMS, faults, images, labels,
        engine=engine, batch_size=4,
    )  # fmt: skip
    assert campaign.due[0].all()
    assert not campaign.due[1].any()


def test_a_number_of_turns_that_a_fault_makes_huge_ends() -> None:
    faults = FaultList.from_sites([("n", (), 30)], PARAMS)  # 3 -> 1,073,741,827 turns
    campaign = run_campaign(counted_by_parameter, PARAMS, faults, IMAGES, np.zeros(4, int))
    assert campaign.due.all()


def test_limits_that_do_not_fit() -> None:
    faults = FaultList.from_sites([("a", (0, 0), 0)], PARAMS)
    arguments = (halved, {"a": PARAMS["a"]}, faults[:0], IMAGES, np.zeros(4, int))
    faults = FaultList.from_sites([("a", (0, 0), 0)], arguments[1])
    for limit, match in ((1, "loop_limit 1 is too small: .* takes 5 turns"), (0, "out of range")):
        with pytest.raises(ValueError, match=match):
            run_campaign(*arguments[:2], faults, *arguments[3:], loop_limit=limit)
