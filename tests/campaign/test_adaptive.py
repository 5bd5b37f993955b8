"""Adaptive campaigns: their intervals cover as often as they say, and they stop when they may."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from jaxfi import exhaustive_faults, run_campaign
from jaxfi.campaign import _adaptive, run_sequential, run_stratified
from jaxfi.campaign._adaptive import _layers_and_bits
from jaxfi.campaign._anytime import Goal, anytime_estimate, confidence_sequence, draw_until_kept
from jaxfi.campaign._sample import Sample
from jaxfi.campaign._strata import (
    Strata,
    draw_strata_until_kept,
    neyman_counts,
    pilot_counts,
    stratified_estimates,
)
from jaxfi.outcomes import Rates, estimate_rate

# The confidence sequence


def confidence_sequence_by_hand(values, population, margin, log_evidence):
    """The formula, one draw after another."""
    total, weight, weighted, surprise = 0.0, 0.0, 0.0, 0.0
    running, squares, variance = 0.5, 0.25, 0.25
    for number, value in enumerate(values, 1):
        bet = margin / (margin + variance)
        left = population - number + 1
        weighted += bet * (value + total / left)
        weight += bet * population / left
        surprise += (value - running) ** 2 * (-np.log(1 - bet) - bet)
        total += value
        running = (0.5 + total) / (number + 1)
        squares += (value - running) ** 2
        variance = squares / (number + 1)
    return weighted / weight, (log_evidence + surprise) / weight


@pytest.mark.parametrize("population", [40, 10**9])
def test_confidence_sequence_is_the_formula(population: int) -> None:
    values = np.random.default_rng(0).beta(0.3, 0.1, 40)
    centre, half = confidence_sequence(values, population, 0.05, t=1.959964)
    for n in (1, 2, 39, 40):
        expected = confidence_sequence_by_hand(values[:n], population, 0.05, np.log(2 / 0.05))
        np.testing.assert_allclose((centre[n - 1], half[n - 1]), expected, rtol=1e-5)


POPULATIONS = {  # 5,000 values each, from 0 to 1
    "half": lambda generator: generator.random(5000) < 0.5,
    "clusters": lambda generator: generator.beta(0.3, 0.05, 5000),
    "rare": lambda generator: generator.random(5000) < 0.004,
    "constant": lambda generator: np.ones(5000),
}


@pytest.mark.parametrize("name", POPULATIONS)
def test_sequential_coverage_is_at_least_nominal(name: str) -> None:
    """Stopped as soon as its interval is narrow: 95 % must hold in at least 95 %."""
    generator = np.random.default_rng(3)
    population = np.asarray(POPULATIONS[name](generator), float)
    missed, margin, t = 0, 0.06, 1.96
    for _ in range(300):
        order = generator.permutation(population)[:, None]
        stop = draw_until_kept(lambda n, o=order: (o[:n], [0.0]), 5000, margin, t, first=50)[-1]
        found = anytime_estimate(order[:stop, 0], 5000, margin, t)
        assert found.high - found.low <= 2 * margin + 1e-12
        missed += not found.low <= population.mean() <= found.high
    assert missed <= 0.05 * 300


def test_an_ordinary_interval_would_not_do() -> None:
    """What the confidence sequence is for: the same stopping with Wilson's interval misses."""
    generator = np.random.default_rng(4)
    missed = 0
    for _ in range(300):
        order = (generator.random(3000) < 0.02).astype(float)
        for stop in range(10, 3000, 10):
            found = estimate_rate(order[:stop], 1, 10**9, t=1.96)
            if not found.low <= 0.02 <= found.high:
                missed += 1
                break
    assert missed > 0.15 * 300  # somewhere along the way
    missed = 0
    for _ in range(300):
        order = (generator.random(3000) < 0.02).astype(float)
        centre, half = confidence_sequence(order, 10**9, 0.01, t=1.96)
        missed += bool((np.abs(centre - 0.02) > half).any())
    assert missed <= 0.05 * 300


def test_a_census_ends_the_sequence() -> None:
    values = np.random.default_rng(0).random((60, 2))
    looks = draw_until_kept(lambda n: (values[:n], [0.0] * 2), 60, margin=0.001)
    assert looks[-1] == 60
    estimate = anytime_estimate(values[:, 0], 60, 0.001)
    assert estimate.low == estimate.high == pytest.approx(values[:, 0].mean())


# Strata


