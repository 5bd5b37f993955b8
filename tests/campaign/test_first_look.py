"""What a reader sees first of a campaign, and the rates of its parts, against counting by hand."""

from __future__ import annotations

import dataclasses
import statistics
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import jaxfi
from jaxfi import CRITICAL, MASKED, NON_CRITICAL, FaultList
from jaxfi.faults import layer_of

RANDOM = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RANDOM.normal(size=(6, 8)).astype(np.float32), "bias": np.zeros(8, np.float32)},
    "b": {"kernel": RANDOM.normal(size=(8, 4)).astype(np.float32)},
}
IMAGES = RANDOM.normal(size=(30, 6)).astype(np.float32)
LABELS = RANDOM.integers(0, 4, 30)


def network(p, x):
    return jnp.maximum(x @ p["a"]["kernel"] + p["a"]["bias"][None], 0) @ p["b"]["kernel"]


def run(faults: FaultList, images=IMAGES, labels=LABELS, **settings):
    return jaxfi.run_campaign(network, PARAMS, faults, images, labels, batch_size=5, **settings)


@pytest.fixture(scope="module")
def faults() -> FaultList:
    return jaxfi.sample_faults(0, PARAMS, 80) + jaxfi.sample_faults(1, PARAMS, 20, model="zero")


@pytest.fixture(scope="module")
def campaign(faults):
    return run(faults)


def test_a_few_lines(campaign) -> None:
    for thing in (campaign, campaign.faults):
        lines = repr(thing).splitlines()
        assert 3 <= len(lines) <= 6
        assert max(map(len, lines)) < 130
    assert "100 faults x 30 images" in repr(campaign)
    assert f"{100 * campaign.rates().masked.value:.2f}" in repr(campaign)
    assert f"{100 * campaign.clean_accuracy:.2f} % without" in repr(campaign)
    assert "80 bit-flip, 20 zero" in repr(campaign.faults)


def test_html_is_well_formed_and_escaped() -> None:
    hostile = {"<b>&": {"w": PARAMS["b"]["kernel"]}}
    faults = jaxfi.sample_faults(0, hostile, 12)
    campaign = jaxfi.run_campaign(
        lambda p, x: x[:, :1] @ p["<b>&"]["w"][:1], hostile, faults, IMAGES, LABELS, batch_size=5
    )
    for thing in (campaign, faults):
        ET.fromstring(thing._repr_html_().replace("&nbsp;", " "))
        assert "<b>" not in thing._repr_html_()
    heights = [float(r.get("height")) for r in ET.fromstring(
        campaign._repr_html_().replace("&nbsp;", " ")).iter("rect")]  # fmt: skip
    bars = np.array(heights).reshape(-1, 3).sum(axis=1)
    np.testing.assert_allclose(bars, 90, atol=0.05)  # three outcomes fill each bar


def test_a_table_of_one_row_a_fault(campaign, faults) -> None:
    table = campaign.to_pandas(PARAMS)
    assert len(table) == 100
    assert (table[["masked", "non_critical", "critical"]].sum(axis=1) == 30).all()
    assert table["correct"].tolist() == campaign.correct.tolist()
    assert table["bit"].isna().sum() == 20
    before = [PARAMS["a" if "a/" in path else "b"][path[2:]].reshape(-1)[element]
              for path, element in zip(table["path"], table["element"], strict=True)]  # fmt: skip
    np.testing.assert_array_equal(table["value_before"], np.float64(before))


def test_columns_are_those_of_the_files(campaign, faults, tmp_path) -> None:
    run(faults, workdir=tmp_path)
    stored = pandas.read_parquet(tmp_path / "results").sort_values("row")
    table = campaign.to_pandas(PARAMS)
    assert set(table) == set(stored) - {"outcomes"}
    for name in ("path", "index", "element", "masked", "critical", "due", "correct", "value_after"):
        np.testing.assert_array_equal(table[name], stored[name])


@pytest.mark.parametrize("rows", [slice(10, 30), np.arange(100) % 3 == 0, [5, 2, 2], 7])
def test_rows(campaign, rows) -> None:
    part = campaign[rows]
    expected = np.atleast_2d(campaign.outcomes[rows])
    np.testing.assert_array_equal(part.outcomes, expected)
    assert part.rates().masked.value == pytest.approx((expected == MASKED).mean())
    assert part.faults == campaign.faults[rows]


def test_rates_by_one_key_and_by_two(campaign) -> None:
    faults = campaign.faults
    layer = np.array(["a", "a", "b"])[faults.leaf]
    for part in campaign.rates(by="layer"):
        assert part.num_faults == (layer == part.name).sum()
        assert part.critical.value == (campaign.outcomes[layer == part.name] == CRITICAL).mean()
    bits = [part.name for part in campaign.rates(by="bit")]
    assert bits == [str(b) for b in range(31, -1, -1) if (faults.bit == b).any()] + ["word"]
    both = campaign.rates(by=("layer", "bit"))
    assert sum(part.num_faults for part in both) == 100
    for part in both:
        name, bit = part.name.split(", ")
        here = (layer == name) & (faults.bit == (-1 if bit == "word" else int(bit)))
        expected = (campaign.outcomes[here] == NON_CRITICAL).mean()
        assert part.non_critical.value == pytest.approx(expected)
    models = {part.name: part.num_faults for part in campaign.rates(by="model")}
    assert models == {"bit-flip": 80, "zero": 20}
    own = campaign.rates(by="layer", layer_of=lambda path: path.split("/")[1])
    assert [part.name for part in own] == ["bias", "kernel"]
    table = campaign.rates(by="layer").to_pandas()
    assert table["masked"].tolist() == [part.masked.value for part in campaign.rates(by="layer")]
    with pytest.raises(ValueError, match="cannot group by 'channel': allowed are .*layer, bit"):
        campaign.rates(by="channel")


