"""What Slurm knows of jobs: one squeue and one sacct for any number of them, and never a hang."""

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

# What Slurm calls a job that is over, and one that waits. All else is a job at work: for a moment it may be SIGNALING,
# RESIZING, or what a later Slurm calls it. https://slurm.schedmd.com/job_state_codes.html
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
_ANEW = ("REQUEUED", "PREEMPTED", "NODE_FAIL")  # how sacct ends the life of a job that lives again


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
        """Whether Slurm runs it, or is still going to."""
        return self.state not in _OVER

    @property
    def waiting(self) -> bool:
        """Whether Slurm is going to run it."""
        return self.state in _WAITING


def ask(ids: Collection[str], timeout_s: float = 10.0) -> tuple[dict[str, Job], str | None]:
    """(the jobs that Slurm knows, by id; one line on why it could not be asked, or None).

    An array's task is found by `array_task` and by its own number. Jobs that squeue has forgotten are
    looked up in the accounting, where a site has it.
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
    """Raises UserError where no Slurm answers, with what to do `instead`: before anything is written for a job."""
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        fault: str | None = f"{missing[0]} is not on the PATH of this machine"
    else:
        _, fault = _lines(["squeue", "--noheader", "--me"], timeout_s=30.0)
    if fault is not None:
        raise UserError(f"no Slurm answers here: do this on a login node, or {instead} ({fault})")


def sbatch(script: Path, *options: str) -> str:
    """Submit a job script; the job's id, an array's own. Raises UserError if Slurm refuses."""
    command = ["sbatch", "--parsable", *options, str(script)]
    environment = outside(script.read_text())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]  # job id, and on some sites the cluster's name


@contextmanager
def undone_if_refused(*folders: Path) -> Iterator[None]:
    """After a UserError in this block, remove the folders, and the way to them, that were not there before it.

    A folder that was there stays, with what an earlier job left in it.
    """
    new = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except UserError:
        for folder in set(folders).intersection(new):
            shutil.rmtree(folder, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # gone with the folder, or another run has come to stand there meanwhile
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
        jobs.setdefault(raw, job)  # the pending tasks of an array all bear the array's own number
    return jobs


def parse_sacct(lines: Sequence[str]) -> dict[str, Job]:
    """Jobs by id, from `sacct -XPD` with the fields of `_SACCT`: one line a life, the latest last."""
    jobs: dict[str, Job] = {}
    lives_before: dict[str, int] = {}
    for line in lines:
        raw, name, state, code = line.split("|")
        word = state.split()[0]  # CANCELLED by 1000
        reason = None if code == "0:0" else _exit(code)
        job = Job(name, word, reason, lives_before.get(name, 0))
        jobs[name] = jobs[raw] = job
        lives_before[name] = job.requeues + (word in _ANEW)
    return jobs


def _exit(code: str) -> str:
    """Slurm's `code:signal` in words."""
    status, number = code.split(":")
    return f"exit code {status}" if number == "0" else f"killed by signal {number}"


def _lines(
    command: Sequence[str], timeout_s: float, harmless: str | None = None
) -> tuple[list[str], str | None]:
    """(lines of the command's output; why there are none). An error that says `harmless` gives no lines."""
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
