"""Packages that only some rooms need, and what to say where one is missing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

DISTRIBUTION = "jax-fault-injection"


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports that the extra `name` brings.

    Raises ImportError that says in one line what is missing and what to install; of a command
    (`python -m`), that line is all that is printed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "jaxfi":
            raise
        message = f"{package} is not installed: pip install '{DISTRIBUTION}[{name}]' brings it"
        if sys.argv[:1] == ["-m"]:  # so it is while Python looks for a command's module
            sys.exit(message)
        raise ImportError(message, name=error.name) from None
