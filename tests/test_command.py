"""The command line that all experiments share."""

from __future__ import annotations

import pytest
from absl import flags

from experiments.command import one_line, run_command, workdir_from
from jaxfi.campaign import NotReproducible


@pytest.fixture(autouse=True)
def _no_signal_handlers(monkeypatch):
    monkeypatch.setattr("experiments.command.stop_soon", lambda message: None)


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


def test_a_missing_workdir_is_named():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder.", flag_values=values)
    values(["program"])
    with pytest.raises(ValueError, match="--workdir is missing"):
        workdir_from(values)


def test_line_breaks_go():
    assert one_line(ValueError("a\n b\tc")) == "a b c"
