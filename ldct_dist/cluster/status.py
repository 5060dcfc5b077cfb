"""A table of runs: what Slurm says of their jobs, and how far each has come."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldct_dist.cluster import jobs
from ldct_dist.cluster.jobs import Job
from ldct_dist.cluster.progress import Progress, read_progress
from ldct_dist.cluster.record import error_of, is_run, job_of, made_for, was_cancelled
from ldct_dist.errors import UserError

HEADINGS = ("run", "state", "step", "loss", "crops/s", "wait", "saved", "ETA")


@dataclass(frozen=True)
class Row:
    """One run. name: of `find_runs`. state: new, pending, running, done, stopped, cancelled, failed or unreadable."""

    name: str
    folder: Path
    state: str
    progress: Progress
    job: Job | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self, now: float) -> dict[str, Any]:
        """For scripts: times in seconds, None where something is not known, or not finite."""
        p = self.progress
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "notes": self.notes,
            "job": asdict(self.job) if self.job else None,
            "step": p.step,
            "steps": p.steps,
            "loss": p.loss if p.loss is not None and math.isfinite(p.loss) else None,
            "crops_per_s": p.crops_per_s,
            "data_wait_percent": p.wait_percent,
            "checkpoint_step": p.checkpoint,
            "checkpoint_age_s": now - p.checkpoint_time if p.checkpoint_time is not None else None,
            "eta_s": p.eta_s if self.state == "running" else None,
        }


def status(paths: Sequence[Path]) -> tuple[list[Row], str | None]:
    """(a row for each run in or below `paths`, a line that says why Slurm could not be asked, or None).

    Slurm is asked once for all runs. Raises UserError for a path that holds no run.
    """
    now = time.time()
    looks = [(name, _look(folder)) for folder, name in find_runs(paths).items()]
    known, fault = jobs.ask({look.job for _, look in looks if look.job is not None})
    return [_row(name, look, known.get(look.job or ""), now) for name, look in looks], fault


def find_runs(paths: Sequence[Path]) -> dict[Path, str]:
    """Run folders and their names: the `paths` that are runs, and the runs up to two levels below the others.

    A name is the run's path relative to the folder that was asked for, or to the common parent of several.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name a run, or a folder of runs")
        here = list(_runs_in(path, depth=2))
        if not here:
            raise UserError(f"{path}: no run in this folder; name a run, or a folder of runs")
        found += here
    start = os.path.commonpath([os.path.abspath(path / ".." if is_run(path) else path) for path in paths])
    return {run: os.path.relpath(run, start) for run in found}


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
    elif depth > 0:
        for below in sorted(p for p in folder.iterdir() if p.is_dir()):
            yield from _runs_in(below, depth - 1)


@dataclass(frozen=True)
class _Look:
    """What a run's folder says by itself: progress and job id, or as `fault` why it cannot be read."""

    folder: Path
    progress: Progress
    job: str | None
    fault: str | None = None


def _look(folder: Path) -> _Look:
    try:
        return _Look(folder, read_progress(folder), job_of(folder))
    except UserError as e:
        return _Look(folder, Progress(), None, str(e))


def _row(name: str, look: _Look, job: Job | None, now: float) -> Row:
    folder, progress = look.folder, look.progress
    if look.fault is not None:
        return Row(name, folder, "unreadable", progress, notes=[look.fault])
    if job is not None and job.active and not _at_work(look, job, now):
        job = None
    if look.job is not None and not (job and job.active) and was_cancelled(folder, look.job):
        job = Job(look.job, "CANCELLED", requeues=job.requeues if job else 0)
    state = state_of(progress, job, now)
    return Row(name, folder, state, progress, job, list(_notes(folder, state, progress, job)))


def in_queue(runs: Iterable[Path]) -> dict[Path, Job]:
    """Those of these runs that a job trains, or is going to; runs need not exist. Raises UserError if Slurm does not
    answer."""
    now, ids = time.time(), {run: job_of(run) for run in runs}
    known, fault = jobs.ask({job for job in ids.values() if job is not None})
    if fault is not None:
        raise UserError(
            f"an earlier job of this run may still exist, but Slurm could not be asked ({fault}); nothing was submitted: "
            "submit from a login node, or, if you know that there is no such job, go on with `ldct-dist train`"
        )
    found = {run: known[job] for run, job in ids.items() if job is not None and job in known}
    return {run: job for run, job in found.items() if job.active and _at_work(_look(run), job, now)}