NOTHING = np.zeros(2)
STRATA = Strata(np.repeat([2_000, 60_000, 4_000], 8), np.tile(np.arange(8), 3))


def stratified_population(generator: np.random.Generator) -> list[np.ndarray]:
    """Of each stratum, its faults' shares [N_h, 2]: most alike, a few bit positions differ."""
    rate = np.array([0.02, 0.02, 0.05, 0.1, 0.3, 0.6, 0.97, 0.4])[STRATA.group]
    size = np.minimum(STRATA.sites, 4_000)  # the same distribution, with less memory
    return [
        np.stack([generator.beta(2 * p, 2 * (1 - p), n), generator.random(n) < p / 20], axis=1)
        for p, n in zip(rate, size, strict=True)
    ]


def test_stratified_coverage_and_saving() -> None:
    generator = np.random.default_rng(5)
    population = stratified_population(generator)
    truth = STRATA.weights @ np.stack([shares.mean(axis=0) for shares in population])
    square = STRATA.weights @ np.stack([(shares**2).mean(axis=0) for shares in population])
    margin, t, missed, sizes = 0.01, 1.96, np.zeros(2), []
    for _ in range(200):
        orders = [generator.permutation(shares) for shares in population]
        measure = lambda c, o=orders: ([x[:n] for x, n in zip(o, c, strict=True)], NOTHING)  # noqa: E731
        stages = draw_strata_until_kept(measure, STRATA, margin, t, pilot=300)
        found = stratified_estimates(STRATA, measure(stages[-1])[0], stages, t)
        assert all(rate.high - rate.low <= 2 * margin for rate in found)
        missed += [not r.low <= x <= r.high for r, x in zip(found, truth, strict=True)]
        sizes.append(stages[-1].sum())
    # 95 % of 200; a fair coin of 5 % exceeds 17 in one case of 100.
    assert (missed <= 17).all(), missed
    simple = (t / margin) ** 2 * (square - truth**2).max()
    assert np.mean(sizes) < simple


def test_neyman_counts_have_the_wanted_variance() -> None:
    """Against the textbook: n_h in proportion to W_h s_h, variance (sum W_h s_h)^2 / n."""
    strata = Strata(np.array([10**8, 3 * 10**8]), np.array([0, 1]))
    deviations = np.array([[0.4], [0.1]])
    counts = neyman_counts(strata, deviations**2, strata.sites, goals=np.array([1e-6]))
    weights = np.array([0.25, 0.75])
    total = (weights @ deviations[:, 0]) ** 2 / 1e-6
    expected = total * weights * deviations[:, 0] / (weights @ deviations[:, 0])
    np.testing.assert_allclose(counts, expected, atol=1)
    variance = np.sum((weights * deviations[:, 0]) ** 2 / counts)
    assert variance == pytest.approx(1e-6, rel=1e-3)


def test_pilot_reaches_every_stratum_that_has_sites() -> None:
    counts = pilot_counts(Strata(np.array([1, 10, 10**6]), np.zeros(3)), 100)
    assert counts.tolist() == [1, 2, 100]


# On a network


def small_network(num_images: int = 16) -> tuple:
    generator = np.random.default_rng(0)
    params = {"a": {"kernel": generator.normal(size=(6, 5)).astype(np.float32)},
              "b": {"kernel": generator.normal(size=(5, 3)).astype(np.float32),
                    "bias": np.zeros(3, np.float32)}}  # fmt: skip

    def apply_fn(p, x):
        return (x @ p["a"]["kernel"]).clip(0) @ p["b"]["kernel"] + p["b"]["bias"][None]

    images = generator.normal(size=(num_images, 6)).astype(np.float32)
    return apply_fn, params, images, generator.integers(0, 3, num_images)


@pytest.fixture(scope="module")
def census() -> Rates:
    apply_fn, params, images, labels = small_network()
    return run_campaign(apply_fn, params, exhaustive_faults(params), images, labels).rates()


