"""Sampled pairs: the full campaign's outcomes on the same pairs, and intervals that hold."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxfi
from jaxfi.campaign._sample import Sample
from jaxfi.outcomes._outcomes import Rates, Results, estimate_sampled_difference, rate_of
from jaxfi.outcomes._two_stage import Seen, parts_of_variance
from tests import conformance_models
from tests.conformance_models import batch_coupled, plain_conv, plain_mlp
from tests.engine.test_conformance import faults_in_every_leaf

RANDOM = np.random.default_rng(0)


def arguments(model, num_images=23):
    apply_fn, params, shape = model()
    images = RANDOM.normal(size=(num_images, *shape)).astype(np.float32)
    faults = faults_in_every_leaf(params)
    return apply_fn, params, faults, images, RANDOM.integers(0, 2, num_images)


def assert_same_pairs(sampled, full) -> None:
    rows, images = np.arange(len(full.faults))[:, None], sampled.images
    assert images.dtype == np.int32
    assert all(len(set(row)) == len(row) for row in images.tolist())
    np.testing.assert_array_equal(sampled.outcomes, full.outcomes[rows, images])
    np.testing.assert_array_equal(sampled.due, full.due[rows, images])
    np.testing.assert_array_equal(sampled.pairs_correct, full.pairs_correct[rows, images])
    np.testing.assert_array_equal(sampled.correct, sampled.pairs_correct.sum(axis=1))
    seen = np.isin(np.arange(len(full.labels)), images)
    np.testing.assert_array_equal(sampled.golden[seen], full.golden[seen])
    np.testing.assert_array_equal(sampled.labels, full.labels)


@pytest.mark.filterwarnings("ignore:the output does not depend on")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            model,
            id=model.__name__,
            marks=[] if number % 6 == 0 or model is batch_coupled else [pytest.mark.slow],
        )
        for number, model in enumerate(conformance_models.TINY)
    ],
)
def test_pairs_are_those_of_the_full_campaign(model) -> None:
    num_images = 20 if model is batch_coupled else 23
    with jax.numpy_rank_promotion("allow"):
        given = arguments(model, num_images)
        full = jaxfi.run_campaign(*given, batch_size=5)
        for count in (1, 3, 12):
            sampled = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=count, seed=count)
            assert sampled.outcomes.shape == (len(given[2]), count)
            assert_same_pairs(sampled, full)


@pytest.mark.parametrize("engine", ["reference", "vmap"])
def test_other_engines_see_the_same(engine) -> None:
    given = arguments(plain_conv)
    fast, other = (
        jaxfi.run_campaign(*given, batch_size=5, images_per_fault=4, engine=name)
        for name in ("fast", engine)
    )
    np.testing.assert_array_equal(fast.images, other.images)
    np.testing.assert_array_equal(fast.outcomes, other.outcomes)


def test_memory_and_directories_change_nothing(tmp_path) -> None:
    given = arguments(plain_conv)
    settings = {"batch_size": 5, "images_per_fault": 4, "seed": 3}
    expected = jaxfi.run_campaign(*given, **settings)
    little = jaxfi.run_campaign(*given, **settings, memory_budget=2 * 2**20)
    kept = jaxfi.run_campaign(*given, **settings, workdir=tmp_path)
    loaded = jaxfi.load_campaign(tmp_path)
    for campaign in (little, kept, loaded):
        np.testing.assert_array_equal(campaign.images, expected.images)
        np.testing.assert_array_equal(campaign.outcomes, expected.outcomes)
        np.testing.assert_array_equal(campaign.correct, expected.correct)
    assert loaded.rates().masked == expected.rates().masked
    assert expected.audit(20).agrees.all()
    assert "x 4 images of 23 each" in repr(loaded)
    with pytest.raises(ValueError, match="images_per_fault is 4 there and absent here"):
        jaxfi.run_campaign(*given, batch_size=5, seed=3, workdir=tmp_path)
    with pytest.raises(ValueError, match="images_per_fault is 4 there and 5 here"):
        jaxfi.run_campaign(*given, **settings | {"images_per_fault": 5}, workdir=tmp_path)


def test_parts_of_a_sampled_campaign() -> None:
    given = arguments(plain_conv)
    campaign = jaxfi.run_campaign(*given, batch_size=5, images_per_fault=4)
    part = campaign[3:9]
    np.testing.assert_array_equal(part.images, campaign.images[3:9])
    assert sum(row.num_faults for row in campaign.rates(by="layer")) == len(campaign)
    with pytest.raises(ValueError, match="each fault saw 4 images of its own"):
        campaign.rates(images=[0])
    assert jaxfi.run_campaign(*given, batch_size=5, images_per_fault=23).images is None


def test_two_networks_see_the_same_images() -> None:
    apply_fn, params, faults, images, labels = arguments(plain_mlp)
    other = jax.tree.map(lambda leaf: leaf * np.float32(1.1), params)
    before, after, elsewhere = (
        jaxfi.run_campaign(apply_fn, p, faults, images, labels, batch_size=5,
                           images_per_fault=6, seed=seed)
        for p, seed in ((params, 0), (other, 0), (other, 1))
    )  # fmt: skip
    found = jaxfi.paired_difference(before, after)
    value = (after.outcomes == 0).mean() - (before.outcomes == 0).mean()
    assert found.value == pytest.approx(value)
    assert found.low < found.value < found.high
    with pytest.raises(ValueError, match="the campaigns saw different images"):
        jaxfi.paired_difference(before, elsewhere)


@pytest.mark.parametrize(
    "count, error, message",
    [
        (0, ValueError, "images_per_fault 0 is out of range: allowed are integers >= 1"),
        (24, ValueError, "images_per_fault 24 is out of range: .* from 1 to the 23 images"),
        (2.0, TypeError, "images_per_fault 2.0 is not an integer"),
    ],
)
def test_numbers_that_cannot_be_drawn(count, error, message) -> None:
    with pytest.raises(error, match=message):
        jaxfi.run_campaign(*arguments(plain_mlp), images_per_fault=count)


# Draws


class Faults(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.leaf)


def test_every_image_is_as_likely() -> None:
    """Also where the last batch is a short one, and where a fault takes more than a batch."""
    faults = Faults(leaf=np.sort(RANDOM.integers(0, 3, 12)))
    for count in (1, 4, 9):
        drawn = [Sample(faults, 11, count, 4, seed).images for seed in range(1500)]
        assert all(len(set(row)) == count for images in drawn for row in images.tolist())
        share = np.bincount(np.concatenate(drawn).ravel(), minlength=11) / (1500 * 12)
        # Faults that share a window are not independent: four windows in each draw.
        error = np.sqrt(count / 11 / 1500 / 4)
        assert np.abs(share - count / 11).max() < 5 * error


def test_a_draw_is_of_its_seed_alone() -> None:
    faults = Faults(leaf=np.zeros(50, int))
    a, b, c = (Sample(faults, 100, 5, 20, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.images, b.images)
    assert not np.array_equal(a.images, c.images)
    assert a.images[0].tolist() == [3, 59, 99, 96, 82]  # on every machine


# Intervals


def beta_binomial(random, num_faults, num_images, spread):
    """Outcomes of faults and images that both matter."""
    of_fault = random.normal(size=(num_faults, 1)) * spread
    of_image = random.normal(size=(1, num_images)) * 0.7
    share = 1 / (1 + np.exp(-(of_fault + of_image - 1)))
    return (random.random((num_faults, num_images)) < share).astype(np.uint8) * 2


def coverage(outcomes, right, leaf, num_faults, count, batch_size, repeats, t):
    """Shares of repeats whose intervals hold the truth, by rate, and of a paired difference."""
    after = np.roll(outcomes, 1, axis=1)
    size, num_images = outcomes.shape
    truth = {
        "masked": (outcomes == 0).mean(), "critical": (outcomes == 2).mean(),
        "faulty_accuracy": (right & (outcomes != 2)).mean(),
    }  # fmt: skip
    hits = dict.fromkeys((*truth, "difference"), 0)
    for seed in range(repeats):
        random = np.random.default_rng(seed)
        rows = np.sort(random.choice(size, num_faults, replace=False))
        sample = Sample(Faults(leaf=leaf[rows]), num_images, count, batch_size, seed)
        pairs = rows[:, None], sample.images
        known = np.isin(sample.order, sample.order[
            np.isin(np.arange(num_images) // batch_size, sample.batches())
        ])  # fmt: skip
        clean = np.full(num_images, -1, np.int8)
        clean[sample.order[known]] = right[sample.order[known]]
        seen = Seen(sample.images, clean, leaf[rows])
        correct = (right & (outcomes != 2))[pairs]
        results = Results(
            outcomes[pairs], np.zeros(pairs[1].shape, bool), correct.sum(axis=1), correct, seen
        )
        for name, value in truth.items():
            found = rate_of(results, name, size, t)
            hits[name] += found.low <= value <= found.high
        moved = (after[pairs] == 0).astype(int) - (outcomes[pairs] == 0)
        found = estimate_sampled_difference(moved, moved.mean(axis=1), seen, size, t)
        hits["difference"] += found.low <= (after == 0).mean() - truth["masked"] <= found.high
    return {name: count / repeats for name, count in hits.items()}


@pytest.mark.parametrize(
    "num_faults, count, batch_size, spread, repeats",
    [(300, 1, 50, 2.0, 300), (300, 4, 50, 2.0, 300), (1500, 3, 50, 1.0, 200),
     (200, 150, 50, 1.0, 200),
     *(pytest.param(*case, 2000, marks=pytest.mark.slow) for case in [
         (100, 1, 100, 2.0), (1000, 2, 100, 0.2), (1500, 10, 30, 2.0), (400, 399, 100, 1.0)])],
)  # fmt: skip
def test_intervals_hold(num_faults, count, batch_size, spread, repeats) -> None:
    random = np.random.default_rng(1)
    outcomes = beta_binomial(random, 1500, 400, spread)
    right = random.random(400) < 0.9
    leaf = np.sort(random.integers(0, 5, 1500))
    for t, nominal in ((1.96, 0.95), (2.576, 0.99)):
        found = coverage(outcomes, right, leaf, num_faults, count, batch_size, repeats, t)
        error = 3 * np.sqrt(nominal * (1 - nominal) / repeats)
        assert min(found.values()) > nominal - error, found


def test_parts_of_variance_by_hand() -> None:
    """Two leaves, two images: images explain everything in the first, nothing in the second."""
    values = np.array([[0, 1], [0, 1], [1, 1], [1, 1]])
    seen = Seen(np.array([[0, 1]] * 4), np.ones(10, np.int8), np.array([0, 0, 1, 1]))
    parts = parts_of_variance(values, seen)
    assert parts.within == pytest.approx((1 - 2 / 10) * 0.25 / 2)
    weights = 2 * (1 / 2 - 1 / 10) ** 2 + 8 * (1 / 10) ** 2
    excess = weights - (1 - 2 / 10) / 8
    # Between images 1.0 with 2 degrees of freedom, within 0 with 4, two faults an image.
    assert parts.shared == pytest.approx(excess * (1.0 / 2) / 2)
    assert Rates._fields[0] == "masked"
