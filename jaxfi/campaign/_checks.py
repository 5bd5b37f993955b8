"""A campaign's arguments, checked once at its boundary, before any work."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfi.campaign._description import KEPT
from jaxfi.engine._compilation import checked_precision, compiled
from jaxfi.engine._engines import ENGINES
from jaxfi.engine._explain import LeafCost, least_memory
from jaxfi.engine._plan import mixes_images
from jaxfi.engine._questions import Criterion, Questions, questions_of
from jaxfi.faults import FaultList, PyTree
from jaxfi.faults._sites import checked_integer
from jaxfi.network import ApplyFn, Network, trace_network
from jaxfi.network._frozen import frozen
from jaxfi.network._graph import num_classes, used_leaves
from jaxfi.network._images import array_of, canonical, held, packed
from jaxfi.network._layout import between_arrays, is_tree
from jaxfi.network._loops import MOST_TURNS, has_open_loop, most_turns
from jaxfi.network._rows import Certain
from jaxfi.outcomes._outcomes import checked_nan_policy

_PACKAGE = str(Path(__file__).parents[1])
_LIMIT = 100  # times the turns of the fault-free network: then a loop is endless


def check_choices(engine: str, precision: str, nan: str, seed: int, keep: str = "outcomes") -> None:
    """Raises ValueError or TypeError naming what is allowed."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: allowed are {', '.join(ENGINES)}")
    checked_precision(precision)
    checked_nan_policy(nan)
    checked_integer("seed", seed, 0)
    if keep not in KEPT:
        raise ValueError(f"unknown keep {keep!r}: allowed are {', '.join(KEPT)}")


def check_faults(faults: FaultList, params: PyTree, *, empty: bool = False) -> None:
    """Raises TypeError for what is no fault list, ValueError for one that does not fit `params`."""
    if not isinstance(faults, FaultList):
        raise TypeError(
            f"faults are a {type(faults).__name__}: allowed is a FaultList, as sample_faults gives"
        )
    if len(faults) or not empty:
        faults.check_injectable(params)


def check_images_per_fault(count: int, num_images: int) -> None:
    """Raises TypeError or ValueError for a number of images that cannot be drawn from N."""
    if checked_integer("images_per_fault", count, 1) > num_images:
        raise ValueError(
            f"images_per_fault {count} is out of range: allowed are integers from 1 to the "
            f"{num_images} images"
        )


class Inputs(NamedTuple):
    """What a campaign is of, checked, on one device.

    Attributes:
      apply_fn: the function as it is now, of one array to one.
      params: on the device.
      batches: [num_batches, batch_size, ...] images, the last batch filled up.
      labels: [N] int32, -1 where there are none.
      network: of one batch.
      questions: what is asked of outputs.
      targets: a tree of arrays [N, ...] for the criteria, or None.
      trees: makes a function of trees, as the user's is, one of arrays, as `apply_fn` is.
      of_trees: the user's function as it is now.
    """

    apply_fn: ApplyFn
    params: PyTree
    batches: np.ndarray
    labels: np.ndarray
    network: Network
    questions: Questions
    targets: PyTree
    trees: Callable[[ApplyFn], ApplyFn]
    of_trees: ApplyFn


def checked_inputs(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    labels: Any,
    batch_size: int,
    device: jax.Device,
    nan: str = "critical",
    criteria: Mapping[str, Criterion] | None = None,
) -> Inputs:
    """Raises ValueError or TypeError for a function, parameters, images, labels or criteria that do
    not fit, naming what was given and what is allowed."""
    images, of_images = packed("images", images)
    labels, targets = _checked_targets(labels, images.shape[:1], bool(criteria))
    batches = in_batches(images, batch_size)
    params, of_trees = _on_device(params, device), frozen(apply_fn)
    batch = jax.ShapeDtypeStruct(batches.shape[1:], batches.dtype)
    questions = Questions(nan)
    if criteria:
        given = batch if of_images is None else of_images.unpack_shape(batch)
        outputs = of_trees.outputs(params, given)
        questions = questions_of(criteria, nan, outputs, batch.shape[0], targets)
    trees = functools.partial(between_arrays, inputs=of_images, outputs=questions.layout)
    of_arrays = frozen(trees(of_trees))
    network = trace_network(of_arrays, params, batch)
    if questions.layout is None:
        count = num_classes(network)
        own = questions.critical is not None  # the outputs need not be of classes
        if own and labels is not None and not ((labels >= 0) & (labels < count)).all():
            labels = None
        labels = None if labels is None else _classes(labels, count)
    used_leaves(network)
    if labels is None or questions.layout is not None:
        labels = np.full(len(images), -1, np.int32)
    return Inputs(of_arrays, params, batches, labels, network, questions, targets, trees, of_trees)


