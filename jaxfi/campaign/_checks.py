"""A campaign's arguments, checked once at its boundary, before any work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfi.engine._compilation import checked_precision, compiled
from jaxfi.engine._engines import ENGINES
from jaxfi.engine._explain import LeafCost, least_memory
from jaxfi.faults import FaultList, PyTree
from jaxfi.faults._sites import checked_integer
from jaxfi.network import ApplyFn, Network
from jaxfi.network._graph import reached_from
from jaxfi.network._loops import MOST_TURNS, most_turns
from jaxfi.outcomes._outcomes import checked_nan_policy

_LIMIT = 100  # times the turns of the fault-free network: then a loop is endless


def check_choices(engine: str, precision: str, nan: str, seed: int) -> None:
    """Raises ValueError or TypeError naming what is allowed."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}: allowed are {', '.join(ENGINES)}")
    checked_precision(precision)
    checked_nan_policy(nan)
    checked_integer("seed", seed, 0)


def checked_images(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """[N, ...] images as JAX would hold them, and [N] int32 labels."""
    images, labels = np.asarray(held("images", images)), np.asarray(held("labels", labels))
    if images.ndim < 1 or not len(images):
        raise ValueError(f"images have shape {images.shape}: allowed is [N, ...] with N >= 1")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}: allowed is {images.shape[:1]}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels have dtype {labels.dtype}: allowed are integers")
    if len(outside := labels[(labels < 0) | (labels >= 2**31)]):
        raise ValueError(f"labels hold {outside[0]}: allowed are the network's classes, from 0")
    if images.dtype.kind not in "fiubV":
        raise TypeError(f"images have dtype {images.dtype}: allowed are numbers")
    if images.dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        images = images.astype(np.float32)
    return images, labels.astype(np.int32)


def checked_params(params: PyTree, device: jax.Device) -> PyTree:
    """The parameters on one device, wherever they were.

    Raises ValueError naming a leaf that was deleted, or that other processes hold a part of.
    """

    def checked(path: tuple, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(held(f"leaf {name}", leaf), device)

    return jax.tree_util.tree_map_with_path(checked, params)


def held(name: str, array: Any) -> Any:
    """The array, if this process has all of it; else ValueError naming it."""
    if isinstance(array, jax.Array):
        if array.is_deleted():
            raise ValueError(f"{name} was deleted, as by a step that its buffer was donated to")
        if not array.is_fully_addressable:
            raise ValueError(f"{name} is spread over several processes: allowed are local arrays")
    return array


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for labels that are no class of the network."""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"labels hold {outside[0]}: allowed are the network's classes, 0 to {num_classes - 1}"
        )


def check_filled_batch(
    function: ApplyFn, params: PyTree, batches: np.ndarray, num_images: int, golden: np.ndarray
) -> None:
    """Raises ValueError if the images that fill up the last batch change the outputs of the others.

    They are copies of the first image; the last one in their place must give the same bits.
    """
    batch_size = batches.shape[1]
    count = num_images - (len(batches) - 1) * batch_size
    if count == batch_size:
        return
    other = batches[-1].copy()
    other[count:] = other[count - 1]
    outputs = np.asarray(compiled(function)(params, other))[:count]
    if outputs.tobytes() != golden[-count:].tobytes():
        fitting = [n for n in range(1, num_images + 1) if num_images % n == 0]
        near = min(fitting, key=lambda n: (abs(n - batch_size), n))
        raise ValueError(
            f"the network mixes the images of a batch, and {num_images} images in batches of "
            f"{batch_size} leave one with {count}: allowed are batch sizes that divide "
            f"{num_images}, such as {near}"
        )


def warn_of(network: Network, faults: FaultList, golden: np.ndarray) -> None:
    """Warns of faults that cannot do anything, and of golden outputs that are not finite."""
    idle = [
        f"{network.paths[leaf]} ({np.count_nonzero(faults.leaf == leaf):,})"
        for leaf in np.unique(faults.leaf)
        if network.output not in reached_from(network, network.leaves[leaf])
    ]
    if idle:
        warnings.warn(
            f"the output does not depend on {', '.join(idle)}: their faults are masked by "
            "construction",
            stacklevel=3,
        )
    wrong = np.count_nonzero(~np.isfinite(golden).all(axis=1))
    if wrong:
        warnings.warn(
            f"the fault-free network's outputs hold NaN or Inf for {wrong:,} of {len(golden):,} "
            "images",
            stacklevel=3,
        )


def in_batches(images: np.ndarray, batch_size: int) -> np.ndarray:
    """[num_batches, batch_size, ...]; the first image fills the last batch up."""
    batch_size = min(checked_integer("batch_size", batch_size, 1), len(images))
    padding = -len(images) % batch_size
    padded = np.concatenate([images, np.repeat(images[:1], padding, axis=0)])
    return padded.reshape(-1, batch_size, *images.shape[1:])


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
