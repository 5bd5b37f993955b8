"""Networks of other frameworks as JAX functions: outputs, names, faults one by one, engines.

PyTorch's side of a fault is a copy of the module with the bit flipped in NumPy's words.
"""

from __future__ import annotations

import copy
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import jaxfi
from jaxfi import criteria
from jaxfi.convert import from_equinox, from_keras, from_module, from_nnx
from tests.engine.test_conformance import faults_in_every_leaf

NUM_IMAGES, BATCH = 10, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchax"),
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _other_libraries_promote():
    with jax.numpy_rank_promotion("allow"):
        yield


class Cnn(nn.Module):
    """Convolutions of groups, BatchNorm, pools, a flattened image, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, groups=4), nn.Hardswish(),
        )  # fmt: skip
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8 * 2 * 2, 5)
        self.features[1].running_mean.uniform_(-1, 1)
        self.features[1].running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.features(x).flatten(1)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Embeddings, a mask, PyTorch's own attention; two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.layer(self.table(ids), src_key_padding_mask=mask)
        return {"logits": self.head(x.mean(1)), "states": x}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def images_like(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_IMAGES, *shape)).astype(np.float32)


def with_fault(module: nn.Module, name: str, element: int, bit: int) -> nn.Module:
    faulty = copy.deepcopy(module)
    words = dict(faulty.named_parameters())[name].detach().numpy().reshape(-1).view(np.uint32)
    words[element] ^= np.uint32(1 << bit)
    return faulty


def assert_faults_are_pytorchs(module: nn.Module, inputs: Any, of: str | None = None) -> None:
    apply_fn, params = from_module(module, jax.tree.map(lambda a: a[:3], inputs))
    assert set(params) == {name for name, _ in module.named_parameters()}
    faults = faults_in_every_leaf(params)
    faults = faults[faults.model == 0]
    network = jax.jit(apply_fn)
    tensors = [torch.from_numpy(a) for a in (inputs if isinstance(inputs, tuple) else (inputs,))]
    for row in range(len(faults)):
        name, element = faults.paths[faults.leaf[row]], int(faults.element[row])
        found = network(jaxfi.inject(params, faults.fault(row)), inputs)
        with torch.no_grad():
            expected = with_fault(module, name, element, int(faults.bit[row]))(*tensors)
        here, there = (v if of is None else v[of] for v in (found, expected))
        here, there = np.asarray(here), there.numpy()
        finite = np.isfinite(there) & (np.abs(there) < 1e30)
        scale = np.max(np.abs(there[finite]), initial=1.0)
        np.testing.assert_allclose(here[finite], there[finite], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("make, shape", [(Cnn, (3, 8, 8)), (Lstm, (4, 6)), (Tied, (6,))])
def test_faults_do_what_they_do_in_pytorch(make: Callable, shape: tuple[int, ...]) -> None:
    assert_faults_are_pytorchs(made(make), images_like(*shape))


def attention_inputs() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mask = random.random((NUM_IMAGES, 6)) < 0.3
    mask[:, 0] = False
    return random.integers(0, 11, (NUM_IMAGES, 6)), mask


def test_several_inputs_and_outputs() -> None:
    assert_faults_are_pytorchs(made(Attention), attention_inputs(), of="logits")


@pytest.mark.parametrize(
    "make, inputs, asked",
    [
        (Cnn, images_like(3, 8, 8), None),
        (Lstm, images_like(4, 6), None),
        pytest.param(
            Attention,
            attention_inputs(),
            {"sdc1": criteria.on("logits", criteria.argmax)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cnn", "lstm", "attention"],
)
def test_fast_is_reference(make: Callable, inputs: Any, asked: dict | None) -> None:
    apply_fn, params = from_module(made(make), jax.tree.map(lambda a: a[:3], inputs))
    faults = faults_in_every_leaf(params)
    fast, reference = (
        jaxfi.run_campaign(apply_fn, params, faults, inputs, None, engine=engine, criteria=asked,
                           batch_size=BATCH)
        for engine in ("fast", "reference")
    )  # fmt: skip
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.due, reference.due)
    assert len(np.unique(fast.outcomes)) > 1


def test_buffers_are_leaves_on_request() -> None:
    module, images = made(Cnn), images_like(3, 8, 8)
    apply_fn, params = from_module(module, images[:2], buffers=True)
    running = {name for name in params if "running" in name}
    assert running == {"features.1.running_mean", "features.1.running_var"}
    assert not any("num_batches" in name for name in params)
    moved = {**params, "features.1.running_mean": params["features.1.running_mean"] + 1}
    other = copy.deepcopy(module)
    other.features[1].running_mean += 1
    with torch.no_grad():
        expected = other(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(apply_fn(moved, images), expected, rtol=1e-4, atol=1e-5)


def test_the_module_and_settings_stay_as_they_are() -> None:
    module, images = made(Cnn), images_like(3, 8, 8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    settings = dict(jax.config.values)
    apply_fn, params = from_module(module, torch.from_numpy(images[:2]))
    with torch.no_grad():
        module.head.weight.zero_()  # the function was made before
    with_head = np.asarray(apply_fn(params, images))
    module.load_state_dict(before)
    np.testing.assert_array_equal(with_head, apply_fn(params, images))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert {k: v for k, v in jax.config.values.items() if v != settings.get(k)} == {}


class Keeps(nn.Module):
    """Counts its calls, keeps what it computed, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.kept = nn.Linear(6, 3), 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = x.clone() if self.kept is None and x.device.type == "cpu" else x
        self.kept = self.linear(x)
        return self.kept * 2


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.sub_(1.0).div_(2.0))


