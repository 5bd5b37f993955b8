"""Emulated arithmetic against rounding done in NumPy's float64, and what it does to campaigns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from jaxfi.campaign import run_campaign
from jaxfi.faults import sample_faults
from jaxfi.network import with_arithmetic
from jaxfi.network._arithmetic import ARITHMETIC
from jaxfi.outcomes import MASKED

# Bits of mantissa, smallest normal exponent, largest exponent.
FORMATS = {"tf32": (10, -126, 127), "bfloat16": (7, -126, 127), "float16": (10, -14, 15)}


def round_in_float64(x: np.ndarray, name: str) -> np.ndarray:
    """Nearest value of the format, ties to even; beyond the largest, Inf."""
    mantissa, smallest, largest = FORMATS[name]
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = x.astype(np.float64)
        exponent = np.maximum(np.frexp(wide)[1] - 1, smallest)
        step = np.ldexp(1.0, np.where(np.isfinite(wide), exponent, 0) - mantissa)
        rounded = np.rint(wide / step) * step  # rint takes ties to even
        beyond = np.abs(rounded) >= 2.0 ** (largest + 1)
        return np.where(beyond, np.copysign(np.inf, wide), rounded).astype(np.float32)


def interesting_values(name: str) -> np.ndarray:
    """Ties and their neighbours at every exponent, subnormals, limits, Inf, NaN, any words."""
    mantissa = FORMATS[name][0]
    rng = np.random.default_rng(0)
    top = rng.integers(0, 2**mantissa, (255, 40)).astype(np.uint32) << np.uint32(23 - mantissa)
    tie = np.uint32(1 << (22 - mantissa))
    words = (np.arange(255, dtype=np.uint32)[:, None] << np.uint32(23)) | top
    words = np.stack([words, words | tie, (words | tie) - 1, (words | tie) + 1]).ravel()
    special = np.array([0.0, np.inf, np.nan, 65504, 65519.996, 65520, 2**-24, 2**-25], np.float32)
    tiny = np.ldexp(rng.integers(1, 2**13, 3000), -27).astype(np.float32)  # float16's subnormals
    signalling = np.array([0x7F800001, 0x7FFFFFFF], np.uint32)
    anything = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    words = np.concatenate([words, special.view(np.uint32), tiny.view(np.uint32), signalling])
    words = np.concatenate([words, words ^ np.uint32(1 << 31), anything])
    return words.view(np.float32)


def assert_same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        got[numbers].view(np.uint32), expected[numbers].view(np.uint32), strict=True
    )


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_numpys_to_the_bit(name):
    x = interesting_values(name)
    expected = round_in_float64(x, name)
    assert_same_bits(jax.jit(ARITHMETIC[name])(x), expected)
    assert_same_bits(ARITHMETIC[name](jnp.asarray(x)), expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_oracle_is_the_ieee_cast(name):
    x = interesting_values(name)
    dtype = np.float16 if name == "float16" else ml_dtypes.bfloat16
    with np.errstate(over="ignore", invalid="ignore"):
        cast = x.astype(dtype).astype(np.float32)
    assert_same_bits(round_in_float64(x, name), cast)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_narrow_words_are_rounded_as_the_float32_they_stand_for(dtype, name):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    got = jax.jit(ARITHMETIC[name])(x)
    assert got.dtype == dtype
    with np.errstate(over="ignore", invalid="ignore"):
        expected = round_in_float64(x.astype(np.float32), name).astype(dtype).astype(np.float32)
    # XLA on the CPU computes with bfloat16's subnormals as zeros.
    normal = np.abs(expected) >= (2.0**-126 if dtype == jnp.bfloat16 else 0)
    assert_same_bits(np.asarray(got).astype(np.float32)[normal], expected[normal])


# Networks

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "layer1": {"conv": {"kernel": jax.random.normal(KEYS[0], (3, 3, 3, 8)), "bias": jnp.ones(8)}},
    "layer2": {"dense": {"kernel": jax.random.normal(KEYS[1], (8, 10)), "scale": jnp.ones(10)}},
}
IMAGES = jax.random.normal(KEYS[2], (4, 6, 6, 3))


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def multiply(x, kernel):
    return jnp.matmul(x, kernel, precision="highest")


def network(params, images):
    conv, dense = params["layer1"]["conv"], params["layer2"]["dense"]
    x = jax.nn.relu(convolve(images, conv["kernel"]) + jnp.expand_dims(conv["bias"], (0, 1, 2)))
    return multiply(x.mean((1, 2)), dense["kernel"] * dense["scale"][None])


def in_numpy_rounded(params, images, first, second):
    """The same network as three programs, with the operands rounded by NumPy between them."""

    def rounded(x, name):
        return x if name == "float32" else jnp.asarray(round_in_float64(np.asarray(x), name))

    conv, dense = params["layer1"]["conv"], params["layer2"]["dense"]
    x = jax.jit(convolve)(rounded(images, first), rounded(conv["kernel"], first))
    x = jax.jit(lambda x: jax.nn.relu(x + jnp.ones((1, 1, 1, 8))).mean((1, 2)))(x)
    return jax.jit(multiply)(rounded(x, second), rounded(dense["kernel"], second))


@pytest.mark.parametrize(
    "arithmetic, first, second",
    [
        ({"*": "tf32"}, "tf32", "tf32"),
        ({"layer2/*": "tf32", "*": "float32"}, "float32", "tf32"),
        ({"layer1/*": "bfloat16", "layer2/*": "float16"}, "bfloat16", "float16"),
        ({"layer1/conv/kernel": "float16", "layer*": "float32"}, "float16", "float32"),
        ({"*": "float32"}, "float32", "float32"),
        ({}, "float32", "float32"),
    ],
)
def test_each_layer_has_its_own_operands(arithmetic, first, second):
    got = jax.jit(with_arithmetic(network, arithmetic))(PARAMS, IMAGES)
    expected = in_numpy_rounded(PARAMS, IMAGES, first, second)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    if (first, second) != ("float32", "float32"):
        assert not np.allclose(got, network(PARAMS, IMAGES), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_the_compiler_keeps_the_rounding(name):
    """One matmul of exact products: any lost rounding would show in the bits."""
    x = interesting_values(name)
    x = x[np.isfinite(x) & (np.abs(x) > 1e-30) & (np.abs(x) < 1e4)][:4096].reshape(-1, 1)
    params = {"w": jnp.ones((1, 1))}
    rounded = with_arithmetic(lambda params, x: multiply(x, params["w"]), {"*": name})
    assert_same_bits(jax.jit(rounded)(params, x), round_in_float64(x, name))


def test_float32_is_the_network_itself():
    got = jax.jit(with_arithmetic(network, {"*": "float32"}))(PARAMS, IMAGES)
    assert_same_bits(got, jax.jit(network)(PARAMS, IMAGES))


def test_float16_overflows():
    params = jax.tree.map(lambda x: x * 1e30, PARAMS)
    assert not np.isfinite(with_arithmetic(network, {"*": "float16"})(params, IMAGES)).any()


def rounding_operations(apply_fn, params, images):
    return str(jax.make_jaxpr(apply_fn)(params, images)).count("reduce_precision")


def test_a_matmul_without_parameters_takes_the_star():
    def attention(params, images):
        x = images.reshape(len(images), -1, 3)
        query = multiply(x, params["query"])
        return multiply(query, x.swapaxes(1, 2)).mean(-1)

    params = {"query": jnp.ones((3, 3))}
    count = {
        entry: rounding_operations(with_arithmetic(attention, arithmetic), params, IMAGES)
        for entry, arithmetic in {
            "leaf": {"query": "tf32"},
            "rest": {"query": "float32", "*": "tf32"},
            "all": {"*": "tf32"},
        }.items()
    }
    assert count == {"leaf": 2, "rest": 2, "all": 4}


def test_integer_matmuls_are_left():
    def apply_fn(params, images):
        hot = multiply((images > 0).astype(jnp.int32).reshape(4, -1), params["table"])
        return hot.astype(jnp.float32)

    params = {"table": jnp.ones((108, 5), jnp.int32)}
    assert rounding_operations(with_arithmetic(apply_fn, {"*": "tf32"}), params, IMAGES) == 0


def test_gradients_pass():
    def loss(params, arithmetic):
        return with_arithmetic(network, arithmetic)(params, IMAGES).sum()

    exact, rounded = (jax.grad(loss)(PARAMS, {"*": name}) for name in ("float32", "tf32"))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(a)


@pytest.mark.parametrize("engine", ["fast", "vmap"])
def test_campaigns_mask_what_the_rounding_hides(engine):
    """Where NumPy rounds the faulty and the stored weight to one number, the fault is masked."""
    apply_fn = with_arithmetic(network, {"*": "tf32"})
    faults = sample_faults(0, PARAMS, 64, by="bit", paths="layer2/dense/kernel")
    labels = np.zeros(len(IMAGES), np.int32)
    found, expected = (
        run_campaign(apply_fn, PARAMS, faults, IMAGES, labels, engine=name)
        for name in (engine, "reference")
    )
    before, after = (round_in_float64(x.astype(np.float32), "tf32") for x in faults.values(PARAMS))
    hidden = before == after
    assert hidden[faults.bit < 12].all()
    assert not hidden[faults.bit > 12].any()
    assert (found.outcomes[hidden] == MASKED).all()
    assert (found.outcomes[~hidden] != MASKED).mean() > 0.9
    if engine == "fast":
        np.testing.assert_array_equal(found.outcomes, expected.outcomes)


@pytest.mark.parametrize(
    "arithmetic, message",
    [
        ({"layer3/*": "tf32"}, "'layer3/.' is the first to match no leaf.*layer1/conv/bias"),
        ({"*": "tf32", "layer1/*": "float32"}, "'layer1/.' is the first"),
    ],
)
def test_a_pattern_without_leaves_is_an_error(arithmetic, message):
    with pytest.raises(ValueError, match=message):
        with_arithmetic(network, arithmetic)(PARAMS, IMAGES)


def test_an_unknown_arithmetic_is_an_error_at_once():
    with pytest.raises(ValueError, match="'tf23': allowed are float32, tf32, bfloat16, float16"):
        with_arithmetic(network, {"*": "tf23"})


# Loops, branches, calls

# One weight in each column: every sum is exact, so NumPy's must be the same to the bit.
WEIGHTS = jnp.abs(jax.random.normal(KEYS[3], (3, 12, 1)))
LAYERS = {"kernels": WEIGHTS * jnp.roll(jnp.eye(12), 5, axis=0)[None], "last": jnp.eye(12, 10)}
INPUTS = jax.random.normal(KEYS[2], (4, 12))


def layer(x, kernel):
    return jax.nn.relu(multiply(x, kernel))


def by_scan(x, kernels):
    return lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0]


def by_scan_backwards_with_outputs(x, kernels):
    def step(carry, kernel):
        x = layer(carry[1], kernel)
        return (carry[0] + 1, x), x.sum()

    (count, x), sums = lax.scan(step, (0, x), kernels[::-1], reverse=True)
    return x + 0 * sums.sum() + 0 * count


def by_for_loop(x, kernels):
    return lax.fori_loop(0, 3, lambda i, x: layer(x, kernels[i]), x)


def by_while_loop(x, kernels):
    """The number of rounds depends on the images, the kernels do not."""

    def another(state):
        return (state[0] < 3) & (multiply(state[1], kernels[0]).sum() < jnp.inf)

    return lax.while_loop(another, lambda s: (s[0] + 1, layer(s[1], kernels[s[0]])), (0, x))[1]


def by_branches(x, kernels):
    x = lax.cond(x.sum() < jnp.inf, lambda x: layer(x, kernels[0]), lambda x: 0 * x, x)
    branches = [lambda x, kernel: -layer(x, kernel), layer, lambda x, kernel: x]
    x = lax.switch((x.sum() > -1).astype(jnp.int32), branches, x, kernels[1])
    kernel = lax.cond(x.sum() < jnp.inf, lambda: kernels[2], lambda: kernels[1])
    return layer(x, kernel)


def by_calls(x, kernels):
    with_jvp = jax.custom_jvp(layer)
    with_jvp.defjvps(None, None)
    with_vjp = jax.custom_vjp(layer)
    with_vjp.defvjp(lambda x, kernel: (layer(x, kernel), None), lambda _, g: (g, None))
    for call, kernel in zip((jax.jit(layer), with_jvp, with_vjp), kernels, strict=True):
        x = jax.checkpoint(call)(x, kernel)
    return x


def by_calls_in_a_loop(x, kernels):
    def step(x, kernel):
        return lax.cond(
            x[0, 0] < jnp.inf, jax.checkpoint(jax.jit(layer)), lambda x, _: x, x, kernel
        )

    with_jvp = jax.custom_jvp(step)
    with_jvp.defjvps(None, None)
    return lax.scan(lambda x, kernel: (jax.jit(with_jvp)(x, kernel), None), x, kernels)[0]


def by_images(x, kernels):
    """vmap over images, a loop in each."""
    return jax.vmap(lambda x: by_while_loop(x[None], kernels)[0])(x)


IN_LOOPS = [
    by_scan, by_scan_backwards_with_outputs, by_for_loop, by_while_loop, by_branches, by_calls,
    by_calls_in_a_loop, by_images,
]  # fmt: skip


def in_loops(body):
    def apply_fn(params, images):
        return multiply(body(images, params["kernels"]), params["last"])

    return apply_fn


def layers_in_numpy(name):
    """Layer by layer, with NumPy's rounding of every operand."""
    x = np.asarray(INPUTS)
    for kernel in np.asarray(LAYERS["kernels"]):
        x = np.maximum(round_in_float64(x, name) @ round_in_float64(kernel, name), 0)
    return x[:, :10]


