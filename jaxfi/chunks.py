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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxfi.fault_list import FaultList
from jaxfi.faults import BIT_MODELS, FAULT_MODELS
from jaxfi.outcomes import CRITICAL, MASKED, NON_CRITICAL, Results

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


def packed_bytes(num_images: int) -> int:
    """Bytes that one fault's outcomes take when packed."""
    return 3 * -(-num_images // 8)


def pack_outcomes(outcomes: np.ndarray, due: np.ndarray) -> np.ndarray:
    """[F, N] outcomes and DUEs as [F, 3 * ceil(N / 8)] uint8: planes changed, critical, DUE."""
    planes = [outcomes != MASKED, outcomes == CRITICAL, due]
    return np.concatenate([np.packbits(p, axis=1, bitorder="little") for p in planes], axis=1)


def unpack_outcomes(packed: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The [F, N] uint8 outcomes and bool DUEs of what `pack_outcomes` made.

    >>> outcomes = np.array([[0, 1, 2]], np.uint8)
    >>> unpack_outcomes(pack_outcomes(outcomes, outcomes == 2), 3)[0]
    array([[0, 1, 2]], dtype=uint8)
    """
    changed, critical, due = (
        np.unpackbits(plane, axis=1, count=num_images, bitorder="little")
        for plane in np.split(packed, 3, axis=1)
    )
    return changed + critical, due.astype(bool)


def encode_chunk(
    rows: np.ndarray,
    faults: FaultList,
    values: tuple[np.ndarray, np.ndarray],
    results: Results,
    campaign: str,
) -> bytes:
    """A chunk as the bytes of a Parquet file.

    Args:
      rows: [k] positions in the campaign's fault list.
      faults, values, results: of these rows; values are the parameters' before and after.
      campaign: which campaign it is of; kept in the file's metadata.
    """
    outcomes, due, correct = results
    names = np.array(FAULT_MODELS)[faults.model]
    packed = pack_outcomes(outcomes, due)
    columns = [
        rows,
        [faults.paths[leaf] for leaf in faults.leaf],
        [str(index) for index in faults.indices()],
        faults.element,
        pa.array(faults.bit, mask=~np.isin(names, BIT_MODELS)),
        names.tolist(),
        *values,
        *_counts(outcomes, due),
        correct,
        [row.tobytes() for row in packed],
    ]
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    metadata = {"jaxfi.campaign": campaign, "jaxfi.images": str(outcomes.shape[1])}
    buffer = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(metadata)),
        buffer,
        compression="zstd",
        row_group_size=4096,
        use_dictionary=["path", "model"],
        write_page_checksum=True,
    )
    return buffer.getvalue()


def decode_chunk(
    content: bytes, num_faults: int, num_images: int, campaign: str
) -> tuple[np.ndarray, Results]:
    """The rows and results of `encode_chunk`. ValueError saying why, if it is anything else."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        metadata = file.schema_arrow.metadata or {}
        if metadata.get(b"jaxfi.campaign") != campaign.encode():
            raise ValueError("it is of another campaign")
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError("it has other columns")
        table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"it is no Parquet file: {str(error).splitlines()[0]}") from None
    rows = _column(table, "row")
    if len(np.unique(rows)) != len(rows) or not ((rows >= 0) & (rows < num_faults)).all():
        raise ValueError("it holds faults that are not in the list")
    return rows, _decode_results(table, num_images)


def _decode_results(table: pa.Table, num_images: int) -> Results:
    packed = b"".join(table.column("outcomes").to_pylist())
    if len(packed) != table.num_rows * packed_bytes(num_images):
        raise ValueError("its outcomes have another length")
    planes = np.frombuffer(packed, np.uint8).reshape(table.num_rows, packed_bytes(num_images))
    outcomes, due = unpack_outcomes(planes, num_images)
    counted = [_column(table, name) for name in ("masked", "non_critical", "critical", "due")]
    if not np.array_equal(counted, _counts(outcomes, due)):
        raise ValueError("its counts are not those of its outcomes")
    return Results(outcomes, due, _column(table, "correct"))


def _column(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    if column.null_count:
        raise ValueError(f"its column {name} has gaps")
    return column.to_numpy()


def _counts(outcomes: np.ndarray, due: np.ndarray) -> list[np.ndarray]:
    """[F] images that are masked, non-critical, critical, and DUE."""
    found = [np.count_nonzero(outcomes == o, axis=1) for o in (MASKED, NON_CRITICAL, CRITICAL)]
    return [*found, np.count_nonzero(due, axis=1)]
