"""Give a run to Slurm, by submitit: from Python, or by `ldct-dist submit`."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit import Job as AnyJob
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from ldct_dist import config as configs
from ldct_dist.cluster import jobs
from ldct_dist.cluster.environment import left_out
from ldct_dist.cluster.rank import Train
from ldct_dist.cluster.record import CONFIG, JOB
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.shape import Options, number, ranks, shaped
from ldct_dist.cluster.site import read_site
from ldct_dist.cluster.snapshot import snapshot_code, snapshot_place
from ldct_dist.cluster.status import in_queue
from ldct_dist.config import to_yaml
from ldct_dist.errors import UserError
from ldct_dist.files import real, replace
from ldct_dist.train.config import RunConfig
from ldct_dist.train.preflight import refuse_early
from ldct_dist.train.run import RunFolder

CLUSTERS = ("slurm", "local", "debug")
SCRIPT = "job.sbatch"
_SUBMITITS = ("%j", "%t", "%A", "%a")  # what its JobPaths replaces in a whole path, not only in a file's name
_ASK_S = 3.0  # between two questions to Slurm


@dataclass(frozen=True)
class Request:
    """A run, and the job that is to train it. options: of sbatch, by their long names; True for those without a value."""

    config: RunConfig
    options: Options
    site: str | None = None
    allow_new_data: bool = False

    @property
    def run(self) -> Path:
        return real(self.config.runs / self.config.name)

    @property
    def folder(self) -> Path:
        """The folder in the run's own for what belongs to its jobs."""
        return self.run / JOB.parent

    @cached_property
    def shape(self) -> dict[str, str | bool]:
        """All options of sbatch, with the site's. Raises UserError as `shaped` does."""
        return shaped(self.options, read_site(self.site))

    @property
    def tasks_per_node(self) -> int:
        return number(self.shape, "ntasks-per-node")

    @property
    def tasks(self) -> int:
        return ranks(self.shape)

    def script(self, code: Path) -> Script:
        """The job script, for a snapshot of the code in `code`. Raises UserError for a path that submitit would change."""
        if taken := next((word for word in _SUBMITITS if word in str(self.run)), None):
            raise UserError(
                f"run folder {self.run}: submitit puts a job's number in place of {taken}; choose another with runs=FOLDER"
            )
        return Script(
            name=self.config.name,
            command=["-m", "submitit.core._submit", str(self.folder)],
            code=code,
            folder=self.folder,
            workdir=Path.cwd(),
            python=sys.executable,
            options=self.shape,
            site=read_site(self.site),
        )


def submit(
    config: RunConfig | Path | str,
    *overrides: str,
    cluster: str = "slurm",
    site: str | None = None,
    allow_new_data: bool = False,
    **options: str | int | bool,
) -> AnyJob[int]:
    """Train `config` as a job: nodes=2, gpus_per_node=4, time="24:00:00", and any other option of sbatch.

    cluster: slurm; local: this machine, in the background; debug: this process, once the result is asked for.
    site: a profile in configs/sites. The code and the config are copied into the run's folder; requeues run these
    copies. The same call again, after the job has ended, goes on with the run.

    Returns a submitit Job: `job.results()` waits through all requeues and raises if the run was not finished.
    Raises UserError for a mistake in the config or the options, and if the run is in the queue already.
    """
    read = configs.read(RunConfig, Path(config), overrides) if not isinstance(config, RunConfig) else config
    given = {key.replace("_", "-"): value if value is True else str(value) for key, value in options.items()}
    return start(Request(read, given, site, allow_new_data), cluster)


def dry_run(request: Request) -> str:
    """The job script that would be submitted. Writes nothing, so it names no snapshot, but a place for one.

    Raises UserError as `submit` does for what the ranks would refuse once the job has waited in the queue.
    """
    refuse_early(request.config, request.tasks, waits="dependency" in request.shape)
    return render(request.script(snapshot_place(request.folder)))


def start(request: Request, cluster: str = "slurm") -> AnyJob[int]:
    """Submit the request; see `submit`."""
    if cluster not in CLUSTERS:
        raise UserError(f"--cluster {cluster}: one of {', '.join(CLUSTERS)}")
    tasks, _ = request.tasks, dry_run(request)  # a mistake is said before anything is written
    RunFolder(request.run).check(request.config)
    if cluster == "slurm":
        jobs.refuse_without_slurm("with --cluster local")
    _refuse_twice(request)
    try:
        with jobs.undone_if_refused(request.run):
            return _submit(request, cluster, tasks)
    except FailedSubmissionError as e:
        # Outside the block above: sbatch has taken the job, although its answer names none, and the job needs its folder.
        raise UserError(f"sbatch: {_last_words(e)}") from e


