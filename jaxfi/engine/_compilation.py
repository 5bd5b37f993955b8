"""`jax.jit` with the arithmetic that campaigns and trainings share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

# A 16-bit network must round after every operation, wherever the compiler could keep 32 bits.
_OPTIONS = {"xla_allow_excess_precision": False}
# XLA's CPU library fuses whole stages of a network, and one convolution rounds differently in each:
# allow it single matmuls. It also loses NaN in a ReLU that it fuses with the mean behind it, as at
# the end of a ResNet (tests/campaign/test_cumulative.py). (Single convolutions are exact, but
# slower: with the 32 channels of LeNet's second layer, a fifth of the speed forward and a third in
# the kernel's gradient.)
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

PRECISIONS = ("highest", "high", "default")


def checked_precision(precision: str) -> str:
    """`precision`, of matmuls and convolutions; ValueError for an unknown one."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: allowed are {', '.join(PRECISIONS)}")
    return precision


def compiled(function: Callable, **options: Any) -> Callable:
    """`jax.jit`, with its `options`, for the default device."""
    arithmetic = {**_OPTIONS, **(_CPU_OPTIONS if platform() == "cpu" else {})}
    return jax.jit(function, compiler_options=arithmetic, **options)


_NO_MESH = jax.sharding.Mesh(np.empty((), object), ())


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Within it, the session's settings that stop a faulty run or slow it down do not: faults make
    NaN and Inf, results are fetched, programs are kept, keys are constants of a network that runs
    again and again, and what is added or compared has the dtypes and ranks that it should. There is
    no mesh: each device runs by itself.

    Raises ValueError inside jit, grad or vmap, where there are no values to run on.
    """
    try:
        no_mesh = jax.set_mesh(_NO_MESH)
    except ValueError:
        raise ValueError(
            "this needs values, and cannot run inside jit, grad or vmap: allowed there are the "
            "transforms, such as inject"
        ) from None
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.debug_key_reuse(False),
        jax.check_tracer_leaks(False),
        jax.disable_jit(False),
        jax.transfer_guard("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        no_mesh,
    ):
        yield


def platform() -> str:
    """Of the default device."""
    device = getattr(jax.config, "jax_default_device", None)
    return getattr(device, "platform", device) or jax.default_backend()