def test_the_module_and_the_example_stay_as_they_are() -> None:
    module, example = made(Keeps), torch.ones(4, 6)
    apply_fn, params = from_module(module, example)
    jaxfi.run_campaign(apply_fn, params, jaxfi.sample_faults(0, params, 5), images_like(6), None)
    assert module.calls == 0
    assert module.kept is None
    from_module(made(Writes), example)
    assert torch.equal(example, torch.ones(4, 6))


def test_what_is_done_to_the_module_later_changes_nothing() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    apply_fn, params = from_module(module.eval(), images_like(6)[:4])
    before = np.asarray(apply_fn(params, images_like(6)))
    module.train()
    module[2] = nn.ReLU()
    np.testing.assert_array_equal(before, apply_fn(params, images_like(6)))


def test_words_that_would_be_cut_and_16_bit_ones() -> None:
    with pytest.raises(ValueError, match="weight is float64, which JAX cuts to 32 bits"):
        from_module(made(lambda: nn.Linear(6, 3)).double(), np.ones((2, 6)))
    narrow = made(lambda: nn.Linear(6, 3)).bfloat16()
    _, params = from_module(narrow, torch.ones(2, 6, dtype=torch.bfloat16))
    assert {str(value.dtype) for value in params.values()} == {"bfloat16"}
    with pytest.raises(ValueError, match="has no parameters"):
        from_module(made(nn.ReLU), np.ones((2, 6), np.float32))


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 3), torch.full((3,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def test_plain_attributes_are_to_be_buffers() -> None:
    with pytest.raises(ValueError, match=r"must be a buffer \(register_buffer\)"):
        from_module(made(Attribute), images_like(6)[:2])


class Branches(Cnn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(x) * 2


class Caches(Cnn):
    def forward(self, x: torch.Tensor) -> dict:
        return {"logits": super().forward(x), "cache": types.SimpleNamespace()}


class Counts(Cnn):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counts.calls += 1
        return super().forward(x) * Counts.calls


@pytest.mark.parametrize(
    "module, error, message",
    [
        (lambda: made(Branches), ValueError, r"Branches cannot be traced at .*test_modules.py:\d+"),
        (lambda: Cnn(), ValueError, "the module is in training mode: allowed is module.eval"),
        (lambda: made(Caches), TypeError, "the module puts out a SimpleNamespace: allowed are"),
        (lambda: made(Counts), ValueError, "of PyTorch and of the converted network differ by"),
        (lambda: "resnet18", TypeError, "module is a str: allowed is a torch.nn.Module"),
    ],
)
def test_what_cannot_be_converted_is_said(module: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        from_module(module(), images_like(3, 8, 8))


def test_part_in_training_mode_is_named() -> None:
    module = made(Cnn)
    module.features[1].train()
    with pytest.raises(ValueError, match="features.1 is in training mode"):
        from_module(module, images_like(3, 8, 8))


@pytest.fixture(scope="module")
def torchvision() -> Any:
    """Its classifiers need none of its compiled operators, which PyPI's build has for another build
    of PyTorch: what they are called is enough to import it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return torchvision


def small_vit(models: Any) -> nn.Module:
    return models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=5,
    )  # fmt: skip


VISION: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "vit": (small_vit, 16),
    **{
        name: (lambda models, name=name: getattr(models, name)(num_classes=5), 32)
        for name in ("resnet18", "mobilenet_v2", "densenet121", "efficientnet_b0", "convnext_tiny")
    },
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in VISION])
def test_vision_networks(name: str, torchvision: Any) -> None:
    make, size = VISION[name]
    images = images_like(3, size, size)[:6]
    apply_fn, params = from_module(made(lambda: make(torchvision.models)), images[:2])
    # Of each leaf of a small network a few faults, of a large one twenty faults.
    faults = faults_in_every_leaf(params)[:: 1 if name == "vit" else len(params) // 5]
    fast, reference = (
        jaxfi.run_campaign(apply_fn, params, faults, images, None, engine=engine, batch_size=3)
        for engine in ("fast", "reference")
    )
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.due, reference.due)
    assert len(np.unique(fast.outcomes)) > 1


def bert() -> nn.Module:
    import transformers

    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=4,
    ))  # fmt: skip


def gpt() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, asked", [(bert, criteria.argmax), (gpt, criteria.next_token)], ids=["bert", "gpt"]
)
@pytest.mark.usefixtures("torchvision")  # which transformers import
def test_language_networks(make: Callable, asked: criteria.Criterion) -> None:
    random = np.random.default_rng(0)
    mask = np.ones((NUM_IMAGES, 7), np.int64)
    mask[::2, 5:] = 0
    inputs = {"input_ids": random.integers(0, 30, (NUM_IMAGES, 7)), "attention_mask": mask}
    module = made(make)
    apply_fn, params = from_module(module, {name: array[:3] for name, array in inputs.items()})
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    found = apply_fn(params, inputs)
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), rtol=1e-3, atol=1e-4)
    faults = faults_in_every_leaf(params)[::2]
    fast, reference = (
        jaxfi.run_campaign(apply_fn, params, faults, inputs, None, engine=engine, batch_size=BATCH,
                           criteria={"mine": criteria.on("logits", asked)})
        for engine in ("fast", "reference")
    )  # fmt: skip
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.criteria["mine"], reference.criteria["mine"])


def test_keras() -> None:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() != "jax":
        pytest.skip("keras was imported with another backend")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(6, 3, activation="relu"),
        keras.layers.BatchNormalization(), keras.layers.MaxPooling2D(), keras.layers.Flatten(),
        keras.layers.Dropout(0.5), keras.layers.Dense(5),
    ])  # fmt: skip
    images = images_like(8, 8, 3)
    apply_fn, params = from_keras(model, images[:3])
    assert set(params) == {v.path for v in model.trainable_variables}
    faults = faults_in_every_leaf(params)
    network = jax.jit(apply_fn)
    for row in range(0, len(faults), 3):
        leaf = faults.paths[faults.leaf[row]]
        faulty = keras.models.clone_model(model)
        faulty.set_weights(model.get_weights())
        both = zip(faulty.variables, model.variables, strict=True)
        (variable,) = [v for v, w in both if w.path == leaf]
        variable.assign(jaxfi.inject(params, faults.fault(row))[leaf])
        found = network(jaxfi.inject(params, faults.fault(row)), images)
        np.testing.assert_allclose(found, faulty(images, training=False), rtol=1e-4, atol=1e-4)
    assert_engines_agree(apply_fn, params, images)
    with_means = from_keras(model, images[:3], buffers=True)[1]
    assert len(with_means) == len(params) + 2
    with pytest.raises(TypeError, match="model is a dict: allowed is a keras.Model"):
        from_keras({}, images)


def test_nnx() -> None:
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
            return self.head(self.dropout(x))

    module, images = Network(nnx.Rngs(0)), images_like(8, 8, 3)
    apply_fn, params = from_nnx(module, images[:3])
    paths = set(jaxfi.leaf_paths(params))
    assert {"conv/kernel", "norm/scale", "head/bias"} <= paths
    assert not any("mean" in path or "rng" in path for path in paths)
    assert not module.norm.use_running_average  # the copy is in evaluation mode, it is not
    moved = jax.tree.map(jnp.array, params)
    moved["head"]["bias"] = moved["head"]["bias"] + 1
    np.testing.assert_allclose(apply_fn(moved, images), apply_fn(params, images) + 1, rtol=1e-6)
    assert_engines_agree(apply_fn, params, images)
    with_means = from_nnx(module, images[:3], buffers=True)[1]
    assert {"norm/mean", "norm/var"} <= set(jaxfi.leaf_paths(with_means))
    with pytest.raises(TypeError, match="module is a str: allowed is an nnx.Module"):
        from_nnx("x", images)


def test_equinox() -> None:
    import equinox as eqx

    keys = jax.random.split(jax.random.key(0), 2)
    module = eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 5, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Dropout(0.5), eqx.nn.Linear(5 * 36, 4, key=keys[1]),
    ])  # fmt: skip
    images = images_like(3, 8, 8)
    apply_fn, params = from_equinox(module, images[:3])
    assert set(params) == {
        "layers/0/weight", "layers/0/bias", "layers/4/weight", "layers/4/bias"
    }  # fmt: skip
    still = eqx.nn.inference_mode(module)
    np.testing.assert_allclose(apply_fn(params, images), jax.vmap(still)(images), rtol=1e-5)
    assert_engines_agree(apply_fn, params, images)
    with pytest.raises(TypeError, match="module is a dict: allowed is an equinox.Module"):
        from_equinox({}, images)


def test_the_examples_of_the_page_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    page = text.partition("## Modules")[2].partition("## Names and layouts")[0]
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    exec(compile("\n".join(examples), "convert.md", "exec"), {})


def assert_engines_agree(apply_fn: Callable, params: Any, images: np.ndarray) -> None:
    faults = faults_in_every_leaf(params)
    fast, reference = (
        jaxfi.run_campaign(apply_fn, params, faults, images, None, engine=e, batch_size=BATCH)
        for e in ("fast", "reference")
    )
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.due, reference.due)
    assert len(np.unique(fast.outcomes)) > 1
