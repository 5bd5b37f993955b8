"""The GPU's benchmark, small, on whatever runs the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments.benchmarks import gpu


def run(out: Path, *arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--smoke", f"--out={out}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert ": done" in line, done.stdout
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_a_campaign_beside_pytorchs(tmp_path) -> None:
    written = run(tmp_path, "--stages=machine,lenet")
    assert set(written["machine"]["matmul_tflop_per_s"]) == {"highest", "default"}
    (campaign,) = written["lenet"]["campaigns"]
    assert campaign["repeats"]
    assert campaign["sample_is_full"]
    assert campaign["reference"] == {"pairs": 80, "differ": 0}
    assert campaign["same_as_pytorch"] > 0.9
    assert len(written["lenet"]["pytorch_pairs_per_s"]) == 2


@pytest.mark.slow
def test_every_stage(tmp_path) -> None:
    written = run(tmp_path)
    assert set(written) == {*gpu.STAGES}
    for name in ("conformance", "deterministic"):
        assert [(e["differ"], e["correct_equal"]) for e in written[name]] == [(0, True)] * 2
    assert (tmp_path / "row.tar.gz").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "--out is missing"),
        (
            ["--out=o", "--stages=lenet,quick"],
            "--stages has 'quick'; allowed: machine, conformance",
        ),
    ],
)
def test_what_is_no_argument_is_named(given, message) -> None:
    values = flags.FlagValues()
    gpu.define_flags(values)
    values(["gpu", *given])
    with pytest.raises(ValueError, match=message):
        gpu.run_from_flags(values)
