"""Training against PyTorch: gradients, optimizers, schedules; and its own promises."""

from __future__ import annotations

import contextlib
import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from jaxfi.data import AffineRanges, Dataset
from jaxfi.models import MODELS
from jaxfi.training import (
    OPTIMIZERS,
    TrainConfig,
    load_variables,
    make_optimizer,
    penalized_loss,
    penalized_value_and_grad,
    train,
    with_matmul_convolutions,
)
from jaxfi.training import _loop as loop
from jaxfi.training._config import learning_rate_of_epoch
from jaxfi.training._convolution import matmul_convolution
from jaxfi.training._optimizers import default_learning_rate
from jaxfi.training._plan import candidate_plans, choose_plan
from jaxfi.training._schedules import (
    PlateauState,
    cosine_annealing,
    reduce_on_plateau,
    step_decay,
)
from jaxfi.training._step import Plan
from tests.torch_models import LeNet as TorchLeNet

ALPHA = 0.06


class SmallNetwork(nn.Module):
    """Convolution, batch statistics and dropout, in little."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10, name="dense")(x)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 120).astype(np.int32)
    images = rng.integers(0, 100, (120, 8, 8, 1)) + 15 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return Dataset(
        "made-up", images[:90], labels[:90], images[90:], labels[90:], (0.5,), (0.5,), 10, ""
    )


SMALL = TrainConfig(
    epochs=3,
    batch_size=8,
    optimizer="adam",
    learning_rate=0.01,
    alpha=0.01,
    convolution="im2col",
    derivative="fast",
    test_batch_size=16,
)


# The penalized gradient


def lenet_case(dtype: type) -> tuple:
    """A LeNet's loss without dropout as ours and PyTorch's, with the same weights."""
    torch.manual_seed(0)
    network = TorchLeNet().to(torch.float64 if dtype is np.float64 else torch.float32).eval()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 32, 32, 3)).astype(dtype)
    labels = np.array([1, 0, 7, 3])
    return network, params_of(network), images, labels


def params_of(network: torch.nn.Module) -> dict:
    """PyTorch's LeNet weights in Flax's layout, written out here: no converter is trusted."""
    w = {name: value.detach().numpy() for name, value in network.named_parameters()}
    fc1 = w["fc1.weight"].reshape(128, 64, 14, 14).transpose(2, 3, 1, 0).reshape(-1, 128)
    kernels = {
        "conv1": w["conv1.weight"].transpose(2, 3, 1, 0),
        "conv2": w["conv2.weight"].transpose(2, 3, 1, 0),
        "fc1": fc1,
        "fc2": w["fc2.weight"].T,
    }
    return {name: {"kernel": k, "bias": w[f"{name}.bias"]} for name, k in kernels.items()}


def torch_penalized_gradient(network: torch.nn.Module, images: np.ndarray, labels) -> dict:
    """Double backward; the gradient comes back through the parameters' own layout."""
    logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    (loss + ALPHA * sum((g**2).sum() for g in gradients)).backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.grad)
    return params_of(network)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_penalized_gradient_equals_double_backward(dtype):
    scope = jax.enable_x64() if dtype is np.float64 else contextlib.nullcontext()
    with scope:
        network, params, images, labels = lenet_case(dtype)
        params = jax.tree.map(jnp.array, params)  # before PyTorch overwrites what they view
        expected = jax.tree.map(np.copy, torch_penalized_gradient(network, images, labels))

        def loss_fn(params, images):
            logits = MODELS["lenet"]().apply({"params": params}, images, train=False)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels))
            return losses.mean(), None

        tolerance = 1e-5 if dtype is np.float32 else 1e-12
        for convolved in (loss_fn, with_matmul_convolutions(loss_fn_without_none(loss_fn))):
            loss = convolved if convolved is loss_fn else lambda p, x, f=convolved: (f(p, x), None)
            for form in ("fast", "plain"):
                step = jax.jit(penalized_value_and_grad(loss, ALPHA, form))
                _, gradient = step(params, jnp.array(images))
                assert relative_error(gradient, expected) <= tolerance, form


def loss_fn_without_none(loss_fn):
    return lambda params, images: loss_fn(params, images)[0]


def relative_error(tree, expected) -> float:
    """‖a - b‖ / ‖b‖, the worst of the leaves."""
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b), tree, expected
    )
    return max(jax.tree.leaves(errors))


