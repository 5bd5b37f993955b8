"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def write_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Opens a text file that takes its name, and the old one's place, only once it is written.

    Raises OSError, leaving what was there, if the folder or disk takes no file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
