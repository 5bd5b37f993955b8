"""Planning networks of ImageNet's size from shapes, within the memory of a small machine."""

from __future__ import annotations

import resource

import pytest
from absl import flags

from experiments.benchmarks.scaling import NETWORKS, hours, plan_network


@pytest.mark.parametrize(
    "name, parameters, operations",
    [
        # torchvision's counts of parameters and multiply-adds, one of them two operations.
        ("ResNet50", 25_557_032, 2 * 4.09e9),
        pytest.param("ViT-B/16", 86_567_656, 2 * 17.56e9, marks=pytest.mark.slow),
    ],
)
def test_a_large_network_is_planned_in_little_memory(name, parameters, operations) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["scaling"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan = plan_network(NETWORKS[name]())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert plan.num_parameters == parameters
    assert plan.network == pytest.approx(operations, rel=0.01)
    assert grown < 2**30, "a plan needs no images and no activations"
    assert sum(cost.num_faults for cost in plan.costs) == plan.num_faults == 16_641
    assert plan.largest < 4 * 2**30
    assert plan.operations(1.0) < 0.6 * plan.network * plan.num_faults * 50_000
    assert hours(plan, 1) > hours(plan, 8) > hours(plan, 256) > 0
