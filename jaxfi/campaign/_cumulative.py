"""Many faults at once, one more block at each step: accuracy against the number of faults.

A trial is a list of K faults in distinct elements. It is nested: its first 1,000 faults are a part
of its first 2,000. Trials drawn from one key hit the same elements in every network of one shape,
whatever the fault model or bit, so networks and bits can be compared in pairs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._checks import (
    Inputs,
    check_faults,
    check_last_batch,
    checked_inputs,
    warn_of_idle_faults,
)
from jaxfi.engine._cache import programs_kept
from jaxfi.engine._compilation import compiled, own_settings
from jaxfi.engine._engines import whole_programs
from jaxfi.engine._golden import network_function
from jaxfi.engine._kept import kept
from jaxfi.faults._list import FaultGroups, FaultList
from jaxfi.faults._sampling import nth_key, sample_faults
from jaxfi.faults._transforms import Fault, PyTree, inject
from jaxfi.network._graph import ApplyFn, Network
from jaxfi.outcomes._outcomes import checked_nan_policy, judge


class CumulativeResult(NamedTuple):
    """What T trials did, at S numbers of faults each.

    Attributes:
      counts: [S] int64, faults in the network.
      accuracy: [T, S] float64, fractions.
      num_non_finite: [T, S] int64, images whose output holds NaN or Inf.
    """

    counts: np.ndarray
    accuracy: np.ndarray
    num_non_finite: np.ndarray


def counts_of_range(text: str) -> range:
    """Numbers of faults from 0 on: "10000/1000" goes to 10,000 in steps of 1,000.

    Raises ValueError unless the text is most/step, integers with 0 < step <= most.

    >>> [*counts_of_range("10/4")]
    [0, 4, 8]
    """
    most, _, step = text.partition("/")
    readable = most.isdecimal() and step.isdecimal() and 0 < int(step) <= int(most)
    if not readable:
        raise ValueError(f"a range is {text!r}; allowed: most/step, as 10000/1000")
    return range(0, int(most) + 1, int(step))


def draw_trials(
    key: int,
    params: PyTree,
    num_faults: int,
    num_trials: int,
    *,
    model: str = "zero",
    paths: str | Sequence[str] = "*",
    bit: int | None = None,
) -> list[FaultList]:
    """`num_trials` lists of `num_faults` faults in distinct elements, uniform over all of `paths`.

    A longer list from the same key begins with the shorter one.

    Args:
      key: an integer from 0 to 2**64 - 1; the same draws the same elements on every machine.
      params: the parameter tree.
      model: "zero" (a crashed synapse), or one that names a bit, with `bit`.
      paths: pattern or patterns (fnmatch) that a leaf's path must match.
      bit: position in the word of every fault, 0 is the least significant.

    Raises ValueError for more faults than elements, fewer than one trial, a bit outside the word,
    or an unknown model.

    >>> first, second = draw_trials(0, {"w": np.zeros((30, 40), np.float32)}, 100, 2)
    >>> len(set(first.element)), bool((first.element == second.element).all())
    (100, False)
    """
    if num_trials < 1:
        raise ValueError(f"num_trials is {num_trials}: allowed are integers >= 1")
    keys = [nth_key(key, trial) for trial in range(num_trials)]
    bits = None if bit is None else [bit]
    return [
        sample_faults(k, params, num_faults, model=model, by="network", paths=paths, bits=bits)
        for k in keys
    ]


def cumulative_accuracy(
    apply_fn: ApplyFn,
    params: PyTree,
    trials: Sequence[FaultList],
    images: Any,
    labels: Any,
    counts: Any,
    *,
    batch_size: int = 500,
    trials_together: int = 1,
    nan: str = "critical",
) -> CumulativeResult:
    """Accuracy with the first `counts[0]`, `counts[1]`, … faults of each trial in the network.

    Args:
      apply_fn: pure; maps `params` and images [batch, ...] to outputs [batch, classes]. The same
        function for networks of the same shape is compiled once.
      params: any pytree of float or integer arrays.
      trials: T fault lists of one length.
      images, labels: [N, ...] and [N] integers.
      counts: S rising numbers of faults, 0 is the fault-free network. (In front of the images, as
        in earlier versions, they are understood too.)
      batch_size: images that run together.
      trials_together: faulty networks that run together, vmapped. One is fastest on a CPU.
      nan: "critical" counts a prediction with a NaN as wrong; "argmax" goes by the argmax of NaN.

    Raises ValueError for no trials, no counts, counts that do not rise, or that need more faults
    than a trial has.

    >>> params = {"w": jnp.eye(2)}
    >>> trial = FaultList.from_sites([("w", (0, 0), None), ("w", (1, 1), None)], params,
    ...                              model="zero")
    >>> images = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    >>> result = cumulative_accuracy(lambda p, x: x @ p["w"], params, [trial], images, [0, 1],
    ...                              [0, 1, 2])
    >>> result.accuracy.tolist()  # an output of zeros is class 0
    [[1.0, 1.0, 0.5]]
    """
    checked_nan_policy(nan)
    if np.ndim(labels) > 1 and np.ndim(images) == 1:  # counts came first once
        images, labels, counts = labels, counts, images
    _check_counts(counts, trials)
    device = jax.local_devices()[0]
    for trial in trials:
        check_faults(trial, params, empty=True)
        if isinstance(trial, FaultGroups):
            raise TypeError("a trial is grouped: allowed are lists of single faults")
    with own_settings(), programs_kept(), jax.default_device(device):
        inputs = checked_inputs(apply_fn, params, images, labels, batch_size, device)
        network, programs = kept(inputs.network)
        whole, _ = whole_programs(programs, network_function(network))
        golden = functools.partial(whole, inputs.params)
        check_last_batch(inputs.network, golden, inputs.batches, len(inputs.labels))
        of_leaves = np.sum([trial.counts_by_leaf() for trial in trials], axis=0)
        warn_of_idle_faults(inputs.network, of_leaves)
        count = functools.partial(
            _counted, _counting_program(network, programs, nan), inputs, counts
        )
        starts = range(0, len(trials), trials_together)
        totals = np.concatenate([count(trials[n : n + trials_together]) for n in starts])
    accuracy, num_non_finite = totals[..., 0] / len(inputs.labels), totals[..., 1].astype(np.int64)
    return CumulativeResult(np.asarray(counts, np.int64), accuracy, num_non_finite)


def _counted(
    program: Callable, inputs: Inputs, counts: Sequence[int], trials: Sequence[FaultList]
) -> np.ndarray:
    """[trials, S, 2] counts, of trials that run together."""
    faulty = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(trials)), inputs.params)
    batches, steps = _batches(inputs), []
    for low, high in itertools.pairwise((0, *counts)):
        if high > low:
            faulty = _add_faults(faulty, _stack([trial[low:high] for trial in trials]))
        steps.append(sum(program(faulty, *batch) for batch in batches))
    return np.asarray(jnp.stack(steps, axis=1))


def count_outputs(
    apply_fn: ApplyFn, params: PyTree, images: jax.Array, labels: jax.Array, *, nan: str
) -> jax.Array:
    """[2] int32: images predicted right, and those whose output holds NaN or Inf. Pure.

    Images with a negative label do not count.
    """
    outputs = apply_fn(params, images)
    verdict = judge(outputs, outputs, labels, nan)
    both = jnp.stack([verdict.correct, verdict.due])
    return jnp.sum(both & (labels >= 0)[None], axis=1, dtype=jnp.int32)


# Programs of their own for the faults and for the network: neither is compiled again for the other.
_add_faults = jax.jit(jax.vmap(inject))


def _counting_program(network: Network, programs: dict[Any, Any], nan: str) -> Callable:
    """`count_outputs` over faulty networks; in a campaign's arithmetic, which keeps every NaN."""
    count = functools.partial(count_outputs, network_function(network), nan=nan)
    return programs.setdefault(("count", nan), compiled(jax.vmap(count, in_axes=(0, None, None))))


def _stack(parts: Sequence[FaultList]) -> Fault:
    """[T, K] faults of equally long lists."""
    return jax.tree.map(lambda *columns: jnp.stack(columns), *(part.batch() for part in parts))


def _batches(inputs: Inputs) -> list[tuple[jax.Array, jax.Array]]:
    """Batches of images and labels; what fills up the last one has a label that does not count."""
    shape = inputs.batches.shape[:2]
    filled = np.full(math.prod(shape), -1, np.int32)
    filled[: len(inputs.labels)] = inputs.labels
    labels = filled.reshape(shape)
    return [(jnp.asarray(x), jnp.asarray(y)) for x, y in zip(inputs.batches, labels, strict=True)]


def _check_counts(counts: Sequence[int], trials: Sequence[FaultList]) -> None:
    if not trials or not len(counts):
        raise ValueError(f"{len(trials)} trials and {len(counts)} counts: allowed are 1 or more")
    if counts[0] < 0 or any(low >= high for low, high in itertools.pairwise(counts)):
        raise ValueError(f"counts are {list(counts)}: allowed are rising integers from 0")
    shortest = min(map(len, trials))
    if counts[-1] > shortest:
        raise ValueError(f"counts go to {counts[-1]}, but a trial has only {shortest} faults")
