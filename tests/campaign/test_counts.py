"""Campaigns that keep counts: those of the full campaign's pairs, on disk, by weight and bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxfi
from jaxfi.campaign import _run
from jaxfi.campaign._description import signed
from jaxfi.campaign._sample import Sample
from jaxfi.faults import FaultList, exhaustive_faults, sample_faults
from jaxfi.outcomes._outcomes import estimate_sampled_rate, per_fault_shares
from jaxfi.outcomes._two_stage import Seen
from tests.conformance_models import batch_coupled, linen_cnn, plain_conv, plain_mlp

RANDOM = np.random.default_rng(0)
NUMBERS = ("masked", "critical", "due", "correct")


def arguments(model, num_images=23, **sites):
    apply_fn, params, shape = model()
    images = RANDOM.normal(size=(num_images, *shape)).astype(np.float32)
    faults = exhaustive_faults(params, **{"bits": [0, 22, 29, 31], **sites})
    return apply_fn, params, faults, images, RANDOM.integers(0, 2, num_images)


def counted(outcomes, due, correct) -> tuple[np.ndarray, ...]:
    return (outcomes == 0).sum(1), (outcomes == 2).sum(1), due.sum(1), correct.sum(1)


def assert_counts_of(found, full) -> None:
    """`found` counts the pairs that it saw of the full campaign."""
    rows, images = np.arange(len(full.faults))[:, None], found.images()
    pairs = (array[rows, images] for array in (full.outcomes, full.due, full.pairs_correct))
    for name, expected in zip(NUMBERS, counted(*pairs), strict=True):
        np.testing.assert_array_equal(getattr(found, name), expected)
    total = found.masked.astype(int) + found.non_critical + found.critical
    np.testing.assert_array_equal(total, found.num_images)


@pytest.mark.parametrize("model", [plain_conv, plain_mlp, linen_cnn, batch_coupled])
def test_counts_are_those_of_the_same_pairs(model) -> None:
    given = arguments(model, 20 if model is batch_coupled else 23)
    full = jaxfi.run_campaign(*given, batch_size=5)
    assert_counts_of(jaxfi.run_campaign(*given, batch_size=5, keep="counts"), full)
    for count in (1, 7):
        found = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=count, keep="counts")
        assert_counts_of(found, full)
        pairs = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=count)
        np.testing.assert_array_equal(found.images(), pairs.images)
        np.testing.assert_array_equal(found.images([3, -1]), pairs.images[[3, -1]])


def test_blocks_and_engines_change_nothing(monkeypatch) -> None:
    given = arguments(plain_conv, bits=[30])
    settings = {"batch_size": 5, "images_per_fault": 4, "keep": "counts", "seed": 2}
    expected = jaxfi.run_campaign(*given, **settings)
    reference = jaxfi.run_campaign(*given, **settings, engine="reference")
    monkeypatch.setattr(_run, "FAULTS_PER_BLOCK", 50)
    monkeypatch.setattr(_run, "_PAIRS_PER_BLOCK", 1)
    small = jaxfi.run_campaign(*given, **settings)
    for other in (reference, small):
        for name in NUMBERS:
            np.testing.assert_array_equal(getattr(other, name), getattr(expected, name))


def test_faults_that_change_nothing_have_golden_counts(tmp_path) -> None:
    apply_fn, params, _, images, labels = arguments(plain_mlp)
    faults = exhaustive_faults(params, model="stuck-at", bits=[30, 31])
    full = jaxfi.run_campaign(apply_fn, params, faults, images, labels, batch_size=5)
    found = jaxfi.run_campaign(
        apply_fn, params, faults, images, labels, batch_size=5, keep="counts", workdir=tmp_path,
        images_per_fault=3,
    )  # fmt: skip
    assert_counts_of(found, full)
    assert found.num_not_activated == full.num_not_activated > 0


def test_a_directory_keeps_counts(tmp_path) -> None:
    given = arguments(plain_conv)
    settings = {"batch_size": 5, "images_per_fault": 4, "keep": "counts", "seed": 2}
    kept = jaxfi.run_campaign(*given, **settings, workdir=tmp_path)
    loaded = jaxfi.load_campaign(tmp_path)
    assert isinstance(loaded, jaxfi.CampaignCounts)
    for name in NUMBERS:
        assert getattr(loaded, name).dtype == np.uint8
        np.testing.assert_array_equal(getattr(loaded, name), getattr(kept, name))
    np.testing.assert_array_equal(loaded.images(), kept.images())
    assert loaded.rates() == kept.rates()
    assert "x 4 images of 23 each" in repr(loaded)
    assert not list(tmp_path.glob("faults-*.npz"))  # the list is a rule
    with pytest.raises(ValueError, match='keep is absent here|keep is "counts" there'):
        jaxfi.run_campaign(*given, batch_size=5, images_per_fault=4, seed=2, workdir=tmp_path)
    fewer = (*given[:2], exhaustive_faults(given[1], bits=[0, 22, 29]), *given[3:])
    with pytest.raises(ValueError, match="num_faults is"):
        jaxfi.run_campaign(*fewer, **settings, workdir=tmp_path)
    table = loaded.to_pandas(given[1])
    assert table["masked"].sum() == kept.masked.sum()
    assert list(table.columns[:7]) == [
        "row", "path", "element", "bit", "model", "value_before", "value_after",
    ]  # fmt: skip


def test_a_strangers_rule_is_checked(tmp_path) -> None:
    given = arguments(plain_mlp)
    jaxfi.run_campaign(*given, batch_size=5, keep="counts", workdir=tmp_path)
    path = tmp_path / "campaign.json"
    for change in (
        {"drawn_from": [[0, [40], 1]]}, {"drawn_from": [[99, [1], 1]]}, {"drawn_from": None},
        {"every": {"model": "melt", "value": None, "sites": []}}, {"every": 3},
        {"num_faults": 7}, {"keep": "all"},
    ):  # fmt: skip
        good = json.loads(path.read_text())
        path.write_text(json.dumps(signed({**good, **change})))
        with pytest.raises(ValueError, match="damaged or foreign|of another campaign"):
            jaxfi.load_campaign(tmp_path)
        path.write_text(json.dumps(good))
    jaxfi.load_campaign(tmp_path)


KILLED = """
import sys, time
import jax, jaxfi, numpy as np
from jaxfi.campaign import _ledger, _run

