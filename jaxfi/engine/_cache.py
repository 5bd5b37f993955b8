"""Compiled programs, kept for the next process in JAX's persistent cache.

JAX keeps programs of a second and more where the user named a folder. jaxfi's are many, and most
take less; so within `programs_kept` all of them are kept, in the user's folder or in jaxfi's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxfi.data._files import user_cache, write_whole

VARIABLE = "JAXFI_CACHE_DIR"
_LIMIT = 2**30  # bytes; the oldest programs go first
_LEAST_FREE = 2**27  # bytes of the disk
_WRITABLE_BY_OTHERS = 0o022
_CHECKED = "checked.json"

_lock = threading.Lock()
_within = 0
_before: dict[str, Any] = {}
_warned: set[str] = set()


@contextlib.contextmanager
def programs_kept() -> Iterator[None]:
    """What is compiled within is read from the cache, or written to it.

    The folder is the user's own, `jax_compilation_cache_dir`, if there is one; else the one that
    `$JAXFI_CACHE_DIR` names (empty: none), by default in the user's cache folder. JAX trusts what
    it reads there: ValueError for a folder that `$JAXFI_CACHE_DIR` names and others can write.
    """
    global _within
    with _lock:
        if not _within:
            _enter()
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if not _within:
                _leave()


def _enter() -> None:
    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return
    settings: dict[str, Any] = {"jax_persistent_cache_min_compile_time_secs": 0.0}
    if not config.jax_compilation_cache_dir:
        folder = _folder()
        if folder is None:
            return
        settings["jax_compilation_cache_dir"] = str(folder)
    _set(settings)


def _leave() -> None:
    _set(dict(_before))
    _before.clear()


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        _before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)
    if "jax_compilation_cache_dir" in settings:
        compilation_cache.reset_cache()  # so that the next program looks for the folder again


def _folder() -> Path | None:
    """jaxfi's own, ready; None where there is to be none or can be none."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    root = Path(named).expanduser() if named else user_cache() / "programs"
    if not root.is_absolute():
        raise ValueError(f"{VARIABLE} is {named}: allowed are absolute paths, and none")
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.stat()
        if found.st_mode & _WRITABLE_BY_OTHERS or found.st_uid != os.getuid():
            raise PermissionError("others can write it, and JAX runs what it reads there")
        folder = root / _machine()
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_new(folder)
        _limit(root)
        if shutil.disk_usage(root).free >= _LEAST_FREE:
            return folder
        reason = "the disk is full"
    except OSError as error:
        reason = f"{error}: allowed is a folder of your own, of mode 700"
        if named:
            raise ValueError(f"{VARIABLE} is {root}: {reason}") from None
    message = f"programs are not kept in {root}: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=6)  # of who runs a campaign
    return None


def _machine() -> str:
    """Of what programs are compiled for: JAX's keys do not tell processors of one kind apart."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = platform.processor()
    features = sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE)))
    found = repr((platform.machine(), features or text))
    return f"{platform.machine()}-{hashlib.sha256(found.encode()).hexdigest()[:12]}"


def _check_new(folder: Path) -> None:
    """Deletes what was not written whole, as by a process that was killed: JAX would try to read
    it again and again. Each program is looked at once."""
    record = folder / _CHECKED
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    found = {}
    for path in filter(Path.is_file, folder.glob("*-cache")):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            if known.get(path.name) != stamp and not _is_whole(path):
                path.unlink()
                continue
            found[path.name] = stamp
    if found != known:
        with contextlib.suppress(OSError):  # another process writes it too
            write_whole(record, json.dumps(found).encode())


def _is_whole(path: Path) -> bool:
    data = path.read_bytes()
    if data[:1] != b"\x78":  # not zlib's: JAX compresses with zstandard where that is installed
        return bool(data)
    try:
        zlib.decompress(data)
    except zlib.error:
        return False
    return True


def _limit(root: Path) -> None:
    """Deletes the oldest programs, of all machines, where there are too many."""
    files = []
    for path in filter(Path.is_file, root.glob("*/*-cache")):
        with contextlib.suppress(FileNotFoundError):
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    size = sum(size for _, size, _ in files)
    for _, freed, path in sorted(files):
        if size <= _LIMIT:
            return
        path.unlink(missing_ok=True)
        size -= freed
