"""One chunk of results as a Parquet file: one row a fault, its images' outcomes packed in bits.

pandas, Polars and DuckDB read a directory of them as it is::

    table = pandas.read_parquet("DIR/results")
    table = polars.read_parquet("DIR/results/*.parquet")
    table = duckdb.sql("SELECT * FROM 'DIR/results/*.parquet'")

Column `outcomes` holds three bits an image, in three planes: changed, critical, DUE. The outcome
(0 masked, 1 non-critical, 2 critical) of image i is `changed[i] + critical[i]`::

    changed, critical, due = numpy.unpackbits(
        numpy.frombuffer(row.outcomes, "u1").reshape(3, -1), axis=1, bitorder="little")

Each plane is padded with zeros to whole bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxfi.data._extras import extra
from jaxfi.faults._list import FaultList
from jaxfi.faults._transforms import BIT_MODELS, FAULT_MODELS
from jaxfi.outcomes._outcomes import CRITICAL, Results

with extra("store"):
    import pyarrow as pa
    import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("path", pa.string()),
        ("index", pa.string()),
        ("element", pa.int64()),
        ("bit", pa.int16()),
        ("model", pa.string()),
        ("value_before", pa.float64()),
        ("value_after", pa.float64()),
        ("masked", pa.int32()),
        ("non_critical", pa.int32()),
        ("critical", pa.int32()),
        ("due", pa.int32()),
        ("correct", pa.int32()),
        ("outcomes", pa.binary()),
    ]
)


_MERGED_BYTES = 2**26  # of packed outcomes in one merged chunk, before compression
_BYTES_AT_ONCE = 2**20  # of unpacked outcomes: a processor's cache holds them


class Chunk(NamedTuple):
    """Results of k faults as a file holds them.

    Attributes:
      rows: [k] integers, positions in the campaign's fault list.
      packed: [k, width(N)], what `pack` made.
      correct: [k] integers, images whose faulty prediction is the label.
    """

    rows: np.ndarray
    packed: np.ndarray
    correct: np.ndarray


def width(num_images: int) -> int:
    """Bytes that one fault's outcomes take when packed."""
    return 3 * -(-num_images // 8)


def dtype(num_images: int) -> np.dtype:
    """Of `Chunk.packed`."""
    return np.dtype(np.uint8)


def rows_together(num_images: int) -> int:
    """Faults in one merged file."""
    return max(1, _MERGED_BYTES // width(num_images))


def pack(results: Results) -> np.ndarray:
    """[k, width]."""
    return pack_outcomes(results.outcomes, results.due)


def unpack(chunk: Chunk, num_images: int) -> Results:
    """What `pack` was given."""
    return Results(*unpack_outcomes(chunk.packed, num_images), chunk.correct)


def check(results: Results, num_faults: int, num_images: int) -> None:
    """What would be refused on reading must not be written."""
    allowed = (num_faults, num_images), (num_faults, num_images), (num_faults,)
    shapes = tuple(array.shape for array in results[:3])
    if shapes != allowed:
        raise ValueError(f"a chunk's outcomes, due, correct are {shapes}: allowed is {allowed}")
    if results.outcomes.max(initial=0) > CRITICAL:
        raise ValueError(f"a chunk's outcomes hold {results.outcomes.max()}: allowed are 0, 1, 2")
    if not ((results.correct >= 0) & (results.correct <= num_images)).all():
        raise ValueError(f"a chunk's correct images are from 0 to {num_images}")


def pack_outcomes(outcomes: np.ndarray, due: np.ndarray) -> np.ndarray:
    """[F, N] outcomes and DUEs as [F, 3 * ceil(N / 8)] uint8: planes changed, critical, DUE."""
    num_faults, num_images = outcomes.shape
    packed = np.empty((num_faults, width(num_images)), np.uint8)
    for some in _few_at_a_time(num_faults, num_images):
        planes = outcomes[some], outcomes[some] == CRITICAL, due[some]
        packed[some] = np.hstack([np.packbits(p, axis=1, bitorder="little") for p in planes])
    return packed


def unpack_outcomes(packed: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The [F, N] uint8 outcomes and bool DUEs of what `pack_outcomes` made.

    >>> outcomes = np.array([[0, 1, 2]], np.uint8)
    >>> unpack_outcomes(pack_outcomes(outcomes, outcomes == 2), 3)[0]
    array([[0, 1, 2]], dtype=uint8)
    """
    outcomes, broken = np.zeros((2, len(packed), num_images), np.uint8)
    changed, critical, due = _planes(packed)
    for rows, bits in _rows_with_bits(changed, num_images):
        outcomes[rows] = bits
    for rows, bits in _rows_with_bits(critical, num_images):
        outcomes[rows] += bits
    for rows, bits in _rows_with_bits(due, num_images):
        broken[rows] = bits
    return outcomes, broken.view(bool)


def _rows_with_bits(plane: np.ndarray, num_images: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows where any bit is set, and their bits. The others cost nothing: they are 0, as memory is
    that nobody has written to."""
    rows = np.flatnonzero(plane.any(axis=1))
    for some in _few_at_a_time(len(rows), num_images):
        bits = np.unpackbits(plane[rows[some]], axis=1, count=num_images, bitorder="little")
        yield rows[some], bits


def _few_at_a_time(num_rows: int, num_images: int) -> Iterator[slice]:
    size = max(1, _BYTES_AT_ONCE // num_images)
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _planes(packed: np.ndarray) -> list[np.ndarray]:
    return np.split(packed, 3, axis=1)


def encode_chunk(
    chunk: Chunk,
    faults: FaultList,
    values: tuple[np.ndarray, np.ndarray],
    num_images: int,
    campaign: str,
) -> bytes:
    """A chunk as the bytes of a Parquet file.

    Args:
      faults, values: of its rows; values are the parameters' before and after.
      num_images: N, images per fault.
      campaign: which campaign it is of; kept in the file's metadata.
    """
    columns = [
        chunk.rows,
        [faults.paths[leaf] for leaf in faults.leaf],
        [str(index) for index in faults.indices()],
        faults.element,
        bit_column(faults),
        np.array(FAULT_MODELS)[faults.model].tolist(),
        *values,
        *_counts(chunk.packed, num_images),
        chunk.correct,
        _as_binary(chunk.packed),
    ]
    return table_bytes(
        columns,
        SCHEMA,
        num_images,
        campaign,
        row_group_size=4096,
        use_dictionary=["path", "model"],
        write_statistics=[field.name for field in SCHEMA if field.type != pa.binary()],
    )


def bit_column(faults: FaultList) -> pa.Array:
    """Bits, with gaps where the model names none."""
    has_bit = np.isin(np.array(FAULT_MODELS)[faults.model], BIT_MODELS)
    return pa.array(faults.bit, mask=~has_bit)


def table_bytes(
    columns: Sequence[Any], schema: pa.Schema, num_images: int, campaign: str, **options: Any
) -> bytes:
    """A chunk's table, which `read_table` reads; `options` are of pyarrow's `write_table`."""
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)]
    metadata = {"jaxfi.campaign": campaign, "jaxfi.images": str(num_images)}
    table = pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, **options)
    return buffer.getvalue()


def _as_binary(rows: np.ndarray) -> pa.Array:
    """[k, w] bytes as k values of w bytes, not copied."""
    ends = np.arange(len(rows) + 1) * rows.shape[1]
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)


