"""Ending a run from outside without losing anything: it saves first, and only then is its job ended."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldct_dist.cluster.environment import outside
from ldct_dist.cluster.progress import is_running, read_progress
from ldct_dist.cluster.record import made_for, note_cancelled
from ldct_dist.cluster.status import Row, has_begun, status
from ldct_dist.errors import UserError

_ASK_S = 5.0  # between two looks at a job, each of which asks Slurm or the file system


def cancel(run: Path, grace_s: float, say: Callable[[str], None] = print) -> None:
    """Ask the ranks to save and stop, wait for it up to `grace_s` seconds, and see to it that no requeue follows.

    A job that is still pending is only taken out of the queue. A job that neither `submit` nor a sweep made may hold
    other work than this run: there, only the run's own process is asked. Raises UserError if there is nothing to cancel,
    if Slurm does not answer, or if the run has not stopped in time, in which case it goes on.
    """
    (row, *more), fault = status([run])
    if more:
        raise UserError(f"{run}: a folder of {len(more) + 1} runs; name one of them")
    if fault is not None:
        raise UserError(f"{fault}; nothing was cancelled")
    if row.job is not None and row.job.active:
        if made_for(run, row.job.id):
            _cancel_job(row, grace_s, say)
        else:
            _cancel_within(row, grace_s, say)
    elif row.state == "running":
        _cancel_local(row, grace_s, say)
    else:
        raise UserError(f"{run}: it is {row.state}; there is nothing to cancel")
    after = read_progress(run)
    kept = (
        f"its last checkpoint is of step {after.checkpoint}" if after.checkpoint else "it has no checkpoint"
    )
    say(f"cancelled at step {after.step}; {kept}")


def _cancel_job(row: Row, grace_s: float, say: Callable[[str], None]) -> None:
    assert row.job is not None
    note_cancelled(row.folder)
    if row.state == "running":
        # First, so that the job cannot requeue itself when the ranks leave, whatever its script does.
        _slurm("scontrol", "update", f"JobId={row.job.id}", "Requeue=0")
        _slurm("scancel", "--signal=USR1", row.job.id)
        say(f"asked job {row.job.id} to save and stop")
        _wait(lambda: _left(row.folder), grace_s, row, _ASK_S)
    _slurm("scancel", row.job.id)


def _left(run: Path) -> bool:
    """Whether the run's job is over. Not if Slurm does not answer: the ranks may still be saving."""
    (row, *_), fault = status([run])
    return fault is None and row.state != "running"


def _cancel_within(row: Row, grace_s: float, say: Callable[[str], None]) -> None:
    job, start = row.job, row.progress.last_start
    assert job is not None
    assert start is not None
    if job.state == "SUSPENDED" or not has_begun(row.progress, job):
        raise UserError(
            f"{row.folder}: job {job.id} ({job.state}), which `submit` did not make, does not train it now; to end "
            f"that whole job: scancel {job.id}"
        )
    if start.get("slurm_node") is None:
        # Started by hand, such as in a shell of salloc, so no script requeues it.
        _cancel_local(row, grace_s, say)
        return
    note_cancelled(row.folder)
    # Or its script, if it is one like slurm/train.sbatch, would now requeue the job.
    _slurm("scontrol", "update", f"JobId={job.id}", "Requeue=0")
    if start["host"] == platform.node():
        _cancel_local(row, grace_s, say)
    else:
        # Without the variables of a job that this command may itself run in: srun would take options from them.
        _slurm(*_signal_there(job.id, start), env=outside())
        say(f"asked process {start['pid']} on {start['host']} to save and stop")
        _wait(lambda: not read_progress(row.folder).alive(time.time()), grace_s, row, _ASK_S)
    say(f"job {job.id} was not made by `submit`, so it is left to end by itself")


def _signal_there(job: str, start: dict[str, Any]) -> list[str]:
    """srun's command for a step of that job that signals the process of `start`, if that is still the one that trains."""
    signal_it = 'tr "\\0" " " < /proc/$0/cmdline | grep -qF -e "$1" && kill -USR1 "$0"'
    where = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={start['slurm_node']}"]
    words = [str(start["pid"]), " ".join(start["command"][1:])]
    return ["srun", f"--jobid={job}", *where, "--input=none", "sh", "-c", signal_it, *words]


def _cancel_local(row: Row, grace_s: float, say: Callable[[str], None]) -> None:
    start = row.progress.last_start
    assert start is not None
    if start["host"] != platform.node():
        raise UserError(f"{row.folder}: it runs on {start['host']}, without Slurm; run this command there")
    # The ranks agree on a stop, so asking one of them is asking all.
    os.kill(start["pid"], signal.SIGUSR1)
    say(f"asked process {start['pid']} to save and stop")
    _wait(lambda: not is_running(start), grace_s, row, 1.0)


def _wait(stopped: Callable[[], bool], grace_s: float, row: Row, pause_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while not stopped():
        if time.monotonic() > deadline:
            raise UserError(
                f"{row.folder}: not stopped within {grace_s:g} s, so it was left running; give it longer "
                "(--grace), or end it without a checkpoint (scancel, kill)"
            )
        time.sleep(pause_s)


def _slurm(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command of Slurm's. It is no error if the job has ended meanwhile: that is what was wanted."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=env)
    except subprocess.TimeoutExpired as e:
        raise UserError(f"{command[0]}: Slurm did not answer within 30 s; nothing was cancelled") from e
    over = ("Invalid job id", "already completing or completed", "Job/step already")
    if done.returncode != 0 and not any(words in done.stderr for words in over):
        raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
