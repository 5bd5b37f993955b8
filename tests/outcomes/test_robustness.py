"""Robustness measures against scipy, NumPy and PyTorch."""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch

from jaxfi.outcomes import (
    bootstrap_mean,
    group_test,
    holm,
    paired_test,
    rank_correlation,
    relative_area,
)
from jaxfi.training import loss_surface

RNG = np.random.default_rng(0)


def test_area_equals_scipys_trapezoid():
    counts = np.array([0, 10, 30, 100])
    accuracy = RNG.uniform(0.1, 1, (5, 4))
    expected = scipy.integrate.trapezoid(accuracy / accuracy[:, :1], counts, axis=1) / 100
    np.testing.assert_allclose(relative_area(counts, accuracy), expected, rtol=1e-12)
    np.testing.assert_allclose(relative_area(counts, np.full((2, 4), 0.3)), 1, rtol=1e-12)


def test_area_needs_a_start():
    with pytest.raises(ValueError, match=r"counts are \[1, 2\]: allowed are two or more, rising"):
        relative_area([1, 2], np.ones((1, 2)))
    with pytest.raises(ValueError, match="the clean accuracy is 0"):
        relative_area([0, 2], np.zeros((1, 2)))


def test_bootstrap_interval_is_close_to_scipys():
    values = RNG.normal(size=12)
    ours = bootstrap_mean(values, confidence=0.95, num_resamples=40_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.95, n_resamples=40_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert bootstrap_mean(np.array([0.7])) == (0.7, 0.7, 0.7)


@pytest.mark.parametrize("trials", [3, 10])
def test_paired_test_equals_scipys_exact_permutations(trials):
    first, shift = RNG.normal(size=trials), RNG.normal(0.4, 0.5, trials)
    theirs = scipy.stats.permutation_test(
        (shift,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    ours = paired_test(first, first + shift)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=1e-12)
    assert ours.difference.low <= ours.difference.value <= ours.difference.high
    assert ours.difference.value == pytest.approx(shift.mean())


@pytest.mark.parametrize("trials", [1, 2, 15, 20, 31, 40])
def test_paired_test_equals_a_count_of_all_signs(trials):
    """Whole numbers, so that Python's own integers count the patterns of signs by their sum."""
    shift = np.random.default_rng(trials).integers(-60, 100, trials)
    patterns = collections.Counter({0: 1})
    for value in shift.tolist():
        grown: collections.Counter[int] = collections.Counter()
        for total, count in patterns.items():
            grown[total + value] += count
            grown[total - value] += count
        patterns = grown
    far = abs(int(shift.sum()))
    as_far = sum(count for total, count in patterns.items() if abs(total) >= far)
    ours = paired_test(np.zeros(trials), shift / 1000)  # rounded: ties must stay ties
    assert ours.p_value == as_far / 2**trials


def test_networks_that_do_not_differ():
    assert paired_test(np.ones(20), np.ones(20)) == ((0, 0, 0), 1)
    assert paired_test(np.zeros(2), np.array([0.3, -0.3])).p_value == 1


def test_paired_test_of_many_trials_is_close_to_students():
    shift = RNG.normal(0.3, 1, 60)
    ours = paired_test(np.zeros(60), shift)
    assert ours.p_value == pytest.approx(scipy.stats.ttest_1samp(shift, 0).pvalue, abs=0.01)
    with pytest.raises(ValueError, match="cannot pair 2 trials with 3"):
        paired_test(np.zeros(2), np.zeros(3))


def test_group_test_equals_scipys_analysis_of_variance():
    groups = [RNG.normal(mean, 1, size).tolist() for mean, size in ((0, 4), (1, 3), (0.4, 5))]
    ours = group_test(groups)
    f = scipy.stats.f_oneway(*groups)
    assert ours.share == pytest.approx(1 / (1 + 9 / (2 * f.statistic)))
    variances = [(len(group) - 1) * np.var(group, ddof=1) for group in groups]
    assert ours.within == pytest.approx(math.sqrt(sum(variances) / 9))
    theirs = scipy.stats.permutation_test(
        groups, lambda *g, axis: scipy.stats.f_oneway(*g, axis=axis).statistic, n_resamples=20_000,
        alternative="greater", vectorized=True, rng=0,
    )  # fmt: skip
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.015)


def test_groups_that_are_apart_or_alike():
    assert group_test([[1, 1], [2, 2]])[:2] == (1, 0)
    assert group_test([[1, 1], [2, 2]]).p_value == pytest.approx(1 / 3, abs=0.01)
    alike = group_test([[1, 1], [1, 1]])
    assert math.isnan(alike.share)
    assert alike.p_value == 1
    for groups in ([[1, 2]], [[1], [2]], [[1, 2], []]):
        with pytest.raises(ValueError, match="allowed are two groups, one of two members"):
            group_test(groups)


def test_holm_by_its_definition():
    p = RNG.uniform(0, 0.2, 6)
    ranked = sorted(p)
    expected = [
        min(1, max(ranked[j] * (6 - j) for j in range(ranked.index(value) + 1))) for value in p
    ]
    np.testing.assert_allclose(holm(p), expected)
    assert holm([]).tolist() == []


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_equals_scipys(ties):
    x, y = RNG.normal(size=(2, 20))
    y = y + x
    if ties:
        x, y = np.round(x), np.round(y)
    ours = rank_correlation(x, y)
    assert ours.value == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    half = 2.58 * math.sqrt((1 + ours.value**2 / 2) / 17)
    ends = [math.tanh(math.atanh(ours.value) + sign * half) for sign in (-1, 1)]
    assert (ours.low, ours.high) == pytest.approx(ends)


def test_rank_correlation_at_its_ends():
    assert rank_correlation(range(9), range(9)).value == 1
    assert rank_correlation(range(9), range(9, 0, -1)).value == -1
    assert math.isnan(rank_correlation([1, 1, 1, 1], range(4)).value)
    assert rank_correlation([1, 2, 3], [1, 2, 3])[1:] == (-1, 1)
    assert math.isnan(rank_correlation([], []).value)
    with pytest.raises(ValueError, match="cannot correlate 1 numbers with 2"):
        rank_correlation([1], [1, 2])


def test_loss_surface_equals_torch():
    rng = np.random.default_rng(3)
    images, kernel = rng.normal(size=(30, 5)), rng.normal(size=(5, 3))
    labels = rng.integers(0, 3, 30)

    def torch_loss(weights):
        return torch.nn.functional.cross_entropy(torch.tensor(images) @ weights,
                                                 torch.tensor(labels))  # fmt: skip

    def loss_fn(params):
        logits = jnp.asarray(images, jnp.float32) @ params["kernel"]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -picked.mean()

    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    surface = jax.jit(lambda p, k: loss_surface(loss_fn, p, k, 200))(params, jax.random.key(0))
    weights = torch.tensor(kernel, requires_grad=True)
    gradient = torch.autograd.grad(torch_loss(weights), weights)[0]
    hessian = torch.autograd.functional.hessian(torch_loss, weights).reshape(15, 15)
    eigenvalues = np.linalg.eigvalsh(hessian.numpy())
    assert float(surface.gradient_norm) == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert float(surface.sharpness) == pytest.approx(eigenvalues[-1], rel=1e-3)


def test_sharpness_of_a_saddle_keeps_its_sign():
    surface = loss_surface(lambda w: w[0] ** 2 - 4 * w[1] ** 2, jnp.ones(2), jax.random.key(1), 50)
    assert float(surface.sharpness) == pytest.approx(-8, rel=1e-4)