@pytest.mark.parametrize("chosen", ["right", "third", "numbers"])
def test_rates_on_some_images_are_those_of_a_campaign_on_them(campaign, faults, chosen) -> None:
    right = campaign.golden.argmax(-1) == LABELS
    images = {"right": right, "third": np.arange(30) % 3 == 0, "numbers": [3, 1, 8, 7]}[chosen]
    expected = run(faults, IMAGES[images], LABELS[images])
    rates = campaign.rates(images=images)
    assert rates == expected.rates()
    assert campaign.rates(images=images, by="layer").parts == expected.rates(by="layer").parts


def test_images_of_a_directory(campaign, faults, tmp_path) -> None:
    run(faults, workdir=tmp_path)
    loaded = jaxfi.load_campaign(tmp_path)
    right = campaign.golden.argmax(-1) == LABELS
    assert loaded.rates(images=right) == campaign.rates(images=right)
    with pytest.raises(ValueError, match="kept how many .*allowed are images that the fault-free"):
        loaded.rates(images=np.arange(30) < 25)
    with pytest.raises(ValueError, match="allowed are one image or more"):
        loaded.rates(images=right & ~right)


def test_rates_never_refuse() -> None:
    leaf = {"a": {"kernel": PARAMS["a"]["kernel"]}, **{k: PARAMS[k] for k in ("b",)}}
    leaf["a"]["bias"] = PARAMS["a"]["bias"]
    flips, low, high = (
        jaxfi.exhaustive_faults(leaf, model=m, paths="b/*")
        for m in ("bit-flip", "stuck-at-0", "stuck-at-1")
    )
    census = flips + low + high
    assert census.population == len(census) == 3 * 32 * 32
    campaign = run(census[:0] + census, IMAGES[:5], LABELS[:5])
    masked = campaign.rates().masked
    assert masked.value == pytest.approx((campaign.outcomes == MASKED).mean())
    repeated = FaultList.from_sites([("b/kernel", 0, 30)] * 5, PARAMS)
    many = dataclasses.replace(repeated, drawn_from=flips[:0].drawn_from)
    assert run(many).rates(by=("layer", "bit", "model"))[0].num_faults == 5
    whole = run(census, IMAGES[:5], LABELS[:5]).rates()
    assert whole.masked.low == whole.masked.value == whole.masked.high


def test_confidence_or_cut_off() -> None:
    exact = statistics.NormalDist().inv_cdf(0.975)
    assert jaxfi.sample_size(10**6, confidence=0.95) == jaxfi.sample_size(10**6, t=exact)
    assert jaxfi.sample_size(10**6) == jaxfi.sample_size(10**6, t=2.58)
    campaign = run(jaxfi.sample_faults(0, PARAMS, 10))
    assert campaign.rates(confidence=0.9).masked == pytest.approx(
        campaign.rates(t=1.6448536269514722).masked
    )
    for call in (campaign.rates, lambda **k: jaxfi.sample_size(100, **k),
                 lambda **k: jaxfi.paired_difference(campaign, campaign, **k)):  # fmt: skip
        with pytest.raises(ValueError, match="allowed is one of them"):
            call(t=2.0, confidence=0.95)
        with pytest.raises(ValueError, match="confidence 95 is out of range"):
            call(confidence=95)
        with pytest.raises(ValueError, match="t 0 is out of range"):
            call(t=0)


@pytest.mark.parametrize(
    "path, layer",
    [("conv1/kernel", "conv1"), ("conv1.weight", "conv1"), ("l1.0.conv1.weight", "l1.0.conv1"),
     ("conv1/kernel/value", "conv1"), ("0/1", "0"), ("block/conv.weight", "block/conv"),
     ("scale", "scale"), ("value", "value"), (".hidden", ".hidden")],
)  # fmt: skip
def test_layer_of(path: str, layer: str) -> None:
    assert layer_of(path) == layer


def test_layers_under_other_names_get_as_many_faults() -> None:
    flat = {"a.weight": PARAMS["a"]["kernel"], "a.bias": PARAMS["a"]["bias"],
            "b.weight": PARAMS["b"]["kernel"]}  # fmt: skip
    pairs = [(PARAMS["a"]["kernel"], PARAMS["a"]["bias"]), (PARAMS["b"]["kernel"],)]
    expected = np.bincount(np.array([0, 0, 1])[jaxfi.sample_faults(0, PARAMS, 200).leaf])
    for tree in (flat, pairs):
        drawn = jaxfi.sample_faults(0, tree, 200)
        layers = [layer_of(path) for path in drawn.paths]
        names = sorted(set(layers))
        assert len(names) == 2
        counts = np.bincount([names.index(layers[leaf]) for leaf in drawn.leaf])
        np.testing.assert_array_equal(counts, expected)
    by_name = jaxfi.sample_faults(0, PARAMS, 200, layer_of=lambda path: path)
    assert np.bincount(by_name.leaf).tolist() == [18, 109, 73]


def test_explain_takes_what_a_campaign_takes(faults) -> None:
    arguments = (network, PARAMS, faults, IMAGES, LABELS)
    assert jaxfi.explain(*arguments) == jaxfi.explain(network, PARAMS, IMAGES, faults)
    assert [cost.num_faults for cost in jaxfi.explain(*arguments)] == np.bincount(
        faults.leaf
    ).tolist()