def _checked_targets(
    labels: Any, shape: tuple[int, ...], asked: bool
) -> tuple[np.ndarray | None, PyTree]:
    """Labels [N], where that is what they are; and targets of criteria."""
    if labels is None:
        return None, None
    if not asked or not is_tree(labels):
        array = array_of("labels", labels)
        if array.shape == shape and jnp.issubdtype(array.dtype, np.integer):
            return array, canonical("labels", array) if asked else None
        if not asked and array.shape != shape:
            raise ValueError(
                f"labels have shape {array.shape}: allowed is {shape}, one class an image"
            )
        if not asked:
            raise TypeError(f"labels have dtype {array.dtype}: allowed are integers")
    targets = jax.tree.map(lambda leaf: canonical("labels", array_of("labels", leaf)), labels)
    for leaf in jax.tree.leaves(targets):
        if leaf.shape[:1] != shape:
            raise ValueError(
                f"labels hold an array of shape {leaf.shape}: allowed is [{shape[0]}, ...]"
            )
    return None, targets


def _classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels as int32; ValueError for one that is no class of the network."""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"labels hold {outside[0]}: allowed are the network's classes, 0 to {num_classes - 1}"
        )
    return labels.astype(np.int32)


def _on_device(params: PyTree, device: jax.Device) -> PyTree:
    """The parameters on one device, wherever they were."""

    def moved(path: tuple, leaf: Any) -> jax.Array:
        name = f"leaf {jax.tree_util.keystr(path, simple=True, separator='/')}"
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is a shape without values: allowed are arrays")
        leaf = held(name, leaf)
        here = jax.sharding.SingleDeviceSharding(device)
        if isinstance(leaf, jax.Array) and leaf.sharding != here:
            leaf = np.asarray(leaf)  # no sharding and no kind of memory comes along
        return jax.device_put(leaf, device)

    return jax.tree_util.tree_map_with_path(moved, params)


def check_last_batch(
    network: Network, run: Callable, batches: np.ndarray, num_images: int, golden: Any = None
) -> None:
    """Raises ValueError if what fills up the last batch may change the outputs of its images.

    Structure says of most networks that it does not, and of some that it may. Of the others two
    runs decide: with other images in the place of the copies of the first, all bits must stay.

    Args:
      network: of one batch.
      run: the fault-free function of a batch to outputs [batch, classes].
      batches: [num_batches, batch_size, ...], `num_images` of them images.
      golden: [n, classes] of the last batch's images, where they are known.
    """
    size = batches.shape[1]
    count = num_images % size
    mixes = mixes_images(network, [network.image], []) if count else ""
    if not mixes:
        return
    # What a loop looks at may count all images, and still be the same without the copies.
    if not isinstance(mixes, Certain) or has_open_loop(network):
        other = batches[-1].copy()
        other[count:] = other[count - 1]
        golden = np.asarray(run(batches[-1]))[:count] if golden is None else golden
        if np.asarray(run(other))[:count].tobytes() == golden.tobytes():
            return
    divisors = [n for n in range(1, num_images + 1) if num_images % n == 0]
    near = min(divisors, key=lambda n: (abs(n - size), n))
    raise ValueError(
        f"the network mixes the images of a batch, and {num_images} images in batches of {size} "
        f"leave one with {count}: allowed are batch sizes that divide {num_images}, such as {near}"
    )


def warn_of_idle_faults(network: Network, counts: np.ndarray) -> None:
    """Warns of faults that can do nothing; `counts` are those of each leaf."""
    used = used_leaves(network)
    idle = [leaf for leaf in np.flatnonzero(counts) if leaf not in used]
    if idle:
        named = ", ".join(f"{network.paths[leaf]} ({counts[leaf]:,})" for leaf in idle)
        warn(f"the output does not depend on {named}: their faults are masked by construction")


def warn_of_non_finite(questions: Questions, golden: np.ndarray) -> None:
    """Warns of fault-free outputs [N, classes] that hold NaN or Inf."""
    wrong = np.count_nonzero(~questions.is_finite(golden))
    if wrong:
        warn(
            f"the fault-free network's outputs hold NaN or Inf for {wrong:,} of {len(golden):,} "
            "images"
        )


def warn(message: str) -> None:
    """A warning at the line that called jaxfi."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def in_batches(images: np.ndarray, batch_size: int) -> np.ndarray:
    """[num_batches, batch_size, ...]; the first image fills the last batch up."""
    batch_size = min(checked_integer("batch_size", batch_size, 1), len(images))
    padding = -len(images) % batch_size
    padded = np.concatenate([images, np.repeat(images[:1], padding, axis=0)])
    return padded.reshape(len(padded) // batch_size, batch_size, *images.shape[1:])


def checked_devices(
    devices: Sequence[jax.Device] | None, workdir: str | os.PathLike | None
) -> tuple[jax.Device, ...]:
    """Those given, or all local accelerators, or one CPU."""
    local = jax.local_devices()
    devices = tuple(devices or (local[:1] if local[0].platform == "cpu" else local))
    kinds = sorted({f"{device.platform} {device.device_kind}" for device in devices})
    if len(kinds) > 1:
        raise ValueError(f"devices are {' and '.join(kinds)}: allowed is one kind, for equal bits")
    if any(device.process_index != jax.process_index() for device in devices):
        raise ValueError("devices are another process's: allowed are jax.local_devices()")
    if jax.process_count() > 1 and workdir is None:
        raise ValueError(f"{jax.process_count()} processes need a workdir: they share work there")
    return devices


def checked_memory(
    budget: int | None, devices: Sequence[jax.Device], num_kept: int, costs: list[LeafCost]
) -> int:
    """Bytes for golden values and working space of each device.

    Args:
      budget: of each device; by default 70 % of it.
      num_kept: outcomes on the host at a time; with DUE and correctness, three bytes each.
      costs: of the leaves, where the engine plans its memory.
    """
    # CPU devices and the host share one memory.
    kept = 3 * num_kept // len(devices) if devices[0].platform == "cpu" else 0
    memory = (_default_budget(devices) if budget is None else budget) - kept
    if memory < (least := least_memory(costs)):
        raise ValueError(
            f"memory_budget {memory + kept:,} bytes is too small for one batch of images: allowed "
            f"is {least + kept:,} or more, or a smaller batch_size"
        )
    return memory


def checked_loop_limit(
    limit: int | None, apply_fn: ApplyFn, params: PyTree, batches: np.ndarray
) -> int:
    """`limit`, by default `_LIMIT` times the most turns that a fault-free loop takes."""
    count = compiled(most_turns(apply_fn))
    most = max(int(count(params, batch)) for batch in batches)
    if most >= MOST_TURNS:
        raise ValueError(f"a loop of the fault-free network does not end in {MOST_TURNS:,} turns")
    if limit is None:
        return _LIMIT * max(1, most)
    if checked_integer("loop_limit", limit, 1) < most:
        raise ValueError(
            f"loop_limit {limit} is too small: a loop of the fault-free network takes {most} turns"
        )
    return limit


def _default_budget(devices: Sequence[jax.Device]) -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
    return int(0.7 * (devices[0].memory_stats() or {}).get("bytes_limit", machine))
