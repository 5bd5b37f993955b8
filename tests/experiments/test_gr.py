"""The main experiment end to end on little data, and its answers to bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import conditions, gr
from experiments.common.command import one_line
from experiments.common.config import Config, check_same_config, claim_workdir, read_flagfile
from jaxfi import load_campaign

ROOT = Path(__file__).parents[2]
SMALL = Config(
    epochs=1,
    augment=False,
    num_train_images=64,
    batch_size=32,
    num_faults=60,
    audit_pairs=5,
    num_images=20,
    campaign_batch_size=20,
    alpha=0.01,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a whole small run."""
    workdir = tmp_path_factory.mktemp("run")
    gr.run(SMALL, workdir)
    return workdir


def test_a_run_leaves_what_the_contract_names(finished):
    for name in ("table.csv", "table.md", "table.tex", "faults.csv", "config.json"):
        assert (finished / name).stat().st_size > 0, name
    for stem in ("outcome_shares", "outcomes_by_bit", "critical_by_layer", "coverage"):
        assert {path.suffix for path in finished.glob(f"{stem}.*")} >= {".pdf", ".svg", ".png"}
    assert json.loads((finished / "config.json").read_text()) == dataclasses.asdict(SMALL)
    for loss in gr.LOSSES:
        assert list((finished / "campaigns" / loss / "results").glob("*.parquet"))
        assert list((finished / "networks" / loss).iterdir())


