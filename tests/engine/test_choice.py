"""Which leaves are worth compiling for."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxfi import run_campaign, sample_faults
from jaxfi.campaign import _run
from jaxfi.engine._choice import chosen_plans, plan_text, seconds_to_compile, seconds_to_run
from jaxfi.engine._explain import leaf_costs
from jaxfi.engine._golden import GoldenRun
from jaxfi.engine._plan import plan_leaves
from jaxfi.network import trace_network
from tests.conformance_models import plain_conv, vision_transformer
from tests.engine.test_conformance import faults_in_every_leaf
from tests.engine.test_engine import data

IMAGE, COMPILING = 1e-3, 0.2  # seconds


def ways(num_faults: int, num_batches: int = 10, compiling: float = COMPILING, programs=None):
    """Of each leaf with so many faults, how it runs."""
    apply_fn, params, shape = plain_conv()
    batch = jax.ShapeDtypeStruct((100, *shape), np.float32)
    network = trace_network(apply_fn, params, batch)
    leaves = np.repeat(np.arange(len(network.leaves)), num_faults)
    plans = plan_leaves(network, np.unique(leaves).tolist())
    costs = leaf_costs(network, plans.values(), np.bincount(leaves))
    golden = GoldenRun(np.zeros((1, 2)), IMAGE, compiling)
    programs = {} if programs is None else programs
    found = chosen_plans(
        network, plans, costs, programs, golden, 100, num_batches, 100 * num_batches
    )
    return {plan.method for plan in found.values()}, found, network


def test_few_faults_rerun_and_many_are_divided() -> None:
    assert ways(1, num_batches=1)[0] == {"whole"}
    assert ways(500)[0] == {"columns"}
    _, found, _ = ways(1, num_batches=1)
    assert "few faults" in next(iter(found.values())).reason


def test_compilation_is_predicted_for_what_is_divided() -> None:
    _, many, network = ways(500)
    _, few, another = ways(1, num_batches=1)
    golden = GoldenRun(np.zeros((1, 2)), IMAGE, COMPILING)
    assert seconds_to_compile(another, few, {}, golden) == 0
    slow = seconds_to_compile(network, many, {}, golden._replace(compiling=4.0))
    assert 0 < seconds_to_compile(network, many, {}, golden) < slow


def test_a_slow_compiler_asks_for_more_faults() -> None:
    methods = [ways(2, 1, compiling)[0] for compiling in (1e-3, 0.1, 4.0)]
    assert methods[-1] == {"whole"}
    programs: dict = {}
    ways(2, 1, 4.0, programs)
    assert programs["pace"] > 10
    assert ways(2, 1, 0.0, programs)[0] == {"whole"}  # compiled before: the pace is remembered


@pytest.mark.as_users_run
@pytest.mark.parametrize(
    "model",
    [plain_conv, pytest.param(vision_transformer, marks=pytest.mark.slow)],
    ids=lambda m: m.__name__,
)
def test_the_outcomes_do_not_depend_on_it(model, monkeypatch) -> None:
    apply_fn, params, shape = model()
    faults = faults_in_every_leaf(params)
    arguments = (apply_fn, params, faults, *data(shape))
    chosen = run_campaign(*arguments, batch_size=5)
    monkeypatch.setattr(_run, "chosen_plans", lambda network, plans, *others: dict(plans))
    divided = run_campaign(*arguments, batch_size=5)
    np.testing.assert_array_equal(chosen.outcomes, divided.outcomes)
    np.testing.assert_array_equal(chosen.due, divided.due)


@pytest.mark.as_users_run
def test_a_small_campaign_compiles_little(capsys) -> None:
    apply_fn, params, shape = plain_conv()
    images, labels = data(shape)
    run_campaign(apply_fn, params, sample_faults(0, params, 9), images, labels, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert {line.split()[2] for line in lines if line.startswith(("conv", "out"))} == {"whole"}


def test_what_a_leaf_takes_grows_with_its_work() -> None:
    plans = ways(500)[1]
    network = ways(500)[2]
    cost = leaf_costs(network, plans.values(), np.full(len(network.leaves), 500))[0]
    few, more, all_pairs = (
        seconds_to_run(cost._replace(num_faults=n), IMAGE, 100, 10, 1000, surviving)
        for n, surviving in ((500, 0.5), (1000, 0.5), (1000, 1.0))
    )
    assert few < more < all_pairs
    whole = seconds_to_run(cost._replace(method="whole"), IMAGE, 100, 10, 1000)
    assert whole == pytest.approx(500 * 10 * 100 * IMAGE, rel=0.01)  # the host's calls are little
    assert seconds_to_run(cost._replace(method="unreached"), IMAGE, 100, 10, 1000) == 0
    text = plan_text([cost], 10, 2**30, (IMAGE, 100, 10, 1000), 3.0)
    assert "3.0 s of it compilation" in text
    assert "500,000 outcomes" in text
