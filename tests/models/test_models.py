"""The networks against their published sizes and against PyTorch's own layers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from jaxfi.convert import from_torch, to_torch
from jaxfi.models import MODELS
from jaxfi.models._layers import BatchNorm, max_pool
from tests.torch_models import TORCH_MODELS

# Published: the first five in the gradient-regularization paper's Table 1, with 3 channels and 1
# (LeNet on MNIST: DESIGN.md); the CIFAR family's with 3 by its authors' reference implementations.
NUM_PARAMETERS = {
    ("lenet", 3): 1_626_442,
    ("lenet", 1): 1_625_866,
    ("resnet18", 3): 11_173_962,
    ("resnet18", 1): 11_172_810,
    ("resnet9", 3): 2_440_266,
    ("resnet9", 1): 2_439_114,
    ("vgg11", 3): 9_756_426,
    ("vgg11", 1): 9_755_274,
    ("vgg16", 3): 15_253_578,
    ("vgg16", 1): 15_252_426,
    ("resnet20", 3): 269_722,
    ("resnet32", 3): 464_154,
    ("resnet44", 3): 658_586,
}


def shapes(name: str, channels: int = 3):
    images = jnp.zeros((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(MODELS[name]().init, jax.random.key(0), images)


def torch_model(name: str, channels: int = 3) -> torch.nn.Module:
    """A network whose every parameter and running statistic is random, so that none can be lost."""
    torch.manual_seed(0)
    model = TORCH_MODELS[name](in_channels=channels)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of all tensors but the counters, which jaxfi has no use for."""
    state = model.state_dict().items()
    return {key: tensor.numpy().copy() for key, tensor in state if "num_batches" not in key}


def images(channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 32, 32, channels)).astype(np.float32)


