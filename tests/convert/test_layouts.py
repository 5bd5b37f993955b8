"""PyTorch's layers and Flax's with the converted weights put out the same; so do the indices."""

from __future__ import annotations

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from safetensors.numpy import save_file

from jaxfi.convert import from_torch, load_state, read_fault_list, read_results, to_torch
from jaxfi.models import MODELS

RANDOM = np.random.default_rng(0)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def transposed(rank: int, transpose_kernel: bool):
    kernel = (2, 3, 4)[:rank]
    there = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
    kind = "conv_transpose_kernel" if transpose_kernel else "conv_transpose"
    features = 5
    here = nn.ConvTranspose(features, kernel, strides=(1,) * rank, padding="VALID",
                            transpose_kernel=transpose_kernel)  # fmt: skip
    return here, there[rank](3, features, kernel), (2, *(5, 6, 4)[:rank], 3), {"layer": kind}


def convolution(rank: int, groups: int = 1, outputs: int = 4):
    kernel = (2, 3, 1)[:rank]
    there = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[rank]
    here = nn.Conv(
        outputs, kernel, padding="VALID", feature_group_count=groups, strides=(2,) * rank
    )
    module = there(4, outputs, kernel, stride=2, groups=groups)
    return here, module, (2, *(5, 6, 4)[:rank], 4), {}


LAYERS = {
    "linear": lambda: (nn.Dense(3), torch.nn.Linear(4, 3), (2, 4), {}),
    "square linear": lambda: (nn.Dense(4), torch.nn.Linear(4, 4), (2, 4), {}),
    **{f"conv{rank}d": (lambda r=rank: convolution(r)) for rank in (1, 2, 3)},
    "grouped": lambda: convolution(2, groups=2),
    "depthwise": lambda: convolution(2, groups=4, outputs=8),
    **{
        f"up{r}d {k}": (lambda r=r, k=k: transposed(r, k)) for r in (1, 2, 3) for k in (False, True)
    },
    "layer norm": lambda: (nn.LayerNorm(epsilon=1e-5), torch.nn.LayerNorm(4), (2, 4), {}),
    "group norm": lambda: (nn.GroupNorm(2, epsilon=1e-5), torch.nn.GroupNorm(2, 4), (2, 3, 4), {}),
}


class Wrapped(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.inner.clone(name="layer", parent=self)(x)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_pytorchs(name: str) -> None:
    here, there, shape, kinds = LAYERS[name]()
    module = Wrapped(here)
    x = RANDOM.normal(size=shape).astype(np.float32)
    like = jax.eval_shape(module.init, jax.random.key(0), x)
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.copy_(torch.from_numpy(RANDOM.normal(size=parameter.shape)))
    state = {f"layer.{k}": v.detach().numpy() for k, v in there.state_dict().items()}
    variables = from_torch(state, like, kinds=kinds, check=(there, module.apply, x))
    with torch.no_grad():
        expected = there(channels_first(x) if len(shape) > 2 else torch.from_numpy(x)).numpy()
    found = np.asarray(module.apply(variables, x))
    found = np.moveaxis(found, -1, 1) if len(shape) > 2 else found
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    back = to_torch(variables, kinds=kinds)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)


def test_nnx_paths() -> None:
    like = {"fc": {"kernel": {"value": np.zeros((3, 2), np.float32)}}}
    weights = RANDOM.normal(size=(2, 3)).astype(np.float32)
    tree = from_torch({"fc.weight": weights}, like)
    np.testing.assert_array_equal(tree["fc"]["kernel"]["value"], weights.T)


def test_embedding() -> None:
    there, like = torch.nn.Embedding(4, 4), {"embed": {"embedding": np.zeros((4, 4), np.float32)}}
    tree = from_torch({"embed.weight": there.weight.detach().numpy()}, like)
    np.testing.assert_array_equal(tree["embed"]["embedding"], there.weight.detach().numpy())


