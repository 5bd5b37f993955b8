"""experiments.ground_truth and .arithmetic on a reference made by PyTorch, and on bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import flags

from experiments import arithmetic, ground_truth
from experiments.common import agreement, published_network
from jaxfi.convert import read_results
from jaxfi.data import load_dataset, normalise
from tests.torch_models import TORCH_MODELS

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 10
# Module, index of its weight in PyTorch's order, bit.
SITES = [
    ("conv1", (3, 0, 2, 1), 30),
    ("conv1", (7, 0, 1, 0), 22),
    ("conv1", (8, 0, 1, 0), 26),
    ("layer3.1.conv2", (60, 2, 1, 1), 0),
    ("layer3.1.conv2", (61, 2, 1, 1), 11),
    ("layer3.2.conv1", (9, 2, 1, 1), 31),
    ("linear", (3, 40), 30),
    ("linear", (4, 41), 1),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """weights.npz and outcomes.csv of a small network, as another group would publish them."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    model = TORCH_MODELS["resnet20"](in_channels=1).eval()
    np.savez(folder / "weights.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
    pixels = normalise(load_dataset("digits").test_images[:NUM_IMAGES], (0.5,), (0.5,))
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad(), (folder / "outcomes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            "Injection,Layer,TensorIndex,Bit,n_injections,masked,non_critical,critical".split(",")
        )
        golden = model(images)
        for number, (layer, index, bit) in enumerate(SITES):
            counts = outcome_counts(golden, faulty_logits(model, images, layer, index, bit))
            writer.writerow([number, layer, index, bit, NUM_IMAGES, *counts])
    return folder


def faulty_logits(model, images, layer, index, bit) -> torch.Tensor:
    words = model.get_submodule(layer).weight.view(torch.int32)
    mask = int(np.uint32(1 << bit).view(np.int32))
    words[index] ^= mask
    outputs = model(images)
    words[index] ^= mask
    return outputs


def outcome_counts(golden, faulty) -> list[int]:
    masked = (golden.view(torch.int32) == faulty.view(torch.int32)).all(1)
    critical = ~masked & (golden.argmax(1) != faulty.argmax(1))
    return [int(masked.sum()), int((~masked & ~critical).sum()), int(critical.sum())]


def flag_texts(reference: Path, workdir: Path) -> list[str]:
    return [
        "--network=resnet20",
        f"--weights={reference / 'weights.npz'}",
        f"--outcomes={reference / 'outcomes.csv'}",
        "--dataset=digits",
        "--mean=0.5",
        "--std=0.5",
        "--arithmetic=layer3/*=tf32,*=float32",
        f"--num_images={NUM_IMAGES}",
        f"--workdir={workdir}",
    ]


def parsed(module, texts) -> flags.FlagValues:
    values = flags.FlagValues()
    module.define_flags(values)
    values(["program", *texts])
    return values


def settings(reference: Path, workdir: Path, **changes) -> ground_truth.Settings:
    found = ground_truth.settings_from_flags(parsed(ground_truth, flag_texts(reference, workdir)))
    return dataclasses.replace(found, **changes)


def read(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(reference, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    ground_truth.run(settings(reference, workdir), workdir)
    return workdir


def test_agreement_has_the_fixed_columns(finished):
    rows = read(finished / "agreement.csv")
    assert tuple(rows[0]) == agreement.AGREEMENT_COLUMNS
    found = {(row["layer"], row["bits"]): int(row["num_faults"]) for row in rows}
    assert found == {
        ("conv1", "12-22"): 1, ("conv1", "23-29"): 1, ("conv1", "30"): 1, ("layer3", "0-11"): 2,
        ("layer3", "31"): 1, ("linear", "0-11"): 1, ("linear", "30"): 1,
    }  # fmt: skip


def test_intervals_has_every_part_for_all_images_and_for_those_got_right(finished):
    rows = read(finished / "intervals.csv")
    assert tuple(rows[0]) == agreement.INTERVAL_COLUMNS
    parts = {(row["images"], row["layer"], row["bits"]): row for row in rows}
    for images in ("all", "right"):
        assert int(parts[images, "all", "all"]["num_faults"]) == len(SITES)
        assert int(parts[images, "layer3", "all"]["num_faults"]) == 3
        assert int(parts[images, "all", "30"]["num_faults"]) == 2
    for row in read(finished / "agreement.csv"):
        found = parts["all", row["layer"], row["bits"]]
        assert row == {name: found[name] for name in agreement.AGREEMENT_COLUMNS}
    for row in rows:
        for name in ("masked", "critical"):
            low, value, high = (float(row[f"{name}_{x}"]) for x in ("low", "measured", "high"))
            assert 0 <= low <= value <= high <= 1


def test_faults_has_both_outcomes(finished, reference):
    rows, published = read(finished / "faults.csv"), read(reference / "outcomes.csv")
    assert [int(row["row"]) for row in rows] == list(range(len(SITES)))
    assert [row["path"] for row in rows[:2]] == ["conv1/kernel"] * 2
    for row, expected in zip(rows, published, strict=True):
        measured = [float(row[f"{n}_measured"]) for n in ("masked", "non_critical", "critical")]
        assert sum(measured) == pytest.approx(1)
        for name in ("masked", "non_critical", "critical"):
            assert float(row[f"{name}_published"]) == int(expected[name]) / NUM_IMAGES
        # Argmax does not depend on the last bits.
        assert abs(float(row["critical_measured"]) - float(row["critical_published"])) <= 0.1


def test_tf32_masks_the_low_bits_of_layer3_alone(finished):
    masked = {row["row"]: float(row["masked_measured"]) for row in read(finished / "faults.csv")}
    assert masked["3"] == masked["4"] == 1
    assert masked["1"] < 1


def test_the_same_again_continues_and_another_is_refused(finished, reference):
    before = (finished / "agreement.csv").read_bytes()
    ground_truth.run(settings(reference, finished), finished)
    assert (finished / "agreement.csv").read_bytes() == before
    with pytest.raises(ValueError, match="arithmetic is 'layer3"):
        ground_truth.run(settings(reference, finished, arithmetic="*=float32"), finished)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": "no.npz"}, "no.npz: no such file"),
        ({"outcomes": "no.csv"}, "no.csv: no such file"),
        ({"network": "resnet19"}, "network is 'resnet19'; allowed: lenet"),
        ({"arithmetic": "layer9/*=tf32"}, "'layer9/.' is the first to match no leaf"),
        ({"arithmetic": "*=tf31"}, "unknown arithmetic 'tf31'"),
        ({"arithmetic": "tf32"}, "'tf32' is not PATTERN=ARITHMETIC"),
        ({"num_faults": 100}, "num_faults=100: allowed are 0 .all. to 8"),
        ({"num_images": 1000}, "num_images=1000: allowed are 0 .all. to 500"),
        ({"paths": "bn*"}, "paths=bn.: no fault there; .* in conv1/kernel, layer3/1/conv2/kernel"),
        ({"bits": [2, 3]}, "bits=.2, 3.: no fault there; the list has faults in .0, 1, 11, 22,"),
        ({"mean": [0.5, 0.5, 0.5]}, "--mean has not 1 numbers"),
        ({"jpeg_quality": 90}, "images of 3 channels"),
    ],
)
def test_bad_input_is_named_before_work(change, message, reference, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ground_truth.run(settings(reference, tmp_path, **change), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_foreign_outcome_file_names_the_line(reference, tmp_path):
    lines = (reference / "outcomes.csv").read_text().splitlines()
    lines[3] = lines[3].replace("conv1", "layer4.0.conv1")
    (tmp_path / "outcomes.csv").write_text("\n".join(lines))
    changed = settings(reference, tmp_path, outcomes=str(tmp_path / "outcomes.csv"))
    with pytest.raises(ValueError, match="line 4.*no layer 'layer4.0.conv1'"):
        ground_truth.run(changed, tmp_path / "run")


@pytest.mark.parametrize(
    "texts, message",
    [
        (["--workdir=x"], "error: --weights is missing: give the reference file"),
        (["--weights=x", "--outcomes=x"], "error: --workdir is missing: give the folder for"),
        (["--num_fault=3"], "error: Unknown command line flag 'num_fault'"),
    ],
)
def test_the_command_ends_in_one_line(texts, message, tmp_path):
    command = [sys.executable, "-m", "experiments.ground_truth", *texts]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in ended.stderr


def test_samples_are_nested_and_reach_every_stratum(reference):
    subject = published_network.load_subject(settings(reference, reference))
    faults = read_results(reference / "outcomes.csv", subject.params).faults
    stratum = agreement.stratum_of_faults(faults)
    few, more = (agreement.sample_rows(faults, number, seed=1) for number in (3, 7))
    assert set(few) <= set(more)
    assert len(set(stratum[more])) == len(set(stratum)) == 7
    assert list(agreement.sample_rows(faults, 0, seed=1)) == list(range(len(SITES)))


def test_paths_and_bits_restrict_the_published_list(reference):
    subject = published_network.load_subject(settings(reference, reference))
    faults = read_results(reference / "outcomes.csv", subject.params).faults
    assert [site[0] for site in SITES[3:6]] == ["layer3.1.conv2"] * 2 + ["layer3.2.conv1"]
    assert ground_truth.restrict(faults, "layer3/*", []).tolist() == [3, 4, 5]
    assert ground_truth.restrict(faults, "*", [11, 30]).tolist() == [0, 4, 6]


def test_a_fault_keeps_its_row_of_the_published_list(reference, tmp_path):
    ground_truth.run(settings(reference, tmp_path, paths="layer3/*", num_faults=0), tmp_path)
    assert [row["row"] for row in read(tmp_path / "faults.csv")] == ["3", "4", "5"]


def test_the_interval_covers_the_whole_list():
    """Simulated: 300 published faults on 2,000 images, samples of both."""
    rng = np.random.default_rng(0)
    fault, image = rng.normal(size=300), rng.normal(size=2000)
    happened = fault[:, None] + image + rng.normal(size=(300, 2000)) > 0
    published = happened.mean(axis=1)
    inside = 0
    for _ in range(200):
        rows, columns = rng.choice(300, 60, replace=False), rng.choice(2000, 100, replace=False)
        weights, coverage = np.full(60, 1 / 60), np.full(60, 60 / 300)
        found = agreement.measured_estimate(
            happened[rows][:, columns], published[rows], weights, coverage, 100 / 2000, t=1.96
        )
        inside += found.low <= published[rows].mean() <= found.high
    assert inside >= 180


def test_what_was_not_seen_has_an_interval():
    """A pair in 10,000, and 1,000 images without it: the interval must reach it."""
    seen = np.zeros((1, 1000), bool)
    found = agreement.measured_estimate(seen, np.array([1e-4]), np.ones(1), np.ones(1), 0.1)
    assert found.low == 0
    assert 1e-4 < found.high < 5 / 1000  # beyond it, 1,000 images would miss it in < 1 % of cases


def test_the_interval_vanishes_where_all_was_run():
    happened = np.random.default_rng(0).random((20, 50)) > 0.5
    weights = np.full(20, 1 / 20)
    found = agreement.measured_estimate(happened, np.zeros(20), weights, np.ones(20), 1.0)
    assert found.low == found.high == found.value == pytest.approx(happened.mean())


def test_arithmetics_on_one_fault_list(reference, tmp_path):
    texts = [text for text in flag_texts(reference, tmp_path) if "outcomes" not in text]
    texts = [text for text in texts if not text.startswith("--arithmetic=")]
    texts += ["--num_faults=64", "--arithmetics=float32,bfloat16", "--paths=layer3/2/conv2/*"]
    found = arithmetic.settings_from_flags(parsed(arithmetic, texts))
    campaigns = arithmetic.run(found, tmp_path)
    rows = read(tmp_path / "arithmetic.csv")
    assert [row["arithmetic"] for row in rows] == ["float32"] * 32 + ["bfloat16"] * 32
    assert {row["num_faults"] for row in rows} == {"2"}
    for row in rows[32:]:
        # 16 bits of mantissa less, and what is left of the word is rounded to nearest.
        assert int(row["bits"]) > 14 or float(row["masked"]) == 1
    assert campaigns["bfloat16"].rates().masked.value > campaigns["float32"].rates().masked.value
    classes = {
        (row["arithmetic"], row["bits"]): row for row in read(tmp_path / "arithmetic_classes.csv")
    }
    assert len(classes) == 2 * 6
    whole, exact = (campaigns[name].outcomes for name in ("bfloat16", "float32"))
    row = classes["bfloat16", "all"]
    assert float(row["masked"]) == pytest.approx(np.mean(whole == 0), abs=1e-6)
    beyond = np.mean((whole == 0) & (exact != 0))
    assert float(row["by_rounding"]) == pytest.approx(beyond, abs=1e-6)
    assert float(row["by_rounding_low"]) < beyond < float(row["by_rounding_high"])
    assert int(row["pairs_critical_in_one"]) == np.sum((whole == 2) != (exact == 2))
    assert int(classes["bfloat16", "12-22"]["num_faults"]) == 22
    for kind in ("pdf", "svg", "png"):
        assert (tmp_path / f"masked_by_arithmetic.{kind}").stat().st_size > 0


@pytest.mark.slow
def test_the_published_outcomes(reference_dir, tmp_path):
    files = reference_dir / "resnet20_cifar10"
    try:
        load_dataset("cifar10")
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    texts = [
        f"--weights={files / 'weights.npz'}",
        f"--outcomes={files / 'outcomes.csv'}",
        "--arithmetic=layer3/*=tf32,*=float32",
    ]
    found = ground_truth.settings_from_flags(parsed(ground_truth, texts))
    found = dataclasses.replace(found, num_faults=200, num_images=100)
    for part in ground_truth.run(found, tmp_path):
        for published, measured in (part.masked, part.critical):
            assert abs(published - measured.value) < 0.1, part


@pytest.mark.parametrize("file, module, changes", [
    ("config.json", ground_truth, []),
    ("conv1_config.json", ground_truth,
     ["--paths=conv1/*", "--bits=30", "--num_faults=0", "--num_images=10000"]),
    ("arithmetic_config.json", arithmetic, []),
])  # fmt: skip
def test_results_are_of_the_flagfiles(file, module, changes):
    name = module.__name__.partition(".")[2]
    texts = [f"--flagfile={ROOT}/experiments/flags/{name}.flags", *changes]
    texts += ["--weights=weights.npz", *["--outcomes=outcomes.csv"] * (module is ground_truth)]
    found = dataclasses.asdict(module.settings_from_flags(parsed(module, texts)))
    stored = json.loads((ROOT / "docs" / "results" / "ground_truth" / file).read_text())
    assert stored == json.loads(json.dumps(found))
