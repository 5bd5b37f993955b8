"""Programs that are kept for the next process."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxfi.engine import _cache
from jaxfi.engine._cache import programs_kept

CAMPAIGN = """
import collections, json
import jax, numpy as np
import jaxfi
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rpartition("/")[2]]))
random = np.random.default_rng(0)
params = {"a": random.normal(size=(6, 8)), "b": random.normal(size=(8, 4))}
params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
images = random.normal(size=(20, 6)).astype(np.float32)
def network(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]
c = jaxfi.run_campaign(network, params, jaxfi.sample_faults(0, params, 40), images, [0] * 20)
jax.jit(lambda x: x * 3 + 1)(1.0)  # the user's own
print(json.dumps([seen["cache_hits"], seen["cache_misses"], c.outcomes.tolist()]))
"""


def run(folder: Path | str | None, **environment: str) -> tuple[int, int, list]:
    """Programs that were read and that were compiled, and the outcomes."""
    variables = {k: v for k, v in os.environ.items() if k != "JAXFI_CACHE_DIR"} | environment
    variables |= {} if folder is None else {"JAXFI_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CAMPAIGN],
        env=variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*-cache"))


def test_a_second_process_compiles_nothing(tmp_path) -> None:
    folder = tmp_path / "programs"
    read, compiled, outcomes = run(folder)
    assert compiled > 5
    assert len(programs(folder)) == read + compiled or read == 0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    again = run(folder)
    assert again == [compiled + read, 0, outcomes]
    damaged, torn, *_ = programs(folder)
    damaged.write_bytes(b"\x78" + os.urandom(200))
    torn.write_bytes(torn.read_bytes()[:100])
    assert run(folder) == [compiled + read - 2, 2, outcomes]
    assert run(folder) == again  # and were written anew


def test_the_default_is_in_the_users_cache_and_empty_is_none(tmp_path) -> None:
    run(None, XDG_CACHE_HOME=str(tmp_path))
    assert programs(tmp_path / "jaxfi" / "programs")
    assert run("", XDG_CACHE_HOME=str(tmp_path))[0] == 0


def test_the_users_own_folder_comes_first(tmp_path) -> None:
    _, compiled, _ = run(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "x"))
    assert len(programs(tmp_path / "x")) >= compiled > 5
    assert not programs(tmp_path / "ours")


def test_a_folder_that_others_can_write_is_refused(tmp_path, monkeypatch) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("JAXFI_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="others can write it, and JAX runs what it reads there"):
        programs_kept().__enter__()
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXFI_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="File exists.*: allowed is a folder of your own"):
        programs_kept().__enter__()
    monkeypatch.setenv("JAXFI_CACHE_DIR", "gs://bucket/programs")
    with pytest.raises(ValueError, match="allowed are absolute paths, and none"):
        programs_kept().__enter__()
    monkeypatch.delenv("JAXFI_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jaxfi" / "programs").mkdir(parents=True)
    (tmp_path / "jaxfi" / "programs").chmod(0o770)
    with (
        pytest.warns(UserWarning, match="programs are not kept in .*: others can"),
        programs_kept(),
    ):
        assert jax.config.jax_compilation_cache_dir is None


def test_settings_are_the_users_again(tmp_path, monkeypatch) -> None:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    monkeypatch.setenv("JAXFI_CACHE_DIR", str(tmp_path / "programs"))
    with programs_kept(), programs_kept():
        assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "programs"
    assert [getattr(jax.config, name) for name in names] == before
    with pytest.raises(KeyError), programs_kept():
        raise KeyError
    assert [getattr(jax.config, name) for name in names] == before


def test_the_oldest_programs_go_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXFI_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setattr(_cache, "_LIMIT", 250)
    for age in range(5):
        other = tmp_path / "programs" / "another-machine"
        other.mkdir(parents=True, exist_ok=True)
        (other / f"{age}-cache").write_bytes(bytes(100))
        os.utime(other / f"{age}-cache", (1000 - age, 1000 - age))
    (tmp_path / "programs").chmod(0o700)
    with programs_kept():
        assert [path.name for path in programs(tmp_path)] == ["0-cache", "1-cache"]


def test_a_full_disk_keeps_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXFI_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setattr(_cache, "_LEAST_FREE", 2**63)
    with pytest.warns(UserWarning, match="the disk is full"), programs_kept():
        assert jax.config.jax_compilation_cache_dir is None