@pytest.mark.parametrize("count", [None, "auto", 3])
@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_adaptive_campaign_finds_the_census(run, count, census: Rates, tmp_path) -> None:
    settings = {"key": 7, "margin": 0.06, "batch_size": 8, "images_per_fault": count}
    found = run(*small_network(), **settings)
    for name, rate, true in zip(Rates._fields, found.rates, census, strict=True):
        assert rate.high - rate.low <= 2 * 0.06 + 1e-12 or (count and name == "faulty_accuracy")
        assert rate.low <= true.value <= rate.high, name
    faults = found.campaign.faults
    sites = set(zip(faults.leaf, faults.element, faults.bit, strict=True))
    assert len(sites) == len(faults) == found.stages[-1]
    assert found.num_saved == found.num_fixed - len(faults)
    again = run(*small_network(), **settings, workdir=tmp_path)
    assert again.rates == found.rates
    resumed = run(*small_network(), **settings, workdir=tmp_path)
    assert resumed.rates == found.rates
    assert len(list(tmp_path.iterdir())) == len(found.stages) + (count == "auto")
    assert found.images_per_fault == (16 if count is None else found.campaign.images.shape[1])
    assert found.num_pairs == found.images_per_fault * len(faults)
    assert found.num_pairs_fixed == found.num_fixed * 16
    assert found.campaign[:9].outcomes.shape == (9, found.images_per_fault)


@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_sampled_pairs_are_those_of_all_images(run) -> None:
    found = run(*small_network(), margin=0.06, batch_size=8, images_per_fault=3).campaign
    apply_fn, params, images, labels = small_network()
    every = run_campaign(apply_fn, params, found.faults, images, labels, batch_size=8)
    rows = np.arange(len(found.faults))[:, None]
    np.testing.assert_array_equal(found.outcomes, every.outcomes[rows, found.images])
    seen = np.unique(found.images)
    np.testing.assert_array_equal(found.golden[seen], every.golden[seen])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"images_per_fault": 17}, "images_per_fault 17 is out of range"),
        ({"images_per_fault": 0}, "images_per_fault 0 is out of range"),
        ({"images_per_fault": "all"}, "images_per_fault is 'all': allowed are \"auto\", None, int"),
        ({"rates": ["mask"]}, r"rates is \['mask'\]: allowed are some of masked, non_critical"),
        ({"rates": "masked"}, "rates is 'masked': allowed are some of"),
        ({"rates": []}, "allowed are some of"),
        ({"rates": 5}, "rates is 5: allowed are some of"),
        ({"rates": [["masked"]]}, "allowed are some of"),
    ],
)
def test_what_is_no_question_is_named(settings, message) -> None:
    for run in (run_sequential, run_stratified):
        with pytest.raises(ValueError, match=message):
            run(*small_network(), **settings)


