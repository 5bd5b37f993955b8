"""Many faults at once, one more block at each step: accuracy against the number of faults.

A trial is a list of K faults in distinct elements. It is nested: its first 1,000 faults are a part
of its first 2,000. Trials drawn from one key hit the same elements in every network of one shape,
whatever the fault model or bit, so networks and bits can be compared in pairs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._checks import check_labels, checked_images, checked_params
from jaxfi.engine._compilation import compiled, own_settings
from jaxfi.faults._list import FaultList
from jaxfi.faults._sampling import nth_key, sample_faults
from jaxfi.faults._transforms import Fault, PyTree, inject
from jaxfi.network._graph import (
    ApplyFn,
    afresh,
    check_uses_params,
    digest,
    num_classes,
    trace_network,
)
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
    if np.ndim(images) == 1 < np.ndim(labels):
        images, labels, counts = labels, counts, images
    _check_counts(counts, trials)
    with own_settings():
        return _accuracies(
            apply_fn, params, trials, images, labels, counts, batch_size, trials_together, nan
        )


def _accuracies(
    apply_fn: ApplyFn,
    params: PyTree,
    trials: Sequence[FaultList],
    images: Any,
    labels: Any,
    counts: Any,
    batch_size: int,
    trials_together: int,
    nan: str,
) -> CumulativeResult:
    images, labels = checked_images(images, labels)
    for trial in trials:
        trial.validate(params)
    params = checked_params(params, jax.local_devices()[0])
    batches = _batches(images, labels, batch_size)
    shape = jax.ShapeDtypeStruct(batches[0][0].shape, batches[0][0].dtype)
    network = trace_network(apply_fn, params, shape)
    check_uses_params(network)
    check_labels(labels, num_classes(network))
    count = _counting_program(apply_fn, digest(network), nan)

    def run(together: Sequence[FaultList]) -> np.ndarray:
        """[trials, S, 2] counts, of trials that run together."""
        faulty = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(together)), params)
        steps = []
        for low, high in itertools.pairwise((0, *counts)):
            if high > low:
                faulty = _add_faults(faulty, _stack([trial[low:high] for trial in together]))
            steps.append(sum(count(faulty, *batch) for batch in batches))
        return np.asarray(jnp.stack(steps, axis=1))

    starts = range(0, len(trials), trials_together)
    totals = np.concatenate([run(trials[start : start + trials_together]) for start in starts])
    return CumulativeResult(
        np.asarray(counts, np.int64), totals[..., 0] / len(labels), totals[..., 1].astype(np.int64)
    )


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


def _counting_program(apply_fn: ApplyFn, network: str, nan: str) -> Callable:
    """`count_outputs` over faulty networks; in a campaign's arithmetic, which keeps every NaN.

    Networks that compute the same, by their digest, share a program.
    """
    if (network, nan) not in _PROGRAMS:
        if len(_PROGRAMS) == _MOST_PROGRAMS:
            del _PROGRAMS[next(iter(_PROGRAMS))]
        count = functools.partial(count_outputs, afresh(apply_fn), nan=nan)
        _PROGRAMS[network, nan] = compiled(jax.vmap(count, in_axes=(0, None, None)))
    return _PROGRAMS[network, nan]


_PROGRAMS: dict[tuple[str, str], Callable] = {}
_MOST_PROGRAMS = 8


def _stack(parts: Sequence[FaultList]) -> Fault:
    """[T, K] faults of equally long lists."""
    return jax.tree.map(lambda *columns: jnp.stack(columns), *(part.batch() for part in parts))


def _batches(images: Any, labels: Any, batch_size: int) -> list[tuple[jax.Array, jax.Array]]:
    """Batches of one size: the last is filled up with images that do not count."""
    batch_size = min(batch_size, len(labels))
    missing = -len(labels) % batch_size
    images = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
    labels = np.concatenate([np.asarray(labels, np.int32), np.full(missing, -1, np.int32)])
    return [
        (jnp.asarray(images[start : start + batch_size]), jnp.asarray(labels[start:][:batch_size]))
        for start in range(0, len(labels), batch_size)
    ]


def _check_counts(counts: Sequence[int], trials: Sequence[FaultList]) -> None:
    if not trials or not len(counts):
        raise ValueError(f"{len(trials)} trials and {len(counts)} counts: allowed are 1 or more")
    if counts[0] < 0 or any(low >= high for low, high in itertools.pairwise(counts)):
        raise ValueError(f"counts are {list(counts)}: allowed are rising integers from 0")
    shortest = min(map(len, trials))
    if counts[-1] > shortest:
        raise ValueError(f"counts go to {counts[-1]}, but a trial has only {shortest} faults")
