"""Neuron faults against PyTorch's forward hooks, and through campaigns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from jaxfi.campaign import run_campaign
from jaxfi.faults import FaultList, exhaustive_faults, sample_faults
from jaxfi.models._layers import BatchNorm, convolution, dense
from jaxfi.network import (
    inject_neurons,
    neuron_faults,
    neuron_outputs,
    with_neuron_words,
    with_random_values,
)
from jaxfi.report import write_report
from jaxfi.report.figures import critical_by_layer, outcomes_by_bit
from jaxfi.report.tables import table_row

BATCH = 6


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(convolution(x, 3, name="conv1", use_bias=True))
        x = nn.relu(BatchNorm(name="bn1")(convolution(x, 4, name="conv2"), train))
        return dense(x.mean((1, 2)), 5, name="fc")


class TorchNetwork(torch.nn.Module):
    def __init__(self, variables):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 5)
        self.load_state_dict(torch_state(variables["params"]), strict=False)
        self.eval()

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.bn1(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def torch_state(params) -> dict[str, torch.Tensor]:
    state = {}
    for name, leaves in params.items():
        for leaf, value in leaves.items():
            value = torch.tensor(np.asarray(value))
            if leaf == "kernel":
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
            state[f"{name}.{leaf if leaf == 'bias' else 'weight'}"] = value
    return state


@pytest.fixture(scope="module")
def variables() -> dict:
    found = Network().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    scale = {"scale": jnp.array([0.5, 1, 2, 1.5]), "bias": jnp.array([0.1, 0, -0.2, 0.3])}
    return {**found, "params": {**found["params"], "bn1": scale}}


@pytest.fixture(scope="module")
def apply_fn(variables):
    def apply(params, images):
        return Network().apply({**variables, "params": params}, images)

    return apply


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(BATCH, 8, 8, 1)).astype(np.float32)


def hooked(variables, images, layer: str, write) -> np.ndarray:
    """PyTorch's outputs with `write(output)` applied in a forward hook, channels last."""
    network = TorchNetwork(variables)

    def hook(module, inputs, output):
        moved = output.permute(0, 2, 3, 1).contiguous() if output.ndim == 4 else output.clone()
        write(moved.numpy())
        return moved.permute(0, 3, 1, 2) if output.ndim == 4 else moved

    getattr(network, layer).register_forward_hook(hook)
    with torch.no_grad():
        return network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()


SITES = [("conv1", (2, 3, 1)), ("conv2", (0, 0, 3)), ("bn1", (7, 7, 0)), ("fc", (4,))]


@pytest.mark.parametrize("layer, index", SITES)
@pytest.mark.parametrize("model, bit, value", [
    ("zero", None, None), ("value", None, 7.5), ("bit-flip", 30, None), ("bit-flip", 22, None),
])  # fmt: skip
def test_neuron_faults_equal_a_forward_hook(
    layer, index, model, bit, value, variables, apply_fn, images
):
    neurons = neuron_outputs(apply_fn, variables["params"], images)
    faults = FaultList.from_sites([(layer, index, bit)], neurons, model=model, value=value)
    faulty = jax.jit(inject_neurons(apply_fn, neurons, faults.fault(0)))

    def write(output):
        where = (slice(None), *index)
        words = output.view(np.uint32)
        words[where] = {
            "zero": lambda w: np.zeros_like(w),
            "value": lambda w: np.full_like(w, np.float32(7.5).view(np.uint32)),
            "bit-flip": lambda w: w ^ np.uint32(1 << (bit or 0)),
        }[model](words[where])

    expected = hooked(variables, images, layer, write)
    ours = np.asarray(faulty(variables["params"], images))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    clean = np.asarray(apply_fn(variables["params"], images))
    assert not np.array_equal(ours, clean)


