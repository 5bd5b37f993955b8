"""The training-strategies study end to end on little data, its tables and its figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import linen as nn

from experiments import bit_sensitivity, training_strategies
from experiments.common.config import read_flagfile
from experiments.common.strategies import groups, list_strategies, parse_sweep
from jaxfi.data import load_dataset
from jaxfi.faults import bit_effects, stored_weights
from jaxfi.models import MODELS
from jaxfi.models._layers import convolution, dense
from jaxfi.report._study_figures import (
    areas,
    by_bit,
    by_injections,
    training_curves,
    weight_statistics,
)
from jaxfi.report._study_logs import ROBUSTNESS_COLUMNS, logged_ranges
from jaxfi.report._study_tables import (
    Curve,
    correlation_rows,
    effect_rows,
    pair_rows,
    read_curves,
    robustness_rows,
    seed_rows,
    write_tables,
)
from jaxfi.report.study import write_study
from jaxfi.training import TrainConfig, load_checkpoint, load_variables

ROOT = Path(__file__).parents[2]
FLAGS = ROOT / "experiments" / "flags"
RESULTS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "training_strategies.md").read_text()
STRATEGIES = training_strategies.Settings(
    sweep=(
        "optimizer=sgd weight_decay=0,5e-3 learning_rate=0.01",
        "optimizer=sgd learning_rate=1e30",
    ),
    model="tiny",
    epochs=3,
    batch_size=32,
    num_train_images=64,
    keep_every=2,
    injected_epochs=["2", "last"],
    ranges=["20/10", "70/35"],
    trials=2,
    num_images=30,
    injection_batch_size=16,
    surface_images=8,
    surface_iterations=2,
)
NAMES = ["sgd-cosine-b32-wd0-lr0.01", "sgd-cosine-b32-wd0.005-lr0.01", "sgd-cosine-b32-wd0-lr1e+30"]


class Tiny(nn.Module):
    """A network in which a study takes seconds; 76 weights."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(convolution(x, 4, stride=4, name="conv"))
        return dense(x.max((1, 2)), self.num_classes, name="fc")


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Tiny)
        yield


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("strategies")
    training_strategies.run(STRATEGIES, workdir)
    return workdir


