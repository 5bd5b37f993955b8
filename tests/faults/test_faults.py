"""Fault models against Python's struct, and fault lists against every kind of bad input."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import math
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxfi
from jaxfi.faults import (
    BIT_MODELS,
    FAULT_MODELS,
    Fault,
    FaultList,
    corrupt,
    inject,
    leaf_paths,
    word_bits,
)
from jaxfi.faults._sites import parse_index

# struct's own format of each dtype; struct knows no bfloat16, which is the upper half of a float.
STRUCT_FORMATS = {
    "float64": "<d",
    "float32": "<f",
    "float16": "<e",
    "bfloat16": None,
    "int8": "<b",
    "int16": "<h",
    "int32": "<i",
    "uint8": "<B",
}
DTYPES = tuple(STRUCT_FORMATS)
SHAPES = ((), (1,), (5,), (2, 3), (2, 1, 3))
FEW = hypothesis.settings(max_examples=40, deadline=None)


@contextlib.contextmanager
def wide_words(dtype: str) -> Iterator[None]:
    """float64 lives only where JAX is told to keep 64 bits."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", before or dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def unpack(word: int, dtype: str) -> float | int:
    """The number a stored word means, by struct."""
    if dtype == "bfloat16":
        return struct.unpack("<f", (word << 16).to_bytes(4, "little"))[0]
    return struct.unpack(STRUCT_FORMATS[dtype], word.to_bytes(word_bits(dtype) // 8, "little"))[0]


def pack(number: float, dtype: str) -> int:
    """The word that stores a number, by struct (bfloat16: for numbers it holds exactly)."""
    if dtype == "bfloat16":
        return int.from_bytes(struct.pack("<f", number), "little") >> 16
    return int.from_bytes(struct.pack(STRUCT_FORMATS[dtype], number), "little")


def words_of(array: jax.Array | np.ndarray) -> list[int]:
    raw, size = np.asarray(array).tobytes(), np.asarray(array).dtype.itemsize
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


def faulty_word(word: int, bit: int, model: str, value: float, dtype: str) -> int:
    """What each fault model does to a word, spelled out."""
    return {
        "bit-flip": lambda: word ^ (1 << bit),
        "stuck-at-0": lambda: word & ~(1 << bit),
        "stuck-at-1": lambda: word | (1 << bit),
        "zero": lambda: 0,
        "value": lambda: pack(value, dtype),
        "null": lambda: word,
    }[model]()


@st.composite
def stored_arrays(draw: st.DrawFn, dtype: str) -> np.ndarray:
    """Arrays of any words at all: NaN payloads, infinities, denormals, both zeros."""
    shape = draw(st.sampled_from(SHAPES))
    unsigned = hypothesis.extra.numpy.arrays(f"uint{word_bits(dtype)}", shape)
    return draw(unsigned).reshape(shape).view(jnp.dtype(dtype))


@pytest.mark.parametrize("model", FAULT_MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_inject_is_struct(dtype: str, model: str, data: st.DataObject) -> None:
    array = data.draw(stored_arrays(dtype))
    element = data.draw(st.integers(0, array.size - 1))
    bit = data.draw(st.integers(0, word_bits(dtype) - 1)) if model in BIT_MODELS else None
    value = data.draw(st.integers(0, 100))
    params = {"other": np.ones(3, dtype), "w": array}
    with wide_words(dtype):
        faults = FaultList.from_sites([("w", element, bit)], params, model=model, value=value)
        faulty = inject(params, faults.fault(0))
        again = inject(faulty, faults.fault(0))
        expected = words_of(array)
        expected[element] = faulty_word(expected[element], bit or 0, model, value, dtype)
        assert words_of(faulty["w"]) == expected
        assert words_of(faulty["other"]) == words_of(params["other"])
        assert faulty["w"].shape == array.shape
        assert faulty["w"].dtype == array.dtype
        # A flip undoes itself; every other model is idempotent.
        assert words_of(again["w"]) == (words_of(array) if model == "bit-flip" else expected)
        check_words_and_values(faults, params, words_of(array)[element], expected[element], dtype)


def check_words_and_values(
    faults: FaultList, params: dict, before: int, after: int, dtype: str
) -> None:
    assert [int(w[0]) for w in faults.words(params)] == [before, after]
    assert faults.activated(params).tolist() == [before != after]
    for word, number in zip((before, after), faults.values(params), strict=True):
        np.testing.assert_equal(number[0], float(unpack(word, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_one_word(dtype: str) -> None:
    """Each bit flipped by a vmapped, jitted inject; each faulty tree has one changed element."""
    array = np.arange(1, 7).reshape(2, 3).astype(jnp.dtype(dtype))
    params = [{"w": array}, {"w": array}]
    with wide_words(dtype):
        sites = [("1/w", (1, 0), bit) for bit in range(word_bits(dtype))]
        faults = FaultList.from_sites(sites, params)
        faulty = jax.jit(jax.vmap(inject, in_axes=(None, 0)))(params, faults.batch())
        golden = words_of(array)
        for bit, tree in enumerate(np.asarray(faulty[1]["w"])):
            expected = [*golden[:3], golden[3] ^ (1 << bit), *golden[4:]]
            assert words_of(tree) == expected
        assert words_of(faulty[0]["w"]) == golden * word_bits(dtype)


def test_mixed_dtypes_and_models_in_one_batch() -> None:
    params = {d: np.arange(4).astype(jnp.dtype(d)) for d in DTYPES if d != "float64"}
    paths = leaf_paths(params)
    lists = [
        FaultList.from_sites([(p, 2, 5)], params, model=m, value=7.0)
        for p in paths
        for m in FAULT_MODELS
    ]
    columns = [np.concatenate([getattr(f, c) for f in lists]) for c in ("leaf", "element", "bit")]
    model, value = (np.concatenate([getattr(f, c) for f in lists]) for c in ("model", "value"))
    faults = FaultList.from_arrays(params, *columns, model, value)
    batched = jax.vmap(inject, in_axes=(None, 0))(params, faults.batch())
    for row in range(len(faults)):
        path, name = paths[faults.leaf[row]], FAULT_MODELS[faults.model[row]]
        expected = words_of(params[path])
        expected[2] = faulty_word(expected[2], 5, name, 7, path)
        assert words_of(np.asarray(batched[path])[row]) == expected
        assert words_of(inject(params, faults.fault(row))[path]) == expected


def test_several_faults_injected_together() -> None:
    params = {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.int16)}
    sites = [("a", 0, 31), ("b", 1, 0), ("a", (1, 1), 31), ("b", 2, 1)]
    faulty = jax.jit(inject)(params, FaultList.from_sites(sites, params).batch())
    assert np.asarray(faulty["a"]).tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    assert np.asarray(faulty["b"]).tolist() == [1, 0, 3]


def test_corrupt_past_the_end_changes_nothing() -> None:
    array = jnp.arange(3.0)
    assert corrupt(array, 3, np.uint32(0), np.uint32(1)).tolist() == [0.0, 1.0, 2.0]
    empty = inject({"empty": jnp.zeros((0, 2)), "w": array}, Fault(1, 0, 0, 0))
    assert empty["empty"].shape == (0, 2)


def test_inject_compiles_once_for_all_faults() -> None:
    params = {"a": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
    faults = FaultList.from_sites([("a", i, i) for i in range(8)] + [("b", 1, 3)], params)
    traces = []

    @jax.jit
    def counted(params: dict, fault: Fault) -> dict:
        traces.append(1)
        return inject(params, fault)

    for row in range(len(faults)):
        counted(params, faults.fault(row))
    assert len(traces) == 1


def test_64_bit_words_are_refused_where_jax_cuts_them() -> None:
    params = {"w": np.ones(3, np.float64)}
    faults = FaultList.from_sites([("w", 0, 63)], params)
    cut = "leaf w is float64, which JAX cuts to 32 bits: set jax_enable_x64, or cast it"
    for use in (faults.batch, lambda: faults.check_injectable(params)):
        with pytest.raises(ValueError, match=cut):
            use()
    with wide_words("float64"):
        faults.check_injectable(params)


def test_what_is_checked_before_a_campaign() -> None:
    params = {"w": np.ones(3, np.float32)}
    faults = FaultList.from_sites([("w", 0, 31)], params)
    faults.check_injectable(params)
    with pytest.raises(ValueError, match="the fault list is empty: allowed is one fault or more"):
        faults[:0].check_injectable(params)
    with pytest.raises(ValueError, match="for other parameters"):
        faults.check_injectable({"w": np.ones(4, np.float32)})
    outside = dataclasses.replace(faults, bit=np.array([32], np.int16))
    with pytest.raises(ValueError, match="bit is outside its word"):
        outside.check_injectable(params)


@pytest.mark.parametrize("dtype", ["bool", "complex64", "int4", "U3"])
def test_dtypes_without_whole_words(dtype: str) -> None:
    with pytest.raises(TypeError, match="allowed are floats and integers"):
        word_bits(dtype)


GOOD_PARAMS = {
    "conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32), "bias": np.zeros(4, jnp.bfloat16)},
    "scale": np.zeros((), np.int8),
}
BAD_SITES = {
    "unknown path": (("conv/weight", 0, 0), {}, r"no leaf 'conv/weight': the leaves are conv/bias"),
    "path is no string": ((["conv"], 0, 0), {}, "is no leaf's path"),
    "flat index too large": (
        ("conv/bias", 4, 0),
        {},
        r"index 4 is outside the leaf's shape \(4,\)",
    ),
    "flat index negative": (("conv/bias", -1, 0), {}, "index -1 is outside"),
    "index of other rank": (("conv/kernel", (0, 0), 0), {}, r"\(0, 0\) is outside"),
    "index too large": (("conv/kernel", (0, 0, 2, 0), 0), {}, r"\(0, 0, 2, 0\) is outside"),
    "index negative": (("conv/kernel", (0, 0, -1, 0), 0), {}, r"\(0, 0, -1, 0\) is outside"),
    "index a fraction": (("conv/bias", 1.5, 0), {}, "float"),
    "index in fractions": (("conv/bias", (1.5,), 0), {}, ""),
    "index a string": (("conv/bias", "1", 0), {}, ""),
    "index of a scalar": (("scale", (0,), 0), {}, r"\(0,\) is outside the leaf's shape \(\)"),
    "bit too large": (("conv/bias", 0, 16), {}, "bit 16 is outside a bfloat16 word.*0 to 15"),
    "bit negative": (("scale", (), -1), {}, "bit -1 is outside a int8 word"),
    "bit missing": (("scale", (), None), {}, "bit None is outside"),
    "bit a fraction": (("scale", (), 1.5), {}, "float"),
    "bit a string": (("scale", (), "1"), {}, "str"),
    "value missing": (("scale", (), None), {"model": "value"}, "needs a value"),
    "value too large": (("scale", (), None), {"model": "value", "value": 128}, "-128 to 127"),
    "value a fraction": (
        ("scale", (), None),
        {"model": "value", "value": 1.5},
        "does not fit int8",
    ),
    "value NaN": (("scale", (), None), {"model": "value", "value": math.nan}, "does not fit int8"),
    "value infinite": (("scale", (), None), {"model": "value", "value": math.inf}, "does not fit"),
    "value a string": (("conv/bias", 0, None), {"model": "value", "value": "x"}, "could not"),
    "a pair": (("conv/bias", 0), {}, "is no site: allowed is a list of"),
}


@pytest.mark.parametrize("site, options, message", BAD_SITES.values(), ids=BAD_SITES)
def test_bad_sites_are_named(site: tuple, options: dict, message: str) -> None:
    good = [] if options else [("conv/bias", 0, 3), ("scale", (), 7)]
    with pytest.raises(ValueError, match=f"^fault {len(good)}: .*{message}"):
        FaultList.from_sites([*good, site], GOOD_PARAMS, **options)


@pytest.mark.parametrize("model", ["bitflip", "", None, 0])
def test_unknown_model(model: object) -> None:
    with pytest.raises(ValueError, match=r"unknown fault model .*allowed are bit-flip, stuck-at-0"):
        FaultList.from_sites([], GOOD_PARAMS, model=model)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"w": np.zeros(2, bool)}, "leaf w is bool, a mask"),
        ({"w": 1.0}, "leaf w is a float: allowed are arrays"),
        ({"w": np.zeros(2, np.complex64)}, "complex64"),
    ],
)
def test_params_that_hold_no_words(params: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FaultList.from_sites([("w", 0, 0)], params)


def test_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two leaves have the path a/b"):
        FaultList.from_sites([], {"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})


OTHER_PARAMS = {
    "path": ({"conv": GOOD_PARAMS["conv"], "shift": GOOD_PARAMS["scale"]}, "has scale int8"),
    "shape": ({**GOOD_PARAMS, "scale": np.zeros(2, np.int8)}, r"parameters have int8 \(2,\)"),
    "dtype": ({**GOOD_PARAMS, "scale": np.zeros((), np.uint8)}, r"parameters have uint8 \(\)"),
    "leaf more": ({**GOOD_PARAMS, "shift": np.zeros(1)}, "it lacks leaf shift"),
    "order": (
        collections.OrderedDict(scale=GOOD_PARAMS["scale"], conv=GOOD_PARAMS["conv"]),
        "order conv/bias, conv/kernel, scale, the parameters have scale, conv/bias",
    ),
}


@pytest.mark.parametrize("params, message", OTHER_PARAMS.values(), ids=OTHER_PARAMS)
def test_a_list_for_other_parameters(params: dict, message: str) -> None:
    faults = FaultList.from_sites([("conv/bias", 0, 0)], GOOD_PARAMS)
    faults.validate(GOOD_PARAMS)
    with pytest.raises(ValueError, match=f"for other parameters: .*{message}"):
        faults.validate(params)
    with pytest.raises(ValueError, match="for other parameters"):
        faults.activated(params)


def test_csv_is_whole_or_as_it_was(tmp_path: Path) -> None:
    """A real write that fails half way: the system allows no file of more than 4,000 bytes."""
    path = tmp_path / "faults.csv"
    few = FaultList.from_sites([("conv/bias", 0, 0)], GOOD_PARAMS)
    few.to_csv(path)
    before = path.read_bytes()
    many = few[np.zeros(1000, int)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*faults\.csv"):
            many.to_csv(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    many.to_csv(path)
    assert FaultList.from_csv(path, GOOD_PARAMS) == many


def test_rows_of_a_list() -> None:
    faults = FaultList.from_sites([("conv/bias", i, 2 * i) for i in range(4)], GOOD_PARAMS)
    for rows in (slice(1, 3), np.array([False, True, True, False]), np.array([1, 2])):
        assert faults[rows].bit.tolist() == [2, 4]
        assert faults[rows] == faults[1:3]
    assert faults[3].bit.tolist() == [6]
    assert [len(fault) for fault in faults] == [1] * 4
    assert faults != faults[:3]
    assert faults != "a list"
    assert len(faults[:0]) == 0
    assert faults[:0].batch().leaf.shape == (0,)
    with pytest.raises(TypeError, match="unhashable"):
        hash(faults)


@st.composite
def fault_lists(draw: st.DrawFn) -> FaultList:
    leaf = st.sampled_from(leaf_paths(GOOD_PARAMS))
    lists = []
    for path in draw(st.lists(leaf, max_size=6)):
        model = draw(st.sampled_from(FAULT_MODELS))
        array = GOOD_PARAMS[path] if path == "scale" else GOOD_PARAMS["conv"][path[5:]]
        element = draw(st.integers(0, array.size - 1))
        bit = draw(st.integers(0, word_bits(array.dtype) - 1))
        floats = st.integers(-128, 127) if path == "scale" else st.floats()
        value = draw(floats) if model == "value" else None
        lists.append(
            FaultList.from_sites([(path, element, bit)], GOOD_PARAMS, model=model, value=value)
        )
    columns = ("leaf", "element", "bit", "model", "value")
    joined = [np.concatenate([[], *(getattr(f, c) for f in lists)]) for c in columns]
    return FaultList.from_arrays(GOOD_PARAMS, *joined)


@given(faults=fault_lists())
@FEW
def test_csv_round_trip(tmp_path_factory: pytest.TempPathFactory, faults: FaultList) -> None:
    path = tmp_path_factory.mktemp("csv") / "faults.csv"
    faults.to_csv(path)
    assert FaultList.from_csv(path, GOOD_PARAMS) == faults


def test_csv_of_awkward_paths(tmp_path: Path) -> None:
    params = {'a,"b"': np.zeros(2, np.float32), "é\nß": np.zeros((), np.float32)}
    faults = FaultList.from_sites([('a,"b"', 1, 3), ("é\nß", (), 31)], params)
    faults.to_csv(tmp_path / "faults.csv")
    assert FaultList.from_csv(tmp_path / "faults.csv", params) == faults


def csv_file(tmp_path: Path, change: dict[str, str] | None) -> Path:
    """A good file of three faults; `change` replaces fields of the last row."""
    faults = FaultList.from_sites([("conv/bias", i, i) for i in range(3)], GOOD_PARAMS)
    faults.to_csv(tmp_path / "good.csv")
    with open(tmp_path / "good.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[2].update(change or {})
    with open(tmp_path / "bad.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "bad.csv"


BAD_FIELDS = {
    "path": ({"path": "conv2/bias"}, "no leaf 'conv2/bias'"),
    "index": ({"index": "(4,)"}, r"index \(4,\) is outside the leaf's shape \(4,\)"),
    "index text": ({"index": "__import__('os')"}, "is not an index"),
    "index negative": ({"index": "(-1,)"}, "is not an index"),
    "index endless": ({"index": "(" + "1" * 60 + "x"}, "is not an index"),
    "bit": ({"bit": "16"}, "bit 16 is outside a bfloat16 word"),
    "bit text": ({"bit": "msb"}, "invalid literal"),
    "bit missing": ({"bit": ""}, "bit None is outside"),
    "model": ({"model": "gremlin"}, "unknown fault model 'gremlin'"),
    "value missing": ({"model": "value"}, "needs a value"),
    "value text": ({"model": "value", "value": "high"}, "could not convert"),
    "shape": ({"shape": "(5,)"}, r"it is for conv/bias 'bfloat16' \(5,\), the parameters have"),
    "dtype": ({"dtype": "float16"}, "it is for conv/bias 'float16'"),
}


@pytest.mark.parametrize("change, message", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_csv_names_file_and_row(tmp_path: Path, change: dict, message: str) -> None:
    path = csv_file(tmp_path, change)
    with pytest.raises(ValueError, match=rf"bad\.csv: fault 2: .*{message}"):
        FaultList.from_csv(path, GOOD_PARAMS)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"columns are \(\)"),
        (b"leaf,bit\n", r"columns are \('leaf', 'bit'\)"),
        (b"PAR1\x00\xff\xfe", "columns are"),
        (b"path,index,bit,model,value,shape,dtype\nscale,()\n", "fault 0: it has 2 fields, not 7"),
        (b"path,index,bit,model,value,shape,dtype\n1,2,3,4,5,6,7,8\n", "it has 8 fields"),
        (b"path,index,bit,model,value,shape,dtype\n\xff,(),0,null,,(),int8\n", "fault 0: no leaf"),
        (b'path,index,bit,model,value,shape,dtype\n"scale,(),', "line 2: unexpected end of data"),
        (b"path,index,bit,model,value,shape,dtype\n" + b"x" * 200_000, "line 2: field larger"),
    ],
)
def test_foreign_csv(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "foreign.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"foreign\.csv: .*{message}"):
        FaultList.from_csv(tmp_path / "foreign.csv", GOOD_PARAMS)


@given(junk=st.binary(max_size=12), start=st.integers(0, 250), length=st.integers(0, 20))
@hypothesis.settings(max_examples=150, deadline=None)
def test_damaged_csv_is_an_error_or_a_list(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, start: int, length: int
) -> None:
    """Any bytes cut out and any put in: a valid list or a ValueError with the file's name."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    path = csv_file(tmp_path, None)
    content = path.read_bytes()
    path.write_bytes(content[:start] + junk + content[start + length :])
    try:
        faults = FaultList.from_csv(path, GOOD_PARAMS)
        message = str(path)
    except ValueError as error:
        faults, message = None, str(error)
    assert message.startswith(str(path))
    assert message.encode("utf-8")
    assert faults is None or faults.element.max(initial=0) < 4


@given(text=st.text(alphabet="(),0 123456789-x", max_size=60))
def test_parse_index_is_python(text: str) -> None:
    """What is accepted means what Python's own literals mean."""
    try:
        index = parse_index(text)
    except ValueError:
        return
    digits = [int(part) for part in text.strip("()").split(",") if part.strip()]
    assert index == (tuple(digits) if text.startswith("(") else digits[0])


def test_a_fault_of_other_parameters_is_named() -> None:
    params = {"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
    faults = jaxfi.exhaustive_faults(params, bits=[31])
    with pytest.raises(ValueError, match="leaf 1, element 0: the leaves of .* have 3 elements"):
        jaxfi.inject({"a": params["a"]}, faults.fault(3))
    with pytest.raises(ValueError, match="leaf 0, element 2: the leaves of .* have 2, 2 elements"):
        jaxfi.inject({"a": params["b"], "b": params["b"]}, faults.fault(2))
    together = faults[[0, 4]].batch()
    with pytest.raises(ValueError, match="leaf 1, element 1"):
        jaxfi.inject({"a": params["a"], "b": params["b"][:1]}, together)


@pytest.mark.parametrize(
    "sites", [5, None, "a", ["a"], [5], [("a", 0)], [("a", 0, 31, 7)], [("a", 0, 31), None]]
)
def test_what_is_no_list_of_sites_is_named(sites) -> None:
    with pytest.raises((TypeError, ValueError), match=r"allowed is a list of \(path, index, bit\)"):
        jaxfi.FaultList.from_sites(sites, {"a": np.ones(3, np.float32)})


def test_masks_may_be_pythons_integers() -> None:
    found = jaxfi.corrupt(np.float32([1, 2]), 1, 0xFFFF_FFFF, 1 << 31)
    np.testing.assert_array_equal(found, np.float32([1, -2]))
    found = jaxfi.corrupt(np.float32([1, 2]), 1, ~0, 1 << 31)
    np.testing.assert_array_equal(found, np.float32([1, -2]))
