"""Files from strangers: whatever their bytes, a reader returns or says in one line what is wrong.

A short run by default. `JAXFI_FUZZ_INPUTS=100000 pytest tests/test_fuzz.py` makes so many inputs,
each of which goes through every reader; `--basetemp` on a memory disk spares the real one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from absl import flags
from hypothesis import strategies as st

from experiments.common.config import check_same_config, config_from_flags, define_flags, read_flags
from jaxfi.campaign._chunks import Chunk, decode_chunk, encode_chunk, pack_outcomes
from jaxfi.campaign._description import (
    CAMPAIGN_FILE,
    LIST_COLUMNS,
    describe,
    read_description,
    read_faults,
    signed,
)
from jaxfi.convert import load_state, read_fault_list, read_results
from jaxfi.data._files import content_hash, read_npz, to_npz
from jaxfi.faults import FaultList, sample_faults
from jaxfi.training import load_checkpoint, save_checkpoint
from tests.campaign.test_store import PARAMS
from tests.experiments.test_gr import SMALL

NUM_INPUTS = int(os.environ.get("JAXFI_FUZZ_INPUTS", "60"))
NETWORK = {
    "conv1": {"kernel": np.zeros((3, 3, 1, 4), np.float32)},
    "fc1": {"kernel": np.zeros((64, 2), np.float32), "bias": np.zeros(2, np.float32)},
}
FAULTS = sample_faults(0, PARAMS, 6, model="stuck-at", by="network")

Reader = Callable[[Path, bytes], object]
Edits = Sequence[tuple[float, int, bytes, int]]


def csv_content() -> bytes:
    return (
        b"path,index,bit,model,value,shape,dtype\r\n"
        b'conv/kernel,"(1, 2, 3)",30,bit-flip,,"(3, 3, 6)",float32\r\n'
        b'dense,7,,value,1.5,"(8,)",bfloat16\r\n'
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
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.arange(12.0)}, buffer)
    return buffer.getvalue()


@functools.cache
def pickle_content() -> bytes:
    """What a PyTorch file says of its tensors, which its reader takes apart by itself."""
    with zipfile.ZipFile(io.BytesIO(torch_content())) as archive:
        return archive.read("archive/data.pkl")


@functools.cache
def npy_content() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(12, dtype=np.float32))
    return buffer.getvalue()


@functools.cache
def onnx_content() -> bytes:
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
    return json.dumps(dataclasses.asdict(SMALL)).encode()


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


def read_pickle(path: Path, content: bytes) -> object:
    """In a PyTorch file whose checksums are right, so that the content is looked at.

    No more than 1,000 bytes: a name that is not allowed goes into PyTorch's message, whose making
    takes time with the square of its length (PyTorch 2.13: minutes for 200,000 characters).
    """
    with (
        zipfile.ZipFile(io.BytesIO(torch_content())) as right,
        zipfile.ZipFile(path, "w") as archive,
    ):
        for name in right.namelist():
            edited = name == "archive/data.pkl"
            archive.writestr(name, content[:1000] if edited else right.read(name))
    return load_state(path)


def read_npy(path: Path, content: bytes) -> object:
    """In an .npz whose checksums are right."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", content)
    return load_state(path)


def read_stored(path: Path, content: bytes) -> object:
    named = path.with_name(f"faults-{content_hash(content)}.npz")  # its name promises what it holds
    path.rename(named)
    try:
        return read_npz(named)
    finally:
        named.unlink()


def read_flagfile(path: Path, content: bytes) -> object:
    values = flags.FlagValues()
    define_flags(values)
    left = read_flags(["gr", f"--flagfile={path}"], values)
    config = config_from_flags(values)
    config.validate()
    return config, left


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


def fault_list(path: Path):
    return read_fault_list(path, NETWORK, flattened={})


def results(path: Path):
    return read_results(path, NETWORK, flattened={})


