"""Packages that only some rooms need, and what to say where one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

DISTRIBUTION = "jax-fault-injection"


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports that the extra `name` brings.

    Raises ImportError that says in one line what is missing and what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "jaxfi":
            raise
        raise ImportError(
            f"{package} is not installed: pip install '{DISTRIBUTION}[{name}]' brings it",
            name=error.name,
        ) from None
