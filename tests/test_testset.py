"""Image sets against brute force over all subsets, and against what the theorems promise."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxfi import testset
from jaxfi.testset import Cover

MATRICES = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 70), st.integers(1, 7)),
    elements=st.sampled_from([0, 0, 0, 1, 2]),
)
DETECT = st.sampled_from(testset.DETECTS)
TRIANGLE = np.array([[1, 1, 0], [0, 2, 2], [1, 0, 1]], np.uint8)  # any two images, no one image


def detected_by(outcomes: np.ndarray, detect: str) -> list[set[int]]:
    """The faults that each image detects, as plain sets."""
    wanted = {"observable": (1, 2), "critical": (2,)}[detect]
    return [{f for f, o in enumerate(column) if o in wanted} for column in outcomes.T.tolist()]


def best_coverage(sets: list[set[int]], num_images: int) -> int:
    """The most faults that any `num_images` images detect, by trying all."""
    subsets = itertools.combinations(sets, num_images)
    return max(len(set().union(*subset)) for subset in subsets)


def plain_greedy(sets: list[set[int]]) -> tuple[list[int], list[int]]:
    chosen, covered, totals = [], set(), []
    while any(s - covered for s in sets):
        image = max(range(len(sets)), key=lambda i: (len(sets[i] - covered), -i))
        chosen.append(image)
        covered |= sets[image]
        totals.append(len(covered))
    return chosen, totals


@given(MATRICES, DETECT)
def test_cover_is_the_plain_greedy_choice(outcomes, detect):
    images, totals = plain_greedy(detected_by(outcomes, detect))
    chosen = testset.cover(outcomes, detect)
    assert chosen.images.tolist() == images
    detectable = testset.num_detectable(outcomes, detect)
    assert chosen.coverage.tolist() == [total / detectable for total in totals]
    assert detectable == (totals[-1] if totals else 0)


@given(MATRICES, DETECT)
def test_greedy_is_within_its_proven_factors_of_brute_force(outcomes, detect):
    sets = detected_by(outcomes, detect)
    detectable = testset.num_detectable(outcomes, detect)
    chosen = testset.cover(outcomes, detect)
    for number, coverage in enumerate(chosen.coverage, start=1):
        assert coverage * detectable >= (1 - 1 / math.e) * best_coverage(sets, number)
    if detectable:
        smallest = next(k for k in range(8) if best_coverage(sets, k) == detectable)
        assert len(chosen.images) <= smallest * (math.log(max(map(len, sets))) + 1)


@settings(max_examples=40)
@given(MATRICES, DETECT)
def test_the_exact_cover_is_as_small_as_brute_force_finds(outcomes, detect):
    sets = detected_by(outcomes, detect)
    detectable = testset.num_detectable(outcomes, detect)
    exact = testset.exact_cover_size(outcomes, detect)
    smallest = next(k for k in range(8) if best_coverage(sets, k) == detectable)
    assert exact.size == exact.lower == len(exact.images) == smallest
    assert len(set().union(*(sets[i] for i in exact.images))) == detectable


def test_the_optimum_beats_greedy_where_greedy_is_known_to_fail():
    """Johnson's example: greedy takes the large middle set first, and then needs both others."""
    left, right = [1, 0] * 7, [0, 1] * 7
    middle = [0] * 6 + [1] * 8
    outcomes = np.array([middle, left, right], np.uint8).T
    assert testset.cover(outcomes).images.tolist() == [0, 1, 2]
    assert testset.exact_cover_size(outcomes) == (2, 2, pytest.approx([1, 2]))


def test_at_the_time_limit_a_cover_and_a_bound_come_back():
    random = np.random.default_rng(0)
    outcomes = (random.random((600, 300)) < 0.03).astype(np.uint8)
    exact = testset.exact_cover_size(outcomes, time_limit=0.2)
    assert 2 <= exact.lower < exact.size <= len(testset.cover(outcomes).images)
    detectable = outcomes.any(axis=1)
    assert (outcomes[:, exact.images].any(axis=1) == detectable).all()


@given(MATRICES, DETECT)
def test_images_are_ranked_by_what_each_detects(outcomes, detect):
    sizes = [len(s) for s in detected_by(outcomes, detect)]
    order, detected = testset.rank_images(outcomes, detect)
    assert order.tolist() == sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    assert detected.tolist() == [sizes[i] for i in order]


