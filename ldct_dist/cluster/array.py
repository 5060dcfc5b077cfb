"""A sweep as one array job: a task a run, each saved and requeued for itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ldct_dist.cluster import jobs
from ldct_dist.cluster.rank import train
from ldct_dist.cluster.record import CONFIG, JOB
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.shape import Options, ranks, shaped
from ldct_dist.cluster.site import read_site
from ldct_dist.cluster.snapshot import snapshot_code, snapshot_place
from ldct_dist.cluster.status import in_queue
from ldct_dist.cluster.submit import SCRIPT
from ldct_dist.cluster.sweep import Point, Sweep, write_hparams
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError
from ldct_dist.files import real, replace
from ldct_dist.train.preflight import refuse_early


def dry_run(sweep: Sweep, options: Options, site: str | None) -> str | None:
    """The job script for all runs that are not done, queued or not, since no Slurm is asked; None if all are done.

    Writes nothing. Raises UserError for options that a sweep cannot have, and for what a run's ranks would refuse.
    """
    points = [point for point in sweep.points if not point.done]
    script = _script(real(sweep.folder) / JOB.parent, points, options, site)
    for point in points:
        refuse_early(point.config, ranks(script.options), waits="dependency" in script.options)
    return render(script) if points else None


def submit_array(
    sweep: Sweep, options: Options, site: str | None, say: Callable[[str], None] = print
) -> str | None:
    """Submit the runs that are neither done nor queued as one array; its job id, or None if there is nothing to submit.

    options: of sbatch, by their long names, for each run. Raises UserError if Slurm does not answer or refuses.
    """
    dry_run(sweep, options, site)  # a mistake is said before anything is written
    points = _missing(sweep, say)
    if not points:
        return None
    with jobs.undone_if_refused(real(sweep.folder), *(real(point.folder) for point in points)):
        return _submit(sweep, points, options, site)


def _submit(sweep: Sweep, points: Sequence[Point], options: Options, site: str | None) -> str:
    folder = real(sweep.folder) / JOB.parent
    write_hparams(sweep)
    for point in points:
        config = _config(point)
        config.parent.mkdir(exist_ok=True)
        replace(config, to_yaml(point.config))
    text = render(_script(folder, points, options, site, snapshot_code(folder)))
    replace(folder / SCRIPT, text)
    job = jobs.sbatch(folder / SCRIPT)
    for i, point in enumerate(points):
        record = {"job": f"{job}_{i}", "log": str(folder / f"{job}_{i}.log")}
        replace(point.folder / JOB, json.dumps(record))
    return job


def train_task(configs: Sequence[Path]) -> int:
    """Train the run of this task of the array, as one of its ranks; the exit code.

    configs: of all tasks, from the job script. So a task that waits trains its own run even if the sweep has grown.
    """
    return train(configs[int(os.environ["SLURM_ARRAY_TASK_ID"])], [])


def _script(
    folder: Path,
    points: Sequence[Point],
    options: Options,
    site: str | None,
    code: Path | None = None,
) -> Script:
    profile = read_site(site)
    if not profile.requeue or "no-requeue" in options:
        raise UserError("a sweep's runs go on by requeuing: where that is forbidden, submit them one by one")
    return Script(
        name="ldct-sweep",
        command=["-m", "ldct_dist", "sweep-task", *(str(_config(point)) for point in points)],
        code=code or snapshot_place(folder),
        folder=folder,
        workdir=Path.cwd(),
        python=sys.executable,
        options=shaped(options, profile),
        site=profile,
        parts=len(points),
    )


def _config(point: Point) -> Path:
    """Where the task of a run finds its config."""
    return real(point.folder) / CONFIG


def _missing(sweep: Sweep, say: Callable[[str], None]) -> list[Point]:
    """The runs that are neither done nor queued. Slurm has to answer only if some are not done."""
    left = []
    for point in sweep.points:
        if point.done:
            say(f"{point.config.name}: done already")
        else:
            left.append(point)
    if not left:
        return []
    jobs.refuse_without_slurm("with --cluster local")
    queued = in_queue(point.folder for point in left)
    for point in left:
        if point.folder in queued:
            say(f"{point.config.name}: in the queue already, job {queued[point.folder].id}")
    return [point for point in left if point.folder not in queued]