def test_training_has_a_row_for_each_strategy_and_epoch(finished):
    rows = table(finished / "training.csv")
    assert [*rows[0]] == (
        "strategy epoch learning_rate train_loss test_loss test_accuracy weight_mean weight_std "
        "weight_l2"
    ).split()
    assert [*dict.fromkeys(row["strategy"] for row in rows)] == NAMES
    assert [row["epoch"] for row in rows if row["strategy"] == NAMES[0]] == ["1", "2", "3"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    variables = load_variables(finished / "networks" / NAMES[0] / "2")
    weights = np.concatenate([
        layer["kernel"].reshape(-1).astype(np.float64) for layer in variables["params"].values()
    ])  # fmt: skip
    stored = next(row for row in rows if (row["strategy"], row["epoch"]) == (NAMES[0], "2"))
    found = [float(stored[f"weight_{name}"]) for name in ("mean", "std", "l2")]
    assert len(weights) == 76
    expected = [weights.mean(), weights.std(), np.linalg.norm(weights)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_every_second_the_last_and_the_best_network_are_kept(finished):
    kept = {path.name for path in (finished / "networks" / NAMES[0]).iterdir()}
    assert kept == {"2", "3", "best"}


def test_a_diverged_strategy_is_a_result(finished):
    summary = {row["strategy"]: row for row in table(finished / "summary.csv")}
    assert summary[NAMES[2]]["diverged_epoch"] == "1"
    assert summary[NAMES[0]]["diverged_epoch"] == ""
    for name in ("accuracy_by_injections.csv", "networks.csv"):
        assert {row["strategy"] for row in table(finished / name)} == set(NAMES[:2])


def test_a_study_in_which_every_strategy_diverges_ends(tmp_path):
    settings = dataclasses.replace(STRATEGIES, sweep=("optimizer=sgd,adagrad learning_rate=1e30",))
    training_strategies.run(settings, tmp_path)
    assert [row["diverged_epoch"] for row in table(tmp_path / "summary.csv")] == ["1", "1"]
    for name in ("accuracy_by_injections", "networks", "robustness", "paired_tests", "seeds"):
        assert table(tmp_path / f"{name}.csv") == []
    assert (tmp_path / "training_curves.svg").is_file()


def test_what_may_predict_reliability_is_of_the_epoch_that_gets_faults(finished, tmp_path_factory):
    """Faults in epoch 2 of three: the predictors are those of epoch 2."""
    workdir = tmp_path_factory.mktemp("early")
    for name in ("networks", "trainings"):
        shutil.copytree(finished / name, workdir / name)
    early = dataclasses.replace(STRATEGIES, injected_epochs=["2"])
    training_strategies.run(early, workdir)
    assert (workdir / "training.csv").read_bytes() == (finished / "training.csv").read_bytes()
    networks = {(row["strategy"], row["epoch"]): row for row in table(workdir / "networks.csv")}
    assert set(networks) == {(name, "2") for name in NAMES[:2]}
    training = {(row["strategy"], row["epoch"]): row for row in table(finished / "training.csv")}
    for network, row in networks.items():
        for column in ("test_accuracy", "weight_mean", "weight_std", "weight_l2"):
            assert row[column] == training[network][column]
    dataset = load_dataset("digits")
    pixels = torch.tensor(dataset.train_images[:8] / 255 - 0.5).permute(0, 3, 1, 2) / 0.5
    variables = load_variables(finished / "networks" / NAMES[0] / "2")["params"]
    leaves = {
        f"{layer}/{name}": torch.tensor(np.asarray(leaf, np.float64), requires_grad=True)
        for layer, named in variables.items()
        for name, leaf in named.items()
    }
    features = torch.nn.functional.conv2d(
        torch.nn.functional.pad(pixels, [1] * 4), leaves["conv/kernel"].permute(3, 2, 0, 1),
        leaves.get("conv/bias"), stride=4,
    )  # fmt: skip
    logits = torch.relu(features).amax((2, 3)) @ leaves["fc/kernel"] + leaves["fc/bias"]
    labels = torch.tensor(dataset.train_labels[:8]).long()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    norm = torch.sqrt(sum((leaf.grad**2).sum() for leaf in leaves.values()))
    found = float(networks[NAMES[0], "2"]["gradient_norm"])
    assert found == pytest.approx(float(norm), rel=1e-4)


def test_injections_are_as_the_contract_says(finished):
    rows = table(finished / "accuracy_by_injections.csv")
    assert [*rows[0]] == ["strategy", "epoch", "trial", "num_faults", "accuracy"]
    own = [row for row in rows if (row["strategy"], row["epoch"]) == (NAMES[0], "2")]
    assert [int(row["num_faults"]) for row in own if row["trial"] == "1"] == [
        0, 10, 20, 35, 70,
    ]  # fmt: skip
    clean = {row["accuracy"] for row in own if row["num_faults"] == "0"}
    assert len(clean) == 1
    _, info = load_checkpoint(finished / "networks" / NAMES[0] / "best")
    best = max(float(row["test_accuracy"]) for row in table(finished / "training.csv")
               if row["strategy"] == NAMES[0])  # fmt: skip
    assert info["test_accuracy"] == best


def test_tables_and_figures(finished):
    for stem in ("training_curves", "training_losses", "weight_statistics", "accuracy_by_epoch",
                 "accuracy_by_injections", "accuracy_minus_mean", "areas"):  # fmt: skip
        assert {path.suffix for path in finished.glob(f"{stem}.*")} >= {".pdf", ".svg", ".png"}
    assert len(table(finished / "robustness.csv")) == 2 * 2 * 2  # strategies, epochs, ranges
    pairs = table(finished / "paired_tests.csv")
    assert len(pairs) == 3 * 2  # between the two, within each; ranges
    assert all(float(row["p_value"]) <= float(row["p_holm"]) for row in pairs)
    assert {row["num_tests"] for row in pairs} == {"6"}
    assert {row["members"] for row in table(finished / "correlations.csv")} == {"all", "learned"}


def test_figures_are_drawn_again_by_one_command(finished, tmp_path):
    for name in ("accuracy_by_injections.csv", "config.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "jaxfi.report.study", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("accuracy_by_epoch.svg", "accuracy_minus_mean.svg"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"has no training\.csv"):
        write_study(ROOT / "tests")


def test_tables_are_made_again_of_the_logs(finished, tmp_path):
    made = ("robustness", "paired_tests", "correlations", "seeds", "recipe_effect")
    logs = ("accuracy_by_injections.csv", "summary.csv", "networks.csv", "config.json")
    for name in logs:
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    write_tables(tmp_path)
    for name in made:
        assert (tmp_path / f"{name}.csv").read_bytes() == (finished / f"{name}.csv").read_bytes()


def test_running_again_trains_and_injects_nothing(finished, monkeypatch):
    before = {path: path.read_bytes() for path in finished.glob("*.csv")}

    def never(*args, **kwargs):
        raise AssertionError("nothing is to be done again")

    monkeypatch.setattr(training_strategies, "cumulative_accuracy", never)
    monkeypatch.setattr(training_strategies, "save_checkpoint", never)
    monkeypatch.setattr(training_strategies, "surface_function", lambda *given: never)
    monkeypatch.setattr("jaxfi.report.study.save_figure", lambda figure, stem: [])
    monkeypatch.setattr("jaxfi.training._sweep._Sweep.epoch", never)
    training_strategies.run(STRATEGIES, finished)
    assert {path: path.read_bytes() for path in finished.glob("*.csv")} == before
    other = dataclasses.replace(STRATEGIES, trials=3)
    with pytest.raises(ValueError, match="another configuration: trials is 2 there and 3 here"):
        training_strategies.run(other, finished)


@pytest.mark.parametrize("change, message", [
    ({"sweep": ("optimizer",)}, "'optimizer' is not one; allowed: settings once each"),
    ({"sweep": ("momentum=1",)}, "'momentum=1' is not one"),
    ({"sweep": ("batch_size=64,x",)}, "'batch_size=64,x' needs values of type int"),
    ({"sweep": ("optimizer=lion",)}, "optimizer is 'lion'; allowed: adadelta"),
    ({"sweep": ("batch_size=64,128",)}, "batch_size is 128; allowed: up to the 64 training images"),
    ({"sweep": (f"seed={2**32}",)}, r"seed is 4294967296; allowed: integers >= 0 and < 2\*\*32"),
    ({"seed": -1}, "seed is -1; allowed: integers >= 0"),
    ({"batch_size": 65}, "batch_size is 65; allowed: up to 64 images"),
    ({"held_out": 0.6}, "batch_size is 32; allowed: up to the 26 training images"),
    ({"surface_images": 65}, "surface_images is 65; allowed: up to 64 training images"),
    ({"num_images": 501}, "num_images is 501; allowed: up to 500 images"),
    ({"ranges": ["20/10", "77/7"]}, "ranges is .*; allowed: up to the 76 weights of this network"),
    ({"ranges": ["999999999999/1"]}, "ranges is .*; allowed: up to the 76 weights"),
    ({"ranges": ["5/10"]}, "a range is '5/10'; allowed: most/step"),
    ({"ranges": []}, r"ranges is \[\]; allowed: one or more"),
    ({"paths": "*weight"}, r"paths is '\*weight'; allowed: patterns of params/conv/"),
    ({"injected_epochs": ["first"]}, "injected_epochs is .*; allowed: last, best"),
    ({"injected_epochs": ["99"]}, "injected_epochs is .*; allowed: last, best, every"),
    ({"trials": 0}, "trials is 0; allowed: integers >= 1"),
    ({"model": "alexnet"}, "model is 'alexnet'; allowed: lenet"),
])  # fmt: skip
def test_bad_settings_are_named_before_anything_is_written(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training_strategies.run(dataclasses.replace(STRATEGIES, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sweeps_are_products_and_members_group_by_what_they_share():
    base = TrainConfig(schedule="constant", epochs=5)
    strategies = list_strategies(
        ["optimizer=sgd weight_decay=0,5e-7", "optimizer=sgd,adam schedule=plateau alpha=0,0.1",
         "optimizer=sgd", "optimizer=sgd epochs=7 seed=2"], base,
    )  # fmt: skip
    assert [strategy.name for strategy in strategies] == [
        "sgd-constant-b64-wd0", "sgd-constant-b64-wd5e-07", "sgd-plateau-b64-wd0",
        "sgd-plateau-b64-wd0-a0.1", "adam-plateau-b64-wd0", "adam-plateau-b64-wd0-a0.1",
        "sgd-constant-b64-wd0-e7-s2",
    ]  # fmt: skip
    assert [s.recipe for s in strategies[-2:]] == ["adam-plateau-b64-wd0-a0.1",
                                                   "sgd-constant-b64-wd0-e7"]  # fmt: skip
    found = [[member.name for member in group] for group in groups(strategies, 2)]
    assert [len(group) for group in found] == [2, 1, 1, 1, 1, 1]
    assert found[0] == ["sgd-constant-b64-wd0", "sgd-constant-b64-wd5e-07"]
    assert parse_sweep("") == {}


def test_no_two_strategies_share_a_name():
    sweep = "weight_decay=1e-5,1.0000001e-5 learning_rate=0.1,0.1000000001 seed=7,1234567,1234568"
    strategies = list_strategies([sweep, sweep], TrainConfig())
    assert len({strategy.config for strategy in strategies}) == 2 * 2 * 3
    assert len({strategy.name for strategy in strategies}) == 2 * 2 * 3
    assert len({strategy.recipe for strategy in strategies}) == 2 * 2


def curve_rows() -> list[dict[str, str]]:
    accuracy = {"a": {"0": (0.8, 0.8), "5": (0.6, 0.8), "10": (0.4, 0.8)},
                "b": {"0": (0.5, 0.5), "5": (0.5, 0.5), "10": (0.0, 0.25)}}  # fmt: skip
    return [
        {"strategy": name, "epoch": "3", "trial": str(trial), "num_faults": count,
         "accuracy": str(value)}
        for name, counts in accuracy.items()
        for count, values in counts.items()
        for trial, value in enumerate(values)
    ]  # fmt: skip


def test_areas_by_hand():
    curves = read_curves(curve_rows())
    rows = robustness_rows(curves, {"a": "a", "b": "b"}, [10])
    assert [row[6] for row in rows] == pytest.approx([(0.75 + 1) / 2, (0.75 + 0.875) / 2])
    (pair,) = pair_rows(curves, [10])
    assert pair[:5] == ["a", 3, "b", 3, 10]
    assert pair[5] == pytest.approx((0 - 0.125) / 2)
    assert pair[8] == 1.0 / 2 * 2  # differences 0 and -0.125: every sign is as far


def test_a_network_that_is_never_right_has_no_area_and_no_other_epoch_stands_in():
    never = [
        row | {"epoch": "5", "accuracy": "0.0"} for row in curve_rows() if row["strategy"] == "a"
    ]
    curves = read_curves(curve_rows() + never)
    assert [(curve.strategy, curve.epoch, curve.is_last) for curve in curves] == [
        ("a", 3, False), ("b", 3, True),
    ]  # fmt: skip
    assert pair_rows(curves, [10]) == []


@pytest.mark.parametrize("minus_mean", [False, True])
def test_curves_are_means_over_trials_and_bands_their_ends(minus_mean):
    mean = np.array([65, 60, 36.25]) if minus_mean else np.zeros(3)  # over both networks
    low_and_high = {"a": ([80, 60, 40], [80, 80, 80]), "b": ([50, 50, 0], [50, 50, 25])}
    figure = by_injections(curve_rows(), [[0, 5, 10]], minus_mean)
    for axes, (low, high) in zip(figure.axes, low_and_high.values(), strict=True):
        (line,), (band,) = axes.lines, axes.collections
        np.testing.assert_array_equal(line.get_xdata(), [0, 5, 10])
        np.testing.assert_allclose(line.get_ydata(), np.mean([low, high], axis=0) - mean)
        edges = band.get_paths()[0].vertices
        for x, ends in zip((0, 5, 10), np.transpose([low - mean, high - mean]), strict=True):
            drawn = edges[edges[:, 0] == x, 1]
            np.testing.assert_allclose([drawn.min(), drawn.max()], ends, atol=1e-12)


def test_training_curves_have_the_learning_rate_on_a_second_axis(finished):
    rows = table(finished / "training.csv")
    accuracy, rate = (training_curves(rows).axes[i] for i in (0, len(NAMES)))
    own = [row for row in rows if row["strategy"] == NAMES[0]]
    for axes, column, factor in ((accuracy, "test_accuracy", 100), (rate, "learning_rate", 1)):
        expected = [factor * float(row[column]) for row in own]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), expected)
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])


@pytest.mark.parametrize("spread, scale", [(9, "linear"), (100, "log")])
def test_weight_statistics_far_apart_are_drawn_by_their_logarithm(spread, scale):
    rows = [
        {"strategy": name, "epoch": "1", "weight_mean": mean, "weight_std": std, "weight_l2": std}
        for name, mean, std in (("a", "-.1", "1"), ("b", ".1", str(spread)), ("c", "nan", "nan"))
    ]
    assert [axes.get_yscale() for axes in weight_statistics(rows).axes] == ["linear", scale, scale]


def test_a_learning_rate_of_zero_is_drawn(finished):
    rows = [row | {"learning_rate": "0"} if row["epoch"] == "3" else row
            for row in table(finished / "training.csv")]  # fmt: skip
    low, high = training_curves(rows).axes[len(NAMES)].get_ylim()
    assert 0 < low < high


def test_ranges_are_those_of_the_configuration(tmp_path):
    assert len(training_strategies.Settings().counts()) == 20
    texts = ["4/2", "9/3", "40/20"]
    counts = training_strategies.Settings(ranges=texts).counts()
    assert counts == [0, 2, 3, 4, 6, 9, 20, 40]
    rows = [{"num_faults": str(count)} for count in counts]
    assert logged_ranges(tmp_path, rows) == [counts]
    (tmp_path / "config.json").write_text(json.dumps({"ranges": texts}))
    assert logged_ranges(tmp_path, rows) == [[0, 2, 4], [0, 3, 6, 9], [0, 20, 40]]
    with pytest.raises(ValueError, match="config.json names 40 faults, which no row"):
        logged_ranges(tmp_path, rows[:-1])
    for damaged in ("[]", "{", '{"ranges": ["3"]}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match="names no ranges|a range is '3'"):
            logged_ranges(tmp_path, rows)


def two_seeds_each() -> tuple[list[Curve], dict[str, str]]:
    """Two recipes of two seeds, and one that learned nothing."""
    ends = {"a": 0.8, "a-s1": 0.6, "b": 0.4, "b-s1": 0.2, "c": 0.1, "c-s1": 0.1}
    curves = [
        Curve(name, 3, True, np.array([0, 10]), np.array([[0.8 if name[0] < "c" else 0.1, end]]))
        for name, end in ends.items()
    ]
    return curves, {name: name[0] for name in ends}


def test_seeds_by_hand():
    curves, recipes = two_seeds_each()
    rows = {row[0]: row[1:] for row in seed_rows(curves, recipes, [10])}
    low, high = (1 + 0.6 / 0.8) / 2, 1.0
    assert rows["a"][:2] == [10, 2]
    expected = [(low + high) / 2, (high - low) / 2**0.5, low, high, 0.8, 0]
    assert rows["a"][2:] == pytest.approx(expected)
    ((most, num_recipes, num_networks, share, within, p_value),) = effect_rows(
        curves, recipes, [10]
    )
    assert (most, num_recipes, num_networks) == (10, 2, 4)  # not the one that learned nothing
    assert within == pytest.approx((high - low) / 2**0.5)
    assert share == pytest.approx(0.8)  # of the areas 1, .875, .75, .625
    assert p_value == pytest.approx(1 / 3, abs=0.01)
    assert effect_rows(curves[:2], recipes, [10]) == []


def test_correlations_are_with_the_network_that_got_the_faults():
    curves, _ = two_seeds_each()
    networks = [
        {"strategy": curve.strategy, "epoch": epoch, "weight_std": str(sign * number)}
        | dict.fromkeys(
            ("test_accuracy", "weight_mean", "weight_l2", "gradient_norm", "sharpness"), "nan"
        )
        for epoch, sign in (("3", -1), ("8", 1))
        for number, curve in enumerate(curves)
    ]
    rows = {(row[0], row[1]): row for row in correlation_rows(curves, networks, [10])}
    assert rows["weight_std", "learned"][3] == pytest.approx(1)  # areas fall, and so do epoch 3's
    assert rows["weight_std", "learned"][6] == 4
    assert rows["sharpness", "all"][6] == 0


def test_areas_are_drawn_a_line_a_recipe():
    curves, recipes = two_seeds_each()
    rows = [
        {column: str(value) for column, value in zip(ROBUSTNESS_COLUMNS, row, strict=True)}
        for row in robustness_rows(curves, recipes, [10])
    ]
    (axes,) = areas(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    drawn = [sorted(line.get_xdata()) for line in axes.lines]
    assert drawn == [pytest.approx(pair) for pair in ([0.875, 1], [0.625, 0.75], [1, 1])]


def test_the_example_of_the_docs_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = Tiny()
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 1)).astype(np.float32)
    given = {
        "params": module.init(jax.random.key(0), images)["params"],
        "apply_fn": lambda params, images: module.apply({"params": params}, images),
        "images": images,
        "labels": np.zeros(3, np.int32),
    }
    exec(compile(example, "training_strategies.md", "exec"), given)
    assert given["campaign"].outcomes.shape == (len(given["faults"]), 3)


@pytest.mark.parametrize("experiment", [training_strategies, bit_sensitivity])
def test_flagfiles_are_valid_and_say_their_command(experiment):
    name = experiment.__name__.partition(".")[2]
    paths = sorted(FLAGS.glob(f"{name}_*.flags"))
    assert {path.stem.removeprefix(f"{name}_") for path in paths} >= {
        "smoke", "digits", "mnist", "cifar10_resnet18",
    }  # fmt: skip
    for path in paths:
        read_flagfile(path, experiment.Settings).validate()
        text = path.read_text()
        assert f"python -m experiments.{name}\n" in text
        assert f"--flagfile=experiments/flags/{path.name} --workdir=runs/" in text


def test_every_training_of_the_study_is_in_its_flagfile(reference_dir):
    path = FLAGS / "training_strategies_cifar10_resnet18.flags"
    settings = read_flagfile(path, training_strategies.Settings)
    configs = [s.config for s in list_strategies(settings.sweep, settings.base())]
    rows = table(reference_dir / "thesis.csv")
    assert len(rows) == 42
    parse = {"schedule": str, "weight_decay": float, "batch_size": int}
    for row in rows:
        swept = row["swept"].replace("scheduler", "schedule")
        value = parse[swept](row["value"].partition("_")[0])
        wanted = {"optimizer": row["optimizer"], swept: value}
        if row["epochs"]:
            wanted["epochs"] = int(row["epochs"])
        assert any(wanted.items() <= vars(config).items() for config in configs), wanted


@pytest.mark.parametrize("folder, experiment", [
    ("bits_digits", bit_sensitivity), ("bits_mnist", bit_sensitivity),
    ("strategies_digits", training_strategies), ("strategies_mnist", training_strategies),
    ("strategies_seeds", training_strategies),
])  # fmt: skip
def test_results_are_of_the_flagfiles_and_make_their_tables_again(folder, experiment, tmp_path):
    name = experiment.__name__.partition(".")[2]
    flagfile = FLAGS / f"{name}_{folder.partition('_')[2]}.flags"
    settings = dataclasses.asdict(read_flagfile(flagfile, experiment.Settings))
    stored = json.loads((RESULTS / folder / "config.json").read_text())
    assert stored == json.loads(json.dumps(settings))
    if experiment is training_strategies:
        for path in RESULTS.glob(f"{folder}/*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        write_tables(tmp_path)
        for path in tmp_path.glob("*.csv"):
            for row, kept in zip(table(path), table(RESULTS / folder / path.name), strict=True):
                assert same_cells(row, kept), (path.name, row, kept)


def same_cells(row: dict[str, str], other: dict[str, str]) -> bool:
    """Equal but for the rounding of another machine's sums."""
    pairs = zip(row.items(), other.items(), strict=True)
    return all(
        a == b or (a[0] == b[0] and float(a[1]) == pytest.approx(float(b[1]), rel=1e-9, abs=1e-12))
        for a, b in pairs
    )


def test_each_figure_of_the_page_is_there_as_pixels_and_vectors():
    shown = re.findall(r"!\[.*?\]\((.*?)\.png\)", PAGE)
    assert len(shown) >= 3
    for stem in shown:
        for suffix in (".png", ".svg"):
            assert (ROOT / "docs" / f"{stem}{suffix}").is_file()


def test_the_bits_on_the_page_are_the_measured_ones():
    """A row `| 62 | 100 % | .61 [.07, .97] | ... |`: share of zeros, mean and ends over trials."""
    rows = table(RESULTS / "bits_digits" / "accuracy_by_bit.csv")
    effects = {(row["dtype"], row["bit"]): row
               for row in table(RESULTS / "bits_digits" / "bit_effects.csv")}  # fmt: skip
    found = re.findall(r"^\| \**(\d+)\**(?: \(sign\))? \| ([\d.]+) % \| (.*) \|$", PAGE, re.M)
    assert len(found) >= 8
    for bit, zeros, cells in found:
        share = 1 - float(effects["float64", bit]["share_one"])
        assert float(zeros) == pytest.approx(100 * share, abs=0.5)
        for count, cell in zip(("1", "1000", "10000"), cells.split(" | "), strict=True):
            values = [
                float(row["accuracy"]) for row in rows
                if (row["dtype"], row["bit"], row["num_faults"]) == ("float64", bit, count)
            ]  # fmt: skip
            assert len(values) >= 10
            numbers = [float(text) for text in re.findall(r"\d*\.\d+", cell)]
            expected = [np.mean(values), min(values), max(values)]
            assert numbers == pytest.approx(expected, abs=0.0051), (bit, count)


def test_the_docs_say_what_was_published(reference_dir):
    cells = {
        (label, optimizer): cell.split(" / ")
        for label, *parts in re.findall(r"^\| (\S.*?) \|" + r" (\S+ / \S+) \|" * 4, PAGE, re.M)
        for optimizer, cell in zip(("sgd", "adam", "adagrad", "rmsprop"), parts, strict=True)
    }
    labels = {"scheduler": "{}", "weight_decay": "weight decay {}", "batch_size": "batch {}"}
    for row in table(reference_dir / "thesis.csv"):
        label = labels[row["swept"]].format(row["value"].partition("_")[0])
        assert cells[label, row["optimizer"]][0] == (row["max_test_acc"] or "—")


BITS = bit_sensitivity.Settings(
    model="tiny",
    learning_rate=0.01,
    epochs=1,
    batch_size=32,
    num_train_images=64,
    dtypes=["float64", "float16", "int8"],
    num_faults=["1", "50"],
    trials=1,
    num_images=4,
    injection_batch_size=4,
)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("bits")
    bit_sensitivity.run(BITS, workdir)
    return workdir


def test_every_bit_of_every_dtype_has_its_rows(flipped):
    rows = table(flipped / "accuracy_by_bit.csv")
    assert [*rows[0]] == ["dtype", "bit", "num_faults", "trial", "accuracy", "num_non_finite"]
    found = {(row["dtype"], int(row["bit"])) for row in rows}
    assert found == {
        (dtype, bit) for dtype, width in (("float64", 64), ("float16", 16), ("int8", 8))
        for bit in range(width)
    }  # fmt: skip
    assert len(rows) == (64 + 16 + 8) * 2
    by_bit = {row["bit"]: row for row in rows
              if row["dtype"] == "float64" and row["num_faults"] == "50"}  # fmt: skip
    assert int(by_bit["62"]["num_non_finite"]) == 4  # 2**1024 times a weight, fifty times
    assert int(by_bit["54"]["num_non_finite"]) == int(by_bit["0"]["num_non_finite"]) == 0
    assert {path.suffix for path in flipped.glob("accuracy_by_bit.*")} == {
        ".csv", ".pdf", ".svg", ".png",
    }  # fmt: skip


def test_the_fields_of_a_word_are_marked(flipped):
    figure = by_bit(table(flipped / "accuracy_by_bit.csv"))
    marked = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert marked == [{"sign", "exponent", "mantissa"}] * 2 + [{"sign"}]
    assert {62, 54} < set(figure.axes[0].get_xticks())
    assert [set(axes.get_xticks()) for axes in figure.axes[1:]] == [{*range(16)}, {*range(8)}]


def test_bits_are_not_flipped_again(flipped, monkeypatch):
    before = (flipped / "accuracy_by_bit.csv").read_bytes()
    monkeypatch.setattr(bit_sensitivity, "cumulative_accuracy", None)
    monkeypatch.setattr(bit_sensitivity, "write_study", lambda workdir: None)
    bit_sensitivity.run(BITS, flipped)
    assert (flipped / "accuracy_by_bit.csv").read_bytes() == before
    effects = table(flipped / "bit_effects.csv")
    assert len(effects) == 64 + 16 + 8


def test_bad_bit_settings(tmp_path, finished):
    for change, message in (
        ({"dtypes": ["float8"]}, "dtypes is .'float8'.; allowed: once each, float64"),
        ({"dtypes": []}, r"dtypes is \[\]; allowed: once each"),
        ({"dtypes": ["int8", "int8"]}, "dtypes is .*; allowed: once each"),
        ({"num_faults": ["10", "1"]}, "num_faults is .*; allowed: rising integers"),
        ({"num_faults": ["x"]}, "num_faults is .'x'.; allowed: integers >= 0"),
        ({"num_faults": ["77"]}, "num_faults is .'77'.; allowed: up to the 76 weights"),
        ({"batch_size": 65}, "batch_size is 65; allowed: up to 64 images"),
        ({"paths": "x"}, "paths is 'x'; allowed: patterns of params/conv/"),
        ({"weights": str(finished / "networks" / NAMES[0] / "2"), "model": "lenet"},
         "weights is .*; allowed: a lenet for digits; other leaves: params/conv1/"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bit_sensitivity.run(dataclasses.replace(BITS, **change), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        bit_sensitivity.run(dataclasses.replace(BITS, weights=str(tmp_path / "no")),
                            tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_bit_effects_equal_struct():
    weights = np.random.default_rng(0).normal(0, 0.05, 40)
    effects = {effect.bit: effect for effect in bit_effects(weights)}
    for bit in (63, 55, 54, 52, 30):
        changes, ones = [], 0
        for weight in weights:
            (word,) = struct.unpack("<Q", struct.pack("<d", weight))
            ones += word >> bit & 1
            (flipped,) = struct.unpack("<d", struct.pack("<Q", word ^ (1 << bit)))
            changes.append(abs(flipped - weight))
        assert effects[bit].share_one == ones / 40
        assert effects[bit].median_change == pytest.approx(np.median(changes))
        assert effects[bit].rms_change == pytest.approx(np.sqrt(np.mean(np.square(changes))))
    assert effects[62].median_change > 1e290
    with pytest.raises(ValueError, match="the weights have the dtypes"):
        stored_weights([np.zeros(2, np.float32), np.zeros(2, np.int8)])


def test_float16_flips_to_non_finite_are_counted():
    effects = {e.bit: e for e in bit_effects(np.array([1.0, 1.5, 0.01], np.float16))}
    assert effects[14].share_non_finite == pytest.approx(2 / 3)  # 1 becomes Inf, 1.5 NaN
