"""Patterns against enumeration by NumPy, binomial counts, and parameters changed by hand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats

import jaxfi
from jaxfi import patterns
from tests import conformance_models as models

PARAMS = {
    "bias": np.arange(4, dtype=np.float32),
    "conv": np.arange(36, dtype=np.float32).reshape(3, 1, 3, 4),
    "matrix": np.arange(6, dtype=np.int8).reshape(2, 3),
}


def experiments(faults: Any) -> list[tuple]:
    """Of each, its model and faults as (path, element, bit), sorted."""
    found = []
    for row in range(len(faults)):
        both = faults.first[row] + faults.others[faults.owner == row]
        places = zip(both.leaf.tolist(), both.element.tolist(), both.bit.tolist(), strict=True)
        sites = sorted((both.paths[leaf], element, bit) for leaf, element, bit in places)
        found.append((jaxfi.FAULT_MODELS[both.model[0]], *sites))
    return found


def of_index(path: str, *index: Any) -> list[int]:
    shape = PARAMS[path].shape
    return np.arange(PARAMS[path].size).reshape(shape)[index].ravel().tolist()


def bursts(length: int) -> list[tuple]:
    found = []
    for path, array in PARAMS.items():
        for element, low in itertools.product(
            range(array.size), range(8 * array.itemsize - length + 1)
        ):
            found.append(("bit-flip", *((path, element, low + n) for n in range(length))))
    return found


def slabs(where: dict[str, list[list[int]]], bits: Callable[[str], Any], model: str) -> list[tuple]:
    return [
        (model, *sorted((path, element, bit) for element in elements))
        for path, sets in where.items()
        for elements in sets
        for bit in bits(path)
    ]


def widths(path: str) -> range:
    return range(8 * PARAMS[path].itemsize)


ROWS = {"matrix": [of_index("matrix", r) for r in range(2)]}
COLUMNS = {"matrix": [of_index("matrix", slice(None), c) for c in range(3)]}
CHANNELS = {
    "conv": [of_index("conv", ..., c) for c in range(4)],
    "matrix": [of_index("matrix", ..., c) for c in range(3)],
}
TORCH = {
    "conv": [of_index("conv", c) for c in range(3)],
    "matrix": [of_index("matrix", c) for c in range(2)],
}
KERNELS = {"conv": [of_index("conv", ..., i, o) for i in range(3) for o in range(4)]}
LANES = {
    "conv": [of_index("conv", ..., slice(1, None, 2))],
    "matrix": [of_index("matrix", ..., slice(1, None, 2))],
}

EVERY = {
    "burst": (patterns.burst(2), bursts(2)),
    "single": (patterns.burst(1), bursts(1)),
    "row": (patterns.row(), slabs(ROWS, widths, "bit-flip")),
    "column": (patterns.column(model="zero"), slabs(COLUMNS, lambda p: [-1], "zero")),
    "channel": (patterns.channel(bits=[0, 30]),
                slabs(CHANNELS, lambda p: [b for b in (0, 30) if b in widths(p)], "bit-flip")),
    "channel of PyTorch": (patterns.channel(order="torch", model="stuck-at-1"),
                           slabs(TORCH, widths, "stuck-at-1")),
    "kernel": (patterns.kernel(), slabs(KERNELS, widths, "bit-flip")),
    "lane": (patterns.stuck_lane(1, of=2), slabs(LANES, widths, "stuck-at-0")),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_all_experiments_are_those_of_an_enumeration(name: str) -> None:
    pattern, expected = EVERY[name]
    count = patterns.population(PARAMS, pattern)
    faults = patterns.sample(0, PARAMS, count, pattern)
    assert count == len(expected)
    assert sorted(experiments(faults)) == sorted(expected)
    assert faults.population == count
    some = patterns.sample(0, PARAMS, count // 3, pattern)
    assert experiments(some) == experiments(faults)[: count // 3]
    with pytest.raises(ValueError, match=f"there are {count:,} experiments of {pattern.name}"):
        patterns.sample(0, PARAMS, count + 1, pattern)


def test_bursts_lie_in_their_bits() -> None:
    pattern = patterns.burst(3, bits=[1, 2, 3, 4, 9])
    faults = patterns.sample(1, PARAMS, 40, pattern, paths="conv")
    assert {site for one in experiments(faults) for _, _, site in one[1:]} == {1, 2, 3, 4}
    assert patterns.population(PARAMS, pattern, paths="conv") == 36 * 2


@pytest.mark.parametrize("rate", [3e-4, 0.02, 0.6])
def test_bit_errors_are_binomial_and_even(rate: float) -> None:
    params = {"a": np.zeros(50, np.float32), "b": np.zeros(70, np.int8)}
    bits, count = 50 * 32 + 70 * 8, 300 if rate > 0.1 else 1500
    faults = patterns.sample(7, params, count, patterns.bit_error_rate(rate))
    flips = [0 if one[0] == "null" else len(one) - 1 for one in experiments(faults)]
    expected = scipy.stats.binom(bits, rate)
    mean, variance = np.mean(flips), np.var(flips)
    assert abs(mean - expected.mean()) < 4 * expected.std() / np.sqrt(count)
    assert 0.75 < variance / expected.var() < 1.3
    places = [site for one in experiments(faults) if one[0] != "null" for site in one[1:]]
    assert all(len(set(one[1:])) == len(one) - 1 for one in experiments(faults))  # distinct
    share = np.mean([path == "a" for path, *_ in places])
    sure = 4 * np.sqrt(0.25 / len(places))
    assert abs(share - 1600 / bits) < sure
    in_a = np.bincount([bit for path, _, bit in places if path == "a"], minlength=32)
    assert scipy.stats.chisquare(in_a).pvalue > 1e-4
    shorter = patterns.sample(7, params, 10, patterns.bit_error_rate(rate))
    assert experiments(shorter) == experiments(faults)[:10]


def test_a_tiny_rate_has_few_errors() -> None:
    params = {"a": np.zeros((1000, 1000), np.float32)}
    faults = patterns.sample(0, params, 4000, patterns.bit_error_rate(1e-12))
    assert len(faults) == 4000
    assert len(faults.owner) < 5
    flips = np.count_nonzero(faults.model == 0)
    assert flips < 6  # .13 are expected


def test_own_words() -> None:
    def halves(random: np.random.Generator, words: np.ndarray, path: str) -> np.ndarray:
        assert path == "conv"
        words[random.integers(3)] = 0xFFFFFFFF
        return (words << np.uint32(16)) | (words >> np.uint32(16))

    faults = patterns.sample(0, PARAMS, 3, patterns.words(halves), paths="conv")
    injected = jax.jit(jaxfi.inject)
    for row in range(3):
        faulty = np.asarray(injected(PARAMS, faults.fault(row))["conv"]).view(np.uint32)
        before = PARAMS["conv"].view(np.uint32)
        swapped = (before << np.uint32(16)) | (before >> np.uint32(16))
        ones = (faulty == 0xFFFFFFFF).all(axis=(1, 2, 3))
        assert ones.sum() == 1
        assert np.array_equal(faulty[~ones], swapped[~ones])
    nothing = patterns.sample(0, PARAMS, 2, patterns.words(lambda random, words, path: words))
    assert not nothing.activated(PARAMS).any()


def test_campaigns_of_patterns() -> None:
    apply_fn, params, shape = models.plain_conv()
    images = np.random.default_rng(0).normal(size=(13, *shape)).astype(np.float32)
    several = [
        patterns.burst(3), patterns.bit_error_rate(2e-3), patterns.channel(),
        patterns.kernel(model="zero"), patterns.stuck_lane(0, of=2, model="stuck-at-1"),
    ]  # fmt: skip
    faults = all_of([patterns.sample(0, params, 20, pattern) for pattern in several])
    fast, reference = (
        jaxfi.run_campaign(apply_fn, params, faults, images, None, batch_size=5, engine=engine)
        for engine in ("fast", "reference")
    )
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert np.array_equal(fast.due, reference.due)
    assert set(np.unique(fast.outcomes)) == {0, 1, 2}


def all_of(lists: list) -> Any:
    total = lists[0]
    for more in lists[1:]:
        total = total + more
    return total


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: patterns.burst(0), ValueError, "length 0 is out of range"),
        (lambda: patterns.bit_error_rate(0), ValueError, "rate 0 is out of range: allowed"),
        (lambda: patterns.row(model="value"), ValueError, "'value' has no pattern: allowed"),
        (lambda: patterns.channel(order="jax"), ValueError, "unknown order 'jax': allowed"),
        (lambda: patterns.stuck_lane(2, of=2), ValueError, "lane 2 is out of range: allowed"),
        (lambda: patterns.sample(0, PARAMS, 3, patterns.burst), TypeError, "pattern is a function"),
        (lambda: patterns.sample(0, PARAMS, 3, patterns.burst(33)), ValueError, "no leaf has"),
        (lambda: patterns.sample(0, PARAMS, 3, patterns.row(), paths="bias"), ValueError,
         r"no leaf has rows: the leaves are \(4,\)"),
        (lambda: patterns.sample(0, PARAMS, 10**9, patterns.bit_error_rate(0.1)), ValueError,
         "are about .* faults: allowed are"),
        (lambda: patterns.sample(0, PARAMS, -1, patterns.row()), ValueError, "num_experiments -1"),
        (lambda: patterns.sample(0, PARAMS, 1, patterns.words(lambda r, w, p: w[:1]), paths="conv"),
         ValueError, r"returned uint32\[1, 1, 3, 4\] for the words of conv: allowed is uint32\[3,"),
        (lambda: patterns.population(PARAMS, patterns.bit_error_rate(0.1)), ValueError, "not co"),
    ],
)  # fmt: skip
def test_what_is_no_pattern_is_said(make: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_example_of_the_page_runs() -> None:
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "faults.md", "exec"), {})
