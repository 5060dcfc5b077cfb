"""What a run folder keeps of its jobs: the latest job's id, and the logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ldct_dist.cluster.progress import read_starts
from ldct_dist.files import replace

JOB = Path("slurm/job.json")
CONFIG = Path("slurm/job.yaml")
"""the config that the latest job was submitted with; the job reads it when it starts"""
CANCELLED = Path("slurm/cancelled")
"""holds the id of the latest job that a person cancelled"""
_ERROR = re.compile(
    r"(\d+: )?(error: |[\w.]*(Error|Exception|Interrupt)\b|no \w+ for .* leaves with exit code 7[67]\b)"
)


def is_run(folder: Path) -> bool:
    """Whether a run was started, or submitted, in this folder."""
    return (folder / "config.yaml").is_file() or (folder / CONFIG).is_file()


def job_of(run: Path) -> str | None:
    """The job that the run was last submitted as, or last started in; None if that was not under Slurm."""
    starts, record = read_starts(run), run / JOB
    if record.is_file() and not (starts and _newer(run / "environment.json", record)):
        return str(json.loads(record.read_text())["job"])
    return starts[-1]["slurm_job"] if starts else None


def made_for(run: Path, job: str) -> bool:
    """Whether `submit` or a sweep made this job for the run, so that it does nothing else.

    Any other job may be an allocation that a person works in, or a script that trains several runs.
    """
    record = run / JOB
    return record.is_file() and str(json.loads(record.read_text())["job"]) == job


def note_cancelled(run: Path) -> None:
    """Record that a person cancelled the run's job, whose exit code then says nothing about the run."""
    (run / CANCELLED).parent.mkdir(exist_ok=True)
    replace(run / CANCELLED, f"{job_of(run)}\n")


def was_cancelled(run: Path, job: str) -> bool:
    path, started = run / CANCELLED, run / "environment.json"
    if not path.is_file() or path.read_text().strip() != job:
        return False
    started_since = started.is_file() and _newer(started, path)  # in the same allocation
    return not started_since


def error_of(run: Path) -> str | None:
    """The last error line in the log of the run's latest job; None if there is none."""
    log = _log_of(run)
    if log is None:
        return None
    with open(log, "rb") as f:
        f.seek(max(0, f.seek(0, 2) - 16384))
        lines = f.read().decode(errors="replace").splitlines()
    errors = [line.strip() for line in lines if _ERROR.match(line)]
    return errors[-1] if errors else None


def _log_of(run: Path) -> Path | None:
    if (run / JOB).is_file():
        named = Path(json.loads((run / JOB).read_text()).get("log", ""))
        if named.is_file():
            return named
    logs = [*(run / "slurm").glob("*.log"), *(run / "slurm").glob("*_log.err")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def _newer(a: Path, b: Path) -> bool:
    return a.stat().st_mtime > b.stat().st_mtime
