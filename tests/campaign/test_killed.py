"""What the main experiment keeps when it is killed or told to stop, alone and in a job."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from experiments.common.job import define_job_flags, join_from_flags
from jaxfi.data import Dataset
from jaxfi.training import TrainConfig, TrainResult, has_checkpoint, train
from tests.campaign.test_distributed import free_port
from tests.training.test_training import SmallNetwork

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

PATIENCE = 3000  # seconds; a machine that others use may stand still for minutes

# Training, killed in the middle of an epoch


def train_small(workdir: Path | None) -> TrainResult:
    """Eleven steps an epoch; a checkpoint after every ten steps and every epoch."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 120).astype(np.int32)
    images = generator.integers(0, 255, (120, 8, 8, 1)).astype(np.uint8)
    data = (images[:90], labels[:90], images[90:], labels[90:])
    dataset = Dataset("made-up", *data, (0.5,), (0.5,), 10, "")
    config = TrainConfig(
        epochs=20, batch_size=8, optimizer="adam", learning_rate=0.01, alpha=0.01,
        convolution="im2col", derivative="fast", test_batch_size=16, checkpoint_every=0.0,
    )  # fmt: skip
    return train(SmallNetwork(), dataset, config, workdir=workdir)


TRAINING = (
    "import sys; from tests.campaign.test_killed import train_small; train_small(sys.argv[1])"
)


@pytest.mark.slow
def test_training_killed_in_mid_epoch_ends_in_the_same_bits(tmp_path: Path) -> None:
    generator = random.Random(0)
    last = tmp_path / "checkpoints" / "last"
    for _ in range(4):
        command = [sys.executable, "-c", TRAINING, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT) as child:
            before = newest(last)
            while newest(last) == before and child.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.uniform(0, 0.3))
            child.kill()
    assert has_checkpoint(last)
    resumed, whole = train_small(tmp_path), train_small(None)
    for a, b in zip(*map(jax.tree.leaves, (resumed.variables, whole.variables)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def newest(folder: Path) -> str:
    """Name of the newest checkpoint; empty without one."""
    names = [path.name for path in folder.glob("[0-9]*")] if folder.is_dir() else []
    return max((name for name in names if name.isdecimal()), default="")


# The main experiment


def command(workdir: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "experiments.gr", "--flagfile=experiments/flags/smoke.flags",
        "--num_faults=60", "--num_images=20", "--campaign_batch_size=20", f"--workdir={workdir}",
        *more,
    ]  # fmt: skip


def run(workdir: Path, *more: str) -> None:
    subprocess.run(command(workdir, *more), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=PATIENCE)


@pytest.mark.slow
def test_a_job_reports_what_one_process_does(tmp_path: Path) -> None:
    alone, job = tmp_path / "alone", tmp_path / "job"
    run(alone)
    run(job, "--train_only")
    assert not (job / "campaigns").exists()
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    commands = [
        command(job, coordinator, "--num_processes=2", f"--process_id={process_id}")
        for process_id in range(2)
    ]
    with (
        subprocess.Popen(commands[0], cwd=ROOT, env=ENVIRONMENT) as first,
        subprocess.Popen(commands[1], cwd=ROOT, env=ENVIRONMENT) as second,
    ):
        assert [member.wait(timeout=PATIENCE) for member in (first, second)] == [0, 0]
    assert (job / "table.csv").read_bytes() == (alone / "table.csv").read_bytes()
    assert (job / "faults.csv").read_bytes() == (alone / "faults.csv").read_bytes()


@pytest.fixture
def hearing_ctrl_c() -> Iterator[None]:
    """A test run in the background ignores SIGINT, and so would the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hearing_ctrl_c")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_experiment_stops_at_once_whatever_it_does(tmp_path: Path, stop: int) -> None:
    generator = random.Random(stop)
    for workdir in (tmp_path / "first", tmp_path / "second"):
        pipe = {"stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command(workdir), cwd=ROOT, env=ENVIRONMENT, **pipe) as child:
            while not (workdir / "config.json").exists():
                time.sleep(0.1)
            time.sleep(generator.uniform(3, 12))  # compiling or training, most of the time
            child.send_signal(stop)
            began = time.monotonic()
            error = child.communicate()[1]
            seconds = time.monotonic() - began
        # On a machine that others use, time says nothing.
        assert seconds < (2 if os.getloadavg()[0] < os.cpu_count() else 30)
        assert child.returncode == 1
        assert error.splitlines()[-1].startswith("stopped: what is finished is saved")
        assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_processes=2", "--process_id=0"], "need a coordinator"),
        (["--coordinator=auto", "--num_processes=2"], "auto finds num_processes"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "out of range"),
    ],
)
def test_job_flags_that_do_not_fit(arguments: list[str], message: str) -> None:
    values = flags.FlagValues()
    define_job_flags(values)
    values(["gr", *arguments])
    with pytest.raises(ValueError, match=message):
        join_from_flags(values)
