"""A sweep as one array job: a task a run, each saved and requeued for itself."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ldct_dist.cluster import jobs
from ldct_dist.cluster.progress import read_progress
from ldct_dist.cluster.record import JOB, job_of
from ldct_dist.cluster.sweep import Point, Sweep, write_hparams
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError

CONFIG = Path("slurm/config.yaml")
SCRIPT = """\
#!/bin/bash
# The runs of {folder}, one a task of the array.
#SBATCH --job-name=ldct-sweep
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
set -u

runs=(
{runs}
)
run=${{runs[$SLURM_ARRAY_TASK_ID]}}
exec >> "$run/slurm/$SLURM_JOB_ID.log" 2>&1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))   # jobs that share a node do not meet
export MASTER_ADDR MASTER_PORT

# srun does not take over sbatch's --cpus-per-task since Slurm 22.05. Ranks that stop together need not leave
# together: the first to go must not have the others killed, or their exit code would be lost.
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} --kill-on-bad-exit=0 --wait=60 \\
  {python} -m ldct_dist train "$run/slurm/config.yaml"
code=$?

# 75: every rank has stopped at one step and the checkpoint is committed. Leaving now would count as
# finished, so the task asks to be queued again: by its own name, since the number of an array's last task is
# that of the whole array.
if [ "$code" -eq 75 ]; then
  exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""


def render(sweep: Sweep, python: str) -> str:
    """The job script: task i of the array trains run i of the sweep."""
    runs = "\n".join(f"  {shlex.quote(str(point.folder.resolve()))}" for point in sweep.points)
    # A comment ends with its line, so a folder's name must not bring another.
    folder = " ".join(str(sweep.folder).split())
    return SCRIPT.format(folder=folder, runs=runs, python=shlex.quote(python))


def submit_array(sweep: Sweep, options: Sequence[str], say: Callable[[str], None] = print) -> str | None:
    """Submit the runs that are neither done nor queued, as one array; its job id, None if there are none.

    options: of sbatch, for each task: --nodes=2, --ntasks-per-node=4, --partition=gpu, --array's %limit apart.
    Raises UserError if Slurm does not answer or refuses the job.
    """
    missing = _missing(sweep, say)
    if not missing:
        return None
    write_hparams(sweep)
    for i in missing:
        config = sweep.points[i].folder / CONFIG
        config.parent.mkdir(exist_ok=True)
        config.write_text(to_yaml(sweep.points[i].config))
    script = sweep.folder / "sweep.sbatch"
    script.write_text(render(sweep, sys.executable))
    array = f"--array={','.join(map(str, missing))}"
    command = ["sbatch", "--parsable", array, "--output=/dev/null", *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().split(";")[0]  # job id, and on some sites the cluster's name
    for i in missing:
        (sweep.points[i].folder / JOB).write_text(json.dumps({"job": f"{job}_{i}"}))
    return job


def _missing(sweep: Sweep, say: Callable[[str], None]) -> list[int]:
    """Which points are to be submitted, by their place in the sweep."""
    ids = {point.config.name: job_of(point.folder) for point in sweep.points}
    known, fault = jobs.ask({job for job in ids.values() if job is not None})
    if fault is not None:
        raise UserError(f"{fault}; nothing was submitted")

    def wanted(point: Point) -> bool:
        job = known.get(ids[point.config.name] or "")
        if job is not None and job.active:
            say(f"{point.config.name}: in the queue already, job {job.id}")
            return False
        if read_progress(point.folder).done:
            say(f"{point.config.name}: done already")
            return False
        return True

    return [i for i, point in enumerate(sweep.points) if wanted(point)]