def test_the_mean_of_random_orders_is_the_expected_coverage():
    """A fault that d of N images detect escapes k random ones with C(N - d, k) / C(N, k)."""
    random = np.random.default_rng(3)
    outcomes = (random.random((200, 12)) < random.random((200, 1)) ** 3).astype(np.uint8)
    counts = outcomes.sum(axis=1)[outcomes.any(axis=1)]
    escapes = [np.mean([math.comb(12 - d, k) / math.comb(12, k) for d in counts.tolist()])
               for k in range(1, 13)]  # fmt: skip
    curve = testset.coverage_curve(outcomes, num_orders=2000)
    np.testing.assert_allclose(curve.mean, 1 - np.array(escapes), atol=0.005)
    assert (curve.low <= curve.mean).all()
    assert (curve.mean <= curve.high).all()
    assert curve.mean[-1] == curve.low[-1] == curve.high[-1] == 1


def test_random_orders_depend_only_on_their_seed():
    one, same, other = (testset.coverage_curve(TRIANGLE, num_orders=5, seed=s) for s in (1, 1, 2))
    assert one.mean.tobytes() == same.mean.tobytes()
    assert [array.shape for array in other] == [(3,)] * 3


def test_images_needed():
    coverage = np.array([0.9, 0.95, 0.99, 1.0])
    assert testset.images_needed(Cover(np.arange(4), coverage)) == (1, 3, 4)
    assert testset.images_needed(coverage[:2], (0.0, 0.5, 0.951)) == (0, 1, None)
    with pytest.raises(ValueError, match=r"1\.01: allowed are 0 to 1"):
        testset.images_needed(coverage, (1.01,))


def test_nothing_detectable_needs_no_image():
    nothing = testset.cover(TRIANGLE - TRIANGLE, "critical")
    assert [array.shape for array in nothing] == [(0,), (0,)]
    assert testset.images_needed(nothing) == (0, 0, 0)
    assert testset.exact_cover_size(TRIANGLE * 0)[:2] == (0, 0)
    with pytest.raises(ValueError, match="no image detects a fault"):
        testset.coverage_curve(TRIANGLE * 0)


@pytest.mark.parametrize(
    "outcomes, detect, error, message",
    [
        (TRIANGLE, "masked", ValueError, "'masked': allowed are observable, critical"),
        (TRIANGLE[0], "critical", ValueError, r"shape \(3,\): allowed is \[F, N\]"),
        (TRIANGLE[:0], "critical", ValueError, r"shape \(0, 3\)"),
        (TRIANGLE.astype(int), "critical", TypeError, "int64: allowed is uint8"),
        (TRIANGLE + 1, "critical", ValueError, "hold 3: allowed are 0, 1, 2"),
    ],
)
def test_what_is_no_campaign_is_refused_in_one_line(outcomes, detect, error, message):
    for function in (testset.cover, testset.rank_images, testset.coverage_curve):
        with pytest.raises(error, match=message):
            function(outcomes, detect)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="num_orders is 0: allowed are integers >= 1"):
        testset.coverage_curve(TRIANGLE, num_orders=0)
    with pytest.raises(ValueError, match="time_limit is 0: allowed are seconds > 0"):
        testset.exact_cover_size(TRIANGLE, time_limit=0)


def test_packing_in_blocks_is_packing_at_once(monkeypatch):
    outcomes = np.random.default_rng(5).integers(0, 3, (333, 20)).astype(np.uint8)
    whole = testset.cover(outcomes, "critical")
    monkeypatch.setattr(testset, "_BLOCK_BYTES", 1)
    assert testset.cover(outcomes, "critical").images.tolist() == whole.images.tolist()
    assert whole.images.tolist() == plain_greedy(detected_by(outcomes, "critical"))[0]


def test_a_large_campaign_takes_seconds():
    """A sixteenth of the study's 16,638 x 10,000, which took 0.9 s on two cores."""
    random = np.random.default_rng(0)
    rate = 10 ** random.uniform(-3, 0, (4160, 1)).astype(np.float32)
    outcomes = (random.random((4160, 2500), np.float32) < rate).astype(np.uint8)
    start = time.perf_counter()
    chosen = testset.cover(outcomes)
    assert time.perf_counter() - start < 5
    assert chosen.coverage[-1] == 1
