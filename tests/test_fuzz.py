"""Files from strangers: whatever their bytes, a reader returns or says in one line what is wrong.

A short run by default. `JAXFI_FUZZ_INPUTS=100000 pytest tests/test_fuzz.py -m ''` runs so many
inputs through each reader.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from hypothesis import strategies as st

from experiments.config import check_same_config, config_from_flags, define_flags
from jaxfi.checkpoint import load_checkpoint, save_checkpoint
from jaxfi.chunks import Chunk, decode_chunk, encode_chunk, pack_outcomes
from jaxfi.convert import load_state, read_fault_list, read_results
from jaxfi.description import (
    CAMPAIGN_FILE,
    LIST_COLUMNS,
    describe,
    read_description,
    read_faults,
    signed,
)
from jaxfi.fault_list import FaultList
from jaxfi.files import content_hash, read_npz, to_npz
from jaxfi.sampling import sample_faults
from tests.test_gr import SMALL
from tests.test_store import PARAMS

NUM_INPUTS = int(os.environ.get("JAXFI_FUZZ_INPUTS", "60"))
NETWORK = {
    "conv1": {"kernel": np.zeros((3, 3, 1, 4), np.float32)},
    "fc1": {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)},
}
FAULTS = sample_faults(0, PARAMS, 6, model="stuck-at", by="network")

Reader = Callable[[Path, bytes], object]


def csv_content() -> bytes:
    return (
        b"path,index,bit,model,value,shape,dtype\r\n"
        b'conv/kernel,"(1, 2, 3)",30,bit-flip,,"(3, 3, 6)",float32\r\n'
        b"dense,7,,value,1.5,(8,),bfloat16\r\n"
        b"scale,(),0,stuck-at-1,,(),int8\r\n"
    )


def list_content() -> bytes:
    return b'Injection,Layer,TensorIndex,Bit\n0,conv1,"(3, 0, 2, 1)",30\n1,fc1,5,3\n'


def results_content() -> bytes:
    return (
        b"Injection,Layer,TensorIndex,Bit,n_injections,masked,non_critical,critical\n"
        b'0,conv1,"(3, 0, 2, 1)",30,10,5,4,1\n1,fc1.bias,1,3,10,10,0,0\n'
    )


@functools.cache
def npz_content() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"conv1.weight": np.arange(12, dtype=np.float32), "n": np.array(3)})
    return buffer.getvalue()


@functools.cache
def safetensors_content() -> bytes:
    return safetensors.numpy.save({"conv1.weight": np.arange(12, dtype=np.float32)})


@functools.cache
def torch_content() -> bytes:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.arange(12.0)}, buffer)
    return buffer.getvalue()


@functools.cache
def onnx_content() -> bytes:
    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.arange(12, dtype=np.float32), "conv1.weight")
    graph = onnx.helper.make_graph([], "network", [], [], [weights])
    return onnx.helper.make_model(graph).SerializeToString()


@functools.cache
def chunk_content() -> bytes:
    packed = pack_outcomes(np.ones((6, 9), np.uint8), np.zeros((6, 9), bool))
    chunk = Chunk(np.arange(6), packed, np.full(6, 9, np.int32))
    return encode_chunk(chunk, FAULTS, FAULTS.values(PARAMS), 9, "campaign")


@functools.cache
def stored_content() -> bytes:
    return to_npz({"leaf": FAULTS.leaf, "golden": np.arange(6, dtype=np.float32)})


def flags_content() -> bytes:
    return b"# A comment.\n--dataset=digits\n--epochs=3\n--alpha=0.1\n--noaugment\n--seed=7\n"


def config_content() -> bytes:
    return b'{"dataset": "digits", "epochs": 3, "alpha": 0.1, "augment": false, "seed": null}'


@functools.cache
def list_file() -> bytes:
    columns = {name: getattr(FAULTS, name) for name in LIST_COLUMNS}
    before, after = FAULTS.values(PARAMS)
    return to_npz({**columns, "before": before, "after": after})


@functools.cache
def description_content() -> bytes:
    return json.dumps(
        describe({"seed": 3, "precision": "highest"}, FAULTS, 9, list_file())
    ).encode()


def read_stored(path: Path, content: bytes) -> object:
    named = path.with_name(f"faults-{content_hash(content)}.npz")  # its name promises what it holds
    path.rename(named)
    try:
        return read_npz(named)
    finally:
        named.unlink()


def read_flags(path: Path, content: bytes) -> object:
    values = flags.FlagValues()
    define_flags(values)
    try:
        values(["gr", f"--flagfile={path}"])
        config = config_from_flags(values)
        config.validate()
    except (
        flags.Error,
        UnicodeDecodeError,
        RecursionError,
    ) as error:  # parse_flags ends the program with it
        raise ValueError(str(error)) from None
    return config


def read_config(path: Path, content: bytes) -> object:
    path.rename(path.with_name("config.json"))
    return check_same_config(SMALL, path.parent)


def read_campaign(path: Path, content: bytes) -> object:
    """Beside its fault list, and with the checksum that fits, where it is JSON."""
    (path.parent / LIST_FILE).write_bytes(list_file())
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
        content = json.dumps(signed(json.loads(content))).encode()
    path.with_name(CAMPAIGN_FILE).write_bytes(content)
    return read_faults(path.parent, read_description(path.parent))


LIST_FILE = f"faults-{content_hash(list_file())}.npz"
READERS: dict[str, tuple[Callable[[], bytes], str, Reader]] = {
    "fault list": (csv_content, "a.csv", lambda path, _: FaultList.from_csv(path, PARAMS)),
    "field's fault list": (list_content, "b.csv", lambda path, _: read_fault_list(path, NETWORK)),
    "field's results": (results_content, "c.csv", lambda path, _: read_results(path, NETWORK)),
    "npz": (npz_content, "d.npz", lambda path, _: load_state(path)),
    "safetensors": (safetensors_content, "e.safetensors", lambda path, _: load_state(path)),
    "torch": (torch_content, "f.pt", lambda path, _: load_state(path)),
    "onnx": (onnx_content, "k.onnx", lambda path, _: load_state(path)),
    "chunk": (chunk_content, "g", lambda _, content: decode_chunk(content, 6, 9, "campaign")),
    "stored arrays": (stored_content, "h.npz", read_stored),
    "flagfile": (flags_content, "i.flags", read_flags),
    "config": (config_content, "j.json", read_config),
    "description": (description_content, CAMPAIGN_FILE, read_campaign),
}
OWN_FILES = {"config.json", LIST_FILE}  # what the tests themselves make beside

# An edit: where, how many bytes go, what comes in their place, how often.
PLACES, ONCE = st.floats(0, 1), st.just(1)
BYTES = st.tuples(PLACES, st.integers(0, 12), st.binary(max_size=12), ONCE)
TEXTS = st.sampled_from([
    b'"', b",", b"\n", b"\x00", b"-1", b"99999999999999999999", b"1e400", b"nan", b"(", b"--", b"=",
    b"../", b"{", b"[", b"\xff\xfe", b"PK",
])  # fmt: skip
PLANTED = st.tuples(PLACES, st.integers(0, 4), TEXTS, ONCE | st.sampled_from([1, 1, 1, 200_000]))
EDITS = st.lists(BYTES | PLANTED, min_size=1, max_size=4)


def edited(content: bytes, edits: list[tuple[float, int, bytes, int]]) -> bytes:
    for place, length, new, times in edits:
        start = int(place * len(content))
        content = content[:start] + times * new + content[start + length :]
    return content


def thorough(function: Callable) -> Callable:
    health = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    return hypothesis.settings(
        max_examples=NUM_INPUTS, deadline=None, suppress_health_check=health, database=None
    )(function)


# Parsers warn of what they guess about: here the guess is refused or read.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
@thorough
@hypothesis.given(edits=EDITS, whole=st.none() | st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(
    name: str, edits: list, whole: bytes | None, tmp_path
) -> None:
    make, file_name, read = READERS[name]
    content = edited(make(), edits) if whole is None else whole
    path = tmp_path / file_name
    path.write_bytes(content)
    try:
        read(path, content)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    assert {p.name for p in tmp_path.iterdir()} <= {file_name, *OWN_FILES}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = {"variables": {"params": {"kernel": np.linspace(0, 1, 12).reshape(3, 4)}}}
    save_checkpoint(folder, tree, {"epoch": 3})
    return folder


# orbax drops unfinished coroutines when a read fails: noise of its own, after its error.
@pytest.mark.filterwarnings("ignore")
@hypothesis.settings(
    max_examples=max(5, NUM_INPUTS // 20), deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
@hypothesis.given(edits=EDITS, choice=st.floats(0, 1, exclude_max=True))
def test_any_checkpoint_is_read_or_refused(checkpoint: Path, edits: list, choice: float) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = files[int(choice * len(files))]
    content = path.read_bytes()
    kept = shutil.copytree(checkpoint, checkpoint.with_name("kept"), dirs_exist_ok=True)
    path.write_bytes(edited(content, edits))
    try:
        tree, _ = load_checkpoint(checkpoint)
        assert np.array_equal(tree["variables"]["params"]["kernel"].reshape(-1)[:2], [0, 1 / 11])
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    finally:
        shutil.rmtree(checkpoint)
        shutil.move(kept, checkpoint)
