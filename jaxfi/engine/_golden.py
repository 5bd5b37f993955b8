"""What a campaign holds fixed: the network as it computes it, images, fault-free outputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxfi.engine._compilation import compiled
from jaxfi.engine._plan import LeafPlan
from jaxfi.faults._transforms import PyTree
from jaxfi.network._graph import ApplyFn, Network, evaluate


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a campaign holds fixed, on one device.

    Attributes:
      network, apply_fn: the network as equations, and as every engine computes it.
      params: its fault-free parameters.
      batches: [num_batches, batch_size, ...] images, the last batch padded.
      labels: [N] int32.
      golden: [N, classes] fault-free outputs.
      nan: see `jaxfi.outcomes.judge`.
      memory: bytes that golden values and working space may take together.
      plans: how the fast engine runs the faults of each leaf that has any; others need none.
    """

    network: Network
    apply_fn: ApplyFn
    params: PyTree
    batches: np.ndarray
    labels: np.ndarray
    golden: np.ndarray
    nan: str
    memory: int
    plans: Mapping[int, LeafPlan]

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def batch_size(self) -> int:
        return self.batches.shape[1]

    def images_in(self, number: int) -> int:
        """Images of a batch that are not padding."""
        return min(self.batch_size, self.num_images - number * self.batch_size)


def network_function(network: Network) -> ApplyFn:
    """The network as every engine computes it: each operation rounded, wide layers in blocks."""

    def function(params: PyTree, batch: jax.Array) -> jax.Array:
        leaves = zip(network.leaves, jax.tree.leaves(params), strict=True)
        return evaluate(network, [network.output], {**dict(leaves), network.image: batch})[0]

    return function


class GoldenRun(NamedTuple):
    """Fault-free outputs [N, classes], and how long an image took (of the fastest batch)."""

    outputs: np.ndarray
    seconds_per_image: float


def golden_run(
    apply_fn: ApplyFn, params: PyTree, batches: np.ndarray, num_images: int
) -> GoldenRun:
    """Runs the fault-free network on every batch."""
    network = compiled(apply_fn)
    outputs, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        outputs.append(np.asarray(network(params, batch)))
        seconds.append(time.perf_counter() - start)
    fastest = min(seconds) / batches.shape[1]
    return GoldenRun(np.concatenate(outputs)[:num_images], fastest)
