"""One chunk of results as a Parquet file: one row a fault, its images' outcomes packed in bits.

pandas, Polars and DuckDB read a directory of them as it is::

    table = pandas.read_parquet("DIR/results")
    table = polars.read_parquet("DIR/results/*.parquet")
    table = duckdb.sql("SELECT * FROM 'DIR/results/*.parquet'")

Column `outcomes` holds three bits an image, in three planes: changed, critical, DUE. The outcome
(0 masked, 1 non-critical, 2 critical) of image i is `changed[i] + critical[i]`::

    changed, critical, due = numpy.unpackbits(
        numpy.frombuffer(row.outcomes, "u1").reshape(3, -1), axis=1, bitorder="little")

Each plane is padded with zeros to whole bytes. A campaign with criteria has a plane more for each,
in the order of their columns, which count the images that meet them.
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


Criteria = tuple[str, ...]
"""The names of a campaign's own criteria, in the order of their planes."""


class Chunk(NamedTuple):
    """Results of k faults as a file holds them.

    Attributes:
      rows: [k] integers, positions in the campaign's fault list.
      packed: [k, width(N, criteria)], what `pack` made.
      correct: [k] integers, images whose faulty prediction is the label.
    """

    rows: np.ndarray
    packed: np.ndarray
    correct: np.ndarray


def schema_of(criteria: Criteria = ()) -> pa.Schema:
    """Of a campaign's files: a column more for each criterion, of counts."""
    counted = [pa.field(name, pa.int32()) for name in criteria]
    return pa.schema([*list(SCHEMA)[:-1], *counted, SCHEMA.field("outcomes")])