def _submit(request: Request, cluster: str, tasks: int) -> AnyJob[int]:
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        config = request.run / CONFIG
        replace(config, to_yaml(request.config))
    except OSError as e:
        raise UserError(f"run folder {request.run}: {e.strerror}; choose another with runs=FOLDER") from e
    function = Train(config, request.allow_new_data)
    if cluster != "slurm":
        return _executor_here(request, cluster).submit(function)
    text = render(request.script(snapshot_code(request.folder)))
    replace(request.folder / SCRIPT, text)
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints there what it raises
            job = Executor(request.folder, text, tasks).submit(function)
    except FailedJobError as e:
        raise UserError(f"sbatch: {_last_words(e)}") from e
    replace(request.run / JOB, json.dumps({"job": job.job_id}))
    return job


class SlurmRun(SlurmJob[int]):
    """submitit's handle on the job of a run, which follows it through requeues and chained jobs."""

    _asked = 0.0
    _known: jobs.Job | None = None

    @property
    def job_id(self) -> str:
        """The job's id; where requeuing is forbidden, that of the latest job of the chain."""
        job = self._job_id
        while (following := self._paths._folder / f"{job}.next").exists():
            job = following.read_text().strip()
        return job

    @property
    def paths(self) -> JobPaths:
        return JobPaths(self._paths._folder, self.job_id, self.task_id)

    @property
    def log(self) -> Path:
        """What all ranks print, through all requeues."""
        return self._paths._folder / f"{self.job_id}.log"

    @property
    def state(self) -> str:
        """Slurm's word for the job's state. submitit's would be sacct's, for which a job whose node is lost has ended,
        although Slurm requeues it."""
        self.done(force_check=True)
        return self._known.state if self._known is not None else "UNKNOWN"

    def done(self, force_check: bool = False) -> bool:
        """Whether Slurm neither runs the job nor is going to. A result alone says nothing: the job may be requeued."""
        if time.monotonic() - self._asked < _ASK_S and not force_check:
            return False
        job_id = self.job_id
        known, fault = jobs.ask({job_id})
        if fault is not None:
            return False
        self._asked, self._known = time.monotonic(), known.get(job_id)
        gone = self._known is None or not self._known.active
        return gone and job_id == self.job_id  # else the next one was chained meanwhile

    def stdout(self) -> str | None:
        return self.log.read_text(errors="replace") if self.log.exists() else None

    def stderr(self) -> str | None:
        return self.stdout()


class Executor(SlurmExecutor):
    """submitit's, with this package's job script."""

    job_class = SlurmRun

    def __init__(self, folder: Path, text: str, tasks: int) -> None:
        super().__init__(folder)
        self._text, self._tasks = text, tasks

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        unset = [f"--unset={name}" for name in left_out(self._text)]
        return ["env", *unset, "sbatch", str(self.folder / SCRIPT)]

    def _num_tasks(self) -> int:
        return self._tasks


def _executor_here(request: Request, cluster: str) -> Any:
    if number(request.shape, "nodes") != 1:
        raise UserError(f"--cluster {cluster}: this machine is one node; leave --nodes out")
    executor = AutoExecutor(request.folder, cluster=cluster)
    if cluster == "local":
        # submitit would hide all GPUs if none was asked for, and else choose the first ones, even if others use them.
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "unset CUDA_VISIBLE_DEVICES" if gpus is None else f"CUDA_VISIBLE_DEVICES={shlex.quote(gpus)}"
        executor.update_parameters(
            tasks_per_node=request.tasks_per_node,
            timeout_min=60 * 24 * 365,  # a run ends by itself, or by time_limit_s
            # The run is to outlive this terminal, and must not keep the pipe of this command's output open.
            local_setup=[seen, "trap '' HUP", "exec </dev/null >/dev/null 2>&1"],
        )
    return executor


def _refuse_twice(request: Request) -> None:
    job = in_queue([request.run]).get(request.run)
    if job is not None:
        raise UserError(
            f"{request.run}: in the queue already, job {job.id} ({job.state}); to end it first: "
            f"ldct-dist cancel {shlex.quote(str(request.run))}"
        )


def _last_words(error: Exception) -> str:
    """sbatch's own words in submitit's error, or the whole error if there are none."""
    lines = [line for line in str(error).splitlines() if "sbatch: " in line]
    return "; ".join(line.partition("sbatch: ")[2] for line in lines) or " ".join(str(error).split())