def test_alpha_zero_is_the_default_loss_without_a_second_derivative():
    def loss_fn(w, x):
        return jnp.sum(jnp.sin(w * x)), None

    plain = jax.make_jaxpr(jax.value_and_grad(loss_fn, has_aux=True))(jnp.ones(3), jnp.ones(3))
    ours = jax.make_jaxpr(penalized_value_and_grad(loss_fn, 0.0))(jnp.ones(3), jnp.ones(3))
    assert len(ours.jaxpr.eqns) <= len(plain.jaxpr.eqns) + 2  # and the norm of the gradient


def test_alpha_may_be_traced():
    def loss_fn(w):
        return jnp.sum(w**3), None

    def gradient(alpha, form):
        return penalized_value_and_grad(loss_fn, alpha, form)(jnp.float32(2.0))[1]

    for form in ("fast", "plain"):  # 3w² + α·2·3w²·6w = 12 + 288α
        assert jax.jit(gradient, static_argnums=1)(0.5, form) == 156
    assert penalized_loss(loss_fn, 0.5)(jnp.float32(2.0))[0] == 8 + 0.5 * 144


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        penalized_value_and_grad(lambda w: (w, None), alpha)


def test_unknown_form():
    with pytest.raises(ValueError, match="form is 'slow'; allowed: fast, plain"):
        penalized_value_and_grad(lambda w: (w, None), 0.1, "slow")


# Optimizers

TORCH_OPTIMIZERS = {
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1}),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_equals_torch(name, weight_decay):
    make, settings = TORCH_OPTIMIZERS[name]
    start = np.linspace(-1, 1, 12, dtype=np.float32)
    start[3] = 0.0  # a weight whose gradient is 0 at first: where ε matters
    weights = torch.nn.Parameter(torch.tensor(start))
    theirs = make([weights], weight_decay=weight_decay, **settings)
    ours = make_optimizer(name, settings["lr"], weight_decay)
    params = jnp.array(start)
    state = ours.init(params)
    for step in range(20):
        gradient = np.sin(start * (step + 1)).astype(np.float32)
        weights.grad = torch.tensor(gradient)
        theirs.step()
        updates, state = ours.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, weights.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_default_learning_rates_are_torchs():
    for name, (make, _) in TORCH_OPTIMIZERS.items():
        weights = [torch.nn.Parameter(torch.zeros(1))]
        assert default_learning_rate(name) == make(weights).defaults["lr"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("adamw", 0.1), "optimizer is 'adamw'; allowed: adadelta, adam"),
        (("sgd", -0.1), "learning_rate is -0.1"),
        (("sgd", 0.1, float("nan")), "weight_decay is nan"),
    ],
)
def test_optimizer_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(*arguments)


def test_unknown_optimizer_setting():
    with pytest.raises(ValueError, match="'adam' has no such setting"):
        make_optimizer("adam", 0.1, momentum=0.9)


# Schedules


