"""The flags of a job of several processes, which share the campaigns of one --workdir."""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags

from jaxfi.campaign import join_job
from jaxfi.training import has_checkpoint, load_checkpoint


def define_job_flags(values: flags.FlagValues) -> None:
    """Defines --coordinator, --num_processes, --process_id and --train_only."""
    flags.DEFINE_string(
        "coordinator",
        "",
        "One of several processes: host:port of process 0, or auto (Slurm, Open MPI, TPU pod).",
        flag_values=values,
    )
    for name, help in (("num_processes", "How many."), ("process_id", "Which this is, from 0.")):
        flags.DEFINE_integer(
            name, None, f"With --coordinator=host:port. {help}", flag_values=values
        )
    flags.DEFINE_boolean(
        "train_only",
        False,
        "Stop after training: what one process does before several share the campaigns.",
        flag_values=values,
    )


def join_from_flags(values: flags.FlagValues) -> None:
    """Makes this process one of the job that the flags tell of. ValueError if it cannot."""
    try:
        join_job(values.coordinator or None, values.num_processes, values.process_id)
    except RuntimeError as error:
        raise ValueError(f"cannot join the job at {values.coordinator}: {error}") from None


def require_trained(folder: Path, epochs: int) -> None:
    """Raises ValueError if there are several processes and the network is not trained yet.

    Training is one process's: the others would train the same network once more.
    """
    if jax.process_count() == 1:
        return
    last = folder / "checkpoints" / "last"
    if not has_checkpoint(last) or load_checkpoint(last)[1]["epoch"] < epochs:
        raise ValueError(
            f"{folder} is not trained yet, which is not for several processes: run the same "
            "command with --train_only and without --coordinator first"
        )
