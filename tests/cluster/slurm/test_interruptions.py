"""Whatever becomes of a job, the run comes to its end by itself, and is bit for bit the unbroken one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jobs_of import RANKS, STEPS, field, losses, nodes_of, same, starts, wait, write_config
from submitit.core.utils import UncompletedJobError

from ldct_dist import submit
from ldct_dist.cluster.cancel import cancel
from ldct_dist.cluster.local import LocalRanks
from ldct_dist.errors import UserError
from stores import make_store

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slurm
OPTIONS = {"nodes": 2, "ntasks_per_node": 2, "time": "10"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes, splits = [(6, 32, 32)] * 4, ["train"] * 3 + ["val"]
    return make_store(tmp_path_factory.mktemp("jobs") / "ct.zarr", shapes, splits).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """The run on four local ranks, without Slurm."""
    folder = tmp_path_factory.mktemp("unbroken")
    with LocalRanks(["train", str(write_config(folder, store, "run"))], RANKS, folder / "log") as ranks:
        assert ranks.wait() == 0, (folder / "log").read_text()
    assert len(losses(folder / "runs" / "run")) == STEPS
    return folder / "runs" / "run"


@pytest.fixture(autouse=True)
def user_of(cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


class Trial:
    """A run given to Slurm, brought to a step where something can happen to it."""

    def __init__(self, cluster, store, folder, steps=STEPS, **options) -> None:
        self.cluster = cluster
        self.run = folder / "runs" / "run"
        self.job = submit(write_config(folder, store, "run", steps), **{**OPTIONS, **options})

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


def test_by_submitit_and_by_sbatch_it_is_the_run_of_four_local_ranks(cluster, store, unbroken, tmp_path):
    trial = Trial(cluster, store, tmp_path)
    assert len(trial.nodes() or []) in (0, 2)
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    config = write_config(by_hand, store, "run")
    script = by_hand / "train.sbatch"
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    script.write_text(text.replace("source .venv/bin/activate", f"PATH={sys.prefix}/bin:$PATH"))
    size = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
    subprocess.run(
        ["sbatch", "--wait", f"--chdir={by_hand}", *size, script, config], check=True, env=cluster.user()
    )
    assert same(by_hand / "runs" / "run", unbroken)
    trial.ends()
    assert same(trial.run, unbroken)


def test_preempted_by_a_higher_partition(cluster, store, unbroken, tmp_path):
    trial = Trial(cluster, store, tmp_path)
    trial.comes_to(20)
    cluster.run(
        "sbatch", "--partition=high", "--nodes=6", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    )
    trial.ends()
    assert trial.restarts == 1
    assert "stopped at step" in trial.job.log.read_text()
    assert same(trial.run, unbroken)


def test_requeued_by_a_person(cluster, store, unbroken, tmp_path):
    trial = Trial(cluster, store, tmp_path)
    trial.comes_to(20)
    cluster.run("scontrol", "requeue", trial.job.job_id)
    trial.ends()
    assert trial.restarts == 1
    assert same(trial.run, unbroken)


def test_a_worker_is_powered_off(machines, store, unbroken, tmp_path):
    trial = Trial(machines, store, tmp_path)
    trial.comes_to(30)
    worker = trial.nodes()[1]
    machines.order("power_off", worker)
    trial.ends()
    machines.order("power_on", worker)
    assert trial.restarts == 1
    assert same(trial.run, unbroken)


def test_the_node_of_the_job_script_is_powered_off(machines, store, unbroken, tmp_path):
    trial = Trial(machines, store, tmp_path)
    trial.comes_to(30)
    head = trial.nodes()[0]
    machines.order("power_off", head)
    trial.ends()
    machines.order("power_on", head)
    assert trial.restarts == 1
    assert same(trial.run, unbroken)


def test_a_cable_is_cut_in_silence_and_healed(machines, store, unbroken, tmp_path):
    trial = Trial(machines, store, tmp_path)
    trial.comes_to(30)
    cut = trial.nodes()[0]  # rank 0 lives on there, beside the new one
    machines.order("cut", cut)
    wait(lambda: trial.restarts == 1, "requeued")
    wait(lambda: field(machines, trial.job.job_id, "JobState") == "RUNNING", "running again")
    assert any("submitit" in line for line in machines.order("processes_of", cut))
    machines.order("heal", cut)
    trial.ends()
    assert trial.restarts == 1
    assert same(trial.run, unbroken)
    wait(lambda: not any("submitit" in p for p in machines.order("processes_of", cut)), "the old ranks' end")


@pytest.mark.parametrize("requeue", [True, False])
def test_at_the_time_limit_again_and_again(cluster, store, tmp_path, requeue):
    """A limit of a minute leaves time for one step each: a step, and twice what saving takes, must still fit."""
    options = {} if requeue else {"no_requeue": True}
    trial = Trial(cluster, store, tmp_path, steps=2, time="1", **options)
    first = trial.job.job_id
    trial.ends()
    assert [start["from_step"] for start in starts(trial.run)] == [0, 1, 2]
    assert len({start["slurm_job"] for start in starts(trial.run)}) == (1 if requeue else 3)
    assert trial.restarts == (2 if requeue else 0)
    assert (trial.job.job_id == first) == requeue


def test_cancelled_it_stops_with_a_checkpoint_and_goes_on_when_submitted_again(
    cluster, store, unbroken, tmp_path
):
    trial = Trial(cluster, store, tmp_path)
    trial.comes_to(30)
    with pytest.raises(UserError, match="in the queue already"):
        Trial(cluster, store, tmp_path)
    cancel(trial.run, grace_s=120)
    assert trial.job.done(force_check=True)
    with pytest.raises(UncompletedJobError):
        trial.job.results()
    assert trial.restarts == 0
    again = Trial(cluster, store, tmp_path)
    again.ends()
    assert starts(again.run)[1]["from_step"] >= 30
    assert same(again.run, unbroken)
