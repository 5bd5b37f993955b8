"""The census end to end on a few weights: its files, its check, its answers to bad input."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import census
from experiments.common.config import read_flagfile
from jaxfi import criticality, load_campaign, run_campaign
from jaxfi.campaign import CampaignCounts
from jaxfi.data import load_dataset
from jaxfi.faults import exhaustive_faults, sample_faults
from jaxfi.outcomes import classify
from jaxfi.report import heat_map, most_critical, write_census
from jaxfi.report._heatmap import shares_by_layer_and_bit

ROOT = Path(__file__).parents[2]
FLAGFILES = sorted((ROOT / "experiments" / "flags").glob("census_*.flags"))
SMALL = census.Settings(
    epochs=1, augment=False, num_train_images=64, batch_size=32, paths="*bias", num_images=60,
    images_per_fault=3, campaign_batch_size=25, check_faults=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, CampaignCounts]:
    workdir = tmp_path_factory.mktemp("census")
    return workdir, census.run(SMALL, workdir)


def test_a_census_leaves_its_files(finished, capsys) -> None:
    workdir, campaign = finished
    assert len(campaign) == (32 + 64 + 128 + 10) * 32
    names = {path.name for path in workdir.iterdir()}
    for stem in ("layers_and_bits", "criticality"):
        assert {f"{stem}.pdf", f"{stem}.svg", f"{stem}.png"} <= names
    again = census.run(SMALL, workdir)
    np.testing.assert_array_equal(again.critical, campaign.critical)
    text = capsys.readouterr().out
    assert "Check: 40 of 40 flips have the counts of a campaign of pairs." in text
    assert "x 3 images of 60 each" in text
    assert "Images: scikit-learn digits" in text


def test_one_row_a_weight(finished) -> None:
    workdir, campaign = finished
    table = pq.read_table(workdir / "census.parquet")
    assert table.schema.metadata[b"jaxfi.images"] == b"3"
    assert table.num_rows == 32 + 64 + 128 + 10
    shares = criticality(campaign, by_bit=True)
    frame = table.to_pandas()
    for path, rows in frame.groupby("path", observed=True):
        np.testing.assert_allclose(np.stack(rows["critical"]) / 3, shares[path], rtol=1e-6)
        assert rows["element"].tolist() == list(range(len(rows)))
    total = sum(map(int, np.concatenate(frame["masked"].to_list())))
    assert total == campaign.masked.sum()


def test_a_layer_and_a_bit_add_up(finished) -> None:
    workdir, campaign = finished
    for by, count in (("layer", 4), ("bit", 32)):
        with (workdir / f"by_{by}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        assert sum(int(row["faults"]) for row in rows) == len(campaign)
        mean = sum(float(row["critical"]) * int(row["faults"]) for row in rows) / len(campaign)
        assert mean == pytest.approx(campaign.rates().critical.value)


def test_the_worst_come_first(finished) -> None:
    workdir, campaign = finished
    with (workdir / "most_critical.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = criticality(campaign)
    known = np.sort(np.concatenate([a.ravel() for p, a in shares.items() if "bias" in p]))[::-1]
    np.testing.assert_allclose([float(row["critical"]) for row in rows], known[:100])
    by_bit = criticality(campaign, by_bit=True)
    for row in rows[:10]:
        here = by_bit[row["path"]][int(row["index"].strip("(),"))]
        bits = list(map(int, row["critical_bits"].split()))
        assert sorted(bits) == np.flatnonzero(here > 0).tolist()
        assert all(here[a] >= here[b] for a, b in itertools.pairwise(bits))


def test_a_flip_of_the_census_by_hand(finished) -> None:
    """Its counts are those of the network with that bit flipped in NumPy."""
    workdir, campaign = finished
    dataset = load_dataset("digits")
    variables = census.train_network(SMALL, census.load_images(SMALL), workdir / "network")
    module = census.MODELS["lenet"](num_classes=10)
    images = census.test_images(SMALL, dataset, 60)
    for row in np.random.default_rng(0).choice(len(campaign), 12, replace=False).tolist():
        fault = campaign.faults[row]
        params = jax.tree.map(np.array, variables["params"])
        leaf = jax.tree.leaves(params)[fault.leaf[0]].reshape(-1)
        leaf.view(np.uint32)[fault.element[0]] ^= np.uint32(1) << np.uint32(fault.bit[0])
        seen = campaign.images([row])[0]
        with jax.default_matmul_precision("highest"):
            golden, faulty = (
                module.apply({"params": p}, images[seen], train=False)
                for p in (variables["params"], params)
            )
        outcome, due = classify(golden, faulty, "argmax")
        assert int((outcome == 2).sum()) == campaign.critical[row]
        assert int(due.sum()) == campaign.due[row]


def test_pairs_and_counts_have_one_map() -> None:
    params = {"a": {"kernel": np.float32([[1, -2, 3]] * 4)}, "b": {"kernel": np.eye(3, dtype="f4")}}
    images = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)

    def apply_fn(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]

    for faults in (exhaustive_faults(params), sample_faults(0, params, 70)):
        given = apply_fn, params, faults, images, np.arange(9) % 3
        pairs, counts = run_campaign(*given), run_campaign(*given, keep="counts")
        a, b = shares_by_layer_and_bit(pairs), shares_by_layer_and_bit(counts)
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
        heat_map(counts)
        worst = most_critical(counts, params, 4)
        share = pairs.outcomes == 2
        for weight in worst:
            here = np.array([p == weight.path for p in np.array(faults.paths)[faults.leaf]])
            index = np.ravel_multi_index(weight.index, np.shape(params[weight.path[0]]["kernel"]))
            here &= faults.element == index
            assert weight.critical == pytest.approx(share[here].mean())


def test_what_is_no_census_is_refused(tmp_path) -> None:
    params = {"w": np.eye(2, dtype=np.float32)}
    faults = exhaustive_faults(params, model="stuck-at")
    images = np.float32([[1, 2], [2, 1]])
    found = run_campaign(lambda p, x: x @ p["w"], params, faults, images, [1, 0], keep="counts")
    with pytest.raises(ValueError, match="a bit has several faults"):
        write_census(found, params, tmp_path / "census.parquet")
    faults = exhaustive_faults(params, model="zero")
    found = run_campaign(lambda p, x: x @ p["w"], params, faults, images, [1, 0], keep="counts")
    with pytest.raises(ValueError, match="allowed are those that name a bit"):
        write_census(found, params, tmp_path / "census.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("model", "alexnet", "allowed: lenet"),
        ("images_per_fault", 61, "up to 60, the images"),
        ("images_per_fault", 0, "integers >= 1"),
        ("bits", ("40",), r"bit 40 is outside"),
        ("bits", ("x",), "integers >= 0"),
        ("paths", "nothing/*", "no leaf matches"),
        ("mean", ("1", "2"), "numbers, 1 of them"),
        ("mean", ("x",), "numbers, 1 of them"),
        ("weights", "no/such/file.npz", "no/such/file.npz"),
        ("num_images", 501, "up to 500"),
    ],
)
def test_bad_input_is_named_before_any_work(name, value, message, tmp_path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        census.run(dataclasses.replace(SMALL, **{name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_weights_are_refused(finished, tmp_path) -> None:
    workdir, _ = finished
    other = dataclasses.replace(SMALL, weights=str(workdir / "network"), model="resnet20")
    with pytest.raises(ValueError, match="allowed: a resnet20 for digits"):
        census.run(other, tmp_path / "run")
    same = dataclasses.replace(SMALL, weights=str(workdir / "network"))
    found = census.run(same, tmp_path / "run")
    whole = load_campaign(workdir / "campaign")
    np.testing.assert_array_equal(found.critical, whole.critical)


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfiles_are_valid_and_say_their_command(path) -> None:
    read_flagfile(path, census.Settings).validate()
    assert f"--flagfile=experiments/flags/{path.name} " in path.read_text()