@pytest.mark.parametrize(
    "relative, message",
    [
        (0.0, "relative is 0.0: allowed are numbers above 0"),
        ("a fifth", "relative is 'a fifth': allowed are numbers above 0"),
        ({"critical": -1}, "relative is -1: allowed"),
        (
            {"faulty_accuracy": 0.1},
            "relative names 'faulty_accuracy': allowed are the rates masked",
        ),
        (float("nan"), "relative is nan"),
    ],
)
def test_shares_that_are_none_are_named(relative, message, tmp_path) -> None:
    for run in (run_sequential, run_stratified):
        with pytest.raises(ValueError, match=message):
            run(*small_network(), relative=relative, workdir=tmp_path, images_per_fault=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", [run_sequential, run_stratified])
@pytest.mark.parametrize("count", [None, "auto"])
def test_a_rare_rate_within_a_share_of_itself(run, count, census: Rates, tmp_path) -> None:
    settings = {"key": 3, "batch_size": 8, "images_per_fault": count, "margin": 0.1}
    settings |= {"pilot": 100} if run is run_stratified else {"first": 100}
    found = run(*small_network(), **settings, relative={"critical": 0.25}, workdir=tmp_path)
    for name, rate, true in zip(Rates._fields, found.rates, census, strict=True):
        asked = 0.25 * rate.value if name == "critical" else 0.1
        assert rate.high - rate.low <= 2 * asked + 1e-9 or (count and name == "faulty_accuracy")
        assert rate.low <= true.value <= rate.high, name
    wide = run(*small_network(), **settings)
    assert wide.num_pairs < found.num_pairs
    assert found.num_fixed > wide.num_fixed


@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_a_rate_that_never_occurs_is_bounded(run) -> None:
    """Two classes far apart: no low bit changes the answer."""
    params = {"w": np.float32([[1, -1]] * 400)}
    images = np.random.default_rng(0).uniform(1, 2, (60, 400)).astype(np.float32)
    subject = (lambda p, x: x @ p["w"], params, images, np.zeros(60, int))
    with pytest.warns(UserWarning, match="critical did not occur in .* it is at most 0.0"):
        found = run(
            *subject, relative=0.2, margin=0.05, rates=["critical"], images_per_fault=3,
            sampling={"bits": range(10)},
        )  # fmt: skip
    assert found.rates.critical.value == 0 < found.rates.critical.high < 0.05
    assert found.stages[-1] < 8000  # the sites


def test_a_confidence_sequence_for_a_share_holds() -> None:
    """With bets that follow the mean so far, and a stop that depends on it: seldom a miss."""
    values = np.random.default_rng(5).random(200_000) < 0.03
    missed = 0
    for seed in range(60):
        order = np.random.default_rng(seed).permutation(values).astype(float)[:, None]
        goal = Goal(0.01, 0.25)
        stop = draw_until_kept(lambda n, o=order: (o[:n], [0.0]), 200_000, [goal], 1.96, 100)[-1]
        found = anytime_estimate(order[:stop, 0], 200_000, goal, 1.96)
        assert found.high - found.low <= 2 * 0.25 * found.value + 1e-9
        assert stop < 60_000
        missed += not found.low <= values.mean() <= found.high
    assert missed <= 6  # of 60 at 95 %: more than six would be chance in 3 %


@pytest.mark.parametrize("settings", [{"rates": ["mask"]}, {"first": 0}, {"pilot": 0}])
def test_nothing_runs_before_the_question_is_checked(settings, tmp_path) -> None:
    run = run_stratified if "pilot" in settings else run_sequential
    with pytest.raises(ValueError, match="allowed"):
        run(*small_network(), **settings, workdir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_more_images_where_all_faults_on_few_do_not_do(run, tmp_path) -> None:
    """Of 64 sites, no margin of half a point comes from few images: in the end all are seen."""
    images = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    params = {"w": images[:2, :1] * np.float32([[1, -1]])}
    subject = (lambda p, x: x @ p["w"], params, images, np.arange(300) % 2)
    settings = {"margin": 0.005, "images_per_fault": 4}
    found = run(*subject, **settings, workdir=tmp_path)
    assert found.stages[-1] == 4 * 32
    assert max(rate.high - rate.low for rate in found.rates[:4]) <= 0.01 + 1e-9
    assert found.images_per_fault > 4
    assert run(*subject, **settings, workdir=tmp_path).rates == found.rates


@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_each_stage_draws_its_own_images(run) -> None:
    found = run(*small_network(4000), margin=0.03, images_per_fault=2, batch_size=20)
    ends = found.stages
    if len(ends) > 1:
        first, last = found.campaign.images[: ends[0]], found.campaign.images[ends[0] :]
        assert len(np.setdiff1d(last, first)) > 0
    assert len(ends) < 20


def test_stratified_accuracy_is_that_of_all_faults() -> None:
    """Whose faults are drawn unequally: most from those that do most."""
    generator = np.random.default_rng(0)
    params = {"w": generator.normal(size=(32, 16)).astype(np.float32),
              "v": generator.normal(size=(16, 4)).astype(np.float32)}  # fmt: skip
    images = generator.normal(size=(200, 32)).astype(np.float32)

    def network(p, x):
        return (x @ p["w"]).clip(0) @ p["v"]

    labels = np.asarray(network(params, images)).argmax(1)
    found = run_stratified(network, params, images, labels, rates=["critical"], margin=0.005)
    census = run_campaign(network, params, exhaustive_faults(params), images, labels).rates()
    for rate, true in zip(found.rates, census, strict=True):
        assert rate.low <= true.value <= rate.high
    assert abs(found.rates.faulty_accuracy.value - census.faulty_accuracy.value) < 0.01


def test_only_the_rates_that_are_asked_for_must_be_known() -> None:
    all_images = {"margin": 0.03, "images_per_fault": None, "first": 50}
    due = run_sequential(*small_network(), rates=["due"], **all_images)
    every = run_sequential(*small_network(), **all_images)
    assert due.stages[-1] < every.stages[-1]
    assert due.rates.due.high - due.rates.due.low <= 0.06 + 1e-12


def test_sequential_order_does_not_depend_on_the_margin() -> None:
    settings = {"first": 40, "images_per_fault": None}
    runs = [run_sequential(*small_network(), margin=m, **settings) for m in (0.2, 0.1)]
    short, long = (run.campaign for run in runs)
    assert len(short.faults) < len(long.faults)
    assert short.faults == long.faults[: len(short.faults)]
    np.testing.assert_array_equal(short.outcomes, long.outcomes[: len(short.faults)])


def test_many_small_layers_share_their_strata() -> None:
    """With a pilot of 320 faults and 32 bits, 5 layers: the 4 largest, and the rest."""
    sizes = {"a": 50, "b": 3, "c": 400, "d": 2, "e": 100, "f": 60, "g": 1}
    params = {name: {"kernel": np.ones(size, np.float32)} for name, size in sizes.items()}
    strata, drawers = _layers_and_bits(0, params, {}, pilot=320)
    assert len(strata.sites) == len(drawers) == 5 * 32
    assert strata.sites.sum() == 32 * sum(sizes.values())
    drawn = [draw(6) for draw in drawers]
    layers = {frozenset(faults.paths[leaf] for leaf in faults.leaf) for faults in drawn}
    rest = frozenset().union(*(layer for layer in layers if len(layer) > 1))
    assert rest == {"b/kernel", "d/kernel", "g/kernel"}
    alone = {frozenset([f"{name}/kernel"]) for name in "acef"}
    assert alone <= layers
    separate, _ = _layers_and_bits(0, params, {}, pilot=448)
    assert len(separate.sites) == 7 * 32


def test_whole_word_faults_have_one_stratum_a_layer() -> None:
    found = run_stratified(*small_network(), margin=0.2, pilot=10, sampling={"model": "zero"})
    assert set(found.campaign.faults.bit) == {-1}
    pairs = list(itertools.pairwise(found.stages))
    assert all(a < b for a, b in pairs)


@pytest.mark.parametrize("count", [1, 4, "auto"])
@pytest.mark.parametrize("run", [run_sequential, run_stratified])
def test_sampled_intervals_hold(run, count, monkeypatch) -> None:
    """On every outcome of a network, looked up: 95 % must hold in 95 %, but for chance."""
    apply_fn, params, images, labels = small_network(60)
    every = exhaustive_faults(params)
    census = run_campaign(apply_fn, params, every, images, labels, batch_size=20)
    truth = census.rates()
    sites = zip(every.leaf.tolist(), every.element.tolist(), every.bit.tolist(), strict=True)
    row_of = {site: row for row, site in enumerate(sites)}

    def looked_up(apply_fn, params, faults, images, labels, images_per_fault, seed, **_):
        sites = zip(faults.leaf.tolist(), faults.element.tolist(), faults.bit.tolist(), strict=True)
        rows = np.array([row_of[site] for site in sites])
        pairs = rows[:, None], Sample(faults, 60, images_per_fault, 20, seed).images
        correct = census.pairs_correct[pairs]
        return dataclasses.replace(
            census, faults=faults, outcomes=census.outcomes[pairs], due=census.due[pairs],
            correct=correct.sum(axis=1), pairs_correct=correct, images=pairs[1],
        )  # fmt: skip

    monkeypatch.setattr(_adaptive, "run_campaign", looked_up)
    first = {"first" if run is run_sequential else "pilot": 100}
    repeats, margin, missed = 120, 0.05, np.zeros(5)
    for key in range(repeats):
        found = run(
            apply_fn, params, images, labels, key=key, seed=key, margin=margin, t=1.96,
            images_per_fault=count, batch_size=20, **first,
        )  # fmt: skip
        widths = [(r.high - r.low) / 2 for r in found.rates[:4]]
        assert max(widths) <= margin + 1e-9 or len(found.campaign.faults) == len(every)
        missed += [not r.low <= x.value <= r.high for r, x in zip(found.rates, truth, strict=True)]
    # A fair coin of 5 % exceeds 12 of 120 in one case of 100.
    assert (missed <= 12).all(), missed


@pytest.mark.parametrize("relative", [0.8, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.0, 1e-4, 0.01])
def test_a_share_of_a_rare_rate_takes_few_stages(relative, rate) -> None:
    strata = Strata(np.full(3, 10**7), np.arange(3))
    random = np.random.default_rng(0)
    drawn = [np.empty((0, 1))] * 3

    def measure(counts):
        for number, count in enumerate(counts):
            more = (random.random((count - len(drawn[number]), 1)) < rate).astype(float)
            drawn[number] = np.concatenate([drawn[number], more])
        return drawn, np.zeros(1)

    stages = draw_strata_until_kept(
        measure, strata, [Goal(0.01, relative)], pilot=1000, enough=16_000
    )
    assert len(stages) < 40
