"""What a campaign holds fixed: the network as it computes it, images, fault-free outputs."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.engine._plan import LeafPlan
from jaxfi.engine._questions import Questions, answers_of
from jaxfi.faults._transforms import PyTree
from jaxfi.network._graph import ApplyFn, Network, evaluate

# Images: where the compiler rounds otherwise, most values of an image differ.
LEAST_CHECKED = 256
_MOST_SHUFFLED = 64  # batches: of fewer than four images, fewer are checked


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a campaign holds fixed, on one device.

    Attributes:
      network, apply_fn: the network as equations, and as every engine computes it.
      params: its fault-free parameters.
      batches: [num_batches, batch_size, ...] images, the last batch padded.
      labels: [N] int32, in the order of the batches; -1 where there are none.
      golden: [N, classes] fault-free outputs, in that order; 0 in batches that no fault sees.
      questions: what is asked of outputs.
      memory: bytes that golden values and working space may take together.
      plans: how the fast engine runs the faults of each leaf that has any; others need none.
      order: [N] images in the order of the batches, where faults see some images each; None where
        each sees all, in their own order.
      targets: a tree of arrays [N, ...] in that order, for the criteria.
      programs: of the network, compiled so far; engines add theirs (`_kept.py`).
      checked: by what it is, batches on which a part of the network gave the network's bits.
    """

    network: Network
    apply_fn: ApplyFn
    params: PyTree
    batches: np.ndarray
    labels: np.ndarray
    golden: np.ndarray
    questions: Questions
    memory: int
    plans: Mapping[int, LeafPlan]
    order: np.ndarray | None = None
    targets: PyTree = None
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)
    checked: dict[Any, set[int]] = dataclasses.field(default_factory=dict)
    _shuffled: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def holds_nan(self) -> bool:
        """Whether golden outputs hold NaN."""
        return bool(self.questions.holds_nan(self.golden).any())

    @functools.cached_property
    def golden_answers(self) -> list[np.ndarray]:
        """What is answered of the golden outputs, [N] each: outcome, DUE, correct, criteria."""
        words = []
        for start in range(0, self.num_images, self.batch_size):
            rows = np.minimum(start + np.arange(self.batch_size), self.num_images - 1)
            words.append(np.asarray(self.judged(self.golden[rows], rows)))
        word = np.concatenate(words)[: self.num_images]
        return answers_of(word, len(self.questions.criteria))

    def judged(self, outputs: Any, images: np.ndarray, golden: Any = None) -> jax.Array:
        """Of outputs [batch, classes] for these images [batch], `Questions.answers`; `golden` ones
        are given where they are not the network's."""
        return _judged(self.questions, *self._on_device, outputs, images, golden)

    @functools.cached_property
    def _on_device(self) -> tuple:
        return jax.tree.map(jnp.asarray, (self.golden, self.labels, self.targets))

    @property
    def sampled(self) -> bool:
        return self.order is not None

    @property
    def num_images(self) -> int:
        return len(self.labels)

    @property
    def batch_size(self) -> int:
        return self.batches.shape[1]

    def is_to_check(self, key: Any, number: int) -> bool:
        """Whether a part of the network was not seen on this batch, nor on enough others."""
        seen = self.checked.get(key, set())
        return number not in seen and len(seen) * self.batch_size < LEAST_CHECKED

    def images_in(self, number: int) -> int:
        """Images of a batch that are not padding."""
        return min(self.batch_size, self.num_images - number * self.batch_size)

    @property
    def shuffled(self) -> range:
        """Numbers below 0: of further batches where there are few images, to check programs on."""
        count = min(math.ceil(LEAST_CHECKED / self.num_images), _MOST_SHUFFLED)
        return range(-1, -count, -1)

    def batch(self, number: int) -> np.ndarray:
        """Images [batch_size, ...]; in a shuffled batch they share out the first one's values."""
        if number >= 0:
            return self.batches[number]
        values = np.random.default_rng(-number).permutation(self.batches[0].reshape(-1))
        return values.reshape(self.batches[0].shape)

    def shuffled_outputs(self, network: Callable, number: int) -> np.ndarray:
        """What the network, compiled, gives for a shuffled batch."""
        if number not in self._shuffled:
            self._shuffled[number] = np.asarray(network(self.params, self.batch(number)))
        return self._shuffled[number]


@functools.partial(jax.jit, static_argnames="questions")
def _judged(questions, golden, labels, targets, outputs, images, own_golden):
    """One word a pair: the host fetches them together."""
    golden = golden[images] if own_golden is None else own_golden
    targets = jax.tree.map(lambda array: array[images], targets)
    return questions.answers(golden, outputs, labels[images], targets)


def network_function(network: Network) -> ApplyFn:
    """The network as every engine computes it: each operation rounded, wide layers in blocks."""

    def function(params: PyTree, batch: jax.Array) -> jax.Array:
        leaves = zip(network.leaves, jax.tree.leaves(params), strict=True)
        return evaluate(network, [network.output], {**dict(leaves), network.image: batch})[0]

    return function


class GoldenRun(NamedTuple):
    """Fault-free outputs.

    Attributes:
      outputs: [N, classes].
      seconds_per_image: of the fastest batch.
      compiling: seconds that the first batch took longer.
    """

    outputs: np.ndarray
    seconds_per_image: float
    compiling: float


def golden_run(
    network: Callable,
    params: PyTree,
    batches: np.ndarray,
    num_images: int,
    numbers: Sequence[int] | None = None,
) -> GoldenRun:
    """Runs the fault-free network, compiled, on every batch, or on those of these `numbers`: the
    outputs of others are 0."""
    outputs: dict[int, np.ndarray] = {}
    seconds = []
    numbers = list(range(len(batches)) if numbers is None else numbers)
    for number in numbers if len(numbers) > 1 else numbers * 2:  # the first one is also compiled
        start = time.perf_counter()
        outputs[number] = np.asarray(network(params, batches[number]))
        seconds.append(time.perf_counter() - start)
    fastest = min(seconds)
    nothing = np.zeros_like(next(iter(outputs.values())))
    every = [outputs.get(number, nothing) for number in range(len(batches))]
    outputs_of_all = np.concatenate(every)[:num_images]
    return GoldenRun(outputs_of_all, fastest / batches.shape[1], seconds[0] - fastest)
