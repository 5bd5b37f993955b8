"""What decides a campaign's outcomes, to the bit. Campaigns that differ in it do not mix."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfi.data._extras import DISTRIBUTION
from jaxfi.engine._golden import Setup
from jaxfi.network._graph import digest

# The core's rooms; what models, training and reports do is no campaign's matter.
_SOURCES = [
    f":(glob){room}/**/*.py" for room in ("faults", "outcomes", "network", "engine", "campaign")
]


def fingerprint(setup: Setup, device: jax.Device) -> dict[str, Any]:
    """Hashes, shapes, versions and hardware, of JSON's types.

    NumPy's version is not in it: NumPy only draws the faults, which are compared themselves, and
    moves bits.
    """
    questions = setup.questions
    images = setup.batches.reshape(-1, *setup.batches.shape[2:])[: setup.num_images]
    labels, targets = setup.labels, setup.targets
    if setup.order is not None:
        own = np.argsort(setup.order)
        images, labels = images[own], labels[own]
        targets = jax.tree.map(lambda array: array[own], targets)
    asked: dict[str, Any] = {}
    if questions.digests:
        asked["criteria"] = dict(questions.digests)
        asked["critical"] = questions.critical_name or "argmax"
        asked["targets_sha256"] = _hash(*jax.tree.leaves(targets))
    if questions.layout is not None:
        asked["outputs"] = questions.layout.describe()
    return {
        "params_sha256": _hash(*jax.tree.leaves(setup.params)),
        "images_sha256": _hash(images),
        "labels_sha256": _hash(labels),
        "network_sha256": digest(setup.network),
        "contraction": "none",  # each operation rounds by itself: jaxfi.network._rounding
        "batch_size": setup.batch_size,
        "nan": questions.nan,
        **asked,
        "jaxfi": _own_version(),
        "commit": commit(Path(__file__).parents[1]),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        "backend": device.platform,
        "device": device.device_kind,
        "machine": platform.machine(),
    }


def _own_version() -> str | None:
    """None where jaxfi is not installed, but lies on the path."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def commit(folder: Path) -> str | None:
    """The commit that last changed the Python files in `folder`, and a hash of later edits.

    None where git knows of none, as of an installed package.
    """
    try:
        last = _git(folder, "log", "-1", "--format=%H", "--", *_SOURCES)
        edited = _git(folder, "diff", "--no-ext-diff", "HEAD", "--", *_SOURCES)
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
    changes = f"+{hashlib.sha256(edited).hexdigest()[:8]}" if edited else ""
    return last.decode().strip() + changes or None


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _hash(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
