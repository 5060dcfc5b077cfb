"""Ending a run from outside so that nothing is lost: save first, then take the job away."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ldct_dist.cluster.progress import is_running, read_progress
from ldct_dist.cluster.record import note_cancelled
from ldct_dist.cluster.status import Row, status
from ldct_dist.errors import UserError

Say = Callable[[str], None]


def cancel(run: Path, grace_s: float, say: Say = print) -> None:
    """Ask every rank to save and stop, wait for it up to `grace_s` seconds, and see that no requeue follows.

    A job that is still pending is only taken out of the queue. Raises UserError if there is nothing to
    cancel, if Slurm does not answer, or if the run had not stopped in time (it then goes on).
    """
    (row, *more), fault = status([run])
    if more:
        raise UserError(f"{run}: a folder of {len(more) + 1} runs; name one of them")
    if fault is not None:
        raise UserError(f"{fault}; nothing was cancelled")
    if row.job is not None and row.job.active:
        _cancel_job(row, grace_s, say)
    elif row.state == "running":
        _cancel_local(row, grace_s, say)
    else:
        raise UserError(f"{run}: it is {row.state}; there is nothing to cancel")
    after = read_progress(run)
    kept = f"its checkpoint is of step {after.checkpoint}" if after.checkpoint else "it has no checkpoint"
    say(f"cancelled at step {after.step}; {kept}")


def _cancel_job(row: Row, grace_s: float, say: Say) -> None:
    assert row.job is not None
    note_cancelled(row.folder)
    if row.state == "running":
        # From here on the job cannot queue itself again, whatever its script does when the ranks leave.
        _slurm("scontrol", "update", f"JobId={row.job.id}", "Requeue=0")
        _slurm("scancel", "--signal=USR1", row.job.id)
        say(f"asked job {row.job.id} to save and stop")
        _wait(lambda: status([row.folder])[0][0].state != "running", grace_s, row)
    _slurm("scancel", row.job.id)


def _cancel_local(row: Row, grace_s: float, say: Say) -> None:
    start = row.progress.last_start
    assert start is not None
    if start["host"] != platform.node():
        raise UserError(f"{row.folder}: it runs on {start['host']}, without Slurm; run this command there")
    # The ranks agree on a stop, so asking one of them is asking all.
    os.kill(start["pid"], signal.SIGUSR1)
    say(f"asked process {start['pid']} to save and stop")
    _wait(lambda: not is_running(start), grace_s, row)


def _wait(stopped: Callable[[], bool], grace_s: float, row: Row) -> None:
    deadline = time.monotonic() + grace_s
    while not stopped():
        if time.monotonic() > deadline:
            raise UserError(
                f"{row.folder}: not stopped within {grace_s:g} s, so it was left running; give it longer "
                "(--grace), or end it without a checkpoint (scancel, kill)"
            )
        time.sleep(1)


def _slurm(*command: str) -> None:
    """Run a command of Slurm's. A job that has ended meanwhile is what was wanted."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired as e:
        raise UserError(f"{command[0]}: Slurm did not answer within 30 s; nothing was cancelled") from e
    over = ("Invalid job id", "already completing or completed", "Job/step already")
    if done.returncode != 0 and not any(words in done.stderr for words in over):
        raise UserError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
