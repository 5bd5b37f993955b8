"""Outcomes against NumPy, and confidence intervals against simulation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.stats

from jaxfi.faults import FaultList, exhaustive_faults
from jaxfi.outcomes import (
    CRITICAL,
    MASKED,
    NON_CRITICAL,
    Results,
    accuracy,
    classify,
    estimate_difference,
    estimate_rate,
    judge,
    paired_difference,
    shares,
)

SPECIALS = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1.5, -2.0, 1e-3, 3e38])


def classify_one(golden: np.ndarray, faulty: np.ndarray, nan: str) -> tuple[int, bool]:
    """The definitions of DESIGN.md, one output vector at a time."""
    due = bool(np.isnan(faulty).any() or np.isinf(faulty).any())
    if golden.tobytes() == faulty.tobytes():
        return 0, due
    if nan == "critical" and np.isnan(faulty).any():
        return 2, due
    return (1 if np.argmax(golden) == np.argmax(faulty) else 2), due


@pytest.mark.parametrize("nan", ["critical", "argmax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_classify_is_the_definition(dtype: str, nan: str) -> None:
    generator = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        golden = generator.choice(SPECIALS[3:], (40, 4)).astype(dtype)
        faulty = generator.choice(SPECIALS, (30, 40, 4)).astype(dtype)
    same = generator.random(faulty.shape) < 0.8  # most values stay golden
    faulty = np.where(same, golden, faulty)
    outcome, due = jax.jit(classify, static_argnames="nan")(golden, faulty, nan=nan)
    pairs = [zip(golden, row, strict=True) for row in faulty]
    expected = [[classify_one(g, f, nan) for g, f in row] for row in pairs]
    assert np.asarray(outcome).tolist() == [[o for o, _ in row] for row in expected]
    assert np.asarray(due).tolist() == [[d for _, d in row] for row in expected]
    assert set(np.unique(outcome)) == {MASKED, NON_CRITICAL, CRITICAL}
    assert outcome.dtype == jnp.uint8
    assert due.dtype == jnp.bool_


NAN, INF = np.nan, np.inf
CASES = {  # golden, faulty, outcome under nan="critical", under nan="argmax", DUE
    "same": ([1, 2], [1, 2], 0, 0, False),
    "last bit": ([1, 2], [1, np.nextafter(2, 3, dtype=np.float32)], 1, 1, False),
    "denormal": ([0.0, 2], [1e-45, 2], 1, 1, False),
    "sign of zero": ([0.0, 2], [-0.0, 2], 1, 1, False),
    "other class": ([1, 2], [3, 2], 2, 2, False),
    "tie goes to the first": ([1, 2], [2, 2], 2, 2, False),
    "infinite, same class": ([1, 2], [1, INF], 1, 1, True),
    "infinite, other class": ([1, 2], [INF, 2], 2, 2, True),
    "minus infinity": ([1, 2], [-INF, 2], 1, 1, True),
    "all NaN, golden class 0": ([2, 1], [NAN, NAN], 2, 1, True),
    "all NaN, golden class 1": ([1, 2], [NAN, NAN], 2, 2, True),
    "one NaN is the largest": ([1, 2], [1, NAN], 2, 1, True),
    "golden NaN stays": ([NAN, 2], [NAN, 2], 0, 0, True),
}


@pytest.mark.parametrize("golden, faulty, critical, argmax, is_due", CASES.values(), ids=CASES)
def test_cases(golden: list, faulty: list, critical: int, argmax: int, is_due: bool) -> None:
    golden, faulty = np.array([golden], np.float32), np.array([faulty], np.float32)
    for nan, expected in (("critical", critical), ("argmax", argmax)):
        outcome, due = classify(golden, faulty, nan=nan)
        assert (int(outcome[0]), bool(due[0])) == (expected, is_due)


def test_correct_predictions() -> None:
    golden = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    faulty = np.array([[0.0, 2.0], [3.0, 1.0], [NAN, NAN]], np.float32)
    labels = np.array([1, 1, 0])
    assert judge(golden, faulty, labels, "argmax").correct.tolist() == [True, False, True]
    assert judge(golden, faulty, labels, "critical").correct.tolist() == [True, False, False]
    batch = judge(golden, np.stack([faulty, golden]), labels, "argmax")
    assert batch.correct.tolist() == [[True, False, True], [True, True, False]]


def test_classify_bad_input() -> None:
    row = np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match="unknown nan policy 'ignore': allowed are critical"):
        classify(row, row, nan="ignore")
    with pytest.raises(TypeError, match="golden outputs are float32, faulty ones bfloat16"):
        classify(row, row.astype(ml_dtypes.bfloat16))


def test_shares() -> None:
    outcomes = np.array([[0, 0, 1, 2], [2, 2, 2, 2]], np.uint8)
    assert shares(outcomes, MASKED).tolist() == [0.5, 0.0]
    assert shares(outcomes, CRITICAL).tolist() == [0.25, 1.0]


def test_wilson_where_all_agree() -> None:
    """No variance at all: Wilson's textbook interval with one trial a fault."""
    for successes, value in ((0, 0.0), (200, 1.0)):
        estimate = estimate_rate(np.full(200, value), num_images=50, population=10**12)
        wilson = scipy.stats.binomtest(successes, 200).proportion_ci(
            2 * scipy.stats.norm.cdf(2.58) - 1, method="wilson"
        )
        np.testing.assert_allclose(estimate, (value, wilson.low, wilson.high), atol=1e-9)


