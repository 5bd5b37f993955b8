"""How evenly faults spread over several devices: a mesh in lockstep against blocks that are dealt.

    python -m experiments.benchmarks.dealing --campaign=runs/table3_mnist_lenet/campaigns/default \\
        --network=lenet --image_shape=32,32,1

Which pairs survive is taken from a campaign that ran: those that were not masked. Nothing runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments.benchmarks.campaign_plan import dealt_work, plan_campaign, unevenness
from experiments.benchmarks.durable import CAMPAIGN
from experiments.command import run_command
from experiments.config import parse_flags
from jaxfi.campaign import load_campaign
from jaxfi.models import MODELS
from jaxfi.outcomes import MASKED

_NETWORK = flags.DEFINE_enum("network", "lenet", list(MODELS), "Its network, for the plan.")
_IMAGE_SHAPE = flags.DEFINE_list("image_shape", ["32", "32", "1"], "Its images: H,W,C.")
_DEVICES = flags.DEFINE_integer("num_devices", 8, "Devices.")
_STEPS = (32, 64, 128)  # faults that a device of a mesh takes at a time


def in_lockstep(survivors: np.ndarray, leaf: np.ndarray, num_devices: int, step: int) -> float:
    """Pairs of the fullest device over the mean's, summed over the whole steps of a mesh.

    Args:
      survivors: [F] pairs of each fault that need the suffix.
      leaf: [F] which leaf each fault is in; a step has `step` faults of one leaf on each device.
    """
    fullest = mean = 0.0
    for number in np.unique(leaf):
        pairs = survivors[leaf == number]
        whole = len(pairs) - len(pairs) % (num_devices * step)
        devices = pairs[:whole].reshape(-1, num_devices, step).sum(axis=2)
        fullest, mean = fullest + devices.max(axis=1).sum(), mean + devices.mean(axis=1).sum()
    return float(fullest / mean)


def compare() -> None:
    """A line a way of spreading."""
    campaign, num_devices = load_campaign(CAMPAIGN.value), _DEVICES.value
    survivors = np.sum(campaign.outcomes != MASKED, axis=1)
    for step in _STEPS:
        fullest = in_lockstep(survivors, campaign.faults.leaf, num_devices, step)
        print(f"mesh, {step} faults a device: the fullest has {fullest:.2f} times the mean")
    shape = (len(campaign.labels), *map(int, _IMAGE_SHAPE.value))
    plan = plan_campaign(
        MODELS[_NETWORK.value](num_classes=campaign.golden.shape[1]),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        lambda params: campaign.faults,
        campaign.provenance["batch_size"],
    )
    for name, alike in (("as many faults", True), ("as much work", False)):
        work = dealt_work(plan, num_devices, survivors / shape[0], alike=alike)
        print(
            f"{len(work)} blocks of {name}, {sum(work):.1f} network runs on all images: the last "
            f"device works {unevenness(work, num_devices):.2f} times the mean"
        )


def main(argv: Sequence[str]) -> None:
    run_command(argv, compare, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
