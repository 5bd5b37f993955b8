"""Experiments of several faults together, against single faults one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import jaxfi
from jaxfi import FaultList
from jaxfi.convert import read_fault_list, write_fault_list
from jaxfi.engine import _engines
from jaxfi.faults import FaultGroups
from tests import conformance_models as models
from tests.engine.test_conformance import faults_in_every_leaf

BATCH = 5


def images_like(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(13, *shape)).astype(np.float32)


def in_one_channel(params: Any, count: int = 3) -> FaultGroups:
    """Of every leaf, experiments of faults in one index of the last axis, two in one element."""
    generator, rows, ids = np.random.default_rng(0), [], []
    for leaf, array in enumerate(jax.tree.leaves(params)):
        for _ in range(2):
            channels = array.shape[-1] if array.ndim else 1
            inputs = array.size // channels
            channel = generator.integers(channels)
            elements = generator.integers(inputs, size=count) * channels + channel
            elements[-1] = elements[0]
            for element in elements:
                rows.append((leaf, element, generator.integers(0, 32), 0))
                ids.append(len(rows) // count)
    ids = np.repeat(np.arange(len(rows) // count), count)
    return FaultList.from_arrays(params, *zip(*rows, strict=True)).grouped(ids)


def one_after_another(params: Any, groups: FaultGroups, row: int) -> Any:
    """The parameters with each fault injected by itself."""
    faulty = jaxfi.inject(params, groups.first.fault(row))
    for other in np.flatnonzero(groups.owner == row):
        faulty = jaxfi.inject(faulty, groups.others.fault(int(other)))
    return faulty


@pytest.fixture
def anything_promotes():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("anything_promotes")
@pytest.mark.parametrize(
    "make",
    [
        models.plain_conv,
        models.wide_layers,
        models.recurrent,
        pytest.param(models.linen_cnn, marks=pytest.mark.slow),
    ],
)
def test_engines_agree_on_every_kind_of_group(make: Callable) -> None:
    apply_fn, params, shape = make()
    single = faults_in_every_leaf(params)
    order = np.argsort(single.leaf, kind="stable")
    random = np.random.default_rng(0)
    groups = [
        single[order].grouped(np.arange(len(single)) // 3),  # in a leaf, mostly
        single.grouped(random.permutation(len(single)) // 4),  # in any leaves
        single[:5],  # a few alone
    ]
    if all(np.ndim(leaf) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params)):
        groups.append(in_one_channel(params))
    faults = groups[0]
    for more in groups[1:]:
        faults = faults + more
    found = [
        jaxfi.run_campaign(apply_fn, params, faults, images_like(shape), None, batch_size=BATCH,
                           engine=engine)
        for engine in ("fast", "reference", "vmap")
    ]  # fmt: skip
    assert np.array_equal(found[0].outcomes, found[1].outcomes)
    assert np.array_equal(found[0].due, found[1].due)
    assert found[2].outcomes.shape == found[0].outcomes.shape
    assert len(np.unique(found[0].outcomes)) > 1
    network = jax.jit(apply_fn)
    images = images_like(shape)[:BATCH]
    golden = np.asarray(network(params, images))
    for row in range(0, len(faults), 7):
        outputs = np.asarray(network(one_after_another(params, faults, row), images))
        close = np.sort(outputs, axis=1)
        sure = close[:, -1] - close[:, -2] > 1e-3 * np.abs(close).max(axis=1)
        expected = outputs.argmax(axis=1) != golden.argmax(axis=1)
        here = found[0].outcomes[row, :BATCH] == 2
        finite = np.isfinite(outputs).all(axis=1)
        assert np.array_equal(here[sure & finite], expected[sure & finite])
    assert found[0].audit(30).agrees.all()


@pytest.mark.parametrize("make", [models.plain_conv, models.wide_layers])
def test_groups_in_one_channel_ride_in_columns(make: Callable, monkeypatch) -> None:
    apply_fn, params, shape = make()
    faults = in_one_channel(params, count=1 if make is models.wide_layers else 3)
    if make is models.wide_layers:  # two bits of one word: in one block for sure
        other = dataclasses.replace(faults.first, bit=(faults.bit + 7) % 32)
        faults = (faults.first + other).grouped(np.tile(np.arange(len(faults)), 2))
    given = apply_fn, params, faults, images_like(shape), None
    reference = jaxfi.run_campaign(*given, batch_size=BATCH, engine="reference")
    for method in ("slice", "whole"):
        monkeypatch.setitem(_engines._RUNNERS, method, None)
    fast = jaxfi.run_campaign(*given, batch_size=BATCH)
    assert np.array_equal(fast.outcomes, reference.outcomes)
    assert fast.outcomes.any()


def test_order_and_words() -> None:
    params = {"a": np.ones((2, 2), np.float32), "b": np.arange(3, dtype=np.int8)}
    faults = FaultList.from_sites(
        [("a", 0, 31), ("b", 1, 0), ("a", 3, 2), ("b", 2, 7), ("a", 0, 31)], params
    )
    groups = faults.grouped(["x", "b", "x", "a", "x"])
    assert isinstance(groups, FaultGroups)
    assert (len(groups), groups.sizes.tolist()) == (3, [1, 1, 3])
    assert groups.element.tolist() == [2, 1, 0]  # by their ids; within one, as they stood
    assert groups.is_spread.tolist() == [False, False, False]
    faulty = jaxfi.inject(params, groups.fault(2))
    assert faulty["a"].tolist() == [[1.0, 1.0], [1.0, pytest.approx(1.0, abs=1e-6)]]
    assert faulty["a"][1, 1] != 1
    assert groups.activated(params).tolist() == [True, True, True]
    assert faults.grouped([0, 1, 2, 3, 0])[0].activated(params).tolist() == [False]
    assert groups[[2, 0]].sizes.tolist() == [3, 1]
    assert groups[[2, 0]][1] == groups[0]
    assert groups[1] != groups[0]
    assert (groups[1] + groups[[2]] + groups[[0]]).sizes.tolist() == [1, 3, 1]
    assert (faults + groups)[5:] == groups
    assert (groups + faults)[:3] == groups
    assert faults[:3] != groups
    assert groups != faults[:3]
    assert "3 experiments of 1 to 3 faults, 5 together" in repr(groups)


def test_stuck_words_compose_in_order() -> None:
    params = {"a": np.full(2, 0b0101, np.uint8)}
    sites = [("a", 0, 0)]
    stuck = FaultList.from_sites(sites, params, model="stuck-at-0")
    flip = FaultList.from_sites(sites, params)
    first = (stuck + flip).grouped([0, 0])
    then = (flip + stuck).grouped([0, 0])
    assert jaxfi.inject(params, first.fault(0))["a"].tolist() == [0b0101, 0b0101]
    assert jaxfi.inject(params, then.fault(0))["a"].tolist() == [0b0100, 0b0101]
    assert first.activated(params).tolist() == [False]
    assert then.activated(params).tolist() == [True]


def test_two_flips_of_one_bit_are_masked() -> None:
    apply_fn, params, shape = models.plain_mlp()
    faults = FaultList.from_sites([("a/kernel", 3, 30)] * 2 + [("a/kernel", 3, 29)], params)
    found = jaxfi.run_campaign(
        apply_fn, params, faults.grouped([0, 0, 1]), images_like(shape), None
    )
    assert found.num_not_activated == 1
    assert not found.outcomes[0].any()
    assert found.outcomes[1].any()


def test_kept_continued_sampled_and_counted(tmp_path) -> None:
    apply_fn, params, shape = models.plain_conv()
    single = jaxfi.sample_faults(0, params, 120)
    groups = single.grouped(np.random.default_rng(0).permutation(120) // 3)
    given = apply_fn, params, groups, images_like(shape), None
    found = jaxfi.run_campaign(*given, batch_size=BATCH, workdir=tmp_path / "a")
    for path in list((tmp_path / "a" / "results").iterdir()):
        path.unlink()
    again = jaxfi.run_campaign(*given, batch_size=BATCH, workdir=tmp_path / "a")
    loaded = jaxfi.load_campaign(tmp_path / "a")
    assert np.array_equal(again.outcomes, found.outcomes)
    assert np.array_equal(loaded.outcomes, found.outcomes)
    assert loaded.faults == groups
    assert loaded[3:5].faults == groups[3:5]
    some = jaxfi.run_campaign(*given, batch_size=BATCH, images_per_fault=4)
    rows = np.arange(len(groups))[:, None]
    assert np.array_equal(some.outcomes, found.outcomes[rows, some.images])
    counts = jaxfi.run_campaign(*given, batch_size=BATCH, keep="counts")
    assert np.array_equal(counts.masked, (found.outcomes == 0).sum(axis=1))
    rates = found.rates()
    assert rates.masked.low < rates.masked.value < rates.masked.high
    assert len(found.to_pandas()) == len(groups)
    other = single.grouped(np.arange(120) // 3)
    with pytest.raises(ValueError, match="faults_file is"):
        jaxfi.run_campaign(apply_fn, params, other, images_like(shape), None, batch_size=BATCH,
                           workdir=tmp_path / "a")  # fmt: skip
    with pytest.raises(ValueError, match="several faults each: allowed are single faults"):
        jaxfi.criticality(found)


def test_rows_of_one_injection_are_an_experiment(tmp_path) -> None:
    params = {"conv1": {"kernel": np.zeros((3, 3, 1, 4), np.float32)}}
    path = tmp_path / "faults.csv"
    path.write_text(
        'Injection,Layer,TensorIndex,Bit\n4,conv1,"(3, 0, 2, 1)",30\n4,conv1,"(0, 0, 0, 0)",1\n'
        '2,conv1,"(1, 0, 0, 0)",2\n4,conv1,"(2, 0, 0, 0)",3\n'
    )
    groups = read_fault_list(path, params)
    assert isinstance(groups, FaultGroups)
    assert groups.sizes.tolist() == [3, 1]  # in the order of the file
    assert groups.bit.tolist() == [30, 2]
    write_fault_list(tmp_path / "again.csv", groups)
    assert read_fault_list(tmp_path / "again.csv", params) == groups


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.grouped([0, 1]), r"ids are int64 \(2,\): allowed is an integer or a text"),
        (lambda f: f.grouped([0.5] * 5), "ids are float64"),
        (lambda f: f.grouped([0, 0, 1, 1, 1]).grouped([0, 0]), "grouped already"),
        (lambda f: f.grouped([0, 0, 1, 1, 1]).to_csv("x"), "no CSV of single ones"),
    ],
)
def test_what_is_no_group_is_said(change: Callable, message: str) -> None:
    params = {"a": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=message):
        change(jaxfi.sample_faults(0, params, 5))


def test_groups_of_other_parameters_and_trials_are_refused() -> None:
    apply_fn, params, shape = models.plain_mlp()
    groups = jaxfi.sample_faults(0, params, 6).grouped([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="for other parameters"):
        jaxfi.run_campaign(apply_fn, {"a": params["a"]}, groups, images_like(shape), None)
    with pytest.raises(TypeError, match="a trial is grouped"):
        jaxfi.cumulative_accuracy(apply_fn, params, [groups], images_like(shape), np.zeros(13, int),
                                  [1, 2])  # fmt: skip