@pytest.mark.parametrize("name", ["tf32", "bfloat16"])
@pytest.mark.parametrize("body", IN_LOOPS, ids=lambda body: body.__name__)
def test_operands_inside_are_rounded_as_numpy_does(body, name):
    rounded = with_arithmetic(in_loops(body), {"kernels": name, "last": "float32"})
    expected = layers_in_numpy(name)
    np.testing.assert_array_equal(jax.jit(rounded)(LAYERS, INPUTS), expected)
    assert (in_loops(body)(LAYERS, INPUTS) != expected).mean() > 0.2


@pytest.mark.parametrize("body", IN_LOOPS, ids=lambda body: body.__name__)
def test_every_operation_inside_belongs_to_its_leaf(body):
    """With no entry but the last layer's, nothing inside is rounded; with the star, all is."""
    exact = in_loops(body)(LAYERS, INPUTS)
    last = with_arithmetic(in_loops(body), {"last": "tf32", "*": "float32"})
    assert rounding_operations(last, LAYERS, INPUTS) == 2
    same = with_arithmetic(in_loops(body), {"*": "float32"})
    np.testing.assert_array_equal(same(LAYERS, INPUTS), exact)
    every = with_arithmetic(in_loops(body), {"*": "tf32"})
    inside = str(jax.make_jaxpr(every)(LAYERS, INPUTS))
    assert inside.count("reduce_precision") == 2 * inside.count("dot_general")


