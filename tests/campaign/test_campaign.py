"""Campaigns: resume, refusal to mix, load, accuracies and rates, and PyTorch's own outcomes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from experiments.benchmarks import durable
from jaxfi import (
    CRITICAL,
    MASKED,
    NON_CRITICAL,
    load_campaign,
    run_campaign,
    sample_faults,
)
from jaxfi.campaign import _run as campaign
from jaxfi.campaign._description import read_description, read_faults
from jaxfi.campaign._workers import Price, by_leaf, split_blocks
from jaxfi.convert import from_torch, to_torch
from jaxfi.faults import FaultList
from jaxfi.models import MODELS
from tests.conformance_models import plain_mlp
from tests.engine.test_conformance import faults_in_every_leaf
from tests.torch_models import TORCH_MODELS


def arguments(seed: int = 0) -> dict:
    apply_fn, params, shape = plain_mlp()
    generator = np.random.default_rng(3)
    faults = faults_in_every_leaf(params, seed) + faults_in_every_leaf(params, seed + 1)
    images = generator.normal(size=(13, *shape)).astype(np.float32)
    labels = generator.integers(0, 4, 13)
    return {"apply_fn": apply_fn, "params": params, "faults": faults, "images": images,
            "labels": labels, "batch_size": 5}  # fmt: skip


def assert_same(a, b) -> None:
    assert a.faults == b.faults
    for name in ("outcomes", "due", "correct", "golden", "labels"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert a.provenance == b.provenance


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, blocks: int) -> list[int]:
    """Lets `blocks` blocks finish, then raises; the returned list counts the faults that ran."""
    run_block, ran = campaign.run_checked, []

    def counted(worker, rows, advance, **rest):
        if len(ran) == blocks:
            raise Interrupted
        ran.append(len(rows))
        return run_block(worker, rows, advance, **rest)

    monkeypatch.setattr(campaign, "FAULTS_PER_BLOCK", 4)
    monkeypatch.setattr(campaign, "run_checked", counted)
    return ran


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_interrupted_campaign_continues_where_it_was(tmp_path, monkeypatch, engine) -> None:
    settings = {**arguments(), "engine": engine}
    whole = run_campaign(**settings)
    first = interrupt_after(monkeypatch, blocks=5)
    with pytest.raises(Interrupted):
        run_campaign(**settings, workdir=tmp_path)
    with pytest.raises(ValueError, match="missing|lacks|not finished|unfinished"):
        load_campaign(tmp_path)
    monkeypatch.undo()
    second = interrupt_after(monkeypatch, blocks=1000)
    resumed = run_campaign(**settings, workdir=tmp_path, memory_budget=10**9)
    assert sum(first) + sum(second) == len(settings["faults"]) - whole.num_not_activated
    assert sum(first) > 0
    assert_same(resumed, whole)
    assert_same(load_campaign(tmp_path), whole)
    monkeypatch.undo()
    third = interrupt_after(monkeypatch, blocks=0)  # nothing is left to run
    assert_same(run_campaign(**settings, workdir=tmp_path), whole)
    assert third == []


def test_stopping_in_the_progress_callback_loses_no_finished_block(tmp_path, monkeypatch) -> None:
    settings = arguments()
    monkeypatch.setattr(campaign, "FAULTS_PER_BLOCK", 4)
    calls = []

    class Bar:
        n = 0

        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, count):
            calls.append(count)
            if len(calls) == 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        run_campaign(**settings, workdir=tmp_path)
    monkeypatch.undo()
    assert_same(run_campaign(**settings, workdir=tmp_path), run_campaign(**settings))


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from experiments.common.stopping import stop_soon
stop_soon("stopped")
from jaxfi import run_campaign
from jaxfi.campaign import _run as campaign
from tests.campaign.test_campaign import arguments
campaign.FAULTS_PER_BLOCK = 2
run_block = campaign.run_checked
def told(*given, **named):
    print("block", flush=True)
    time.sleep(0.05)
    return run_block(*given, **named)
campaign.run_checked = told
run_campaign(**arguments(), workdir=sys.argv[1])
"""


