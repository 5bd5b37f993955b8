"""What decides a campaign's outcomes, to the bit. Campaigns that differ in it do not mix."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from typing import Any

import jax
import numpy as np

from jaxfi.golden import Setup
from jaxfi.slicing import digest


def fingerprint(setup: Setup, device: jax.Device) -> dict[str, Any]:
    """Hashes, shapes, versions and hardware, of JSON's types.

    NumPy's version is not in it: NumPy only draws the faults, which are compared themselves, and
    moves bits.
    """
    images = setup.batches.reshape(-1, *setup.batches.shape[2:])[: setup.num_images]
    return {
        "params_sha256": _hash(*jax.tree.leaves(setup.params)),
        "images_sha256": _hash(images),
        "labels_sha256": _hash(setup.labels),
        "network_sha256": digest(setup.network),
        "batch_size": setup.batch_size,
        "nan": setup.nan,
        "jaxfi": metadata.version("jaxfi"),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "x64": bool(jax.config.jax_enable_x64),
        "backend": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
    }


def _hash(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