@pytest.mark.parametrize("body", [by_scan, by_branches], ids=lambda body: body.__name__)
def test_campaigns_run_networks_with_rounded_loops(body):
    apply_fn = with_arithmetic(in_loops(body), {"*": "tf32"})
    # Positive, so that no ReLU masks a fault.
    params = {**LAYERS, "kernels": jnp.abs(jax.random.normal(KEYS[3], (3, 12, 12)))}
    images, labels = jnp.abs(INPUTS), np.zeros(len(INPUTS), np.int32)
    faults = sample_faults(0, params, 64, by="bit", paths="kernels")
    fast, plain = (
        run_campaign(apply_fn, params, faults, images, labels, engine=engine)
        for engine in ("fast", "reference")
    )
    np.testing.assert_array_equal(fast.outcomes, plain.outcomes)
    before, after = (round_in_float64(x.astype(np.float32), "tf32") for x in faults.values(params))
    assert (fast.outcomes[before == after] == MASKED).all()
    assert (fast.outcomes[before != after] != MASKED).mean() > 0.5


def test_grouped_matmuls_are_rounded():
    def apply_fn(params, images):
        return lax.ragged_dot(images, params["experts"], jnp.array([1, 3]), precision="highest")

    params = {"experts": LAYERS["kernels"][:2]}
    rounded = with_arithmetic(apply_fn, {"*": "bfloat16"})
    x, kernels = (round_in_float64(np.asarray(a), "bfloat16") for a in (INPUTS, params["experts"]))
    expected = np.concatenate([x[:1] @ kernels[0], x[1:] @ kernels[1]])
    np.testing.assert_allclose(rounded(params, INPUTS), expected, rtol=1e-5)


