"""Cumulative faults and bit sensitivity against NumPy and struct; int8 words against PyTorch."""

from __future__ import annotations

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxfi.campaign import cumulative_accuracy, draw_trials, run_campaign
from jaxfi.faults import FaultList, sample_faults
from jaxfi.network import dequantize, quantize, with_quantized_weights


def network(params, images):
    hidden = jnp.maximum(images @ params["first"]["kernel"] + params["first"]["bias"][None], 0)
    return hidden @ params["last"]["kernel"]


@pytest.fixture(scope="module")
def params() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"first": {"kernel": draw(6, 20), "bias": draw(20)}, "last": {"kernel": draw(20, 4)}}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def labels(params, images) -> np.ndarray:
    return numpy_network(params, images).argmax(-1)


def numpy_network(params, images) -> np.ndarray:
    with np.errstate(all="ignore"):
        hidden = images @ params["first"]["kernel"] + params["first"]["bias"]
        return np.maximum(hidden, 0) @ params["last"]["kernel"]


def faulty_copy(params: dict, trial: FaultList, count: int, change) -> dict:
    """The first `count` faults, one after the other, as a loop over NumPy arrays."""
    copy = jax.tree.map(lambda leaf: np.array(leaf), params)
    leaves = jax.tree.leaves(copy)
    for leaf, element in zip(trial.leaf[:count], trial.element[:count], strict=True):
        flat = leaves[leaf].reshape(-1)
        flat[element] = change(flat[element])
    return copy


@pytest.mark.parametrize("trials_together", [1, 2, 3])
def test_zero_faults_equal_a_numpy_loop(params, images, labels, trials_together):
    trials = draw_trials(0, params, 80, 3, paths="*kernel")
    counts = (0, 1, 20, 80)
    result = cumulative_accuracy(
        network, params, trials, images, labels, counts,
        batch_size=16, trials_together=trials_together,
    )  # fmt: skip
    assert result.accuracy.shape == (3, 4)
    for trial, row in zip(trials, result.accuracy, strict=True):
        assert row[0] == 1
        for count, accuracy in zip(counts, row, strict=True):
            faulty = faulty_copy(params, trial, count, lambda value: 0)
            expected = (numpy_network(faulty, images).argmax(-1) == labels).mean()
            assert accuracy == pytest.approx(expected, abs=1e-9)
    assert not result.num_non_finite.any()


def test_trials_are_nested_distinct_uniform_and_common(params):
    short, long = (draw_trials(7, params, count, 2, paths="*kernel") for count in (30, 200))
    for a, b in zip(short, long, strict=True):
        np.testing.assert_array_equal(a.element, b.element[:30])
        assert len(set(zip(b.leaf.tolist(), b.element.tolist(), strict=True))) == 200  # all of them
    bits = [draw_trials(7, params, 30, 1, paths="*kernel", model="bit-flip", bit=b)[0]
            for b in (0, 31)]  # fmt: skip
    for trial in bits:  # the same elements whatever the bit: networks and bits compare in pairs
        np.testing.assert_array_equal(trial.element, short[0].element)
        np.testing.assert_array_equal(trial.leaf, short[0].leaf)
    many = draw_trials(1, params, 50, 400, paths="*kernel")
    share = np.mean([np.mean(trial.leaf == 1) for trial in many])
    assert share == pytest.approx(120 / 200, abs=0.02)  # of 200 weights, 120 are in the first


def flip32(bit: int):
    def change(value):
        (word,) = struct.unpack("<I", struct.pack("<f", value))
        return struct.unpack("<f", struct.pack("<I", word ^ (1 << bit)))[0]

    return change


def flip64(bit: int):
    def change(value):
        (word,) = struct.unpack("<Q", struct.pack("<d", value))
        return struct.unpack("<d", struct.pack("<Q", word ^ (1 << bit)))[0]

    return change


@pytest.mark.parametrize("bit", [31, 30, 25, 20, 0])
@pytest.mark.parametrize("nan", ["critical", "argmax"])
def test_bit_flips_equal_struct(bit, nan, params, images, labels):
    trials = draw_trials(3, params, 40, 2, model="bit-flip", bit=bit, paths="*kernel")
    result = cumulative_accuracy(network, params, trials, images, labels, (1, 40), nan=nan)
    for trial, accuracies, non_finite in zip(trials, *result[1:], strict=True):
        for count, accuracy, bad in zip((1, 40), accuracies, non_finite, strict=True):
            outputs = numpy_network(faulty_copy(params, trial, count, flip32(bit)), images)
            right = outputs.argmax(-1) == labels
            if nan == "critical":
                right &= ~np.isnan(outputs).any(-1)
            assert accuracy == pytest.approx(right.mean(), abs=0.021)  # one image: Inf against NaN
            assert bad == (~np.isfinite(outputs)).any(-1).sum()


