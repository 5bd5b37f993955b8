"""Engines: dtypes, invariances, the self-check, retraces, errors, and the column rules."""

from __future__ import annotations

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxfi import (
    FAULT_MODELS,
    MASKED,
    FaultList,
    leaf_paths,
    run_campaign,
    sample_faults,
)
from jaxfi.campaign import _run as campaign
from jaxfi.engine import _engines
from jaxfi.network._frozen import frozen
from jaxfi.network._graph import _flat_jaxpr
from jaxfi.network._rules import column_rule
from tests.conformance_models import (
    dense,
    dense_layer,
    plain_conv,
    plain_mlp,
    studied,
    wide_convolutions,
    wide_twice,
)
from tests.engine.test_conformance import faults_in_every_leaf


def data(shape, num_images: int = 13, dtype=np.float32):
    generator = np.random.default_rng(3)
    images = generator.normal(size=(num_images, *shape)).astype(dtype)
    return images, generator.integers(0, 4, num_images)


def run(model, faults, **options):
    apply_fn, params, shape = model
    options = {"batch_size": 5, **options}
    return run_campaign(apply_fn, params, faults, *data(shape), **options)


def assert_same(a, b, rows=slice(None)) -> None:
    np.testing.assert_array_equal(a.outcomes[rows], b.outcomes)
    np.testing.assert_array_equal(a.due[rows], b.due)
    np.testing.assert_array_equal(a.correct[rows], b.correct)


def cast(model, dtype):
    apply_fn, params, shape = model()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return lambda p, x: apply_fn(p, x.astype(dtype)), params, shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("model", [plain_mlp, plain_conv], ids=["mlp", "conv"])
