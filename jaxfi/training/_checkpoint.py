"""Checkpoints: whole or absent on disk, verified when read, and free of pickle."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT = "jaxfi-checkpoint-2"
_WITHOUT_INFO = "jaxfi-checkpoint-1"  # whose digest is of the tree only


def save_checkpoint(folder: str | Path, tree: Any, info: dict[str, Any]) -> None:
    """Writes nested dicts of arrays, and `info`, which is JSON, as the folder's newest version.

    An older version is deleted only once the new one is complete, so that a process killed at any
    time leaves one of them. Arrays of typed random keys and of no elements are not supported.

    Raises OSError if the folder cannot be written.
    """
    folder = Path(folder).absolute()
    tree = jax.tree.map(np.asarray, jax.device_get(tree))
    older = _versions(folder)
    number = int(older[-1].name) + 1 if older else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, "digest": _digest(tree, info), "info": info}
        version = folder / f"{number:06d}"
        _settled(lambda: _orbax().save(version, tree, custom_metadata=metadata))
    except OSError as error:
        message = f"cannot write the checkpoint {folder} ({error}): make room or make it writable"
        raise OSError(error.errno, message) from error
    for path in older:
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """The tree, of NumPy arrays, and the info of the folder's newest version.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or not one of jaxfi's.
    """
    versions = _versions(Path(folder).absolute())
    if not versions:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    path = versions[-1]
    try:
        stored, item = _metadata(path)
        is_ours = isinstance(stored, dict) and stored.get("format") in (FORMAT, _WITHOUT_INFO)
        tree = _restored(path / item) if is_ours else None
        is_whole = is_ours and _is_whole(tree, stored)
    except Exception as error:  # whatever a stranger's bytes do to the readers
        raise _unusable(path, type(error).__name__) from None
    if not is_ours:
        raise _unusable(path, f"it is not marked as {FORMAT}")
    if not is_whole:
        raise _unusable(path, "its content is not what was written")
    return tree, stored["info"]


def load_variables(path: str | Path) -> Any:
    """The variables `{"params": ..., "batch_stats"?: ...}` of a checkpoint, as NumPy arrays.

    `path` is a checkpoint's folder, or a training's, whose last checkpoint is taken. Raises as
    `load_checkpoint`.
    """
    path = Path(path)
    last = path / "checkpoints" / "last"
    tree, _ = load_checkpoint(last if last.is_dir() else path)
    if "variables" not in tree:
        raise ValueError(f"{path} holds {', '.join(tree)}: allowed is a training's folder")
    return tree["variables"]


def has_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds a complete checkpoint, damaged or not."""
    return bool(_versions(Path(folder).absolute()))


def _versions(folder: Path) -> list[Path]:
    """Complete ones, oldest first: orbax gives a version its name once it is whole."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{6,}", path.name))


def _unusable(path: Path, why: str) -> ValueError:
    return ValueError(
        f"checkpoint {path} is damaged or foreign ({why}): delete it or use another folder"
    )


def _is_whole(tree: Any, stored: dict[str, Any]) -> bool:
    info = stored["info"]
    expected = _digest(tree) if stored["format"] == _WITHOUT_INFO else _digest(tree, info)
    return isinstance(tree, dict) and isinstance(info, dict) and stored["digest"] == expected


def _digest(tree: Any, info: dict[str, Any] | None = None) -> str:
    """SHA-256 over each array's path, dtype, shape and bytes, and over the info."""
    digest = hashlib.sha256(b"" if info is None else json.dumps(info, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(tree):
        leaf = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def _metadata(path: Path) -> tuple[Any, str]:
    """What was saved beside the tree, and the folder of the tree. (orbax's own `metadata` starts
    loops of uvloop, which it leaves to the garbage collector: they end as errors anywhere.)"""
    stored = json.loads((path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
    (item,) = stored["item_handlers"]
    if not re.fullmatch(r"\w+", item):
        raise ValueError(item)
    return stored["custom_metadata"], item


def _restored(path: Path) -> Any:
    from orbax.checkpoint import PyTreeCheckpointHandler

    return _settled(lambda: PyTreeCheckpointHandler().restore(path))


class _SettledLoop(asyncio.SelectorEventLoop):
    """Ends with all that it began. Of a damaged checkpoint, orbax leaves reads that are under way
    when one fails, and their ends would find the loop closed: errors in whatever runs by then."""

    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


def _settled(function: Callable[[], Any]) -> Any:
    """`function()`, with loops that are `_SettledLoop`s. In a thread of its own: beside a loop that
    runs, as in a notebook, orbax starts loops of uvloop."""
    before = asyncio.new_event_loop
    asyncio.new_event_loop = _SettledLoop  # type: ignore[assignment]
    try:
        with futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(function).result()
    finally:
        asyncio.new_event_loop = before


def _orbax() -> Any:
    """orbax's current API; on demand, since it takes seconds to import."""
    try:
        from orbax.checkpoint import v1
    except ImportError:
        from orbax.checkpoint.experimental import v1
    return v1