def run_and_stop(directory: Path, blocks: int, delay: float, stop: int) -> tuple[int, float]:
    """Runs the campaign in a process, which gets a signal `delay` s after it began block `blocks`;
    its exit status, and the seconds that it took to end."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CHILD, str(directory)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=root, env=environment, **pipes) as child:
        for _ in range(blocks):
            child.stdout.readline()
        time.sleep(delay)
        child.send_signal(stop)
        began = time.monotonic()
        return child.wait(timeout=60), time.monotonic() - began


def test_stopped_campaign_resumes_to_the_same_bits(tmp_path) -> None:
    generator = random.Random(0)
    saved = 0
    for blocks, stop in ((2, signal.SIGKILL), (3, signal.SIGTERM), (4, signal.SIGINT)):
        status, seconds = run_and_stop(tmp_path, blocks, generator.uniform(0, 0.1), stop)
        assert status == -stop if stop == signal.SIGKILL else status != 0
        # On a machine that others use, time says nothing.
        assert seconds < (2 if os.getloadavg()[0] < os.cpu_count() else 30)
        chunks = list((tmp_path / "results").glob("*.parquet"))
        assert len(chunks) >= saved + blocks - 1, "a finished block was not saved"
        saved = len(chunks)
    with pytest.raises(ValueError, match="not finished"):
        load_campaign(tmp_path)
    settings = arguments()
    assert_same(run_campaign(**settings, workdir=tmp_path), run_campaign(**settings))


@pytest.mark.slow
def test_campaign_killed_at_thirty_moments(tmp_path) -> None:
    generator = random.Random(1)
    for _ in range(30):
        blocks, delay = generator.choice([(0, 6.0), (1, 0.2), (2, 0.2)])
        run_and_stop(tmp_path, blocks, generator.uniform(0, delay), signal.SIGKILL)
    settings = arguments()
    assert_same(run_campaign(**settings, workdir=tmp_path), run_campaign(**settings))


CHANGES = {
    "batch_size": ({"batch_size": 6}, "batch_size is 5 there and 6 here"),
    "precision": ({"precision": "default"}, 'precision is "highest" there and "default" here'),
    "engine": ({"engine": "reference"}, 'engine is "fast" there and "reference" here'),
    "nan": ({"nan": "argmax"}, 'nan is "critical" there and "argmax" here'),
    "seed": ({"seed": 1}, "seed is 0 there and 1 here"),
    "images": ({"images": np.zeros((13, 6), np.float32)}, "images_sha256 is .* there and"),
    "labels": ({"labels": np.zeros(13, int)}, "labels_sha256 is .* there and"),
    "params": ({"params": None}, "params_sha256 is .* there and"),
    "faults": ({"faults": None}, "faults_file is .* there and"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("campaign")
    settings = arguments()
    run_campaign(**{**settings, "faults": settings["faults"][:4]}, workdir=directory)
    return directory


def test_the_benchmark_of_keeping_a_campaign_keeps_it(finished, tmp_path) -> None:
    found = load_campaign(finished)
    _, values = read_faults(finished, read_description(finished))
    durable.keep(found, values, tmp_path)
    assert_same(load_campaign(tmp_path), found)
    kept, original = (sorted((d / "results").iterdir()) for d in (tmp_path, finished))
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in original]


@pytest.mark.parametrize("name", CHANGES)
def test_another_configuration_in_the_same_directory_is_named(finished, name) -> None:
    changes, message = CHANGES[name]
    settings = arguments()
    settings["faults"] = settings["faults"][:4]
    other = jax.tree.map(lambda leaf: leaf + 1, settings["params"])
    replaced = {"params": {"params": other}, "faults": {"faults": settings["faults"][::-1]}}
    with pytest.raises(ValueError, match=message):
        run_campaign(**{**settings, **replaced.get(name, changes)}, workdir=finished)


def test_accuracies_and_rates_are_those_of_numpy() -> None:
    settings = arguments()
    found = run_campaign(**settings)
    outcomes, num_images = found.outcomes, len(settings["images"])
    logits = np.asarray(jax.jit(settings["apply_fn"])(settings["params"], settings["images"]))
    np.testing.assert_allclose(found.golden, logits, rtol=1e-5, atol=1e-5)
    assert found.clean_accuracy == np.mean(logits.argmax(1) == settings["labels"])
    assert found.faulty_accuracy == found.correct.sum() / outcomes.size
    np.testing.assert_array_equal(found.num_due, found.due.sum(1))
    rates = found.rates()
    for name, code in (("masked", MASKED), ("non_critical", NON_CRITICAL), ("critical", CRITICAL)):
        assert getattr(rates, name).value == pytest.approx(np.mean(outcomes == code), abs=1e-12)
    assert rates.due.value == pytest.approx(found.due.mean(), abs=1e-12)
    assert rates.faulty_accuracy.value == pytest.approx(found.faulty_accuracy, abs=1e-12)
    for estimate in rates:
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    # Masked pairs keep golden's prediction; a pair that is not critical does too.
    right = logits.argmax(1) == settings["labels"]
    kept = (outcomes != CRITICAL) & right
    at_most = kept.sum(1) + (outcomes == CRITICAL).sum(1)
    assert ((kept.sum(1) <= found.correct) & (found.correct <= at_most)).all()
    assert found.outcomes.shape == (len(settings["faults"]), num_images)


def torch_positions(params) -> dict[int, tuple[str, np.ndarray]]:
    """Per leaf: its PyTorch name, and which of the leaf's elements each PyTorch element is."""
    leaves, treedef = jax.tree.flatten({"params": params})
    found = {}
    numbered = [np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) for leaf in leaves]
    assert max(leaf.size for leaf in leaves) < 2**24  # exact in float32
    for number in range(len(leaves)):
        marked = [a if n == number else np.full_like(a, -1) for n, a in enumerate(numbered)]
        for name, array in to_torch(jax.tree.unflatten(treedef, marked)).items():
            if np.max(array) >= 0:
                found[number] = (name, np.asarray(array).reshape(-1).astype(np.int64))
    return found


