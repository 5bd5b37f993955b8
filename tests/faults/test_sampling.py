"""How many faults and which: against published numbers, exact counts and statistics."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxfi.faults import (
    FAULT_MODELS,
    FaultList,
    exhaustive_faults,
    fault_population,
    sample_faults,
    sample_size,
)

# Table 1 of Investigating on Gradient Regularization for Testing Neural Networks (LOD 2024):
# parameters, possible faults, applied faults.
TABLE_1 = {
    "resnet18/cifar10": (11173962, 715133568, 16641),
    "resnet9/cifar10": (2440266, 156177024, 16639),
    "lenet/cifar10": (1626442, 104092288, 16638),
    "vgg11/cifar10": (9756426, 624411264, 16641),
    "vgg16/cifar10": (15253578, 976228992, 16641),
    "resnet18/mnist": (11172810, 715059840, 16641),
    "resnet9/mnist": (2439114, 156103296, 16639),
    "vgg11/mnist": (9755274, 624337536, 16641),
    "vgg16/mnist": (15252426, 976155264, 16641),
}

LENET_SHAPES = {  # MNIST: DESIGN's 1,625,866 parameters
    "conv1": {"kernel": (3, 3, 1, 32), "bias": (32,)},
    "conv2": {"kernel": (3, 3, 32, 64), "bias": (64,)},
    "fc1": {"kernel": (12544, 128), "bias": (128,)},
    "fc2": {"kernel": (128, 10), "bias": (10,)},
}


def lenet() -> dict:
    return jax.tree.map(
        lambda shape: np.zeros(shape, np.float32),
        LENET_SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


SMALL = {
    "a": {"kernel": np.zeros((5, 8), np.float32), "bias": np.zeros(8, np.float32)},
    "b": {"kernel": np.zeros((8, 4), np.int8)},
    "c": np.zeros((3, 2), jnp.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
}
# Sites of SMALL by leaf in tree order, one transition: elements x bits.
SMALL_SITES = {"a/bias": 8 * 32, "a/kernel": 40 * 32, "b/kernel": 32 * 8, "c": 6 * 16, "empty": 0}


def sites(faults: FaultList) -> list[tuple]:
    columns = (faults.leaf, faults.element, faults.bit, faults.model)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def by_leaf(faults: FaultList) -> dict[str, int]:
    return {p: int(np.sum(faults.leaf == i)) for i, p in enumerate(faults.paths)}


@pytest.mark.parametrize("num_parameters, population, applied", TABLE_1.values(), ids=TABLE_1)
def test_table_1(num_parameters: int, population: int, applied: int) -> None:
    params = {"w": jax.ShapeDtypeStruct((num_parameters,), jnp.float32)}
    assert fault_population(params) == population
    assert sample_size(population) == applied


def test_table_1_is_the_reference_file(reference_dir: Path) -> None:
    lines = (reference_dir / "networks.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert {f"{r[0]}/{r[1]}": tuple(map(int, r[3:])) for r in rows} == TABLE_1


def test_population_of_mixed_words_beyond_int32() -> None:
    params = {
        "wide": jax.ShapeDtypeStruct((2**20, 2**15), jnp.float32),
        "half": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
        "byte": jax.ShapeDtypeStruct((), jnp.int8),
    }
    assert fault_population(params) == 2**35 * 64 + 3 * 32 + 16
    assert fault_population(lenet()) == 1_625_866 * 64
    assert fault_population({}) == 0


@given(st.integers(1, 10**13), st.floats(1e-3, 0.5), st.floats(0.5, 5), st.floats(0.05, 0.95))
@hypothesis.settings(max_examples=200, deadline=None)
def test_sample_size_gives_the_margin(population: int, margin: float, t: float, p: float) -> None:
    """Solving the margin for the sample size and back: e = t sqrt(p(1-p)/n (N-n)/(N-1))."""
    n = sample_size(population, margin, t, p)
    assert 0 <= n <= population

    def margin_of(n: float) -> float:
        return t * math.sqrt(p * (1 - p) / n * (population - n) / max(population - 1, 1))

    if 1 < n < population - 1:
        assert margin_of(n + 0.5) <= margin * (1 + 1e-6)
        assert margin_of(n - 0.5) >= margin * (1 - 1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "population 0 is too small"),
        ((-5,), "population -5"),
        ((10, 0.0), r"margin 0\.0 is out of range"),
        ((10, 1), "margin 1"),
        ((10, math.nan), "margin nan"),
        ((10, 0.01, 0), "t 0"),
        ((10, 0.01, math.inf), "t inf"),
        ((10, 0.01, math.nan), "t nan"),
        ((10, 0.01, 2.58, 0), "p 0"),
        ((10, 0.01, 2.58, 1.0), r"p 1\.0"),
        ((10, 0.01, 2.58, math.nan), "p nan"),
    ],
)
def test_sample_size_bad_input(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_size(*arguments)


@pytest.mark.parametrize("by", ["layer", "network", "bit"])
@pytest.mark.parametrize("model", [*FAULT_MODELS, "stuck-at"])
@given(share=st.floats(0, 1), key=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=8, deadline=None)
def test_exact_count_distinct_and_valid(by: str, model: str, share: float, key: int) -> None:
    value = 3.0 if model == "value" else None
    everything = sites(exhaustive_faults(SMALL, model=model, value=value))
    count = round(share * len(everything))
    faults = sample_faults(key, SMALL, count, model=model, by=by, value=value)
    drawn = sites(faults)
    assert len(faults) == count
    assert len(set(drawn)) == count
    assert set(drawn) <= set(everything)
    assert sites(sample_faults(key, SMALL, count, model=model, by=by, value=value)) == drawn
    assert np.isnan(faults.value).all() or (model == "value" and (faults.value == 3).all())


def test_exhaustive_order() -> None:
    expected = [
        (leaf, element, bit, 0)
        for leaf, (path, num_sites) in enumerate(SMALL_SITES.items())
        for element in range(num_sites // {"b/kernel": 8, "c": 16}.get(path, 32))
        for bit in range({"b/kernel": 8, "c": 16}.get(path, 32))
    ]
    assert sites(exhaustive_faults(SMALL)) == expected


def test_exhaustive_restricted() -> None:
    faults = exhaustive_faults(SMALL, paths="a/*", bits=[31, 23, 31], model="stuck-at")
    expected = [
        (leaf, element, bit, model)
        for leaf, size in ((0, 8), (1, 40))
        for element in range(size)
        for bit in (23, 31)
        for model in (1, 2)
    ]
    assert sites(faults) == expected
    assert len(exhaustive_faults(SMALL, bits=[])) == 0
    whole = sites(exhaustive_faults(SMALL, paths=["c", "empty"], model="zero"))
    assert whole == [(3, element, -1, 3) for element in range(6)]


@given(st.integers(0, 1625866 * 32 // 1000))
@hypothesis.settings(max_examples=10, deadline=None)
def test_layers_get_their_share_of_parameters(num_faults: int) -> None:
    """DESIGN's rule: in proportion to a layer's parameters, rounded; here the sum is exact too."""
    faults = sample_faults(7, lenet(), num_faults)
    counts = collections.Counter(np.array(faults.paths)[faults.leaf])
    for layer, shapes in LENET_SHAPES.items():
        parameters = sum(math.prod(shape) for shape in shapes.values())
        drawn = sum(counts[f"{layer}/{name}"] for name in shapes)
        assert abs(drawn - num_faults * parameters / 1_625_866) < 1
    assert sum(counts.values()) == num_faults


def test_paper_sized_list_of_lenet() -> None:
    faults = sample_faults(0, lenet(), 16638)
    layers = dict.fromkeys(LENET_SHAPES, 0)
    for path, count in by_leaf(faults).items():
        layers[path.split("/")[0]] += count
    # 16638 x (320, 18496, 1605760, 1290) / 1625866 = 3.27, 189.27, 16432.24, 13.20
    assert layers == {"conv1": 3, "conv2": 190, "fc1": 16432, "fc2": 13}


def test_bits_get_equal_shares() -> None:
    faults = sample_faults(0, lenet(), 3205, by="bit")
    counts = np.bincount(faults.bit, minlength=32)
    assert sorted(counts.tolist()) == [100] * 27 + [101] * 5
    only = sample_faults(0, lenet(), 40, by="bit", bits=[30, 31, 0])
    assert sorted(np.bincount(only.bit)[[0, 30, 31]].tolist()) == [13, 13, 14]


def test_network_is_in_proportion_to_sites_and_prefix_stable() -> None:
    long = sample_faults(3, lenet(), 5000, by="network")
    for count in (0, 1, 63, 64, 65, 1000):
        assert sample_faults(3, lenet(), count, by="network") == long[:count]
    dense = sample_faults(3, SMALL, 1888, by="network")  # every site, and the same beginning
    assert sample_faults(3, SMALL, 900, by="network") == dense[:900]
    counts = by_leaf(sample_faults(3, SMALL, 1000, by="network"))
    for path, num_sites in SMALL_SITES.items():
        share = num_sites / 1888
        error = math.sqrt(1000 * share * (1 - share) * (1888 - 1000) / 1887)  # hypergeometric
        assert abs(counts[path] - 1000 * share) <= 5 * error


def test_sites_are_uniform() -> None:
    """Chi-square on fixed keys, over bits, over elements and over pairs, within one layer."""
    params = {"w": np.zeros((16, 8), np.float32)}
    element_bit = np.zeros((128, 32))
    for key in range(400):
        faults = sample_faults(key, params, 200)
        np.add.at(element_bit, (faults.element, faults.bit), 1)
    assert element_bit.sum() == 80_000
    for counts in (element_bit.sum(0), element_bit.sum(1)):
        assert 1e-3 < scipy.stats.chisquare(counts).pvalue < 1 - 1e-3
    # Without replacement, each site is binomial(400, 200/4096): the statistic is about
    # chi-square, scaled by the finite-population correction.
    expected = 400 * 200 / 4096
    statistic = np.sum((element_bit - expected) ** 2) / expected / (1 - 200 / 4096)
    assert 1e-3 < scipy.stats.chi2(4095).sf(statistic) < 1 - 1e-3


def test_polarities_and_first_draws_are_uniform() -> None:
    params = {"w": np.zeros(4, np.int8)}
    first = collections.Counter(
        sites(sample_faults(key, params, 1, model="stuck-at"))[0] for key in range(6400)
    )
    assert len(first) == 64
    assert 1e-3 < scipy.stats.chisquare(list(first.values())).pvalue < 1 - 1e-3


@pytest.mark.parametrize("key", [0, 1, 12345, 2**32 - 1])
def test_int_key_is_the_jax_key(key: int) -> None:
    drawn = sample_faults(key, SMALL, 50)
    assert sample_faults(np.uint32(key), SMALL, 50) == drawn
    assert sample_faults(jax.random.key(np.uint32(key)), SMALL, 50) == drawn
    assert sample_faults(jax.random.PRNGKey(np.uint32(key)), SMALL, 50) == drawn
    assert sample_faults(key + 1, SMALL, 50) != drawn


# The promise "same key, same list, on every platform", as literals: (leaf, element, bit, model).
GOLDEN_LIST = [
    (0, 1, 24, 2),
    (1, 6, 4, 1),
    (1, 37, 30, 1),
    (1, 9, 30, 2),
    (0, 3, 19, 1),
    (0, 2, 11, 1),
    (1, 38, 23, 1),
    (1, 39, 23, 1),
    (1, 7, 6, 2),
    (1, 32, 28, 2),
    (2, 22, 6, 2),
    (2, 31, 5, 1),
]
GOLDEN_LENET = [
    (1, 121, 25, 0),
    (1, 246, 10, 0),
    (5, 1252978, 2, 0),
    (5, 1545450, 1, 0),
    (7, 377, 13, 0),
]


def test_golden_list() -> None:
    drawn = sample_faults(2024, SMALL, 12, model="stuck-at")
    assert sites(drawn) == GOLDEN_LIST
    lenet_list = sample_faults(0, lenet(), 16638)
    assert sites(lenet_list[[0, 1, 200, 10_000, -1]]) == GOLDEN_LENET


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_faults": 1889}, "num_faults 1889 is out of range: there are 1888 fault sites"),
        ({"num_faults": -1}, "num_faults -1 is out of range"),
        ({"num_faults": 97, "paths": "c"}, "there are 96 fault sites"),
        ({"by": "leaf"}, "cannot sample by 'leaf': allowed are layer, network, bit"),
        ({"model": "gremlin"}, "unknown fault model 'gremlin'"),
        ({"paths": "d*"}, r"no leaf matches \('d\*',\): the leaves are a/bias, a/kernel"),
        ({"paths": []}, "no leaf matches"),
        ({"paths": ["a/*", "d*"]}, r"no leaf matches 'd\*': the leaves are a/bias"),
        ({"bits": [3, 8]}, r"bit 8 is outside b/kernel \(int8\): allowed are 0 to 7"),
        ({"bits": [-1]}, "bit -1 is outside a/bias"),
        ({"key": -1}, "key -1 is out of range"),
        ({"key": 2**64}, "key 18446744073709551616 is out of range"),
        ({"model": "value"}, "needs a value"),
        ({"model": "value", "value": 300}, "value 300 does not fit int8"),
    ],
)
def test_bad_input(options: dict, message: str) -> None:
    arguments = {"key": 0, "params": SMALL, "num_faults": 3, **options}
    with pytest.raises(ValueError, match=message):
        sample_faults(**arguments)


@pytest.mark.parametrize("key", ["seed", 1.5, None])
def test_bad_key(key: object) -> None:
    with pytest.raises(TypeError, match="is not a key: allowed are an integer and a JAX"):
        sample_faults(key, SMALL, 3)


def test_fractional_count() -> None:
    with pytest.raises(TypeError, match="num_faults 10.0 is not an integer"):
        sample_faults(0, SMALL, 10.0)


@pytest.mark.parametrize(
    "bits, message",
    [
        ([1.5], "bit 1.5 is not an integer"),
        (["3"], "bit '3' is not an integer"),
        (3, r"bits is 3: allowed are several integers, as in bits=\[30, 31\]"),
        ("31", "bits is '31': allowed are several integers"),
    ],
)
def test_bad_bits(bits: object, message: str) -> None:
    for draw in (
        lambda: sample_faults(0, SMALL, 3, bits=bits),
        lambda: exhaustive_faults(SMALL, bits=bits),
    ):
        with pytest.raises(TypeError, match=message):
            draw()


def test_bits_may_be_any_iterable() -> None:
    expected = sites(exhaustive_faults(SMALL, bits=[0, 7]))
    for bits in (np.array([7, 0]), {0, 7}, (b for b in (7, 0, 7)), range(0, 8, 7)):
        assert sites(exhaustive_faults(SMALL, bits=bits)) == expected


POPULATIONS = {  # what is drawn, and whether a site (path, bit, model) can be in it
    "all": ({}, lambda path, bit, model: model == "bit-flip" and bit >= 0),
    "paths": ({"paths": "a/*"}, lambda path, bit, model: path[0] == "a" and model == "bit-flip"),
    "bits": ({"bits": [0, 7]}, lambda path, bit, model: bit in (0, 7) and model == "bit-flip"),
    "stuck-at": ({"model": "stuck-at"}, lambda path, bit, model: model.startswith("stuck-at")),
    "zero": ({"model": "zero"}, lambda path, bit, model: bit == -1),
}


@pytest.mark.parametrize("options, possible", POPULATIONS.values(), ids=POPULATIONS)
def test_population_of_a_drawn_list_is_counted(options: dict, possible: Callable) -> None:
    """Against every site of the small network, one by one."""
    width = {"b/kernel": 8, "c": 16}
    everything = [
        (leaf, bit)
        for leaf, (path, num_sites) in enumerate(SMALL_SITES.items())
        for _ in range(num_sites // width.get(path, 32))
        for bit in range(-1, width.get(path, 32))
        for model in (("zero",) if bit < 0 else ("bit-flip", "stuck-at-0", "stuck-at-1"))
        if possible(path, bit, model)
    ]
    whole = exhaustive_faults(SMALL, **options)
    assert len(whole) == whole.population == len(everything)
    for faults in (whole, sample_faults(0, SMALL, 5, **options)):
        assert faults.population == len(everything)
        assert faults.population_of(leaves=[1, 2]) == sum(leaf in (1, 2) for leaf, _ in everything)
        assert faults.population_of(bit=7) == sum(bit == 7 for _, bit in everything)
        assert faults.population_of([0], 7) == sum(site == (0, 7) for site in everything)


def test_population_of_a_list_from_elsewhere_is_all(tmp_path: Path) -> None:
    """A part of a list, a list from a file: what it was drawn from is not known."""
    faults = sample_faults(0, SMALL, 5, bits=[3])
    faults.to_csv(tmp_path / "faults.csv")
    assert (faults + faults).population == 2 * faults.population  # counted twice
    assert (faults + faults[:3]).population == fault_population(SMALL)
    for other in (faults[:3], FaultList.from_csv(tmp_path / "faults.csv", SMALL)):
        assert other.population == fault_population(SMALL)
        assert other.population_of(bit=3) == fault_population(SMALL) - sum(
            other.population_of(bit=bit) for bit in range(32) if bit != 3
        )
    assert FaultList.from_csv(tmp_path / "faults.csv", SMALL) == faults