def torch_rates(make_scheduler, losses=None, num_epochs: int = 20) -> list[float]:
    """The learning rate that PyTorch trains each epoch with, from 0.1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(optimizer)
    rates = []
    for epoch in range(num_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([] if losses is None else [losses[epoch]]))
    return rates


def test_step_decay_equals_torch():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.7))
    ours = [step_decay(0.1, epoch, 3, 0.7) for epoch in range(20)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_cosine_annealing_equals_torch():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), None, 50)
    ours = [cosine_annealing(0.1, epoch, 20) for epoch in range(50)]  # it rises again after 20
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_plateau_equals_torch(seed):
    losses = np.random.default_rng(seed).choice([1.0, 0.9995, 0.998, 0.9, 1.1, np.nan], 60)
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=3, threshold=1e-3),
        losses.tolist(),
        60,
    )
    config = TrainConfig(schedule="plateau", learning_rate=0.1)
    ours = [learning_rate_of_epoch(config, e, losses[:e].tolist()) for e in range(60)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_plateau_cuts_after_patience_and_one():
    state = PlateauState(1.0)
    rates = []
    for _ in range(6):
        state = reduce_on_plateau(state, 1.0, patience=3)
        rates.append(state.learning_rate)
    assert rates == [1.0, 1.0, 1.0, 1.0, 0.1, 0.1]


# Convolutions


@pytest.mark.parametrize("strides, padding", [((1, 1), 0), ((2, 2), 1), ((2, 1), 2)])
def test_matmul_convolution_equals_torch(strides, padding, monkeypatch):
    monkeypatch.setattr("jaxfi.training._convolution.BLOCK_BYTES", 20_000)  # several blocks
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(6, 9, 11, 5)), rng.normal(size=(3, 2, 5, 7))
    images, kernel = images.astype(np.float32), kernel.astype(np.float32)
    ours = matmul_convolution(jnp.array(images), jnp.array(kernel), strides, [(padding,) * 2] * 2)
    expected = torch.nn.functional.conv2d(
        torch.tensor(images.transpose(0, 3, 1, 2)),
        torch.tensor(kernel.transpose(3, 2, 0, 1)),
        stride=strides,
        padding=padding,
    ).numpy()
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_rewritten_network_gives_the_same_and_has_no_convolution(name):
    model, images = MODELS[name](), jnp.ones((2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def network(variables, images):
        return model.apply(variables, images, train=False)

    rewritten = with_matmul_convolutions(network)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(rewritten)(variables, images))
    np.testing.assert_allclose(
        jax.jit(rewritten)(variables, images),
        jax.jit(network)(variables, images),
        rtol=1e-4,
        atol=1e-5,
    )


def test_grouped_convolution_stays():
    model = nn.Conv(4, (3, 3), feature_group_count=2)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
    rewritten = with_matmul_convolutions(model.apply)
    np.testing.assert_array_equal(
        rewritten(variables, jnp.ones((1, 8, 8, 4))), model.apply(variables, jnp.ones((1, 8, 8, 4)))
    )


# Plans


def test_plans_worth_trying():
    free = dataclasses.replace(SMALL, convolution="auto", derivative="auto")
    assert len(candidate_plans(free, "cpu")) == 3
    assert {plan.convolution for plan in candidate_plans(free, "gpu")} == {"xla"}
    assert len(candidate_plans(dataclasses.replace(free, alpha=0.0), "cpu")) == 2
    fixed = dataclasses.replace(free, convolution="xla", derivative="plain")
    assert candidate_plans(fixed, "cpu") == [Plan("xla", "plain", 1)]


def test_the_fastest_plan_is_chosen(monkeypatch):
    seconds = {"im2col": 0.2, "xla": 0.1}
    monkeypatch.setattr("jaxfi.training._plan.seconds_per_step", lambda run, *_: seconds[run])
    config = dataclasses.replace(SMALL, convolution="auto", alpha=0.0)
    make = lambda plan: plan.convolution  # noqa: E731
    assert choose_plan(config, make, None, None, 10_000)[0].convolution == "xla"
    assert choose_plan(config, make, None, None, 10)[0].convolution == "im2col"


# The loop


def test_training_learns_and_keeps_its_history(dataset, tmp_path):
    config = dataclasses.replace(SMALL, epochs=4, alpha=0.0, augment=None, schedule="constant")
    result = train(SmallNetwork(), dataset, config, workdir=tmp_path)
    assert [record.epoch for record in result.history] == [1, 2, 3, 4]
    assert result.history[-1].train_loss < result.history[0].train_loss
    with (tmp_path / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["test_accuracy"]) == result.history[-1].test_accuracy
    assert list((tmp_path / "tensorboard").iterdir())
    assert_equal_bits(load_variables(tmp_path), result.variables)
    best = load_variables(tmp_path / "checkpoints" / "best")
    assert jax.tree.structure(best) == jax.tree.structure(result.variables)


def test_test_metrics_equal_a_direct_evaluation(dataset):
    result = train(SmallNetwork(), dataset, dataclasses.replace(SMALL, epochs=1))
    pixels = (dataset.test_images / 255 - 0.5) / 0.5
    logits = np.asarray(SmallNetwork().apply(result.variables, pixels.astype(np.float32)))
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(30), dataset.test_labels]
    assert result.history[0].test_accuracy == (logits.argmax(-1) == dataset.test_labels).mean()
    np.testing.assert_allclose(result.history[0].test_loss, losses.mean(), rtol=1e-5)


@pytest.mark.parametrize(  # the saves are after steps 10 and 11 of each of three epochs
    "kill_at, schedule",
    [(2, "step")] + [pytest.param(*case, marks=pytest.mark.slow)
                     for case in ((1, "step"), (3, "plateau"), (5, "cosine"))],
)  # fmt: skip
def test_killed_and_resumed_equals_never_stopped(kill_at, schedule, dataset, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, checkpoint_every=0.0, schedule=schedule, decay_every=1)
    whole = train(SmallNetwork(), dataset, config)
    kill_after_saves(kill_at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(SmallNetwork(), dataset, config, workdir=tmp_path)
    monkeypatch.undo()
    resumed = train(SmallNetwork(), dataset, config, workdir=tmp_path)
    assert_equal_bits(resumed.variables, whole.variables)
    assert timeless(resumed.history) == timeless(whole.history)
    finished = (tmp_path / "training.csv").read_bytes()
    again = train(SmallNetwork(), dataset, config, workdir=tmp_path)
    assert_equal_bits(again.variables, whole.variables)
    assert (tmp_path / "training.csv").read_bytes() == finished


def kill_after_saves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops the training right after checkpoint `number` of checkpoints/last is on the disk."""
    save, saved = loop.save_checkpoint, []

    def save_then_die(folder, tree, info):
        save(folder, tree, info)
        saved.extend([folder] if folder.name == "last" else [])
        if len(saved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)


