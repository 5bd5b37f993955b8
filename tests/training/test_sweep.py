"""A sweep's member against the same training alone, and what becomes of one that diverges."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from flax import linen as nn

from jaxfi.data import Dataset, hold_out
from jaxfi.models import MODELS
from jaxfi.training import TrainConfig, train, train_sweep
from jaxfi.training import _sweep as sweep
from jaxfi.training._history import weight_statistics
from jaxfi.training._loop import next_learning_rate
from jaxfi.training._sweep import check_members
from tests.training.test_training import SMALL, dataset, timeless

__all__ = ["dataset"]
PLAIN = dataclasses.replace(SMALL, alpha=0.0, augment=None, schedule="constant")


class SmallNetwork(nn.Module):
    """Convolution, batch statistics and dropout. No bias before the norm: its gradient is nothing
    but rounding, which Adam would blow up to a step."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10, name="dense")(x)


def variants(base: TrainConfig, *changes: dict) -> list[TrainConfig]:
    return [dataclasses.replace(base, **change) for change in changes]


CASES = {
    "weight decay": variants(PLAIN, {}, {"weight_decay": 5e-3}, {"weight_decay": 0.5}),
    "seeds": variants(PLAIN, {"seed": 0}, {"seed": 3}),
    "penalty and rate": variants(
        SMALL, {"alpha": 0.0}, {"alpha": 0.02, "learning_rate": 0.003}, {"schedule": "cosine"}
    ),
    "plateau, momentum": variants(
        PLAIN,
        {"optimizer": "sgd", "schedule": "plateau", "patience": 1, "threshold": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.05},
    ),
    "one": [PLAIN],
}


_SLOW = {"weight decay", "seeds", "plateau, momentum"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _SLOW)) for n in CASES]
)
def test_a_member_equals_the_same_run_alone(name, dataset):
    members = train_sweep(SmallNetwork(), dataset, CASES[name])
    for config, member in zip(CASES[name], members, strict=True):
        alone = train(SmallNetwork(), dataset, config)
        assert member.diverged_at is None
        assert_close(member.variables, alone.variables, 1e-5)
        for ours, theirs in zip(timeless(member.history), timeless(alone.history), strict=True):
            assert ours.learning_rate == theirs.learning_rate
            numbers = np.array([value for value in ours if value is not None])
            expected = np.array([value for value in theirs if value is not None])
            np.testing.assert_allclose(numbers, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_lenet_members_equal_runs_alone():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 32, 32, 1)).astype(np.uint8)
    labels = rng.integers(0, 10, 24).astype(np.int32)
    data = Dataset("made-up", images, labels, images, labels, (0.5,), (0.5,), 10, "")
    configs = variants(
        dataclasses.replace(PLAIN, epochs=1, optimizer="sgd"),
        {"weight_decay": 0.0},
        {"weight_decay": 5e-3},
    )
    for config, member in zip(configs, train_sweep(MODELS["lenet"](), data, configs), strict=True):
        assert_close(member.variables, train(MODELS["lenet"](), data, config).variables, 1e-5)


def assert_close(tree, expected, tolerance: float) -> None:
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, tree, expected)


def test_members_with_equal_seeds_see_the_same_batches_in_the_order_of_a_run_alone(
    dataset, monkeypatch
):
    orders = []

    def spy(*arguments):
        batches = real(*arguments)
        orders.append(np.asarray(batches.order))
        return batches

    real = sweep.epoch_batches
    monkeypatch.setattr(sweep, "epoch_batches", spy)
    monkeypatch.setattr("jaxfi.training._loop.epoch_batches", spy)
    config = dataclasses.replace(PLAIN, epochs=1)
    train_sweep(SmallNetwork(), dataset, variants(config, {"seed": 4}, {"seed": 5}))
    together = orders[-2:]
    for seed, order in zip((4, 5), together, strict=True):
        train(SmallNetwork(), dataset, dataclasses.replace(config, seed=seed))
        np.testing.assert_array_equal(orders[-1], order)


def test_a_member_that_diverges_is_recorded_and_the_others_go_on(dataset):
    sgd = dataclasses.replace(PLAIN, optimizer="sgd")
    configs = variants(sgd, {}, {"learning_rate": 1e30}, {})
    fine, bad, same = train_sweep(SmallNetwork(), dataset, configs)
    assert bad.diverged_at is not None
    epoch, step = bad.diverged_at
    assert epoch == 1
    assert step > 1
    assert len(bad.history) == 1
    assert not math.isfinite(bad.history[0].train_loss + bad.history[0].penalty)
    assert 0 <= bad.history[0].test_accuracy <= 1
    assert len(fine.history) == 3
    assert_close(fine.variables, train(SmallNetwork(), dataset, configs[0]).variables, 1e-5)
    assert_close(same.variables, fine.variables, 0)