def test_one_image_is_wilson() -> None:
    per_fault = np.repeat([0.0, 1.0], [130, 70])
    estimate = estimate_rate(per_fault, num_images=1, population=10**12)
    wilson = scipy.stats.binomtest(70, 200).proportion_ci(
        2 * scipy.stats.norm.cdf(2.58) - 1, method="wilson"
    )
    np.testing.assert_allclose(estimate, (0.35, wilson.low, wilson.high), atol=5e-4)


def test_a_census_has_no_error() -> None:
    assert estimate_rate(np.array([0.2, 0.4]), 10, population=2) == pytest.approx((0.3,) * 3)


def wilson(mean: float, num_trials: float, t: float = 2.58) -> tuple[float, float]:
    """The roots of (mean - p)^2 = t^2 p (1 - p) / n, Wilson's definition (1927)."""
    n = num_trials / t**2
    low, high = np.sort(np.roots([1 + 1 / n, -2 * mean - 1 / n, mean**2]))
    return float(low), float(high)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.98])
def test_alike_faults_are_between_all_pairs_and_all_or_nothing(share: float) -> None:
    """No spread between faults is worth more than one trial a fault, less than one a pair."""
    for num_faults in (10, 100, 10_000):
        low, high = estimate_rate(np.full(num_faults, share), 100, population=10**12)[1:]
        least, most = (np.diff(wilson(share, n))[0] for n in (num_faults * 100, num_faults))
        assert least * (1 - 1e-6) <= high - low < most


def test_the_interval_goes_on_from_none_without_a_jump() -> None:
    """More critical pairs, in one fault or in many, never give a smaller upper end."""
    num_faults, num_images = 2000, 500
    counts = np.zeros(num_faults)
    ends, values = [], []
    for step in range(1201):  # the first fault's images one by one, then a pair in other faults
        fault = 0 if step <= num_images else step
        counts[fault] += step > 0
        estimate = estimate_rate(counts / num_images, num_images, population=10**12)
        ends.append(estimate.high)
        values.append(estimate.value)
        assert estimate.low <= estimate.value <= estimate.high
    assert ends[0] == pytest.approx(wilson(0, num_faults)[1])
    assert np.all(np.diff(ends) >= -1e-9)
    assert np.max(np.diff(ends)) < 4 / (num_faults * num_images)
    mirrored = estimate_rate(1 - counts / num_images, num_images, population=10**12)
    assert 1 - mirrored.low == pytest.approx(estimate.high)


@pytest.mark.parametrize("rare", [0.0, 0.0005, 0.002, 0.01])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_coverage_of_rare_outcomes(rare: float, share: float) -> None:
    """Of 400 faults hardly any does anything, and a fault that does does it to few or all images.

    Wilson's interval of so rare an event covers less than it says at some rates; the average over
    neighbouring ones is near it (Brown, Cai and DasGupta 2001).
    """
    generator = np.random.default_rng(4)
    covered = []
    for truth in rare * np.linspace(0.8, 1.2, 9):
        hits = generator.binomial(400, truth, size=400)
        covered += [
            (lambda e: e.low <= truth * share <= e.high)(
                estimate_rate(np.repeat([0.0, share], [400 - n, n]), 1000, population=10**12)
            )
            for n in hits
        ]
    assert np.mean(covered) >= 0.98


@pytest.mark.parametrize("per_fault, num_images", [([], 10), ([0.5], 0)])
def test_no_rate_of_nothing(per_fault: list, num_images: int) -> None:
    with pytest.raises(ValueError, match="both must be > 0"):
        estimate_rate(np.array(per_fault), num_images, 100)


def clustered_population(generator: np.random.Generator, num_faults: int, mean: float):
    """Shares as campaigns show them: most faults do nothing, some do all, a few in between."""
    kind = generator.choice(3, num_faults, p=[1 - mean, mean / 2, mean / 2])
    return np.choose(
        kind, [np.zeros(num_faults), np.ones(num_faults), generator.random(num_faults)]
    )


