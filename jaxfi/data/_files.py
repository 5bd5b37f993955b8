"""Files that are whole or absent, and verified when read: the ground under campaign results.

A content-addressed file carries the hash of its content in its name, so a truncated, altered or
exchanged file is told from the right one without a second file to keep in step.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import os
import socket
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np


def user_cache() -> Path:
    """jaxfi's folder for what can be made again: in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxfi"


def content_hash(content: bytes) -> str:
    """32 hexadecimal digits that stand for the content (half of its SHA-256)."""
    return hashlib.sha256(content).hexdigest()[:32]


def damaged(path: Path, why: str) -> ValueError:
    """The error for a file that cannot be trusted, to be raised."""
    return ValueError(
        f"{path} is damaged or foreign ({why}): delete it and run the campaign again; "
        "only what it held is computed again"
    )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Gives an OSError within the name of the file and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror}): what was finished before is safe; make it "
            "writable, or make room, and run again",
        ) from error


def write_whole(path: Path, content: bytes, process_index: int = 0) -> None:
    """Writes a file that survives a crash once this returns, and is absent until then.

    Each process of a job has its own temporary file; one that a killed process left is replaced.
    Raises OSError naming the file.
    """
    temporary = path.parent / f".{process_index:04d}.tmp"
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as file:  # "x" follows no link out of the directory
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes a table whole or not at all. Raises as `write_whole`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that has these columns, text by column.

    Raises FileNotFoundError, or ValueError naming the file if it is no such table.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path} is damaged: line {reader.line_num}: {error}") from None
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path} has the columns {reader.fieldnames}: allowed are {[*columns]}")
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is damaged: a row has another number of fields than the header")
    return rows


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable, not only the content of the file renamed."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_verified(path: Path) -> bytes:
    """The content of a file whose name ends in its content's hash, before the suffix.

    Raises ValueError naming the file if the hash is another, FileNotFoundError if it is absent.
    """
    content = path.read_bytes()
    if content_hash(content) != path.stem.rpartition("-")[2]:
        raise damaged(path, "its content is not the one its name promises")
    return content


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which the kernel gives back however the process ends.

    Raises BlockingIOError naming the holder if another process has it.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        _take(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise BlockingIOError(
            f"{path.parent} is in use by {holder}: wait for its end or use another directory"
        ) from None
    with writing(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def to_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Named arrays as an uncompressed .npz: same arrays, same bytes, on every machine.

    The dtype's name goes with the array's, since NumPy's format knows no bfloat16.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # NumPy's own float and integer dtypes have kinds "fiu"; others are stored as words.
            plain = array if array.dtype.kind in "fiub" else array.view(f"u{array.dtype.itemsize}")
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asarray(plain, order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.{array.dtype}.npy"), member.getvalue())
    return buffer.getvalue()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The named arrays of a file that holds `to_npz`. No pickle is loaded.

    Raises ValueError naming the file if it holds anything else.
    """
    content = read_verified(path)
    arrays = {}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            for key in archive.files:
                name, _, dtype = key.rpartition(".")
                arrays[name] = archive[key].view(jnp.dtype(dtype))
    except Exception as error:  # whatever a stranger's bytes do to the parsers
        raise damaged(path, f"it is no .npz: {type(error).__name__}") from None
    return arrays