@pytest.mark.parametrize("kind", [None, "conv_transpose", "conv_transpose_kernel"])
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 4, 5), (2, 3, 1, 4, 5)])
def test_an_index_names_the_same_weight(kind, shape, tmp_path) -> None:
    like = {"layer": {"kernel": jnp.zeros(shape)}}
    kinds = {"layer": kind} if kind else {}
    state = to_torch(like, kinds=kinds)
    weights = RANDOM.normal(size=state["layer.weight"].shape).astype(np.float32)
    kernel = np.asarray(from_torch({"layer.weight": weights}, like, kinds=kinds)["layer"]["kernel"])
    indices = [tuple(RANDOM.integers(0, weights.shape).tolist()) for _ in range(20)]
    rows = "".join(f'{n},layer,"{index}",30\n' for n, index in enumerate(indices))
    (tmp_path / "f.csv").write_text("Injection,Layer,TensorIndex,Bit\n" + rows)
    faults = read_fault_list(tmp_path / "f.csv", like, kinds=kinds)
    for index, place in zip(indices, faults.indices(), strict=True):
        assert kernel[place] == weights[index]


def test_a_flattened_image_is_not_guessed() -> None:
    like = {"conv": {"kernel": np.zeros((3, 3, 1, 8), np.float32)},
            "head": {"kernel": np.zeros((8 * 9, 5), np.float32)}}  # fmt: skip
    state = {"conv.weight": RANDOM.normal(size=(8, 1, 3, 3)).astype(np.float32),
             "head.weight": RANDOM.normal(size=(5, 72)).astype(np.float32)}  # fmt: skip
    with pytest.raises(ValueError, match=r"head may read a flattened image.*\{'head': 8\}.*\{\}"):
        from_torch(state, like)
    module = torch.nn.Sequential()
    conv, head = torch.nn.Conv2d(1, 8, 3, bias=False), torch.nn.Linear(72, 5, bias=False)
    conv.weight.data, head.weight.data = (torch.from_numpy(a) for a in state.values())
    module = torch.nn.Sequential(conv, torch.nn.Flatten(), head)

    def apply_fn(p, x):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID",
                                         dimension_numbers=layout)  # fmt: skip
        return x.reshape(len(x), -1) @ p["head"]["kernel"]

    images = RANDOM.normal(size=(2, 5, 5, 1)).astype(np.float32)
    from_torch(state, like, flattened={"head": 8}, check=(module, apply_fn, images))
    with pytest.raises(ValueError, match="differ by .* a dense layer that reads a flattened image"):
        from_torch(state, like, flattened={}, check=(module, apply_fn, images))


@pytest.mark.parametrize("name", list(MODELS))
def test_jaxfis_own_networks_need_no_word(name: str) -> None:
    image = jnp.zeros((1, 32, 32, 3))
    like = jax.eval_shape(MODELS[name]().init, jax.random.key(0), image)
    to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like))


@pytest.mark.parametrize(
    "like, message",
    [
        ({"query": {"kernel": np.zeros((8, 2, 4))}}, "query/kernel is an attention's dense layer"),
        ({"a": {"kernel": np.zeros((1,) * 6)}}, "a/kernel has 6 axes"),
        ({"a": {"scale": np.zeros((2, 3))}}, "a/scale has 2 axes: allowed for a scale is 1"),
        ({"a": {"embedding": np.zeros(3)}}, "a/embedding has 1 axes"),
        ({"a": {"recurrent": np.zeros(3)}}, "a/recurrent has no PyTorch name"),
    ],
)
def test_what_the_map_does_not_know_is_named(like, message) -> None:
    with pytest.raises(ValueError, match=message):
        to_torch(like)


def test_a_transposed_convolution_that_is_not_named_is_found_by_its_shape() -> None:
    like = {"up": {"kernel": np.zeros((2, 2, 3, 5), np.float32)}}
    weights = {"up.weight": np.zeros((3, 5, 2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"kinds=\{'up': ...\} says that it is a"):
        from_torch(weights, like)
    with pytest.raises(ValueError, match="allowed are conv_transpose .* of the convolutions up"):
        from_torch(weights, like, kinds={"down": "conv_transpose"})


# Files


STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2)}
WRAPPED = {
    "plain": STATE,
    "net": {"net": STATE, "acc": 92.1},
    "model": {"model": STATE, "epoch": 1},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": {}},
    "lightning": {"state_dict": {f"model.{k}": v for k, v in STATE.items()},
                  "pytorch-lightning_version": "2"},
    "compiled": {f"_orig_mod.{k}": v for k, v in STATE.items()},
    "parallel in net": {"net": {f"module.{k}": v for k, v in STATE.items()}},
    "both": {f"module._orig_mod.{k}": v for k, v in STATE.items()},
    "another name": {"model_state": STATE, "epoch": 1, "best": torch.tensor(0.9)},
    "with an optimizer's": {"params": STATE, "optimizer": torch.optim.Adam(
        [torch.nn.Parameter(torch.ones(2))]).state_dict()},
    "random bits beside": {"state_dict": STATE, "rng_state": torch.get_rng_state()},
    "a tensor beside": {"model": STATE, "class_weights": torch.ones(3)},
    "metrics": {"model": STATE, "metrics": {"acc": torch.tensor(0.5)}},
    "statistics": {"state_dict": STATE, "callbacks": {"n": {"mean": torch.ones(3)}}},
    "deeper": {"checkpoint": {"module": STATE}, "config": {"width": 3}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".ckpt", ".bin"])