_run.FAULTS_PER_BLOCK, _run._PAIRS_PER_BLOCK = 200, 1
write = _ledger.DirectoryLedger.write

def told(self, *given):
    write(self, *given)
    print("wrote", flush=True)
    time.sleep(0.05)

_ledger.DirectoryLedger.write = told
random = np.random.default_rng(0)
params = {"a": random.normal(size=(6, 8)).astype("f4"), "b": random.normal(size=(8, 4))}
params["b"] = params["b"].astype("f4")
found = jaxfi.run_campaign(
    lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jaxfi.exhaustive_faults(params),
    random.normal(size=(30, 6)).astype("f4"), np.zeros(30, int), images_per_fault=5,
    batch_size=10, keep="counts", workdir=sys.argv[1],
)
np.save(sys.argv[2], np.stack([found.masked, found.critical, found.due, found.correct]))
"""


def test_a_killed_census_goes_on(tmp_path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(tmp_path / "found.npy")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            process.stdout.readline()
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    whole = [*command[:3], str(tmp_path / "other"), str(tmp_path / "whole.npy")]
    subprocess.run(whole, check=True, env=environment, stdout=subprocess.DEVNULL)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), np.load(tmp_path / "whole.npy"))


@pytest.mark.parametrize("by_rule", [True, False])
def test_rates_of_counts(by_rule) -> None:
    """Of all images those of the campaign; of some, at least as wide, and a census knows bits."""
    apply_fn, params, faults, images, labels = arguments(plain_conv)
    if not by_rule:
        faults = sample_faults(0, params, 300)
    given = apply_fn, params, faults, images, labels
    full = jaxfi.run_campaign(*given, batch_size=5)
    counts = jaxfi.run_campaign(*given, batch_size=5, keep="counts")
    assert_estimates(counts.rates(), full.rates())
    for by in ("layer", "bit", ("layer", "bit")):
        found, expected = counts.rates(by=by), full.rates(by=by)
        assert [part[:2] for part in found] == [part[:2] for part in expected]
        for a, b in zip(found, expected, strict=True):
            assert_estimates(a[2:7], b[2:7])
    assert counts.clean_accuracy == full.clean_accuracy
    pairs = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=4)
    some = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=4, keep="counts")
    for name in ("masked", "non_critical", "critical", "due"):
        a, b = getattr(some.rates(), name), getattr(pairs.rates(), name)
        assert a.value == pytest.approx(b.value, abs=1e-12)
        truth = getattr(full.rates(), name).value
        assert a.low <= truth <= a.high
    part = sum(row.num_faults for row in some.rates(by=("layer", "bit")))
    assert part == len(faults)


def of_critical(pairs) -> list[np.ndarray]:
    """Counts of which only the critical ones matter."""
    critical = pairs.sum(axis=1).astype(np.uint8)
    return [np.zeros_like(critical), critical, np.zeros_like(critical), np.zeros_like(critical)]


def assert_estimates(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "num_faults, count, repeats",
    [(1500, 4, 150), (300, 1, 150),
     *(pytest.param(*case, 1500, marks=pytest.mark.slow) for case in [(1500, 2), (400, 30)])],
)  # fmt: skip
def test_intervals_of_counts_hold(num_faults, count, repeats) -> None:
    """Of a census, where only images vary, and of a sample of faults, on outcomes of images that
    are as unlike as can be: the bound on what faults share is then reached."""
    random = np.random.default_rng(1)
    of_image = random.normal(size=(1, 400)) * 1.5
    share = 1 / (1 + np.exp(-(random.normal(size=(1500, 1)) + of_image - 1)))
    values = random.random((1500, 400)) < share
    hits = 0
    for seed in range(repeats):
        rows = np.sort(np.random.default_rng(seed).choice(1500, num_faults, replace=False))
        faults = FaultList.from_arrays({"w": np.zeros(1500, np.float32)}, 0, rows, 30, "bit-flip")
        sample = Sample(faults, 400, count, 50, seed)
        pairs = values[rows[:, None], sample.order[sample.places]]
        campaign = jaxfi.CampaignCounts(
            faults, *of_critical(pairs), count, np.zeros((400, 2)),
            np.zeros(400, int), {"nan": "critical", "batch_size": 50}, sample,
        )  # fmt: skip
        found = campaign.rates(population=1500, t=1.96).critical
        hits += found.low <= values.mean() <= found.high
    error = np.sqrt(0.95 * 0.05 / repeats)
    assert hits / repeats > 0.95 - 3 * error


def test_criticality_is_an_array_like_the_parameters(tmp_path) -> None:
    given = arguments(plain_conv)
    _, params, faults, *_ = given
    settings = {"batch_size": 5, "images_per_fault": 4}
    pairs = jaxfi.run_campaign(*given, **settings)
    counts = jaxfi.run_campaign(*given, **settings, keep="counts", workdir=tmp_path)
    for rate in ("critical", "masked", "due", "non_critical"):
        share = per_fault_shares(pairs.results, rate)
        for campaign in (pairs, counts, tmp_path):
            found = jaxfi.criticality(campaign, rate)
            by_bit = jaxfi.criticality(campaign, rate, by_bit=True)
            for leaf, (path, array) in enumerate(zip(faults.paths, jax.tree.leaves(params))):  # noqa: B905
                assert found[path].shape == array.shape
                assert by_bit[path].shape == (*array.shape, 32)
                expected = np.full((array.size, 32), np.nan)
                for row in np.flatnonzero(faults.leaf == leaf):
                    expected[faults.element[row], faults.bit[row]] = share[row]
                np.testing.assert_allclose(by_bit[path].reshape(-1, 32), expected, rtol=1e-6)
                np.testing.assert_allclose(found[path].ravel(), np.nanmean(expected, axis=1))
    with pytest.raises(ValueError, match="unknown rate 'soft': allowed are masked"):
        jaxfi.criticality(pairs, "soft")


def test_words_without_bits_have_no_bits() -> None:
    apply_fn, params, _, images, labels = arguments(plain_mlp)
    faults = exhaustive_faults(params, model="zero")
    found = jaxfi.run_campaign(apply_fn, params, faults, images, labels, keep="counts")
    assert all(np.isnan(a).all() for a in jaxfi.criticality(found, by_bit=True).values())
    assert all(np.isfinite(a).all() for a in jaxfi.criticality(found).values())


def test_a_bad_choice_is_named() -> None:
    with pytest.raises(ValueError, match="unknown keep 'all': allowed are outcomes, counts"):
        jaxfi.run_campaign(*arguments(plain_mlp), keep="all")


# A list that is a rule


def test_a_rule_gives_the_rows_of_its_table() -> None:
    params = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.int8), "c": np.float16(0)}
    for options in ({}, {"model": "stuck-at", "bits": [3, 5]}, {"model": "zero"}, {"paths": "b"}):
        rule = exhaustive_faults(params, **options)
        table = rule + rule[[]]  # columns of all
        assert type(table) is FaultList
        assert rule == table
        random = np.random.default_rng(0).integers(-len(rule), len(rule), 40)
        for rows in (
            random,
            random.tolist(),
            slice(3, None, 4),
            slice(None, 2),
            rule.leaf == 1,
            -1,
        ):
            assert rule[rows] == table[rows]
        assert rule.counts_by_leaf().tolist() == np.bincount(table.leaf, minlength=3).tolist()
        assert rule.population == len(rule)
    for rows in (len(rule), [0, -len(rule) - 1]):
        with pytest.raises(IndexError, match="out of bounds for a list of 40 faults"):
            rule[rows]
    with pytest.raises(IndexError, match="a mask is"):
        rule[np.ones(3, bool)]
    with pytest.raises(IndexError, match="chosen by float64"):
        rule[[0.5]]


def test_a_long_rule_takes_no_memory() -> None:
    rule = exhaustive_faults({"w": jax.ShapeDtypeStruct((60_000, 30_000), np.float32)})
    assert len(rule) == 60_000 * 30_000 * 32
    assert rule[-1].element.tolist() == [60_000 * 30_000 - 1]
    assert "every bit-flip of 1 of 1 leaves, 57,600,000,000 faults" in repr(rule)


def test_the_sampled_estimate_is_no_wider_than_counts_say() -> None:
    """Where images are alike for all faults, the two agree but for the bound."""
    faults = sample_faults(0, {"w": np.zeros(5000, np.float32)}, 2000)
    sample = Sample(faults, 400, 5, 50, 0)
    values = np.random.default_rng(0).random((2000, 5)) < 0.3
    seen = Seen(sample.images, np.ones(400, np.int8), faults.leaf)
    known = estimate_sampled_rate(values, seen, faults.population, 2.58)
    campaign = jaxfi.CampaignCounts(
        faults, *of_critical(values), 5, np.zeros((400, 2)),
        np.zeros(400, int), {"nan": "critical", "batch_size": 50}, sample,
    )  # fmt: skip
    found = campaign.rates().critical
    assert found.value == pytest.approx(known.value)
    assert known.high - known.low <= found.high - found.low < 3 * (known.high - known.low)


@pytest.mark.parametrize("share", [0.003, 0.01, 0.03])
def test_images_that_few_faults_saw_bound_what_they_can_say(share) -> None:
    """A leaf of 320 faults, for all of which the same few images are critical: those that the
    windows show may have none of them, or many."""
    faults = exhaustive_faults({"b": np.zeros(10, np.float32)})
    num_images, hits = 10_000, 0
    for seed in range(200):
        sample = Sample(faults, num_images, 4, 32, seed)
        critical = np.random.default_rng(seed).random(num_images) < share
        pairs = critical[sample.order[sample.places]]
        campaign = jaxfi.CampaignCounts(
            faults, *of_critical(pairs), 4, np.zeros((num_images, 2)), np.zeros(num_images, int),
            {"nan": "critical", "batch_size": 32}, sample,
        )  # fmt: skip
        found = campaign.rates().critical
        hits += found.low <= critical.mean() <= found.high
    assert hits >= 200 * 0.97  # at 99 %


def test_empty_leaves_have_no_criticality() -> None:
    params = {"w": np.eye(2, dtype=np.float32), "z": np.zeros((0, 2), np.float32)}
    images = np.float32([[1, 2], [2, 1]])
    for faults in (exhaustive_faults(params), sample_faults(0, params, 20)):
        given = lambda p, x: x @ p["w"], params, faults, images, [1, 0]
        for campaign in (jaxfi.run_campaign(*given), jaxfi.run_campaign(*given, keep="counts")):
            assert jaxfi.criticality(campaign)["z"].shape == (0, 2)
            assert jaxfi.criticality(campaign, by_bit=True)["z"].shape == (0, 2, 32)


def test_large_windows_do_not_take_much_memory() -> None:
    faults = exhaustive_faults({"w": jax.ShapeDtypeStruct((3000, 3000), np.float32)})
    sample = Sample(faults, 10_000, 5000, 100, 0)
    assert np.diff(sample.edges).max() * 5000 <= 2**23
    assert 50 <= sample.batches_of_a_fault() <= 51