def _at_work(look: _Look, job: Job, now: float) -> bool:
    """Whether an active job trains the run, or is going to.

    A job that was made for the run does, until the run is done. Another allocation in which the run was trained may
    outlive it, so there it counts whether the run itself shows signs of life.
    """
    progress = look.progress
    ours = look.job is not None and made_for(look.folder, look.job)
    if not has_begun(progress, job):
        return ours or not progress.done
    if progress.done:
        return progress.alive(now)
    return ours or job.state == "SUSPENDED" or progress.alive(now)


def has_begun(progress: Progress, job: Job) -> bool:
    """Whether the newest start of the run was in this job, and since its last requeue."""
    start = progress.last_start or {}
    return (start.get("slurm_job"), start.get("slurm_restarts", 0)) == (job.id, job.requeues)


def state_of(progress: Progress, job: Job | None, now: float) -> str:
    """The run's state in one word. job: None if the run has none any more. If it has, Slurm's word counts for more than
    the run's folder."""
    if job is not None and job.active:
        return "pending" if job.waiting else "running"
    if progress.done:
        return "done"
    if job is None and progress.alive(now):
        return "running"
    if job is not None and job.state == "CANCELLED":
        return "cancelled"
    if job is not None and job.state != "COMPLETED":
        return "failed"
    return "stopped" if progress.last_start is not None else "new"


def _notes(folder: Path, state: str, progress: Progress, job: Job | None) -> Iterable[str]:
    """What a person wants to know next: which job, why it waits, why it failed, what a restart would cost."""
    if job is not None:
        facts = [f"job {job.id}"]
        if job.requeues:
            facts.append(f"requeued {_times(job.requeues)}")
        if state == "pending":
            facts.append(f"waits for: {job.reason or 'its turn'}")
            facts += [f"expected to start {job.start.replace('T', ' ')}"] if job.start is not None else []
        if state == "failed":
            facts.append(job.state.lower().replace("_", " ") + (f", {job.reason}" if job.reason else ""))
        yield ", ".join(facts)
    error = error_of(folder)
    if state in ("failed", "stopped") and error is not None:
        yield error
    if state in ("failed", "stopped", "cancelled") and progress.step > (progress.checkpoint or 0):
        yield f"{progress.step - (progress.checkpoint or 0)} steps since its last checkpoint, which the next start will repeat"


def render(rows: Sequence[Row], now: float, width: int | None) -> str:
    """The table as text, at most `width` columns wide; None: as wide as it needs.

    A name that leaves no room for the figures is on a line of its own, above them.
    """
    lines = [(row.name, *_cells(row, now)) for row in rows]
    columns = list(zip(HEADINGS, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if width is not None:
        room = width - sum(w + 2 for w in widths[1:])
        widths[0] = max(len(name) for name in columns[0] if len(name) <= max(room, len(HEADINGS[0])))
    out = [_line(HEADINGS, widths)]
    for row, cells in zip(rows, lines, strict=True):
        if len(row.name) > widths[0]:
            out.append(row.name)
            cells = ("", *cells[1:])
        out.append(_line(cells, widths))
        out += [f"  {note}" for note in row.notes]
    return "\n".join(out)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(w) for cell, w in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(w) for cell, w in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right).rstrip()


def _cells(row: Row, now: float) -> tuple[str, ...]:
    p, running = row.progress, row.state == "running"
    return (
        row.state,
        f"{p.step}/{p.steps}" if p.steps is not None else "-",
        f"{p.loss:.3g}" if p.loss is not None else "-",
        f"{p.crops_per_s:.3g}" if running and p.crops_per_s is not None else "-",
        f"{p.wait_percent:.1f}%" if running and p.wait_percent is not None else "-",
        f"{p.checkpoint}, {span(now - p.checkpoint_time)}" if p.checkpoint_time is not None else "-",
        span(p.eta_s) if running and p.eta_s is not None else "-",
    )


def span(seconds: float) -> str:
    """A duration in at most six characters: 45s, 12m, 3h05m, 2d04h, 120d."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(0, int(seconds))}s"
    if hours < 1:
        return f"{minutes}m"
    if hours < 48:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h" if hours < 24 * 100 else f"{hours // 24}d"


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