def test_wrappers(name, suffix, tmp_path) -> None:
    torch.save(WRAPPED[name], tmp_path / f"x{suffix}")
    state = load_state(tmp_path / f"x{suffix}")
    assert {k: v.tolist() for k, v in state.items()} == {k: v.tolist() for k, v in STATE.items()}


def test_which_of_several_state_dicts_is_not_guessed(tmp_path) -> None:
    torch.save({"model": STATE, "ema": {"inner": STATE}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds several state dicts, model, ema/inner: all"):
        load_state(tmp_path / "x.pt")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_none_of_the_networks(prefix, tmp_path) -> None:
    like = {"fc": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    plain = from_torch(STATE, like)
    arrays = {prefix + name: tensor.numpy() for name, tensor in STATE.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    save_file(arrays, tmp_path / "x.safetensors")
    for state in (arrays, load_state(tmp_path / "x.npz"), load_state(tmp_path / "x.safetensors")):
        jax.tree.map(np.testing.assert_array_equal, from_torch(state, like), plain)
    named = {"module": like}  # a network may have a layer of that name
    back = from_torch(to_torch({"module": plain}), named)
    jax.tree.map(np.testing.assert_array_equal, back, {"module": plain})


@pytest.mark.parametrize("state", [[1], None, 5, {1: np.ones(2)}])
def test_what_is_no_state_is_named(state) -> None:
    with pytest.raises(TypeError, match="allowed is a dict of arrays or tensors by name"):
        from_torch(state, {"fc": {"bias": np.zeros(2, np.float32)}})


def test_floats_that_numpys_files_lose_are_named(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", **{"fc.bias": np.ones(2, jnp.bfloat16)})
    with pytest.raises(ValueError, match="NumPy's files do not say which floats"):
        from_torch(load_state(tmp_path / "x.npz"), {"fc": {"bias": np.zeros(2, np.float32)}})


@pytest.mark.parametrize(
    "tensor, message",
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "fc is qint8"),
        (lambda: torch.eye(3).to_sparse(), "fc is float32, torch.sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "fc is float32, torch.sparse_csr"),
        (lambda: None, "'fc' is a NoneType"),
        (lambda: [1.0], "'fc' is a list"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.sparse|.*quantiz|.*beta state|.*deprecated")
def test_tensors_that_are_no_words(tensor, message, tmp_path) -> None:
    torch.save({"a": torch.ones(1), "fc": tensor()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        load_state(tmp_path / "x.pt")


def test_a_member_that_is_no_array_is_named(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(2))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("notes.txt", "text")
    with pytest.raises(ValueError, match=r"x\.npz: not an \.npz file of arrays: notes.txt is none"):
        load_state(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "int8"])
def test_narrow_dtypes_keep_their_bits(dtype, tmp_path) -> None:
    from safetensors.torch import save_file

    words = torch.arange(0, 96, dtype=torch.uint8)
    tensor = words.view(getattr(torch, dtype))
    torch.save({"w": tensor}, tmp_path / "x.pt")
    save_file({"w": tensor}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        found = load_state(tmp_path / name)["w"]
        assert found.dtype == jnp.dtype(dtype)
        assert found.tobytes() == bytes(range(96))


# Fault lists


PARAMS = {"c": {"kernel": np.zeros((3, 3, 2, 4), np.float32)}}
HEADER = "Injection,Layer,TensorIndex,Bit\n"


@pytest.mark.parametrize(
    "text",
    [
        HEADER + '0,c,"(1, 0, 2, 1)",30\n',
        HEADER + '0,c,"(1,0,2,1)",30\n',
        HEADER + '0,c,"[1, 0, 2, 1]",30\n',
        HEADER + '0,c,"torch.Size([1, 0, 2, 1])",30\n',
        HEADER + '0,c,"(np.int64(1), np.int64(0), np.int64(2), np.int64(1))",30\n',
        HEADER + '0,c,"( 1, 0, 2, 1 )",30.0\n',
        HEADER + '0, c , "(1, 0, 2, 1)", 30 \n',
        HEADER.replace(",", ";") + "0;c;(1, 0, 2, 1);30\n",
        HEADER.replace(",", "\t") + "0\tc\t(1, 0, 2, 1)\t30\n",
        HEADER.lower() + '0,module.c.weight,"(1, 0, 2, 1)",30\n',
        "\ufeff" + HEADER.replace("\n", "\r\n") + '0,c,"(1, 0, 2, 1)",30\r\n\r\n',
        "Bit,TensorIndex,Layer,Injection\n30,25,c,0\n",
    ],
)
def test_dialects(text, tmp_path) -> None:
    (tmp_path / "f.csv").write_text(text, encoding="utf-8", newline="")
    faults = read_fault_list(tmp_path / "f.csv", PARAMS)
    assert (faults.indices(), faults.bit.tolist()) == ([(2, 1, 0, 1)], [30])


def test_kerass_order(tmp_path) -> None:
    (tmp_path / "f.csv").write_text(HEADER + '0,c,"(2, 1, 0, 1)",30\n')
    assert read_fault_list(tmp_path / "f.csv", PARAMS, order="keras").indices() == [(2, 1, 0, 1)]
    with pytest.raises(ValueError, match="unknown order 'tf': allowed are torch, keras"):
        read_fault_list(tmp_path / "f.csv", PARAMS, order="tf")


@pytest.mark.parametrize("numbers", [(0, 0, 1), (3, 4, 3)])
def test_rows_of_one_injection_are_faulty_together(numbers, tmp_path) -> None:
    rows = [f'{number},c,"(1, 0, 2, {n})",30' for n, number in enumerate(numbers)]
    (tmp_path / "f.csv").write_text(HEADER + "\n".join(rows))
    groups = read_fault_list(tmp_path / "f.csv", PARAMS)
    assert groups.sizes.tolist() == [2, 1]
    alone = HEADER.strip() + ",n_injections,masked,non_critical,critical\n"
    (tmp_path / "r.csv").write_text(alone + "\n".join(f"{row},1,1,0,0" for row in rows))
    with pytest.raises(ValueError, match="rows share an Injection"):
        read_results(tmp_path / "r.csv", PARAMS)


def test_a_state_of_tensors_of_any_kind() -> None:
    like = {"fc": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    plain = from_torch(STATE, like)
    layer = torch.nn.Linear(3, 2)
    layer.load_state_dict({"weight": STATE["fc.weight"], "bias": STATE["fc.bias"]})
    trained = dict(torch.nn.ModuleDict({"fc": layer}).named_parameters())  # they need gradients
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in STATE.items()}
    for state in (trained, narrow):
        jax.tree.map(np.testing.assert_array_equal, from_torch(state, like), plain)


def test_values_that_a_state_does_not_have() -> None:
    like = {"fc": {"bias": np.zeros(2, np.float32)}}
    masked = {"fc.bias": np.ma.masked_array([1.0, 2.0], [False, True], np.float32)}
    with pytest.raises(ValueError, match="fc.bias: masked values have no place here"):
        from_torch(masked, like)
    with pytest.raises(ValueError, match="fc.bias is float64, which does not fit in float32"):
        from_torch({"fc.bias": np.ones(2)}, {"fc": {"bias": np.zeros(2, np.float64)}})


@pytest.mark.parametrize(
    "words, message",
    [
        ({"flattened": {"conv": 3}}, "'conv': 3: allowed are dense layers"),
        ({"flattened": {"head": 0}}, "'head': 0: allowed are dense layers"),
        ({"flattened": {"head": 5}}, r"that divide their inputs: head \(12 inputs\)"),
        ({"kinds": {"head": "conv_transpose"}}, "of the convolutions conv"),
    ],
)
def test_words_that_say_nothing(words, message) -> None:
    tree = {"conv": {"kernel": np.zeros((3, 3, 1, 3), np.float32)},
            "head": {"kernel": np.zeros((12, 2), np.float32)}}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        to_torch(tree, **words)


def test_a_dense_layer_of_as_many_inputs_as_it_has_outputs_may_be_flattened() -> None:
    tree = {"conv": {"kernel": np.zeros((3, 3, 1, 4), np.float32)},
            "head": {"kernel": np.zeros((16, 16), np.float32)}}  # fmt: skip
    with pytest.raises(ValueError, match="head"):
        to_torch(tree)
