"""The engine's benchmark on almost nothing, its two sides, and the example of docs/engine.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from absl import flags

from experiments.benchmarks import campaign_plan, dealing, engine, sides, small, time_shares
from jaxfi.engine import LeafCost
from jaxfi.faults import FaultList
from tests.torch_models import TORCH_MODELS

FIXED_FIELDS = {
    "jaxfi_outcomes_per_s": float,
    "pytorch_outcomes_per_s": float,
    "ratio": float,
    "seconds": float,
    "num_faults": int,
    "num_images": int,
    "device": str,
    "precision": str,
}


def run_command_line(*arguments: str) -> dict:
    values = flags.FlagValues()
    engine.define_flags(values)
    values(["engine", *arguments])
    return engine.run_from_flags(values)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> tuple[dict, dict]:
    out = tmp_path_factory.mktemp("engine") / "new" / "result.json"
    returned = run_command_line(
        "--network=lenet", "--dataset=random", "--channels=1", "--num_faults=30",
        "--num_images=20", "--batch_size=10", "--rounds=1", "--pytorch_faults=6",
        "--pytorch_images=15", "--reference_faults=2", f"--out={out}",
    )  # fmt: skip
    return returned, json.loads(out.read_text(encoding="utf-8"))


def test_file_holds_the_fixed_fields(result):
    returned, written = result
    assert written == returned
    assert {name: type(written[name]) for name in FIXED_FIELDS} == FIXED_FIELDS
    assert (written["num_faults"], written["num_images"]) == (30, 20)
    assert written["precision"] == "highest"
    assert written["jaxfi_outcomes_per_s"] == pytest.approx(30 * 20 / written["seconds"])
    quotient = written["jaxfi_outcomes_per_s"] / written["pytorch_outcomes_per_s"]
    assert written["ratio"] == pytest.approx(quotient)
    assert written["versions"]["torch"] == torch.__version__
    assert len(written["spread"]["pytorch_outcomes_per_s"]["rounds"]) == 1


def test_sides_are_the_same_work(result):
    written = result[1]
    # 15 images are one whole batch of 10.
    assert written["pytorch"] == {"num_faults": 6, "num_images": 10, "device": "cpu"}
    assert written["agreement"]["critical"] == 1.0
    assert set(written["reference"]["outcomes_per_s"]) == {"xla", "campaign"}
    shares = [written["outcomes"][name] for name in ("masked", "non_critical", "critical")]
    assert sum(shares) == pytest.approx(1.0)


def test_table_is_markdown(result):
    lines = engine.table(result[1]).splitlines()
    assert [line.count("|") for line in lines[:5]] == [6] * 5
    assert lines[3].startswith("| PyTorch, copy and re-run | 6 | 10 |")
    assert "precision highest" in lines[-1]


def test_pytorch_flips_the_bit_of_the_same_weight():
    params = {"fc1": {"kernel": np.zeros((64 * 14 * 14, 128), np.float32)}}
    # Pixel (3, 7) of channel 41: PyTorch flattens (C, H, W), Flax (H, W, C).
    site = ("fc1/kernel", ((3 * 14 + 7) * 64 + 41, 99), 31)
    ((name, index, mask),) = sides.torch_sites(FaultList.from_sites([site], params))
    assert name == "fc1.weight"
    model = TORCH_MODELS["lenet"]()
    faulty = sides.with_fault(model, name, index, mask)
    moved = torch.nonzero(faulty.fc1.weight != model.fc1.weight)
    row, column = 99, (41 * 14 + 3) * 14 + 7
    assert moved.tolist() == [[row, column]]
    assert faulty.fc1.weight[row, column] == -model.fc1.weight[row, column]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": "alexnet"}, "--network is 'alexnet'; allowed: lenet, "),
        ({"dataset": "svhn"}, "--dataset is 'svhn'; allowed: random, "),
        ({"precision": "half"}, "--precision is 'half'; allowed: highest"),
        ({"batch_size": 0}, "--batch_size is 0; allowed: integers >= 1"),
        ({"channels": 2}, "--channels is 2; allowed: 1, 3"),
        ({"num_images": 0}, "--num_images is missing"),
    ],
)
def test_wrong_settings_end_in_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        engine.Settings(**({"num_images": 5} | change)).validate()


def test_out_is_needed():
    with pytest.raises(ValueError, match="--out is missing"):
        run_command_line("--num_images=5")


def test_example_of_the_engine_page_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(example, {})
    # 30 x 30 x 32 x 27 of 16.8 million multiplications, in 32 columns; what is behind conv1
    assert "conv1/kernel columns 0.14% 95.38%" in capsys.readouterr().out


def test_time_shares_add_up_to_the_whole():
    clock = time_shares.Clock()
    clock.seconds.update({"suffix": 3.0, "prefix": 1.0})
    clock.operations.update({"suffix": 6 * 10**9, "prefix": 10**9})
    lines = time_shares.table(8.0, clock, 4e9).splitlines()
    assert "| prefix | 1.0 | 12% | 1 | 25% |" in lines
    assert "| suffix | 3.0 | 38% | 2 | 50% |" in lines
    assert "| host and the rest | 4.0 | 50% | | |" in lines
    assert "| all | 8.0 | 100% | 1 | 22% |" in lines


@pytest.mark.slow
def test_time_shares_count_every_part_of_a_campaign():
    settings = engine.Settings(
        network="lenet", channels=1, num_faults=30, num_images=40, batch_size=20
    )
    seconds, clock, limit = time_shares.measure(settings)
    assert all(clock.seconds[part] > 0 for part in time_shares.PARTS)
    assert sum(clock.seconds.values()) <= seconds
    # 40 images of LeNet, by hand: two convolutions, two dense layers; a product and a sum each.
    network = 30 * 30 * 32 * 9 + 28 * 28 * 64 * 9 * 32 + 12_544 * 128 + 128 * 10
    assert clock.operations["golden run"] == 40 * 2 * network
    assert limit > 0


def test_spreading_over_devices_is_that_of_a_hand_count() -> None:
    # Columns hold two faults, which cost 0.2 together; a pair's suffix costs 10 x its share.
    cost = LeafCost("w", "columns", "", 5, 0.1, 10.0, 0, 0, group_size=2)
    survivors = np.array([[4, 0], [1, 1], [2, 0], [0, 6], [9, 0]]) / 100
    # Two devices, each a group a step: 4 + 2 and 2 + 6 pairs; then 9 pairs and none.
    expected = 2 * 0.2 + 10 * (8 + 9) / 100
    assert dealing.over_faults(cost, survivors, 2, 1) == pytest.approx(expected)
    # Both groups in one step, of three faults and two: 4 + 2 + 2 and 6 + 9 pairs.
    expected = 2 * 0.2 + 10 * 15 / 100
    assert dealing.over_faults(cost, survivors, 2, 2) == pytest.approx(expected)
    # Each a batch of all three groups: half of the columns, and 5 or 1, 2 or 6, 9 or 0 pairs.
    expected = 3 * 0.2 / 2 + 10 * (5 + 6 + 9) / 100
    assert dealing.over_images(cost, survivors, 2) == pytest.approx(expected)
    # One device has both batches, one after the other.
    assert dealing.over_images(cost, survivors, 1) == pytest.approx(3 * 0.2 + 10 * 23 / 100)
    # Dealt: 5; 3, then 4 more; the last to whoever is free first, which is the first.
    assert campaign_plan.until_the_last([5, 3, 4, 1], num_devices=2) == 7
    assert campaign_plan.unevenness([5, 3, 4, 1], num_devices=2) == 7 / 6.5


def test_small_campaigns_are_timed_in_turns(tmp_path):
    out = tmp_path / "new" / "small.json"
    values = flags.FlagValues()
    small.define_flags(values)
    values(["small", "--cases=recurrent, 100 x 100", "--rounds=1", f"--out={out}"])
    result = small.run_from_flags(values)
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    (found,) = result["cases"].values()
    assert {name: len(times) for name, times in found["seconds"].items()} == {
        "fast": 1, "reference": 1
    }  # fmt: skip
    assert found["said"] >= 0
    assert 0 < found["took"] <= found["seconds"]["fast"][0]
    assert "| recurrent, 100 × 100 |" in small.table(result)
    with pytest.raises(ValueError, match="--cases names 'none'; allowed: nnx_cnn, 600 x 100;"):
        small.measure(["none"], 1)