def test_each_image_has_its_own_fault(variables, apply_fn, images):
    neurons = neuron_outputs(apply_fn, variables["params"], images, per_image=True)
    assert neurons["conv1"].shape == (BATCH, 8, 8, 3)
    indices = [(image, image, 7 - image, image % 3) for image in range(BATCH)]
    faults = FaultList.from_sites([("conv1", index, None) for index in indices], neurons,
                                  model="value", value=9.0)  # fmt: skip
    faulty = inject_neurons(apply_fn, neurons, faults.batch(), per_image=True)

    def write(output):
        for index in indices:
            output[index] = 9.0

    expected = hooked(variables, images, "conv1", write)
    ours = faulty(variables["params"], images)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_without_faults_no_bit_changes(variables, apply_fn, images):
    neurons = neuron_outputs(apply_fn, variables["params"], images)
    faulty, tree = with_neuron_words(apply_fn, variables["params"], neurons)
    clean = jax.jit(apply_fn)(variables["params"], images)
    np.testing.assert_allclose(jax.jit(faulty)(tree, images), clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "engine", ["fast", "reference", pytest.param("vmap", marks=pytest.mark.slow)]
)
def test_campaign_equals_injection_and_forward_hook(engine, variables, apply_fn, images):
    params = variables["params"]
    neurons = neuron_outputs(apply_fn, params, images, layers="[cf]*")
    crashes = sample_faults(0, neurons, 6, model="zero")
    flips = sample_faults(1, neurons, 10, model="bit-flip")
    random = with_random_values(crashes, 0, -5, 5)
    faults = crashes + flips + random
    faulty, tree = with_neuron_words(apply_fn, params, neurons)
    labels = np.asarray(apply_fn(params, images)).argmax(-1)
    campaign = run_campaign(
        faulty, tree, neuron_faults(faults, tree), images, labels, engine=engine, batch_size=3
    )
    clean = np.asarray(apply_fn(params, images))
    for row in range(len(faults)):
        one = np.asarray(inject_neurons(apply_fn, neurons, faults.fault(row))(params, images))
        hit = int(faults.leaf[row])
        layer, index = faults.paths[hit], faults.indices()[row]

        def write(output, row=row, index=index):
            where = (slice(None), *index)
            if faults.bit[row] >= 0:
                output.view(np.uint32)[where] ^= np.uint32(1 << int(faults.bit[row]))
            else:
                output[where] = 0 if row < len(crashes) else np.float32(faults.value[row])

        expected = hooked(variables, images, layer, write)
        finite = np.isfinite(expected).all(-1)
        np.testing.assert_allclose(one[finite], expected[finite], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(~finite, campaign.due[row])
        critical = (one.argmax(-1) != clean.argmax(-1)) | np.isnan(one).any(-1)
        np.testing.assert_array_equal(campaign.outcomes[row] == 2, critical)


def test_engines_agree_on_neuron_faults(variables, apply_fn, images):
    params = variables["params"]
    neurons = neuron_outputs(apply_fn, params, images)
    faults = sample_faults(3, neurons, 40, model="bit-flip")
    faulty, tree = with_neuron_words(apply_fn, params, neurons)
    labels = np.zeros(BATCH, np.int32)
    fast, reference = (
        run_campaign(faulty, tree, neuron_faults(faults, tree), images, labels, engine=engine)
        for engine in ("fast", "reference")
    )
    np.testing.assert_array_equal(fast.outcomes, reference.outcomes)
    assert len(set(fast.outcomes.reshape(-1).tolist())) > 1
    figure = outcomes_by_bit({"neurons": fast})
    assert "exponent" in [text.get_text() for text in figure.axes[0].texts]
    row = table_row(fast, dataset="made up", model="small", loss="default", optimizer="none",
                    epochs=0, alpha=0.0)  # fmt: skip
    assert row.rates.masked.value == pytest.approx((fast.outcomes == 0).mean())
    layers = {part.name for part in fast.rates(by="layer")}
    assert layers <= {f"neurons/{name}" for name in neurons}
    (axes,) = critical_by_layer({"neurons": fast}).axes
    drawn = {label.get_text().partition(" ")[0] for label in axes.get_yticklabels()}
    assert drawn == layers


def test_a_census_of_crashes_knows_its_population(variables, apply_fn, images, tmp_path):
    params = variables["params"]
    neurons = neuron_outputs(apply_fn, params, images, layers="fc")
    crashes = exhaustive_faults(neurons, model="zero")
    flips = sample_faults(0, neurons, 3, model="bit-flip")
    faulty, tree = with_neuron_words(apply_fn, params, neurons)
    assert neuron_faults(crashes, tree).population == 5
    assert neuron_faults(flips, tree).population == 5 * 32
    assert neuron_faults(flips[:2], tree).drawn_from is None
    campaign = run_campaign(
        faulty, tree, neuron_faults(crashes, tree), images, np.zeros(BATCH, int), workdir=tmp_path
    )
    masked = campaign.rates().masked
    assert masked.low == masked.value == masked.high == (campaign.outcomes == 0).mean()
    page = write_report(tmp_path).read_text()
    assert "neurons/fc" in page


def test_faults_of_single_images_run_through_a_campaign(variables, apply_fn, images):
    params = variables["params"]
    neurons = neuron_outputs(apply_fn, params, images, per_image=True)
    sites = [("conv1", (image, 2, 2, 1), None) for image in range(BATCH)]
    faults = FaultList.from_sites(sites, neurons, model="value", value=50.0)
    faulty, tree = with_neuron_words(apply_fn, params, neurons, per_image=True)
    labels = np.zeros(BATCH, np.int32)
    campaign = run_campaign(
        faulty, tree, neuron_faults(faults, tree), images, labels, batch_size=BATCH
    )
    changed = campaign.outcomes > 0
    np.testing.assert_array_equal(changed, np.eye(BATCH, dtype=bool))


class Shared(nn.Module):
    """A convolution that is called three times, twice without anything between."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = convolution(x, 3, name="stem", use_bias=True)
        shared = nn.Conv(3, (3, 3), padding=1, name="shared")
        x = shared(shared(nn.relu(shared(x))))
        return dense(x.mean((1, 2)), 5, name="fc")


class TorchShared(torch.nn.Module):
    def __init__(self, params):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.shared = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.fc = torch.nn.Linear(3, 5)
        self.load_state_dict(torch_state(params))

    def forward(self, x):
        x = self.shared(self.shared(torch.relu(self.shared(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def shared() -> dict:
    return Shared().init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]


def apply_shared(params, images):
    return Shared().apply({"params": params}, images)


def hooked_call(params, images, index, call: int | None) -> np.ndarray:
    """PyTorch's outputs where a hook writes 9 at `index`, in each call or in one, from 1."""
    network, seen = TorchShared(params), []

    def hook(module, inputs, output):
        seen.append(output)
        if call in (None, len(seen)):
            row, column, channel = index
            output[:, channel, row, column] = 9.0
        return output

    network.shared.register_forward_hook(hook)
    with torch.no_grad():
        outputs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert len(seen) == 3
    return outputs


@pytest.mark.parametrize("call", [None, 1, 2, 3])
def test_a_layer_called_often_is_hit_in_each_call_or_in_one(call, shared, images):
    neurons = neuron_outputs(apply_shared, shared, images, by_call=call is not None)
    apart = [f"shared#{number}" for number in (1, 2, 3)]
    assert [*neurons] == ["fc", *(["shared"] if call is None else apart), "stem"]
    layer, index = "shared" if call is None else f"shared#{call}", (2, 5, 1)
    faults = FaultList.from_sites([(layer, index, None)], neurons, model="value", value=9.0)
    expected = hooked_call(shared, images, index, call)
    faulty = inject_neurons(apply_shared, neurons, faults.fault(0))
    np.testing.assert_allclose(faulty(shared, images), expected, rtol=1e-4, atol=1e-5)
    words_fn, tree = with_neuron_words(apply_shared, shared, neurons)
    labels = np.asarray(apply_shared(shared, images)).argmax(-1)
    faults = neuron_faults(faults + faults, tree)
    for engine in ("fast", "reference"):
        campaign = run_campaign(words_fn, tree, faults, images, labels, engine=engine)
        np.testing.assert_array_equal(campaign.outcomes[0] == 2, expected.argmax(-1) != labels)
        assert (campaign.outcomes > 0).all()


def test_calls_of_several_shapes_need_names_of_their_own():
    params = {"shared": {"w": jnp.eye(2), "b": jnp.ones(2)}, "last": {"w": jnp.ones((2, 3))}}

    def apply(params, images):
        def shared(x):
            x = x @ params["shared"]["w"]
            return x + jnp.broadcast_to(params["shared"]["b"], x.shape)

        return shared(shared(images).mean(1)) @ params["last"]["w"]

    images = np.ones((4, 5, 2), np.float32)
    shapes = r"float32\[4,2\] and float32\[4,5,2\]"
    with pytest.raises(ValueError, match=f"shared is called 2 times, with outputs {shapes}: name"):
        neuron_outputs(apply, params, images)
    neurons = neuron_outputs(apply, params, images, by_call=True)
    assert {name: shape.shape for name, shape in neurons.items()} == {
        "last": (3,), "shared#1": (5, 2), "shared#2": (2,),
    }  # fmt: skip
    crash = FaultList.from_sites([("shared#1", (4, 0), None)], neurons, model="zero")
    faulty = inject_neurons(apply, neurons, crash.fault(0))(params, images)
    np.testing.assert_allclose(faulty, np.full((4, 3), (2 * 4 / 5 + 1) + 3), rtol=1e-6)


def test_a_layer_in_a_loop_is_refused(images):
    params = {"cell": {"w": jnp.eye(8) * 0.5}, "fc": {"w": jnp.ones((8, 5))}}

    def apply(params, images):
        x, _ = jax.lax.scan(
            lambda x, _: (jnp.tanh(x @ params["cell"]["w"]), None), images[..., 0].sum(1), None, 3
        )
        return x @ params["fc"]["w"]

    with pytest.raises(ValueError, match="layer cell is called inside a loop or a branch"):
        neuron_outputs(apply, params, images)
    assert [*neuron_outputs(apply, params, images, layers="f*")] == ["fc"]


def test_errors_name_what_is_allowed(variables, apply_fn, images):
    with pytest.raises(ValueError, match=r"no layer matches 'x': the layers are "):
        neuron_outputs(apply_fn, variables["params"], images, layers="x")
    neurons = neuron_outputs(apply_fn, variables["params"], images)
    _, tree = with_neuron_words(apply_fn, variables["params"], neurons)
    stuck = FaultList.from_sites([("fc", 0, 3)], neurons, model="stuck-at-1")
    with pytest.raises(ValueError, match="fault model 'stuck-at-1': allowed are zero, value"):
        neuron_faults(stuck, tree)
    with pytest.raises(ValueError, match=r"values from 1 to 0: allowed are finite numbers"):
        with_random_values(stuck, 0, 1, 0)