def torch_predictions(model, images, faults, positions) -> tuple[np.ndarray, np.ndarray]:
    """Bit-flips written into PyTorch's own tensors: predictions and DUEs, [F, N]."""
    predictions, due = [], []
    with torch.no_grad():
        for leaf, element, bit in zip(faults.leaf, faults.element, faults.bit, strict=True):
            name, order = positions[leaf]
            words = model.state_dict()[name].numpy().reshape(-1).view(np.uint32)
            place = int(np.flatnonzero(order == element)[0])
            words[place] ^= np.uint32(1) << np.uint32(bit)
            logits = model(images).numpy()
            words[place] ^= np.uint32(1) << np.uint32(bit)
            predictions.append(logits.argmax(1))
            due.append(~np.isfinite(logits).all(1))
    return np.stack(predictions), np.stack(due)


@pytest.mark.parametrize(
    "num_faults, num_images", [(60, 20), pytest.param(200, 100, marks=pytest.mark.slow)]
)
def test_lenet_outcomes_are_those_of_a_pytorch_rerun(num_faults: int, num_images: int) -> None:
    torch.manual_seed(0)
    model = TORCH_MODELS["lenet"](in_channels=1).eval()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    network = MODELS["lenet"]()
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    params = from_torch(state, like)["params"]
    images = np.random.default_rng(0).normal(size=(num_images, 32, 32, 1)).astype(np.float32)
    faults = sample_faults(0, params, num_faults // 2, bits=range(23, 32))
    faults += sample_faults(1, params, num_faults // 2, paths="conv*", bits=range(23, 32))
    found = run_campaign(
        lambda p, x: network.apply({"params": p}, x),
        params, faults, images, np.zeros(num_images, int), batch_size=num_images // 2, nan="argmax",
    )  # fmt: skip
    as_torch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    predictions, due = torch_predictions(model, as_torch, faults, torch_positions(params))
    with torch.no_grad():
        golden = model(as_torch).numpy()
    np.testing.assert_allclose(found.golden, golden, rtol=1e-4, atol=1e-5)
    changed = predictions != golden.argmax(1)
    agreement = (changed == (found.outcomes == CRITICAL)).mean(axis=1)
    assert (agreement >= 0.999).all(), faults[agreement < 0.999].indices()
    np.testing.assert_array_equal(due, found.due)
    np.testing.assert_array_equal(found.correct, (predictions == 0).sum(1))
    assert 0.001 < changed.mean() < 0.9


class FakeDevice:
    def __init__(self, platform: str, process_index: int = 0):
        self.platform, self.device_kind, self.process_index = platform, "one", process_index


@pytest.mark.parametrize(
    "devices, message",
    [
        ((FakeDevice("cpu"), FakeDevice("gpu")), "devices are cpu one and gpu one: allowed is one"),
        ((FakeDevice("cpu", process_index=1),), "another process's: allowed are jax.local_dev"),
    ],
)
def test_devices_that_cannot_share_a_campaign(devices: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_campaign(**arguments(), devices=devices)


def test_several_processes_need_a_directory(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="3 processes need a workdir"):
        run_campaign(**arguments())


def faults_of(counts: list[int]) -> FaultList:
    """So many faults in each of the leaves."""
    params = {f"leaf{number}": np.zeros(1000, np.float32) for number in range(len(counts))}
    leaf = np.repeat(np.arange(len(counts)), counts)
    element = np.concatenate([np.arange(count) for count in counts])
    return FaultList.from_arrays(params, leaf, element, 0, "bit-flip", np.nan)


def test_blocks_divide_the_rows_of_each_leaf() -> None:
    faults = faults_of([100, 3, 900])
    rows = np.flatnonzero(faults.element % 7 > 0)
    for num_workers, prices in ((1, None), (3, None), (2, {0: Price(3.0, 5.0), 1: Price(0.0)})):
        blocks = split_blocks(by_leaf(faults, rows), 200, num_workers, prices)
        np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), rows)
        assert all(len(np.unique(faults.leaf[block])) == 1 for block in blocks)
        assert max(map(len, blocks)) <= 200
        assert len(blocks) >= (4 if num_workers > 1 else 1) * num_workers


def test_a_leaf_whose_faults_take_long_is_cut_finer() -> None:
    """By hand: 100 faults of 9 and 900 of 1 are 1,800; a quarter of a worker's 450 is 113."""
    faults = faults_of([100, 900])
    rows = np.arange(1000)

    def sizes(prices: dict[int, Price]) -> list[list[int]]:
        blocks = split_blocks(by_leaf(faults, rows), 2048, 4, prices)
        return [[len(b) for b in blocks if faults.leaf[b[0]] == leaf] for leaf in (0, 1)]

    assert sizes({0: Price(9.0), 1: Price(1.0)}) == [[13] * 7 + [9], [113] * 7 + [109]]
    # A block takes 270 beside its faults: it holds 30, which take as much.
    assert sizes({0: Price(9.0, 270.0), 1: Price(1.0)}) == [[30] * 3 + [10], [113] * 7 + [109]]
    assert sizes({0: Price(0.0), 1: Price(1.0)})[0] == [100]  # nothing to run


def test_outcomes_do_not_depend_on_how_many_devices() -> None:
    program = """
import jax, numpy as np
from jaxfi import run_campaign, sample_faults
from tests.conformance_models import plain_conv
apply_fn, params, shape = plain_conv()
images = np.random.default_rng(0).normal(size=(12, *shape)).astype(np.float32)
faults = sample_faults(0, params, 60)
runs = [
    run_campaign(apply_fn, params, faults, images, np.zeros(12, int), batch_size=5, devices=devices)
    for devices in (jax.devices()[:1], jax.devices()[:2], jax.devices())
]
assert len(jax.devices()) == 8
for run in runs[1:]:
    for a, b in zip(runs[0].results, run.results, strict=True):
        assert np.array_equal(a, b)
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
