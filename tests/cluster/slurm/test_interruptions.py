"""Whatever becomes of a job, the run comes to its end by itself, and is bit for bit the unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs_of import OPTIONS, Trial, field, train_here, wait, write_job
from submitit.core.utils import UncompletedJobError

from ldct_dist.cluster.cancel import cancel
from ldct_dist.errors import UserError
from runs import same, starts

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("user_of")]


def test_by_submitit_and_by_sbatch_it_is_the_run_of_four_local_ranks(cluster, store, unbroken, tmp_path):
    trial = Trial(cluster, store, tmp_path)
    assert len(trial.nodes() or []) in (0, 2)
    by_hand = tmp_path / "by-hand"
    by_hand.mkdir()
    config = write_job(by_hand, store)
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


def test_a_job_that_is_just_being_signalled_is_not_over(machines, store, tmp_path):
    """Slurm calls it SIGNALING, not RUNNING, until the nodes have taken a SIGCONT, with which a preemption begins."""
    trial = Trial(machines, store, tmp_path)
    wait(lambda: field(machines, trial.job.job_id, "JobState") == "RUNNING", "running")
    processes = machines.order("processes_of", trial.nodes()[0])
    (slurmd,) = (int(pid) for pid, line in processes.items() if "slurmd -D" in line)
    os.kill(slurmd, signal.SIGSTOP)
    try:
        machines.run("scancel", "--signal=CONT", trial.job.job_id)
        wait(lambda: trial.job.state == "SIGNALING", "the signal on its way")
        assert not trial.job.done(force_check=True)
    finally:
        os.kill(slurmd, signal.SIGCONT)
    machines.run("scancel", trial.job.job_id)


def test_requeued_by_a_person(cluster, store, unbroken, tmp_path):
    trial = Trial(cluster, store, tmp_path)
    trial.comes_to(20)
    cluster.run("scontrol", "requeue", trial.job.job_id)
    trial.ends()
    assert trial.restarts == 1
    assert same(trial.run, unbroken)


@pytest.mark.parametrize("requeue", [True, False])
def test_at_the_time_limit_again_and_again(cluster, store, tmp_path, requeue):
    """A limit of a minute leaves time for one step each: a step, and twice what saving takes, must still fit."""
    unbroken = train_here(tmp_path / "unbroken", store, steps=3)
    options = OPTIONS | {"time": "1"} | ({} if requeue else {"no_requeue": True})
    trial = Trial(cluster, store, tmp_path, options, steps=3)
    first = trial.job.job_id
    trial.ends()
    assert [start["from_step"] for start in starts(trial.run)] == [0, 1, 2]
    assert len({start["slurm_job"] for start in starts(trial.run)}) == (1 if requeue else 3)
    assert trial.restarts == (2 if requeue else 0)
    assert (trial.job.job_id == first) == requeue
    assert same(trial.run, unbroken)


@pytest.mark.parametrize("requeue", [True, False])
def test_what_scancel_has_ended_stays_ended(cluster, store, unbroken, tmp_path, requeue):
    """Slurm gives the ranks KillWait to save; only a person starts the run again."""
    options = OPTIONS | ({} if requeue else {"no_requeue": True})
    trial = Trial(cluster, store, tmp_path, options)
    trial.comes_to(30)
    cluster.run("scancel", trial.job.job_id)
    wait(lambda: not cluster.run("squeue", "-h").strip(), "the job's end")
    assert field(cluster, trial.job.job_id, "JobState") == "CANCELLED"
    again = Trial(cluster, store, tmp_path, options)
    again.ends()
    assert len(starts(again.run)) == 2
    assert same(again.run, unbroken)


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
