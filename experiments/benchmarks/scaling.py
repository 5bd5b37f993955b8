"""Networks of ImageNet's size on paper: arithmetic, memory and hours of a campaign, planned only.

    python -m experiments.benchmarks.scaling
    python -m experiments.benchmarks.scaling --num_images=10000 --batch_size=64

The engine's own plan is made from shapes: no parameter is allocated and nothing is compiled or run.
Everything else here is an assumption, and a flag.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen as nn

from experiments.benchmarks.campaign_plan import (
    CampaignPlan,
    compiling_seconds,
    computing_seconds,
    dealt_work,
    plan_campaign,
    unevenness,
)
from experiments.common.command import run_command
from experiments.common.config import parse_flags
from jaxfi.faults import FaultList, fault_population, sample_faults, sample_size
from jaxfi.models import PyTree

_NUM_IMAGES = flags.DEFINE_integer("num_images", 50_000, "Images of the campaign.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images per batch.")
_MARGIN = flags.DEFINE_float("margin", 0.01, "Sets the number of faults.")
_SURVIVING = flags.DEFINE_float("surviving", 1.0, "Share of pairs that need the suffix.")
_MEMORY = flags.DEFINE_float("memory", 141e9, "Bytes of a device: H200.")
_DEVICES = (1, 8, 256)
_BLOCKS = 4  # of faults, that a device runs at least (campaign/_workers.py)
_CLASSES = 1000


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BatchNorm, and a shortcut around them."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x
        for kernel, strides, features in ((1, 1, 1), (3, self.strides, 1), (1, 1, 4)):
            x = nn.Conv(features * self.features, (kernel, kernel), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.relu(x) if features == 1 else x
        if shortcut.shape != x.shape:
            shortcut = nn.Conv(4 * self.features, (1, 1), self.strides, use_bias=False)(shortcut)
            shortcut = nn.BatchNorm(use_running_average=True)(shortcut)
        return nn.relu(x + shortcut)


class ResNet50(nn.Module):
    """He et al., CVPR 2016, with the stride on the 3x3 convolution: 25,557,032 parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(_CLASSES)(x.mean(axis=(1, 2)))


class VisionTransformer(nn.Module):
    """ViT-B/16, Dosovitskiy et al., ICLR 2021: 86,567,656 parameters."""

    width: int = 768
    heads: int = 12
    layers: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (16, 16), 16)(x).reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.param("position", nn.initializers.zeros, (1, x.shape[1], self.width))
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(_CLASSES)(nn.LayerNorm()(x)[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet50": ResNet50,
    "ViT-B/16": VisionTransformer,
}


def plan_network(module: nn.Module) -> CampaignPlan:
    """Plans a campaign on images of 224 x 224, by the flags."""

    def list_faults(params: PyTree) -> FaultList:
        return sample_faults(0, params, sample_size(fault_population(params), _MARGIN.value))

    images = jax.ShapeDtypeStruct((_NUM_IMAGES.value, 224, 224, 3), jnp.float32)
    return plan_campaign(module, images, list_faults, _BATCH_SIZE.value)


def hours(plan: CampaignPlan, num_devices: int) -> float:
    """Of the campaign, until the last device is done. A device compiles and starts from golden
    values for every leaf it meets: all of them if it is alone, at least the leaves of its `_BLOCKS`
    blocks if there are many."""
    leaves = plan.num_leaves
    met = min(leaves, max(_BLOCKS, leaves / num_devices))
    repeated = met * num_devices / leaves
    operations = plan.operations(_SURVIVING.value) + (repeated - 1) * plan.golden
    seconds = computing_seconds(operations, num_devices) * last_device(plan, num_devices)
    return (seconds + compiling_seconds(met)) / 3600


def last_device(plan: CampaignPlan, num_devices: int) -> float:
    """Its work over the mean's."""
    surviving = np.full(plan.num_faults, _SURVIVING.value)
    return unevenness(dealt_work(plan, num_devices, surviving), num_devices)


def print_plan(name: str, plan: CampaignPlan) -> None:
    rerun = plan.network * plan.num_faults * _NUM_IMAGES.value
    budget = 0.7 * _MEMORY.value / 4
    methods = [cost.method for cost in plan.costs]
    print(f"\n{name}: {plan.num_parameters:,} parameters, {plan.num_faults:,} faults")
    print(f"  operations of one image             {plan.network:.3g}")
    print(f"  of re-execution of every pair       {rerun:.3g}")
    print(f"  golden values                       {plan.golden / rerun:.2%} of that")
    print(f"  columns                             {plan.columns / rerun:.2%}")
    print(f"  suffix, if every pair survives      {plan.suffix / rerun:.2%}")
    print(f"  leaves by columns, slice            {methods.count('columns')}, "
          f"{methods.count('slice')}")  # fmt: skip
    print(f"  golden values of one batch          at most {plan.largest / 2**30:.2f} GiB")
    print(f"  batches of them kept at once        {int(budget // max(1, plan.largest))}")
    for devices in _DEVICES:
        print(f"  hours on {devices:3} devices                {hours(plan, devices):,.2f}, "
              f"the last works {last_device(plan, devices):.2f} times the mean")  # fmt: skip
    for cost in plan.costs:
        if cost.method == "slice" and cost.num_faults:
            print(f"  slice: {cost.path}: {cost.reason}")


def print_plans() -> None:
    """Every network's plan."""
    for name, make in NETWORKS.items():
        print_plan(name, plan_network(make()))


def main(argv: Sequence[str]) -> None:
    run_command(argv, print_plans, "stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
