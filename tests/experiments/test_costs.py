"""Predicted costs of the paper's rows, against arithmetic done by hand and XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from experiments.benchmarks.costs import (
    FLAGFILES,
    PASSES,
    Cost,
    comment,
    plan_of,
    predict,
    with_comment,
)
from experiments.common.config import read_flagfile
from jaxfi.training import penalized_value_and_grad


@pytest.fixture(autouse=True)
def parsed_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["costs"])


def test_lenet_on_mnist_costs_what_is_counted_by_hand() -> None:
    config = read_flagfile(FLAGFILES / "table3_mnist_lenet.flags")
    plan = plan_of(config)
    conv1 = 2 * 30 * 30 * 32 * (3 * 3 * 1)
    conv2 = 2 * 28 * 28 * 64 * (3 * 3 * 32)
    fc1, fc2 = 2 * (14 * 14 * 64) * 128, 2 * 128 * 10
    one_way = conv1 + conv2 + fc1 + fc2
    assert plan.network == one_way == 518_400 + 28_901_376 + 3_211_264 + 2_560
    # 20 epochs of 937 whole batches of 64: forward and backward, 3 and 9; and of the test images.
    training = 20 * one_way * ((3 + 9) * 937 * 64 + 2 * 10_000)
    cost = predict(config, plan)
    assert cost.training == pytest.approx(training, rel=1e-12)
    # Behind fc2 there is nothing, behind fc1 there is fc2, behind conv2 both dense layers.
    suffix = {cost.path: cost.suffix * one_way for cost in plan.costs}
    assert suffix["fc2/kernel"] == pytest.approx(0)
    assert suffix["fc1/kernel"] == pytest.approx(fc2)
    assert 0 < suffix["conv2/kernel"] <= fc1 + fc2
    assert cost.num_leaves == 2 * 4, "the four kernels of each network are faulted"
    assert 0 < cost.campaigns < 2 * 0.1 * plan.num_faults * 10_000 * one_way


def test_half_the_epochs_and_images_cost_half() -> None:
    config = read_flagfile(FLAGFILES / "table3_mnist_lenet.flags")
    half = dataclasses.replace(config, epochs=10, num_images=5_000)
    whole, less = (predict(settings, plan_of(settings)) for settings in (config, half))
    assert less.training == pytest.approx(whole.training / 2)
    assert less.campaigns == pytest.approx(whole.campaigns / 2)


@pytest.mark.parametrize("loss, alpha", [("default", 0.0), ("gradient", 0.1)])
def test_xla_counts_the_passes_of_a_step(loss, alpha) -> None:
    layers, width, batch = 6, 256, 64

    def loss_fn(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return (x**2).mean(), None

    weights = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * layers
    images = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    step = jax.jit(penalized_value_and_grad(loss_fn, alpha))
    operations = step.lower(weights, images).compile().cost_analysis()["flops"]
    one_way = layers * 2 * batch * width * width
    # The first layer needs no gradient of its images: a little less than the full count.
    assert operations / one_way == pytest.approx(PASSES[loss], rel=0.1)


def test_only_the_cost_of_a_flagfile_is_rewritten() -> None:
    lines = comment(Cost(3.6e14, 6e12, 16), gflops=100.0)
    text = " ".join(lines.split("\n# "))
    assert text.startswith("# Cost, predicted by experiments.benchmarks.costs, not measured: ")
    assert "about 60 min of training and 60 s of campaigns" in text
    before = "# A title.\n#\n# Cost: one line,\n# or two.\n#\n# Numbers\n\n--epochs=3\n"
    after = "# A title.\n#\n" + lines + "#\n# Numbers\n\n--epochs=3\n"
    assert with_comment(before, lines) == after
    assert with_comment(after, lines) == after
    with pytest.raises(ValueError, match="# Cost"):
        with_comment("--epochs=3\n", lines)