def test_fast_equals_reference_in_other_dtypes(model, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        apply_fn, params, shape = cast(model, dtype)
        faults = faults_in_every_leaf(params)
        fast, reference = (
            run((apply_fn, params, shape), faults, engine=e) for e in ("fast", "reference")
        )
    assert str(fast.golden.dtype) == dtype
    assert len(np.unique(reference.outcomes)) > 1
    assert_same(fast, reference)


def test_outcomes_do_not_depend_on_order_company_memory_or_block(monkeypatch) -> None:
    model = plain_conv()
    faults = faults_in_every_leaf(model[1]) + faults_in_every_leaf(model[1], seed=1)
    whole = run(model, faults)
    order = np.random.default_rng(0).permutation(len(faults))
    assert_same(whole, run(model, faults[order]), order)
    assert_same(whole, run(model, faults[2:3]), slice(2, 3))
    with pytest.raises(ValueError, match=r"memory_budget 1 bytes is too small .* allowed is") as e:
        run(model, faults, memory_budget=1)
    least = int(re.search(r"is ([\d,]+) or more", str(e.value))[1].replace(",", ""))
    assert_same(whole, run(model, faults, memory_budget=least))
    assert_same(whole, run(model, faults, seed=7))
    monkeypatch.setattr(campaign, "FAULTS_PER_BLOCK", 3)
    assert_same(whole, run(model, faults))


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
def test_null_and_not_activated_faults_are_masked_and_counted_apart(engine: str) -> None:
    model = plain_mlp()
    params = model[1]
    bit = np.asarray(params["b"]["kernel"]).view(np.uint32).reshape(-1)[:8] >> 31 & 1
    stuck = np.where(bit, FAULT_MODELS.index("stuck-at-1"), FAULT_MODELS.index("stuck-at-0"))
    leaf = leaf_paths(params).index("b/kernel")
    idle = FaultList.from_arrays(params, leaf, np.arange(8), 31, stuck)
    null = idle.nulls(np.arange(8))
    flips = FaultList.from_arrays(params, leaf, np.arange(8), 31, "bit-flip")
    found = run(model, idle + null + flips, engine=engine)
    assert found.num_not_activated == 16
    assert (found.outcomes[:16] == MASKED).all()
    clean = np.argmax(found.golden, axis=1) == found.labels
    assert (found.correct[:16] == clean.sum()).all()
    assert (found.outcomes[16:] != MASKED).any()


@pytest.mark.filterwarnings("ignore:the output does not depend on dead")
@pytest.mark.filterwarnings("ignore:the fault-free network's outputs hold NaN")
@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
@pytest.mark.parametrize("nan", ["critical", "argmax"])
def test_golden_outputs_with_nan_are_judged_alike_for_idle_and_active_faults(engine, nan) -> None:
    params = {"w": jnp.ones((2, 3)), "dead": jnp.zeros(3)}
    images = np.array([[1.0, 2.0], [np.nan, 1.0], [0.0, 1.0]], np.float32)
    idle = FaultList.from_sites([("w", (0, 0), 31)], params, model="stuck-at-0")
    active = FaultList.from_sites([("dead", 0, 3), ("w", (0, 0), 3)], params)
    found = run_campaign(
        lambda p, x: x @ p["w"], params, idle + active, images, [0, 0, 0], nan=nan, engine=engine
    )
    assert (found.outcomes[:2] == MASKED).all()
    assert found.due[:, 1].all()
    assert not found.due[:, [0, 2]].any()
    expected = 3 if nan == "argmax" else 2
    assert found.correct[:2].tolist() == [expected, expected]


@pytest.mark.parametrize("engine", ["fast", "vmap"])
def test_vmap_agrees_in_sign_and_exponent(engine: str) -> None:
    model = plain_conv()
    params = model[1]
    generator = np.random.default_rng(0)
    leaf = generator.integers(0, 4, 100)
    sizes = np.array([leaf.size for leaf in jax.tree.leaves(params)])
    element = generator.integers(0, sizes[leaf])
    faults = FaultList.from_arrays(
        params, leaf, element, generator.integers(23, 32, 100), "bit-flip"
    )
    found, reference = run(model, faults, engine=engine), run(model, faults, engine="reference")
    agree = (found.outcomes == reference.outcomes).mean()
    assert agree == 1 if engine == "fast" else agree >= 0.99


def row_dependent(late: bool):
    """A hidden layer, or the output, sees the row's number in the batch."""
    params = {"a": dense_layer(0, 6, 8), "b": dense_layer(2, 8, 4)}

    def apply_fn(p, x):
        row = jnp.arange(x.shape[0], dtype=x.dtype)[:, None]
        x = jnp.tanh(dense(x, p["a"])) + (0 if late else row)
        return dense(x, p["b"]) + (row if late else 0)

    return apply_fn, params, (6,)


def batch_statistics(late: bool):
    """BatchNorm in training mode: an image's output depends on its neighbours."""
    params = {"a": dense_layer(0, 6, 8), "b": dense_layer(2, 8, 4)}

    def apply_fn(p, x):
        x = dense(x, p["a"])
        x = dense(jnp.tanh(x if late else x - x.mean(0, keepdims=True)), p["b"])
        return x - x.mean(0, keepdims=True) if late else x

    return apply_fn, params, (6,)


def test_suffix_that_mixes_images_is_exact() -> None:
    # It is run on whole batches in order, one fault at a time.
    model = batch_statistics(late=True)
    faults = FaultList.from_arrays(model[1], 1, np.arange(48), 30, "bit-flip")
    whole = {"batch_size": 13}
    assert_same(run(model, faults, **whole), run(model, faults, engine="reference", **whole))


def test_position_dependent_suffix_is_exact() -> None:
    model = row_dependent(late=True)
    faults = FaultList.from_arrays(model[1], 1, np.arange(48), 30, "bit-flip")
    assert_same(run(model, faults), run(model, faults, engine="reference"))


@pytest.mark.parametrize("model", [row_dependent, batch_statistics], ids=lambda m: m.__name__)
def test_position_dependent_columns_are_exact(model) -> None:
    # The columns run on whole batches in order, so there the place of an image is the same.
    model = model(late=False)
    faults = FaultList.from_arrays(model[1], 1, np.arange(48), 23 + np.arange(48) % 9, "bit-flip")
    whole = {"batch_size": 13}
    assert_same(run(model, faults, **whole), run(model, faults, engine="reference", **whole))


@pytest.mark.parametrize("kept", ["own", "ahead", "slice", "whole"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(wide_twice, id="dense"),
        pytest.param(wide_convolutions, id="convolutions", marks=pytest.mark.slow),
    ],
)
def test_each_plan_that_a_moved_bit_leads_to_is_exact(model, kept, monkeypatch) -> None:
    """As on a backend whose parts of a layer round otherwise than the layer."""
    apply_fn, params, shape = model()
    faults = faults_in_every_leaf(params)
    reference = run((apply_fn, params, shape), faults, engine="reference")
    check, methods = _engines._check_bits, set()

    def pretend(programs, *rest):
        plan = programs.plan
        if (kept != "ahead" and plan.ahead) or kept == "whole":
            raise _engines._MovesBits("pretended", cut=True)
        if (kept == "ahead" and plan.own) or (kept == "slice" and plan.method == "columns"):
            raise _engines._MovesBits("pretended")
        methods.add(plan.method)
        return check(programs, *rest)

    monkeypatch.setattr(_engines, "_check_bits", pretend)
    assert_same(run((apply_fn, params, shape), faults), reference)
    expected = {"slice": {"slice"}, "whole": set()}.get(kept, {"columns"})
    assert methods - {"slice"} == expected - {"slice"}
    assert kept != "slice" or methods == {"slice"}


def test_few_images_are_checked_as_many_as_others(monkeypatch) -> None:
    """A cut that moves a bit in few images shows in none of five."""
    apply_fn, params, shape = plain_mlp()
    gives, seen = _engines._suffix_gives, collections.Counter()

    def count(programs, setup, golden, images, expected):
        seen[programs.plan.leaf] += len(expected)
        return gives(programs, setup, golden, images, expected)

    monkeypatch.setattr(_engines, "_suffix_gives", count)
    images, labels = data(shape, 5)
    run_campaign(apply_fn, params, faults_in_every_leaf(params), images, labels, batch_size=5)
    assert min(seen.values()) >= 256
    assert len(seen) == 3  # kernel and bias of each of three layers have one suffix


@pytest.mark.parametrize("engine", ["fast", "reference", "vmap"])
def test_user_function_is_traced_a_bounded_number_of_times(engine: str) -> None:
    apply_fn, params, shape = plain_mlp()
    faults = faults_in_every_leaf(params)

    def count(repeats: int) -> int:
        traces = []

        def counted(p, x):
            traces.append(1)
            return apply_fn(p, x)

        rows = np.tile(np.arange(len(faults)), repeats)
        run((counted, params, shape), faults[rows], engine=engine)
        return len(traces)

    few = count(1)
    assert 1 <= few <= 5
    assert count(6) == few


def test_programs_are_compiled_per_leaf_not_per_fault(monkeypatch) -> None:
    model = plain_conv()
    faults = faults_in_every_leaf(model[1])
    monkeypatch.setattr(campaign, "FAULTS_PER_BLOCK", 4)
    compiled = []
    listener = jax.monitoring.register_event_duration_secs_listener
    listener(lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)
    run(model, faults)
    once = len(compiled)
    compiled.clear()
    run(model, faults[np.tile(np.arange(len(faults)), 5)])
    assert len(compiled) <= once


BAD = {
    "engine": ({"engine": "quick"}, ValueError, "unknown engine 'quick': allowed are fast"),
    "precision": (
        {"precision": "tf32"},
        ValueError,
        "unknown precision 'tf32': allowed are highest",
    ),
    "nan": ({"nan": "ignore"}, ValueError, "unknown nan policy 'ignore': allowed are"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size 0 is out of range"),
    "labels": ({"labels": np.zeros(12, int)}, ValueError, r"labels have shape \(12,\)"),
    "label dtype": ({"labels": np.zeros(13)}, TypeError, "labels have dtype float64"),
    "no images": ({"images": np.zeros((0, 6)), "labels": []}, ValueError, "images have shape"),
    "output shape": (
        {"apply_fn": lambda p, x: x.sum()},
        ValueError,
        r"apply_fn returned f.*\[batch",
    ),
    "output batch": ({"apply_fn": lambda p, x: x[:2]}, ValueError, "apply_fn returned .* 5 images"),
    "output dtype": ({"apply_fn": lambda p, x: x > 0}, ValueError, "apply_fn returned bool"),
    "two outputs": ({"apply_fn": lambda p, x: (x, x)}, ValueError, "apply_fn returned"),
    "params": ({"params": {"w": jnp.zeros((2, 2))}}, ValueError, "for other parameters"),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_do_not_fit_are_named(name: str) -> None:
    changes, error, message = BAD[name]
    apply_fn, params, shape = plain_mlp()
    images, labels = data(shape)
    faults = FaultList.from_sites([("a/kernel", 0, 0)], params)
    arguments = {"apply_fn": apply_fn, "params": params, "faults": faults, "images": images,
                 "labels": labels, "batch_size": 5}  # fmt: skip
    with pytest.raises(error, match=message):
        run_campaign(**{**arguments, **changes})


def test_empty_fault_list_and_batches_larger_than_the_data() -> None:
    model = plain_mlp()
    faults = faults_in_every_leaf(model[1])
    with pytest.raises(ValueError, match="the fault list is empty: allowed is one fault or more"):
        run(model, faults[:0])
    reference = run(model, faults, batch_size=13, engine="reference")
    assert_same(run(model, faults, batch_size=100), reference)


def layout_conv(x, kernel, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, **options)


# name: (operation, shapes of its operands, axis to re-index in each, None where whole)
RULES = {
    "exp": (jnp.exp, [(3, 4)], [1]),
    "add of both": (lax.add, [(3, 4), (3, 4)], [1, 1]),
    "mul pulls the other": (lax.mul, [(3, 4), (3, 4)], [0, None]),
    "scalar operand": (lambda x: jnp.maximum(x, 0.0), [(3, 4)], [1]),
    "select": (lambda x, y: jnp.where(x > 0, x, y), [(3, 4), (3, 4)], [1, None]),
    "clamp": (lambda x: lax.clamp(-1.0, x, 1.0), [(3, 4)], [0]),
    "convert": (lambda x: x.astype(jnp.bfloat16), [(3, 4)], [1]),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.int32), [(3, 4)], [1]),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 0), [(3, 4), (2, 4)], [1, None]),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (2,)), [(4,)], [0]),
    "broadcast, ones before": (lambda x: lax.broadcast_in_dim(x, (3, 5, 4), (0, 2)), [(3, 4)], [1]),
    "reshape, split before": (lambda x: x.reshape(2, 3, 4), [(6, 4)], [1]),
    "reshape, ones": (lambda x: x.reshape(3, 1, 1, 4), [(3, 4)], [1]),
    "reshape, merged after": (lambda x: x.reshape(3, 20), [(3, 4, 5)], [0]),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), [(3, 4, 5)], [1]),
    "squeeze": (lambda x: lax.squeeze(x, (0, 2)), [(1, 4, 1, 5)], [3]),
    "sum": (lambda x: x.sum((0, 2)), [(3, 4, 5)], [1]),
    "max": (lambda x: x.max(0), [(3, 4, 5)], [2]),
    "argmax": (lambda x: jnp.argmax(x, 1), [(3, 4, 5)], [2]),
    "cumsum": (lambda x: lax.cumsum(x, 0), [(3, 4)], [1]),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), [(3, 4)], [0]),
    "rev": (lambda x: lax.rev(x, (0,)), [(3, 4)], [1]),
    "sort": (lambda x: lax.sort(x, dimension=0), [(3, 4)], [1]),
    "max pool": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), [(2, 4, 4, 3)], [3]),  # noqa: E501
    "sum pool": (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"), [(2, 4, 4, 3)], [3]),  # noqa: E501
    "pad": (lambda x: jnp.pad(x, ((1, 2), (0, 0))), [(3, 4)], [1]),
    "slice": (lambda x: x[1:, :], [(3, 4)], [1]),
    "split": (lambda x: lax.split(x, (1, 2), 0)[1], [(3, 4)], [1]),
    "convolution, kernel": (layout_conv, [(2, 5, 5, 3), (3, 3, 3, 4)], [None, 3]),
    "convolution, depthwise both": (lambda x, k: layout_conv(x, k, feature_group_count=4), [(2, 5, 5, 4), (3, 3, 1, 4)], [3, 3]),  # noqa: E501
    "convolution, depthwise kernel": (lambda x, k: layout_conv(x, k, feature_group_count=4), [(2, 5, 5, 4), (3, 3, 1, 4)], [None, 3]),  # noqa: E501
    "convolution, depthwise image": (lambda x, k: layout_conv(x, k, feature_group_count=4), [(2, 5, 5, 4), (3, 3, 1, 4)], [3, None]),  # noqa: E501
    "matmul, right": (jnp.matmul, [(3, 5), (5, 4)], [None, 1]),
    "matmul, left": (jnp.matmul, [(3, 5), (5, 4)], [0, None]),
    "matmul, batch axis": (jnp.matmul, [(6, 3, 5), (6, 5, 4)], [0, None]),
    "einsum, heads": (lambda x, w: jnp.einsum("btd,dhk->bthk", x, w), [(2, 3, 5), (5, 2, 4)], [None, 2]),  # noqa: E501
}  # fmt: skip

