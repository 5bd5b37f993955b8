"""Many processes: real ones on loopback, killed and started again, give one process's bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxfi import load_campaign, run_campaign
from jaxfi.campaign import join_job
from jaxfi.campaign._processes import Claims
from tests.campaign.test_campaign import arguments, assert_same

ROOT = Path(__file__).parents[2]

# Blocks are small and slow, so that a process can be killed while others work.
MEMBER = """
import sys, time
from jaxfi.campaign._processes import join_job
directory, pause, coordinator, *which = sys.argv[1:]
join_job(coordinator, *map(int, which))
from jaxfi import run_campaign
from jaxfi.campaign import _run as campaign
from tests.campaign.test_campaign import arguments
campaign.FAULTS_PER_BLOCK = 4
run_block = campaign.run_checked
def slow_block(*given, **named):
    print("block", flush=True)
    time.sleep(float(pause))
    return run_block(*given, **named)
campaign.run_checked = slow_block
found = run_campaign(**arguments(), workdir=directory)
print("outcomes", found.outcomes.sum(), flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running_job(*given: Any, **named: Any) -> Iterator[list[subprocess.Popen]]:
    """A job that is killed at the end, as a scheduler does after one member died."""
    members = start_job(*given, **named)
    try:
        yield members
    finally:
        for member in members:
            member.kill()
            if not member.stdout.closed:  # as it is after another communicate()
                member.communicate()


def start_job(
    directory: Path, num_processes: int, pause: float = 0.0, *, slurm: bool = False
) -> list[subprocess.Popen]:
    """The members of a job, told of each other by arguments, or by Slurm's variables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    port, members = free_port(), []
    for process_id in range(num_processes):
        job = [f"127.0.0.1:{port}", str(num_processes), str(process_id)]
        if slurm:
            job, environment = ["auto"], environment | slurm_variables(num_processes, process_id)
        members.append(subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(directory), str(pause), *job],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    return members


def slurm_variables(num_processes: int, process_id: int) -> dict[str, str]:
    """What `srun` sets and JAX reads; it takes the port from the job's number."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(process_id),
        "SLURM_LOCALID": str(process_id),
    }


def run_job(*given: Any, **named: Any) -> list[str]:
    """What each member printed, once all have ended well."""
    printed = []
    with running_job(*given, **named) as members:
        for member in members:
            out, error = member.communicate(timeout=600)
            assert member.returncode == 0, error[-3000:]
            printed.append(out)
    return printed


def wait_for_block(member: subprocess.Popen) -> None:
    line = member.stdout.readline()
    assert line == "block\n", member.communicate()[1][-3000:]


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    return run_campaign(**arguments())


def test_two_processes_under_slurm_share_the_work(tmp_path: Path, alone) -> None:
    printed = run_job(tmp_path, 2, pause=0.2, slurm=True)
    shares = [text.count("block") for text in printed]
    assert all(shares), "one process did nothing"
    assert len({text.splitlines()[-1] for text in printed}) == 1
    assert printed[0].splitlines()[-1] == f"outcomes {alone.outcomes.sum()}"
    assert_same(load_campaign(tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes, victim", [(2, 1), (4, 2), (2, 0)])
def test_a_killed_process_and_a_restarted_job(
    tmp_path: Path, alone, num_processes: int, victim: int
) -> None:
    with running_job(tmp_path, num_processes, pause=0.5) as members:
        wait_for_block(members[victim])
        time.sleep(random.Random(num_processes).uniform(0, 1))
        members[victim].send_signal(signal.SIGKILL)
        members[victim].wait()
        time.sleep(1)
    with pytest.raises(ValueError, match="not finished|no golden outputs"):
        load_campaign(tmp_path)
    printed = run_job(tmp_path, num_processes)
    assert {text.splitlines()[-1] for text in printed} == {f"outcomes {alone.outcomes.sum()}"}
    assert_same(load_campaign(tmp_path), alone)
    one = run_campaign(**arguments(), workdir=tmp_path)  # and one process may read it all
    assert_same(one, alone)


@pytest.mark.slow
def test_the_others_do_what_a_dead_process_left(tmp_path: Path, alone) -> None:
    """Without a restart: the campaign is whole before JAX's runtime gives the job up."""
    with running_job(tmp_path, 2, pause=0.5) as members:
        wait_for_block(members[1])
        members[1].kill()
        while (line := members[0].stdout.readline()) == "block\n":
            pass
    assert line == f"outcomes {alone.outcomes.sum()}\n"
    assert_same(load_campaign(tmp_path), alone)


@pytest.mark.parametrize(
    "given, message",
    [
        (("", 2, 0), "num_processes and process_id need a coordinator"),
        ((None, None, 1), "num_processes and process_id need a coordinator"),
        (("auto", 2, None), "auto finds num_processes and process_id by itself"),
        (("127.0.0.1:1", 2, 2), "process_id 2 of num_processes 2 is out of range"),
        (("127.0.0.1:1", None, 0), "process_id 0 of num_processes None"),
    ],
)
def test_a_job_that_cannot_be(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_job(*given)


def test_a_process_alone_joins_nothing() -> None:
    join_job()
    join_job("", None, None)


CLAIMANT = """
import sys
from pathlib import Path
from jaxfi.campaign._processes import Claims
claims = Claims(Path(sys.argv[1]))
print(*[int(claims.take(n)) for n in range(4)], flush=True)
sys.stdin.read()
"""


def claimant(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CLAIMANT, str(path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_lock_has_one_holder_and_outlives_none(tmp_path: Path) -> None:
    path = tmp_path / "claims"
    mine = Claims(path)
    assert mine.take(2)
    assert not mine.take(2)
    with claimant(path) as other:
        assert other.stdout.readline() == "1 1 0 1\n"
        assert not mine.take(1)
        other.kill()
        other.wait()
        assert mine.take(1)
    mine.close()
    with claimant(path) as third:
        assert third.stdout.readline() == "1 1 1 1\n"
        third.kill()


def test_claims_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "claims").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="cannot write .*claims"):
        Claims(tmp_path / "claims")
    assert not (tmp_path / "elsewhere").exists()