LIST_FILE = f"faults-{content_hash(list_file())}.npz"
READERS: dict[str, tuple[Callable[[], bytes], str, Reader]] = {
    "fault list": (csv_content, "a.csv", lambda path, _: FaultList.from_csv(path, PARAMS)),
    "field's fault list": (
        list_content,
        "b.csv",
        lambda path, _: read_fault_list(path, NETWORK, flattened={}),
    ),
    "field's results": (
        results_content,
        "c.csv",
        lambda path, _: read_results(path, NETWORK, flattened={}),
    ),
    "npz": (npz_content, "d.npz", lambda path, _: load_state(path)),
    "safetensors": (safetensors_content, "e.safetensors", lambda path, _: load_state(path)),
    "torch": (torch_content, "f.pt", lambda path, _: load_state(path)),
    "torch's pickle": (pickle_content, "l.pt", read_pickle),
    "npz's array": (npy_content, "m.npz", read_npy),
    "onnx": (onnx_content, "k.onnx", lambda path, _: load_state(path)),
    "chunk": (chunk_content, "g", lambda _, content: decode_chunk(content, 6, 9, "campaign")),
    "stored arrays": (stored_content, "h.npz", read_stored),
    "flagfile": (flags_content, "i.flags", read_flagfile),
    "config": (config_content, "j.json", read_config),
    "description": (description_content, CAMPAIGN_FILE, read_campaign),
}
OWN_FILES = {"config.json", LIST_FILE, *(file_name for _, file_name, _ in READERS.values())}

# An edit: where, how many bytes go, what comes in their place, how often.
PLACES, ONCE = st.floats(0, 1), st.just(1)
BYTES = st.tuples(PLACES, st.integers(0, 12), st.binary(max_size=12), ONCE)
TEXTS = st.sampled_from([
    b'"', b",", b"\n", b"\x00", b"-1", b"99999999999999999999", b"1e400", b"nan", b"(", b"--", b"=",
    b"../", b"{", b"[", b"\xff\xfe", b"PK",
])  # fmt: skip
PLANTED = st.tuples(PLACES, st.integers(0, 4), TEXTS, ONCE | st.sampled_from([1] * 7 + [200_000]))
REPLACED = st.tuples(st.tuples(st.just(0), st.just(10**9), st.binary(max_size=60), ONCE))
EDITED = st.lists(BYTES | PLANTED, min_size=1, max_size=4)
EDITS = EDITED | EDITED | EDITED | REPLACED  # three in four


def edited(content: bytes, edits: Edits) -> bytes:
    for place, length, new, times in edits:
        start = int(place * len(content))
        content = content[:start] + times * new + content[start + length :]
    return content


def thorough(num_inputs: int) -> Callable[[Callable], Callable]:
    return hypothesis.settings(
        max_examples=num_inputs, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_file_that_is_edited_is_right(name: str, tmp_path: Path) -> None:
    make, file_name, read = READERS[name]
    (tmp_path / file_name).write_bytes(make())
    read(tmp_path / file_name, make())


# Parsers warn of what they guess about: here the guess is refused or read.
@pytest.mark.filterwarnings("ignore")
@thorough(NUM_INPUTS)
@hypothesis.given(edits=EDITS)
def test_any_bytes_are_read_or_refused(edits: Edits, tmp_path: Path) -> None:
    """Drawing an input takes ten times as long as reading it: all readers share the inputs."""
    for name, (make, file_name, read) in READERS.items():
        content, path = edited(make(), edits), tmp_path / file_name
        path.write_bytes(content)
        try:
            read(path, content)
        except (ValueError, OSError) as error:
            assert str(error), name  # noqa: PT017
        except BaseException as error:
            error.add_note(f"the reader of: {name}")
            raise
    assert set(os.listdir(tmp_path)) <= OWN_FILES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = {"variables": {"params": {"kernel": np.linspace(0, 1, 12).reshape(3, 4)}}}
    save_checkpoint(folder, tree, {"epoch": 3})
    return folder


# orbax drops unfinished coroutines when a read fails: noise of its own, after its error.
@pytest.mark.filterwarnings("ignore")
@thorough(max(5, NUM_INPUTS // 20))
@hypothesis.given(edits=EDITS, choice=st.floats(0, 1, exclude_max=True))
@hypothesis.example(edits=[(0.953125, 1, b"", 1)], choice=0.0)  # no "info"; no "digest"
@hypothesis.example(edits=[(0.75, 1, b"", 1)], choice=0.0)
def test_any_checkpoint_is_read_or_refused(checkpoint: Path, edits: Edits, choice: float) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = files[int(choice * len(files))]
    content = path.read_bytes()
    path.write_bytes(edited(content, edits))
    try:
        tree, info = load_checkpoint(checkpoint)
        assert info == {"epoch": 3}
        assert np.array_equal(tree["variables"]["params"]["kernel"].reshape(-1)[:2], [0, 1 / 11])
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    finally:
        path.write_bytes(content)
    assert sorted(path for path in checkpoint.rglob("*") if path.is_file()) == files
