"""Durable results: whole or absent, verified when read, bit-identical after any interruption."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfi.campaign import _chunks
from jaxfi.campaign import _store as store_module
from jaxfi.campaign._chunks import Chunk, decode_chunk, encode_chunk, pack_outcomes, unpack_outcomes
from jaxfi.campaign._description import signed
from jaxfi.campaign._store import StoredCampaign, load, open_store
from jaxfi.data._files import content_hash, read_npz, to_npz
from jaxfi.faults import FaultList, sample_faults
from jaxfi.outcomes import Results

NUM_FAULTS, NUM_IMAGES = 60, 21
FINGERPRINT = {"precision": "highest", "versions": {"jax": "0.10.2"}, "seed": 3, "loss": None}
PARAMS = {
    "conv": {"kernel": np.linspace(-1, 1, 54, dtype=np.float32).reshape(3, 3, 6)},
    "dense": np.arange(8).astype(jnp.bfloat16),
    "scale": np.array(3, np.int8),
}
FAULTS = sample_faults(1, PARAMS, NUM_FAULTS, model="stuck-at", by="network")
VALUES = FAULTS.values(PARAMS)
GOLDEN = np.linspace(0, 9, NUM_IMAGES * 4).reshape(NUM_IMAGES, 4).astype(jnp.bfloat16)
LABELS = np.arange(NUM_IMAGES, dtype=np.int32) % 4


def make_results(num_faults: int = NUM_FAULTS, num_images: int = NUM_IMAGES) -> Results:
    generator = np.random.default_rng(5)
    outcomes = generator.choice(3, (num_faults, num_images), p=[0.8, 0.1, 0.1]).astype(np.uint8)
    due = generator.random((num_faults, num_images)) < 0.1
    return Results(outcomes, due, generator.integers(0, num_images, num_faults).astype(np.int32))


RESULTS = make_results()


def opened(directory: Path, **changes: object):
    arguments = {
        "fingerprint": FINGERPRINT,
        "faults": FAULTS,
        "num_images": NUM_IMAGES,
        "values": VALUES,
        **changes,
    }
    return open_store(directory, **arguments)


def write_rows(store: store_module.Store, rows: np.ndarray) -> None:
    store.write(rows, Results(*(array[rows] for array in RESULTS[:3])))


def write_all(directory: Path, size: int = 25) -> Path:
    """A finished campaign in chunks of `size` faults; the directory."""
    with opened(directory) as store:
        store.keep(golden=GOLDEN, labels=LABELS)
        for first in range(0, NUM_FAULTS, size):
            write_rows(store, np.arange(first, min(first + size, NUM_FAULTS)))
    return directory


def assert_whole(campaign: StoredCampaign) -> None:
    for stored, expected in zip(campaign.results[:3], RESULTS[:3], strict=True):
        assert stored.dtype == expected.dtype
        np.testing.assert_array_equal(stored, expected)
    assert campaign.faults == FAULTS
    assert campaign.faults.drawn_from == FAULTS.drawn_from
    assert campaign.fingerprint == FINGERPRINT
    assert campaign.arrays["golden"].dtype == GOLDEN.dtype
    assert campaign.arrays["golden"].tobytes() == GOLDEN.tobytes()
    np.testing.assert_array_equal(campaign.arrays["labels"], LABELS)


@pytest.fixture(scope="module")
def finished_campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("finished"))


def chunks_of(directory: Path) -> list[Path]:
    return sorted((directory / "results").glob("*.parquet"))


# Packing and content


@given(num_faults=st.integers(0, 5), num_images=st.integers(1, 40), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=60, deadline=None)
def test_packing(num_faults: int, num_images: int, seed: int) -> None:
    """Bit by bit: image i's changed, critical and DUE are bit i % 8 of byte i // 8 of a plane."""
    generator = np.random.default_rng(seed)
    outcomes = generator.integers(0, 3, (num_faults, num_images)).astype(np.uint8)
    due = generator.random((num_faults, num_images)) < 0.5
    packed = pack_outcomes(outcomes, due)
    width = (num_images + 7) // 8
    assert packed.shape == (num_faults, 3 * width)
    for f in range(num_faults):
        for i in range(num_images):
            bits = [int(packed[f, plane * width + i // 8]) >> i % 8 & 1 for plane in range(3)]
            assert bits == [outcomes[f, i] > 0, outcomes[f, i] == 2, due[f, i]]
    unpacked = unpack_outcomes(packed, num_images)
    np.testing.assert_array_equal(unpacked[0], outcomes)
    np.testing.assert_array_equal(unpacked[1], due)
    assert unpacked[0].dtype == np.uint8


def test_load_needs_no_parameters(finished_campaign: Path) -> None:
    assert_whole(load(finished_campaign))


def test_one_row_a_fault(finished_campaign: Path) -> None:
    """What another program sees, against the fault list and the results."""
    rows = pq.read_table(finished_campaign / "results").sort_by("row").to_pylist()
    assert len(rows) == NUM_FAULTS
    for number, row in enumerate(rows):
        leaf, outcomes = FAULTS.leaf[number], RESULTS.outcomes[number]
        shape, path = FAULTS.shapes[leaf], FAULTS.paths[leaf]
        assert row["row"] == number
        assert row["path"] == path
        assert row["element"] == FAULTS.element[number]
        expected = tuple(int(i) for i in np.unravel_index(row["element"], shape)) if shape else ()
        assert row["index"] == str(expected)
        assert row["bit"] == FAULTS.bit[number]
        assert row["model"] == ("stuck-at-0", "stuck-at-1")[FAULTS.model[number] - 1]
        np.testing.assert_equal(row["value_before"], VALUES[0][number])
        np.testing.assert_equal(row["value_after"], VALUES[1][number])
        counts = [row["masked"], row["non_critical"], row["critical"]]
        assert counts == np.bincount(outcomes, minlength=3).tolist()
        assert row["due"] == RESULTS.due[number].sum()
        assert row["correct"] == RESULTS.correct[number]


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_the_documented_one_liner(finished_campaign: Path, reader: str) -> None:
    library = pytest.importorskip(reader)
    if reader == "pandas":
        table = library.read_parquet(finished_campaign / "results").sort_values("row")
        packed = table.outcomes.tolist()
    elif reader == "polars":
        table = library.read_parquet(finished_campaign / "results" / "*.parquet").sort("row")
        packed = table["outcomes"].to_list()
    else:
        files = finished_campaign / "results" / "*.parquet"
        packed = [
            r[0] for r in library.sql(f"SELECT outcomes FROM '{files}' ORDER BY row").fetchall()
        ]
    for number, content in enumerate(packed):
        changed, critical, due = np.unpackbits(
            np.frombuffer(content, "u1").reshape(3, -1), axis=1, bitorder="little"
        )
        np.testing.assert_array_equal((changed + critical)[:NUM_IMAGES], RESULTS.outcomes[number])
        np.testing.assert_array_equal(due[:NUM_IMAGES], RESULTS.due[number])


def test_models_without_a_bit_or_images(tmp_path: Path) -> None:
    faults = FaultList.from_sites([("scale", (), None)] * 2, PARAMS, model="value", value=7)
    with opened(tmp_path, faults=faults, num_images=1, values=faults.values(PARAMS)) as store:
        store.keep(golden=GOLDEN)
        everything = Results(np.ones((2, 1), np.uint8), np.zeros((2, 1), bool), np.zeros(2))
        store.write(np.array([1, 0]), everything)
    campaign = load(tmp_path)
    assert campaign.faults == faults
    assert campaign.results.outcomes.tolist() == [[1], [1]]
    assert pq.read_table(tmp_path / "results")["bit"].to_pylist() == [None, None]


# Resuming and merging


@given(data=st.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_chunks_give_the_same_result(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any order, any sizes, any number of processes and interruptions; merged, the same bytes."""
    directory = tmp_path_factory.mktemp("chunks")
    order = np.array(data.draw(st.permutations(range(NUM_FAULTS))))
    cuts = sorted(data.draw(st.lists(st.integers(0, NUM_FAULTS), max_size=5)))
    for rows in np.split(order, cuts):
        with opened(directory, process_index=data.draw(st.integers(0, 3))) as store:
            store.keep(golden=GOLDEN, labels=LABELS)
            assert not store.finished()[rows].any()
            write_rows(store, rows)
            assert store.finished()[rows].all()
    assert_whole(load(directory))
    with opened(directory) as store:
        for merged, expected in zip(store.merge()[:3], RESULTS[:3], strict=True):
            np.testing.assert_array_equal(merged, expected)
        store.merge()
    assert_whole(load(directory))
    (merged_file,) = chunks_of(directory)
    assert merged_file.name == MERGED_NAMES.setdefault("name", merged_file.name)


MERGED_NAMES: dict[str, str] = {}  # of the first example, which all others must repeat


def test_reading_while_another_process_merges(tmp_path: Path, monkeypatch) -> None:
    """A chunk that was listed is gone when it is opened: what replaced it is read."""
    write_all(tmp_path)
    with opened(tmp_path) as store, opened(tmp_path, process_index=1) as other:
        list_chunks = other._chunks

        def merged_meanwhile() -> list[Path]:
            paths = list_chunks()
            if len(paths) > 1:
                store.merge()
            return paths

        monkeypatch.setattr(other, "_chunks", merged_meanwhile)
        assert other.finished().all()
        write_rows(store, np.arange(3))  # two files again
        for merged, expected in zip(other.read()[:3], RESULTS[:3], strict=True):
            np.testing.assert_array_equal(merged, expected)


def test_a_link_to_nowhere_is_named(finished_campaign: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "_LOOKS", 2)
    copy = Path(shutil.copytree(finished_campaign, tmp_path / "copy"))
    name = f"faults-000000000-000000001-{'0' * 32}.parquet"
    (copy / "results" / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=name):
        load(copy)


def test_merge_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunks, "_MERGED_BYTES", 13 * 9)
    write_all(tmp_path, size=7)
    with opened(tmp_path) as store:
        store.merge()
    assert [path.name[7:26] for path in chunks_of(tmp_path)] == [
        f"{first:09d}-{min(13, NUM_FAULTS - first):09d}" for first in range(0, NUM_FAULTS, 13)
    ]
    assert_whole(load(tmp_path))


def test_chunks_of_one_fault_twice(tmp_path: Path) -> None:
    """Two processes may compute the same fault; if they disagree, that is found."""
    write_all(tmp_path)
    with opened(tmp_path, process_index=1) as store:
        write_rows(store, np.array([5, 59]))
        assert_whole(load(tmp_path))
        other = Results(2 - RESULTS.outcomes[[5]], RESULTS.due[[5]], RESULTS.correct[[5]])
        store.write(np.array([5]), other)
    with pytest.raises(ValueError, match="contradicts another chunk"):
        load(tmp_path)


def test_a_list_read_from_a_file_continues_its_sample(tmp_path: Path) -> None:
    """What it was drawn from is not in the file, and stays known."""
    with opened(tmp_path) as store:
        store.keep(golden=GOLDEN, labels=LABELS)
        write_rows(store, np.arange(10))
    with opened(tmp_path, faults=FAULTS[:]) as store:
        write_rows(store, np.arange(10, NUM_FAULTS))
    assert FAULTS.drawn_from is not None
    assert_whole(load(tmp_path))


def test_unfinished_campaign(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        write_rows(store, np.arange(10))
        with pytest.raises(ValueError, match="no golden outputs: run the campaign again"):
            load(tmp_path)
        store.keep(golden=GOLDEN, labels=LABELS)
        with pytest.raises(ValueError, match="not finished: 50 of 60 faults are missing"):
            load(tmp_path)
        with pytest.raises(ValueError, match="not finished"):
            store.merge()
    (chunk,) = chunks_of(tmp_path)
    chunk.unlink()
    with opened(tmp_path) as store:
        assert not store.finished().any()


def test_no_campaign(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no campaign: .*campaign\.json is missing"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no campaign"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "rows, change, message",
    [
        (range(2), lambda *results: results, "a chunk's outcomes, due, correct are"),
        ((1, 2, 1), lambda *results: results, "rows are distinct and from 0 to 59"),
        ((1, 2, 60), lambda *results: results, "rows are distinct and from 0 to 59"),
        (range(3), lambda o, d, c: (o + 1, d, c), "outcomes hold 3: allowed are 0, 1, 2"),
        (range(3), lambda o, d, c: (o, d, c - 30), "correct images are from 0 to 21"),
    ],
)
def test_what_cannot_be_read_is_not_written(
    tmp_path: Path, rows: tuple, change: Callable, message: str
) -> None:
    with opened(tmp_path) as store, pytest.raises(ValueError, match=message):
        store.write(np.array(rows), Results(*change(*(array[:3] for array in RESULTS[:3]))))
    assert not chunks_of(tmp_path)


# Another campaign


OTHER_CAMPAIGNS = {
    "precision": (
        {"fingerprint": {**FINGERPRINT, "precision": "default"}},
        'precision is "highest" there and "default" here',
    ),
    "nested": (
        {"fingerprint": {**FINGERPRINT, "versions": {"jax": "0.11.2"}}},
        r'versions\.jax is "0\.10\.2" there and "0\.11\.2" here',
    ),
    "two": (
        {"fingerprint": {**FINGERPRINT, "seed": 4, "loss": 0.5}},
        "loss is null there and 0.5 here; seed is 3 there and 4 here",
    ),
    "more": ({"fingerprint": {**FINGERPRINT, "x": 1}}, "x is absent there and 1 here"),
    "images": ({"num_images": 22}, "num_images is 21 there and 22 here"),
    "faults": ({"faults": FAULTS[::-1]}, "faults_file is "),
    "values": ({"values": VALUES[::-1]}, "faults_file is "),
}


@pytest.mark.parametrize("changes, message", OTHER_CAMPAIGNS.values(), ids=OTHER_CAMPAIGNS)
def test_every_difference_is_named(finished_campaign: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"holds another campaign: .*{message}.*use another dir"):
        opened(finished_campaign, **changes).__enter__()
    assert_whole(load(finished_campaign))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"golden": -GOLDEN, "labels": LABELS}, "holds other golden:"),
        ({"golden": GOLDEN.astype(np.float32), "labels": LABELS}, "holds other golden:"),
        ({"golden": GOLDEN, "labels": LABELS[:-1]}, "holds other labels:"),
        ({"golden": GOLDEN}, "holds other labels:"),
    ],
)
def test_other_golden_bits(finished_campaign: Path, arrays: dict, message: str) -> None:
    with opened(finished_campaign) as store, pytest.raises(ValueError, match=message):
        store.keep(**arrays)
    assert_whole(load(finished_campaign))


def test_foreign_chunk(finished_campaign: Path, tmp_path: Path) -> None:
    """A chunk of a campaign that differs in its fingerprint only."""
    with opened(tmp_path, fingerprint={"precision": "default"}) as store:
        write_rows(store, np.arange(3))
    (foreign,) = chunks_of(tmp_path)
    copy = Path(shutil.copytree(finished_campaign, tmp_path / "copy"))
    shutil.copy(foreign, copy / "results")
    with pytest.raises(
        ValueError, match=rf"{foreign.name} is damaged or foreign \(it is of another"
    ):
        load(copy)
    with opened(copy) as store, pytest.raises(ValueError, match="it is of another campaign"):
        store.finished()
    (copy / "results" / foreign.name).unlink()
    assert_whole(load(copy))


@pytest.mark.parametrize("name", ["part-0.parquet", "faults-1-2-3.parquet", "notes.txt"])
def test_files_that_are_no_chunks(finished_campaign: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(finished_campaign, tmp_path / "copy"))
    (copy / "results" / name).write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{name} is damaged or foreign .*delete it and run"):
        load(copy)


# Damage


def stored_files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [path for path in files if not path.name.startswith("lock-")]


def read_or_error(directory: Path) -> ValueError | FileNotFoundError | None:
    """The error of loading; without one, everything must be right."""
    try:
        campaign = load(directory)
    except (ValueError, FileNotFoundError) as error:
        return error
    assert_whole(campaign)
    return None


@given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_found(finished_campaign: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(stored_files(finished_campaign)))
    content = path.read_bytes()
    offset = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        error = read_or_error(finished_campaign)
        # In JSON a space may become another space, which means the same.
        assert path.suffix == ".json" or str(path) in str(error)
    finally:
        path.write_bytes(content)


@given(data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_truncation_is_found(finished_campaign: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(stored_files(finished_campaign)))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    try:
        error = read_or_error(finished_campaign)
        assert str(path) in str(error)
        assert "delete it and run the campaign again" in str(error)
    finally:
        path.write_bytes(content)


def test_following_the_advice_loses_nothing_else(finished_campaign: Path, tmp_path: Path) -> None:
    """Damage each file in turn, delete it as told, run again: whole."""
    for number, original in enumerate(stored_files(finished_campaign)):
        copy = Path(shutil.copytree(finished_campaign, tmp_path / str(number)))
        path = copy / original.relative_to(finished_campaign)
        path.write_bytes(b"?" + path.read_bytes()[1:])
        assert "is damaged or foreign" in str(read_or_error(copy))
        path.unlink()
        with opened(copy) as store:
            store.keep(golden=GOLDEN, labels=LABELS)
            missing = np.flatnonzero(~store.finished())
            assert len(missing) in ((25, 10) if path.suffix == ".parquet" else (0,))
            write_rows(store, missing)
        assert_whole(load(copy))


@given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_strangers_files_with_right_names(finished_campaign: Path, data: st.DataObject) -> None:
    """Damage that also fakes the hash in the name: an error or right, never a crash."""
    binary = [p for p in stored_files(finished_campaign) if p.suffix != ".json"]
    path = data.draw(st.sampled_from(binary))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    junk = data.draw(st.binary(max_size=8))
    faked = content[:start] + junk + content[start + data.draw(st.integers(0, 8)) :]
    name = f"{path.stem.rpartition('-')[0]}-{content_hash(faked)}{path.suffix}"
    path.rename(path.with_name(name))
    path.with_name(name).write_bytes(faked)
    try:
        load(finished_campaign)  # may differ where only a value or an array's bytes changed
    except (ValueError, FileNotFoundError) as error:
        assert str(error)  # noqa: PT017
    finally:
        path.with_name(name).unlink()
        path.write_bytes(content)


@given(
    text=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda tree: (
            st.lists(tree, max_size=3) | st.dictionaries(st.text(max_size=5), tree, max_size=3)
        ),
        max_leaves=8,
    )
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_foreign_json(finished_campaign: Path, text: object) -> None:
    """Any JSON, also with a right checksum, is an error that names it."""
    path = finished_campaign / "campaign.json"
    content = path.read_bytes()
    faked = signed({**json.loads(content), **text}) if isinstance(text, dict) else text
    if faked == json.loads(content):
        return
    path.write_text(json.dumps(text))
    try:
        assert "is damaged or foreign" in str(read_or_error(finished_campaign))
        path.write_text(json.dumps(faked))
        assert "is damaged or foreign" in str(read_or_error(finished_campaign))
    finally:
        path.write_bytes(content)


def resigned(directory: Path, **changes: object) -> None:
    description = json.loads((directory / "campaign.json").read_text())
    (directory / "campaign.json").write_text(json.dumps(signed(description | changes)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 99}, "has format 99: allowed is 1"),
        ({"faults_file": "../../../etc/passwd"}, "is no fault list"),
        ({"faults_file": None}, "'None' is no fault list"),
        ({"shapes": []}, "damaged or foreign"),
        ({"shapes": [[2**80], [1], [1]]}, "damaged or foreign"),
        ({"drawn_from": [[9, [0], 1]]}, "cannot be drawn from"),
        ({"drawn_from": 3}, "damaged or foreign"),
        ({"shapes": [[1], [1], [1]]}, "element is outside its leaf"),
        ({"shapes": "abc"}, "damaged or foreign"),
        ({"paths": ["a"]}, "damaged or foreign"),
        ({"dtypes": ["int8", "bfloat16", "int8"]}, "bit is outside its word"),
        ({"dtypes": ["float32", "object", "int8"]}, "damaged or foreign"),
        ({"dtypes": ["float32", "bfloat16,", "int8"]}, "its dtypes are"),
        ({"dtypes": ["float32", 10**6 * "x" + "-", "int8"]}, "its dtypes are"),  # at once
        ({"num_images": "many"}, "damaged or foreign"),
        ({"num_images": -1}, "damaged or foreign"),
        ({"fingerprint": None}, "damaged or foreign"),
    ],
)
def test_hostile_descriptions(
    finished_campaign: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    copy = Path(shutil.copytree(finished_campaign, tmp_path / "copy"))
    resigned(copy, **changes)
    with pytest.raises(ValueError, match=message):
        load(copy)


def altered_chunk(change: Callable[[pa.Table], pa.Table]) -> bytes:
    """A chunk of 4 faults on 9 images, all masked, and then changed."""
    packed = pack_outcomes(np.zeros((4, 9), np.uint8), np.zeros((4, 9), bool))
    chunk = Chunk(np.arange(4), packed, np.full(4, 9))
    values = VALUES[0][:4], VALUES[1][:4]
    content = pa.BufferReader(encode_chunk(chunk, FAULTS[:4], values, 9, "mine"))
    buffer = io.BytesIO()
    pq.write_table(change(pq.read_table(content)), buffer)
    return buffer.getvalue()


def replaced(**columns: object) -> Callable[[pa.Table], pa.Table]:
    """The table with the same new value in each row of these columns."""

    def change(table: pa.Table) -> pa.Table:
        for name, value in columns.items():
            table = replaced_column(table, name, [value] * len(table))
        return table

    return change


def replaced_column(table: pa.Table, name: str, values: list) -> pa.Table:
    number, field = table.schema.get_field_index(name), table.schema.field(name)
    return table.set_column(number, field, pa.array(values, field.type))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: pa.concat_tables([table, table]), "more faults than the list"),
        (replaced(row=4), "faults that are not in the list"),
        (replaced(row=None), "its column row has gaps"),
        (replaced(outcomes=None), "its column outcomes has gaps"),
        (replaced(correct=10), "more correct images than there are"),
        (replaced(correct=-1), "more correct images than there are"),
        (replaced(outcomes=bytes(5)), "another length"),
        (lambda table: replaced_column(table, "outcomes", [bytes(5), bytes(7)] * 2), "another len"),
        (replaced(outcomes=b"\1" + bytes(5)), "its counts are not those"),
        # Critical and not changed; the second is an image that there is not.
        (replaced(outcomes=bytes(2) + b"\1" + bytes(3), non_critical=-1, critical=1), "its counts"),
        (replaced(outcomes=b"\0\2" + bytes(4), masked=8, non_critical=1), "its counts"),
    ],
)
def test_hostile_chunks(change: Callable, message: str) -> None:
    decode_chunk(altered_chunk(lambda table: table), 4, 9, "mine")
    with pytest.raises(ValueError, match=message):
        decode_chunk(altered_chunk(change), 4, 9, "mine")


def test_no_pickle_is_loaded(finished_campaign: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "boom"),)

    copy = Path(shutil.copytree(finished_campaign, tmp_path / "copy"))
    np.savez(tmp_path / "bomb.npz", **{"golden.float32": np.array([Bomb()], object)})
    content = (tmp_path / "bomb.npz").read_bytes()
    (golden,) = copy.glob("golden-*.npz")
    golden.unlink()
    (copy / f"golden-{content_hash(content)}.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged or foreign \(it is no \.npz"):
        load(copy)
    assert not (tmp_path / "boom").exists()


def test_npz_round_trip_is_deterministic(tmp_path: Path) -> None:
    arrays = {"a": GOLDEN, "b": np.array(3), "c": np.zeros((0, 2), bool), "d": np.array([np.nan])}
    content = to_npz(arrays)
    assert to_npz(dict(arrays)) == content
    path = tmp_path / f"x-{content_hash(content)}.npz"
    path.write_bytes(content)
    read = read_npz(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert read[name].tobytes() == array.tobytes()
        assert read[name].shape == array.shape


# The machine says no


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as store:
        store.keep(golden=GOLDEN, labels=LABELS)
        write_rows(store, np.arange(30))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                OSError, match=r"cannot write .*\(No space left on device\)"
            ) as info:
                write_rows(store, np.arange(30, 60))
        assert info.value.errno == errno.ENOSPC
        assert len(chunks_of(tmp_path)) == 1
        assert not list((tmp_path / "results").glob(".*"))
        write_rows(store, np.arange(30, 60))
    assert_whole(load(tmp_path))


def test_real_file_size_limit(tmp_path: Path) -> None:
    """The kernel itself refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        store.keep(golden=GOLDEN, labels=LABELS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="cannot write .*File too large"):
                write_rows(store, np.arange(30))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not store.finished().any()
        write_rows(store, np.arange(60))
    assert_whole(load(tmp_path))


def test_directory_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(store_module, "_LOOKS", 2)  # not for a minute
    with opened(tmp_path / "run") as store:
        write_rows(store, np.arange(30))
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(FileNotFoundError, match=r"cannot write .*faults-000000030-.*\.parquet"):
            write_rows(store, np.arange(30, 60))
        with pytest.raises(FileNotFoundError, match="cannot read .*results"):
            store.finished()


def test_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="cannot write .*run"):
        opened(tmp_path / "run").__enter__()


@pytest.fixture
def folder_of_nobody(tmp_path: Path) -> Iterator[Path]:
    """A folder of this process, which is not root meanwhile: root may write anywhere."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    write_all(tmp_path / "warm")  # imports what pyarrow imports at its first write
    folder = Path(tempfile.mkdtemp())  # pytest's own is closed to others
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


NOBODY = 65534


def test_permission_lost(folder_of_nobody: Path) -> None:
    directory = write_all(folder_of_nobody / "run")
    for folder in (directory, directory / "results"):
        folder.chmod(0o500)
    try:
        assert_whole(load(directory))
        with (
            opened(directory) as store,
            pytest.raises(PermissionError, match=r"cannot write .*0000.*make it writable"),
        ):
            write_rows(store, np.arange(5))
    finally:
        for folder in (directory, directory / "results"):
            folder.chmod(0o700)
    with opened(directory) as store:
        write_rows(store, np.arange(5))


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run" / "results").mkdir(parents=True)
    (tmp_path / "run" / "results" / ".0000.tmp").symlink_to(outside)
    (tmp_path / "run" / ".0000.tmp").symlink_to(outside)
    write_all(tmp_path / "run")
    (tmp_path / "run" / "lock-0001").symlink_to(outside)
    with pytest.raises(OSError, match="cannot write .*lock-0001"):
        opened(tmp_path / "run", process_index=1).__enter__()
    assert outside.read_text() == "mine"


# Two processes, and processes that are killed


def test_second_process_is_refused(tmp_path: Path) -> None:
    """Another process of this index is refused; one of another index is welcome."""
    with (
        opened(tmp_path),
        pytest.raises(BlockingIOError, match=rf"is in use by process {os.getpid()} on .*: wait"),
    ):
        opened(tmp_path).__enter__()
    with opened(tmp_path), opened(tmp_path, process_index=1) as second:
        write_rows(second, np.arange(60))
        second.keep(golden=GOLDEN, labels=LABELS)
    assert_whole(load(tmp_path))


# Opens the store, which begins it or resumes it, and writes one fault after another; forked, so
# that thirty deaths cost one start of Python.
WRITER = """
    import os, random, signal, sys, time
    sys.path.insert(0, {tests!r})
    import numpy as np
    import tests.campaign.test_store as t

    def write_missing(directory):
        with t.opened(directory) as store:
            store.keep(golden=t.GOLDEN, labels=t.LABELS)
            for row in np.flatnonzero(~store.finished()):
                t.write_rows(store, np.array([row]))
            store.merge()

    random.seed({seed})
    directory = t.Path({directory!r})
    t.write_all(directory / "warm")  # imports what pyarrow imports at its first write
    began = time.monotonic()
    t.write_all(directory / "undisturbed", size=1)
    longest_life = (time.monotonic() - began) / 3
    directory, progress = directory / "killed", []
    for death in range(30):
        child = os.fork()
        if child == 0:
            write_missing(directory)
            os._exit(0)
        time.sleep(random.uniform(0, longest_life))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        progress.append(len(list((directory / "results").glob("*.parquet"))))
    print(*progress)
    write_missing(directory)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_thirty_moments(tmp_path: Path, seed: int) -> None:
    tests = str(Path(__file__).parents[1])
    program = textwrap.dedent(WRITER).format(tests=tests, seed=seed, directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=True,
        timeout=120,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(tests).parent)},
    )
    assert len(set(done.stdout.split())) > 2, "no death came in the middle"
    assert_whole(load(tmp_path / "killed"))
    with opened(tmp_path / "undisturbed") as store:
        store.merge()
    killed, undisturbed = (chunks_of(tmp_path / name) for name in ("killed", "undisturbed"))
    assert [path.name for path in killed] == [path.name for path in undisturbed]
    assert killed[0].read_bytes() == undisturbed[0].read_bytes()


def test_lock_is_free_after_a_kill(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    program = f"""
import sys, time; sys.path.insert(0, {tests!r}); import tests.campaign.test_store as t
with t.opened({str(tmp_path)!r}):
    print("open", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(tests).parent)},
    )
    with holder:
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(BlockingIOError, match=f"in use by process {holder.pid} on"):
            opened(tmp_path).__enter__()
        holder.send_signal(signal.SIGKILL)
    write_all(tmp_path)
    assert_whole(load(tmp_path))
