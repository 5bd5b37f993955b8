"""Many processes on one campaign: how they meet, and how they share out the work.

JAX's own runtime introduces the processes of a job to each other. The work itself is shared out
through the campaign's directory: a block of faults belongs to the process that holds its lock, and
the kernel (or the file server) gives a lock back however its holder ends. So a slow machine costs
little, and a dead one costs what it had not written.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import jax

from jaxfi.data._files import writing

AUTO = "auto"  # let JAX find the job: Slurm, Open MPI, a cloud TPU pod


def join_job(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of a job. Call it before anything that touches a device.

    Args:
      coordinator: host and port where process 0 listens, `10.0.0.1:1234`; "auto" finds it and the
        other two under Slurm, Open MPI and on a cloud TPU pod; none leaves the process alone.
      num_processes, process_id: how many there are, and which of them this is, from 0.

    Raises ValueError if the three do not fit together, RuntimeError if the job does not assemble or
    a device is already in use.
    """
    if not coordinator:
        if (num_processes or 1) > 1 or process_id:
            raise ValueError("num_processes and process_id need a coordinator: host:port or auto")
        return
    if coordinator == AUTO:
        if num_processes is not None or process_id is not None:
            raise ValueError("coordinator auto finds num_processes and process_id by itself")
    elif num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id {process_id} of num_processes {num_processes} is out of range: allowed "
            "are both, with 0 <= process_id < num_processes"
        )
    # JAX would catch SIGTERM to tell the other processes; here it ends this one, and is safe.
    jax.config.update("jax_enable_preemption_service", False)
    given = {} if coordinator == AUTO else _explicit(coordinator, num_processes, process_id)
    jax.distributed.initialize(**given)


def _explicit(coordinator: str, num_processes: int | None, process_id: int | None) -> dict:
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        # Otherwise Slurm's variables, where there are any, would choose the devices.
        "cluster_detection_method": "deactivate",
    }


class Claims:
    """Locks numbered from 0, each held by at most one process: byte n of a file is lock n.

    All of them are given back when the process closes the claims, or ends.
    """

    def __init__(self, path: Path):
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        self._path = path
        self._mine: set[int] = set()

    def take(self, number: int) -> bool:
        """Whether the lock was free, and now is this process's. False if it already was.

        Raises OSError naming the file where locks do not work on its file system.
        """
        if number in self._mine:
            return False
        with writing(self._path):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):  # systems differ in which
                return False
        self._mine.add(number)
        return True

    def close(self) -> None:
        """Gives all locks back."""
        os.close(self._file)