def test_a_sweep_in_which_all_diverge_ends(dataset):
    wild = dataclasses.replace(PLAIN, optimizer="sgd", learning_rate=1e30)
    configs = variants(wild, {"seed": 1}, {"seed": 2})
    members = train_sweep(SmallNetwork(), dataset, configs)
    assert [len(member.history) for member in members] == [1, 1]


def test_killed_and_continued_equals_never_stopped(dataset, tmp_path):
    configs = variants(
        dataclasses.replace(PLAIN, checkpoint_every=0.0), {"weight_decay": 0.0}, {"seed": 2}
    )
    whole = train_sweep(SmallNetwork(), dataset, configs)
    seen = []

    def die(number, record, variables):
        seen.append((number, record.epoch))
        if seen[-1] == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sweep(SmallNetwork(), dataset, configs, workdir=tmp_path, on_epoch=die)
    again = []
    resumed = train_sweep(
        SmallNetwork(), dataset, configs, workdir=tmp_path,
        on_epoch=lambda number, record, variables: again.append((number, record.epoch)),
    )  # fmt: skip
    assert again == [(0, 2), (1, 2), (0, 3), (1, 3)]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert_close(ours.variables, theirs.variables, 0)
        assert timeless(ours.history) == timeless(theirs.history)
    other = [dataclasses.replace(config, weight_decay=0.1) for config in configs]
    with pytest.raises(ValueError, match="holds another sweep"):
        train_sweep(SmallNetwork(), dataset, other, workdir=tmp_path)


def test_members_that_cannot_share_a_step_are_named():
    with pytest.raises(ValueError, match=r"differ in batch_size \(8 and 16\); allowed: alpha"):
        check_members(variants(SMALL, {}, {"batch_size": 16}))
    with pytest.raises(ValueError, match="no members"):
        check_members([])
    with pytest.raises(ValueError, match=r"alpha is -1\.0"):
        check_members(variants(SMALL, {"alpha": -1.0}))


def test_weight_statistics_equal_torch():
    params = SmallNetwork().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
    kernels = [torch.tensor(np.asarray(params[name]["kernel"])) for name in ("conv", "dense")]
    everything = torch.cat([kernel.double().reshape(-1) for kernel in kernels])
    expected = (everything.mean(), everything.std(correction=0), everything.norm())
    np.testing.assert_allclose(weight_statistics(params), [float(x) for x in expected], rtol=1e-12)


def test_the_plateau_watches_the_held_out_images(dataset):
    config = dataclasses.replace(
        PLAIN, epochs=4, held_out=0.2, schedule="plateau", patience=1, threshold=0.5
    )
    result = train(SmallNetwork(), dataset, config)
    rest, (images, labels) = hold_out(dataset, 0.2)
    assert len(rest.train_labels) == 72
    pixels = ((images / 255 - 0.5) / 0.5).astype(np.float32)
    logits = np.asarray(SmallNetwork().apply(result.variables, pixels))
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(18), labels]
    last = result.history[-1]
    np.testing.assert_allclose(last.held_out_loss, losses.mean(), rtol=1e-5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.5)
    for record in result.history:
        assert record.learning_rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        scheduler.step(record.held_out_loss)
    following = optimizer.param_groups[0]["lr"]
    assert next_learning_rate(config, result.history) == pytest.approx(following, rel=1e-12)
    assert following < config.learning_rate
    (member,) = train_sweep(SmallNetwork(), dataset, [config])
    assert member.history[-1].held_out_loss == pytest.approx(last.held_out_loss, rel=1e-5)


def test_all_held_out_is_refused(dataset):
    with pytest.raises(ValueError, match=r"held_out is 0\.999; allowed: less than all 90"):
        train(SmallNetwork(), dataset, dataclasses.replace(PLAIN, held_out=0.999))
    with pytest.raises(ValueError, match=r"held_out is 1\.0; allowed: numbers from 0 to below 1"):
        train(SmallNetwork(), dataset, dataclasses.replace(PLAIN, held_out=1.0))