# What mixes channels must have no answer: (operation, shapes, axes).
MIXING = {
    "sum over them": (lambda x: x.sum(1), [(3, 4)], [1]),
    "concatenate of them": (lambda x, y: lax.concatenate([x, y], 1), [(3, 4), (3, 4)], [1, None]),
    "cumsum along them": (lambda x: lax.cumsum(x, 1), [(3, 4)], [1]),
    "sort along them": (lambda x: lax.sort(x, dimension=1), [(3, 4)], [1]),
    "rev along them": (lambda x: lax.rev(x, (1,)), [(3, 4)], [1]),
    "merged by reshape": (lambda x: x.reshape(12), [(3, 4)], [1]),
    "split by reshape": (lambda x: x.reshape(3, 2, 2), [(3, 4)], [1]),
    "slice of them": (lambda x: x[:, 1:], [(3, 4)], [1]),
    "pad of them": (lambda x: jnp.pad(x, ((0, 0), (1, 0))), [(3, 4)], [1]),
    "pool across them": (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"), [(3, 4)], [1]),  # noqa: E501
    "matmul contracting them": (jnp.matmul, [(3, 4), (4, 5)], [1, None]),
    "convolution contracting them": (layout_conv, [(2, 5, 5, 3), (3, 3, 3, 4)], [None, 2]),
    "grouped convolution": (lambda x, k: layout_conv(x, k, feature_group_count=2), [(2, 5, 5, 4), (3, 3, 2, 4)], [None, 3]),  # noqa: E501
    "different axes": (lax.add, [(4, 4), (4, 4)], [0, 1]),
    "size-one axis stretched": (lambda x: lax.broadcast_in_dim(x, (3, 4), (0, 1)), [(3, 1)], [1]),
}  # fmt: skip


def propagate(operation, operands, axes):
    """Follows the re-indexed axes by the rules, equation by equation.

    Returns the result's axis (None if a rule has no answer), and the operands' axes with those that
    the rules asked for.
    """
    whole = jax.ShapeDtypeStruct((1,), jnp.float32)
    jaxpr = _flat_jaxpr(frozen(lambda inputs, _: operation(*inputs)), operands, whole)[0]
    found = dict(zip(jaxpr.invars, (*axes, None), strict=True))
    for equation in jaxpr.eqns:
        known = tuple(None if hasattr(v, "val") else found[v] for v in equation.invars)
        if any_axis(known):
            answer = column_rule(equation, known)
            if answer is None:
                return None, axes
            pulled = zip(equation.invars, answer[1], strict=True)
            found.update({v: take for v, take in pulled if take is not None})
        found.update(dict.fromkeys(equation.outvars, answer[0] if any_axis(known) else None))
    return found[jaxpr.outvars[0]], [found[var] for var in jaxpr.invars[:-1]]


def any_axis(axes) -> bool:
    return any(axis is not None for axis in axes)


def operands_of(shapes):
    generator = np.random.default_rng(0)
    return tuple(jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("name", RULES)
def test_rule_agrees_with_the_operation_on_reindexed_operands(name: str) -> None:
    operation, shapes, axes = RULES[name]
    operands = operands_of(shapes)
    axis, all_axes = propagate(operation, operands, axes)
    assert axis is not None
    result = operation(*operands)
    channels = np.random.default_rng(1).integers(0, result.shape[axis], result.shape[axis])
    taken = [
        array if a is None else jnp.take(array, channels, axis=a)
        for array, a in zip(operands, all_axes, strict=True)
    ]
    expected = np.take(np.asarray(result), channels, axis=axis)
    np.testing.assert_array_equal(np.asarray(operation(*taken)), expected)


@pytest.mark.parametrize("name", MIXING)
def test_no_rule_for_what_mixes_channels(name: str) -> None:
    operation, shapes, axes = MIXING[name]
    assert propagate(operation, operands_of(shapes), axes)[0] is None


@pytest.mark.parametrize("paths", ["*layer3/2/conv*", "*layer3/*/conv2/kernel"])
def test_a_deep_network_is_cut_without_moving_bits(paths, monkeypatch) -> None:
    """The mean at a ResNet's end was summed in the order of what XLA fused into it, another one
    behind each cut: every leaf was checked, refused, and ran the whole network."""

    def refused(programs, found):
        raise AssertionError(f"{programs.network.paths[programs.plan.leaf]}: {found}")

    monkeypatch.setattr(_engines, "_less_divided", refused)
    apply_fn, params, shape = studied("resnet20")
    faults = sample_faults(0, params, 40, paths=paths)
    images, labels = data(shape)
    campaign = run_campaign(apply_fn, params, faults, images, labels, batch_size=10)
    assert (campaign.outcomes == 0).any()


def test_what_a_campaign_has_shown_the_next_does_not_check(monkeypatch) -> None:
    """Of the same network, parameters and images; of others it does."""
    apply_fn, params, shape = plain_conv()
    check, checked = _engines._check_bits, []

    def count(programs, setup, golden, expected, faults, random, due):
        checked.append(due)
        return check(programs, setup, golden, expected, faults, random, due)

    monkeypatch.setattr(_engines, "_check_bits", count)
    images, labels = data(shape, 30)
    other = jax.tree.map(lambda leaf: leaf * jnp.float32(1.5), params)
    numbers = []
    for p, x, count in (
        (params, images, 1), (params, images, 2), (params, images[::-1].copy(), 1),
        (other, images, 1),
    ):  # fmt: skip
        checked.clear()
        run_campaign(
            apply_fn, p, faults_in_every_leaf(params), x, labels, batch_size=5,
            images_per_fault=count,
        )  # fmt: skip
        numbers.append(len(checked))
    assert numbers[0] > 0
    assert numbers[1] < numbers[0]  # batches that no fault saw before
    assert numbers[2] > 0
    assert numbers[3] > 0
    checked.clear()
    for _ in range(2):
        run_campaign(apply_fn, params, faults_in_every_leaf(params), images, labels, batch_size=30)
        numbers.append(len(checked))
    assert numbers[-1] == numbers[-2]