def width(num_images: int, criteria: Criteria = ()) -> int:
    """Bytes that one fault's outcomes take when packed."""
    return (3 + len(criteria)) * -(-num_images // 8)


def dtype(num_images: int, criteria: Criteria = ()) -> np.dtype:
    """Of `Chunk.packed`."""
    return np.dtype(np.uint8)


def rows_together(num_images: int, criteria: Criteria = ()) -> int:
    """Faults in one merged file."""
    return max(1, _MERGED_BYTES // width(num_images, criteria))


def pack(results: Results, criteria: Criteria = ()) -> np.ndarray:
    """[k, width]."""
    return pack_outcomes(results.outcomes, results.due, [results.criteria[c] for c in criteria])


def unpack(chunk: Chunk, num_images: int, criteria: Criteria = ()) -> Results:
    """What `pack` was given."""
    outcomes, due, *met = unpack_outcomes(chunk.packed, num_images, len(criteria))
    named = dict(zip(criteria, met, strict=True))
    return Results(outcomes, due, chunk.correct, criteria=named)


def check(results: Results, num_faults: int, num_images: int, criteria: Criteria = ()) -> None:
    """What would be refused on reading must not be written."""
    met = {name: array.shape for name, array in results.criteria.items()}
    if met != dict.fromkeys(criteria, (num_faults, num_images)):
        raise ValueError(f"a chunk's criteria are {met}: allowed are {', '.join(criteria)}")
    allowed = (num_faults, num_images), (num_faults, num_images), (num_faults,)
    shapes = tuple(array.shape for array in results[:3])
    if shapes != allowed:
        raise ValueError(f"a chunk's outcomes, due, correct are {shapes}: allowed is {allowed}")
    if results.outcomes.max(initial=0) > CRITICAL:
        raise ValueError(f"a chunk's outcomes hold {results.outcomes.max()}: allowed are 0, 1, 2")
    if not ((results.correct >= 0) & (results.correct <= num_images)).all():
        raise ValueError(f"a chunk's correct images are from 0 to {num_images}")


def pack_outcomes(
    outcomes: np.ndarray, due: np.ndarray, others: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """[F, N] outcomes, DUEs and others as [F, planes * ceil(N / 8)] uint8: planes changed,
    critical, DUE, others."""
    num_faults, num_images = outcomes.shape
    packed = np.empty((num_faults, (3 + len(others)) * -(-num_images // 8)), np.uint8)
    for some in _few_at_a_time(num_faults, num_images):
        more = [other[some] for other in others]
        planes = outcomes[some], outcomes[some] == CRITICAL, due[some], *more
        packed[some] = np.hstack([np.packbits(p, axis=1, bitorder="little") for p in planes])
    return packed


def unpack_outcomes(
    packed: np.ndarray, num_images: int, num_others: int = 0
) -> tuple[np.ndarray, ...]:
    """The [F, N] uint8 outcomes, and bool DUEs and others, of what `pack_outcomes` made.

    >>> outcomes = np.array([[0, 1, 2]], np.uint8)
    >>> unpack_outcomes(pack_outcomes(outcomes, outcomes == 2), 3)[0]
    array([[0, 1, 2]], dtype=uint8)
    """
    outcomes, *flags = np.zeros((2 + num_others, len(packed), num_images), np.uint8)
    changed, critical, *planes = _planes(packed, 3 + num_others)
    for rows, bits in _rows_with_bits(changed, num_images):
        outcomes[rows] = bits
    for rows, bits in _rows_with_bits(critical, num_images):
        outcomes[rows] += bits
    for flag, plane in zip(flags, planes, strict=True):
        for rows, bits in _rows_with_bits(plane, num_images):
            flag[rows] = bits
    return outcomes, *(flag.view(bool) for flag in flags)


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


def _planes(packed: np.ndarray, count: int) -> list[np.ndarray]:
    return np.split(packed, count, axis=1)


def encode_chunk(
    chunk: Chunk,
    faults: FaultList,
    values: tuple[np.ndarray, np.ndarray],
    num_images: int,
    campaign: str,
    criteria: Criteria = (),
) -> bytes:
    """A chunk as the bytes of a Parquet file.

    Args:
      faults, values: of its rows; values are the parameters' before and after.
      num_images: N, images per fault.
      campaign: which campaign it is of; kept in the file's metadata.
      criteria: their names.
    """
    counts, schema = _counts(chunk.packed, num_images, len(criteria)), schema_of(criteria)
    columns = [
        chunk.rows,
        [faults.paths[leaf] for leaf in faults.leaf],
        [str(index) for index in faults.indices()],
        faults.element,
        bit_column(faults),
        np.array(FAULT_MODELS)[faults.model].tolist(),
        *values,
        *counts[:4],
        chunk.correct,
        *counts[4:],
        _as_binary(chunk.packed),
    ]
    return table_bytes(
        columns,
        schema,
        num_images,
        campaign,
        row_group_size=4096,
        use_dictionary=["path", "model"],
        write_statistics=[field.name for field in schema if field.type != pa.binary()],
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


def decode_chunk(
    content: bytes, num_faults: int, num_images: int, campaign: str, criteria: Criteria = ()
) -> Chunk:
    """What `encode_chunk` was given. ValueError saying why, if it is anything else."""
    table = read_table(content, schema_of(criteria), num_faults, campaign)
    rows, correct = checked_rows(table, num_faults), column_of(table, "correct")
    if not ((correct >= 0) & (correct <= num_images)).all():
        raise ValueError("it has more correct images than there are")
    return Chunk(rows, _read_packed(table, num_images, criteria), correct)


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


def _read_packed(table: pa.Table, num_images: int, criteria: Criteria) -> np.ndarray:
    packed = _read_bytes(_without_gaps(table, "outcomes"), width(num_images, criteria))
    changed, critical, *_ = planes = _planes(packed, 3 + len(criteria))
    names = ("masked", "non_critical", "critical", "due", *criteria)
    counted = [column_of(table, name) for name in names]
    padding = [plane[:, -1] >> (num_images - 1) % 8 + 1 for plane in planes]
    if (
        not np.array_equal(counted, _counts(packed, num_images, len(criteria)))
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


def _counts(packed: np.ndarray, num_images: int, num_others: int) -> np.ndarray:
    """[4 + others, F] images that are masked, non-critical, critical, DUE, and meet criteria."""
    planes = 3 + num_others
    changed, critical, *others = counts = np.empty((planes, len(packed)), np.int32)
    for some in _few_at_a_time(len(packed), num_images):
        bits = np.bitwise_count(packed[some]).reshape(-1, planes, packed.shape[1] // planes)
        counts[:, some] = bits.sum(axis=2, dtype=np.int32).T
    return np.stack([num_images - changed, changed - critical, critical, *others])
