"""How long several devices take together: a mesh in lockstep, or blocks of faults that are dealt.

    python -m experiments.benchmarks.dealing --campaign=runs/table3_mnist_lenet/campaigns/default \\
        --network=lenet --image_shape=32,32,1

Which pairs survive is taken from a campaign that ran: those that were not masked. Nothing runs: the
engine's plan says what columns and suffixes cost. The unit is a run of the network on all images;
golden values are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks.campaign_plan import (
    dealt_work,
    of_block,
    plan_campaign,
    until_the_last,
)
from experiments.benchmarks.durable import CAMPAIGN
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.campaign import load_campaign
from jaxfi.engine import LeafCost
from jaxfi.models import MODELS
from jaxfi.outcomes import MASKED

_NETWORK = flags.DEFINE_enum("network", "lenet", list(MODELS), "Its network, for the plan.")
_IMAGE_SHAPE = flags.DEFINE_list("image_shape", ["32", "32", "1"], "Its images: H,W,C.")
_DEVICES = flags.DEFINE_integer("num_devices", 8, "Devices.")
_GROUPS = (1, 4)  # of columns, that a device of a mesh takes at a time


def over_faults(cost: LeafCost, survivors: np.ndarray, num_devices: int, num_groups: int) -> float:
    """What a leaf takes on a mesh whose devices have different faults, in lockstep.

    Args:
      cost: of the leaf.
      survivors: [F, batches] share of each fault's pairs that need the suffix, of all images.
      num_groups: of columns on each device in a step; all wait for the fullest before the next.
    """
    pairs = survivors.sum(axis=1)
    step = min(num_groups * cost.group_size, -(-len(pairs) // num_devices))
    fullest = _by_step(pairs, num_devices * step).reshape(-1, num_devices, step).sum(axis=2)
    columns = len(fullest) * of_block(cost, step).num_columns * cost.columns
    return columns + float(fullest.max(axis=1).sum()) * cost.suffix


def over_images(cost: LeafCost, survivors: np.ndarray, num_devices: int) -> float:
    """The same if the devices have different batches of images, and all of them the same faults."""
    num_batches = survivors.shape[1]
    groups = np.add.reduceat(survivors, range(0, len(survivors), cost.group_size))
    batches = _by_step(groups.T, num_devices).reshape(-1, num_devices, len(groups))
    columns = cost.num_columns * cost.columns * len(batches) / num_batches
    return columns + float(batches.max(axis=1).sum()) * cost.suffix


def _by_step(array: np.ndarray, step: int) -> np.ndarray:
    """With zeros at the end, so that whole steps come out."""
    return np.pad(array, [(0, -len(array) % step), *[(0, 0)] * (array.ndim - 1)])


def compare() -> None:
    """A line a way of spreading."""
    campaign, num_devices = load_campaign(CAMPAIGN.value), _DEVICES.value
    num_faults, num_images = campaign.outcomes.shape
    batch_size = campaign.provenance["batch_size"]
    plan = plan_campaign(
        MODELS[_NETWORK.value](num_classes=campaign.golden.shape[1]),
        jax.ShapeDtypeStruct((num_images, *map(int, _IMAGE_SHAPE.value)), jnp.float32),
        lambda params: campaign.faults,
        batch_size,
    )
    changed = _by_step(np.transpose(campaign.outcomes != MASKED), batch_size)
    shares = changed.reshape(-1, batch_size, num_faults).sum(axis=1).T / num_images
    leaves = [
        (cost, shares[campaign.faults.leaf == leaf])
        for leaf, cost in enumerate(plan.costs)
        if cost.num_faults
    ]
    for groups in _GROUPS:
        runs = sum(over_faults(cost, pairs, num_devices, groups) for cost, pairs in leaves)
        print(f"mesh over faults, {groups} groups of columns at a time: {runs:.2f}")
    runs = sum(over_images(cost, pairs, num_devices) for cost, pairs in leaves)
    print(f"mesh over batches of images: {runs:.2f}")
    for name, alike in (("as many faults", True), ("as much work", False)):
        work = dealt_work(plan, num_devices, shares.sum(axis=1), alike=alike)
        runs, even = until_the_last(work, num_devices), sum(work) / num_devices
        print(f"{len(work)} blocks of {name}, dealt: {runs:.2f}, if they were even {even:.2f}")


def main(argv: Sequence[str]) -> None:
    run_command(argv, compare, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
