"""One chunk of counts as a Parquet file: one row a fault. For `Store`, as _chunks is.

The files hold no outcome of an image, so 5·10⁷ faults take some 10⁸ bytes::

    table = pandas.read_parquet("DIR/results")
"""

from __future__ import annotations

import numpy as np

from jaxfi.campaign._chunks import (
    Chunk,
    bit_column,
    checked_rows,
    column_of,
    read_table,
    table_bytes,
)
from jaxfi.campaign._counts import Counts, count_type
from jaxfi.data._extras import extra
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import FAULT_MODELS

with extra("store"):
    import pyarrow as pa

_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("path", _NAMES),
        ("element", pa.int64()),
        ("bit", pa.int16()),
        ("model", _NAMES),
        ("masked", pa.int32()),
        ("non_critical", pa.int32()),
        ("critical", pa.int32()),
        ("due", pa.int32()),
        ("correct", pa.int32()),
    ]
)


def width(num_images: int) -> int:
    """Of `Chunk.packed`: masked, critical, due."""
    return 3


def dtype(num_images: int) -> np.dtype:
    """Of `Chunk.packed`."""
    return count_type(num_images)


def rows_together(num_images: int) -> int:
    """Faults in one merged file."""
    return 2**22


def pack(counts: Counts) -> np.ndarray:
    """[k, 3]."""
    return np.stack([counts.masked, counts.critical, counts.due], axis=1)


def unpack(chunk: Chunk, num_images: int) -> Counts:
    """What `pack` was given."""
    packed, kind = chunk.packed, count_type(num_images)
    columns = (packed[:, 0], packed[:, 1], packed[:, 2], chunk.correct)
    return Counts(*(np.ascontiguousarray(column, kind) for column in columns))


def check(counts: Counts, num_faults: int, num_images: int) -> None:
    """What would be refused on reading must not be written."""
    shapes = {array.shape for array in counts}
    if shapes != {(num_faults,)}:
        raise ValueError(f"a chunk's counts are {sorted(shapes)}: allowed is {(num_faults,)}")
    if not _possible(counts.masked, counts.critical, counts.due, counts.correct, num_images):
        raise ValueError(f"a chunk's counts are not of {num_images} images")


def _possible(masked, critical, due, correct, num_images: int) -> bool:
    numbers = [np.asarray(array, np.int64) for array in (masked, critical, due, correct)]
    each = all(((n >= 0) & (n <= num_images)).all() for n in numbers)
    return each and bool((numbers[0] + numbers[1] <= num_images).all())


def encode_chunk(
    chunk: Chunk, faults: FaultList, values: None, num_images: int, campaign: str
) -> bytes:
    """One Parquet file, of the faults at `chunk.rows`; `campaign` is kept in its metadata."""
    masked, critical, due = chunk.packed.astype(np.int32).T
    columns = [
        chunk.rows,
        pa.DictionaryArray.from_arrays(faults.leaf, list(faults.paths)),
        faults.element,
        bit_column(faults),
        pa.DictionaryArray.from_arrays(faults.model.astype(np.int32), list(FAULT_MODELS)),
        masked,
        num_images - masked - critical,
        critical,
        due,
        chunk.correct,
    ]
    return table_bytes(columns, SCHEMA, num_images, campaign)


def decode_chunk(content: bytes, num_faults: int, num_images: int, campaign: str) -> Chunk:
    """What `encode_chunk` was given. ValueError saying why, if it is anything else."""
    table = read_table(content, SCHEMA, num_faults, campaign)
    rows = checked_rows(table, num_faults)
    names = ("masked", "non_critical", "critical", "due", "correct")
    masked, non_critical, critical, due, correct = (column_of(table, name) for name in names)
    possible = _possible(masked, critical, due, correct, num_images)
    if not possible or not np.array_equal(
        masked + non_critical + critical, [num_images] * len(rows)
    ):
        raise ValueError(f"its counts are not of {num_images} images")
    packed = np.stack([masked, critical, due], axis=1).astype(count_type(num_images))
    return Chunk(rows, packed, correct)