@pytest.mark.parametrize("mean", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("num_faults, population", [(400, 10**5), (1500, 2000)])
def test_coverage_of_clustered_rates(mean: float, num_faults: int, population: int) -> None:
    """2,000 campaigns of one finite population: 99 % intervals cover in at least 98 %."""
    generator = np.random.default_rng(1)
    everything = clustered_population(generator, population, mean)
    truth = everything.mean()
    covered, widths = [], []
    for _ in range(2000):
        sample = generator.choice(everything, num_faults, replace=False)
        estimate = estimate_rate(sample, num_images=1000, population=population)
        covered.append(estimate.low <= truth <= estimate.high)
        widths.append(estimate.high - estimate.low)
    assert np.mean(covered) >= 0.98
    # And no wider than the truth warrants.
    error = everything.std() * np.sqrt((1 - num_faults / population) / num_faults)
    assert np.mean(widths) <= 2 * 2.58 * error * 1.15


def test_independent_images_would_cover_badly() -> None:
    """Why faults are clusters: the naive interval of all pairs misses most of the time."""
    generator = np.random.default_rng(2)
    everything = clustered_population(generator, 10**5, 0.1)
    naive = 2.58 * np.sqrt(0.1 * 0.9 / (400 * 1000))
    sample = generator.choice(everything, (500, 400)).mean(axis=1)
    assert np.mean(np.abs(sample - everything.mean()) < naive) < 0.5


@pytest.mark.parametrize("effect", [0.0, 0.05])
@pytest.mark.parametrize("num_faults, population", [(100, 10**5), (1500, 2000)])
def test_coverage_of_paired_differences(effect: float, num_faults: int, population: int) -> None:
    generator = np.random.default_rng(3)
    before = clustered_population(generator, population, 0.3)
    changed = generator.random(population) < 0.2
    after = np.where(
        changed, np.clip(before + generator.normal(effect * 5, 0.4, population), 0, 1), before
    )
    truth = np.mean(after - before)
    covered = []
    for _ in range(2000):
        rows = generator.choice(population, num_faults, replace=False)
        estimate = estimate_difference(before[rows], after[rows], population)
        covered.append(estimate.low <= truth <= estimate.high)
        assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert np.mean(covered) >= 0.98


def test_wide_outputs_are_judged_in_their_own_precision() -> None:
    """float64 outputs that are the same float32: JAX would cut them, and call them masked."""
    golden = np.array([[1.0, 1.0 - 2.0**-40]] * 3)
    faulty = np.array([[1.0, 1.0 - 2.0**-40], [1.0 - 2.0**-45, 0.5], [1.0, 1.0 + 2.0**-40]])
    expected = [classify_one(g, f, "critical")[0] for g, f in zip(golden, faulty, strict=True)]
    assert expected == [MASKED, NON_CRITICAL, CRITICAL]
    assert not jax.config.jax_enable_x64
    assert classify(golden, faulty)[0].tolist() == expected
    assert accuracy(faulty, np.array([0, 1, 1]), "critical") == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_outputs_are_floats(dtype: str) -> None:
    row = np.zeros((1, 2), dtype)
    with pytest.raises(TypeError, match=f"outputs are {dtype}: allowed are floats"):
        classify(row, row)


def test_accuracy_of_nan_outputs() -> None:
    outputs = np.array([[0, 1], [NAN, 2], [NAN, NAN]], np.float32)
    labels = np.array([1, 0, 0])
    assert accuracy(outputs, labels, "argmax") == 1.0
    assert accuracy(outputs, labels, "critical") == pytest.approx(1 / 3)


class Stub(NamedTuple):
    """As much of a campaign as a difference takes."""

    faults: FaultList
    results: Results


def test_paired_difference_of_a_census_has_no_error() -> None:
    params = {"w": np.zeros(3, np.int8)}
    whole = exhaustive_faults(params)
    outcomes = np.zeros((2, len(whole), 4), np.uint8)
    outcomes[1, :6] = NON_CRITICAL
    due, correct = np.zeros(outcomes.shape[1:], bool), np.zeros(len(whole), np.int32)
    before, after = (Stub(whole, Results(o, due, correct)) for o in outcomes)
    assert paired_difference(before, after) == pytest.approx((-0.25,) * 3)
    low, high = paired_difference(before, after, population=10**6)[1:]
    assert low < -0.25 < high
    with pytest.raises(ValueError, match="population 23 is less than the 24 faults"):
        paired_difference(before, after, population=23)


def test_difference_is_after_minus_before() -> None:
    before, after = np.array([0.1, 0.2, 0.3] * 100), np.array([0.3, 0.4, 0.5] * 100)
    estimate = estimate_difference(before, after, population=10**9)
    assert estimate.value == pytest.approx(0.2)
    assert 0.18 < estimate.low < 0.2 < estimate.high < 0.22  # never of width 0
    assert estimate_difference(before, after, population=300) == pytest.approx((0.2,) * 3)
    assert estimate_difference(before[:1], after[:1], 10**9)[1:] == (-1.0, 1.0)


@pytest.mark.parametrize("before, after", [([], []), ([0.1], [0.1, 0.2])])
def test_differences_need_pairs(before: list, after: list) -> None:
    with pytest.raises(ValueError, match="cannot pair"):
        estimate_difference(np.array(before), np.array(after), 100)
