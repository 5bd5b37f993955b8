"""Strict settings for every test: what shows only on a larger machine should show here first."""

from __future__ import annotations

import os
from pathlib import Path

# Before JAX starts: two CPU devices, so that sharding is exercised on a laptop. Speed and bits of
# one-device programs were measured to stay the same.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["JAXFI_CACHE_DIR"] = ""  # what is tested is compiled here and now

import jax
import pytest

from jaxfi.engine import _kept

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of the published numbers, named by JAXFI_REFERENCE_DIR; without it, a skip."""
    folder = os.environ.get("JAXFI_REFERENCE_DIR")
    if not folder:
        pytest.skip("JAXFI_REFERENCE_DIR is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"JAXFI_REFERENCE_DIR={folder} is not a folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def _every_leaf_is_divided(request, monkeypatch) -> None:
    """As if compiling took no time: small campaigns would re-run the network, which tests little.
    `pytest.mark.as_users_run` leaves it."""
    if "as_users_run" not in request.keywords:
        monkeypatch.setattr(
            "jaxfi.campaign._run.chosen_plans", lambda network, plans, *others: dict(plans)
        )


@pytest.fixture(autouse=True)
def _nothing_is_checked_yet() -> None:
    """As in a new process: what an earlier test's campaign has shown is shown again."""
    for _, programs in _kept._KEPT.values():
        for key in [k for k in programs if isinstance(k, tuple) and k[0] == "checked"]:
            del programs[key]