def decode_chunk(content: bytes, num_faults: int, num_images: int, campaign: str) -> Chunk:
    """What `encode_chunk` was given. ValueError saying why, if it is anything else."""
    table = read_table(content, SCHEMA, num_faults, campaign)
    rows, correct = checked_rows(table, num_faults), column_of(table, "correct")
    if not ((correct >= 0) & (correct <= num_images)).all():
        raise ValueError("it has more correct images than there are")
    return Chunk(rows, _read_packed(table, num_images), correct)


def read_table(content: bytes, schema: pa.Schema, num_faults: int, campaign: str) -> pa.Table:
    """A chunk's table, of this schema and campaign; ValueError if it is none."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        if metadata.get(b"jaxfi.campaign") != campaign.encode():
            raise ValueError("it is of another campaign")
        if not file.schema_arrow.equals(schema):
            raise ValueError("it has other columns")
        if file.metadata.num_rows > num_faults:
            raise ValueError("it holds more faults than the list")
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"it is no Parquet file: {str(error).splitlines()[0]}") from None
    return table


def checked_rows(table: pa.Table, num_faults: int) -> np.ndarray:
    """A chunk's rows, [k]; ValueError if they are not of the list, each once."""
    rows = column_of(table, "row")
    if len(np.unique(rows)) != len(rows) or not ((rows >= 0) & (rows < num_faults)).all():
        raise ValueError("it holds faults that are not in the list")
    return rows


def _read_packed(table: pa.Table, num_images: int) -> np.ndarray:
    packed = _read_bytes(_without_gaps(table, "outcomes"), width(num_images))
    changed, critical, _ = planes = _planes(packed)
    counted = [column_of(table, name) for name in ("masked", "non_critical", "critical", "due")]
    padding = [plane[:, -1] >> (num_images - 1) % 8 + 1 for plane in planes]
    if (
        not np.array_equal(counted, _counts(packed, num_images))
        or np.any(padding)
        or np.any(critical & ~changed)
    ):
        raise ValueError("its counts are not those of its outcomes")
    return packed


def _read_bytes(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """[k, width] uint8, of k values of `width` bytes each. ValueError if one is of another size."""
    try:
        column = column.cast(pa.binary(width))
    except pa.ArrowInvalid:
        raise ValueError("its outcomes have another length") from None
    parts = [
        np.frombuffer(part.buffers()[1], np.uint8, len(part) * width, part.offset * width)
        for part in column.chunks
        if len(part)
    ]
    return np.concatenate([np.empty(0, np.uint8), *parts]).reshape(-1, width)


def column_of(table: pa.Table, name: str) -> np.ndarray:
    """ValueError if it has gaps."""
    return _without_gaps(table, name).to_numpy()


def _without_gaps(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = table.column(name)
    if column.null_count:
        raise ValueError(f"its column {name} has gaps")
    return column


def _counts(packed: np.ndarray, num_images: int) -> np.ndarray:
    """[4, F] images that are masked, non-critical, critical, and DUE."""
    changed, critical, due = counts = np.empty((3, len(packed)), np.int32)
    for some in _few_at_a_time(len(packed), num_images):
        bits = np.bitwise_count(packed[some]).reshape(-1, 3, packed.shape[1] // 3)
        counts[:, some] = bits.sum(axis=2, dtype=np.int32).T
    return np.stack([num_images - changed, changed - critical, critical, due])
