"""Small runs as jobs of the throw-away cluster, and what Slurm says of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldct_dist import submit
from ldct_dist.cluster.jobs import Job
from ldct_dist.cluster.local import LocalRanks
from runs import losses, write_config

RANKS = 4
STEPS = 120
OPTIONS = {"nodes": 2, "ntasks_per_node": 2, "cpus_per_task": 1, "time": "10"}


def write_job(folder: Path, store: Path, **changes: Any) -> Path:
    """The YAML of a run whose steps are quick, so that a job can be disturbed in the middle of many."""
    job: dict[str, Any] = {
        "steps": STEPS,
        "data": {"crop": [4, 16, 16]},
        "checkpoint": {"every": 20},
        "validation": {"every": 1_000_000},
        "log": {"every": 20},
    }
    return write_config(folder, store, **job | changes)


def train_here(folder: Path, store: Path, **changes: Any) -> Path:
    """The same run on as many ranks of this machine, without Slurm."""
    folder.mkdir(exist_ok=True)
    with LocalRanks(["train", str(write_job(folder, store, **changes))], RANKS, folder / "log") as ranks:
        assert ranks.wait() == 0, (folder / "log").read_text()
    return folder / "runs" / "run"


def wait(ready: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.2)


def field(cluster, job: str, name: str) -> str:
    """What `scontrol show job` says, such as Restarts or JobState."""
    text = cluster.run("scontrol", "--oneliner", "show", "job", job)
    return re.search(rf"\b{name}=(\S*)", text)[1]


def over(cluster, job: str) -> bool:
    return not Job(job, field(cluster, job, "JobState")).active


def ranks_on(machines, node: int) -> list[int]:
    """The processes of the ranks that run on a node."""
    processes = machines.order("processes_of", node)
    words = {int(pid): line.split() for pid, line in processes.items()}  # none of one that is just ending
    return [
        pid for pid, line in words.items() if line and "python" in line[0] and "submitit.core._submit" in line
    ]


def nodes_of(cluster, job: str) -> list[int]:
    """Numbers of the nodes that the job runs on, that of its script first."""
    names = cluster.run("scontrol", "show", "hostnames", field(cluster, job, "NodeList")).split()
    return [int(name.removeprefix("node")) for name in names]


class Trial:
    """A run given to Slurm, brought to a step where something can happen to it.

    options: of sbatch; changes: of the run's config.
    """

    def __init__(self, cluster, store, folder, options=OPTIONS, **changes) -> None:
        self.cluster = cluster
        self.run = folder / "runs" / "run"
        self.job = submit(write_job(folder, store, **changes), **options)

    def comes_to(self, step: int) -> None:
        wait(lambda: len(losses(self.run)) >= step, f"step {step}; {self.job.log}")

    def nodes(self) -> list[int]:
        return nodes_of(self.cluster, self.job.job_id)

    def ends(self) -> None:
        """It comes to its end, with nothing requeued twice."""
        assert self.job.results() == [0] * RANKS

    @property
    def restarts(self) -> int:
        return int(field(self.cluster, self.job.job_id, "Restarts"))
