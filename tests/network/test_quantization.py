"""Quantized words and scales against PyTorch's per-channel quantization and NumPy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxfi
from jaxfi.network import dequantize, quantize, with_quantized_weights

RANDOM = np.random.default_rng(0)


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    "path, shape, axis, channel",
    [("kernel", (3, 4, 5), None, 2), ("fc.weight", (10, 64), None, 0),
     ("weight", (4, 3, 2, 2), None, 0),
     ("fc/weight/value", (6, 5), None, 0), ("kernel", (6, 5), 0, 0), ("kernel", (6, 5), -2, 0),
     ("weight", (6, 5), lambda path: 1, 1)],
)  # fmt: skip
def test_words_and_scales_are_pytorchs(path, shape, axis, channel) -> None:
    weights = RANDOM.normal(size=shape).astype(np.float32)
    tree = {path: weights}
    words, scales = quantize(tree, "*", axis=axis)
    others = tuple(n for n in range(len(shape)) if n != channel)
    expected = np.abs(weights).max(axis=others) / np.float32(127)
    np.testing.assert_allclose(np.asarray(scales[path]).reshape(-1), expected, rtol=1e-6)
    zeros = torch.zeros(shape[channel], dtype=torch.int64)
    there = torch.quantize_per_channel(
        torch.from_numpy(weights),
        torch.from_numpy(np.float64(expected)),
        zeros,
        channel,
        torch.qint8,
    )
    difference = np.asarray(words[path], np.int32) - there.int_repr().numpy()
    assert np.abs(difference).max() <= 1  # a half may round either way in the last bit
    assert (difference != 0).mean() < 0.02
    error = np.abs(np.asarray(dequantize(words, scales)[path]) - weights)
    assert (error <= np.asarray(scales[path]) * 0.5001).all()


def test_vectors_are_left_alone_unless_asked() -> None:
    tree = {"bn.weight": np.ones(16, np.float32), "fc.weight": np.eye(4, dtype=np.float32)}
    words, _ = quantize(tree, "*weight")
    np.testing.assert_array_equal(words["bn.weight"], tree["bn.weight"])
    words, scales = quantize(tree, "*weight", vectors=True)
    assert words["bn.weight"].dtype == jnp.int8
    assert scales["bn.weight"].shape == (1,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad) -> None:
    tree = {"a": {"kernel": np.float32([[1, bad], [2, 1]])}}
    with pytest.raises(ValueError, match="leaf a/kernel holds 1 NaN or Inf"):
        quantize(tree)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            ({"kernel": np.ones((2, 2), np.int8)},),
            TypeError,
            "leaf kernel is int8: allowed are floats of 16 bits or more",
        ),
        (({"w": np.ones((2, 2))},), ValueError, "no leaf matches '.kernel': the leaves are w"),
        (({"kernel": np.ones((2, 2), np.float32)}, "*", 5), ValueError, "axis 5 is outside kernel"),
    ],
)
def test_bad_arguments(arguments, error, message) -> None:
    tree, *rest = arguments
    with pytest.raises(error, match=message):
        quantize(tree, *rest[:1], axis=rest[1] if len(rest) > 1 else None)
    with pytest.raises(ValueError, match="bits is 3: allowed are 8 and 4"):
        quantize({"kernel": np.ones((2, 2), np.float32)}, bits=3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 6e4])
def test_narrow_scales_neither_vanish_nor_overflow(dtype, size) -> None:
    weights = jnp.asarray(RANDOM.uniform(-size, size, (8, 4)), dtype)
    words, scales = quantize({"kernel": weights})
    assert np.isfinite(np.asarray(scales["kernel"], np.float64)).all()
    assert (np.asarray(scales["kernel"], np.float64) > 0).all()
    back = np.asarray(dequantize(words, scales)["kernel"], np.float64)
    scale = np.asarray(scales["kernel"], np.float64)
    assert (np.abs(back - np.asarray(weights, np.float64)) <= scale * 1.6).all()


def test_four_bits_are_the_lower_half_of_a_byte() -> None:
    tree = {"kernel": np.float32([[7, -7], [3, 1]])}
    words, scales = quantize(tree, bits=4)
    assert words["kernel"].tolist() == [[7, -7], [3, 1]]
    faults = jaxfi.exhaustive_faults(words, bits=range(4))
    for row in range(len(faults)):
        faulty = jaxfi.inject(words, faults.fault(row))
        value = int(np.asarray(words["kernel"]).reshape(-1)[faults.element[row]])
        nibble = (value & 15) ^ (1 << int(faults.bit[row]))
        expected = nibble - 16 if nibble > 7 else nibble
        found = np.asarray(dequantize(faulty, scales, bits=4)["kernel"]).reshape(-1)
        assert found[faults.element[row]] == expected
    upper = jaxfi.FaultList.from_sites([("kernel", 0, 6)], words)
    same = dequantize(jaxfi.inject(words, upper.fault(0)), scales, bits=4)
    np.testing.assert_array_equal(same["kernel"], tree["kernel"])
    network = with_quantized_weights(lambda p, x: x @ p["kernel"], scales, bits=4)
    np.testing.assert_array_equal(network(words, np.eye(2, dtype=np.float32)), tree["kernel"])


def test_leaves_of_bytes_that_were_not_quantized_stay() -> None:
    tree = {"kernel": np.float32([[7, -7], [3, 1]]), "table": np.int8([5, -128, 127])}
    back = dequantize(*quantize(tree))
    np.testing.assert_array_equal(back["table"], tree["table"])
    assert back["table"].dtype == np.int8


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_the_largest_number_has_a_finite_scale(dtype) -> None:
    largest = jnp.finfo(dtype).max
    back = dequantize(*quantize({"kernel": jnp.asarray([[largest], [-largest]], dtype)}))
    assert np.isfinite(np.asarray(back["kernel"], np.float64)).all()


def test_a_leaf_without_elements_stays() -> None:
    words, scales = quantize({"kernel": np.zeros((0, 3), np.float32)})
    assert dequantize(words, scales)["kernel"].shape == (0, 3)
