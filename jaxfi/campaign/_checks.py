"""A campaign's arguments, checked once at its boundary, before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxfi.engine._compilation import checked_precision, compiled
from jaxfi.engine._engines import ENGINES
from jaxfi.engine._explain import LeafCost, least_memory
from jaxfi.faults import PyTree
from jaxfi.faults._sites import checked_integer
from jaxfi.network import ApplyFn
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
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim < 1 or not len(images):
        raise ValueError(f"images have shape {images.shape}: allowed is [N, ...] with N >= 1")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {labels.shape}: allowed is {images.shape[:1]}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels have dtype {labels.dtype}: allowed are integers")
    if images.dtype == np.float64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        images = images.astype(np.float32)
    return images, labels.astype(np.int32)


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
