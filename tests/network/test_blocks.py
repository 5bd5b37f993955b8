"""Layers summed in blocks: against NumPy, and against the layer computed as a whole."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax

from jaxfi import FaultList, run_campaign
from jaxfi.campaign._workers import by_leaf, split_blocks
from jaxfi.engine._golden import network_function
from jaxfi.engine._plan import part_of_layer, plan_leaves
from jaxfi.models import MODELS
from jaxfi.network import trace_network
from jaxfi.network._blocks import (
    Blocks,
    block_of,
    blocked_dot,
    climb,
    partials,
    replace_channel,
    siblings,
    split,
)
from tests.conformance_models import (
    plain_mlp,
    wide_channels_first,
    wide_convolutions,
    wide_convolutions_channels_first,
    wide_layers,
)
from tests.engine.test_conformance import faults_in_every_leaf

BLOCKS = [Blocks(1, 4, 3, 1), Blocks(5, 8, 1, 1), Blocks(1, 2, 3, 7), Blocks(4, 2, 2, 3)]


def dot(x, weights):
    return lax.dot(x, weights, precision="highest")


def layer(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    inputs = blocks.outer * blocks.num_blocks * blocks.size * blocks.inner
    x, weights = generator.normal(size=(6, inputs)), generator.normal(size=(inputs, 5))
    return x.astype(np.float32), weights.astype(np.float32)


def in_block(blocks: Blocks, block: int) -> np.ndarray:
    """Inputs of one block, in order, by counting."""
    channels = range(block * blocks.size, (block + 1) * blocks.size)
    return np.array([
        (outer * blocks.num_blocks * blocks.size + channel) * blocks.inner + inner
        for outer in range(blocks.outer) for channel in channels for inner in range(blocks.inner)
    ])  # fmt: skip


@pytest.mark.parametrize("blocks", BLOCKS)
def test_blocks_hold_whole_channels(blocks: Blocks) -> None:
    x, weights = layer(blocks)
    for block in range(blocks.num_blocks):
        inputs = in_block(blocks, block)
        np.testing.assert_array_equal(split(jnp.asarray(x), 1, blocks)[block], x[:, inputs])
        np.testing.assert_array_equal(
            split(jnp.asarray(weights), 0, blocks)[block], weights[inputs]
        )
        found_block, place = blocks.place(inputs)
        assert (found_block == block).all()
        assert place.tolist() == list(range(blocks.length))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_sum_is_numpys_tree_of_partial_sums(blocks: Blocks) -> None:
    x, weights = layer(blocks)
    level = [
        np.asarray(dot(x[:, inputs], weights[inputs]))
        for inputs in (in_block(blocks, block) for block in range(blocks.num_blocks))
    ]
    while len(level) > 1:
        level = [a + b for a, b in zip(level[0::2], level[1::2], strict=True)]
    np.testing.assert_array_equal(blocked_dot(x, weights, blocks, dot), level[0])
    exact = x.astype(np.float64) @ weights.astype(np.float64)
    np.testing.assert_allclose(level[0], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_block_climbs_to_the_same_sum(blocks: Blocks) -> None:
    x, weights = layer(blocks)
    whole = np.asarray(blocked_dot(x, weights, blocks, dot))
    parts = partials(x, weights, blocks, dot)
    for block in range(blocks.num_blocks):
        climbed = climb(parts.levels[0][block], *siblings(parts.levels, block))
        assert np.asarray(climbed).tobytes() == whole.tobytes()


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_channel_is_replaced_in_its_block(blocks: Blocks) -> None:
    x, _ = layer(blocks)
    seen = x.reshape(6, blocks.outer, blocks.num_blocks * blocks.size, blocks.inner)
    values = np.arange(seen[:, :, 0].size, dtype=np.float32).reshape(seen[:, :, 0].shape)
    block = blocks.num_blocks - 1
    channel = block * blocks.size + np.arange(6) % blocks.size
    expected = seen.copy()
    for row in range(6):
        expected[row, :, channel[row]] = values[row]
    expected = expected.reshape(x.shape)[:, in_block(blocks, block)]
    inputs = block_of(jnp.asarray(x), 1, blocks, block)
    np.testing.assert_array_equal(replace_channel(inputs, blocks, channel, values), expected)


def convolution(x, weights):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=layout)


def test_convolution_is_numpys_tree_of_convolutions() -> None:
    blocks = Blocks(1, 4, 3, 1, input_axis=3, weight_axis=2)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 5, 4, 12)).astype(np.float32)
    weights = generator.normal(size=(3, 3, 12, 7)).astype(np.float32)
    parts = [convolution(x[..., n : n + 3], weights[:, :, n : n + 3]) for n in range(0, 12, 3)]
    expected = (np.asarray(parts[0]) + parts[1]) + (np.asarray(parts[2]) + parts[3])
    np.testing.assert_array_equal(blocked_dot(x, weights, blocks, convolution), expected)
    product = partials(x, weights, blocks, convolution)
    for block in range(4):
        np.testing.assert_array_equal(product.inputs[block], x[..., 3 * block : 3 * block + 3])
        climbed = climb(product.levels[0][block], *siblings(product.levels, block))
        assert np.asarray(climbed).tobytes() == expected.tobytes()
    exact = torch.nn.functional.conv2d(
        torch.tensor(x.transpose(0, 3, 1, 2)).double(),
        torch.tensor(weights.transpose(3, 2, 0, 1)).double(), padding=1,
    )  # fmt: skip
    np.testing.assert_allclose(np.moveaxis(expected, -1, 1), exact.numpy(), rtol=0, atol=1e-5)


def traced(model, dtype=jnp.float32):
    apply_fn, params, shape = model()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    network = trace_network(apply_fn, params, jax.ShapeDtypeStruct((5, *shape), dtype))
    return apply_fn, params, network


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (wide_layers, {"conv": "ahead", "first/kernel": "own ahead", "second/kernel": "own"}),
        (wide_channels_first, {"out": "own"}),  # `wide` is used transposed, `conv` twice
        (plain_mlp, {}),
        (wide_convolutions, {"in": "ahead", "shift": "ahead", "a": "ahead", "shortcut": "ahead"}),
        (wide_convolutions_channels_first, {"in": "ahead"}),
    ],
)
def test_plans_use_blocks_where_they_may(model, expected: dict[str, str]) -> None:
    _, _, network = traced(model)
    for plan in plan_leaves(network, range(len(network.leaves))).values():
        path = network.paths[plan.leaf]
        for name, result in (("own", plan.own), ("ahead", plan.ahead)):
            has_blocks = name in expected.get(path.removesuffix("/bias") + "/kernel", "").split()
            if path.endswith("bias"):
                assert (result is not None) == (name == "ahead" and has_blocks), (path, name)
            else:
                assert (result is not None) == (name in expected.get(path, "").split()), path


def test_16_bit_layers_are_not_split() -> None:
    # Partial sums would be rounded to 16 bits.
    assert not traced(wide_layers, jnp.bfloat16)[2].blocks


@pytest.mark.parametrize(
    "model", [wide_layers, wide_channels_first, wide_convolutions], ids=lambda m: m.__name__
)
def test_network_in_blocks_is_the_users_network(model) -> None:
    apply_fn, params, network = traced(model)
    x = np.random.default_rng(0).normal(size=network.image.aval.shape).astype(np.float32)
    assert network.blocks
    blocked = network_function(network)(params, x)
    np.testing.assert_allclose(blocked, apply_fn(params, x), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_fast_equals_reference_in_double_precision() -> None:
    with jax.enable_x64(True):
        apply_fn, params, _ = traced(wide_layers, jnp.float64)
        x = np.random.default_rng(0).normal(size=(7, 16, 16, 2))
        faults = faults_in_every_leaf(params)
        fast, reference = (
            run_campaign(apply_fn, params, faults, x, np.arange(7) % 4, engine=e, batch_size=4)
            for e in ("fast", "reference")
        )
    assert fast.golden.dtype == np.float64
    np.testing.assert_array_equal(fast.outcomes, reference.outcomes)


@pytest.mark.filterwarnings("ignore:the fault-free network's outputs hold NaN")
def test_golden_nan_in_a_wide_layer_is_exact() -> None:
    # A sum of two NaNs keeps the bits of either, as the compiler likes.
    weights = np.random.default_rng(0).normal(size=(1024, 4)).astype(np.float32)
    weights.view(np.uint32)[5, 1] = 0x7FC00AAA
    weights.view(np.uint32)[1000, 1] = 0x3FD00001
    params = {"w": jnp.asarray(weights)}
    faults = FaultList.from_sites([("w", (1000, 1), 30), ("w", (3, 2), 30)], params)
    x = np.random.default_rng(1).normal(size=(7, 1024)).astype(np.float32)
    fast, reference = (
        run_campaign(lambda p, x: x @ p["w"], params, faults, x, np.zeros(7, int), engine=e)
        for e in ("fast", "reference")
    )
    np.testing.assert_array_equal(fast.outcomes, reference.outcomes)


@pytest.mark.slow
def test_a_leafs_outcomes_do_not_depend_on_faults_in_others() -> None:
    """Its prefix and suffix are cut elsewhere."""
    apply_fn, params, image_shape = wide_convolutions()
    x = np.random.default_rng(0).normal(size=(7, *image_shape)).astype(np.float32)
    faults = faults_in_every_leaf(params)

    def run(faults: FaultList) -> np.ndarray:
        return run_campaign(apply_fn, params, faults, x, np.arange(7) % 4, batch_size=4).outcomes

    together = run(faults)
    for leaf in np.unique(faults.leaf):
        rows = np.flatnonzero(faults.leaf == leaf)
        np.testing.assert_array_equal(run(faults[rows]), together[rows])


def test_deep_networks_share_the_programs_of_their_suffixes() -> None:
    module = MODELS["resnet18"]()
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)

    def apply_fn(params, x):
        statistics = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), variables["batch_stats"])
        return module.apply({"params": params, "batch_stats": statistics}, x)

    network = trace_network(apply_fn, variables["params"], images)
    plans = plan_leaves(network, range(len(network.leaves))).values()
    starts = {plan.suffix_inputs for plan in plans}
    cuts = [((plan.whole, plan.ahead), *plan.stops) for plan in plans]
    programs = {pair for stops in cuts for pair in itertools.pairwise(stops)}
    assert len(starts) > 15
    assert len(programs) <= 2 * len(starts)  # of a layer, with the leaf before it and without


def test_faults_of_one_block_are_saved_together() -> None:
    _, params, network = traced(wide_layers)
    inputs = np.random.default_rng(0).integers(0, 2048, 60)
    faults = FaultList.from_sites([("first/kernel", (n, 3), 30) for n in inputs], params)
    faults += faults_in_every_leaf(params)
    plans = plan_leaves(network, np.unique(faults.leaf).tolist())
    part = part_of_layer(network, plans.values(), faults)
    assert part[:60].tolist() == (inputs % 8).tolist()  # images of 8 channels, flattened
    saved = split_blocks(by_leaf(faults, np.argsort(part, kind="stable")), 16, 1)
    assert sorted(np.concatenate(saved)) == list(range(len(faults)))
    for rows in saved:
        assert all(np.diff(rows) > 0)
        assert len(rows) <= 16
        assert len(set(faults.leaf[rows])) == 1
    first = [part[rows] for rows in saved if faults.paths[faults.leaf[rows[0]]] == "first/kernel"]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(first))