def torch_images(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def without_dropout(next_fn, args, kwargs, context):
    """Flax interceptor: dropout passes its input on."""
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return args[0]
    return next_fn(*args, **kwargs)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value where that exceeds 1."""
    theirs = np.asarray(theirs)
    scale = max(1.0, np.abs(theirs).max())
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * scale


@pytest.mark.parametrize("name, channels", NUM_PARAMETERS)
def test_parameter_count_is_the_published_one(name, channels):
    leaves = jax.tree.leaves(shapes(name, channels)["params"])
    assert sum(leaf.size for leaf in leaves) == NUM_PARAMETERS[name, channels]


@pytest.mark.parametrize("name", MODELS)
def test_variables_have_the_torch_names_and_shapes(name):
    ours = to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(name)))
    expected = numpy_state(TORCH_MODELS[name]())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_torch(name):
    model = torch_model(name).eval()
    variables = from_torch(numpy_state(model), shapes(name))
    logits = MODELS[name]().apply(variables, images())
    with torch.no_grad():
        expected = model(torch_images(images()))
    assert logits.shape == (4, 10)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected)


def test_forward_equals_torch_with_one_channel():
    model = torch_model("lenet", 1).eval()
    variables = from_torch(numpy_state(model), shapes("lenet", 1))
    with torch.no_grad():
        expected = model(torch_images(images(1)))
    assert_close(MODELS["lenet"]().apply(variables, images(1)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_training_step_equals_torch_and_so_do_running_statistics(name):
    model = torch_model(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    variables = from_torch(numpy_state(model), shapes(name))
    with nn.intercept_methods(without_dropout):
        logits, new = MODELS[name]().apply(variables, images(), train=True, mutable="batch_stats")
    with torch.no_grad():
        expected = model(torch_images(images()))
    assert_close(logits, expected)
    ours = to_torch({"params": variables["params"], **new})
    for key, array in numpy_state(model).items():
        assert_close(ours[key], array)


@functools.cache
def initial_variables(name: str):
    return MODELS[name]().init(jax.random.key(1), images())


@pytest.mark.parametrize(
    "name", ["lenet", pytest.param("resnet18", marks=pytest.mark.slow), "vgg11"]
)
def test_initial_distributions_are_those_of_torch(name):
    torch.manual_seed(1)
    theirs = numpy_state(TORCH_MODELS[name]())
    ours = to_torch(initial_variables(name))
    for key, expected in theirs.items():
        array = ours[key]
        if np.ptp(expected) == 0:  # BatchNorm: a constant
            np.testing.assert_array_equal(array, expected)
            continue
        # Both uniform: a sample's standard deviation has relative error .45/√n, its mean .58/√n
        # of the bound, and its extremes miss the bound by 1/n. Five deviations, and two samples.
        fan_in = np.prod(theirs[key.replace("bias", "weight")].shape[1:])
        bound, spread = 1 / np.sqrt(fan_in), 1 / np.sqrt(array.size)
        assert np.abs(array).max() <= bound * (1 + 1e-6)
        assert np.abs(array).max() >= np.abs(expected).max() - 12 * bound / array.size
        assert abs(array.std() / expected.std() - 1) < 3.2 * spread
        assert abs(array.mean() - expected.mean()) < 4.1 * bound * spread


@pytest.mark.parametrize("name", ["lenet", "resnet18", "vgg11"])
def test_every_kernel_is_drawn_from_its_own_key(name):
    """No two kernels of one shape are equal, as a key used twice would make them."""
    leaves = map(np.asarray, jax.tree.leaves(initial_variables(name)["params"]))
    kernels = [leaf.tobytes() for leaf in leaves if leaf.ndim > 1]
    assert len(set(kernels)) == len(kernels)


@pytest.mark.parametrize("name", ["lenet", "vgg11"])
def test_dropout_in_training_only(name):
    variables = from_torch(numpy_state(torch_model(name)), shapes(name))

    def logits(seed: int, train: bool):
        keys = {"dropout": jax.random.key(seed)}
        module = MODELS[name]()
        return module.apply(variables, images(), train, rngs=keys, mutable="batch_stats")[0]

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    np.testing.assert_array_equal(logits(0, True), logits(0, True))
    assert np.abs(logits(0, True) - logits(1, True)).max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["lenet", "resnet20", "vgg11"])
def test_cast_variables_compute_in_their_type(name, dtype):
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), shapes(name))
    apply_fn = MODELS[name]().apply
    jaxpr = jax.make_jaxpr(apply_fn)(variables, jnp.zeros((1, 32, 32, 3), dtype))
    assert [aval.dtype for aval in jaxpr.out_avals] == [jnp.dtype(dtype)]
    products = [
        equation
        for equation in jaxpr.jaxpr.eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert products
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", ["lenet", "resnet20", "resnet18"])
def test_float64_equals_torch(name):
    model = torch_model(name).double().eval()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float64), shapes(name))
        variables = from_torch(numpy_state(model), like)
        logits = MODELS[name]().apply(variables, images().astype(np.float64))
    with torch.no_grad():
        expected = model(torch_images(images()).double())
    assert logits.dtype == np.float64
    assert_close(logits, expected, 1e-12)


def test_running_statistics_follow_torch_over_several_batches():
    ours, theirs = BatchNorm(), torch.nn.BatchNorm2d(3)
    batches = [images(seed=seed)[:, :2, :2] for seed in range(5)]  # few values: n / (n - 1) shows
    variables = ours.init(jax.random.key(0), batches[0])
    for batch in batches:
        out, new = ours.apply(variables, batch, train=True, mutable="batch_stats")
        variables = {**variables, **new}
        expected = theirs(torch_images(batch)).detach().numpy().transpose(0, 2, 3, 1)
        assert_close(out, expected)
    assert_close(variables["batch_stats"]["mean"], theirs.running_mean, 1e-6)
    assert_close(variables["batch_stats"]["var"], theirs.running_var, 1e-6)


def test_batch_norm_of_a_single_value_is_an_error():
    variables = BatchNorm().init(jax.random.key(0), jnp.zeros((1, 1, 1, 3)))
    with pytest.raises(ValueError, match=r"2 or more values per channel, given shape"):
        BatchNorm().apply(variables, jnp.zeros((1, 1, 1, 3)), train=True, mutable="batch_stats")


@pytest.mark.parametrize("size, edge", [(2, 8), (4, 8), (2, 7)])
def test_max_pool_equals_torch_on_nan_infinity_ties_and_signed_zeros(size, edge):
    rng = np.random.default_rng(0)
    values = np.array([-1, -0.0, 0.0, 1, 2, 3, 4, np.nan, np.inf, -np.inf], np.float32)
    x = rng.choice(values, (4, edge, edge, 33))  # 33 channels: vector lanes and a remainder
    weights = rng.normal(size=(4, edge // size, edge // size, 33)).astype(np.float32)

    theirs = torch_images(x).requires_grad_()
    expected = torch.nn.functional.max_pool2d(theirs, size)
    weights[np.isnan(expected.detach().numpy().transpose(0, 2, 3, 1))] = 0  # of NaNs, any may win
    expected.backward(torch_images(weights))

    pooled, pullback = jax.jit(lambda x: jax.vjp(lambda x: max_pool(x, size), x))(x)
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(np.signbit(pooled), np.signbit(expected))
    gradient = theirs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pullback(jnp.asarray(weights))[0], gradient)


def test_path_pattern_selects_a_stage():
    """The paths of stage 3, and no others, begin with `layer3/`."""
    paths = shapes("resnet20")["params"]["layer3"]
    assert sorted(paths) == ["0", "1", "2"]
    assert sorted(paths["0"]) == ["bn1", "bn2", "conv1", "conv2"]


@pytest.mark.parametrize("name", MODELS)
def test_num_classes(name):
    module = MODELS[name](num_classes=7)
    logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images())
    assert logits.shape == (4, 7)
