"""Checkpoints: round trip, versions, damage."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfi.training import _checkpoint as checkpoint
from jaxfi.training import has_checkpoint, load_checkpoint, load_variables, save_checkpoint

TREE = {
    "variables": {"params": {"conv": {"kernel": np.linspace(0, 1, 12).reshape(3, 4)}}},
    "rest": {"00000": np.int32(7).reshape(()), "00001": np.array([1.5, np.nan], np.float32)},
}


def test_round_trip_keeps_bits_and_info(tmp_path):
    save_checkpoint(tmp_path / "last", TREE, {"epoch": 3, "history": [[1, 0.25]]})
    tree, info = load_checkpoint(tmp_path / "last")
    assert info == {"epoch": 3, "history": [[1, 0.25]]}
    for name in TREE["rest"]:
        assert tree["rest"][name].dtype == TREE["rest"][name].dtype
        assert tree["rest"][name].tobytes() == TREE["rest"][name].tobytes()
    kernel = load_variables(tmp_path / "last")["params"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, TREE["variables"]["params"]["conv"]["kernel"])


def test_jax_arrays_and_bfloat16(tmp_path):
    save_checkpoint(tmp_path, {"variables": {"a": jnp.ones(3, jnp.bfloat16)}}, {})
    assert load_variables(tmp_path)["a"].dtype == jnp.bfloat16


def test_newest_version_wins_and_older_ones_go(tmp_path):
    for number in range(3):
        save_checkpoint(tmp_path, {"variables": {"a": np.full(2, number)}}, {"number": number})
    assert load_checkpoint(tmp_path)[1] == {"number": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, TREE, {"number": 0})

    class FullDisk:
        def save(self, *args, **kwargs):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_orbax", FullDisk)
    with pytest.raises(OSError, match="cannot write the checkpoint .*No space left"):
        save_checkpoint(tmp_path, TREE, {"number": 1})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1] == {"number": 0}


def test_absent(tmp_path):
    assert not has_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        load_variables(tmp_path / "none")


def test_foreign(tmp_path):
    (tmp_path / "000000").mkdir()
    (tmp_path / "000000" / "weights.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_checkpoint(tmp_path)


def test_orbax_checkpoint_of_somebody_else(tmp_path):
    checkpoint._orbax().save(tmp_path / "000000", {"a": np.ones(2)})
    with pytest.raises(ValueError, match="it is not marked as jaxfi-checkpoint-2"):
        load_checkpoint(tmp_path)


def rewrite(folder: Path, change) -> None:
    """Changes what orbax keeps of ours beside the arrays, in place."""
    path = folder / "000000" / "_CHECKPOINT_METADATA"
    written = json.loads(path.read_bytes())
    change(written["custom_metadata"])
    path.write_text(json.dumps(written))


@pytest.mark.parametrize(
    "change",
    [
        lambda ours: ours["info"].update(epoch=5),
        lambda ours: ours.pop("info"),
        lambda ours: ours.pop("digest"),
        lambda ours: ours.update(info=[3]),
        lambda ours: ours.update(format="jaxfi-checkpoint-1"),
    ],
)
def test_altered_info_is_told(tmp_path, change):
    save_checkpoint(tmp_path, TREE, {"epoch": 3})
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="damaged or foreign"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_whose_digest_is_of_the_tree_only_is_read(tmp_path):
    save_checkpoint(tmp_path, TREE, {"epoch": 3})
    old = {"format": "jaxfi-checkpoint-1", "digest": checkpoint._digest(TREE)}
    rewrite(tmp_path, lambda ours: ours.update(old))
    assert load_checkpoint(tmp_path)[1] == {"epoch": 3}


def test_a_checkpoint_without_variables_is_named(tmp_path):
    save_checkpoint(tmp_path, {"00000": np.ones(2)}, {})
    with pytest.raises(ValueError, match="holds 00000: allowed is a training's folder"):
        load_variables(tmp_path)


# orbax drops unfinished coroutines when a read fails: noise of its own, after its error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damage_to_any_file_is_told_or_harmless(tmp_path, damage):
    save_checkpoint(tmp_path, TREE, {})
    told = []
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        half = len(content) // 2
        flipped = bytes(byte ^ 0xFF for byte in content[half:])
        path.write_bytes(content[:half] + (flipped if damage == "altered" else b""))
        told.append(_load_outcome(tmp_path))
        path.write_bytes(content)
    assert set(told) <= {"told", "harmless"}
    assert told.count("told") >= 2


def _load_outcome(folder) -> str:
    try:
        tree, _ = load_checkpoint(folder)
    except ValueError as error:
        return "told" if "damaged or foreign" in str(error) else str(error)
    same = tree["rest"]["00001"].tobytes() == TREE["rest"]["00001"].tobytes()
    return "harmless" if same else "wrong"


def test_orbax_leaves_no_loop_behind(tmp_path, monkeypatch):
    """Of damaged checkpoints too, and beside a loop that runs, as in a notebook."""
    loops = []

    class Recorded(checkpoint._SettledLoop):
        def __init__(self):
            super().__init__()
            loops.append(self)

    def loops_of_uvloop():
        raise AssertionError("they end as errors wherever they are collected")

    monkeypatch.setattr(checkpoint, "_SettledLoop", Recorded)
    monkeypatch.setattr(pytest.importorskip("uvloop"), "new_event_loop", loops_of_uvloop)

    def save_load_and_damage():
        save_checkpoint(tmp_path, TREE, {})
        assert load_checkpoint(tmp_path)[1] == {}
        (manifest,) = tmp_path.glob("*/*/manifest.ocdbt")
        manifest.write_bytes(manifest.read_bytes()[:20])
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(tmp_path)

    async def in_a_notebook():
        save_load_and_damage()

    save_load_and_damage()
    alone = len(loops)
    asyncio.run(in_a_notebook())
    assert len(loops) > alone > 0
    assert all(loop.is_closed() for loop in loops)