def timeless(history: list) -> list:
    return [record._replace(seconds=0.0) for record in history]


def assert_equal_bits(tree, expected) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_alpha_changes_neither_initialisation_nor_batches(dataset, monkeypatch):
    orders, starts = [], []
    monkeypatch.setattr(loop, "epoch_batches", recorded(loop.epoch_batches, orders))
    monkeypatch.setattr(loop, "initial_state", recorded(loop.initial_state, starts))
    for alpha in (0.0, 0.02):
        config = dataclasses.replace(SMALL, alpha=alpha, epochs=1)
        train(SmallNetwork(), dataset, config)
    np.testing.assert_array_equal(orders[0].order, orders[-1].order)
    assert (jax.random.key_data(orders[0].key) == jax.random.key_data(orders[-1].key)).all()


def recorded(function, results: list):
    """The function, with its results kept."""

    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


def test_epochs_are_different_permutations(dataset):
    train_set = (jnp.array(dataset.train_images), jnp.array(dataset.train_labels))
    orders = [np.asarray(loop.epoch_batches(train_set, 0, epoch).order) for epoch in range(2)]
    assert all(sorted(order) == list(range(90)) for order in orders)
    assert (orders[0] != orders[1]).any()


def test_one_compilation_serves_all_epochs(dataset):
    model = SmallNetwork()
    _, run_steps = loop._choose(model, dataset, SMALL, None, Plan("im2col", "fast", 10)._asdict())
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    state = loop.initial_state(variables, SMALL)
    train_set = (jnp.array(dataset.train_images), jnp.array(dataset.train_labels))
    for epoch, rate in enumerate((0.1, 0.01)):
        batches = loop.epoch_batches(train_set, 0, epoch)
        for start, stop in ((0, 10), (10, 11)):
            state = run_steps(state, batches, jnp.float32(rate), start, stop)
    assert run_steps._cache_size() == 1


def test_non_finite_loss_names_alpha_epoch_and_step(dataset, tmp_path):
    config = dataclasses.replace(
        SMALL, optimizer="sgd", learning_rate=1e30, alpha=0.5, schedule="constant"
    )
    with pytest.raises(FloatingPointError, match=r"alpha=0\.5, epoch 1, step [2-5] of 11"):
        train(SmallNetwork(), dataset, config, workdir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs is 0; allowed: integers >= 1"),
        ({"alpha": -1.0}, "alpha is -1.0; allowed: finite numbers >= 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; allowed: adadelta"),
        ({"schedule": "linear"}, "schedule is 'linear'; allowed: constant, step"),
        ({"convolution": "fft"}, "convolution is 'fft'; allowed: auto, xla, im2col"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; allowed: finite numbers > 0"),
        ({"augment": AffineRanges(rotation=-1.0)}, "augmentation rotation is -1.0"),
        ({"batch_size": 91}, "batch_size is 91; allowed: up to the 90 training images"),
    ],
)
def test_bad_settings(change, message, dataset, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(SmallNetwork(), dataset, dataclasses.replace(SMALL, **change), workdir=folder)
    assert not folder.exists()


def test_another_training_in_the_folder_is_refused(dataset, tmp_path):
    config = dataclasses.replace(SMALL, epochs=1)
    train(SmallNetwork(), dataset, config, workdir=tmp_path)
    other = dataclasses.replace(config, seed=5)
    with pytest.raises(ValueError, match="another training: seed is 0 there and 5 here"):
        train(SmallNetwork(), dataset, other, workdir=tmp_path)
    with pytest.raises(ValueError, match="is of another training: .* there"):
        train(nn.Sequential([lambda x: x.mean((1, 2)), nn.Dense(10)]), dataset, config,
              workdir=tmp_path)  # fmt: skip
