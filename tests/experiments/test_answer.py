"""The benchmark of the answer, on little."""

from __future__ import annotations

import json

import pytest
from absl import flags

from experiments.benchmarks import answer


def run(*arguments: str) -> dict:
    values = flags.FlagValues()
    answer.define_flags(values)
    values(["answer", *arguments])
    return answer.run_from_flags(values)


@pytest.mark.slow
def test_what_is_written(tmp_path) -> None:
    out = tmp_path / "new" / "answer.json"
    result = run("--network=lenet", "--dataset=random", "--num_images=60", "--channels=1",
                 "--margin=0.1", "--batch_size=20", f"--out={out}")  # fmt: skip
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert 0 < result["jaxfi_seconds_warm"] < result["jaxfi_seconds_cold"]
    for name in ("masked", "non_critical", "critical", "due"):
        value, low, high = result["estimates"][name]
        assert low <= value <= high <= low + 0.2 + 1e-9
    assert result["num_pairs"] == result["num_faults"] * result["images_per_fault"]
    assert result["pytorch_seconds_full"] > result["pytorch_seconds_same_pairs"] > 0
    assert result["agreement_with_pytorch"] > 0.9
    assert "| cold |" in answer.table(result)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "--out is missing"),
        (["--network=alexnet", "--out=o"], "--network is 'alexnet'; allowed: lenet"),
        (["--how=fast", "--out=o"], "--how is 'fast'; allowed: stratified, sequential"),
        (["--margin=2", "--out=o"], "--margin is 2.0; allowed: above 0, below 1"),
        (["--dataset=random", "--out=o"], "--num_images is missing"),
    ],
)
def test_what_is_no_argument_is_named(given, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(*given)