def by_shard_map(params, images):
    mesh = jax.make_mesh((1,), ("images",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec("images"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(multiply, mesh=mesh, in_specs=(spec, whole), out_specs=spec)
    return mapped(images, params["last"])


def by_solve(params, images):
    def matvec(x):
        return multiply(params["kernels"][0], x)

    x = lax.custom_linear_solve(matvec, images[0], lambda matvec, x: x, symmetric=True)
    return multiply(images + x[None], params["last"])


@pytest.mark.parametrize(
    "apply_fn, message",
    [
        (by_shard_map, "apply_fn holds a shard_map, which divides a batch by devices: allowed"),
        (by_solve, "a dot_general inside a custom_linear_solve: allowed are"),
    ],
)
def test_what_no_rounding_can_reach_is_refused(apply_fn, message):
    with pytest.raises(ValueError, match=message):
        with_arithmetic(apply_fn, {"*": "tf32"})(LAYERS, INPUTS)


def test_named_arithmetic_does_not_depend_on_the_backend_default():
    """float32 means float32 also where an accelerator would multiply in TF32 or bfloat16."""

    def apply_fn(params, images):
        return images @ params["a"] @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    rounded = with_arithmetic(apply_fn, {"a": "float32"})
    equations = jax.make_jaxpr(rounded)(params, jnp.ones((5, 3))).jaxpr.eqns
    found = [e.params["precision"] for e in equations if e.primitive.name == "dot_general"]
    assert found == [(lax.Precision.HIGHEST, lax.Precision.HIGHEST), None]