@pytest.mark.parametrize("bit", [63, 62, 54, 52, 51, 0])
def test_flips_in_64_bit_words_equal_struct(bit, params, images, labels):
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    with jax.enable_x64(True):
        (trial,) = draw_trials(3, wide, 10, 1, model="bit-flip", bit=bit, paths="*kernel")
        result = cumulative_accuracy(
            network, wide, [trial], images.astype(np.float64), labels, (10,)
        )
    outputs = numpy_network(faulty_copy(wide, trial, 10, flip64(bit)), images.astype(np.float64))
    right = (outputs.argmax(-1) == labels) & ~np.isnan(outputs).any(-1)
    assert result.accuracy[0, 0] == pytest.approx(right.mean(), abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_survives_relu_and_mean(dtype):
    """XLA's CPU library makes 0 of it, where plain `jax.jit` lets it fuse the two."""
    with jax.enable_x64(True):
        pooled = {"first": np.ones((1, 1, 1, 64), dtype), "last": np.ones((64, 3), dtype)}
        trial = FaultList.from_sites([("first", 5, None)], pooled, model="value", value=np.inf)

        def apply(params, images):
            return jax.nn.relu(images * params["first"] + 1).mean((1, 2)) @ params["last"]

        images = np.ones((4, 8, 8, 64), dtype)
        images[1:] = 0  # times infinity
        result = cumulative_accuracy(apply, pooled, [trial], images, np.zeros(4, int), [0, 1])
    assert result.num_non_finite.tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "counts, message",
    [
        ((), "1 trials and 0 counts"),
        ((5, 5), r"counts are \[5, 5\]: allowed are rising integers from 0"),
        ((-1, 5), "rising integers from 0"),
        ((0, 11), "counts go to 11, but a trial has only 10 faults"),
    ],
)
def test_bad_counts(counts, message, params, images, labels):
    trials = draw_trials(0, params, 10, 1)
    with pytest.raises(ValueError, match=message):
        cumulative_accuracy(network, params, trials, images, labels, counts)


def test_bad_trials(params):
    with pytest.raises(ValueError, match="num_trials is 0"):
        draw_trials(0, params, 10, 0)
    with pytest.raises(ValueError, match="bit 32 is outside"):
        draw_trials(0, params, 10, 1, model="bit-flip", bit=32)
    with pytest.raises(ValueError, match="num_faults 201 is out of range: there are 200"):
        draw_trials(0, params, 201, 1, paths="*kernel")


def test_quantized_words_equal_torch(params):
    words, scales = quantize(params)
    for layer in ("first", "last"):
        kernel = torch.tensor(params[layer]["kernel"])
        scale = kernel.abs().amax(0) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(kernel, scale, zero, 1, -127, 127)
        expected_words = (theirs / scale).round().to(torch.int8).numpy()
        np.testing.assert_array_equal(words[layer]["kernel"], expected_words)
        weights = np.asarray(dequantize(words, scales)[layer]["kernel"])
        np.testing.assert_allclose(weights, theirs.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(words["first"]["bias"], params["first"]["bias"])


def test_a_channel_of_zeros_and_no_leaf():
    words, scales = quantize({"kernel": jnp.zeros((3, 2))})
    assert dequantize(words, scales)["kernel"].tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match=r"no leaf matches '\*kernel': the leaves are w"):
        quantize({"w": jnp.zeros((3, 2))})


def test_faults_in_int8_words_run_through_a_campaign(params, images, labels):
    words, scales = quantize(params)
    faults = sample_faults(0, words, 60, paths="*kernel")
    assert set(faults.bit.tolist()) <= set(range(8))
    campaign = run_campaign(with_quantized_weights(network, scales), words, faults, images, labels)
    for row in range(0, 60, 7):
        copy = faulty_copy(words, faults[[row]], 1, flip8(int(faults.bit[row])))
        weights = jax.tree.map(
            lambda word, scale: word.astype(np.float32) * np.asarray(scale), copy, scales
        )
        outputs = numpy_network(weights, images)
        assert campaign.correct[row] == pytest.approx((outputs.argmax(-1) == labels).sum(), abs=1)


def flip8(bit: int):
    def change(value):
        (word,) = struct.unpack("<B", struct.pack("<b", value))
        return struct.unpack("<b", struct.pack("<B", word ^ (1 << bit)))[0]

    return change
