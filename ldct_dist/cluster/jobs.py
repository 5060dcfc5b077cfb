"""What Slurm knows of jobs: one call of squeue and one of sacct for any number of them, with a time limit."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ldct_dist.cluster.environment import outside
from ldct_dist.errors import UserError

# Slurm's states of a job that is over, and of one that waits. In any other it is at work: for a moment it may be SIGNALING,
# RESIZING, or in a state of a later Slurm. https://slurm.schedmd.com/job_state_codes.html
_OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
_WAITING = (
    "CONFIGURING",
    "PENDING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
)
_SQUEUE = ("JobID", "JobArrayID", "State", "Reason", "RestartCnt", "StartTime")
_SACCT = ("JobIDRaw", "JobID", "State", "ExitCode")
_ANEW = ("REQUEUED", "PREEMPTED", "NODE_FAIL")  # sacct's last state of a start that a requeue followed


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array (`5_1`), in Slurm's words."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, ..."""
    reason: str | None = None
    """why it is pending; for one that ended badly, its exit code"""
    requeues: int = 0
    start: str | None = None
    """local time at which it started, or is expected to: 2026-11-23T11:36:00"""

    @property
    def active(self) -> bool:
        """Whether Slurm runs the job, or is still going to."""
        return self.state not in _OVER

    @property
    def waiting(self) -> bool:
        """Whether Slurm is still going to run it."""
        return self.state in _WAITING


def ask(ids: Collection[str], timeout_s: float = 10.0) -> tuple[dict[str, Job], str | None]:
    """(the jobs that Slurm knows, by id; a line that says why it could not be asked, or None).

    A task of an array is there both as ARRAY_TASK and under its own number. Jobs that squeue no longer knows are looked
    up in the accounting, where a site has one.
    """
    if not ids:
        return {}, None
    fields = ",".join(f"{field}:|" for field in _SQUEUE)
    # A job that squeue does not know is an error only if no other was asked for.
    queued, fault = _lines(
        ["squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(sorted(ids))}", "-O", fields],
        timeout_s,
        harmless="Invalid job id",
    )
    if fault is not None:
        return {}, fault
    jobs = parse_squeue(queued)
    forgotten = sorted(set(ids) - jobs.keys())
    if forgotten:
        command = ["sacct", "-X", "-n", "-P", "-D", "-j", ",".join(forgotten), "-o", ",".join(_SACCT)]
        past, fault = _lines(command, timeout_s, harmless="accounting storage is disabled")
        jobs = parse_sacct(past) | jobs
    return jobs, fault


def refuse_without_slurm(instead: str) -> None:
    """Raises UserError where no Slurm answers. Call it before anything is written for a job. instead: what to do then."""
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        fault: str | None = f"{missing[0]} is not on the PATH of this machine"
    else:
        _, fault = _lines(["squeue", "--noheader", "--me"], timeout_s=30.0)
    if fault is not None:
        raise UserError(f"no Slurm answers here: do this on a login node, or {instead} ({fault})")


def sbatch(script: Path, *options: str) -> str:
    """Submit a job script; the id of the job, or of the whole array. Raises UserError if Slurm refuses."""
    command = ["sbatch", "--parsable", *options, str(script)]
    environment = outside(script.read_text())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]  # job id, and on some sites the cluster's name


@contextmanager
def undone_if_refused(*folders: Path) -> Iterator[None]:
    """If the block raises UserError, remove `folders`, and their parents, as far as they were not there before.

    A folder that was there stays, with what an earlier job has left in it.
    """
    new = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for folder in set(folders).intersection(new):
            shutil.rmtree(folder, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # gone already, or another run has put something there meanwhile
                path.rmdir()
        raise


def parse_squeue(lines: Sequence[str]) -> dict[str, Job]:
    """Jobs by id, from `squeue -O` with the fields of `_SQUEUE`, each ended by a bar."""
    jobs = {}
    for line in lines:
        raw, name, state, reason, requeues, start = (f.strip() for f in line.split("|")[: len(_SQUEUE)])
        job = Job(
            name,
            state,
            reason if reason != "None" else None,
            int(requeues),
            start if start != "N/A" else None,
        )
        jobs[name] = job
        jobs.setdefault(raw, job)  # the pending tasks of an array all have the array's own number
    return jobs


def parse_sacct(lines: Sequence[str]) -> dict[str, Job]:
    """Jobs by id, from `sacct -XPD` with the fields of `_SACCT`: a line for each start of a job, the latest last."""
    jobs: dict[str, Job] = {}
    requeues: dict[str, int] = {}
    for line in lines:
        raw, name, state, code = line.split("|")
        word = state.split()[0]  # CANCELLED by 1000
        reason = None if code == "0:0" else _exit(code)
        job = Job(name, word, reason, requeues.get(name, 0))
        jobs[name] = jobs[raw] = job
        requeues[name] = job.requeues + (word in _ANEW)
    return jobs


def _exit(code: str) -> str:
    """Slurm's `code:signal` in words."""
    status, number = code.split(":")
    return f"exit code {status}" if number == "0" else f"killed by signal {number}"


def _lines(
    command: Sequence[str], timeout_s: float, harmless: str | None = None
) -> tuple[list[str], str | None]:
    """(the lines of the command's output, None), or ([], why there are none). An error whose message contains `harmless`
    counts as no output."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        return [], f"{command[0]} is not on the PATH of this machine"
    except subprocess.TimeoutExpired:
        return [], f"{command[0]} got no answer from Slurm within {timeout_s:g} s"
    if done.returncode != 0 and not (harmless and harmless in done.stderr):
        summary = done.stderr.strip().rpartition("\n")[2]  # after a line for each step that went wrong
        return [], f"{command[0]}: {summary.removeprefix(f'{command[0]}: ')}"
    return done.stdout.splitlines(), None