def test_table_rows_add_up(finished):
    with (finished / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["default", "gradient"]
    assert [float(row["alpha"]) for row in rows] == [0.0, 0.01]
    for row in rows:
        total = sum(float(row[name]) for name in ("masked", "non_critical", "critical"))
        assert total == pytest.approx(100, abs=1e-4)
        assert (row["num_faults"], row["num_images"]) == ("60", "20")


def test_running_again_gives_the_same_table_without_training(finished, monkeypatch):
    before = {path: path.read_bytes() for path in finished.rglob("*.csv")}
    stamps = {p: p.stat().st_mtime_ns for p in (finished / "networks").rglob("*") if p.is_file()}
    gr.run(SMALL, finished)
    assert {path: path.read_bytes() for path in finished.rglob("*.csv")} == before
    kept = {path: path.stat().st_mtime_ns for path in stamps if "checkpoint" in str(path)}
    assert all(stamps[path] == stamp for path, stamp in kept.items())


def test_another_configuration_is_named_and_harms_nothing(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another configuration: epochs is 1 there and 2 here$"):
        gr.run(dataclasses.replace(SMALL, epochs=2), finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_torn_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"epochs"')
    with pytest.raises(ValueError, match=r"config.json is not a configuration"):
        check_same_config(SMALL, tmp_path)


def test_a_claimed_folder_is_the_same_configuration(tmp_path):
    claim_workdir(SMALL, tmp_path / "new")
    check_same_config(SMALL, tmp_path / "new")


BAD_INPUT = {
    "dataset": ("imagenet", "digits, mnist, cifar10"),
    "model": ("alexnet", "lenet"),
    "optimizer": ("lion", "adadelta"),
    "schedule": ("cyclic", "step"),
    "fault_model": ("gamma-ray", "bit-flip"),
    "engine": ("slow", "reference"),
    "precision": ("exact", "highest"),
    "nan": ("ignore", "argmax"),
    "alpha": (-0.1, ">= 0"),
    "learning_rate": (float("nan"), "> 0"),
    "epochs": (0, ">= 1"),
    "batch_size": (0, ">= 1"),
    "margin": (1.5, "0 < margin < 1"),
    "t": (0.0, "t > 0"),
    "p": (1.0, "0 < p < 1"),
    "num_faults": (10**10, "there are 52027712 fault sites"),
    "num_images": (501, "500"),
    "images_per_fault": (21, "allowed: up to 20 images"),
    "campaign_batch_size": (0, ">= 1"),
    "memory_budget": (-1, ">= 0"),
    "seed": (-1, ">= 0"),
    "fault_list": ("no/such/file.csv", "no/such/file.csv"),
}


@pytest.mark.parametrize(
    "name, value", [("num_faults", 60), ("fault_model", "zero"), ("margin", 0.02), ("p", 0.1)]
)
def test_a_fault_list_and_a_sample_exclude_each_other(name, value, tmp_path):
    changes = {"num_faults": 0, "fault_list": "mine.csv", name: value}
    given = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=f"fault_list is 'mine.csv' and {name} is {value!r}: "):
        gr.run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    dataclasses.replace(SMALL, num_faults=0, fault_list="mine.csv", t=1.96, seed=3).validate()


def test_what_cannot_change_a_result_may_differ(tmp_path):
    claim_workdir(SMALL, tmp_path)
    check_same_config(dataclasses.replace(SMALL, memory_budget=10**9), tmp_path)
    with pytest.raises(ValueError, match=r"configuration: seed is 0 there and 1 here$"):
        check_same_config(dataclasses.replace(SMALL, memory_budget=10**9, seed=1), tmp_path)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_before_training(name, tmp_path, monkeypatch):
    value, allowed = BAD_INPUT[name]

    def forbidden(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(gr, "train_network", forbidden)
    sampled = {} if name != "fault_list" else {"num_faults": 0}
    changed = dataclasses.replace(SMALL, **{**sampled, name: value})
    with pytest.raises((ValueError, OSError)) as caught:
        gr.run(changed, tmp_path / "run")
    message = one_line(caught.value)
    assert allowed in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_seeds_that_jax_would_cut_are_refused():
    for seed in (2**32, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}; allowed: integers >= 0 and < 2"):
            dataclasses.replace(SMALL, seed=seed).validate()
    dataclasses.replace(SMALL, seed=2**32 - 1).validate()


def test_nan_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha is nan"):
        dataclasses.replace(SMALL, alpha=float("nan")).validate()


def test_a_fault_list_for_other_parameters_is_named(tmp_path):
    path = tmp_path / "faults.csv"
    path.write_text(
        "path,index,bit,model,value,shape,dtype\n"
        'conv1/kernel,"(0, 0, 0, 0)",3,bit-flip,,"(3, 3, 3, 32)",float32\n'
    )
    given = dataclasses.replace(SMALL, num_faults=0, fault_list=str(path))
    with pytest.raises(ValueError, match=r"conv1/kernel .*float32.* \(3, 3, 3, 32\)"):
        gr.run(given, tmp_path / "run")


def test_a_missing_data_set_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    result = run_command(["--dataset=mnist", f"--workdir={tmp_path / 'run'}"])
    assert "prepare" in result.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--model=alexnet", "--workdir=/tmp/jaxfi-none"], "model is 'alexnet'; allowed: lenet"),
        (["--alpha=much", "--workdir=/tmp/jaxfi-none"], "alpha"),
        (["--lr=1"], "Unknown command line flag 'lr'"),
        ([], "--workdir"),
        (["--num_faults=9", f"--workdir={ROOT / 'LICENSE' / 'run'}"], "LICENSE/run"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(arguments, expected):
    result = run_command(arguments)
    assert expected in result.stderr
    assert result.stderr.strip().count("\n") == 0


def run_command(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.gr", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result


FLAGS = ROOT / "experiments" / "flags"
FLAGFILES = sorted([FLAGS / "digits.flags", FLAGS / "smoke.flags", *FLAGS.glob("table[2-6]_*")])


@pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
def test_flagfiles_are_valid_and_say_their_command(path):
    read_flagfile(path).validate()
    name = path.stem
    assert f"--flagfile=experiments/flags/{name}.flags --workdir=runs/{name}\n" in path.read_text()


def test_every_row_pair_of_the_paper_has_a_flagfile_with_its_numbers(reference_dir):
    configs = {path: read_flagfile(path) for path in FLAGFILES if path.stem.startswith("table")}
    with (reference_dir / "gr_paper.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if float(row["alpha"]) > 0]
    assert len(rows) == len(configs) == 27
    for row in rows:
        wanted = row["dataset"], row["model"], row["optimizer"], int(row["epochs"])
        (path,) = [
            path
            for path, c in configs.items()
            if (c.dataset, c.model, c.optimizer, c.epochs) == wanted
            and c.alpha == float(row["alpha"])
            and path.stem.startswith(f"table{row['table']}_")
        ]
        numbers = [
            row[n] for n in ("clean_acc", "faulty_acc", "masked", "non_critical", "critical")
        ]
        text = path.read_text()
        assert any(line.split()[2:] == numbers for line in text.splitlines() if "gradient" in line)


@pytest.mark.slow
def test_conditions_move_masked_as_they_must(finished, tmp_path):
    # Rounding operands hides faults in low bits, and so does softmax where it saturates.
    effects = {effect.condition: effect for effect in conditions.run(finished, 60, 20)}
    plain = effects["logits, float32, NaN by argmax"]
    campaign = load_campaign(finished / "campaigns" / "default")
    assert plain.masked[0].value == pytest.approx((campaign.outcomes == 0).mean())
    for network in (0, 1):
        by_arithmetic = [
            effects[name].masked[network].value
            for name in ("logits, float32, NaN by argmax", "TF32 operands", "bfloat16 operands")
        ]
        assert by_arithmetic == sorted(by_arithmetic)
    conditions.write(list(effects.values()), tmp_path / "conditions.csv")
    with (tmp_path / "conditions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(conditions.CONDITIONS)
