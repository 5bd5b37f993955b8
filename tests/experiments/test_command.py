"""The command line that all experiments share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments.common.command import one_line, run_command, workdir_from
from experiments.common.config import define_flags, parse_flags, read_flags
from jaxfi.campaign import NotReproducible


@pytest.fixture(autouse=True)
def _no_signal_handlers(monkeypatch):
    monkeypatch.setattr("experiments.common.command.stop_soon", lambda message: None)


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, FloatingPointError])
def test_what_is_wrong_ends_the_program_in_one_line(kind):
    def fails():
        raise kind("one\n  two")

    with pytest.raises(SystemExit, match=r"^error: one two$"):
        run_command(["program"], fails)


def test_a_campaign_that_does_not_repeat_ends_in_one_line():
    def fails():
        raise NotReproducible("null faults differ")

    with pytest.raises(SystemExit, match="error: null faults differ"):
        run_command(["program"], fails)


def test_other_errors_are_ours_and_keep_their_traceback():
    def fails():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_command(["program"], fails)


def test_a_loose_word_is_refused_before_any_work():
    with pytest.raises(SystemExit, match="'epochs=2' is not a flag"):
        run_command(["program", "epochs=2"], lambda: pytest.fail("it ran"))


DEAF = """
import gc, os, signal, time
from experiments.common.stopping import stop_soon
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
stop_soon("stopped")
gc.callbacks.append(lambda phase, info: os.kill(os.getpid(), signal.SIGINT))
gc.collect()  # whose callback loses the KeyboardInterrupt
gc.callbacks.clear()
time.sleep(300)
"""


def test_a_signal_that_python_loses_stops_the_program_in_one_line():
    command = [sys.executable, "-c", DEAF]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (1, "stopped\n")


def test_a_missing_workdir_is_named():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder.", flag_values=values)
    values(["program"])
    with pytest.raises(ValueError, match="--workdir is missing"):
        workdir_from(values)


def test_line_breaks_go():
    assert one_line(ValueError("a\n b\tc")) == "a b c"


def flag_values() -> flags.FlagValues:
    values = flags.FlagValues()
    define_flags(values)
    return values


@pytest.mark.parametrize(
    "content, message",
    [
        (b"--epoch=3", "Unknown command line flag 'epoch'. Did you mean: epochs"),
        (b"--epochs=three", "flag --epochs=three: invalid literal"),
        (b"--seed=1\n--" + 10**5 * b"x", "a flag's name has more than 64 characters"),
        (b"--workdir=\xff\xfe", "can't decode byte 0xff"),
    ],
)
def test_a_flagfile_that_is_none_is_refused_in_one_line(tmp_path: Path, content, message):
    path = tmp_path / "a.flags"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        read_flags(["gr", f"--flagfile={path}"], flag_values())


def test_only_names_must_be_short():
    values = flag_values()
    long = "folder/" * 100
    assert read_flags(["gr", "--workdir", long, f"--fault_list={long}", "left"], values) == [
        "gr", "left",
    ]  # fmt: skip
    assert values.workdir == values.fault_list == long


def test_the_command_line_ends_the_program_in_one_line():
    with pytest.raises(SystemExit, match=r"^error: a flag's name has .*--helpfull lists the flags"):
        parse_flags(["gr", "--" + 1000 * "x"])
